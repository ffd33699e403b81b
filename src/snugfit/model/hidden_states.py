"""Hidden states of all samples: in files of which a decoder layer reads one and writes another, or in a GPU's memory.

The page cache holds files if it has space, so that a small model loses nothing; peak memory does not grow with the
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

from snugfit import distributed
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
        self._rows: dict[int, tuple[int, int]] = {}
        end = 0
        for batch in batches:
            start = end
            for row, length in zip(batch.rows, batch.lengths, strict=True):
                size = length * width * dtype.itemsize
                self._rows[row] = end, size
                end += size
            self._places[batch.rows] = start, end - start
        self._order = [batch.rows for batch in (batches if mine is None else mine)]
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._written: dict[tuple[int, ...], PendingTransfer[list[int]]] = {}
        self._ahead: dict[tuple[int, ...], list[PendingTransfer[Tensor]]] = {}

    def write(self, batch: Batch, hidden: Tensor) -> None:
        """Begin to store a batch's states [B, T, H]; `wait` waits for it."""
        waiting = [write for write in self._written.values() if not write.done()]
        if len(waiting) >= IN_FLIGHT:
            waiting[0].result()
        flat = _without_pads(batch, hidden, self._width, self._dtype, str(self.path))
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
        if rows in self._ahead:
            return
        places = [self._places[rows]] if rows in self._places else [self._rows[row] for row in rows]
        for others, written in self._written.items():
            if others == rows or (rows not in self._places and not {*rows}.isdisjoint(others)):
                written.result()
        self._ahead[rows] = [
            self._transfer.read_file(
                self._handle, start, (size // (self._width * self._dtype.itemsize), self._width), self._dtype
            )
            for start, size in places
        ]

    def read(self, batch: Batch) -> Tensor:
        """A batch's states [B, T, H] on the device of its tokens, zeros in the place of pads; the next are begun.

        A batch may be one of those that the file was made for, or hold any samples of these.
        """
        self._begin(batch.rows)
        parts = [pending.result() for pending in self._ahead.pop(batch.rows)]
        flat = parts[0] if len(parts) == 1 else torch.cat(parts)
        place = self._order.index(batch.rows) if batch.rows in self._order else len(self._order)
        for rows in self._order[place + 1 : place + 1 + IN_FLIGHT]:
            self._begin(rows)
        return _with_pads(batch, flat)

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
        for ahead in (one for some in self._ahead.values() for one in some):
            ahead.cancel()
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class HeldStates:
    """Hidden states [rows, tokens, H] of all samples on a device: each layer's take the place of the one's before."""

    def __init__(self, batches: Sequence[Batch], width: int, dtype: torch.dtype, device: torch.device) -> None:
        """Room for rows of `width` values a token, in the order of the batches."""
        self._batches = batches
        self._tokens: dict[int, slice] = {}
        end = 0
        for row, length in ((row, n) for batch in batches for row, n in zip(batch.rows, batch.lengths, strict=True)):
            self._tokens[row] = slice(end, end + length)
            end += length
        self._values = torch.empty((end, width), dtype=dtype, device=device)

    def write(self, batch: Batch, hidden: Tensor) -> None:
        """Keep the states [B, T, H] of one of the batches."""
        flat = _without_pads(batch, hidden, self._values.shape[1], self._values.dtype, "hidden states")
        self._values[self._of([batch])] = flat

    def read(self, batch: Batch) -> Tensor:
        """A copy of the states [B, T, H] of a batch of any of the samples, zeros in the place of pads."""
        parts = [self._values[self._tokens[row]] for row in batch.rows]
        return _with_pads(batch, torch.cat(parts))

    def share(self) -> None:
        """Give all processes the states of each one's batches."""
        for process in range(distributed.world_size()):
            some = distributed.block(len(self._batches), process)
            if some:
                distributed.send(self._values[self._of(self._batches[some.start : some.stop])], process)

    def _of(self, batches: Sequence[Batch]) -> slice:
        """Where the tokens of batches in a row are."""
        return slice(self._tokens[batches[0].rows[0]].start, self._tokens[batches[-1].rows[-1]].stop)


def _without_pads(batch: Batch, hidden: Tensor, width: int, dtype: torch.dtype, where: str) -> Tensor:
    """The states [tokens, H] of a batch's samples; UserError if a layer does not return what it was given."""
    if hidden.shape[-1] != width or hidden.dtype != dtype:
        raise UserError(
            f"a layer returns {list(hidden.shape)} in {hidden.dtype}, not {width} values in {dtype}.",
            code="architecture-unsupported",
            where=where,
            remedy="This family needs a reader of its own: please report it.",
        )
    valid = batch.valid
    return hidden.reshape(-1, width) if valid is None else hidden[valid]


def _with_pads(batch: Batch, flat: Tensor) -> Tensor:
    """States [B, T, H] of the [tokens, H] of a batch's samples."""
    shape = (*batch.tokens.shape, flat.shape[1])
    valid = batch.valid
    if valid is None:
        return flat.view(shape)
    hidden = torch.zeros(shape, dtype=flat.dtype, device=flat.device)
    hidden[valid] = flat
    return hidden
