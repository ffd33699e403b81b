"""One unit of a run, a decoder layer or all tensors outside the layers: load, observe, choose, propagate.

`load` yields fused groups while the next ones are read. `observe` runs the exact layer if the method asks for it.
`choose` asks the method for codes and 16-bit weights. `propagate` runs the layer with these over all samples, from one
file of hidden states to the other, and measures the ranges of its inputs meanwhile. Nothing here knows which method it
serves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from snugfit import distributed
from snugfit.calibration.moments import ExpertMoments, MomentsObserver
from snugfit.calibration.observers import ExpertObserver, InputObserver, KVAmax
from snugfit.engines.fused import group_modules
from snugfit.formats.quantized_weight import QuantizedWeight
from snugfit.formats.spec import TensorFormat
from snugfit.machine import give_back_memory
from snugfit.methods.method import Method, ObservedLayer, Purpose, RunLayer, Target, WeightGroup
from snugfit.model import emulate, experts, forward_pass, layers, pieces
from snugfit.model.assemble import Loaded
from snugfit.model.layers import ExpertBuffers
from snugfit.model.pieces import ExpertsInPieces
from snugfit.model.skeleton import Skeleton
from snugfit.quantization import exchange as sharing
from snugfit.quantization.measured import Measured, not_finite, ranges_of
from snugfit.quantization.plan import Plan
from snugfit.quantization.read_ahead import ReadAhead
from snugfit.records.norm_folds import NormFold
from snugfit.records.squares import encode_squares
from snugfit.records.statistics import LayerStatistics
from snugfit.records.statistics_file import ExpertCalibration
from snugfit.storage.safetensors_header import dtype_of

GIVEN_BACK = 64 << 20  # bytes of 16-bit weights after which freed memory is returned to the system


@dataclass(frozen=True, kw_only=True)
class UnitTensor:
    """A tensor that is ready to be written and run.

    `codes` are None for a tensor that stays in 16 bits; `weight_16bit` is what the layer runs with, None if it is not
    needed or is in the layer's expert buffers. `relative_error` is sum((w_hat - w)^2) / sum(w^2), a scalar on the
    device; `input_scale` the multiplier of inputs that came with the source's codes; `scale_rule` how the scales of
    codes were chosen, "" for the source's codes. `changed`: it stays in 16 bits and is not the source's any more.
    `begun`: all of it is being written but a scale of inputs that is yet to be measured.
    """

    codes: QuantizedWeight | None = None
    weight_16bit: Tensor | None = None
    relative_error: Tensor | None = None
    input_scale: Tensor | None = None
    scale_rule: str = ""
    changed: bool = False
    begun: bool = False


@dataclass(frozen=True, kw_only=True)
class LayerPieces:
    """Routed experts of a layer in pieces of `size`: with the source's weights (`exact`), and as they are chosen.

    `read` gives an exact weight, `input_scales` the multipliers of inputs that come with codes that stay, by weight.
    """

    size: int
    exact: ExpertsInPieces
    chosen: ExpertsInPieces
    read: experts.ReadExpert
    input_scales: Callable[[], Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class LayerPass:
    """What running a decoder layer takes: its samples, the files of hidden states before and behind it, the device.

    `some` are batches of a few samples, spread over all, for what needs no more.
    Of a run on several processes, `batches` are those of this one out of `all_batches`, and `owners` says which process
    reads, chooses and writes each tensor of the layer, of which `names` are in memory all the time. `norm_folds` takes
    what the method notes.
    """

    plan: Plan
    skeleton: Skeleton
    index: int
    buffers: ExpertBuffers
    batches: Sequence[forward_pass.Batch]
    states: tuple[forward_pass.States, forward_pass.States]
    device: torch.device
    experts: ExpertCalibration
    pieces: LayerPieces | None = None
    some: Sequence[forward_pass.Batch] = ()
    all_batches: Sequence[forward_pass.Batch] = ()
    names: Sequence[str] = ()
    owners: Mapping[str, int] = field(default_factory=dict)
    norm_folds: list[NormFold] = field(default_factory=list)

    @property
    def prefix(self) -> str:
        """What the layer's tensors begin with in the file."""
        return f"{self.plan.decoder}.{self.index}."

    @property
    def is_skipped(self) -> bool:
        """Whether text does not run this layer."""
        return self.index in self.skeleton.skipped

    def resident(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """The layer on the device with `weights` (by the file's full names) and what its expert buffers hold."""
        names = self.skeleton.names_of_layer(self.index)
        given: dict[str, Tensor] = dict(self.buffers.stacked)
        for name, weight in weights.items():
            relative = name.removeprefix(names.file_prefix)
            if relative in names.used and not self.buffers.has(name):
                given[relative] = weight
        size, read = (None, None) if self.pieces is None else (self.pieces.size, self.pieces.read)
        return layers.resident_layer(self.skeleton, self.index, given, self.device, size=size, read=read)


@dataclass(frozen=True, kw_only=True)
class LoadedGroup:
    """A fused group of tensors as they were read; `target` None: they stay; `has_codes`: the source's codes stay."""

    tensors: dict[str, Loaded]
    target: Target | None
    has_codes: bool


def load(plan: Plan, groups: Sequence[tuple[str, ...]], ahead: ReadAhead) -> Iterator[LoadedGroup]:
    """The tensors of a unit, group by group."""
    handled = 0
    for names in groups:
        handled += sum(plan.weights.tensors[name].bytes for name in names)
        if handled > GIVEN_BACK:  # the C library would keep the memory of many small tensors of experts
            give_back_memory()
            handled = 0
        assignment = plan.assignments.get(names[0])
        tensors = ahead.take(names)
        target, has_codes = _target_of(plan, names[0]), assignment is not None and assignment.keeps_codes
        yield LoadedGroup(tensors=tensors, target=target, has_codes=has_codes)


def _target_of(plan: Plan, name: str) -> Target | None:
    """How a tensor is to be quantized, None if it stays in 16 bits."""
    one = plan.assignments.get(name)
    if one is None or one.format is None:
        return None
    return Target(format=one.format, scale_rule=one.scale_rule, objective=one.objective)


def choose(
    plan: Plan, groups: Iterable[LoadedGroup], method: Method, buffers: ExpertBuffers | None, observed: Any = None
) -> dict[str, UnitTensor]:
    """What becomes of every tensor of a unit; with `buffers` the layer runs afterwards, and 16-bit weights are kept."""
    done: dict[str, UnitTensor] = {}
    purpose = Purpose(
        runs=buffers is not None, buffers={} if buffers is None else buffers.per_expert, observed=observed
    )
    for choice in method.choose(_for_method(plan, groups, buffers, done), purpose):
        weight = choice.weight_16bit
        held = buffers is not None and weight is not None and buffers.copy_in(choice.name, weight)
        # experts that stay are large: a tensor of the file is copied from file to file
        from_file = choice.codes is None and choice.name not in plan.weights.origins and not choice.changed
        if held and (choice.codes is not None or from_file):
            weight = None
        done[choice.name] = UnitTensor(
            codes=choice.codes,
            weight_16bit=weight,
            relative_error=choice.relative_error,
            scale_rule=choice.scale_rule,
            changed=choice.changed,
        )
    return done


def _for_method(
    plan: Plan, groups: Iterable[LoadedGroup], buffers: ExpertBuffers | None, done: MutableMapping[str, UnitTensor]
) -> Iterator[WeightGroup]:
    """The groups of 16-bit weights that a method works on; those whose codes stay go to `done`."""
    for group in groups:
        dtypes = {name: dtype_of(plan.weights.tensors[name]) for name in group.tensors}
        if not group.has_codes:
            weights = {name: group.tensors.pop(name).in_dtype(dtype) for name, dtype in dtypes.items()}
            yield WeightGroup(weights=weights, target=group.target)
            continue
        for name, dtype in dtypes.items():
            one = group.tensors.pop(name)
            weight = None
            if buffers is not None:
                weight = one.in_dtype(dtype)
                weight = None if buffers.copy_in(name, weight) else weight
            done[name] = UnitTensor(
                codes=one.quantized, weight_16bit=weight, relative_error=torch.zeros(()), input_scale=one.input_scale
            )


def observe(run: LayerPass | None, groups: Iterable[LoadedGroup], method: Method) -> tuple[Iterable[LoadedGroup], Any]:
    """The layer's groups, and what the method measures on the layer with its exact weights.

    The layer's output is dropped: `propagate` makes the hidden states that count. All groups are in memory then, but
    for those of experts in pieces. For a
    method that observes nothing (or without samples) nothing runs, and the groups stay unread; the same for a layer
    that text does not run.
    """
    if method.observe is None or run is None or run.is_skipped:
        return groups, None
    held = list(groups)
    weights: dict[str, Tensor] = {}
    for group in held:
        for name, loaded in group.tensors.items():
            weight = loaded.in_dtype(dtype_of(run.plan.weights.tensors[name]))
            if not run.buffers.copy_in(name, weight):
                weights[name] = weight
    sharing.send_experts(run.buffers, run.names, run.owners)
    outside = [name for name in run.names if not run.buffers.has(name)]
    sharing.send_tensors(run.plan, outside, run.owners, weights, run.device)
    unit = run.plan.unit_of_layer(run.index)  # with experts in pieces, and what other processes have
    copied = frozenset(name for name in unit if (one := run.plan.assignments.get(name)) and one.keeps_codes)
    targets = {name: _target_of(run.plan, name) for name in unit if name not in copied}
    layer = run.resident(weights)
    names = run.skeleton.names_of_layer(run.index)
    parameters = {f"{run.prefix}{file_name}": name for file_name, name in names.parameters.items()}
    observed = ObservedLayer(
        module=layer,
        prefix=run.prefix,
        linears={f"{run.prefix}{file_name}": module for file_name, module in _linears_of(run, layer).items()},
        parameters=parameters,
        dtypes={parameters[name]: weight.dtype for name, weight in weights.items() if name in parameters},
        targets={name: target for name, target in targets.items() if target is not None},
        experts=run.skeleton.experts.get(run.index),
        run=_runner(run, layer),
        copied=copied,
        note=run.norm_folds.append,
        owners=run.owners if distributed.world_size() > 1 else {},
    )
    return held, method.observe(observed)


def exchange(run: LayerPass, tensors: MutableMapping[str, UnitTensor]) -> None:
    """Give all processes the 16-bit weights that one of them has chosen, and multipliers of inputs that come along."""
    if distributed.world_size() == 1:
        return
    scales: dict[str, Tensor] = {}
    if any((one := run.plan.assignments.get(name)) and one.keeps_codes for name in run.names):
        mine = {name: one.input_scale for name, one in tensors.items() if one.input_scale is not None}
        scales = distributed.merged(mine)
    sharing.send_experts(run.buffers, run.names, run.owners)
    outside = [name for name in run.names if not run.buffers.has(name)]
    held = {name: one.weight_16bit for name, one in tensors.items() if one.weight_16bit is not None}
    sharing.send_tensors(run.plan, outside, run.owners, held, run.device)
    for name in run.names:
        if not sharing.is_mine(run.owners, name):
            tensors[name] = UnitTensor(weight_16bit=held.get(name), input_scale=scales.get(name))


def _runner(run: LayerPass, layer: nn.Module) -> RunLayer:
    """What passes the samples through a resident layer."""

    def pass_samples(
        before: Callable[[forward_pass.Batch], None], *, max_tokens: int | None = None, with_experts: bool = True
    ) -> None:
        batches = run.batches
        if max_tokens is not None:  # the same in all processes
            batches = forward_pass.some_batches(run.some or run.all_batches or run.batches, max_tokens)
        if run.pieces is None or not with_experts:
            forward_pass.show_layer(layer, run.index, batches, before, run.states[0])
        else:
            pieces.run_layer(layer, run.index, batches, before, run.pieces.exact, states=(run.states[0], None))

    return pass_samples


def propagate(
    run: LayerPass, tensors: MutableMapping[str, UnitTensor], roundings: Mapping[str, Callable[[Tensor], Tensor]]
) -> Measured:
    """Run the layer with its chosen 16-bit weights over all samples, and measure the ranges of its inputs.

    FP8 inputs are quantized as an engine does, NVFP4 inputs only by the method's `roundings`, by the file's names of
    linears: their scale is what this pass measures. The 16-bit
    weights are taken out of `tensors` if codes are written for them. A layer that text does not run only hands the
    hidden states on.
    """
    if run.is_skipped:
        return _hand_on(run)
    weights: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.weight_16bit is not None:
            weights[name] = tensor.weight_16bit
            tensors[name] = replace(tensor, weight_16bit=None) if tensor.codes is not None else tensor
    layer = run.resident(weights)
    del weights
    _carry_on(run, layer)
    scales = {name: tensor.input_scale for name, tensor in tensors.items()}
    if run.pieces is not None:
        scales = {name: scales.get(name) for name in run.plan.unit_of_layer(run.index)}
        scales.update(run.pieces.input_scales())
    watched = _WatchedLayer(run, layer, scales, roundings)
    cache = KVAmax() if run.index in run.plan.observed_caches else None

    def before(batch: forward_pass.Batch) -> None:
        watched.before(batch)
        if cache is not None:
            cache.before(batch)

    if run.pieces is None:
        bad = forward_pass.run_layer(layer, run.index, run.batches, before, cache=cache, states=run.states)
    else:
        chosen = run.pieces.chosen
        bad = int(pieces.run_layer(layer, run.index, run.batches, before, chosen, cache=cache, states=run.states))
    bad = _put_together(bad, watched, cache)
    if bad:
        total = sum(sum(batch.lengths) for batch in run.all_batches or run.batches)
        raise not_finite(f"hidden states of {bad} of {total} tokens", run.skeleton.dtype, where=run.prefix[:-1])
    watched.share()
    found = watched.result(cache.amax if cache else None)
    return ranges_of(run.plan, run.skeleton, run.index, found, run.experts)


def _put_together(bad: int, watched: _WatchedLayer, cache: KVAmax | None) -> int:
    """The sum of `bad` over all processes, after which `watched` and `cache` have what all have seen; said at once."""
    if distributed.world_size() == 1:
        return bad
    said = distributed.gather((bad, watched.stated(), None if cache is None else cache.largest))
    watched.take([one for _, one, _ in said])
    if cache is not None:
        cache.take([one for _, _, one in said])
    return sum(one for one, _, _ in said)


def _carry_on(run: LayerPass, layer: nn.Module) -> None:
    """Have a layer that passes more on than hidden states (Gemma 4's keys and values) do so for all that is observed.

    Of several processes this one runs some of the others' batches where it observes, in this layer and later ones.
    """
    if not run.skeleton.carries_state or run.pieces is not None:
        return
    others = [batch for batch in run.some if all(batch is not one for one in run.batches)]
    if others:
        forward_pass.show_layer(layer, run.index, others, lambda _: None, run.states[0])


def _hand_on(run: LayerPass) -> Measured:
    """Hand hidden states on through a layer that text does not run."""
    for batch in run.batches:
        run.states[1].write(batch, run.states[0].read(batch))
    nothing = LayerStatistics({}, {}, None)
    return ranges_of(run.plan, run.skeleton, run.index, nothing, run.experts)


def _linears_of(run: LayerPass, layer: nn.Module) -> dict[str, str]:
    """The layer's linears, names relative to it: the file's -> the model's."""
    return {
        file_name: module_name
        for file_name, module_name in run.skeleton.names_of_layer(run.index).modules.items()
        if isinstance(layer.get_submodule(module_name), nn.Linear)
    }


class _WatchedLayer:
    """A resident layer whose linears are watched, and whose inputs are rounded where an engine would round them."""

    def __init__(
        self,
        run: LayerPass,
        layer: nn.Module,
        scales: Mapping[str, Tensor | None],
        roundings: Mapping[str, Callable[[Tensor], Tensor]],
    ) -> None:
        self._prefix = run.prefix
        module = self._relative_module
        formats = {
            module(name): assignment.format
            for name in scales
            if (assignment := run.plan.assignments.get(name)) and assignment.format is not None
        }
        input_scales = {module(name): scale for name, scale in scales.items()}
        self._linears = _linears_of(run, layer)
        self._groups = group_modules(self._linears)
        self._inputs = InputObserver(layer, [self._linears[group[0]] for group in self._groups])
        quantizers = {
            module_name: emulate.input_quantizer(formats[file_name], "marlin", input_scales.get(file_name))
            for file_name, module_name in self._linears.items()
            if file_name in formats
        }
        chosen = {name: q for name, q in quantizers.items() if q is not None}
        for name, module_name in self._linears.items():
            if (rounding := roundings.get(run.prefix + name)) is not None:
                chosen.setdefault(module_name, rounding)
        emulate.quantize_inputs(layer, chosen)
        self._mixture = run.skeleton.experts.get(run.index)
        # of a model as it is, E[x^2] is measured too, for runs that take statistics in place of samples
        self._moments: MomentsObserver | None = None
        self._expert_moments: ExpertMoments | None = None
        if run.plan.recipe is None:
            self._moments = MomentsObserver(layer, {self._linears[group[0]]: False for group in self._groups})
            self._expert_moments = None if self._mixture is None else ExpertMoments()
        self._experts = self._watch_experts(run, layer, formats, input_scales)

    def _relative_module(self, name: str) -> str:
        return name.removeprefix(self._prefix).removesuffix(".weight")

    def _watch_experts(
        self,
        run: LayerPass,
        layer: nn.Module,
        formats: Mapping[str, TensorFormat],
        scales: Mapping[str, Tensor | None],
    ) -> ExpertObserver | None:
        if self._mixture is None:
            return None
        up = self._expert_quantizer((experts.GATE, experts.UP), formats, scales)
        down = self._expert_quantizer((experts.DOWN,), formats, scales)
        # without a range to measure, experts that the router did not choose would run for nothing
        measured = run.plan.recipe is None or run.plan.needs_activations
        cap = run.experts.max_forced_tokens if run.experts.all_experts and measured else None
        tokens = sum(sum(batch.lengths) for batch in run.all_batches or run.batches)
        observer = ExpertObserver(emulate.ExpertInputs(up, down), cap=cap, tokens=tokens)
        moments = self._expert_moments
        hooks = observer if moments is None else experts.Watching(observer, moments)
        experts.hook(layer.get_submodule(self._mixture.module), hooks)
        return observer

    def _expert_quantizer(
        self, roles: Sequence[str], formats: Mapping[str, TensorFormat], scales: Mapping[str, Tensor | None]
    ) -> Callable[[Tensor], Tensor] | None:
        """What rounds the inputs of all experts' projections of these roles."""
        assert self._mixture is not None
        names = [n for (_, role, what), n in self._mixture.names.items() if what == "weight" and role in roles]
        modules = [module for name in names if (module := name.removesuffix(".weight")) in formats]
        given = [scale for module in modules if (scale := scales.get(module)) is not None]
        fmt = formats[modules[0]] if modules else None
        return emulate.experts_quantizer(fmt, emulate.largest_scale(given), "marlin")

    def before(self, batch: forward_pass.Batch) -> None:
        """A batch is about to pass."""
        self._inputs.before(batch)
        for moments in (self._moments, self._expert_moments):
            if moments is not None:
                moments.before(batch)
        if self._experts is not None:
            self._experts.before(batch)

    def stated(self) -> list[Any]:
        """What this process has seen of the inputs of linears, for all others."""
        return self._inputs.stated()

    def take(self, said: Sequence[list[Any]]) -> None:
        """Take in what all processes have `stated`."""
        self._inputs.take(said)

    def share(self) -> None:
        """Take in what all processes have measured of experts."""
        if self._experts is not None:
            self._experts.share()
        if self._expert_moments is not None:
            self._expert_moments.share()

    def result(self, cache: tuple[float, float] | None) -> LayerStatistics:
        """What was measured, under the file's names; `cache` is the largest cached key and value."""
        seen = {self._prefix + group[0]: self._inputs.result(self._linears[group[0]]) for group in self._groups}
        inputs = {name: one for name, one in seen.items() if one is not None}
        if self._moments is not None:
            moments = {name: one.squares for name, one in self._moments.shared_result().items()}
            for group in self._groups:
                if (name := self._prefix + group[0]) in inputs and (module := self._linears[group[0]]) in moments:
                    inputs[name] = replace(inputs[name], squares=encode_squares(moments[module].cpu()))
        if self._mixture is None or self._experts is None:
            return LayerStatistics(inputs, {}, cache)
        module = self._prefix + self._mixture.file_module
        found, gate_up, down = self._experts.result()
        means = None if self._expert_moments is None else self._expert_moments.means()
        if means is not None:
            of_gate_up, of_down = (encode_squares(one.cpu()) for one in means)
            found = replace(found, gate_up_squares=of_gate_up, down_squares=of_down)
        inputs |= {f"{module}.gate_up": gate_up, f"{module}.down": down}
        return LayerStatistics(inputs, {module: found}, cache)
