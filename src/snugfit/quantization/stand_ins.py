"""What takes the place of files, samples and the method where one layer is worked on to see how long that takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from snugfit.calibration.moments import Moments
from snugfit.formats.quantized_weight import QuantizedWeight
from snugfit.formats.spec import EFFORT
from snugfit.machine import NO_TIME, Seconds, now
from snugfit.methods.calibrated import Observed
from snugfit.methods.folds import Scaling
from snugfit.methods.method import Choice, Method, ObservedLayer, Purpose, WeightGroup
from snugfit.model.assemble import Loaded
from snugfit.model.forward_pass import Batch
from snugfit.model.pieces import Key, ScratchMemory
from snugfit.quantization.layer.read_ahead import ReadAhead
from snugfit.quantization.plan import Plan
from snugfit.storage.safetensors_header import dtype_of
from snugfit.storage.transfer import Transfer

REMOTE_BYTES = 1 << 25  # that are read of a model on the Hub
# values and, where GPTQ rounds them, input features of a weight above which a part of it is rounded
VALUES = {"cpu": 1 << 22, "cuda": 1 << 28}
FEATURES = {"cpu": 1 << 11, "cuda": 1 << 14}
KEPT_CODES = 12  # of weights, of which the time to decode them is measured
_OUTPUTS = 128  # a part has a multiple of so many outputs, at least
_ALL = 1 << 62


@dataclass
class Pass:
    """A pass of some samples: what it takes, of it what experts take, and what is done to have their weights.

    `times` is how many tokens the run's pass has for each of this one.
    """

    times: float
    once: bool = False
    whole: Seconds = NO_TIME
    experts: Seconds = NO_TIME
    filling: Seconds = NO_TIME


class Watch:
    """The passes of a layer while it is worked on."""

    def __init__(self, device: torch.device, times: float, tried: int | None = None) -> None:
        """`tried` are the first of the routed experts, on which alone work is done; None for all."""
        self.device, self.times, self.tried = device, times, tried
        self.begin()

    def begin(self) -> None:
        """Work on the layer begins."""
        self.observing: list[Pass] = []
        self.last = Pass(self.times)
        self.more = self.of_experts = Seconds()
        self._current: Pass | None = None
        self._started: Seconds | None = None
        self._behind = Seconds()

    @property
    def current(self) -> Pass:
        """The pass that is under way."""
        return self._current or self.last

    def observe(self, times: float, run: Callable[[], None], *, once: bool) -> None:
        """Time a pass of the layer with exact weights, which it passes `once` also where experts are in pieces."""
        self._current = Pass(times, once)
        started = now(self.device)
        run()
        self._current.whole = now(self.device) - started
        self.observing.append(self._current)
        self._current, self._behind = None, now(self.device)

    def observed(self) -> None:
        """All is observed: behind the last pass experts are searched for folds."""
        if self.observing:
            self.of_experts = now(self.device) - self._behind

    def reads(self) -> None:
        """Hidden states are read: the first ones begin the last pass, if no other is under way."""
        if self._current is None and self._started is None:
            self._started = now(self.device)

    def writes(self) -> None:
        """Hidden states are written, in the last pass."""
        assert self._started is not None
        self.last.whole = now(self.device) - self._started


class States:
    """Random hidden states in place of those of the layers before."""

    def __init__(self, hidden: Mapping[tuple[int, ...], Tensor], watch: Watch) -> None:
        self._hidden, self._watch = hidden, watch

    def prefetch(self, number: int) -> None:
        """Nothing to read."""

    def of(self, number: int) -> tuple[States, States]:  # noqa: ARG002
        """Where a layer reads and writes."""
        return self, self

    def before_writing(self, number: int, recorded: Callable[[], None]) -> None:
        """Nothing to make room for."""

    def read(self, batch: Batch) -> Tensor:
        """The states [B, T, H] of a batch."""
        self._watch.reads()
        return self._hidden[batch.rows].clone()

    def write(self, batch: Batch, hidden: Tensor) -> None:  # noqa: ARG002
        """Keep nothing."""
        self._watch.writes()


class Scratch(ScratchMemory):
    """What comes to experts and what they add up; between the two they run, before that their weights are filled in."""

    def __init__(self, device: torch.device, watch: Watch) -> None:
        super().__init__(device)
        self._watch = watch
        self._since = Seconds()

    def put(self, key: Key, tensor: Tensor) -> None:
        """Keep a tensor."""
        at = now(self._watch.device)
        if key[0] == "sums":
            self._watch.current.experts += at - self._since
        super().put(key, tensor)
        self._since = now(self._watch.device)

    def get(self, key: Key) -> Tensor:
        """The tensor."""
        if key[0] == "inputs":
            at = now(self._watch.device)
            self._watch.current.filling += at - self._since
            self._since = at
        return super().get(key)


class NoFiles:
    """Takes what is to be written, and writes nothing."""

    lasts = True

    def write(self, name: str, tensor: Tensor) -> None:
        """Nothing."""

    def copy(self, *_: object, **_options: object) -> None:
        """Nothing."""

    def start(self) -> None:
        """Nothing."""

    def drain(self) -> None:
        """Nothing."""


class Groups(ReadAhead):
    """Gives tensors of the layer; of a model on the Hub those behind the first bytes are random."""

    def __init__(self, transfer: Transfer, plan: Plan, groups: Sequence[tuple[str, ...]]) -> None:
        self._plan, read, size = plan, list[tuple[str, ...]](), 0
        for group in groups:
            size += sum(plan.weights.file_bytes(name) for name in group)
            if plan.checkpoint.remote is None or size <= REMOTE_BYTES:
                read.append(group)
        self._real = frozenset(group[0] for group in read)
        super().__init__(transfer, plan.weights, read, 0)
        self._device = transfer.device

    def take(self, group: Sequence[str]) -> dict[str, Loaded]:
        """The next group's tensors on the device."""
        return super().take(group) if group[0] in self._real else {name: self._random(name) for name in group}

    def _random(self, name: str) -> Loaded:
        info = self._plan.weights.tensors[name]
        return Loaded(torch.randn(info.shape, device=self._device, dtype=torch.float32).to(dtype_of(info)))


