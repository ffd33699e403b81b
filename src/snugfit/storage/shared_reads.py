"""Tensors that every process of a run needs on its GPU: each reads a part of their bytes, and sends it to the others.

The bytes come out of one page cache, over as many cores as there are, so that what N processes read N times takes N
times as long; between GPUs they are sent many times faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from snugfit import distributed
from snugfit.storage.checkpoint import Checkpoint, read_range, read_whole
from snugfit.storage.files import PIECE_BYTES
from snugfit.storage.safetensors_header import StoredTensor, dtype_of
from snugfit.storage.transfer import Transfer, aligned, packs_of, record_event

Fill = Callable[[memoryview], None]


def processes_share(device: torch.device) -> bool:
    """Whether several processes read for each other: over NCCL that is quicker than the page cache, over gloo not."""
    return device.type == "cuda" and distributed.world_size() > 1


class SharedReads:
    """Tensors that are being read by all processes, which all make this of the same names, and all call `result`."""

    def __init__(self, transfer: Transfer, checkpoint: Checkpoint, names: Iterable[str]) -> None:
        """Begin to read this process's part."""
        self._places: dict[str, tuple[StoredTensor, int]] = {}
        jobs, end = list[tuple[int, int, Fill]](), 0
        for pack in packs_of([checkpoint.tensors[name] for name in names]):
            begin = end
            for tensor in pack:
                self._places[tensor.name] = tensor, end
                end += aligned(tensor)
            jobs += _jobs(checkpoint, pack, begin)
        self._flat = torch.empty(end, dtype=torch.uint8, device=transfer.device)
        self._cuts = _cuts([start for start, _, _ in jobs], end)
        ready, mine = record_event(transfer.device), self._cuts[distributed.rank()]
        self._read: list[Future[int]] = [
            transfer.fill(self._flat[start : start + size], fill, ready) for start, size, fill in jobs if start in mine
        ]

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def result(self) -> dict[str, Tensor]:
        """All tensors by name, on the device; they share its memory."""
        for piece in self._read:
            piece.result()
        for process, part in enumerate(self._cuts):
            distributed.send(self._flat[part.start : part.stop], process)
        return {
            name: self._flat[place : place + tensor.bytes].view(dtype_of(tensor)).view(tensor.shape)
            for name, (tensor, place) in self._places.items()
        }


def _jobs(checkpoint: Checkpoint, pack: Sequence[StoredTensor], begin: int) -> list[tuple[int, int, Fill]]:
    """What is read at once of small tensors or of one large one: where it goes, how many bytes, and what reads it."""
    if len(pack) > 1:
        return [(begin, sum(map(aligned, pack)), partial(_fill_pack, checkpoint, pack))]
    (tensor,) = pack
    return [
        (begin + start, min(PIECE_BYTES, tensor.bytes - start), partial(read_range, checkpoint, tensor, start))
        for start in range(0, tensor.bytes, PIECE_BYTES)
    ]


def _fill_pack(checkpoint: Checkpoint, pack: Sequence[StoredTensor], raw: memoryview) -> None:
    parts, place = [], 0
    for tensor in pack:
        parts.append((tensor, raw[place : place + tensor.bytes]))
        place += aligned(tensor)
    read_whole(checkpoint, parts)


def _cuts(starts: Sequence[int], end: int) -> list[range]:
    """The bytes that each process reads: about as many, cut where a job starts."""
    world = distributed.world_size()
    bounds = [next((start for start in starts if start * world >= process * end), end) for process in range(1, world)]
    return [range(first, last) for first, last in pairwise([0, *bounds, end])]
