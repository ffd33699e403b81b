"""Hidden states of all samples on the disk: one file holds what a decoder layer reads, another what it writes.

The page cache holds them if it has space, so that a small model loses nothing; peak memory does not grow with the
number of samples. The values of a sample are stored without pads, samples in the order of the batches, so that any
batch size can read what another one wrote.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from snugfit.errors import UserError
from snugfit.model.forward_pass import Batch
from snugfit.storage.shards import crc_of
from snugfit.storage.transfer import PendingTransfer, Transfer

IN_FLIGHT = 2  # batches read ahead, and batches written behind

Piece = tuple[int, int, list[int]]  # start, bytes, CRC-32s


class StateFile:
    """Hidden states [rows, tokens, H] of `dtype` in a file, read and written by batch, in any order."""

    def __init__(
        self,
        path: Path,
        batches: Sequence[Batch],
        width: int,
        dtype: torch.dtype,
        transfer: Transfer,
        mine: Sequence[Batch] | None = None,
    ) -> None:
        """Open or make the file for rows of `width` values a token; `mine` are read ahead, by default all batches."""
        self.path = path
        self._transfer = transfer
        self._width, self._dtype = width, dtype
        self._places: dict[tuple[int, ...], tuple[int, int]] = {}
        end = 0
        for batch in batches:
            size = sum(batch.lengths) * width * dtype.itemsize
            self._places[batch.rows] = end, size
            end += size
        self._order = [batch.rows for batch in (batches if mine is None else mine)]
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._written: dict[tuple[int, ...], PendingTransfer[list[int]]] = {}
        self._ahead: dict[tuple[int, ...], PendingTransfer[Tensor]] = {}

    def write(self, batch: Batch, hidden: Tensor) -> None:
        """Begin to store a batch's states [B, T, H]; `wait` waits for it."""
        waiting = [write for write in self._written.values() if not write.done()]
        if len(waiting) >= IN_FLIGHT:
            waiting[0].result()
        if hidden.shape[-1] != self._width or hidden.dtype != self._dtype:
            raise UserError(
                f"a layer returns {list(hidden.shape)} in {hidden.dtype}, not {self._width} values in {self._dtype}.",
                code="architecture-unsupported",
                where=str(self.path),
                remedy="This family needs a reader of its own: please report it.",
            )
        valid = batch.valid
        flat = hidden.reshape(-1, self._width) if valid is None else hidden[valid]
        start, _ = self._places[batch.rows]
        self._written[batch.rows] = self._transfer.write(self._handle, start, flat.contiguous())

    def wait(self) -> list[Piece]:
        """Wait until all is written; where each batch is, and its CRC-32s."""
        return [(*self._places[rows], write.result()) for rows, write in self._written.items()]

    def prefetch(self) -> None:
        """Begin to read the first batches, of which some may still be on their way into the file."""
        for rows in self._order[:IN_FLIGHT]:
            self._begin(rows)

    def _begin(self, rows: tuple[int, ...]) -> None:
        if rows not in self._ahead:
            if rows in self._written:
                self._written[rows].result()
            start, size = self._places[rows]
            shape = size // (self._width * self._dtype.itemsize), self._width
            self._ahead[rows] = self._transfer.read_file(self._handle, start, shape, self._dtype)

    def read(self, batch: Batch) -> Tensor:
        """A batch's states [B, T, H] on the device of its tokens, zeros in the place of pads; the next are begun."""
        self._begin(batch.rows)
        flat = self._ahead.pop(batch.rows).result()
        place = self._order.index(batch.rows) if batch.rows in self._order else len(self._order)
        for rows in self._order[place + 1 : place + 1 + IN_FLIGHT]:
            self._begin(rows)
        shape = (*batch.tokens.shape, self._width)
        valid = batch.valid
        if valid is None:
            return flat.view(shape)
        hidden = torch.zeros(shape, dtype=self._dtype, device=flat.device)
        hidden[valid] = flat
        return hidden

    def start_again(self) -> None:
        """Forget what was written: the file is about to get another layer's states."""
        self._written.clear()

    def holds(self, pieces: Sequence[tuple[int, int, Sequence[int]]]) -> bool:
        """Whether the file holds these pieces, which `wait` returned."""
        return all(crc_of(self._handle, start, size) == list(crcs) for start, size, crcs in pieces)

    def close(self) -> None:
        """Wait for what is under way and close the file."""
        for written in self._written.values():
            written.cancel()
        for ahead in self._ahead.values():
            ahead.cancel()
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
