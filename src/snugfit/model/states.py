"""Hidden states of all rows on the disk: what one decoder layer gives is in one file, what the next makes in another.

The page cache holds them where there is room, so that a small model loses nothing; peak memory does not follow the
number of rows. A row's values stand without pads, rows in the order of the batches, so that any batch size can read
what another wrote.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from snugfit.errors import UserError
from snugfit.model.walk import Batch

IN_FLIGHT = 4  # batches being read ahead or written behind


class StateFile:
    """Hidden states [rows, tokens, H] of `dtype` in a file, read and written by batch, in any order."""

    def __init__(self, path: Path, batches: Sequence[Batch], width: int, dtype: torch.dtype) -> None:
        """Open or make the file for rows of `width` values a token."""
        self.path = path
        self._width, self._dtype = width, dtype
        self._bytes = width * dtype.itemsize
        self._starts: dict[tuple[int, ...], int] = {}
        end = 0
        for batch in batches:
            self._starts[batch.rows] = end * self._bytes
            end += sum(batch.lengths)
        self.size = end * self._bytes
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._pool = ThreadPoolExecutor(IN_FLIGHT)
        self._written: list[Future[tuple[int, int, int]]] = []
        self._ahead: dict[tuple[int, ...], Future[Tensor]] = {}

    def write(self, batch: Batch, hidden: Tensor) -> None:
        """Store a batch's states [B, T, H]; `settle` waits for it."""
        valid = batch.valid
        flat = hidden.reshape(-1, self._width) if valid is None else hidden[valid]
        data = flat.to(self._dtype).contiguous()
        if data.is_cuda:
            pinned = torch.empty(data.shape, dtype=data.dtype, pin_memory=True)
            pinned.copy_(data, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        else:
            pinned, done = data, None
        waiting = [future for future in self._written if not future.done()]
        if len(waiting) >= IN_FLIGHT:
            waiting[0].result()
        self._written.append(self._pool.submit(self._write, self._starts[batch.rows], pinned, done))

    def _write(self, start: int, data: Tensor, copied: torch.cuda.Event | None) -> tuple[int, int, int]:
        if copied is not None:
            copied.synchronize()
        raw = memoryview(data.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # it is a buffer
        done = 0
        while done < len(raw):
            done += os.pwrite(self._handle, raw[done:], start + done)
        return start, len(raw), zlib.crc32(raw)

    def settle(self) -> list[tuple[int, int, int]]:
        """Wait until all is written; (start, bytes, CRC-32) of each piece."""
        pieces = sorted(future.result() for future in self._written)
        self._written.clear()
        return pieces

    def prefetch(self, batch: Batch) -> None:
        """Begin to read a batch."""
        if batch.rows not in self._ahead:
            shape = sum(batch.lengths), self._width
            data = torch.empty(shape, dtype=self._dtype, pin_memory=batch.tokens.is_cuda)
            self._ahead[batch.rows] = self._pool.submit(self._read, batch.rows, data)

    def _read(self, rows: tuple[int, ...], data: Tensor) -> Tensor:
        raw = memoryview(data.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # it is a buffer
        start, done = self._starts[rows], 0
        while done < len(raw):
            count = os.preadv(self._handle, [raw[done:]], start + done)
            if not count:
                raise UserError("it ended early.", where=str(self.path), remedy="Start again with --restart.")
            done += count
        return data

    def read(self, batch: Batch) -> Tensor:
        """A batch's states [B, T, H] on the device of its tokens, zeros in the place of pads."""
        self.prefetch(batch)
        flat = self._ahead.pop(batch.rows).result().to(batch.tokens.device, non_blocking=True)
        shape = (*batch.tokens.shape, self._width)
        valid = batch.valid
        if valid is None:
            return flat.view(shape)
        hidden = torch.zeros(shape, dtype=self._dtype, device=flat.device)
        hidden[valid] = flat
        return hidden

    def holds(self, pieces: Sequence[Sequence[int]]) -> bool:
        """Whether the file has what `settle` told of it."""
        return all(self._crc(start, size) == crc for start, size, crc in pieces)

    def _crc(self, start: int, size: int) -> int:
        return zlib.crc32(os.pread(self._handle, size, start))

    def close(self) -> None:
        """Wait for what is under way and close the file."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
