"""Rounding a block of columns one after another, by machine code where there is some, which gives the same bits.

Both functions work on each row by itself. Their plain form in torch is the definition.
"""

from __future__ import annotations

import torch
from torch import Tensor

from snugfit.formats.grids import E4M3_MAX, round_e2m1_magnitude, round_e4m3_
from snugfit.methods.candidates import Grid
from snugfit.methods.kernels import CHECKED_ROWS, Kernels, kernels_for

MOST_COLUMNS = 128  # that kernels take
SMALL = 1 << 13  # values of a block below which torch goes through its columns, which takes a CPU 4 ms for 128 of them


def round_block(
    target: Tensor, exact: Tensor, step: Tensor, zero: Tensor | None, feedback: Tensor, grid: Grid
) -> Tensor:
    """Values [N, B]: column i rounds `target`_i, and its error from `exact`_i goes to the targets behind it.

    All are fp32 [N, B] but `feedback` [B, B]: in row i, columns j > i, how much of the error of column i is added to
    the target of column j. `target` is overwritten.
    """

    def plainly(target: Tensor, exact: Tensor, step: Tensor) -> Tensor:
        return plain_round_block(target, exact, step, _first(zero, target), feedback, grid)

    def by(kernels: Kernels, target: Tensor, exact: Tensor, step: Tensor) -> Tensor:
        return kernels.round_block(target, exact, step, _first(zero, target), feedback, grid=grid)

    def few() -> tuple[Tensor, Tensor, Tensor]:
        return target[:CHECKED_ROWS].clone(), exact[:CHECKED_ROWS], step[:CHECKED_ROWS]

    if target.shape[1] > MOST_COLUMNS:
        return plainly(target, exact, step)
    work = "feedback", grid, zero is None
    kernels = kernels_for(target, work, lambda found: by(found, *few()), lambda: plainly(*few()), small=SMALL)
    return plainly(target, exact, step) if kernels is None else by(kernels, target, exact, step)


def plain_round_block(
    target: Tensor, exact: Tensor, step: Tensor, zero: Tensor | None, feedback: Tensor, grid: Grid
) -> Tensor:
    """`round_block` by its definition."""
    values = torch.empty_like(target)
    for i in range(target.shape[1]):
        value = nearest(target[:, i], step[:, i], None if zero is None else zero[:, i], grid)
        values[:, i] = value
        if i + 1 < target.shape[1]:
            target[:, i + 1 :] += torch.outer(exact[:, i] - value, feedback[i, i + 1 :])
    return values


def descend_block(
    values: Tensor, gradient: Tensor, step: Tensor, zero: Tensor | None, hessian: Tensor, grid: Grid
) -> None:
    """Move each column of `values` [N, B] in turn to its best value, with all others fixed; overwrites its arguments.

    `gradient` [N, B] is (values - exact) @ H in these columns, `hessian` [B, B] the part of H between them.
    """

    def plainly(values: Tensor, gradient: Tensor, step: Tensor) -> Tensor:
        plain_descend_block(values, gradient, step, _first(zero, values), hessian, grid)
        return values

    def by(kernels: Kernels, values: Tensor, gradient: Tensor, step: Tensor) -> Tensor:
        kernels.descend_block(values, gradient, step, _first(zero, values), hessian, grid=grid)
        return values

    def few() -> tuple[Tensor, Tensor, Tensor]:
        return values[:CHECKED_ROWS].clone(), gradient[:CHECKED_ROWS].clone(), step[:CHECKED_ROWS]

    kernels = None
    if values.shape[1] <= MOST_COLUMNS:
        work = "descent", grid, zero is None
        kernels = kernels_for(values, work, lambda found: by(found, *few()), lambda: plainly(*few()), small=SMALL)
    if kernels is None:
        plainly(values, gradient, step)
    else:
        by(kernels, values, gradient, step)


def _first(zero: Tensor | None, like: Tensor) -> Tensor | None:
    return None if zero is None else zero[: len(like)]


def plain_descend_block(
    values: Tensor, gradient: Tensor, step: Tensor, zero: Tensor | None, hessian: Tensor, grid: Grid
) -> None:
    """`descend_block` by its definition."""
    for i in range(values.shape[1]):
        before = values[:, i].clone()
        target = before - gradient[:, i] / hessian[i, i]
        values[:, i] = nearest(target, step[:, i], None if zero is None else zero[:, i], grid)
        gradient += torch.outer(values[:, i] - before, hessian[i])


def nearest(target: Tensor, step: Tensor, zero: Tensor | None, grid: Grid) -> Tensor:
    """The value of the grid nearest to each of `target`, under its own step and zero."""
    if grid == "e2m1":
        scaled = target / step
        return round_e2m1_magnitude(scaled.abs()).copysign_(scaled).mul_(step)
    if grid == "e4m3":
        return round_e4m3_((target / step).clamp_(-E4M3_MAX, E4M3_MAX)).mul_(step)
    offset = torch.zeros_like(step) if zero is None else zero
    return ((target / step + offset).round_().clamp_(-8, 7) - offset).mul_(step)