class Timed:
    """A method whose passes are watched, and that rounds parts of large weights."""

    def __init__(self, method: Method, watch: Watch, times_of: Callable[[int | None], float]) -> None:
        self._method, self._watch, self._times_of = method, watch, times_of
        self.codes: list[QuantizedWeight] = []
        self.correlates = method.correlates
        self.observe = None if method.observe is None else self._observe
        self.input_roundings = method.input_roundings

    def _observe(self, layer: ObservedLayer) -> Any:
        def run(before: Callable[[Batch], None], *, max_tokens: int | None = None, with_experts: bool = True) -> None:
            run_it = partial(layer.run, before, max_tokens=max_tokens, with_experts=with_experts)
            self._watch.observe(self._times_of(max_tokens), run_it, once=not with_experts)

        assert self._method.observe is not None
        names = None if layer.experts is None else layer.experts.names
        if names is not None and layer.experts is not None and self._watch.tried is not None:
            some = {key: name for key, name in names.items() if key[0] < self._watch.tried}
            layer = replace(layer, experts=replace(layer.experts, names=some))
        found = self._method.observe(replace(layer, run=run))
        self._watch.observed()
        return found

    def choose(self, groups: Iterable[WeightGroup], purpose: Purpose) -> Iterator[Choice]:
        """As the method; parts of large weights are rounded, and these run as they are."""
        for group in groups:
            rows, columns = self._part(group)
            shapes = [tuple(weight.shape) for weight in group.weights.values()]
            if group.target is None or all(n <= rows and k <= columns for n, k in shapes):
                yield from map(self._kept, self._method.choose([group], purpose))
                continue
            first = next(iter(group.weights)).removesuffix(".weight")
            few = {name: weight[:rows, :columns].contiguous() for name, weight in group.weights.items()}
            part = replace(purpose, buffers={}, observed=_part_of(purpose.observed, first, columns))
            some = WeightGroup(weights=few, target=group.target)
            started = now(self._watch.device)
            for choice in self._method.choose([some], part):
                self._kept(choice)
            taken = now(self._watch.device) - started
            deep = self.correlates and group.target.scale_rule == EFFORT
            cut = [(min(n, rows), min(k, columns)) for n, k in shapes]
            self._watch.more += taken * (work_of(shapes, deep=deep) / work_of(cut, deep=deep) - 1)
            for name in list(group.weights):
                yield Choice(name=name, codes=None, weight_16bit=group.weights.pop(name))

    def _kept(self, choice: Choice) -> Choice:
        """The choice; some codes are kept."""
        if choice.codes is not None and len(self.codes) < KEPT_CODES:
            self.codes.append(choice.codes)
        return choice

    def _part(self, group: WeightGroup) -> tuple[int, int]:
        """How many outputs and inputs of a group's weights are rounded."""
        names, kind = list(group.weights), self._watch.device.type
        if group.target is None or ".experts." in names[0]:
            return _ALL, _ALL
        width = group.weights[names[0]].shape[-1]
        columns = min(width, FEATURES[kind]) if self.correlates else width
        values = sum(weight.numel() for weight in group.weights.values()) * columns // width
        rows = max(len(weight) for weight in group.weights.values())
        share = rows * VALUES[kind] // max(1, values)
        return (rows if values <= VALUES[kind] else max(1, share // _OUTPUTS) * _OUTPUTS), columns


def work_of(shapes: Iterable[tuple[int, ...]], *, deep: bool) -> float:
    """What the rounding of a group [N, K] grows with; `deep` by GPTQ."""
    shapes = list(shapes)
    width = shapes[0][1]
    return sum(n * k * (k if deep else 1) for n, k in shapes) + (2.0 * width**3 if deep else 0.0)


def _part_of(observed: Any, linear: str, columns: int) -> Any:
    """What was observed of the first input features of one linear; None if nothing was."""
    if not isinstance(observed, Observed):
        return None
    moments, squares = observed.moments.get(linear), observed.expert_moments.get(linear)
    if moments is not None:
        gram = None if moments.gram is None else moments.gram[:columns, :columns].contiguous()
        moments = Moments(moments.squares[:columns], gram, moments.tokens, None, moments.amax)
    return Observed(
        moments={} if moments is None else {linear: moments},
        expert_moments={} if squares is None else {linear: squares[:columns]},
        scaling=Scaling(),
        roundings={},
        modules={},
        parameters={},
    )
