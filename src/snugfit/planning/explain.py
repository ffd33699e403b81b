"""Why a plan gives each group its format, in words and numbers: what more bits would save, and what they would cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from snugfit.byte_counts import size
from snugfit.planning.menu import GroupMenu, Option
from snugfit.planning.search import NOT_SCORED, Mix, Space, choice_for_scores
from snugfit.records.plan import PlannedGroup
from snugfit.records.scores import KEEP, KV_CACHE, Scores, saturate

MB = 10**6


@dataclass(frozen=True)
class _Step:
    """A change of one group's format: bytes and nats, both above 0."""

    option: Option
    bytes: int
    nats: float

    @property
    def rate(self) -> float:
        """Nats a MB."""
        return self.nats / self.bytes * MB


def planned_groups(space: Space, scores: Scores, mix: Mix) -> tuple[PlannedGroup, ...]:
    """Each group of a mix with what its format costs and why it has it, in the order of the groups."""
    cost_of = _Costs(scores, mix)
    ups = {menu.group.name: _best_up(menu, mix.options[menu.group.name], cost_of) for menu in space.menus}
    price = max((step.rate for step in ups.values() if step is not None), default=0.0)
    found = []
    for menu in space.menus:
        name = menu.group.name
        chosen = mix.options[name]
        found.append(
            PlannedGroup(
                name=name,
                layer=menu.group.layer,
                role=menu.group.role,
                elements=menu.group.elements,
                format=chosen.format,
                label=chosen.label,
                arithmetic=chosen.arithmetic,
                bytes=chosen.bytes.file,
                cost=cost_of.of(name, chosen.format),
                why=_why(menu, ups[name], _cheapest_down(menu, chosen, cost_of), price),
                refused=dict(menu.refused),
            )
        )
    return tuple(found)


def cache_reasons(mix: Mix, scores: Scores, reasons: Mapping[str, str]) -> dict[str, str]:
    """What each kind of KV cache costs, or why it is not offered."""

    def cost_of(cache: str) -> str:
        if cache == KEEP:
            return "costs nothing"
        if not scores.has(KV_CACHE, cache):
            return NOT_SCORED
        return f"costs {nats(scores.cost(KV_CACHE, cache, mix.context))} nats"

    return {cache: reason or cost_of(cache) for cache, reason in reasons.items()}


def nats(value: float) -> str:
    """A cost in nats with two digits."""
    return "0" if value == 0 else f"{value:.2g}"


class _Costs:
    """What groups cost in a plan: by how much its expected KL rises by one group's format, all others as they are."""

    def __init__(self, scores: Scores, mix: Mix) -> None:
        self._scores, self._shares = scores, scores.shares(mix.context)
        self._choice = choice_for_scores(scores, mix.options, mix.kv_cache)
        terms = [scores.terms(group, fmt).kl for group, fmt in self._choice.items()]
        self._totals = [math.fsum(column) for column in zip(*terms, strict=True)]

    def of(self, group: str, fmt: str) -> float:
        """The expected KL with the group in the format less that with the group kept; NaN without a score."""
        return self._kl(group, fmt) - self._kl(group, KEEP) if self._scores.has(group, fmt) else math.nan

    def _kl(self, group: str, fmt: str) -> float:
        """The expected KL of the plan with one group in another format."""
        new, old = self._scores.terms(group, fmt).kl, self._scores.terms(group, self._choice[group]).kl
        buckets = zip(self._shares, self._totals, new, old, self._scores.damage, strict=True)
        return math.fsum(
            share * saturate(max(0.0, total + more - less), damage.ceiling)[0]
            for share, total, more, less, damage in buckets
        )


def _best_up(menu: GroupMenu, chosen: Option, costs: _Costs) -> _Step | None:
    """The format with more bytes that saves most nats a byte; None where none saves any."""
    return max(_steps(menu, chosen, costs, sign=1), key=lambda step: step.rate, default=None)


def _cheapest_down(menu: GroupMenu, chosen: Option, costs: _Costs) -> _Step | None:
    """The format with fewer bytes that costs least nats a byte that it saves."""
    return min(_steps(menu, chosen, costs, sign=-1), key=lambda step: step.rate, default=None)


def _steps(menu: GroupMenu, chosen: Option, costs: _Costs, *, sign: int) -> list[_Step]:
    name, found = menu.group.name, []
    for one in menu.options:
        more = sign * (one.bytes.served - chosen.bytes.served)
        saved = sign * (costs.of(name, chosen.format) - costs.of(name, one.format))
        if more > 0 and saved > 0:
            found.append(_Step(one, more, saved))
    return found


def _why(menu: GroupMenu, up: _Step | None, down: _Step | None, price: float) -> str:
    if len(menu.options) == 1:
        reasons = "; ".join(f"{fmt}: {reason}" for fmt, reason in menu.refused.items())
        return f"no other format is possible{f' ({reasons})' if reasons else ''}"
    parts = []
    if up is not None:
        first = up.rate >= price * 0.999
        others = "the first that more bytes would pay for" if first else f"other weights give {nats(price)}"
        rate = f"{nats(up.rate)} a MB, {others}"
        parts.append(f"{up.option.format} would save {nats(up.nats)} nats for {size(up.bytes)} ({rate})")
    else:
        parts.append("no format loses less")
    if down is not None:
        parts.append(f"{down.option.format} would cost {nats(down.nats)} nats for {size(down.bytes)} less")
    return "; ".join(parts)
