"""The multiple choice knapsack: one option of each group, limits on sums, least cost. Solved by HiGHS (scipy's milp).

Deterministic: the same problem has the same solution. Of options that cost the same, those with less of the first
limit's sum win, then those that come first.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

EXACT = 1e-6  # relative, below what any score knows
CLOSE = 2e-3  # relative, a fraction of what scores are off; it takes a third of the time
_NODES = 50_000
_TIE = 1e-6  # of the largest cost: what all of the first limit's sum adds, so that equal costs are decided by it


@dataclass(frozen=True, kw_only=True)
class Row:
    """A sum that may not exceed `limit`: whole numbers, one list of options for each group."""

    amounts: tuple[tuple[int, ...], ...]
    limit: int


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One option of each group is to be chosen, by its place in the group's list.

    `costs` are what is to be least, `rows` what is limited, `labels` name the options: at most `max_labels` different
    ones that are not `free` may be used. `bound` limits a second sum of real costs. `others` are choices from which
    the solution has to differ in at least `distance` groups. Its cost may be `gap` above the least, relatively.
    """

    costs: tuple[tuple[float, ...], ...]
    rows: tuple[Row, ...]
    labels: tuple[tuple[str, ...], ...] = ()
    max_labels: int | None = None
    free: str = ""
    bound: tuple[tuple[tuple[float, ...], ...], float] | None = None
    others: tuple[tuple[int, ...], ...] = ()
    distance: int = 1
    gap: float = EXACT


def solve(problem: Problem) -> tuple[int, ...] | None:
    """The choice of least cost, an option's place for each group; None where no choice keeps the limits."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    lengths = [len(options) for options in problem.costs]
    found = _Constraints(problem, lengths)
    if not found.possible:
        return None
    with _quiet():
        result = milp(
            _objective(problem, found.size),
            constraints=LinearConstraint(np.array(found.rows), found.low, found.high),
            integrality=np.ones(found.size),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": problem.gap, "node_limit": _NODES},
        )
    if result.x is None:
        return None
    return tuple(int(np.argmax(result.x[start:stop])) for start, stop in pairwise((0, *accumulate(lengths))))


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on the process's stdout: HiGHS writes remarks there from C++, among them some that no option stops."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # there is no stdout
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _objective(problem: Problem, size: int) -> NDArray[np.float64]:
    """Costs of the least of 0 in each group, in units of the largest, with what decides between equal ones."""
    flat = np.array([cost - min(costs) for costs in problem.costs for cost in costs])
    flat = flat / (flat.max() or 1.0)
    if problem.rows:
        amounts = np.array([amount for group in problem.rows[0].amounts for amount in group], dtype=float)
        flat = flat + _TIE * amounts / max(1.0, float(sum(max(group) for group in problem.rows[0].amounts)))
    places = [place for costs in problem.costs for place in range(len(costs))]
    flat = flat + _TIE * 1e-3 * np.array(places) / max(1, len(places))
    return np.concatenate([flat, np.zeros(size - len(flat))])


class _Constraints:
    """The rows of the matrix that is handed to the solver, with their lower and upper bounds.

    Columns are the options of all groups, then one for each label that is counted: whether it is used.
    """

    def __init__(self, problem: Problem, lengths: Sequence[int]) -> None:
        names = sorted({label for group in problem.labels for label in group if label != problem.free})
        counted = problem.max_labels is not None and problem.max_labels < len(names)
        self._problem = problem
        self._names = names if counted else []
        self._starts = [0, *accumulate(lengths)]
        self.size = self._starts[-1] + len(self._names)
        self.rows: list[NDArray[np.float64]] = []
        self.low: list[float] = []
        self.high: list[float] = []
        for start, stop in pairwise(self._starts):
            self._add(self._ones(range(start, stop)), 1, 1)
        self.possible = self._limit_sums()
        self._cut()
        self._count_labels()

    def _add(self, row: NDArray[np.float64], least: float, most: float) -> None:
        self.rows.append(np.concatenate([row, np.zeros(self.size - len(row))]))
        self.low.append(least)
        self.high.append(most)

    def _ones(self, places: Iterable[int]) -> NDArray[np.float64]:
        row = np.zeros(self.size)
        row[list(places)] = 1
        return row

    def _limit_sums(self) -> bool:
        """Rows for the limits; False where one is below the least sum."""
        left = []
        for row in self._problem.rows:
            amounts, rest = _in_units(row)
            self._add(amounts, -np.inf, rest + 0.5)
            left.append(float(rest))
        if self._problem.bound is not None:
            costs, most = self._problem.bound
            flat = np.array([cost - min(group) for group in costs for cost in group])
            left.append(most - math.fsum(min(group) for group in costs))
            scale = float(flat.max()) or 1.0
            self._add(flat / scale, -np.inf, left[-1] / scale)
        return min(left, default=0.0) >= 0

    def _cut(self) -> None:
        """Rows for the choices from which the solution has to differ."""
        for other in self._problem.others:
            chosen = [start + place for start, place in zip(self._starts, other, strict=False)]
            self._add(self._ones(chosen), -np.inf, len(other) - self._problem.distance)

    def _count_labels(self) -> None:
        """Rows that mark a label as used where an option has it, and one for their number."""
        used = self._starts[-1]
        for number, name in enumerate(self._names):
            for start, group in zip(self._starts, self._problem.labels, strict=False):
                row = self._ones([start + place for place, label in enumerate(group) if label == name])
                row[used + number] = -1
                self._add(row, -np.inf, 0)
        if self._names:
            self._add(self._ones(range(used, self.size)), -np.inf, float(self._problem.max_labels or 0))


def _in_units(row: Row) -> tuple[NDArray[np.float64], int]:
    """Amounts above each group's least in their largest common unit, and how many units the limit leaves for them.

    Whole numbers that are small keep the solver exact: a plan of exactly the limit's bytes is found.
    """
    least = [min(group) for group in row.amounts]
    more = [amount - low for group, low in zip(row.amounts, least, strict=True) for amount in group]
    unit = math.gcd(*more) or 1
    return np.array([amount // unit for amount in more], dtype=float), (row.limit - sum(least)) // unit
