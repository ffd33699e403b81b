"""What a pass over a decoder layer measured, checked against what the layer's formats need."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from snugfit.engines.fused import group_modules
from snugfit.errors import Unfinished, UserError
from snugfit.model.experts import DOWN, ExpertNames
from snugfit.model.skeleton import Skeleton
from snugfit.quantization.plan import Plan
from snugfit.records.statistics import LayerStatistics
from snugfit.records.statistics_file import ExpertCalibration, Statistics

_MEASURE_AGAIN = "Measure them again with `collect_statistics`."


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Ranges of one layer: amax of the inputs of each weight by tensor name, and of cached keys and values.

    `statistics` is everything that was measured, None if nothing was (or if it came from a file).
    """

    inputs: Mapping[str, float]
    keys_values: tuple[float, float] | None = None
    statistics: LayerStatistics | None = None


NOTHING_MEASURED = Measured(inputs={})


def ranges_of(
    plan: Plan, skeleton: Skeleton, index: int, found: LayerStatistics, experts: ExpertCalibration
) -> Measured:
    """The ranges that decoder layer `index` needs out of its statistics.

    UserError for a range that is missing, zero or not finite; Unfinished for experts that saw too few tokens.
    """
    _check_finite(found, skeleton.dtype, f"{plan.decoder}.{index}")
    mixture = skeleton.experts.get(index)
    inputs = input_amax(plan, index, found, mixture)
    if _experts_need_scales(plan, index, mixture):
        check_coverage(found, experts)
    if plan.writes_kv_scales(index):
        for what, largest in zip(("keys", "values"), found.cache or (0.0, 0.0), strict=True):
            _check_amax(largest, f"its cached {what} have", plan.observed_caches[index])
    return Measured(inputs=inputs, keys_values=found.cache, statistics=found)


def recall(plan: Plan, skeleton: Skeleton, index: int, known: Statistics, experts: ExpertCalibration) -> Measured:
    """What an earlier run measured of decoder layer `index`; UserError if the plan needs more than that."""
    found = known.layers.get(index)
    where = f"statistics of {known.model}"
    if found is None:
        what = f"layer {index} is missing."
        raise UserError(what, code="statistics-invalid", where=where, remedy=_MEASURE_AGAIN)
    if not known.ranges:
        _check_no_ranges_needed(plan, index, where)
        return Measured(inputs={})
    if index in plan.observed_caches and found.cache is None:
        what = f"keys and values of layer {index} are missing."
        raise UserError(what, code="statistics-invalid", where=where, remedy=_MEASURE_AGAIN)
    ranges = ranges_of(plan, skeleton, index, found, experts)
    cache = found.cache if index in plan.observed_caches else None
    return Measured(inputs=ranges.inputs, keys_values=cache)


def _check_no_ranges_needed(plan: Plan, index: int, where: str) -> None:
    calibrated = [name for name in plan.unit_of_layer(index) if (a := plan.assignments.get(name)) and a.calibrated]
    if calibrated or index in plan.observed_caches:
        needed = f"inputs of {calibrated[0]}" if calibrated else f"cached keys and values of layer {index}"
        raise UserError(
            f"an importance matrix has no ranges, and {needed} need a scale.",
            code="statistics-mismatch",
            where=where,
            remedy="Choose formats with 16-bit inputs (int4, nvfp4a16), or measure ranges with `collect_statistics`.",
        )


def input_amax(plan: Plan, index: int, found: LayerStatistics, mixture: ExpertNames | None) -> dict[str, float]:
    """Largest input magnitude of each weight of a layer that needs one, by tensor name; UserError if one is missing.

    All routed experts share one for gate and up, and one for down: engines take the largest anyway.
    """
    prefix = f"{plan.decoder}.{index}."
    wanted = [name for name in plan.unit_of_layer(index) if (a := plan.assignments.get(name)) and a.calibrated]
    amax = _expert_amax(prefix, wanted, found, mixture) if mixture is not None else {}
    for group in group_modules(name.removesuffix(".weight") for name in wanted if name not in amax):
        one = next((found.inputs[module] for module in group if module in found.inputs), None)
        if one is None:
            raise UserError(
                "nothing was measured of its inputs: no sample passed it.",
                code="amax-invalid",
                where=group[0],
                remedy="Give it `format: keep`, or a format with inputs in 16 bits or dynamic scales, in the recipe.",
            )
        _check_amax(one.amax, "its calibrated inputs have", group[0])
        amax |= {f"{module}.weight": one.amax for module in group}
    return amax


