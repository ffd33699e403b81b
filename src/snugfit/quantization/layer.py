"""One unit of a quantize run: a decoder layer's weights read ahead, quantized, and run once over all rows."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from snugfit.calibration.observers import ExpertObserver, InputObserver, KVAmax
from snugfit.engines.fused import group_modules
from snugfit.errors import Unfinished, UserError
from snugfit.formats.quantized_weight import QuantizedWeight
from snugfit.formats.spec import TensorFormat
from snugfit.machine import give_back_memory
from snugfit.methods.rounding import round_and_compare
from snugfit.model import emulate, experts, forward_pass, layers
from snugfit.model.assemble import Loaded, assemble, pieces_of
from snugfit.model.sources import Weights
from snugfit.quantization.plan import Plan
from snugfit.records.statistics import LayerStatistics
from snugfit.records.statistics_file import Calibration, Statistics
from snugfit.storage.checkpoint import Checkpoint
from snugfit.storage.safetensors_header import dtype_of
from snugfit.storage.transfer import Moving, Transfer, check_finite

Piece = tuple[str, int | None]
GIVEN_BACK = 64 << 20  # bytes of 16-bit weights after which freed memory is returned
_MEASURE = "Measure them again with `snugfit statistics collect`."


@dataclass(frozen=True)
class UnitTensor:
    """A tensor in memory. `quantized`: its codes, None where kept; `walked`: 16-bit values for the walk, if any.

    `error` is sum((w_hat - w)^2) / sum(w^2), a scalar on the device, None where kept; `input_scale` the multiplier of
    inputs that came with codes of the source.
    """

    quantized: QuantizedWeight | None
    walked: Tensor | None
    error: Tensor | None
    input_scale: Tensor | None = None


class ReadAhead:
    """Gives groups of tensors in the order of `groups`, reading the next ones while one is worked on.

    At most `budget` bytes are read ahead, and one group in any case.
    """

    def __init__(
        self,
        transfer: Transfer,
        checkpoint: Checkpoint,
        weights: Weights,
        groups: Sequence[tuple[str, ...]],
        budget: int,
    ) -> None:
        self._transfer, self._checkpoint, self._weights = transfer, checkpoint, weights
        self._left = deque(groups)
        self._coming: deque[tuple[int, dict[Piece, Moving[Tensor]]]] = deque()
        self._budget = budget
        self._begin()

    def _begin(self) -> None:
        while self._left:
            size = sum(self._weights.bytes(self._checkpoint, name) for name in self._left[0])
            if self._coming and size + sum(bytes_ for bytes_, _ in self._coming) > self._budget:
                return
            # gate and up may stand in one tensor
            pieces = dict.fromkeys(piece for name in self._left.popleft() for piece in pieces_of(self._weights, name))
            self._coming.append((size, {piece: self._transfer.read(self._checkpoint, *piece) for piece in pieces}))

    def take(self, group: Sequence[str]) -> dict[str, Loaded]:
        """The next group's tensors on the device; UserError where they hold NaN or infinite values."""
        _, coming = self._coming.popleft()
        found = {piece: moving.result() for piece, moving in coming.items()}
        self._begin()
        sound = {piece: check_finite(self._checkpoint, piece[0], tensor) for piece, tensor in found.items()}
        del found
        return {name: assemble(self._checkpoint, self._weights, name, sound) for name in group}


def quantize_unit(
    plan: Plan, groups: Sequence[tuple[str, ...]], ahead: ReadAhead, room: layers.ExpertStorage | None
) -> dict[str, UnitTensor]:
    """Quantize a unit's groups; with `room`, keep 16-bit values of all its tensors for the walk, experts' in there."""
    done: dict[str, UnitTensor] = {}
    handled = 0
    for names in groups:
        handled += sum(plan.weights.tensors[name].bytes for name in names)
        if handled > GIVEN_BACK:  # many small tensors of experts come and go: the C library would keep their room
            give_back_memory()
            handled = 0
        loaded = ahead.take(names)
        assignment = plan.assignments.get(names[0])
        dtypes = {name: dtype_of(plan.weights.tensors[name]) for name in names}
        if assignment is None or assignment.format is None:
            for name in names:
                values = loaded.pop(name).in_dtype(dtypes[name])
                held = room is not None and room.fill(name, values)
                # what is kept of experts is large: it is copied from file to file where it is a tensor of the file
                copied = held and name not in plan.weights.sources
                done[name] = UnitTensor(None, None if copied else values, None)
            continue
        if assignment.copied:
            for name in names:
                one = loaded.pop(name)
                walked = None
                if room is not None:
                    walked = one.in_dtype(dtypes[name])
                    walked = None if room.fill(name, walked) else walked
                done[name] = UnitTensor(one.quantized, walked, torch.zeros(()), one.input_scale)
            continue
        settings = assignment.format, assignment.scale_rule, assignment.objective
        weights = {name: loaded.pop(name).in_dtype(dtypes[name]) for name in names}
        into = {} if room is None else room.parts
        for name, quantized, found, error in round_and_compare(weights, *settings, values=room is not None, into=into):
            done[name] = UnitTensor(quantized, None if name in into else found, error)
    return done


