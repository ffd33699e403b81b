"""Chooses codes by what comes into a layer: weighted block scales; if asked for, GPTQ, coordinate descent and folds.

The layer runs with its exact weights on what the quantized layers before it give, its inputs rounded as the engine
rounds them. First a few samples find which folds help (methods/folds.py); each fold's strength is the one with the
least error of the consumers' outputs under real rounding of weights and inputs, or none. Then all samples give the
second moments of the inputs of every linear. Scales are chosen under E[x^2], values by GPTQ under E[x x^T].

Routed experts get scales weighted by what the router sends each of them, if asked for also folds of their own
(methods/expert_folds.py) and of the norm before them (methods/mixture_folds.py), and no GPTQ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from snugfit import distributed
from snugfit.calibration.moments import ExpertMoments, Moments, MomentsObserver
from snugfit.engines.fused import group_modules
from snugfit.formats import fp8, int4, mxfp4, nvfp4
from snugfit.formats.grids import powers_of_two
from snugfit.formats.quantized_weight import QuantizedWeight, stack
from snugfit.formats.spec import EFFORT, MXFP4_BLOCK, NVFP4_BLOCK, TensorFormat
from snugfit.methods import folds as folding
from snugfit.methods.channel_scales import channel_scales
from snugfit.methods.columns import nearest
from snugfit.methods.expert_folds import Product, fold_experts, fold_products, sent_before
from snugfit.methods.exponents import block_exponents
from snugfit.methods.folds import Fold, Scaling
from snugfit.methods.gptq import Steps, feedback_of, round_together, round_weight
from snugfit.methods.integer_scales import integer_scales
from snugfit.methods.method import SOME_TOKENS, Choice, ObservedLayer, Purpose, Target, WeightGroup
from snugfit.methods.mixture_folds import fold_norm
from snugfit.methods.powers_of_two import block_scales as block_scales_of_two
from snugfit.methods.powers_of_two import exact_global_scale
from snugfit.methods.round_to_nearest import ROUND_TO_NEAREST
from snugfit.methods.rounding import slice_outputs
from snugfit.methods.scales import block_scales, global_scale, largest_magnitude
from snugfit.model import emulate, experts
from snugfit.model.experts import DOWN

HEADROOM = 2.0  # of the range of 4-bit inputs over the largest one that was scanned
SEARCHED_ROWS = 512  # output features that fold strengths are tried on
SEARCHED_ROWS_OF_EXPERT = 256
# exponents (a, b) of s = x^a / w^b that are tried
STRENGTHS = ((0.15, 0.35), (0.3, 0.3), (0.3, 0.7), (0.5, 0.5), (0.25, 0.0), (0.5, 0.0))


@dataclass(frozen=True)
class Scales:
    """The scales of one weight [N, K], chosen; `steps` says what they are for each value.

    `quantize` makes codes of values, fp32 [n, K], and of the `rows` of scales that belong to their output features.
    """

    steps: Steps
    quantize: Callable[..., QuantizedWeight]
    rows: tuple[Tensor, ...]

    def encode(self, values: Tensor) -> QuantizedWeight:
        """Codes of values on the grid, fp32 [N, K], a slice of output features at a time."""
        count = slice_outputs(values)
        parts = zip(values.split(count), *(one.split(count) for one in self.rows), strict=True)
        return stack([self.quantize(*part) for part in parts])


@dataclass(frozen=True)
class Observed:
    """What was found out about a layer.

    `moments` by the file's names of linears, where a fused group shares them; `expert_moments` by those of experts'
    linears; `roundings` of inputs by the file's names of linears. `scaling` speaks of the module's names, and of the
    file's names of experts' linears; `modules` and `parameters` map the file's to the module's.
    """

    moments: Mapping[str, Moments]
    expert_moments: Mapping[str, Tensor]
    scaling: Scaling
    roundings: Mapping[str, emulate.Quantizer]
    modules: Mapping[str, str]
    parameters: Mapping[str, str]

    def scaled(self, name: str, weight: Tensor) -> Tensor:
        """fp32 [N, K]: the weight of the file's tensor `name` under the folds."""
        return self.scaling.weight(self._module(name), weight)

    def folded(self, name: str, tensor: Tensor) -> Tensor | None:
        """What folds make of the file's tensor `name`, in its dtype; None: nothing."""
        new = self.scaling.tensors.get(self.parameters.get(name, ""))
        if new is None and tensor.dim() > 1 and self._module(name) in {*self.scaling.inputs, *self.scaling.outputs}:
            new = self.scaled(name, tensor).to(tensor.dtype)
        return new

    def _module(self, name: str) -> str:
        """What the scaling calls the linear, or the router, that has the file's tensor `name` as its weight."""
        linear = name.removesuffix(".weight")
        return self.modules.get(linear) or self.parameters.get(name, linear).removesuffix(".weight")


