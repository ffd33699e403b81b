"""Reads the tensors of a model that is run: for a GPU in several threads, and those of the next layer in advance."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Protocol, Self

import torch
from torch import Tensor

from snugfit import distributed
from snugfit.machine import free_bytes
from snugfit.storage.checkpoint import Checkpoint, read_tensor
from snugfit.storage.files import PIECE_BYTES
from snugfit.storage.safetensors_header import TORCH_NAMES
from snugfit.storage.shared_reads import SharedReads, processes_share
from snugfit.storage.transfer import PendingTransfer, Transfer

AHEAD_SHARE = 4  # what is read in advance takes at most this part of a GPU's free memory


class ReadTensor(Protocol):
    """Reads a tensor by its name in the file; with `expert`, that expert's part of a tensor of all experts."""

    def __call__(self, name: str, expert: int | None = None, /) -> Tensor:
        """The tensor, wherever it is read to."""


class TensorReader:
    """A `ReadTensor` whose tensors are on `device`.

    On the CPU each is read when it is asked for; on a GPU in several threads, and those of `expect` in advance.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, *, shared: bool = False) -> None:
        """With `shared` all processes of a run read the same tensors, in the same order: on GPUs each reads a part."""
        self._checkpoint, self._device = checkpoint, device
        self._stack = ExitStack()
        self._transfer = self._stack.enter_context(Transfer(device)) if device.type == "cuda" else None
        self._coming: dict[str, PendingTransfer[Tensor]] = {}
        self._together: SharedReads | None = None
        self._read: dict[str, Tensor] = {}
        self._shared = shared and processes_share(device)
        # what all can have in advance must not depend on the memory of one
        self._room = min(distributed.gather(self._unused())) // 2 if self._shared else 0

    def __call__(self, name: str, expert: int | None = None, /) -> Tensor:
        """The tensor; UserError where its bytes cannot be read."""
        if self._transfer is None:
            return read_tensor(self._checkpoint, name, expert)
        if self._together is not None and name in self._together:
            self._read, self._together = self._together.result(), None
        if name in self._read:
            whole = self._read[name]
            return whole if expert is None else whole[expert]
        if name in self._coming:
            whole = self._coming[name].result()
            return whole if expert is None else whole[expert]
        if self._shared and expert is None and self._checkpoint.tensors[name].bytes > PIECE_BYTES:
            return SharedReads(self._transfer, self._checkpoint, [name]).result()[name]
        return self._transfer.read(self._checkpoint, name, expert).result()

    def expect(self, *prefixes: str) -> None:
        """Drop what was read in advance, and begin to read all tensors below `prefixes` if a GPU has the memory."""
        self._coming, self._together, self._read = {}, None, {}
        if self._transfer is None:
            return
        starts = tuple(f"{prefix}." for prefix in prefixes)
        below = [
            tensor
            for name, tensor in self._checkpoint.tensors.items()
            if name.startswith(starts) and tensor.dtype in TORCH_NAMES
        ]
        names = [tensor.name for tensor in below]
        if AHEAD_SHARE * sum(tensor.bytes for tensor in below) > (self._room if self._shared else self._unused()):
            return
        if self._shared:
            self._together = SharedReads(self._transfer, self._checkpoint, names)
        else:
            self._coming = self._transfer.read_many(self._checkpoint, names)

    def _unused(self) -> int:
        """Bytes of a GPU's memory that are free, or that this process keeps for later."""
        kept = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return free_bytes(self._device) + kept

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._coming, self._together, self._read = {}, None, {}
        self._stack.close()
