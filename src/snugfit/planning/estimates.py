"""Figures by bucket of positions, out of sums over the scored tokens of each row, and how far they may be off.

Plans are measured on some of the rows alone. How their KL differs from row to row, gradients say of all rows: so the
mean over all rows is the measured one times what gradients expect of all rows over what they expect of the measured
ones (a ratio estimate: Cochran, Sampling Techniques, 3rd edition, chapters 6 and 12).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import fsum, hypot, sqrt

from snugfit.planning.gradients import Sums
from snugfit.planning.samples import Samples
from snugfit.records.scores import KV_CACHE, Cost, cache_of_layer

Key = tuple[str, str]  # a group's name and a format


def costs_of(sums: Mapping[Key, Sums], samples: Samples) -> dict[str, dict[str, Cost]]:
    """Costs by group and format: the mean over the scored tokens of each bucket, and its error."""
    found: dict[str, dict[str, Cost]] = {}
    for (name, fmt), one in sums.items():
        found.setdefault(name, {})[fmt] = by_bucket(one.costs, samples)
    return found


def by_bucket(values: Sequence[float], samples: Samples) -> Cost:
    """Means over the tokens of each bucket of sums over rows, and their standard errors by the rows' differences."""
    return _of_buckets([_mean(values, samples, _rows_of(samples, bucket)) for bucket in range(len(samples.edges))])


def expected_of(choice: Mapping[str, str], sums: Mapping[Key, Sums], samples: Samples) -> list[float]:
    """What gradients expect a plan to cost on each row, in nats; 0 where they know nothing of its groups."""
    caches = [key for key in sums if key[0].startswith(cache_of_layer(""))]
    keys = [key for name, fmt in choice.items() for key in (caches if name == KV_CACHE else [(name, fmt)])]
    known = [sums[key].costs for key in keys if key in sums]
    return [fsum(costs[row] for costs in known) for row in range(len(samples.rows))]


def scaled(measured: Mapping[int, float], expected: Sequence[float], samples: Samples) -> Cost:
    """The mean by bucket over all rows, out of sums over the rows that were `measured`, by their places.

    `expected` are sums of all rows, to which the measured ones are taken to be in proportion; without any the mean is
    that of the measured rows.
    """
    return _of_buckets([_scaled(measured, expected, samples, bucket) for bucket in range(len(samples.edges))])


def _scaled(
    measured: Mapping[int, float], expected: Sequence[float], samples: Samples, bucket: int
) -> tuple[float, float]:
    every = _rows_of(samples, bucket)
    some = [place for place in every if place in measured]
    guessed = fsum(expected[place] for place in some)
    if guessed <= 0:
        return _mean(measured, samples, some)
    ratio = fsum(measured[place] for place in some) / guessed
    mean, error = _mean(expected, samples, every)
    left = fsum((measured[place] - ratio * expected[place]) ** 2 for place in some)
    counted = sum(samples.rows[place].count for place in some)
    of_ratio = sqrt(left * len(some) / max(1, len(some) - 1)) / counted
    return ratio * mean, hypot(of_ratio, ratio * error)


def _rows_of(samples: Samples, bucket: int) -> list[int]:
    return [place for place, number in enumerate(samples.buckets) if number == bucket]


def _mean(
    values: Mapping[int, float] | Sequence[float], samples: Samples, places: Sequence[int]
) -> tuple[float, float]:
    """The mean over the scored tokens of rows, and its standard error."""
    counts = {place: samples.rows[place].count for place in places}
    total = sum(counts.values())
    mean = fsum(values[place] for place in places) / total
    spread = fsum((values[place] - mean * counts[place]) ** 2 for place in places)
    return mean, sqrt(spread * len(places) / max(1, len(places) - 1)) / total


def _of_buckets(found: Sequence[tuple[float, float]]) -> Cost:
    return Cost(*(tuple(values) for values in zip(*found, strict=True)))
