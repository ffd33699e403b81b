"""The mixes that a budget asks for: of least KL under its limits, smallest under a KL, or for the longest context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from decimal import ROUND_CEILING, Context, Decimal

from snugfit.errors import UserError
from snugfit.planning.search import Limit, Mix, Space, far_apart, least_bytes, least_kl, scored
from snugfit.planning.space import Choices
from snugfit.records.scores import Scores

_SEARCHED_CONTEXTS = 24  # that are tried for the longest one


def scored_choices(choices: Choices, scores: Scores) -> Choices:
    """The choices that scores know the cost of, with the kinds of KV cache that only they tell apart.

    UserError where nothing on the menu was scored.
    """
    space = scored(choices.space, scores)
    return replace(choices, space=space).with_mixed_caches(scores, choices.place.budget.context or scores.edges[-1])


def search(choices: Choices, scores: Scores, count: int) -> tuple[int, list[Mix], Space]:
    """The context, the best mixes for it, and the space under the limits that controls have to keep, too.

    UserError where no mix keeps the budget, and where the model as it is does it best.
    """
    context, found, space = _search(choices, scores, count)
    if not found[0].formats:
        what = "the best mix is the model as it is: nothing has to be quantized."
        raise UserError(what, code="recipe-changes-nothing", where="max_kl", remedy="Ask for less, or allow more KL.")
    return context, [mix for mix in found if mix.formats], space


def _search(choices: Choices, scores: Scores, count: int) -> tuple[int, list[Mix], Space]:
    budget, space = choices.place.budget, choices.space
    distance = far_apart(space)
    if budget.longest:  # of the mixes at that context the one of least KL
        context = _longest(choices, scores)
        space = choices.at(context)
        return context, least_kl(space, scores, context, count=count, distance=distance), space
    context = budget.context or scores.edges[-1]
    if budget.max_kl is None:
        found = least_kl(space, scores, context, count=count, distance=distance)
        if not found:
            raise choices.impossible(space)
        return context, found, space
    smallest = least_bytes(space, scores, context, budget.max_kl)
    if smallest is None:
        raise _too_lossy(least_kl(space, scores, context), choices)
    # others of as many bytes, and controls, have to fit what the smallest takes
    as_small = {
        cache: (*limits, Limit(name="max_kl", kind="file", bytes=smallest.bytes.file))
        for cache, limits in space.limits.items()
    }
    narrow = space.with_limits(as_small)
    others = least_kl(narrow, scores, context, count=count, distance=distance)
    return context, [smallest, *(mix for mix in others if mix.formats != smallest.formats)][:count], narrow


def _longest(choices: Choices, scores: Scores) -> int:
    """The longest context for which some mix is expected to lose at most `max_kl`; UserError where there is none.

    KL need not grow with the context: halves of the longest are tried first, then what lies between.
    """
    budget, served = choices.place.budget, choices.place.served
    assert served is not None
    assert budget.max_kl is not None

    def works(context: int) -> bool:
        found = least_kl(choices.at(context), scores, context)
        return bool(found) and found[0].predicted.kl <= (budget.max_kl or 0.0)

    high = served.max_positions
    if works(high):
        return high
    low = high // 2
    while low >= 1 and not works(low):
        high, low = low, low // 2
    if low < 1:
        raise _too_lossy(least_kl(choices.at(1), scores, 1), choices)
    for _ in range(_SEARCHED_CONTEXTS):
        middle = (low + high) // 2
        if middle in (low, high) or high - low <= max(1, low // 512):
            break
        low, high = (middle, high) if works(middle) else (low, middle)
    return low


def _too_lossy(found: Sequence[Mix], choices: Choices) -> UserError:
    """Why no mix has at most the KL that was asked for."""
    if not found:
        return choices.impossible()
    least = found[0].predicted.kl
    what = f"every mix that fits is expected to lose more than {choices.place.budget.max_kl:g} nats a token."
    works = Decimal(least * 1.001).normalize(Context(prec=3, rounding=ROUND_CEILING))
    remedy = f"The least that works is `max_kl={float(works):g}`."
    return UserError(what, code="plan-impossible", where="max_kl", remedy=remedy)