@dataclass
class Calibrated:
    """Weighted scales; with `gptq` also values by GPTQ, then `sweeps` of coordinate descent; with `folds` smoothing.

    `expert_folds` smooths inside routed experts, `norm_folds` before them; `gptq`, `sweeps` and `folds` leave both
    alone. `profile` names the engine's arithmetic of inputs (engines/profiles.py) that the choice is made for.
    """

    profile: str
    gptq: bool = False
    folds: bool = False
    expert_folds: bool = False
    norm_folds: bool = False
    sweeps: int = 0
    _verified: dict[Any, bool] = field(default_factory=dict)
    _norms: dict[object, dict[str, str]] = field(default_factory=dict)

    @property
    def scale_rule(self) -> str:
        """What records say of weights that this method quantized, but of routed experts."""
        parts = ["weighted", "gptq" if self.gptq else "", "descent" if self.sweeps else ""]
        return "+".join(filter(None, [*parts, "folds" if self.folds else ""]))

    @property
    def scale_rule_of_experts(self) -> str:
        """What records say of routed experts that this method quantized."""
        return "weighted+folds" if self.expert_folds or self.norm_folds else "weighted"

    def adding(self, options: Mapping[str, Any]) -> Calibrated:
        """This method with more `options`."""
        return replace(self, _verified={}, _norms={}, **options)

    @property
    def correlates(self) -> bool:
        """Whether it holds E[x x^T] of the inputs of a layer's linears."""
        return self.gptq

    def observe(self, layer: ObservedLayer) -> Observed | None:
        """Moments of the inputs of every weight that follows the effort, under the folds that help it."""
        wanted = {
            name: layer.targets[f"{name}.weight"]
            for name in layer.linears
            if (target := layer.targets.get(f"{name}.weight")) and target.scale_rule == EFFORT
        }
        mixture = None
        if layer.experts is not None and any(t.scale_rule == EFFORT for n, t in layer.targets.items() if "expert" in n):
            mixture = ExpertMoments()
        if not wanted and mixture is None:
            return None
        groups = group_modules(wanted)
        before_experts = fold_norm(layer, self._outputs) if self.norm_folds and mixture is not None else Scaling()
        scaling, calls = Scaling(), 0
        ranges: dict[str, float] = {}
        rounds = self.gptq and any(self._rounds_inputs(target.format) for target in wanted.values())
        if (self.folds and wanted) or rounds:
            scaling, ranges, calls = self._scan(layer, groups, wanted)
            folding.apply(layer.module, scaling)
        roundings = self._roundings(layer, ranges) if self.gptq else {}
        emulate.quantize_inputs(layer.module, {layer.linears[name]: one for name, one in roundings.items()})
        if mixture is not None and self.expert_folds:
            mixture = ExpertMoments(sampled=True, before=sent_before(layer))
        grams = {layer.linears[group[0]]: self.gptq for group in groups}
        of_groups = {group: {layer.owners.get(f"{name}.weight") for name in group} for group in groups}
        owners = {layer.linears[group[0]]: of.pop() for group, of in of_groups.items() if len(of) == 1}
        observer = MomentsObserver(layer.module, grams, ends=layer.experts is None, calls=calls, owners=owners)
        if mixture is not None and layer.experts is not None:
            experts.hook(layer.module.get_submodule(layer.experts.module), mixture)

        def before(batch: Any) -> None:
            observer.before(batch)
            if mixture is not None:
                mixture.before(batch)

        layer.run(before)
        found = observer.shared_result()
        if mixture is not None:
            mixture.share()
        by_file = {
            name: found[module] for group in groups if (module := layer.linears[group[0]]) in found for name in group
        }
        expert_moments = squares_of_experts(layer, None if mixture is None else mixture.result())
        if self.expert_folds and mixture is not None:
            folded = fold_experts(layer, expert_moments, mixture.samples(), self._search_in_expert)
            expert_moments = folded.moments(expert_moments)
            scaling = scaling.beside(folded.scaling)
        return Observed(
            moments=by_file,
            expert_moments=expert_moments,
            scaling=scaling.beside(before_experts),
            roundings=roundings,
            modules=layer.linears,
            parameters=layer.parameters,
        )

    def recall(
        self, squares: Mapping[str, Tensor], products: Sequence[Product], weight: Callable[[str], Tensor]
    ) -> Observed:
        """What is known of a layer whose samples do not run; the folds are those of `products`.

        `squares` are E[x^2] [K] of inputs, by the file's names of linears, of which `weight` gives weights [N, K].
        """
        if not self.folds:
            return Observed({}, squares, Scaling(), {}, {}, {})
        folded = fold_products(products, weight, squares, self._search_in_expert)
        return Observed({}, folded.moments(squares), folded.scaling, {}, {}, {})

    def _rounds_inputs(self, fmt: TensorFormat) -> bool:
        scale = torch.ones(()) if fmt.input_kind == "nvfp4" else None
        return emulate.input_quantizer(fmt, self.profile, scale) is not None

    def _scan(
        self, layer: ObservedLayer, groups: Sequence[tuple[str, ...]], targets: Mapping[str, Target]
    ) -> tuple[Scaling, dict[str, float], int]:
        """The folds that help, on a few samples, the largest input of each group under them, calls of these a batch."""
        watched = {layer.linears[group[0]]: False for group in groups}
        observer = MomentsObserver(layer.module, watched, sampled=True, ends=layer.experts is None)
        layer.run(observer.before, max_tokens=SOME_TOKENS)
        found = observer.result()
        chosen: list[tuple[Fold, Tensor]] = []
        if self.folds:
            by_module = {module: targets[name] for name, module in layer.linears.items() if name in targets}
            can = [
                fold
                for fold in folding.find_folds(
                    layer, lambda name: name in targets and folding.can_help(targets[name].format), self._norms
                )
                if fold.consumers[0] in found and self._is_same(layer, fold)
            ]

            def search(can: Sequence[Fold]) -> dict[int, Tensor | None]:
                mine = list(enumerate(can))[distributed.rank() :: distributed.world_size()]
                return {n: self._best_factors(layer.module, f, found[f.consumers[0]], by_module) for n, f in mine}

            said = distributed.gather((can, search(can)))
            factors = distributed.united([one for _, one in said])
            if any(others != said[0][0] for others, _ in said):  # by other kernels: the main process decides
                can = said[0][0]
                factors = distributed.merged(search(can))
            chosen = [(fold, one) for n, fold in enumerate(can) if (one := factors[n]) is not None]
        scaling = folding.scale(layer.module, chosen, layer.dtypes)
        ranges = {}
        for group in groups:
            module = layer.linears[group[0]]
            if module in found:
                seen, amax = found[module], found[module].amax
                if module in scaling.inputs and seen.sample is not None:
                    amax = float((seen.sample.float() / scaling.inputs[module]).abs().amax())
                ranges[group[0]] = amax
        return scaling, ranges, observer.calls  # of the same samples in all processes

    def _is_same(self, layer: ObservedLayer, fold: Fold) -> bool:
        """Whether the layer stays the same function; tried once for layers that are built alike."""
        kinds = tuple(type(layer.module.get_submodule(name)) for name in (fold.producer, *fold.consumers))
        key = type(layer.module), fold, kinds
        if key not in self._verified:
            self._verified[key] = folding.is_same_function(layer, fold)
        return self._verified[key]

    def _best_factors(
        self, module: nn.Module, fold: Fold, moments: Moments, targets: Mapping[str, Target]
    ) -> Tensor | None:
        """The factors under which rounded weights and inputs give the consumers' outputs best; None: without a fold."""
        weight = torch.cat([module.get_parameter(f"{name}.weight").data.float() for name in fold.consumers])
        return self._search(fold, weight, targets[fold.consumers[0]].format, moments, SEARCHED_ROWS)

    def _search_in_expert(self, fold: Fold, weight: Tensor, fmt: TensorFormat, moments: Moments) -> Tensor | None:
        if moments.sample is None and (fmt.spec.calibrated or self._rounds_inputs(fmt)):
            return None  # what becomes of inputs, and of their range, is not known
        return self._search(fold, weight, fmt, moments, SEARCHED_ROWS_OF_EXPERT)

    def _search(
        self, fold: Fold, weight: Tensor, fmt: TensorFormat, moments: Moments, searched_rows: int
    ) -> Tensor | None:
        """The best factors for the consumers' weights, fp32 [N, K].

        The error of outputs is that on the sampled inputs; without these, that of weights under E[x^2].
        """
        squares_of_weights = fold.to_producer(weight.square().mean(0))
        weight = weight[:: max(1, len(weight) // searched_rows)]
        inputs = None if moments.sample is None else moments.sample.float()
        exact = None if inputs is None else inputs @ weight.t()

        squares = fold.to_producer(moments.squares)
        tried = folding.factors_of_all(squares, squares_of_weights, STRENGTHS)
        scales = torch.stack([torch.ones_like(weight[0]), *(fold.to_consumer(factors) for factors in tried)])
        # a GPU is waited for twice: for the ranges of inputs, and for the errors
        ranges = [0.0] * len(scales) if inputs is None else (inputs.abs().amax(0) / scales).amax(1).tolist()

        def error(number: int) -> Tensor:
            scale, amax = scales[number], ranges[number]
            scaled, importance = weight * scale, moments.squares / scale.square()
            changed = number > 0
            found: Tensor
            if inputs is None or exact is None:
                found = (_rounded(scaled, fmt, importance, changed=changed) - scaled).square_().sum(0) @ importance
            else:
                outputs = self._outputs(inputs / scale, scaled, fmt, importance, amax, changed=changed)
                found = torch.linalg.vector_norm(outputs - exact)
            return found

        errors = torch.stack([error(number) for number in range(len(scales))]).tolist()
        best, least = None, errors[0]
        for factors, found in zip(tried, errors[1:], strict=True):
            if found < least:
                best, least = factors, found
        return best

    def _outputs(
        self,
        inputs: Tensor,
        weight: Tensor,
        fmt: TensorFormat,
        importance: Tensor,
        amax: float | None = None,
        *,
        changed: bool = False,
    ) -> Tensor:
        """What rounded weights, fp32 [N, K], put out on rounded inputs [n, K] of largest magnitude `amax`, if known.

        Whether the weights are `changed` is what `choose_scales` asks.
        """
        if (quantizer := self._quantizer(fmt, float(inputs.abs().amax()) if amax is None else amax)) is not None:
            inputs = quantizer(inputs)
        return inputs @ _rounded(weight, fmt, importance, changed=changed).t()

    def _quantizer(self, fmt: TensorFormat, amax: float) -> emulate.Quantizer | None:
        scale = nvfp4.input_global_scale(HEADROOM * amax) if fmt.input_kind == "nvfp4" and amax > 0 else None
        if fmt.input_kind == "nvfp4" and scale is None:
            return None
        return emulate.input_quantizer(fmt, self.profile, scale)

    def _roundings(self, layer: ObservedLayer, ranges: Mapping[str, float]) -> dict[str, emulate.Quantizer]:
        """What rounds the inputs of the layer's linears as the engine does, by the file's names."""
        quantizers: dict[str, emulate.Quantizer] = {}
        for group in group_modules(name for name in layer.linears if f"{name}.weight" in layer.targets):
            fmt = layer.targets[f"{group[0]}.weight"].format
            if fmt.input_kind == "nvfp4" and group[0] not in ranges:
                continue
            quantizer = self._quantizer(fmt, ranges.get(group[0], 0.0))
            if quantizer is not None:
                quantizers |= dict.fromkeys(group, quantizer)
        return quantizers

    def input_roundings(self, observed: Observed | None) -> Mapping[str, emulate.Quantizer]:
        """What rounds inputs, those of four bits under the ranges that were scanned."""
        return {} if observed is None else observed.roundings

    def choose(self, groups: Iterable[WeightGroup], purpose: Purpose) -> Iterator[Choice]:
        """Codes of each group by what was observed of its inputs; without an observation as plain rules choose."""
        observed: Observed | None = purpose.observed
        for group in groups:
            if group.target is None:
                yield from _kept(group, observed)
            elif group.target.scale_rule != EFFORT or observed is None:
                _fold(group, observed)
                yield from ROUND_TO_NEAREST.choose([group], purpose)
            else:
                yield from self._choose(group, group.target, observed, purpose)

    def _choose(self, group: WeightGroup, target: Target, observed: Observed, purpose: Purpose) -> Iterator[Choice]:
        names = list(group.weights)
        first = names[0].removesuffix(".weight")
        moments = observed.moments.get(first)
        importance = observed.expert_moments.get(first) if moments is None else moments.squares
        if importance is None:  # nothing came to it
            _fold(group, observed)
            yield from ROUND_TO_NEAREST.choose([group], purpose)
            return
        feedback = gram = None
        if moments is not None and moments.gram is not None and self.gptq:
            gram = moments.gram
            feedback = feedback_of(gram)
        rule = self.scale_rule_of_experts if moments is None else self.scale_rule
        dtype = next(iter(group.weights.values())).dtype
        exact = {name: observed.scaled(name, group.weights.pop(name)) for name in names}
        chosen = choose_scales(exact, target.format, importance, dtype)
        done: dict[str, Tensor] = {}
        if feedback is not None:
            done = round_together(exact, {n: one.steps for n, one in chosen.items()}, feedback, gram, self.sweeps)
        for name in names:
            weight, scales = exact.pop(name), chosen.pop(name)
            values = done.pop(name) if done else round_weight(weight, scales.steps, feedback, gram, self.sweeps)
            relative = _relative_error(weight, values)
            codes, kept = scales.encode(values), None
            if purpose.runs and name in purpose.buffers:
                purpose.buffers[name].copy_(values)
            elif purpose.runs:
                kept = values.to(dtype)
            yield Choice(name=name, codes=codes, weight_16bit=kept, relative_error=relative, scale_rule=rule)


def _relative_error(weight: Tensor, values: Tensor) -> Tensor:
    """sum((values - weight)^2) / sum(weight^2) of fp32 [N, K], fp64 (); 0 for a weight of zeros."""
    error, square = torch.zeros(2, dtype=torch.float64, device=weight.device)
    count = slice_outputs(weight)
    for exact, found in zip(weight.split(count), values.split(count), strict=True):
        square += (exact.double() if exact.device.type == "cpu" else exact).square().sum()
        error += (exact - found).square_().sum()
    return torch.where(square == 0, 0.0, error / square)


def _kept(group: WeightGroup, observed: Observed | None) -> Iterator[Choice]:
    """Tensors that stay, with the values that folds give them."""
    for name in list(group.weights):
        tensor = group.weights.pop(name)
        new = None if observed is None else observed.folded(name, tensor)
        yield Choice(name=name, codes=None, weight_16bit=tensor if new is None else new, changed=new is not None)


def _fold(group: WeightGroup, observed: Observed | None) -> None:
    """Give a group's weights the values that folds give them, in their dtype."""
    for name, weight in group.weights.items():
        if observed is not None and (new := observed.folded(name, weight)) is not None:
            group.weights[name] = new


def _rounded(weight: Tensor, fmt: TensorFormat, importance: Tensor, *, changed: bool = False) -> Tensor:
    """A weight, fp32 [N, K], rounded to the nearest codes under scales chosen by E[x^2] [K]."""
    found = choose_scales({"": weight}, fmt, importance, changed=changed)[""].steps
    return nearest(weight, found.step, found.zero, found.grid)


def squares_of_experts(layer: ObservedLayer, means: tuple[Tensor, Tensor] | None) -> dict[str, Tensor]:
    """E[x^2] [K] of the inputs of each routed expert's linears, by the file's names.

    `means` are those of gate and up [E, K], and of down; None if no token came.
    """
    if means is None or layer.experts is None:
        return {}
    gate_up, down = means
    return {
        f"{layer.prefix}{name}".removesuffix(".weight"): (down if role == DOWN else gate_up)[expert]
        for (expert, role, parameter), name in layer.experts.names.items()
        if parameter == "weight"
    }


def choose_scales(
    weights: Mapping[str, Tensor],
    fmt: TensorFormat,
    importance: Tensor,
    dtype: torch.dtype = torch.bfloat16,
    *,
    changed: bool = False,
) -> dict[str, Scales]:
    """Scales of a fused group of weights, fp32 [N, K], each the best under `importance`, E[x^2] [K].

    `dtype` is that of the model, in which INT4 and FP8 store their scales. Weights that are `changed`, by factors of
    their input features, are not looked at for another format's grid, for which a GPU is waited for.
    """
    if fmt.name in ("nvfp4", "nvfp4a16"):
        exact = None if changed else exact_global_scale(weights.values())
        if exact is not None:
            return {name: _nvfp4_under(block_scales_of_two(weight, exact), exact) for name, weight in weights.items()}
        amax = torch.stack([largest_magnitude(weight) for weight in weights.values()]).amax()
        shared = global_scale(amax, "weighted")
        return {name: _nvfp4(weight, shared, importance) for name, weight in weights.items()}
    if fmt.name == "mxfp4":
        return {name: _mxfp4(weight, importance) for name, weight in weights.items()}
    if fmt.name == "fp8-dynamic":
        return {name: _fp8(weight, importance, dtype) for name, weight in weights.items()}
    return {name: _int4(weight, fmt, importance, dtype) for name, weight in weights.items()}


def _nvfp4(weight: Tensor, shared: Tensor, importance: Tensor) -> Scales:
    return _nvfp4_under(block_scales(weight, shared, "weighted", "mse", importance), shared)


def _nvfp4_under(scales: Tensor, shared: Tensor) -> Scales:
    step = (scales.float() * shared).repeat_interleave(NVFP4_BLOCK, dim=1)
    return Scales(Steps("e2m1", step), lambda values, some: nvfp4.quantize(values, some, shared), (scales,))


def _mxfp4(weight: Tensor, importance: Tensor) -> Scales:
    exponents = block_exponents(weight, "weighted", importance)
    step = powers_of_two(exponents).repeat_interleave(MXFP4_BLOCK, dim=1)
    return Scales(Steps("e2m1", step), mxfp4.quantize, (exponents,))


def _fp8(weight: Tensor, importance: Tensor, dtype: torch.dtype) -> Scales:
    scale = channel_scales(weight, dtype, importance)
    return Scales(Steps("e4m3", scale.float().expand_as(weight)), fp8.quantize_under, (scale,))


def _int4(weight: Tensor, fmt: TensorFormat, importance: Tensor, dtype: torch.dtype) -> Scales:
    scale, zero_point = integer_scales(weight.to(dtype), fmt.group_size, fmt.symmetric, importance)
    step = scale.float().repeat_interleave(fmt.group_size, dim=1)
    if zero_point is None:
        return Scales(Steps("int4", step), lambda values, some: int4.quantize_under(values, some, None), (scale,))
    zero = zero_point.float().repeat_interleave(fmt.group_size, dim=1)
    return Scales(Steps("int4", step, zero), int4.quantize_under, (scale, zero_point))
