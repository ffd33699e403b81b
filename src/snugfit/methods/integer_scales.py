"""Scales for INT4 groups: that of the group's plain range, or of a smaller or larger one.

The plain range (see `snugfit.formats.int4.plain_scales`) is multiplied by each of FACTORS; the strict minimum of the
squared error wins, on a tie the earlier. Errors may be weighted by E[x^2] of the input features. Under a smaller range
the largest values saturate; under a larger one they move from the middle between two codes onto one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from snugfit.formats.int4 import ranges, scales_of_ranges
from snugfit.methods.importance import of_features, ordered_sum

FACTORS = (1.0, *(step / 40 for step in range(44, 19, -1) if step != 40))  # 1, then 1.1, 1.075 .. 0.5
# values handled at once
CHUNK_VALUES = {"cpu": 1 << 17, "cuda": 1 << 24}


def integer_scales(
    weight: Tensor, group_size: int, symmetric: bool, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scales [N, K/group_size] of `weight` [N, K] in its dtype, and int8 zero points (None if symmetric).

    `importance` weights squared errors: E[x^2] of each input feature [K].
    """
    return plain_integer_scales(weight, group_size, symmetric, importance)


def plain_integer_scales(
    weight: Tensor, group_size: int, symmetric: bool, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """`integer_scales` by its definition, in torch on any device; kernels are compared with it."""
    factors = None if importance is None else of_features(importance, group_size)
    groups = weight.unflatten(1, (-1, group_size))
    rows = max(1, CHUNK_VALUES["cuda" if weight.is_cuda else "cpu"] // max(1, weight.shape[1]))
    parts = [_choose(part, factors, symmetric=symmetric) for part in groups.split(rows)]
    zero_points = [zero_point for _, zero_point in parts if zero_point is not None]
    return torch.cat([scale for scale, _ in parts]), torch.cat(zero_points) if zero_points else None


def _choose(groups: Tensor, factors: Tensor | None, *, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    exact = groups.float()
    low, high = ranges(exact)
    best, best_zero = scales_of_ranges(low, high, symmetric=symmetric, dtype=groups.dtype)
    lowest = _loss(exact, best, best_zero, factors)
    for factor in FACTORS[1:]:
        scale, zero = scales_of_ranges(low * factor, high * factor, symmetric=symmetric, dtype=groups.dtype)
        loss = _loss(exact, scale, zero, factors)
        better = loss < lowest
        lowest = torch.where(better, loss, lowest)
        best = torch.where(better, scale, best)
        if zero is not None and best_zero is not None:
            best_zero = torch.where(better, zero, best_zero)
    return best, best_zero


def _loss(groups: Tensor, scale: Tensor, zero_point: Tensor | None, factors: Tensor | None) -> Tensor:
    """The squared error of each of fp32 groups [..., group_size] under scales [...]."""
    step = scale.float().unsqueeze(-1)
    codes = groups / step
    if zero_point is None:
        values = codes.round_().clamp_(-8, 7)
    else:
        zero = zero_point.float().unsqueeze(-1)
        values = codes.add_(zero).round_().clamp_(-8, 7).sub_(zero)
    square = values.mul_(step).sub_(groups).square_()
    return ordered_sum(square if factors is None else square.mul_(factors))
