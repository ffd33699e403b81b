"""Integers of 8 bits or fewer under a scale, with or without a zero point; activations of 8 bits.

Checkpoints of other tools have these weights, and this package only reads them; it writes `snugfit.formats.int4`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from snugfit.formats.grids import FP32_TINY, divide

INT8_MIN, INT8_MAX = -128.0, 127.0


@dataclass(frozen=True)
class IntegerWeight:
    """A weight [N, K]: `codes` int8 [N, K], `scale` [N, G], [N, 1] or [1, 1], which multiplies.

    value = (code - zero_point) * scale. `zero_point` is int8 of the scale's shape, or None. `group_index` int [K] is
    the group of each input feature if groups are not runs of neighbours (GPTQ's activation order), else None.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    group_index: Tensor | None = None


def dequantize(quantized: IntegerWeight) -> Tensor:
    """fp32 [N, K] of a quantized weight."""
    scale = quantized.scale.float()
    zero_point = None if quantized.zero_point is None else quantized.zero_point.float()
    values = quantized.codes.float()
    if quantized.group_index is not None:
        index = quantized.group_index.to(torch.int64)
        if zero_point is not None:
            values -= zero_point[:, index]
        return values.mul_(scale[:, index])
    groups = values.unflatten(1, (scale.shape[1], -1))
    if zero_point is not None:
        groups -= zero_point.unsqueeze(-1)
    weight: Tensor = groups.mul_(scale.unsqueeze(-1)).flatten(1)
    return weight


def quantize_dequantize_input(activations: Tensor) -> Tensor:
    """Activations [..., K] as an engine with 8-bit integers sees them, in their own dtype: one scale a token.

    s = amax / 127, round(x / s) * s, in fp32: vLLM's rule; compressed-tensors' own forward divides by 127.5.
    """
    exact = activations.float()
    scale = divide(exact.abs().amax(-1, keepdim=True), INT8_MAX).clamp_(min=FP32_TINY)
    return (exact / scale).round_().clamp_(INT8_MIN, INT8_MAX).mul_(scale).to(activations.dtype)


def quantize_dequantize_input_asymmetric(activations: Tensor) -> Tensor:
    """The same with a zero point a token: s = (max - min) / 255, z = round(-128 - min / s), (q - z) * s.

    vLLM's rule: zero need not be in the range.
    """
    exact = activations.float()
    low, high = exact.aminmax(dim=-1, keepdim=True)
    scale = divide(high - low, INT8_MAX - INT8_MIN).clamp_(min=FP32_TINY)
    return _round_between(exact, scale, (INT8_MIN - low / scale).round_()).to(activations.dtype)


def quantize_dequantize_input_static(activations: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """Activations [...] under one given multiplier and zero point (fp32 scalars), saturating, in fp32."""
    offset = torch.zeros((), device=activations.device) if zero_point is None else zero_point
    return _round_between(activations.float(), scale, offset).to(activations.dtype)


def _round_between(exact: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    codes = (exact / scale).round_().add_(zero_point).clamp_(INT8_MIN, INT8_MAX)
    return codes.sub_(zero_point).mul_(scale)
