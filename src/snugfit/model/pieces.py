"""A decoder layer whose routed experts are in memory some at a time.

All samples run up to the experts, and what comes to these is kept. Then some experts after others run on it, and what
they add up is kept, too. At last all samples run again, with the sums in the place of the experts. The bits are those
of a layer that is whole in memory: every number is made by the same operations on the same numbers in the same order.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from snugfit.errors import UserError
from snugfit.model import experts
from snugfit.model.forward_pass import Batch, States, call_layer, queue_layer
from snugfit.storage.transfer import PendingTransfer, Transfer

IN_FLIGHT = 2  # tensors written behind
Key = tuple[str, tuple[int, ...]]


class Scratch(Protocol):
    """Keeps tensors outside the device while others are worked on."""

    def put(self, key: Key, tensor: Tensor) -> None:
        """Keep a tensor, in the place of one of the same size if there is one."""

    def get(self, key: Key) -> Tensor:
        """The tensor, on the device."""


class ScratchFile:
    """A `Scratch` in a file, which is removed at the end."""

    def __init__(self, path: Path, transfer: Transfer) -> None:
        self._path, self._transfer = path, transfer
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self._places: dict[Key, tuple[int, tuple[int, ...], torch.dtype]] = {}
        self._writes: dict[Key, PendingTransfer[list[int]]] = {}
        self._end = 0

    def put(self, key: Key, tensor: Tensor) -> None:
        """Begin to write a tensor."""
        waiting = [write for write in self._writes.values() if not write.done()]
        if len(waiting) >= IN_FLIGHT:
            waiting[0].result()
        if key not in self._places:
            self._places[key] = self._end, tuple(tensor.shape), tensor.dtype
            self._end += tensor.nbytes
        self._writes[key] = self._transfer.write(self._handle, self._places[key][0], tensor.contiguous())

    def get(self, key: Key) -> Tensor:
        """The tensor, read when it is written."""
        self._writes[key].result()
        return self._transfer.read_file(self._handle, *self._places[key]).result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for write in self._writes.values():
            write.cancel()
        os.close(self._handle)
        self._path.unlink(missing_ok=True)


class ScratchMemory:
    """A `Scratch` in main memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: dict[Key, Tensor] = {}

    def put(self, key: Key, tensor: Tensor) -> None:
        """Keep a tensor."""
        self._held[key] = tensor.cpu()

    def get(self, key: Key) -> Tensor:
        """The tensor."""
        return self._held[key].to(self._device)


@dataclass(frozen=True)
class ExpertsInPieces:
    """Routed experts of a layer, some at a time: `module` is the name of their module in it, `total` their number.

    `fill` fills the module's parameters with some experts after others, and yields which they are, in order.
    """

    module: str
    total: int
    fill: Callable[[], Iterable[range]]
    scratch: Scratch


@torch.no_grad()
def run_layer(
    layer: nn.Module,
    index: int,
    batches: Sequence[Batch],
    before: Callable[[Batch], None] | None,
    pieces: ExpertsInPieces,
    *,
    cache: object = None,
    states: tuple[States, States | None] | None = None,
) -> Tensor:
    """As `forward_pass.queue_layer`, with experts in pieces; `before` is called several times for a batch.

    Hooks of linears are called once for a batch, those that round inputs more often.
    """
    module = layer.get_submodule(pieces.module)
    kept = _Kept(module, pieces)
    with experts.instead_of(module, kept.stop), _only_rounding(layer):
        for batch in batches:
            hidden = batch.hidden if states is None else states[0].read(batch)
            kept.start(batch, before)
            try:
                call_layer(layer, index, batch, hidden, cache)
            except _Reached:
                continue
            raise _unsupported(layer, "does not run its experts")
    for some in pieces.fill():
        experts.filled(module, len(some))
        for batch in batches:
            kept.start(batch, before)
            kept.add(some)

    def start(batch: Batch) -> None:
        kept.start(batch, before)

    with experts.instead_of(module, kept.replay):
        return queue_layer(layer, index, batches, start, cache=cache, states=states)


