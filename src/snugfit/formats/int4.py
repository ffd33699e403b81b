"""INT4, weight only: integers -8..7 in groups of 32, 64 or 128 input features, with or without a zero point."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from snugfit.formats.grids import divide, pack_int4, unpack_int4


@dataclass(frozen=True)
class INT4Weight:
    """A weight [N, K]: `packed` int32 [N, K/8], `scale` [N, K/group_size] in the model's dtype.

    value = (code - zero_point) * scale. `zero_point` is int8 of the scale's shape, or None.
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    shape: tuple[int, int]


def quantize(weight: Tensor, *, group_size: int, symmetric: bool) -> INT4Weight:
    """Round-to-nearest codes of `weight` [N, K] under the scales of `plain_scales`; K must divide by `group_size`."""
    return quantize_under(weight, *plain_scales(weight, group_size=group_size, symmetric=symmetric))


def plain_scales(weight: Tensor, *, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """Scales [N, K/group_size] in the weight's dtype, and int8 zero points, under which each group's range just fits.

    Symmetric: scale = amax / 7.5, so that both ends of -8..7 are used. Asymmetric: scale = (max - min) / 15 over the
    group with zero included, zero point = round(-8 - min / scale). Scales are rounded to the weight's dtype first.
    """
    low, high = ranges(weight.float().unflatten(1, (-1, group_size)))
    return scales_of_ranges(low, high, symmetric=symmetric, dtype=weight.dtype)


def ranges(groups: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest and the highest value [...] of fp32 groups [..., group_size], zero included."""
    zero = torch.zeros((), device=groups.device)
    return torch.minimum(groups.amin(-1), zero), torch.maximum(groups.amax(-1), zero)


def scales_of_ranges(low: Tensor, high: Tensor, *, symmetric: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scales in `dtype`, and int8 zero points, of fp32 ranges from `low` <= 0 to `high` >= 0: see `plain_scales`."""
    span = divide(torch.maximum(high, -low), 7.5) if symmetric else divide(high - low, 15)
    scale = span.to(dtype)
    scale = torch.where(scale == 0, torch.finfo(dtype).eps, scale)
    if symmetric:
        return scale, None
    return scale, (-8 - low / scale.float()).clamp_(-8, 7).round_().to(torch.int8)


def quantize_under(weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> INT4Weight:
    """Nearest codes of `weight` [N, K] under scales [N, K/group_size] in its dtype and int8 zero points or None."""
    codes = weight.float().unflatten(1, (scale.shape[1], -1)) / scale.float().unsqueeze(-1)
    if zero_point is not None:
        codes += zero_point.float().unsqueeze(-1)
    codes = codes.round_().clamp_(-8, 7).flatten(1)
    return INT4Weight(pack_int4(codes), scale, zero_point, (weight.shape[0], weight.shape[1]))


def dequantize(quantized: INT4Weight) -> Tensor:
    """fp32 [N, K] of a quantized weight."""
    groups = unpack_int4(quantized.packed, quantized.shape).float().unflatten(1, (quantized.scale.shape[1], -1))
    if quantized.zero_point is not None:
        groups -= quantized.zero_point.float().unsqueeze(-1)
    weight: Tensor = groups.mul_(quantized.scale.float().unsqueeze(-1)).flatten(1)
    return weight
