"""What a recipe says of a weight once it is settled, and what engines ask of such assignments together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from snugfit.engines.fused import NO_FOUR_BIT_INPUTS, group_modules
from snugfit.errors import UserError
from snugfit.formats.spec import KEEP, TensorFormat
from snugfit.model.names import TensorName


@dataclass(frozen=True)
class Assignment:
    """What a recipe says of one weight: its format (None: kept), how scales are chosen, and which rule said so.

    `copied`: the source has it in this format already, and its codes stay. A `rule` of -1: no rule said so.
    """

    format: TensorFormat | None
    scale_rule: str
    objective: str
    rule: int
    copied: bool = False

    @property
    def calibrated(self) -> bool:
        """Whether its inputs need a scale that is measured."""
        return self.format is not None and self.format.spec.calibrated


def staying(asked: str, stored: TensorFormat | None) -> TensorFormat | None:
    """The format in which a weight stays as the source has it where format `asked` is; None where it is made anew."""
    if stored is None:
        return None
    if asked == KEEP or (asked.startswith("fp8") and stored.name.startswith("fp8")):
        return stored
    return TensorFormat("mxfp4") if asked == stored.name == "mxfp4" else None


def copied(name: str, fmt: TensorFormat, rule: int, place: str) -> Assignment:
    """A weight that stays in the source's format; UserError for one that no engine runs in this layout."""
    if fmt.block is not None:
        raise UserError(
            f"{name} is FP8 in blocks of {fmt.block[0]} x {fmt.block[1]}: engines run those of 128 x 128.",
            where=place,
            remedy="Add `requantize: true` to the rule that names it.",
        )
    if fmt.name == "fp8" and fmt.input_kind in ("fp8-tensor-dynamic", "fp8-token"):
        # one scale a weight, inputs under one a token: experts of vLLM's ask for one a row, which may all be the same
        fmt = TensorFormat("fp8-dynamic")
    return Assignment(fmt, "", "", rule, copied=True)


def check_inputs(assignment: Assignment, names: Sequence[str], place: str) -> None:
    """UserError for a linear whose inputs no engine can round as the format asks."""
    barred = next((name for name in names if name.split(".")[-2] in NO_FOUR_BIT_INPUTS), None)
    if barred is not None and assignment.format is not None and assignment.format.input_kind in ("nvfp4", "mxfp4"):
        leaf = barred.split(".")[-2]
        raise UserError(
            f"{barred} cannot have 4-bit inputs: engines take its weight apart by running it.",
            where=place,
            remedy=f'Add a rule before, `name: "*.{leaf}"`, `format: fp8-dynamic`.',
        )


def check_experts(found: Mapping[str, Assignment], names: Sequence[TensorName], where: str) -> None:
    """UserError where routed experts of one layer differ in format: engines ask for it once a layer, of expert 0."""
    first: dict[int, tuple[str, TensorFormat | None]] = {}
    for name in names:
        if name.layer is None or name.expert is None or name.parameter != "weight":
            continue
        fmt = found[name.full].format if name.full in found else None
        known, other = first.setdefault(name.layer, (name.full, fmt))
        if fmt != other:
            label, label_of_other = (f.label() if f else KEEP for f in (fmt, other))
            raise UserError(
                f"splits the routed experts of layer {name.layer}: {known} is {label_of_other}, {name.full} {label}. "
                "Engines run all experts of a layer in one format.",
                where=where,
                remedy="Let one rule name them all: `role: experts`.",
            )


def check_groups(found: Mapping[str, Assignment], where: str) -> None:
    """UserError where members of a fused group differ in format or scale rule: engines run them as one product."""
    modules = {name.removesuffix(".weight"): assignment for name, assignment in found.items()}
    for group in group_modules(modules):
        first = modules[group[0]]
        for member in group[1:]:
            other = modules[member]
            same = (first.format, first.scale_rule, first.objective) == (other.format, other.scale_rule, other.objective)
            if not same and (first.copied or other.copied):
                kinds = ", ".join(f"{m.rpartition('.')[2]} {_source_words(modules[m])}" for m in group)
                raise UserError(
                    f"{group[0]} and its partners run as one matrix product in vLLM and need one format: {kinds}.",
                    where=where,
                    remedy="Add `requantize: true` to the rule that names them.",
                )
            if not same:
                raise UserError(
                    f"splits a fused group: {group[0]} (rules[{first.rule}]) and {member} (rules[{other.rule}]) "
                    "run as one matrix product in vLLM and need one format and one scale rule.",
                    where=where,
                    remedy=f"Let one rule name all of: {', '.join(group)}.",
                )


def _source_words(assignment: Assignment) -> str:
    label = assignment.format.label() if assignment.format else KEEP
    return f"stays {label}" if assignment.copied else f"would be {label}"
