"""The mixes of formats that scores expect to lose least under the limits of a budget, or to be smallest under a KL.

A mix's expected KL is a mean over positions of c (1 - exp(-b / c)), where b is a sum over groups (records/scores.py).
That is a concave function of sums, so the sums' linear form at any mix is nowhere below it: minimizing that form, a
knapsack, and repeating at the result never gets worse, and ends after a few rounds: where the form at the result weighs
the buckets as the one before, as it does in one bucket of positions, its solution is the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from snugfit.errors import UserError
from snugfit.planning.caches import kept_layers, scored_cache
from snugfit.planning.decisions import Decision, decisions_of, narrowed
from snugfit.planning.knapsack import CLOSE, EXACT, Problem, Row, solve
from snugfit.planning.menu import Bytes, GroupMenu, Option
from snugfit.records.scores import KEEP, KV_CACHE, Predicted, Scores, saturate

NOT_SCORED = "it was not scored"  # why a group cannot have a format of the menu, or a plan an FP8 cache
NEAR = 1.1  # times the least expected KL: what a simpler mix may lose
SHORTEST_RUN = 2
_ROUNDS = 8
_ALIKE = 1e-4  # by how much, relatively, two forms may weigh options differently that are taken as one


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A limit in bytes on a mix's tensors: of what each GPU holds, engines load, files hold, or files with headers.

    `kind` is gpu, served, file or disk; `name` is the parameter that asks for it.
    """

    name: str
    kind: str
    bytes: int

    def amount(self, size: Bytes) -> int:
        """What counts against the limit."""
        return size.file + size.header if self.kind == "disk" else int(getattr(size, self.kind))


@dataclass(frozen=True, kw_only=True)
class Space:
    """What may be chosen: each group's options, what comes beside the groups, and the limits, by kind of KV cache.

    `outside` and `limits` have one entry for each cache that may be chosen ("keep" for 16 bits or what the source
    declares, "fp8"). `max_formats` counts formats other than keep. With `run_length` so many consecutive layers
    have one format at each place.
    """

    menus: tuple[GroupMenu, ...]
    outside: Mapping[str, Bytes]
    limits: Mapping[str, tuple[Limit, ...]]
    max_formats: int | None = None
    run_length: int | None = None

    @cached_property
    def decisions(self) -> tuple[Decision, ...]:
        """What is decided as one."""
        return decisions_of(self.menus, self.run_length)

    def with_limits(self, limits: Mapping[str, tuple[Limit, ...]]) -> Space:
        """The same under other limits."""
        return replace(self, limits=limits)


@dataclass(frozen=True, kw_only=True)
class Mix:
    """One choice: the option of each group by the group's name, the KV cache, all bytes, and the KL that scores expect.

    `context` is the length for which the KL is expected.
    """

    options: Mapping[str, Option]
    kv_cache: str
    bytes: Bytes
    context: int
    predicted: Predicted

    @property
    def formats(self) -> dict[str, str]:
        """The format of each group that is not kept, and of an FP8 cache, as scores and proofs name them."""
        found = {name: one.format for name, one in self.options.items() if one.format != KEEP}
        return found if self.kv_cache == KEEP else {**found, KV_CACHE: self.kv_cache}

    @property
    def kept_caches(self) -> tuple[int, ...]:
        """The layers that keep 16 bits beside an FP8 cache."""
        return kept_layers(self.kv_cache)


def choice_for_scores(scores: Scores, options: Mapping[str, Option], kv_cache: str) -> dict[str, str]:
    """The formats of all groups and the cache as `Scores.predict` takes them; what is kept counts, too."""
    return {name: one.format for name, one in options.items()} | scored_cache(scores, kv_cache)


def scored(space: Space, scores: Scores) -> Space:
    """The space without options that have no score; UserError where a group has no other, or nothing was scored."""
    menus = []
    for menu in space.menus:
        name = menu.group.name
        options = tuple(one for one in menu.options if scores.has(name, one.format))
        if not options:
            wanted = ", ".join(one.format for one in menu.options)
            what = f"no score of {name} in {wanted}."
            remedy = "Score the model again with these formats, or leave `scores` out."
            raise UserError(what, code="scores-mismatch", where="scores", remedy=remedy)
        refused = dict(menu.refused) | {one.format: NOT_SCORED for one in menu.options if one not in options}
        menus.append(GroupMenu(group=menu.group, options=options, refused=refused))
    offered, left = (
        [one.format for menu in some for one in menu.options if one.format != KEEP] for some in (space.menus, menus)
    )
    if offered and not left:
        what = f"none of the formats on the menu was scored: {', '.join(dict.fromkeys(offered))}."
        raise UserError(what, code="scores-mismatch", where="scores", remedy=f"Scored: {', '.join(scores.formats)}.")
    caches = {cache for cache in space.outside if cache == KEEP or scores.has(KV_CACHE, cache)}
    return Space(
        menus=narrowed(menus, space.run_length, "scores"),
        outside={cache: size for cache, size in space.outside.items() if cache in caches},
        limits={cache: limits for cache, limits in space.limits.items() if cache in caches},
        max_formats=space.max_formats,
        run_length=space.run_length,
    )


