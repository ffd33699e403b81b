"""The multiple choice knapsack: one option of each group, limits on sums, least cost. Solved by HiGHS (scipy's milp).

Deterministic: the same problem has the same solution. Of options that cost the same, those with less of the first
limit's sum win, then those that come first.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_GAP = 1e-6  # relative, below what any score knows
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
    the solution has to differ in at least `distance` groups.
    """

    costs: tuple[tuple[float, ...], ...]
    rows: tuple[Row, ...]
    labels: tuple[tuple[str, ...], ...] = ()
    max_labels: int | None = None
    free: str = ""
    bound: tuple[tuple[tuple[float, ...], ...], float] | None = None
    others: tuple[tuple[int, ...], ...] = ()
    distance: int = 1


def solve(problem: Problem) -> tuple[int, ...] | None:
    """The choice of least cost, an option's place for each group; None where no choice keeps the limits."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    lengths = [len(options) for options in problem.costs]
    matrix, lower, upper = _constraints(problem, lengths)
    if matrix is None:
        return None
    size = matrix.shape[1]
    with _quiet():
        result = milp(
            _objective(problem, size),
            constraints=LinearConstraint(matrix, lower, upper),
            integrality=np.ones(size),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": _GAP, "node_limit": _NODES},
        )
    if result.x is None:
        return None
    starts = np.cumsum([0, *lengths])
    return tuple(int(np.argmax(result.x[a:b])) for a, b in zip(starts, starts[1:], strict=False))


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


def _constraints(
    problem: Problem, lengths: Sequence[int]
) -> tuple[NDArray[np.float64] | None, NDArray[np.float64], NDArray[np.float64]]:
    """The matrix, lower and upper bounds of all constraints; None where a limit is below the least sum."""
    names = sorted({label for group in problem.labels for label in group if label != problem.free})
    if problem.max_labels is None or problem.max_labels >= len(names):
        names = []
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    size = starts[-1] + len(names)
    rows: list[NDArray[np.float64]] = []
    low: list[float] = []
    high: list[float] = []

    def add(row: NDArray[np.float64], least: float, most: float) -> None:
        rows.append(row)
        low.append(least)
        high.append(most)

    nothing = np.zeros(0), np.zeros(0)
    for start, stop in zip(starts, starts[1:], strict=False):
        add(_ones(size, range(start, stop)), 1, 1)
    for row in problem.rows:
        amounts, rest = _in_units(row)
        if rest < 0:
            return None, *nothing
        add(np.concatenate([amounts, np.zeros(len(names))]), -np.inf, rest + 0.5)
    if problem.bound is not None:
        costs, most = problem.bound
        flat = np.array([cost - min(group) for group in costs for cost in group])
        left = most - math.fsum(min(group) for group in costs)
        if left < 0:
            return None, *nothing
        scale = float(flat.max()) or 1.0
        add(np.concatenate([flat / scale, np.zeros(len(names))]), -np.inf, left / scale)
    for other in problem.others:
        chosen = [start + place for start, place in zip(starts, other, strict=False)]
        add(_ones(size, chosen), -np.inf, len(other) - problem.distance)
    for number, name in enumerate(names):
        for start, group in zip(starts, problem.labels, strict=False):
            row_of_label = _ones(size, [start + place for place, label in enumerate(group) if label == name])
            row_of_label[starts[-1] + number] = -1
            add(row_of_label, -np.inf, 0)
    if names:
        add(_ones(size, range(starts[-1], size)), -np.inf, float(problem.max_labels or 0))
    return np.array(rows), np.array(low), np.array(high)


def _ones(size: int, places: Sequence[int]) -> NDArray[np.float64]:
    row = np.zeros(size)
    row[list(places)] = 1
    return row


def _in_units(row: Row) -> tuple[NDArray[np.float64], int]:
    """Amounts above each group's least in their largest common unit, and how many units the limit leaves for them.

    Whole numbers that are small keep the solver exact: a plan of exactly the limit's bytes is found.
    """
    least = [min(group) for group in row.amounts]
    more = [amount - low for group, low in zip(row.amounts, least, strict=True) for amount in group]
    unit = math.gcd(*more) or 1
    return np.array([amount // unit for amount in more], dtype=float), (row.limit - sum(least)) // unit
