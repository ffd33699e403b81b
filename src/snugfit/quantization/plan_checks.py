"""Whether a plan agrees with transformers' model, with statistics, and with how engines run codes that stay."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from snugfit.data.dataset import Dataset, hold_out
from snugfit.errors import UserError
from snugfit.model.skeleton import Skeleton, open_skeleton
from snugfit.quantization.layer.division import groups_of
from snugfit.quantization.plan import Plan
from snugfit.quantization.ways import HELD_OUT_EVERY
from snugfit.recipes.assignment import NO_RULE, Assignment
from snugfit.records.statistics_file import ExpertCalibration, Statistics
from snugfit.storage.checkpoint import Checkpoint, fingerprint, header_digest, read_tensor

# of NVFP4, one for a whole weight and one for its inputs, in any dialect
_WEIGHT_SCALES = ("weight_global_scale", "weight_scale_2")
_INPUT_SCALES = ("input_global_scale", "input_scale")


def check_statistics(
    known: Statistics, checkpoint: Checkpoint, asked: Dataset | None, experts: ExpertCalibration, *, where: str
) -> None:
    """UserError if statistics are of another model, of other samples than `asked`, or of other expert settings."""
    again = "Measure them with `collect_statistics`, or leave `statistics` out."
    if known.header_digest != header_digest(checkpoint) or known.fingerprint != fingerprint(checkpoint):
        what = f"these statistics are of another model ({known.model})."
        raise UserError(what, code="statistics-mismatch", where=where, remedy=again)
    # of samples of which a part was held out, statistics have the others
    alike = [] if asked is None else [[part.digest] for part in (asked, hold_out(asked, HELD_OUT_EVERY)[0])]
    if asked is not None and [one.digest for one in known.datasets] not in alike:
        of = ", ".join(f"{one.source}: {one.num_samples} samples, {one.digest[:12]}" for one in known.datasets)
        what = f"these statistics are of other samples ({of}) than `dataset` gives ({len(asked.samples)}, "
        remedy = "Leave `dataset` out to use theirs, or measure these."
        raise UserError(f"{what}{asked.digest[:12]}).", code="statistics-mismatch", where=where, remedy=remedy)
    if not known.ranges or not any(layer.experts for layer in known.layers.values()):
        return
    if known.all_experts != experts.all_experts:
        what = f"these statistics were measured with moe_calibrate_all_experts={known.all_experts}."
        remedy = f"Set `moe_calibrate_all_experts` so, to use them. {again}"
        raise UserError(what, code="statistics-mismatch", where=where, remedy=remedy)
    if known.all_experts and known.max_forced_tokens != experts.max_forced_tokens:
        what = f"these statistics were measured with max_forced_tokens={known.max_forced_tokens}."
        remedy = f"Set `max_forced_tokens` so, to use them. {again}"
        raise UserError(what, code="statistics-mismatch", where=where, remedy=remedy)


def check_with_transformers(plan: Plan, dtype: torch.dtype | None = None) -> Skeleton:
    """transformers' model of a plan, on the meta device; UserError if it does not agree with the headers.

    It computes in `dtype`, by default the config's own.
    """
    skeleton = open_skeleton(plan.layout, dtype)
    _check_linears(plan, skeleton.linears())
    return skeleton


def _check_linears(plan: Plan, linears: Mapping[str, str]) -> None:
    """UserError if a format is given to what transformers does not run as a linear."""
    for name, assignment in plan.assignments.items():
        module = name.removesuffix(".weight")
        if _is_quantized(assignment) and module not in linears:
            assert plan.recipe is not None
            raise UserError(
                f"{module} is not a linear in transformers.",
                code="recipe-not-quantizable",
                where=plan.recipe.place_of(assignment.rule),
                remedy="Give it `format: keep` in a rule before this one.",
            )


def check_copied_scales(plan: Plan, *, every_expert: bool) -> None:
    """UserError if linears whose NVFP4 codes are copied have several global scales, and engines run them as one.

    vLLM gives a fused group the largest divisor of its members (of ModelOpt's files: the largest multiplier). Of routed
    experts only the first of each layer is checked unless `every_expert`.
    """
    for group in (group for unit in plan.units for group in groups_of(plan, unit, runs=False)):
        assignment = plan.assignments.get(group[0])
        if len(group) == 1 or assignment is None or not assignment.keeps_codes or assignment.rule == NO_RULE:
            continue
        fmt = assignment.format
        if fmt is None or not fmt.name.startswith("nvfp4"):
            continue
        if not every_expert and ".experts." in group[0] and ".experts.0." not in group[0]:
            continue
        assert plan.recipe is not None
        parts = [plan.weights.origins[name].parts for name in group]
        for suffix in (*_WEIGHT_SCALES, *(_INPUT_SCALES if fmt.input_kind == "nvfp4" else ())):
            scales = {float(read_tensor(plan.checkpoint, one[suffix])) for one in parts if suffix in one}
            if len(scales) > 1:
                named = ", ".join(name.removesuffix(".weight") for name in group)
                raise UserError(
                    f"{named} have several {suffix} ({', '.join(map(str, sorted(scales)))}), and vLLM runs them as one "
                    "matrix product under one of these.",
                    code="scale-invalid",
                    where=plan.recipe.place_of(assignment.rule),
                    remedy="Add `requantize: true` to the rule that names them.",
                )


def _is_quantized(assignment: Assignment) -> bool:
    return assignment.format is not None and not assignment.keeps_codes