def least_kl(
    space: Space, scores: Scores, context: int, *, count: int = 1, distance: int = 1, gap: float = EXACT
) -> list[Mix]:
    """The mixes within the limits of which scores expect the least KL, best first; empty where none is.

    Up to `count`, each different from those before it in `distance` decisions, or in the cache. The first one's
    expected costs are at most `gap` above the least, relatively; those of the others may be `CLOSE` above it.
    """
    lines = [_Line(_Task(space, scores, context, cache), gap) for cache in space.limits]
    best: list[Mix] = []
    for _ in range(count):  # behind a mix that is none of the best its cache has none that is
        for line in lines:
            if not line.ended and (not line.mixes or any(line.mixes[-1] is mix for mix in best)):
                line.extend(distance)
        best = sorted((mix for line in lines for mix in line.mixes), key=_rank)[:count]
    return best


def least_bytes(space: Space, scores: Scores, context: int, max_kl: float, kind: str = "file") -> Mix | None:
    """The smallest mix within the limits of which scores expect at most `max_kl`; None where there is none.

    `kind` says which bytes are to be least, as in `Limit`.
    """
    found = [
        mix
        for cache in space.limits
        if (mix := _Task(space, scores, context, cache).least_bytes(max_kl, kind)) is not None
    ]
    limit = Limit(name="", kind=kind, bytes=0)
    return min(found, key=lambda mix: (limit.amount(mix.bytes), mix.predicted.kl), default=None)


