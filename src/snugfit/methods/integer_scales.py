"""Scales for INT4 groups: that of the group's plain range, or of a smaller or larger one.

The plain range (see `snugfit.formats.int4.plain_scales`) is multiplied by each of FACTORS; the strict minimum of the
squared error wins, on a tie the earlier. Errors may be weighted by E[x^2] of the input features. Under a smaller range
the largest values saturate; under a larger one they move from the middle between two codes onto one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from snugfit.formats.int4 import ranges, scales_of_ranges
from snugfit.methods.importance import features_first, of_features, ordered_sum
from snugfit.methods.kernels import CHECKED_ROWS, Kernels, kernels_for

FACTORS = (1.0, *(step / 40 for step in range(44, 19, -1) if step != 40))  # 1, then 1.1, 1.075 .. 0.5
CHUNK_VALUES = {"plain": 1 << 17, "cpu": 1 << 21, "cuda": 1 << 24}  # handled at once


def integer_scales(
    weight: Tensor, group_size: int, symmetric: bool, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scales [N, K/group_size] of `weight` [N, K] in its dtype, and int8 zero points (None if symmetric).

    `importance` weights squared errors: E[x^2] of each input feature [K].
    """
    factors = None if importance is None else of_features(importance, group_size)
    few = weight[:CHECKED_ROWS]

    def search(part: Tensor, kernels: Kernels | None) -> tuple[Tensor, Tensor | None]:
        return _choose(part, group_size, factors, symmetric=symmetric, kernels=kernels)

    work = "int4", group_size, symmetric, factors is None
    kernels = kernels_for(weight, work, lambda found: search(few, found)[0], lambda: search(few, None)[0])
    rows = max(1, CHUNK_VALUES["plain" if kernels is None else weight.device.type] // max(1, weight.shape[1]))
    parts = [search(part, kernels) for part in weight.split(rows)]
    zero_points = [zero_point for _, zero_point in parts if zero_point is not None]
    return torch.cat([scale for scale, _ in parts]), torch.cat(zero_points) if zero_points else None


def _choose(
    weight: Tensor, group_size: int, factors: Tensor | None, *, symmetric: bool, kernels: Kernels | None
) -> tuple[Tensor, Tensor | None]:
    low, high = ranges(weight.float().unflatten(1, (-1, group_size)))
    factor_of = torch.tensor(FACTORS, dtype=torch.float32, device=low.device).view(-1, 1, 1)
    scales, zeros = scales_of_ranges(low * factor_of, high * factor_of, symmetric=symmetric, dtype=weight.dtype)
    fp32_zeros = torch.zeros_like(scales, dtype=torch.float32) if zeros is None else zeros.float()
    search = plain_best_scales if kernels is None else kernels.best_scales
    best = search(weight, scales.float(), fp32_zeros, factors).unsqueeze(0).to(torch.int64)
    return scales.gather(0, best)[0], None if zeros is None else zeros.gather(0, best)[0]


def plain_best_scales(weight: Tensor, scales: Tensor, zeros: Tensor, factors: Tensor | None) -> Tensor:
    """uint8 [N, K/g]: the first of the scales, fp32 [candidates, N, K/g], with the least error for each group.

    In torch on any device; kernels are compared with it. `zeros` are fp32 zero points of the same shape, `factors`
    fp32 [K/g, g] of squared errors.
    """
    groups = features_first(weight.unflatten(1, (scales.shape[2], -1)))
    by_feature = None if factors is None else factors.t().unsqueeze(1)
    best = torch.zeros(groups.shape[1:], dtype=torch.uint8, device=weight.device)
    lowest = torch.full_like(groups[0], torch.inf)
    for number, (step, zero) in enumerate(zip(scales, zeros, strict=True)):
        codes = (groups / step).add_(zero).round_().clamp_(-8, 7)
        square = codes.sub_(zero).mul_(step).sub_(groups).square_()
        loss = ordered_sum(square if by_feature is None else square.mul_(by_feature))
        better = loss < lowest
        lowest = torch.where(better, loss, lowest)
        best.masked_fill_(better, number)
    return best
