"""What a plan decides as one: each group for itself, or one place in a run of layers or in all of them. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from snugfit.errors import UserError
from snugfit.planning.groups import Group
from snugfit.planning.menu import Bytes, GroupMenu, Option
from snugfit.records.plan import layer_runs


@dataclass(frozen=True)
class Decision:
    """Groups that get one format: the menu of each, in the order of their layers."""

    menus: tuple[GroupMenu, ...]

    @cached_property
    def formats(self) -> tuple[str, ...]:
        """The formats that all of the groups can have."""
        first, *others = ({one.format for one in menu.options} for menu in self.menus)
        common = first.intersection(*others)
        return tuple(one.format for one in self.menus[0].options if one.format in common)

    def options(self, fmt: str) -> dict[str, Option]:
        """What each group has in a format, by the group's name."""
        return {menu.group.name: menu.option(fmt) for menu in self.menus}

    @cached_property
    def sizes(self) -> dict[str, Bytes]:
        """Bytes of all groups by format."""
        return {fmt: sum((one.bytes for one in self.options(fmt).values()), Bytes()) for fmt in self.formats}

    @property
    def layers(self) -> str:
        """The layers of the groups, such as "0..3"; "" of a group outside the layers."""
        return layer_runs([menu.group.layer for menu in self.menus if menu.group.layer is not None])


def decisions_of(menus: Sequence[GroupMenu], run_length: int | None) -> tuple[Decision, ...]:
    """The groups at one place in each run of `run_length` layers, counted from the first layer; None: each alone.

    Groups that need one format in all layers are decided as one in any case.
    """
    found: dict[object, list[GroupMenu]] = {}
    for menu in menus:
        found.setdefault(_decided_with(menu.group, run_length), []).append(menu)
    return tuple(Decision(tuple(some)) for some in found.values())


def _decided_with(group: Group, run_length: int | None) -> object:
    """What groups that are decided as one have in common."""
    if group.layer is None:
        return group.name
    if group.everywhere:
        return _place(group)
    return group.name if run_length is None else (_place(group), group.layer // run_length)


def narrowed(menus: Sequence[GroupMenu], run_length: int | None, where: str) -> tuple[GroupMenu, ...]:
    """The menus without formats that another group of the same run cannot have; UserError where none is left."""
    left: dict[str, GroupMenu] = {}
    for decision in decisions_of(menus, run_length):
        if not decision.formats:
            offered = "; ".join(f"{m.group.name}: {', '.join(o.format for o in m.options)}" for m in decision.menus)
            runs = run_length is not None and not decision.menus[0].group.everywhere
            at_once = "engines look these weights up for all layers at once, which leaves"
            why = "`run_length` leaves" if runs else at_once
            what = f"{why} no format to layers {decision.layers}, which have none in common ({offered})."
            remedy = f"{'Shorten the runs, or allow' if runs else 'Allow'} more formats."
            raise UserError(what, code="plan-impossible", where=where, remedy=remedy)
        for menu in decision.menus:
            gone = [one.format for one in menu.options if one.format not in decision.formats]
            refused = {fmt: f"layers {decision.layers} have one format: {_why_not(decision, fmt)}" for fmt in gone}
            kept = tuple(one for one in menu.options if one.format in decision.formats)
            left[menu.group.name] = replace(menu, options=kept, refused={**menu.refused, **refused})
    return tuple(left[menu.group.name] for menu in menus)


def _place(group: Group) -> str:
    """Where a group is in its layer, the same in every layer."""
    before, _, after = group.name.partition(f".{group.layer}.")
    return f"{before}.*.{after}"


def _why_not(decision: Decision, fmt: str) -> str:
    other = next(menu for menu in decision.menus if all(one.format != fmt for one in menu.options))
    reason = other.refused.get(fmt, "")
    return f"{other.group.name} cannot have it{f' ({reason})' if reason else ''}"
