"""NVFP4: E2M1 codes in blocks of 16 input features, one E4M3 scale a block, one fp32 scale a tensor.

value = code * block_scale * global_scale, all in fp32; both scales multiply. `snugfit.methods.scales` chooses the block
scales. This file quantizes under given scales, dequantizes, and rounds activations as an engine does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from snugfit.formats.grids import (
    E2M1_MAX,
    E4M3_MAX,
    FP32_TINY,
    e2m1_codes,
    e2m1_pairs,
    pack_nibbles,
    round_e2m1_magnitude,
    to_e4m3,
)
from snugfit.formats.spec import NVFP4_BLOCK


@dataclass(frozen=True)
class NVFP4Weight:
    """A weight [N, K]: `packed` uint8 [N, K/2], `block_scale` E4M3 [N, K/16], `global_scale` fp32 scalar multiplier."""

    packed: Tensor
    block_scale: Tensor
    global_scale: Tensor


def stable_reciprocal_scale(scale: Tensor) -> Tensor:
    """The fp32 scale nearest to `scale` that survives storage as its own reciprocal: 1/(1/s) == s, exactly.

    Files store the divisor. Two reciprocals reach a fixed point: a third gives the same number as the first (checked
    over all 2**23 mantissas by a test), so writing and reading back changes nothing. Scales below 2**-126, whose
    divisors fp32 could not hold, become 2**-126.
    """
    return scale.float().clamp(min=FP32_TINY).reciprocal().reciprocal()


def quantize(weight: Tensor, block_scale: Tensor, global_scale: Tensor) -> NVFP4Weight:
    """Codes of `weight` [N, K] (any float dtype) under E4M3 block scales [N, K/16] and an fp32 global scale."""
    blocks = weight.float().unflatten(-1, (-1, NVFP4_BLOCK))
    step = (block_scale.float() * global_scale).unsqueeze(-1)
    magnitude = round_e2m1_magnitude(blocks.abs().div_(step))
    codes = e2m1_codes(magnitude, blocks < 0).flatten(-2)
    return NVFP4Weight(pack_nibbles(codes), block_scale, global_scale)


def dequantize(quantized: NVFP4Weight) -> Tensor:
    """fp32 [N, K] of a quantized weight."""
    step = quantized.block_scale.float() * quantized.global_scale
    values = e2m1_pairs(quantized.packed).unflatten(-1, (-1, NVFP4_BLOCK))
    weight: Tensor = values.mul_(step.unsqueeze(-1)).flatten(-2)
    return weight


def input_global_scale(amax: float) -> Tensor:
    """fp32 scalar multiplier under which activations up to `amax` fit: amax / (6 * 448)."""
    return stable_reciprocal_scale(torch.tensor(amax / (E2M1_MAX * E4M3_MAX), dtype=torch.float32))


def quantize_dequantize_input(activations: Tensor, global_scale: Tensor) -> Tensor:
    """Activations [..., K] as an NVFP4 engine sees them, in their own dtype.

    Block scales are made at run time under the static global scale: E4M3(min(amax_block / (6 g), 448)), codes by
    rounding to nearest even. A block too small for the smallest scale becomes zero, as in vLLM.
    """
    blocks = activations.float().unflatten(-1, (-1, NVFP4_BLOCK))
    magnitude = blocks.abs()
    scale = to_e4m3(magnitude.amax(-1, keepdim=True).div_(E2M1_MAX * global_scale))
    step = scale.float().mul_(global_scale)
    rounded = round_e2m1_magnitude(magnitude.div_(step.clamp(min=FP32_TINY))).mul_(step)
    return rounded.copysign_(blocks).flatten(-2).to(activations.dtype)