@dataclass(frozen=True)
class Measured:
    """What a layer's pass found: amax of the inputs of weights by tensor name; keys and values; all statistics."""

    inputs: Mapping[str, float]
    keys_values: tuple[float, float] | None
    statistics: LayerStatistics | None = None


def calibrate(
    plan: Plan,
    skeleton: layers.Skeleton,
    index: int,
    tensors: MutableMapping[str, UnitTensor],
    room: layers.ExpertStorage,
    batches: Sequence[forward_pass.Batch],
    states: tuple[forward_pass.States, forward_pass.States],
    device: torch.device,
    settings: Calibration,
) -> Measured:
    """Run decoder layer `index` with quantized weights over all rows, its hidden states from one file to the other.

    FP8 inputs are quantized meanwhile, NVFP4 inputs not: their scale is what this pass measures. The 16-bit values are
    taken out of `tensors`, but for routed experts, which are in `room`.
    """
    prefix = f"{plan.decoder}.{index}."
    # files may hold tensors that transformers computes itself, such as rotary_emb.inv_freq
    used = layers.used_names(skeleton, index)
    mixture = skeleton.experts.get(index)
    weights: dict[str, Tensor] = dict(room.whole)
    for name, tensor in tensors.items():
        relative = name.removeprefix(prefix)
        if tensor.walked is not None and relative in used and name not in room.parts:
            weights[relative] = tensor.walked
            tensors[name] = replace(tensor, walked=None) if tensor.quantized is not None else tensor
    layer = layers.resident_layer(skeleton, index, weights, device)
    formats = {
        name.removeprefix(prefix).removesuffix(".weight"): assignment.format
        for name in tensors
        if (assignment := plan.assignments.get(name)) and assignment.format is not None
    }
    scales = {n.removeprefix(prefix).removesuffix(".weight"): t.input_scale for n, t in tensors.items()}
    count = sum(sum(batch.lengths) for batch in batches)
    linears = _Linears(skeleton, index, layer, formats, scales, settings, count)
    cache = KVAmax() if index in plan.attention else None

    def before(batch: forward_pass.Batch) -> None:
        linears.before(batch)
        if cache is not None:
            cache.before(batch)

    forward_pass.run_layer(layer, index, batches, before, cache=cache, states=states)
    found = linears.result(prefix, cache.amax if cache else None)
    inputs = input_amax(plan, index, found, mixture)
    if _experts_need(plan, index, mixture):
        check_coverage(found, settings)
    if cache is not None and plan.outputs:
        for what, largest in zip(("keys", "values"), found.cache or (0.0, 0.0), strict=True):
            _check_amax(largest, f"its cached {what} have", plan.attention[index])
    return Measured(inputs, found.cache, found)


def recall(plan: Plan, skeleton: layers.Skeleton, index: int, known: Statistics, settings: Calibration) -> Measured:
    """What an earlier run measured of decoder layer `index`; UserError where that is not all that the plan needs."""
    found = known.layers.get(index)
    where, remedy = f"statistics of {known.model}", _MEASURE
    if found is None:
        raise UserError(f"layer {index} is not among them.", where=where, remedy=remedy)
    mixture = skeleton.experts.get(index)
    inputs = input_amax(plan, index, found, mixture)
    if _experts_need(plan, index, mixture):
        check_coverage(found, settings)
    if index in plan.attention and found.cache is None:
        raise UserError(f"keys and values of layer {index} are not among them.", where=where, remedy=remedy)
    return Measured(inputs, found.cache if index in plan.attention else None)


