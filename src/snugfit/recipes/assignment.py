"""What a recipe says of one weight once its rules are resolved, and what engines require of all weights together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from snugfit.engines.fused import NO_FOUR_BIT_INPUTS, group_modules
from snugfit.errors import UserError
from snugfit.formats.spec import EFFORT, KEEP, TensorFormat
from snugfit.model.names import TensorName

NO_RULE = -1


@dataclass(frozen=True)
class Assignment:
    """The format of one weight (None: unquantized), how its scales are chosen, and the rule that decided.

    `scale_rule` is EFFORT where the recipe names none and the format has a choice: the effort of the run decides.
    `keeps_codes`: the source stores the weight in this format, and its codes are copied. `rule` is NO_RULE for codes of
    the source that no rule names.
    """

    format: TensorFormat | None
    scale_rule: str
    objective: str
    rule: int
    keeps_codes: bool = False

    @property
    def calibrated(self) -> bool:
        """Whether its inputs need a measured scale."""
        return self.format is not None and self.format.spec.calibrated

    @property
    def follows_effort(self) -> bool:
        """Whether the effort of the run decides how its codes and scales are chosen."""
        return self.scale_rule == EFFORT

    def label(self) -> str:
        """The format's label, "keep" for an unquantized weight."""
        return KEEP if self.format is None else self.format.label()


def kept_format(asked: str, source: TensorFormat | None) -> TensorFormat | None:
    """The source's format if its codes satisfy a rule with format `asked`; None if the weight is quantized again."""
    if source is None:
        return None
    if asked == KEEP or (asked.startswith("fp8") and source.name.startswith("fp8")):
        return source
    return TensorFormat("mxfp4") if asked == source.name == "mxfp4" else None


def keep_codes(name: str, fmt: TensorFormat, rule: int, place: str) -> Assignment:
    """The assignment of a weight whose codes are copied; UserError for a format that engines cannot run."""
    if fmt.block is not None:
        raise UserError(
            f"{name} is FP8 in blocks of {fmt.block[0]} x {fmt.block[1]}, but engines only run blocks of 128 x 128.",
            code="recipe-not-quantizable",
            where=place,
            remedy="Add `requantize: true` to the rule that names it.",
        )
    if fmt.name == "fp8" and fmt.input_kind in ("fp8-tensor-dynamic", "fp8-token"):
        # one scale a weight, inputs under one a token: vLLM's experts need one scale a channel, which may all be equal
        fmt = TensorFormat("fp8-dynamic")
    return Assignment(fmt, "", "", rule, keeps_codes=True)


def check_inputs(assignment: Assignment, names: Sequence[str], place: str) -> None:
    """UserError for a linear whose inputs engines cannot round as the format asks."""
    if assignment.format is None or assignment.format.input_kind not in ("nvfp4", "mxfp4"):
        return
    for name in names:
        leaf = name.split(".")[-2]
        if leaf in NO_FOUR_BIT_INPUTS:
            raise UserError(
                f"{name} cannot have 4-bit inputs: vLLM recomputes this MLA weight by running the linear.",
                code="recipe-not-quantizable",
                where=place,
                remedy=f'Add an earlier rule, `name: "*.{leaf}"`, `format: fp8-dynamic`.',
            )


def check_experts(found: Mapping[str, Assignment], names: Sequence[TensorName], where: str) -> None:
    """UserError for routed experts of one layer in several formats: engines look up the format of expert 0 alone."""
    first: dict[int, tuple[str, TensorFormat | None]] = {}
    for name in names:
        if name.layer is None or name.expert is None or name.parameter != "weight":
            continue
        fmt = found[name.full].format if name.full in found else None
        known, other = first.setdefault(name.layer, (name.full, fmt))
        if fmt != other:
            label, other_label = (f.label() if f else KEEP for f in (fmt, other))
            raise UserError(
                f"splits the routed experts of layer {name.layer}: {known} is {other_label}, {name.full} is {label}. "
                "Engines run all experts of a layer in one format.",
                code="recipe-splits-group",
                where=where,
                remedy="Let one rule name all of them: `role: experts`.",
            )


def check_groups(found: Mapping[str, Assignment], where: str) -> None:
    """UserError for a fused group with several formats or scale rules: engines run it as one matrix product."""
    modules = {name.removesuffix(".weight"): assignment for name, assignment in found.items()}
    for group in group_modules(modules):
        first = modules[group[0]]
        for member in group[1:]:
            other = modules[member]
            if (first.format, first.scale_rule, first.objective) != (other.format, other.scale_rule, other.objective):
                raise _split(group, member, modules, where)


def _split(group: Sequence[str], member: str, modules: Mapping[str, Assignment], where: str) -> UserError:
    """The error for a fused group of which the first one and `member` differ."""
    first, other = modules[group[0]], modules[member]
    if first.keeps_codes or other.keeps_codes:
        kinds = ", ".join(f"{m.rpartition('.')[2]} {_source_words(modules[m])}" for m in group)
        return UserError(
            f"{group[0]} and its partners run as one matrix product in vLLM and need one format: {kinds}.",
            code="recipe-splits-group",
            where=where,
            remedy="Add `requantize: true` to the rule that names them.",
        )
    return UserError(
        f"splits a fused group: {group[0]} (rules[{first.rule}]) and {member} (rules[{other.rule}]) run as one matrix "
        "product in vLLM and need one format and one scale rule.",
        code="recipe-splits-group",
        where=where,
        remedy=f"Let one rule name all of: {', '.join(group)}.",
    )


def _source_words(assignment: Assignment) -> str:
    return f"{'keeps' if assignment.keeps_codes else 'would be'} {assignment.label()}"
