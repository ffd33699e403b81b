"""Why a plan gives each group its format, in words and numbers: what more bits would save, and what they would cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from snugfit.byte_counts import size
from snugfit.planning.caches import FP8, scored_cache
from snugfit.planning.decisions import Decision
from snugfit.planning.menu import GroupMenu
from snugfit.planning.search import NOT_SCORED, Mix, Space, choice_for_scores
from snugfit.records.plan import PlannedGroup, layer_runs
from snugfit.records.scores import KEEP, KV_CACHE, Scores, saturate

MB = 10**6


@dataclass(frozen=True)
class _Step:
    """A change of the format of what is decided as one: bytes and nats, both above 0."""

    format: str
    bytes: int
    nats: float

    @property
    def rate(self) -> float:
        """Nats a MB."""
        return self.nats / self.bytes * MB


def planned_groups(space: Space, scores: Scores, mix: Mix) -> tuple[PlannedGroup, ...]:
    """Each group of a mix with what its format costs and why it has it, in the order of the groups."""
    cost_of = _Costs(scores, mix)
    ups = [_best_up(one, mix, cost_of) for one in space.decisions]
    price = max((step.rate for step in ups if step is not None), default=0.0)
    reasons: dict[str, str] = {}
    for one, up in zip(space.decisions, ups, strict=True):
        down = _cheapest_down(one, mix, cost_of)
        reasons |= {menu.group.name: _why(one, menu, up, down, price) for menu in one.menus}
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
                why=reasons[name],
                refused=dict(menu.refused),
            )
        )
    return tuple(found)


def cache_reasons(mix: Mix, scores: Scores, reasons: Mapping[str, str]) -> dict[str, str]:
    """What each kind of KV cache costs, FP8 also with the layers that this mix keeps; or why one is not offered."""

    def cost_of(cache: str) -> str:
        if cache == KEEP:
            return "costs nothing"
        if not scores.has(KV_CACHE, cache):
            return NOT_SCORED
        return f"costs {nats(scores.cost(KV_CACHE, cache, mix.context))} nats"

    found = {cache: reason or cost_of(cache) for cache, reason in reasons.items()}
    if mix.kept_caches:
        cost = math.fsum(
            scores.cost(name, fmt, mix.context) for name, fmt in scored_cache(scores, mix.kv_cache).items()
        )
        found[FP8] += f"; with layers {layer_runs(mix.kept_caches)} in 16 bits {nats(cost)} nats"
    return found


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
        return self.change({group: KEEP}, {group: fmt})

    def change(self, old: Mapping[str, str], new: Mapping[str, str]) -> float:
        """By how much the expected KL is higher with groups in `new` than in `old` formats; NaN without a score."""
        if not all(self._scores.has(group, fmt) for some in (old, new) for group, fmt in some.items()):
            return math.nan
        return self._kl(new) - self._kl(old)

    def _kl(self, formats: Mapping[str, str]) -> float:
        """The expected KL of the plan with some groups in other formats."""
        totals = list(self._totals)
        for group, fmt in formats.items():
            new, old = self._scores.terms(group, fmt).kl, self._scores.terms(group, self._choice[group]).kl
            totals = [total + more - less for total, more, less in zip(totals, new, old, strict=True)]
        buckets = zip(self._shares, totals, self._scores.damage, strict=True)
        return math.fsum(share * saturate(max(0.0, total), damage.ceiling)[0] for share, total, damage in buckets)


def _best_up(decision: Decision, mix: Mix, costs: _Costs) -> _Step | None:
    """The format with more bytes that saves most nats a byte; None where none saves any."""
    return max(_steps(decision, mix, costs, sign=1), key=lambda step: step.rate, default=None)


def _cheapest_down(decision: Decision, mix: Mix, costs: _Costs) -> _Step | None:
    """The format with fewer bytes that costs least nats a byte that it saves."""
    return min(_steps(decision, mix, costs, sign=-1), key=lambda step: step.rate, default=None)


def _steps(decision: Decision, mix: Mix, costs: _Costs, *, sign: int) -> list[_Step]:
    now = {menu.group.name: mix.options[menu.group.name] for menu in decision.menus}
    held = sum(one.bytes.served for one in now.values())
    found = []
    for fmt in decision.formats:
        new = dict.fromkeys(now, fmt)
        more = sign * (decision.sizes[fmt].served - held)
        saved = sign * costs.change(new, {name: one.format for name, one in now.items()})
        if more > 0 and saved > 0:
            found.append(_Step(fmt, more, saved))
    return found


def _why(decision: Decision, menu: GroupMenu, up: _Step | None, down: _Step | None, price: float) -> str:
    if len(menu.options) == 1:
        reasons = "; ".join(f"{fmt}: {reason}" for fmt, reason in menu.refused.items())
        return f"no other format is possible{f' ({reasons})' if reasons else ''}"
    parts = []
    if up is not None:
        first = up.rate >= price * 0.999
        others = "the first that more bytes would pay for" if first else f"other weights give {nats(price)}"
        rate = f"{nats(up.rate)} a MB, {others}"
        parts.append(f"{up.format} would save {nats(up.nats)} nats for {size(up.bytes)} ({rate})")
    else:
        parts.append("no format loses less")
    if down is not None:
        parts.append(f"{down.format} would cost {nats(down.nats)} nats for {size(down.bytes)} less")
    together = f"layers {decision.layers} together: " if len(decision.menus) > 1 else ""
    return f"{together}{'; '.join(parts)}"