def _expert_amax(prefix: str, wanted: list[str], found: LayerStatistics, mixture: ExpertNames) -> dict[str, float]:
    roles = {prefix + name: role for (_, role, _), name in mixture.names.items()}
    routed = [name for name in wanted if name in roles]
    if not routed:
        return {}
    module = prefix + mixture.file_module
    seen = found.experts.get(module)
    if seen is None:
        what = "no statistics of its experts."
        raise UserError(what, code="statistics-invalid", where=module, remedy=_MEASURE_AGAIN)
    if len(seen.routed) != len({expert for expert, _, _ in mixture.names}):
        what = f"the statistics have {len(seen.routed)} experts, the layer another number."
        raise UserError(what, code="statistics-mismatch", where=module, remedy=_MEASURE_AGAIN)
    amax = {name: seen.down if roles[name] == DOWN else seen.gate_up for name in routed}
    for largest in amax.values():
        _check_amax(largest, "calibrated inputs of its experts have", module)
    return amax


def _experts_need_scales(plan: Plan, index: int, mixture: ExpertNames | None) -> bool:
    """Whether a layer's routed experts need scales of their inputs."""
    names = () if mixture is None else (f"{plan.decoder}.{index}.{name}" for name in mixture.names.values())
    return any(a.calibrated for name in names if (a := plan.assignments.get(name)))


def check_coverage(found: LayerStatistics, experts: ExpertCalibration) -> None:
    """Unfinished if an expert saw fewer tokens than `min_tokens_per_expert`."""
    least = experts.min_tokens_per_expert
    for module, seen in found.experts.items():
        below = seen.experts_below(least)
        if not below:
            continue
        few = ", ".join(f"{number} ({seen.tokens[number]})" for number in below[:8])
        more = f" and {len(below) - 8} more" if len(below) > 8 else ""
        how = "`moe_calibrate_all_experts` (with `restart`) sends them what the router does not; "
        raise Unfinished(
            f"{len(below)} of {len(seen.routed)} experts saw fewer than {least} tokens: {few}{more}.",
            code="experts-uncovered",
            where=module,
            remedy=f"{'' if experts.all_experts else how}a larger `num_samples` helps too; "
            "`min_tokens_per_expert` 0 gives them the scales of the other experts of their layer.",
        )


def not_finite(what: str, dtype: torch.dtype, *, where: str) -> UserError:
    """The error that `what`, computed in `dtype`, is NaN or infinite; in float16 with the dtype that has the range."""
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.float16:
        return UserError(
            f"{name} overflowed: {what} are NaN or infinite.",
            code="activations-not-finite",
            where=where,
            remedy='Run the samples in a dtype of wider range: set `dtype="bfloat16"`.',
        )
    return UserError(
        f"{what} are NaN or infinite (computed in {name}).",
        code="activations-not-finite",
        where=where,
        remedy="Weights of this layer, or of those before it, are too large: check the source, or download it again.",
    )


def _check_finite(found: LayerStatistics, dtype: torch.dtype, layer: str) -> None:
    """UserError for inputs, keys or values of the layer that are NaN or infinite, needed or not."""
    for module, inputs in found.inputs.items():
        if not math.isfinite(inputs.amax):
            raise not_finite("its inputs", dtype, where=module)
    for module, seen in found.experts.items():
        ranges = (*seen.gate_up_routed, *seen.gate_up_forced, *seen.down_routed, *seen.down_forced)
        if not all(map(math.isfinite, ranges)):
            raise not_finite("inputs of its experts", dtype, where=module)
    if not all(map(math.isfinite, found.cache or ())):
        raise not_finite("keys or values", dtype, where=layer)


def _check_amax(amax: float, what: str, where: str) -> None:
    if not 0.0 < amax < math.inf:
        raise UserError(
            f"{what} largest magnitude {amax}.",
            code="amax-invalid",
            where=where,
            remedy="No scale can be made of that: check the source's weights, or keep this tensor in the recipe.",
        )