def simplest_near(space: Space, scores: Scores, best: Mix) -> tuple[int, Mix] | None:
    """The longest runs of layers with one format at each place that are expected to lose little more than `best`.

    Their length, and their best mix; runs of two layers where all of them lose more. None where there are no runs.
    """
    layers = 1 + max((menu.group.layer for menu in space.menus if menu.group.layer is not None), default=0)
    length = layers
    while space.run_length is None and length > 1:
        found = _in_runs(space, scores, best.context, length)
        near = found is not None and found.predicted.kl <= NEAR * best.predicted.kl
        if found is not None and (near or length == SHORTEST_RUN):
            return (length, found) if found.formats != best.formats else None
        length = max(SHORTEST_RUN, -(-length // 2)) if length > SHORTEST_RUN else 1
    return None


def _in_runs(space: Space, scores: Scores, context: int, length: int) -> Mix | None:
    """The best mix in runs of so many layers; None where constraints or limits leave none."""
    try:
        runs = replace(space, menus=narrowed(space.menus, length, ""), run_length=length)
    except UserError:
        return None
    return next(iter(least_kl(runs, scores, context)), None)


def least_amount(space: Space, limit: Limit, cache: str, beside: Sequence[Limit] = ()) -> int | None:
    """What the smallest mix counts against one limit that keeps the constraints and the limits `beside`.

    None where no mix keeps these. Where there are any, smaller mixes may exist by what the solver neglects.
    """
    amounts, outside = _amounts(space, limit), limit.amount(space.outside[cache])
    if space.max_formats is None and not beside:
        return outside + sum(map(min, amounts))
    largest = max(1, *(max(group) for group in amounts))
    costs = tuple(tuple(amount / largest for amount in group) for group in amounts)
    places = solve(problem_of(space.with_limits({cache: tuple(beside)}), cache, costs))
    return None if places is None else outside + sum(group[place] for group, place in zip(amounts, places, strict=True))


def any_mix(space: Space, cache: str) -> bool:
    """Whether some mix keeps all limits and constraints together, whatever it loses."""
    free = tuple((0.0,) * len(one.formats) for one in space.decisions)
    return solve(problem_of(space, cache, free)) is not None


def make_mix(options: Mapping[str, Option], cache: str, outside: Bytes, scores: Scores | None, context: int) -> Mix:
    """A mix with its bytes and what scores expect of it; NaN where they lack one of its formats."""
    size = outside
    for one in options.values():
        size += one.bytes
    expected = Predicted(math.nan, math.nan)
    if scores is not None and all(scores.has(name, one.format) for name, one in options.items()):
        expected = scores.predict(choice_for_scores(scores, options, cache), context)
    return Mix(options=options, kv_cache=cache, bytes=size, context=context, predicted=expected)


def within(mix: Mix, limits: Sequence[Limit]) -> bool:
    """Whether a mix keeps all limits."""
    return all(limit.amount(mix.bytes) <= limit.bytes for limit in limits)


def _alike(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether both lists of weights have nearly the same ratios, so that what is least under one is under both."""
    ratios = [there / here for here, there in zip(first, second, strict=True) if here]
    return not ratios or max(ratios) <= (1 + _ALIKE) * min(ratios)


def _rank(mix: Mix) -> tuple[float, int]:
    return mix.predicted.kl, mix.bytes.file


def problem_of(space: Space, cache: str, costs: tuple[tuple[float, ...], ...]) -> Problem:
    """The knapsack of a space with one kind of KV cache, in which each format of each decision costs so much."""
    outside = space.outside[cache]
    rows = tuple(
        Row(amounts=_amounts(space, limit), limit=limit.bytes - limit.amount(outside)) for limit in space.limits[cache]
    )
    labels = tuple(one.formats for one in space.decisions)
    return Problem(costs=costs, rows=rows, labels=labels, max_labels=space.max_formats, free=KEEP)


def frontier_limits(space: Space, cache: str, count: int) -> Iterator[Limit]:
    """`count` limits from the smallest size possible to the largest that costs anything, whatever the budget."""
    measure = Limit(name="", kind="file", bytes=0)
    low = least_amount(space, measure, cache) or 0  # of a mix that was found there is one
    high = space.outside[cache].file + sum(max(one.bytes.file for one in menu.options) for menu in space.menus)
    for step in range(count):
        yield replace(measure, bytes=low + (high - low) * step // count)


def far_apart(space: Space) -> int:
    """In how many decisions mixes that are offered beside each other differ at least."""
    return max(1, len(space.decisions) // 12)


def _amounts(space: Space, limit: Limit) -> tuple[tuple[int, ...], ...]:
    """What each format of each decision counts against a limit."""
    return tuple(tuple(limit.amount(one.sizes[fmt]) for fmt in one.formats) for one in space.decisions)


def _terms(scores: Scores, decision: Decision, fmt: str) -> tuple[float, ...]:
    """What a decision's groups add in a format, by bucket."""
    terms = [scores.terms(menu.group.name, fmt).kl for menu in decision.menus]
    return tuple(map(math.fsum, zip(*terms, strict=True)))


class _Line:
    """The mixes with one kind of KV cache that have been found so far, best first."""

    def __init__(self, task: _Task, gap: float) -> None:
        self._task, self._gap = task, gap
        self._places: list[tuple[int, ...]] = []
        self.mixes: list[Mix] = []
        self.ended = False

    def extend(self, distance: int) -> None:
        """Find the next one, which differs from all before it in `distance` decisions, if there is one."""
        places = self._task.least_kl(self._places, distance, max(self._gap, CLOSE) if self._places else self._gap)
        if places is None:
            self.ended = True
            return
        self._places.append(places)
        self.mixes.append(self._task.mix(places))


class _Task:
    """The search with one kind of KV cache."""

    def __init__(self, space: Space, scores: Scores, context: int, cache: str) -> None:
        self._space, self._scores, self._context, self._cache = space, scores, context, cache
        self._shares = scores.shares(context)
        self._costs = [[_terms(scores, one, fmt) for fmt in one.formats] for one in space.decisions]
        held = [scores.terms(*pair).kl for pair in scored_cache(scores, cache).items()]
        self._fixed = tuple(map(math.fsum, zip(*held, strict=True))) if held else (0.0,) * len(self._shares)

    def least_kl(self, before: Sequence[tuple[int, ...]], distance: int, gap: float) -> tuple[int, ...] | None:
        """The options' places of the mix of least KL that differs enough from those `before`."""
        if before and distance > len(self._costs):
            return None
        best: tuple[int, ...] | None = None
        weights = self._slopes(None)
        for _ in range(_ROUNDS):
            places = solve(replace(self._problem(self._linear(weights), before, distance), gap=gap))
            if places is None or (best is not None and self._kl(places) >= self._kl(best) * (1 - 1e-9)):
                break
            best, last, weights = places, weights, self._slopes(places)
            if _alike(last, weights):
                break
        return best

    def least_bytes(self, max_kl: float, kind: str) -> Mix | None:
        """The smallest mix of which scores expect at most `max_kl`."""
        limit = Limit(name="", kind=kind, bytes=0)
        amounts = _amounts(self._space, limit)
        largest = max(1, *(max(group) for group in amounts))
        costs = tuple(tuple(amount / largest for amount in group) for group in amounts)
        best: Mix | None = None
        # anything that costs: the direction of the first tangent
        at = [
            max(1e-9, sum(max(t[bucket] for t in group) for group in self._costs))
            for bucket in range(len(self._shares))
        ]
        for _ in range(_ROUNDS):
            weights, most = self._tangent(at, max_kl)
            bound = self._linear(weights), most * (1 + 1e-9)
            places = solve(replace(self._problem(costs, (), 1), bound=bound))
            if places is None or self._kl(places) > max_kl * (1 + 1e-5):
                break
            found = self.mix(places)
            if best is not None and limit.amount(found.bytes) >= limit.amount(best.bytes):
                break
            best, at = found, self._totals(places)
            if len(self._shares) == 1:
                break
        return best

    def mix(self, places: Sequence[int]) -> Mix:
        """The mix with the options at these places."""
        chosen: dict[str, Option] = {}
        for decision, place in zip(self._space.decisions, places, strict=True):
            chosen |= decision.options(decision.formats[place])
        options = {menu.group.name: chosen[menu.group.name] for menu in self._space.menus}
        return make_mix(options, self._cache, self._space.outside[self._cache], self._scores, self._context)

    def _problem(
        self, costs: tuple[tuple[float, ...], ...], before: Sequence[tuple[int, ...]], distance: int
    ) -> Problem:
        return replace(problem_of(self._space, self._cache, costs), others=tuple(before), distance=distance)

    def _linear(self, weights: Sequence[float]) -> tuple[tuple[float, ...], ...]:
        """Each option's cost in the linear form with these weights of buckets."""
        return tuple(
            tuple(math.fsum(w * kl for w, kl in zip(weights, terms, strict=True)) for terms in group)
            for group in self._costs
        )

    def _totals(self, places: Sequence[int]) -> list[float]:
        """The sums b of a mix by bucket."""
        chosen = [group[place] for group, place in zip(self._costs, places, strict=True)]
        return [math.fsum((fixed, *column)) for fixed, *column in zip(self._fixed, *chosen, strict=True)]

    def _kl(self, places: Sequence[int]) -> float:
        return self._kl_of(self._totals(places))

    def _kl_of(self, totals: Sequence[float]) -> float:
        ceilings = [damage.ceiling for damage in self._scores.damage]
        values = [saturate(total, c)[0] for total, c in zip(totals, ceilings, strict=True)]
        return math.fsum(share * value for share, value in zip(self._shares, values, strict=True))

    def _slopes(self, at: Sequence[int] | None) -> list[float]:
        """By how much the KL grows with each bucket's sum at a mix; None: at no damage."""
        return list(self._shares) if at is None else self._slopes_at(self._totals(at))

    def _slopes_at(self, totals: Sequence[float]) -> list[float]:
        ceilings = [damage.ceiling for damage in self._scores.damage]
        slopes = [saturate(total, c)[1] for total, c in zip(totals, ceilings, strict=True)]
        return [share * slope for share, slope in zip(self._shares, slopes, strict=True)]

    def _tangent(self, direction: Sequence[float], max_kl: float) -> tuple[list[float], float]:
        """A linear bound on the sums, weights and limit, under which the KL is at most `max_kl`.

        It touches the surface of sums with that KL where the direction meets it. What the cache costs is subtracted.
        """
        low, high = 0.0, 1.0
        while self._kl_of([high * part for part in direction]) < max_kl and high < 1e12:
            high *= 2
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if self._kl_of([middle * part for part in direction]) < max_kl else (low, middle)
        point = [low * part for part in direction]
        weights = self._slopes_at(point)
        left = [there - fixed for there, fixed in zip(point, self._fixed, strict=True)]
        return weights, math.fsum(w * part for w, part in zip(weights, left, strict=True))
