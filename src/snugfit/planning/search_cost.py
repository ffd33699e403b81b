"""What the search of a plan takes, before there are scores: knapsacks of this model's groups are solved and timed.

Their costs are made up: a weight's falls with each bit, times a random factor for each group, and for each format of
it, all as scores of a trained model have it. How long a solver takes depends on the numbers, so this says about how
long.
"""

from __future__ import annotations

import random
from dataclasses import replace
from importlib import import_module

from snugfit.formats.spec import KEEP
from snugfit.machine import pick_device, timed
from snugfit.planning.caches import FP8
from snugfit.planning.knapsack import CLOSE, Problem, solve
from snugfit.planning.outcome import FRONTIER_POINTS
from snugfit.planning.search import Space, far_apart, frontier_limits, problem_of
from snugfit.planning.space import Choices

TRIED_CONTEXTS = 12  # for the longest one, about
# of scores of rotated SmolLM2: logarithms of costs of groups of one size, those of formats in a group, both standard
# deviations, and by how much they fall with a bit
_SPREAD, _SPREAD_OF_FORMAT, _FALL = 0.8, 0.25, 0.8
_SIXTEEN = 16

Costs = tuple[tuple[float, ...], ...]


def seconds_of_search(choices: Choices, alternatives: int) -> float:
    """Seconds for the mixes of a plan with so many alternatives, and for the curve in its record."""
    longest = choices.place.budget.longest
    space = choices.at(1) if longest else choices.space
    costs = _costs(space)
    cache = KEEP if KEEP in space.limits else next(iter(space.limits))
    first, further = _of_mixes(space, cache, costs, 1 + alternatives)
    kinds = _kinds(choices)
    found = (TRIED_CONTEXTS if longest else 1) * kinds * first + min(kinds, 1 + alternatives) * further
    return found + _of_points(space, cache, costs)


def _kinds(choices: Choices) -> int:
    """How many kinds of KV cache are searched, with those that keep 16 bits in some layers."""
    kinds, layers = len(choices.space.limits), choices.layout.num_layers
    if FP8 in choices.space.limits and not choices.why_not_mixed():
        kinds += max(0, layers.bit_length() - 1)
    return kinds


def _costs(space: Space) -> Costs:
    """What each format of each decision costs."""
    generator = random.Random(0)  # noqa: S311  # not for secrets
    found = []
    for one in space.decisions:
        elements, factor = sum(menu.group.elements for menu in one.menus), generator.lognormvariate(0.0, _SPREAD)
        bits = [8 * one.sizes[fmt].file / max(1, elements) for fmt in one.formats]
        found.append(
            tuple(
                0.0
                if fmt == KEEP
                else factor * generator.lognormvariate(-_FALL * min(_SIXTEEN, size), _SPREAD_OF_FORMAT) * elements
                for fmt, size in zip(one.formats, bits, strict=True)
            )
        )
    return tuple(found)


def _of_mixes(space: Space, cache: str, costs: Costs, count: int) -> tuple[float, float]:
    """Seconds for the best mix, and for those after it up to `count`."""
    problem = replace(problem_of(space, cache, costs), distance=far_apart(space))
    seconds, found = list[float](), list[tuple[int, ...]]()
    import_module("scipy.optimize")  # outside of what is timed
    while len(seconds) < count:
        taken, places = _solve(replace(problem, others=tuple(found), gap=CLOSE) if found else problem)
        seconds.append(taken)
        if places is None or problem.distance > len(places):
            break
        found.append(places)
    return seconds[0], sum(seconds[1:])


def _of_points(space: Space, cache: str, costs: Costs) -> float:
    """Seconds for the points of the curve, of which the last ones take longest."""
    limits = frontier_limits(space, cache, FRONTIER_POINTS)
    problems = [problem_of(space.with_limits({cache: (limit,)}), cache, costs) for limit in limits]
    return sum(_solve(replace(problem, gap=CLOSE))[0] for problem in problems)


def _solve(problem: Problem) -> tuple[float, tuple[int, ...] | None]:
    """Seconds, and the solution."""
    found: list[tuple[int, ...] | None] = []
    taken = timed(lambda: found.append(solve(problem)), pick_device("cpu")).wall
    return taken, found[0]
