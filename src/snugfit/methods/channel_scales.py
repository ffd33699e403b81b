"""Scales for FP8 with one an output channel: that of the channel's largest value, or a larger one.

E4M3 has eight values to each power of two, so how well a channel's values meet them depends on where its scale lies
between two powers. Scales up to twice as large as the plain one try all such places; nothing saturates under them. The
strict minimum of the squared error wins, on a tie the smaller scale. Errors may be weighted by E[x^2] of the inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from snugfit.formats import fp8
from snugfit.formats.grids import E4M3_MAX, round_e4m3_

FACTORS = tuple(1 + step / 8 for step in range(8))
CHUNK_VALUES = {"cpu": 1 << 18, "cuda": 1 << 24}  # handled at once


def channel_scales(weight: Tensor, dtype: torch.dtype, importance: Tensor | None = None) -> Tensor:
    """Scales [N, 1] in `dtype` of `weight`, fp32 [N, K]; `importance` weights squared errors: E[x^2] [K]."""
    factors = None if importance is None or not bool((importance > 0).any()) else importance.float()
    rows = max(1, CHUNK_VALUES[weight.device.type] // (len(FACTORS) * max(1, weight.shape[1])))
    return torch.cat([_best(part, dtype, factors) for part in weight.split(rows)])


def _best(weight: Tensor, dtype: torch.dtype, factors: Tensor | None) -> Tensor:
    places = torch.arange(len(FACTORS), device=weight.device)
    scales = fp8.channel_scale(weight, dtype, (1 + places / len(FACTORS)).view(-1, 1, 1))  # [candidates, N, 1]
    step = scales.float()
    values = round_e4m3_(torch.div(weight, step).clamp_(-E4M3_MAX, E4M3_MAX)).mul_(step)
    square = values.sub_(weight).square_()
    loss = square.sum(2) if factors is None else (square.flatten(0, 1) @ factors).view(len(FACTORS), -1)
    # the first of the least; none is where a loss is NaN
    best = torch.where(loss == loss.amin(0), places.unsqueeze(1), len(FACTORS)).amin(0) % len(FACTORS)
    return scales.squeeze(2).gather(0, best.unsqueeze(0)).t()
