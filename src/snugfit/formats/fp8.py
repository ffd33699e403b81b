"""FP8 (E4M3) with one scale an output channel; activations with one scale a token, made at run time (FP8_DYNAMIC)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from snugfit.formats.grids import E4M3_MAX, round_e4m3_, to_e4m3

# the smallest activation scale that engines use (vLLM: 1 / (448 * 512))
TOKEN_SCALE_MIN = 1.0 / (E4M3_MAX * 512.0)


@dataclass(frozen=True)
class FP8Weight:
    """A weight [N, K]: `codes` E4M3 [N, K], `scale` [N, 1] in the model's dtype, which multiplies."""

    codes: Tensor
    scale: Tensor


def quantize(weight: Tensor) -> FP8Weight:
    """Codes of `weight` [N, K] under scales amax_row / 448, rounded to the weight's dtype before they are used.

    Computed in fp32. An all-zero row takes the dtype's epsilon as its scale, as compressed-tensors does.
    """
    exact = weight.float()
    scale = (exact.abs().amax(1, keepdim=True) / E4M3_MAX).to(weight.dtype)
    scale = torch.where(scale == 0, torch.finfo(weight.dtype).eps, scale)
    return FP8Weight(to_e4m3(exact / scale.float()), scale)


def dequantize(stored: FP8Weight) -> Tensor:
    """fp32 [N, K] of a stored weight."""
    return stored.codes.float().mul_(stored.scale.float())


def quantize_dequantize_input(activations: Tensor) -> Tensor:
    """Activations [..., K] as an FP8_DYNAMIC engine sees them, in their own dtype.

    One scale a token: s = max(amax / 448, 1 / (448 * 512)), values rounded to E4M3(x / s) * s, in fp32.
    """
    exact = activations.float()
    low, high = exact.aminmax(dim=-1, keepdim=True)
    scale = torch.maximum(high, low.neg_()).div_(E4M3_MAX).clamp_(min=TOKEN_SCALE_MIN)
    codes = round_e4m3_((exact / scale).clamp_(-E4M3_MAX, E4M3_MAX))
    return codes.mul_(scale).to(activations.dtype)
