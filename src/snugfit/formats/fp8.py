"""FP8 (E4M3): one scale for a weight, an output channel or a block; activations under dynamic or static scales.

This package writes one scale an output channel, with activations under one scale a token (FP8_DYNAMIC), and one a block
of 128 x 128, with activations under one scale for each token and 128 features (FP8_BLOCK). It reads all others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from snugfit.formats.grids import E4M3_MAX, divide, round_e4m3_, to_e4m3

# the smallest activation scale of a token that engines use (vLLM: 1 / (448 * 512))
TOKEN_SCALE_MIN = 1.0 / (E4M3_MAX * 512.0)
# the lower bound of the largest magnitude of a group of activations (vLLM's per_token_group_quant)
GROUP_AMAX_MIN = 1e-10


@dataclass(frozen=True)
class FP8Weight:
    """A weight [N, K]: `codes` E4M3 [N, K], and `scale` of any float dtype, which multiplies.

    `scale` is [N, 1] or [1, 1], or with `block` = (n, k) one for each block, [ceil(N/n), ceil(K/k)].
    """

    codes: Tensor
    scale: Tensor
    block: tuple[int, int] | None = None


def quantize(weight: Tensor) -> FP8Weight:
    """Codes of `weight` [N, K] under scales amax_row / 448, rounded to the weight's dtype before they are used.

    Computed in fp32. An all-zero row takes the dtype's epsilon as its scale, as compressed-tensors does.
    """
    exact = weight.float()
    return quantize_under(exact, channel_scale(exact, weight.dtype))


def channel_scale(weight: Tensor, dtype: torch.dtype, larger: float | Tensor = 1.0) -> Tensor:
    """Scales [N, 1] in `dtype` of a weight, fp32 [N, K]: amax_row / 448, `larger` times; epsilon for a row of zeros.

    For several factors `larger`, fp32 [n, 1, 1], scales [n, N, 1].
    """
    scale = (divide(weight.abs().amax(1, keepdim=True), E4M3_MAX) * larger).to(dtype)
    return torch.where(scale == 0, torch.finfo(dtype).eps, scale)


def quantize_under(weight: Tensor, scale: Tensor) -> FP8Weight:
    """Codes of `weight`, fp32 [N, K], under scales [N, 1]."""
    return FP8Weight(to_e4m3(weight / scale.float()), scale)


def quantize_blocks(weight: Tensor, block: tuple[int, int]) -> FP8Weight:
    """As `quantize`, under scales amax_block / 448; blocks at the edges may be smaller than the others."""
    out_features, in_features = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -in_features % block[1], 0, -out_features % block[0]))
    blocks = padded.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))  # [N/n, n, K/k, k]
    scale = divide(torch.maximum(blocks.amax((1, 3)), -blocks.amin((1, 3))), E4M3_MAX).to(weight.dtype)
    scale = torch.where(scale == 0, torch.finfo(weight.dtype).eps, scale)
    codes = to_e4m3(blocks / scale.float()[:, None, :, None])
    return FP8Weight(codes.flatten(2).flatten(0, 1)[:out_features, :in_features].contiguous(), scale, block)


def dequantize(quantized: FP8Weight) -> Tensor:
    """fp32 [N, K] of a quantized weight; blocks at the edges may be smaller than the others.

    ValueError unless there is one scale for each block.
    """
    values, scale = quantized.codes.float(), quantized.scale.float()
    if quantized.block is not None:
        n, k = values.shape
        if scale.shape != (-(-n // quantized.block[0]), -(-k // quantized.block[1])):
            raise ValueError(f"{list(scale.shape)} scales for blocks of {quantized.block} in {[n, k]}")
        scale = scale.repeat_interleave(quantized.block[0], 0)[:n].repeat_interleave(quantized.block[1], 1)[:, :k]
    return values.mul_(scale)


def split_outputs(quantized: FP8Weight, out_features: int) -> Iterator[FP8Weight]:
    """A weight as views of about `out_features` output features each, a multiple of those of its blocks."""
    block = 1 if quantized.block is None else quantized.block[0]
    step = max(1, out_features // block) * block
    for start in range(0, len(quantized.codes), step):
        scale = quantized.scale
        if len(scale) > 1:
            scale = scale[start // block : (start + step) // block]
        yield FP8Weight(quantized.codes[start : start + step], scale, quantized.block)


def requantize(quantized: FP8Weight, scale: Tensor) -> FP8Weight:
    """The weight under one new scale (fp32 scalar), its values rounded to E4M3 a second time.

    vLLM does this to the members of a fused group, under the largest of their scales (w8a8_utils.py; by way of fp16).
    """
    return FP8Weight(to_e4m3(dequantize(quantized).div_(scale)), scale.reshape(1, 1))


def quantize_dequantize_input(activations: Tensor) -> Tensor:
    """Activations [..., K] as an FP8_DYNAMIC engine sees them, in their own dtype.

    One scale a token: s = max(amax / 448, 1 / (448 * 512)), values rounded to E4M3(x / s) * s, in fp32.
    """
    exact = activations.float()
    low, high = exact.aminmax(dim=-1, keepdim=True)
    scale = divide(torch.maximum(high, low.neg_()), E4M3_MAX).clamp_(min=TOKEN_SCALE_MIN)
    return _round_under(exact, scale).to(activations.dtype)


def quantize_dequantize_input_groups(activations: Tensor, group: int) -> Tensor:
    """Activations [..., K] under one scale for each `group` features of a token, the last group possibly smaller.

    s = max(amax, 1e-10) / 448, values E4M3(x / s) * s, in fp32.
    """
    features = activations.shape[-1]
    padded = torch.nn.functional.pad(activations.float(), (0, -features % group))
    groups = padded.unflatten(-1, (-1, group))
    scale = divide(groups.abs().amax(-1, keepdim=True).clamp_(min=GROUP_AMAX_MIN), E4M3_MAX)
    return _round_under(groups, scale).flatten(-2)[..., :features].to(activations.dtype)


def quantize_dequantize_input_static(activations: Tensor, scale: Tensor) -> Tensor:
    """Activations [...] under one given multiplier (fp32 scalar): E4M3(x / s) * s, saturating, in fp32.

    Keys and values in an FP8 cache are rounded the same way; `scale` may be any shape that broadcasts.
    """
    return _round_under(activations.float(), scale).to(activations.dtype)


def _round_under(exact: Tensor, scale: Tensor) -> Tensor:
    return round_e4m3_((exact / scale).clamp_(-E4M3_MAX, E4M3_MAX)).mul_(scale)
