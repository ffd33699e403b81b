"""Which tensors of a decoder layer are in memory together: all of them, or its routed experts some at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from snugfit.engines.fused import group_modules
from snugfit.model import experts
from snugfit.model.logical_weights import LogicalWeights
from snugfit.model.skeleton import Skeleton
from snugfit.quantization.plan import Plan

Groups = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Piece:
    """Some experts of a layer: the groups of tensors to read, and single experts' parts of tensors that stay whole."""

    experts: range
    groups: Groups
    parts: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors of the groups."""
        return tuple(name for group in self.groups for name in group)


@dataclass(frozen=True)
class Division:
    """What is read of a unit: groups of tensors at once, then pieces; `whole` are tensors of all experts that stay."""

    groups: Groups
    pieces: tuple[Piece, ...] = ()
    whole: tuple[str, ...] = ()

    @property
    def coming(self) -> list[tuple[str, ...]]:
        """All groups in the order in which they are read."""
        return [*self.groups, *(group for piece in self.pieces for group in piece.groups)]


def groups_of_units(plan: Plan, *, runs: bool) -> list[list[tuple[str, ...]]]:
    """The groups of each unit in the order of the file; `runs`: samples pass the layers."""
    return [groups_of(plan, unit, runs=runs and number > 0) for number, unit in enumerate(plan.units)]


def groups_of(plan: Plan, unit: Sequence[str], *, runs: bool) -> list[tuple[str, ...]]:
    """The tensors of a unit in the order in which they are read: fused groups of quantized weights, then each other.

    Without `runs` (the layer's forward pass is not needed) the rest is only what cannot be copied from file to file.
    """
    assigned = [name for name in unit if (a := plan.assignments.get(name)) and a.format is not None]
    groups = group_modules(name.removesuffix(".weight") for name in assigned)
    found = [tuple(f"{module}.weight" for module in group) for group in groups]
    quantized = set(assigned)
    # biases of single experts are parts of a tensor, and cannot be copied from file to file
    assembled = [name for name in unit if name in plan.weights.origins and name in plan.outputs]
    rest = [name for name in (unit if runs else assembled) if name not in quantized]
    return [*found, *_by_file_tensors(plan.weights, rest)]


def _by_file_tensors(weights: LogicalWeights, names: Sequence[str]) -> list[tuple[str, ...]]:
    """`names` one by one, so that little is in memory at once, but together if they are parts of the same tensor."""
    found: dict[object, list[str]] = {}
    for name in names:
        origin = weights.origins.get(name)
        key = name if origin is None or origin.part is None else (weights.parts(name), origin.part.expert)
        found.setdefault(key, []).append(name)
    return [tuple(group) for group in found.values()]


def divide(
    plan: Plan, skeleton: Skeleton, number: int, groups: Sequence[tuple[str, ...]], size: int | None
) -> Division:
    """Unit `number`, of these groups, with its experts in pieces of `size`; or in one piece, if they are not more.

    A layer that text does not run is in one piece.
    """
    mixture = skeleton.experts.get(number - 1)
    if mixture is None or size is None or number - 1 in skeleton.skipped:
        return Division(tuple(groups))
    total = mixture.count
    if size >= total:
        return Division(tuple(groups))
    prefix = f"{plan.decoder}.{number - 1}."
    expert_of = {prefix + name: expert for (expert, _, _), name in mixture.names.items()}
    stacked = skeleton.stacks.stacked
    whole = tuple(group[0] for group in groups if group[0] in stacked)
    of_experts: list[list[tuple[str, ...]]] = [[] for _ in range(total)]
    parts: list[list[str]] = [[] for _ in range(total)]
    rest = []
    for group in groups:
        if group[0] in expert_of:
            of_experts[expert_of[group[0]]].append(group)
        elif group[0] not in stacked:
            rest.append(group)
    for name in whole:
        for single in stacked[name]:
            parts[expert_of[single]].append(single)
    pieces = tuple(
        Piece(
            some,
            tuple(group for expert in some for group in of_experts[expert]),
            tuple(single for expert in some for single in parts[expert]),
        )
        for some in experts.in_groups(total, size)
    )
    return Division(tuple(rest), pieces, whole)


def read_ahead_bytes(plan: Plan, divisions: Sequence[Division]) -> int:
    """The most bytes that are read of a layer at once: all of it, or what is not in pieces, or a piece."""
    sizes = [0]
    for number, one in enumerate(divisions):
        if not number:
            continue
        if not one.pieces:
            sizes.append(sum(plan.weights.file_bytes(name) for name in plan.units[number]))
            continue
        parts = (one.groups, *(piece.groups for piece in one.pieces))
        sizes += [sum(plan.weights.file_bytes(name) for group in part for name in group) for part in parts]
    return max(sizes)
