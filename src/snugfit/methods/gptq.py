"""GPTQ: rounding column by column, where each column makes up for the errors of those before it.

For inputs x of a linear with weight W, the expected squared error of its outputs is tr((W - V) H (W - V)^T), H = E[x
x^T]. With the factors H = R R^T, R upper triangular, that is the sum over columns i of R_ii^2 times the square of

    W_i + sum over j < i of (W_j - V_j) R_ji / R_ii  -  V_i

so that rounding columns in order, each to the value nearest to its weight plus the errors of those before it, makes
every term as small as its grid allows (Frantar et al. 2022, arXiv 2210.17323; in this form without an inverse: Chee et
al. 2023, arXiv 2307.13304, LDLQ). Columns are taken in descending order of H_ii, each under the scale of its own block,
which was chosen before ("static order": files need no permutation). Rows are independent of one another.

Coordinate descent goes over the columns again: with all others fixed, the best value of column i is the one nearest to
V_i - ((V - W) H)_i / H_ii; each step lowers the same sum, or leaves it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from snugfit.methods.candidates import Grid
from snugfit.methods.columns import descend_block, nearest, round_block

DAMPING = 0.05  # of the mean of H's diagonal, added to it
BLOCK = 128  # columns between two matrix products
# values of a weight rounded at once. A GPU goes through the columns of thousands of rows at once, one after another:
# a slice more is all columns more (an H100 holds 8,448 rows)
SLICE = {"cpu": 1 << 22, "cuda": 1 << 27}
TOGETHER = {"cpu": 0, "cuda": 1 << 25}  # values of a fused group whose weights are rounded at once


@dataclass(frozen=True)
class Feedback:
    """How errors pass from column to column, for inputs with Gram matrix H [K, K].

    `order` int64 [K]: columns as they are rounded. `factor` fp32 [K, K] in that order: R_ji / R_ii above the diagonal,
    0 elsewhere. `damping` is the part of H's mean diagonal that was added for the factors to exist.
    """

    order: Tensor
    factor: Tensor
    damping: float


@dataclass(frozen=True)
class Steps:
    """The scales of a weight, chosen before: value = (code - zero) * step, both for each value [N, K], fp32.

    `zero` is None for a grid that is symmetric about 0.
    """

    grid: Grid
    step: Tensor
    zero: Tensor | None = None

    def rows(self, start: int, stop: int) -> Steps:
        """The same of output features start..stop."""
        zero = None if self.zero is None else self.zero[start:stop]
        return Steps(self.grid, self.step[start:stop], zero)


def feedback_of(gram: Tensor, damping: float = DAMPING) -> Feedback | None:
    """The feedback for inputs of Gram matrix `gram`, fp32 [K, K]; None where there are no inputs but zeros.

    Where the matrix is not positive definite in spite of the damping, ten times as much is tried, up to the diagonal
    itself; then None: the inputs say nothing that could be used.
    """
    diagonal = gram.diagonal()
    mean = diagonal.mean()
    order = torch.argsort(diagonal, descending=True, stable=True)
    last_first = order.flip(0)
    permuted = gram.index_select(0, last_first).index_select(1, last_first)
    while damping <= 1:
        damped = permuted.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped
        upper = lower.flip(0, 1)
        factor = upper.div_(upper.diagonal().clone()).triu_(1)
        some = (mean > 0) & mean.isfinite()
        found = (failed == 0) & torch.stack(factor.aminmax()).isfinite().all()  # NaN carries through
        has_inputs, is_sound = torch.stack([some, found]).tolist()  # a GPU is waited for once
        if not has_inputs:
            return None
        if is_sound:
            return Feedback(order, factor.contiguous(), damping)
        damping *= 10
    return None


def round_weight(
    weight: Tensor, steps: Steps, feedback: Feedback | None, gram: Tensor | None = None, sweeps: int = 0
) -> Tensor:
    """Values fp32 [N, K] on the grid of `steps` for `weight` [N, K], some output features at a time.

    Each is the nearest one, or with `feedback` GPTQ's; then `sweeps` of descent under the Gram matrix `gram` [K, K].
    """
    slices = -(-weight.numel() // SLICE[weight.device.type])
    if slices <= 1:
        return _rounded(weight, steps, feedback, gram, sweeps)
    rows = -(-len(weight) // slices)
    found = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        found[part] = _rounded(weight[part], steps.rows(start, start + rows), feedback, gram, sweeps)
    return found


def _rounded(weight: Tensor, steps: Steps, feedback: Feedback | None, gram: Tensor | None, sweeps: int) -> Tensor:
    """`round_weight` of all output features at once."""
    if feedback is None:
        return nearest(weight, steps.step, steps.zero, steps.grid)
    values = round_with_feedback(weight, steps, feedback)
    return values if gram is None or not sweeps else descend(weight, values, steps, gram, sweeps)


def round_together(
    weights: Mapping[str, Tensor],
    steps: Mapping[str, Steps],
    feedback: Feedback,
    gram: Tensor | None = None,
    sweeps: int = 0,
) -> dict[str, Tensor]:
    """As `round_weight` for all weights [N, K] of a fused group, which have the same inputs; none if they are large.

    A GPU goes through the columns of small ones once.
    """
    held = list(weights.values())
    if len(held) < 2 or sum(weight.numel() for weight in held) > TOGETHER[held[0].device.type]:
        return {}
    given = [steps[name] for name in weights]
    zeros = [one.zero for one in given if one.zero is not None]
    of_all = Steps(given[0].grid, torch.cat([one.step for one in given]), torch.cat(zeros) if zeros else None)
    whole = round_weight(torch.cat(held), of_all, feedback, gram, sweeps)
    return dict(zip(weights, whole.split([len(weight) for weight in held]), strict=True))


def round_with_feedback(weight: Tensor, steps: Steps, feedback: Feedback) -> Tensor:
    """Values fp32 [N, K] on the grid of `steps` for `weight` fp32 [N, K], each column making up for those before it."""
    factor, zeros = feedback.factor, steps.zero
    errors = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    found: list[Tensor] = []
    start = 0
    for places in feedback.order.split(BLOCK):
        stop = start + len(places)
        exact, columns = weight.index_select(1, places), factor[:, start:stop]
        # overwritten, even one that is the whole
        target = torch.addmm(exact, errors[:, :start], columns[:start]) if start else exact.clone()
        values = round_block(
            target,
            exact,
            steps.step.index_select(1, places),
            None if zeros is None else zeros.index_select(1, places),
            columns[start:stop].contiguous(),
            steps.grid,
        )
        torch.sub(exact, values, out=errors[:, start:stop])
        found.append(values)
        start = stop
    del errors
    return torch.cat(found, dim=1).index_select(1, torch.argsort(feedback.order))


def descend(weight: Tensor, values: Tensor, steps: Steps, gram: Tensor, sweeps: int) -> Tensor:
    """`values` [N, K] after `sweeps` of coordinate descent on tr((V - W) H (V - W)^T), columns in their own order."""
    hessian = gram.clone()
    mean = hessian.diagonal().mean()
    hessian.diagonal().add_(DAMPING * mean)
    gradient = (values - weight) @ hessian
    values = values.clone()
    for _ in range(sweeps):
        for start in range(0, values.shape[1], BLOCK):
            stop = min(start + BLOCK, values.shape[1])
            before = values[:, start:stop].clone()
            inside = before.clone(memory_format=torch.contiguous_format)
            zero = None if steps.zero is None else steps.zero[:, start:stop].contiguous()
            descend_block(
                inside,
                gradient[:, start:stop].clone(memory_format=torch.contiguous_format),  # overwritten
                steps.step[:, start:stop].contiguous(),
                zero,
                hessian[start:stop, start:stop].contiguous(),
                steps.grid,
            )
            values[:, start:stop] = inside
            gradient.addmm_(inside - before, hessian[start:stop])
    return values
