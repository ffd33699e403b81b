"""What a recipe says of one weight once its rules are resolved, and what engines require of all weights together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from snugfit.engines.fused import NO_FOUR_BIT_INPUTS, group_modules
from snugfit.errors import UserError
from snugfit.formats.spec import EFFORT, INT4_GROUPS, KEEP, WHOLE_ROW, TensorFormat
from snugfit.model.names import TensorName
from snugfit.recipes.recipe import Rule

NO_RULE = -1
ALONG = "fp8-dynamic"  # the format whose weights follow the effort if others do


@dataclass(frozen=True)
class Assignment:
    """The format of one weight (None: unquantized), how its scales are chosen, and the rule that decided.

    `scale_rule` is EFFORT where the recipe names none and the format has a choice: the effort of the run decides.
    `keeps_codes`: the source stores the weight in this format, and its codes are copied. `rule` is NO_RULE for codes of
    the source that no rule names. `input_headroom` is how far the range of a calibrated input scale goes beyond the
    largest calibrated input, as a factor; None where the run decides, and for formats without such a scale.
    """

    format: TensorFormat | None
    scale_rule: str
    objective: str
    rule: int
    keeps_codes: bool = False
    input_headroom: float | None = None

    @property
    def calibrated(self) -> bool:
        """Whether its inputs need a measured scale: copied codes bring their own."""
        return self.format is not None and not self.keeps_codes and self.format.spec.calibrated

    @property
    def follows_effort(self) -> bool:
        """Whether the effort of the run decides how its codes and scales are chosen."""
        return self.scale_rule == EFFORT

    def label(self) -> str:
        """The format's label, "keep" for an unquantized weight."""
        return KEEP if self.format is None else self.format.label()


def kept_format(rule: Rule, source: TensorFormat | None) -> TensorFormat | None:
    """The format in which the source's codes satisfy a rule; None if the weight is quantized again.

    Codes that engines do not run satisfy no rule: under `keep` such a weight is dequantized. NVFP4 with 4-bit inputs
    satisfies nvfp4a16, without the scale of its inputs.
    """
    if source is None or rule.requantize or not runs_in_engines(source):
        return None
    if rule.format == KEEP or (rule.format.startswith("fp8") and source.name.startswith("fp8")):
        return source
    if rule.format == "nvfp4a16" and source.name == "nvfp4":
        return TensorFormat("nvfp4a16")
    if rule.format != source.name:
        return None
    if source.name == "int4":
        same = source.symmetric == (rule.symmetric is not False)
        return source if same and source.group_size in (rule.group_size or INT4_GROUPS) else None
    return TensorFormat("mxfp4") if source.name == "mxfp4" else source


def runs_in_engines(fmt: TensorFormat) -> bool:
    """Whether engines run codes that a source stores in `fmt`, as this package writes them.

    INT4: the groups of Marlin and Machete, with 16-bit inputs. INT8 is read and not written. FP8 in blocks: 128 x 128
    alone, with inputs rounded at run time. Of vLLM 0.32's kernels CUTLASS, DeepGEMM and FlashInfer refuse other
    blocks, Marlin ignores them, and kernels for experts are looked up as if for 128 x 128.
    """
    if fmt.name == "int4":
        return fmt.input_kind == "none" and fmt.group_size in (WHOLE_ROW, *INT4_GROUPS)
    return fmt.block is None and fmt.name != "int8"


def keep_codes(fmt: TensorFormat, rule: int) -> Assignment:
    """The assignment of a weight whose codes, in a format that engines run, are copied."""
    if fmt.name == "fp8" and fmt.input_kind in ("fp8-tensor-dynamic", "fp8-token"):
        # one scale a weight, inputs under one a token: vLLM's experts need one scale a channel, which may all be equal
        fmt = TensorFormat("fp8-dynamic")
    return Assignment(fmt, "", "", rule, keeps_codes=True)