@contextmanager
def filled_when_called(layer: nn.Module, pieces: ExpertsInPieces | None) -> Iterator[None]:
    """Let a layer fill its experts in each call, for calls that come one at a time; without `pieces` as it is."""
    if pieces is None:
        yield
        return
    total, fill = pieces.total, pieces.fill

    def run(module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        inputs, result = _begin(module, hidden, index, total), None
        for some in fill():
            result = _add_up(module, _Pass(index, weights, hidden, hidden.dtype), inputs, total, some, result)
        assert result is not None
        return result.to(hidden.dtype)

    with experts.instead_of(layer.get_submodule(pieces.module), run):
        yield


class _Reached(Exception):  # noqa: N818  # not an error
    """Ends a forward pass at the experts."""


@dataclass(frozen=True)
class _Pass:
    """What the router says of a batch: experts and their weights [tokens, k]; some of its hidden states."""

    index: Tensor
    weights: Tensor
    few: Tensor
    dtype: torch.dtype


def _begin(module: nn.Module, hidden: Tensor, index: Tensor, total: int) -> Tensor:
    """The inputs of gate and up for hidden states [tokens, K] that come to experts."""
    hooks = experts.hooks_of(module)
    if hooks is None:
        return hidden
    hooks.begin(hidden, total)
    hooks.expect(index)
    return hooks.first(hidden)


def _add_up(module: nn.Module, known: _Pass, inputs: Tensor, total: int, some: range, result: Tensor | None) -> Tensor:
    """`result`, None for the first, with what `some` experts, which the module's parameters hold, add to it."""
    hooks = experts.hooks_of(module)
    if hooks is not None:
        hooks.again(inputs, total)
    if result is None:
        dtype = experts.sum_dtype_of_some(module, known.few, known.weights)
        result = torch.zeros_like(inputs, dtype=dtype)
    experts.add_up(module, inputs, known.index, known.weights, hooks, result, some)
    return result


class _Kept:
    """What comes to a layer's experts, batch by batch, and what they have added up."""

    def __init__(self, module: nn.Module, pieces: ExpertsInPieces) -> None:
        self._module, self._pieces, self._scratch = module, pieces, pieces.scratch
        self._passes: dict[tuple[int, ...], _Pass] = {}
        self._rows: tuple[int, ...] = ()
        self._replayed = False

    def start(self, batch: Batch, before: Callable[[Batch], None] | None) -> None:
        """A batch comes next."""
        self._rows, self._replayed = batch.rows, False
        if before is not None:
            before(batch)

    def stop(self, module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Keep what comes to the experts, and end the forward pass."""
        inputs = _begin(module, hidden, index, self._pieces.total)
        few = hidden[: experts.CHECKED_TOKENS].clone()
        self._passes[self._rows] = _Pass(index.clone(), weights.clone(), few, hidden.dtype)
        self._scratch.put(("inputs", self._rows), inputs)
        raise _Reached

    def add(self, some: range) -> None:
        """Run some experts on what came to them."""
        inputs = self._scratch.get(("inputs", self._rows))
        sums = self._scratch.get(("sums", self._rows)) if some.start else None
        sums = _add_up(self._module, self._passes[self._rows], inputs, self._pieces.total, some, sums)
        self._scratch.put(("sums", self._rows), sums)

    def replay(self, module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:  # noqa: ARG002
        """What the experts have added up for a batch."""
        if self._replayed:
            raise _unsupported(module, "runs more than once in a layer")
        self._replayed = True
        return self._scratch.get(("sums", self._rows)).to(hidden.dtype)


def _unsupported(module: nn.Module, what: str) -> UserError:
    return UserError(
        f"{type(module).__name__} {what}, so its experts cannot be in memory some at a time.",
        code="experts-unsupported",
        where=type(module).__name__,
        remedy="Leave `experts_per_group` out.",
    )


@contextmanager
def _only_rounding(layer: nn.Module) -> Iterator[None]:
    """Only those hooks of the layer's modules are called that round inputs."""
    held: list[tuple[nn.Module, Mapping[str, Any]]] = []
    for module in layer.modules():
        held.append((module, {name: module.__dict__[name] for name in ("_forward_pre_hooks", "_forward_hooks")}))
        called = module._forward_pre_hooks.items()  # noqa: SLF001
        rounding = ((key, hook) for key, hook in called if getattr(hook, "rounds_inputs", False))
        module.__dict__["_forward_pre_hooks"] = OrderedDict(rounding)
        module.__dict__["_forward_hooks"] = OrderedDict()
    try:
        yield
    finally:
        for module, hooks in held:
            module.__dict__.update(hooks)
