"""The groups of weights that a plan gives one format each: what an engine runs as one, or looks up as one. No torch.

Fused partners (query, key and value; gate and up; what latent attention joins) are one group, all routed experts of a
layer are one, every other linear is a group of its own. A weight that no recipe can quantize is in no group.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from snugfit.dialects.targets import alike_in_all_layers
from snugfit.engines.fused import FUSED_GROUPS, group_modules
from snugfit.engines.kernels import HEAD_FORMAT
from snugfit.errors import UserError
from snugfit.formats.spec import EFFORT, FORMATS, INT4_GROUPS, KEEP, PLAIN_RULES, TensorFormat, check_shape
from snugfit.model.layout import ModelLayout
from snugfit.model.names import KEPT_ROLES, ROLE_SETS, TensorName
from snugfit.recipes.assignment import ALONG, Assignment, brings_along, check_inputs, followers, keep_codes, kept_format
from snugfit.recipes.recipe import Rule

EXPERTS, SHARED, HEAD = "experts", "shared_experts", "lm_head"
FOLLOWING = f"{ALONG}/{EFFORT}"  # FP8 whose scales and codes follow the effort, as 4-bit weights beside it do

# fused members -> the last part of the group's name
_JOINED: Mapping[tuple[str, ...], str] = {
    ("q_proj", "k_proj", "v_proj"): "qkv",
    ("gate_proj", "up_proj"): "gate_up",
    ("w1", "w3"): "gate_up",
    ("q_a_proj", "kv_a_proj_with_mqa"): "qkv_a",
    ("in_proj_qkv", "in_proj_z"): "in_proj_qkvz",
    ("in_proj_b", "in_proj_a"): "in_proj_ba",
}
_FUSED_OF = {leaf: members for members in FUSED_GROUPS for leaf in members}
_ROLE_OF_SET = {frozenset({"q", "k", "v"}): "qkv", frozenset({"gate", "up"}): "gate_up"}


@dataclass(frozen=True, kw_only=True)
class Group:
    """Weights that get one format.

    `name` is the module's, such as model.layers.3.self_attn.qkv or model.layers.3.mlp.experts. `layer` is None for the
    output head. `role` is qkv, o, gate_up, down, experts, shared_experts, lm_head, or what the name says of the linear
    (attention, mlp, linear). `weights` are the logical weights by name; `elements` is the number of their parameters.
    `everywhere`: engines can be told one format for all layers alone, whatever a plan would rather give to some.
    """

    name: str
    layer: int | None
    role: str
    weights: tuple[str, ...]
    elements: int
    everywhere: bool = False


def find_groups(layout: ModelLayout) -> tuple[Group, ...]:
    """The groups of a model, layer by layer, the output head last where it is no copy of the embeddings.

    UserError for a model that cannot be quantized.
    """
    layout.check_quantizable()
    fixed = {**layout.unquantized, **layout.not_quantizable}
    found: dict[str, list[TensorName]] = {}
    for name in layout.names.values():
        if name.parameter != "weight" or name.full in fixed or name.full not in layout.weights.tensors:
            continue
        if name.role == HEAD or (name.layer is not None and name.role not in KEPT_ROLES):
            found.setdefault(_owner(name), []).append(name)
    groups: list[Group] = []
    for owner, members in found.items():
        if members[0].routed:
            groups.append(_group(layout, owner, members))
            continue
        by_module = {name.module: name for name in members}
        groups += [_group(layout, _joined(some), [by_module[one] for one in some]) for some in group_modules(by_module)]
    alike = alike_in_all_layers(name.module for members in found.values() for name in members)
    groups = [replace(one, everywhere=True) if one.name in alike else one for one in groups]
    last = layout.num_layers
    return tuple(sorted(groups, key=lambda group: last if group.layer is None else group.layer))


def _owner(name: TensorName) -> str:
    """What collects the weights that may be one group: all routed experts of a layer, else the parent module."""
    if not name.routed:
        return name.module.rpartition(".")[0]
    before, _, _ = name.full.partition(".experts")
    return f"{before}.{EXPERTS}"


def _joined(modules: Sequence[str]) -> str:
    """The name of fused modules."""
    if len(modules) == 1:
        return modules[0]
    parent, _, leaf = modules[0].rpartition(".")
    return f"{parent}.{_JOINED[_FUSED_OF[leaf]]}"


def _group(layout: ModelLayout, name: str, members: Sequence[TensorName]) -> Group:
    return Group(
        name=name,
        layer=members[0].layer,
        role=_role(members),
        weights=tuple(member.full for member in members),
        elements=sum(layout.weights.tensors[member.full].elements for member in members),
    )


def _role(members: Sequence[TensorName]) -> str:
    first = members[0]
    if first.routed:
        return EXPERTS
    if first.shared:
        return SHARED
    roles = frozenset(member.role for member in members)
    joined = next((role for some, role in _ROLE_OF_SET.items() if len(members) > 1 and roles <= some), None)
    return joined or ("attention" if first.role in ROLE_SETS["attention"] - {"o", "qkv"} else first.role)


def assignment_of(layout: ModelLayout, group: Group, fmt: str) -> Mapping[str, Assignment]:
    """What a rule that names exactly this group and the format `fmt` (as recipes write it, or keep) makes of it.

    By the name of each weight. Codes of the source that are in the format already stay, INT4 gets the largest group
    size that divides. FOLLOWING is FP8, and follows the effort where it can. UserError where a shape or an engine does
    not allow the format.
    """
    if fmt == FOLLOWING:
        found = assignment_of(layout, group, ALONG)
        rounded = {name for name, one in found.items() if not one.keeps_codes} if _can_follow(group) else set()
        return {name: replace(one, scale_rule=EFFORT) if name in rounded else one for name, one in found.items()}
    rule = Rule(name=group.name, format=fmt)
    stored = layout.weights.formats
    kept = {name: kept_format(rule, stored.get(name)) for name in group.weights}
    found = {name: keep_codes(own, 0) for name, own in kept.items() if own is not None}
    others = [name for name in group.weights if name not in found]
    if fmt == KEEP:
        return found | dict.fromkeys(others, Assignment(None, "", "", 0))
    if others and group.role == HEAD and fmt != HEAD_FORMAT:
        what = f"{group.name} is the output head, which can only be {HEAD_FORMAT}."
        raise UserError(what, code="recipe-not-quantizable", where=group.name, remedy="Keep it.")
    if len(set(kept.values())) > 1:
        what = f"the source stores the weights of {group.name} in several formats."
        raise UserError(what, code="recipe-splits-group", where=group.name, remedy="Keep them, or requantize them.")
    if not others:
        return found
    shapes = {name: layout.weights.tensors[name].shape for name in others}
    one = TensorFormat(fmt)
    if fmt == "int4":
        fitting = (size for size in INT4_GROUPS if all(shape[-1] % size == 0 for shape in shapes.values()))
        one = TensorFormat(fmt, group_size=next(fitting, INT4_GROUPS[-1]))
    for name, shape in shapes.items():
        check_shape(one, shape, where=name)
    settled = Assignment(one, EFFORT if fmt in PLAIN_RULES else FORMATS[fmt].scale_rules[0], "mse", 0)
    check_inputs(settled, others, group.name)
    return found | dict.fromkeys(others, settled)


def as_written(layout: ModelLayout, groups: Mapping[str, Group], choice: Mapping[str, str]) -> dict[str, str]:
    """A choice of formats by group, with FOLLOWING where `quantize` lets FP8 follow the effort beside these others."""
    found: dict[str, Assignment] = {}
    for name in choice.keys() & groups.keys():
        found |= assignment_of(layout, groups[name], choice[name])
    follow = followers(found, _layers(groups.values()))
    return {
        name: FOLLOWING if name in groups and not follow.keys().isdisjoint(groups[name].weights) else fmt
        for name, fmt in choice.items()
    }


def follows_beside(layout: ModelLayout, groups: Iterable[Group], formats: Iterable[str]) -> bool:
    """Whether FP8 follows the effort in plans of these formats: one of them does so in a group that brings it along."""
    return any(_brings_along(layout, group, fmt) for fmt in formats for group in groups)


def _brings_along(layout: ModelLayout, group: Group, fmt: str) -> bool:
    try:
        return brings_along(assignment_of(layout, group, fmt), _layers([group]))
    except UserError:  # the group cannot have the format
        return False


def _can_follow(group: Group) -> bool:
    return group.layer is not None and group.role != EXPERTS


def _layers(groups: Iterable[Group]) -> frozenset[str]:
    """The weights of decoder layers, but routed experts."""
    return frozenset(name for group in groups if _can_follow(group) for name in group.weights)
