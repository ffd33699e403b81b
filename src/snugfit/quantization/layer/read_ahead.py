"""Reads the weights of the next groups while those of one group are worked on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from snugfit.model.assemble import Loaded, Piece, assemble, pieces_of
from snugfit.model.logical_weights import LogicalWeights
from snugfit.model.names import may_be_infinite
from snugfit.storage.transfer import PendingTransfer, Transfer, check_finite


class ReadAhead:
    """Gives the tensors of each of `groups` in their order; at most `budget` bytes are read ahead, or one group."""

    def __init__(
        self, transfer: Transfer, weights: LogicalWeights, groups: Sequence[tuple[str, ...]], budget: int
    ) -> None:
        self._transfer, self._weights = transfer, weights
        self._left = deque(groups)
        self._coming: deque[tuple[int, dict[Piece, PendingTransfer[Tensor]]]] = deque()
        self._budget = budget
        self._start()

    def _start(self) -> None:
        while self._left:
            size = sum(self._weights.file_bytes(name) for name in self._left[0])
            if self._coming and size + sum(bytes_ for bytes_, _ in self._coming) > self._budget:
                return
            # gate and up may be in one tensor: it is read once
            pieces = dict.fromkeys(piece for name in self._left.popleft() for piece in pieces_of(self._weights, name))
            checkpoint = self._weights.checkpoint
            self._coming.append((size, {piece: self._transfer.read(checkpoint, *piece) for piece in pieces}))

    def widen(self, budget: int) -> None:
        """Read ahead at most `budget` bytes from now on."""
        self._budget = budget
        self._start()

    def take(self, group: Sequence[str]) -> dict[str, Loaded]:
        """The next group's tensors on the device; UserError for NaN, and for infinite values of weights and scales."""
        _, coming = self._coming.popleft()
        found = {piece: pending.result() for piece, pending in coming.items()}
        self._start()
        if not _are_finite(found.values()):
            for piece, tensor in found.items():
                check_finite(self._weights.checkpoint, piece[0], tensor, infinite=may_be_infinite(piece[0]))
        return {name: assemble(self._weights, name, found) for name in group}


def _are_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether these are values, not codes, and all of them finite; a GPU is waited for once."""
    bounds: list[Tensor] = []
    for tensor in tensors:
        if not tensor.is_floating_point() or tensor.itemsize == 1:
            return False
        bounds += [bound.float() for bound in (tensor.aminmax() if tensor.numel() else ())]
    return not bounds or bool(torch.stack(bounds).isfinite().all())
