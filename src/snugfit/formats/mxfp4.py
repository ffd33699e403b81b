"""MXFP4 (OCP MX): E2M1 codes in blocks of 32 input features, each under a power of two (E8M0); no scale a tensor.

`snugfit.methods.exponents` chooses the exponents. This file quantizes under given exponents, dequantizes, and rounds
activations as an engine does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from snugfit.formats.grids import (
    E2M1_MAX,
    divide,
    e2m1_codes,
    e2m1_pairs,
    pack_nibbles,
    powers_of_two,
    round_e2m1_magnitude,
)
from snugfit.formats.spec import MXFP4_BLOCK

SMALLEST_EXPONENT, LARGEST_EXPONENT = -127, 127


@dataclass(frozen=True)
class MXFP4Weight:
    """A weight [N, K]: `packed` uint8 [N, K/2], `exponent` uint8 [N, K/32], value = code * 2**(exponent - 127)."""

    packed: Tensor
    exponent: Tensor


def quantize(weight: Tensor, exponent: Tensor) -> MXFP4Weight:
    """Codes of `weight` [N, K] (any float dtype) under E8M0 exponents, uint8 [N, K/32], saturating at 6 steps."""
    blocks = weight.float().unflatten(-1, (-1, MXFP4_BLOCK))
    magnitude = round_e2m1_magnitude(blocks.abs().div_(powers_of_two(exponent).unsqueeze(-1)))
    codes = e2m1_codes(magnitude, blocks < 0).flatten(-2)
    return MXFP4Weight(pack_nibbles(codes), exponent)


def dequantize(quantized: MXFP4Weight) -> Tensor:
    """fp32 [N, K] of a quantized weight."""
    values = e2m1_pairs(quantized.packed).unflatten(-1, (-1, MXFP4_BLOCK))
    weight: Tensor = values.mul_(powers_of_two(quantized.exponent).unsqueeze(-1)).flatten(-2)
    return weight


def quantize_dequantize_input(activations: Tensor) -> Tensor:
    """Activations [..., K] as an engine with MXFP4 inputs sees them, in their own dtype; scales made at run time.

    The scale is the smallest power of two under which the block's largest magnitude fits: 2**ceil(log2(amax / 6)), as
    FlashInfer rounds for Blackwell. compressed-tensors' own forward takes 2**(floor(log2(amax)) - 2), one more from
    1.75 of a power of two on, and lets the largest values saturate.
    """
    blocks = activations.float().unflatten(-1, (-1, MXFP4_BLOCK))
    magnitude = blocks.abs()
    fraction, exponent = torch.frexp(divide(magnitude.amax(-1, keepdim=True), E2M1_MAX))
    # v = fraction * 2**exponent with fraction in [0.5, 1): only 0.5 is a power of two itself
    exponent = torch.where(fraction > 0.5, exponent, exponent - 1).clamp_(SMALLEST_EXPONENT, LARGEST_EXPONENT)
    step = torch.ldexp(torch.ones_like(fraction), exponent)
    rounded = round_e2m1_magnitude(magnitude.div_(step)).mul_(step)
    return rounded.copysign_(blocks).flatten(-2).to(activations.dtype)
