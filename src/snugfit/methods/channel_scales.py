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
    rows = max(1, CHUNK_VALUES[weight.device.type] // max(1, weight.shape[1]))
    return torch.cat([_best(part, dtype, factors) for part in weight.split(rows)])


def _best(weight: Tensor, dtype: torch.dtype, factors: Tensor | None) -> Tensor:
    best = fp8.channel_scale(weight, dtype)
    lowest = torch.full((len(weight), 1), torch.inf, device=weight.device)
    for larger in FACTORS:
        scale = fp8.channel_scale(weight, dtype, larger)
        step = scale.float()
        values = round_e4m3_(torch.div(weight, step).clamp_(-E4M3_MAX, E4M3_MAX)).mul_(step)
        square = values.sub_(weight).square_()
        loss = square.sum(1, keepdim=True) if factors is None else (square @ factors).unsqueeze(1)
        better = loss < lowest
        lowest = torch.where(better, loss, lowest)
        best = torch.where(better, scale, best)
    return best