def without_rule(names: Sequence[TensorName], stored: Mapping[str, TensorFormat]) -> dict[str, Assignment]:
    """The assignments of weights that no rule names, such as those of prediction layers, where the source has codes.

    `names` are all weights without a rule, plain ones too. Codes are copied, but those that engines do not run, or not
    beside those of their fused group or of other experts, are dequantized: no rule could do it.
    """
    kept = {name: keep_codes(fmt, NO_RULE) for name, fmt in stored.items() if runs_in_engines(fmt)}
    together = [tuple(f"{module}.weight" for module in group) for group in group_modules(n.module for n in names)]
    experts: dict[str, list[str]] = {}
    for name in names:
        before, found, _ = name.full.partition(".experts.")
        if found:
            experts.setdefault(before, []).append(name.full)
    mixed: set[str] = set()
    for members in (*together, *experts.values()):
        if len({kept[member].format if member in kept else None for member in members}) > 1:
            mixed |= {*members}
    wide = Assignment(None, "", "", NO_RULE)
    return {name: kept[name] if name in kept and name not in mixed else wide for name in stored}


def brings_along(found: Mapping[str, Assignment], layers: Collection[str]) -> bool:
    """Whether one of the weights `layers` follows the effort, so that FP8 weights among them do, too.

    `layers` are those of decoder layers, but routed experts, which have no use for E[x x^T]: they neither follow nor
    bring others along.
    """
    return any(one.follows_effort for name, one in found.items() if name in layers)


def followers(
    found: Mapping[str, Assignment], layers: Collection[str], may: Callable[[Assignment], bool] = lambda _: True
) -> dict[str, Assignment]:
    """The FP8 weights among `layers` that follow the effort because others do: what is measured for these serves them.

    They are fused groups of which all members are rounded to FP8, and `may` follow; `layers` as in `brings_along`.
    """
    if not brings_along(found, layers):
        return {}

    def can(name: str) -> bool:
        one = found[name]
        return one.format is not None and one.format.name == ALONG and not one.keeps_codes and may(one)

    groups = group_modules(name.removesuffix(".weight") for name in found if name in layers)
    whole = [[f"{module}.weight" for module in group] for group in groups]
    return {name: replace(found[name], scale_rule=EFFORT) for group in whole if all(map(can, group)) for name in group}


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


def check_expert_headroom(found: Mapping[str, Assignment], names: Sequence[TensorName], where: str) -> None:
    """UserError for routed experts of one layer under several `input_headroom`.

    Engines take one input scale for gate and up of all of them and one for down.
    """
    first: dict[tuple[int, bool], tuple[str, Assignment]] = {}
    for name in names:
        one = found.get(name.full)
        if name.layer is None or name.expert is None or one is None or not one.calibrated:
            continue
        known, other = first.setdefault((name.layer, name.role == "down"), (name.full, one))
        if other.input_headroom != one.input_headroom:
            raise UserError(
                f"{known} (rules[{other.rule}]) and {name.full} (rules[{one.rule}]) have several `input_headroom`. "
                "Engines take one input scale for all routed experts of a layer.",
                code="recipe-splits-group",
                where=where,
                remedy="Let one rule name all of them: `role: experts`.",
            )


def check_groups(found: Mapping[str, Assignment], where: str) -> None:
    """UserError for a fused group with several formats, scale rules or headrooms: engines run it as one product."""
    modules = {name.removesuffix(".weight"): assignment for name, assignment in found.items()}
    for group in group_modules(modules):
        first = modules[group[0]]
        for member in group[1:]:
            other = modules[member]
            if _shared(first) != _shared(other):
                raise _split(group, member, modules, where)


def _shared(one: Assignment) -> tuple[object, ...]:
    """What all members of a fused group need to have in common."""
    return one.format, one.scale_rule, one.objective, one.input_headroom


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
        "product in vLLM and need one format, one scale rule and one `input_headroom`.",
        code="recipe-splits-group",
        where=where,
        remedy=f"Let one rule name all of: {', '.join(group)}.",
    )


def _source_words(assignment: Assignment) -> str:
    return f"{'keeps' if assignment.keeps_codes else 'would be'} {assignment.label()}"