class _Linears:
    """Watches all linears of a resident layer, and rounds their inputs where an engine would."""

    def __init__(
        self,
        skeleton: layers.Skeleton,
        index: int,
        layer: nn.Module,
        formats: Mapping[str, TensorFormat],
        scales: Mapping[str, Tensor | None],
        settings: Calibration,
        tokens: int,
    ) -> None:
        self._inside = {
            theirs: ours
            for theirs, ours in layers.module_names(skeleton, index).items()
            if isinstance(layer.get_submodule(ours), nn.Linear)
        }
        self.groups = group_modules(self._inside)
        self._observer = InputObserver(layer, [self._inside[group[0]] for group in self.groups])
        quantizers = {
            ours: emulate.input_quantizer(formats[theirs], "marlin", scales.get(theirs))
            for theirs, ours in self._inside.items()
            if theirs in formats
        }
        emulate.quantize_inputs(layer, {module: q for module, q in quantizers.items() if q is not None})
        self._mixture = skeleton.experts.get(index)
        self._experts: ExpertObserver | None = None
        if self._mixture is not None:
            up = self._of_experts((experts.GATE, experts.UP), formats, scales)
            down = self._of_experts((experts.DOWN,), formats, scales)
            cap = settings.forced_tokens if settings.experts == "all" else None
            self._experts = ExpertObserver(emulate.ExpertInputs(up, down), cap=cap, tokens=tokens)
            experts.hook(layer.get_submodule(self._mixture.module), self._experts)

    def _of_experts(
        self, roles: Sequence[str], formats: Mapping[str, TensorFormat], scales: Mapping[str, Tensor | None]
    ) -> emulate.Quantizer | None:
        """What rounds inputs of all experts' projections of these roles."""
        assert self._mixture is not None
        names = [n for (_, role, what), n in self._mixture.names.items() if what == "weight" and role in roles]
        modules = [module for name in names if (module := name.removesuffix(".weight")) in formats]
        given = [scale for module in modules if (scale := scales.get(module)) is not None]
        return emulate.experts_quantizer(formats[modules[0]] if modules else None, given, "marlin")

    def before(self, batch: forward_pass.Batch) -> None:
        """Tell which tokens of the coming batch are real."""
        self._observer.before(batch)
        if self._experts is not None:
            self._experts.before(batch)

    def result(self, prefix: str, cache: tuple[float, float] | None) -> LayerStatistics:
        """What was seen, under the file's names."""
        seen = {prefix + group[0]: self._observer.result(self._inside[group[0]]) for group in self.groups}
        inputs = {name: one for name, one in seen.items() if one is not None}
        if self._mixture is None or self._experts is None:
            return LayerStatistics(inputs, {}, cache)
        module = prefix + experts_module(self._mixture)
        found, gate_up, down = self._experts.result()
        inputs |= {f"{module}.gate_up": gate_up, f"{module}.down": down}
        return LayerStatistics(inputs, {module: found}, cache)


def _experts_need(plan: Plan, index: int, mixture: experts.ExpertNames | None) -> bool:
    """Whether a layer's routed experts need scales of their inputs."""
    names = () if mixture is None else (f"{plan.decoder}.{index}.{name}" for name in mixture.names.values())
    return any(a.calibrated for name in names if (a := plan.assignments.get(name)))


def experts_module(mixture: experts.ExpertNames) -> str:
    """What statistics call a layer's experts: the file's name of the list that they stand in, relative to the layer."""
    first = next(iter(mixture.names.values()))
    return first[: first.index("experts.") + len("experts")]


def input_amax(plan: Plan, index: int, found: LayerStatistics, mixture: experts.ExpertNames | None) -> dict[str, float]:
    """Largest input of each weight of a layer that needs one, by tensor name; UserError where there is none.

    All routed experts share one for gate and up, and one for down: engines take the largest anyway.
    """
    prefix = f"{plan.decoder}.{index}."
    wanted = [name for name in plan.layer_of(index) if (a := plan.assignments.get(name)) and a.calibrated]
    roles = {prefix + name: role for (_, role, _), name in mixture.names.items()} if mixture else {}
    routed = [name for name in wanted if name in roles]
    amax: dict[str, float] = {}
    if mixture is not None and routed:
        module = prefix + experts_module(mixture)
        seen = found.experts.get(module)
        if seen is None:
            raise UserError("no statistics of its experts.", where=module, remedy=_MEASURE)
        if len(seen.routed) != len({expert for expert, _, _ in mixture.names}):
            what = f"statistics of {len(seen.routed)} experts, which the layer has not."
            raise UserError(what, where=module, remedy=_MEASURE)
        amax = {name: seen.down if roles[name] == experts.DOWN else seen.gate_up for name in routed}
        for largest in amax.values():
            _check_amax(largest, "calibrated inputs of its experts have", module)
    for group in group_modules(name.removesuffix(".weight") for name in wanted if name not in amax):
        one = next((found.inputs[module] for module in group if module in found.inputs), None)
        largest = 0.0 if one is None else one.amax
        _check_amax(largest, "its calibrated inputs have", group[0])
        amax |= {f"{module}.weight": largest for module in group}
    return amax


def check_coverage(found: LayerStatistics, settings: Calibration) -> None:
    """Unfinished where an expert saw too few tokens to be calibrated."""
    for module, seen in found.experts.items():
        bare = seen.experts_below(settings.least_tokens)
        if not bare:
            continue
        few = ", ".join(f"{number} ({seen.tokens[number]})" for number in bare[:8])
        more = f" and {len(bare) - 8} more" if len(bare) > 8 else ""
        how = "--experts all (with --restart) sends them what the router does not, " * (settings.experts == "routed")
        raise Unfinished(
            f"{len(bare)} of {len(seen.routed)} experts saw fewer than {settings.least_tokens} tokens: {few}{more}.",
            where=module,
            remedy=f"{how}more --rows help too; --least-tokens 0 lets them take what their layer's others measured.",
        )


def _check_amax(amax: float, what: str, where: str) -> None:
    if not 0.0 < amax < float("inf"):
        raise UserError(
            f"{what} largest magnitude {amax}.",
            where=where,
            remedy="No scale can be made of that: check the source's weights, or keep this tensor in the recipe.",
        )
