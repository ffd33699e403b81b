"""Block exponents for MXFP4: which power of two 2**k is the step of a block of 32 whose largest magnitude is a.

    absmax    k0, under which 3.5 <= a / 2**k0 < 7: the largest value becomes 4 or 6, and saturates from 6 on
    sweep     k0 or k0 - 1, whichever has the lower squared error; on a tie k0

absmax is the rule of compressed-tensors and llm-compressor: the largest magnitude, rounded up to the next power of two
from a mantissa of 1.75 on, with its exponent lowered by two. No other exponent can have a lower squared error than the
sweep's two (a test compares by brute force): the grid of k0 holds all values of the grids above up to 6 steps, and no
magnitude is beyond 7; below k0 - 1 the largest value alone loses more by saturating than 31 others can win. Members of
a fused group need no common exponent.

A lower error of weights is not a lower loss of the model: measured KL went down 7-8 % on a model whose outlier channels
were rotated away, up 12-16 % on one that has them, and stayed on a third, so absmax is the default.
"""

from __future__ import annotations

import torch
from torch import Tensor

from snugfit.formats.grids import powers_of_two, round_e2m1_magnitude
from snugfit.formats.mxfp4 import SMALLEST_EXPONENT
from snugfit.formats.spec import MXFP4_BLOCK

BIAS = 127
LARGEST_EXPONENT = 125  # 4 * 2**126 is beyond fp32
# blocks handled at once: few enough for a core's cache, many enough to hide the cost of a torch call
CHUNK_BLOCKS = {"cpu": 4096, "cuda": 1 << 21}


def block_exponents(weight: Tensor, rule: str) -> Tensor:
    """E8M0 exponents, uint8 [N, K/32], of `weight` [N, K], chosen by `rule`; an all-zero block has the smallest."""
    blocks = weight.reshape(-1, MXFP4_BLOCK)
    chunk = CHUNK_BLOCKS["cuda" if weight.is_cuda else "cpu"]
    chosen = torch.cat([_choose(part.float().abs(), rule) for part in blocks.split(chunk)])
    return chosen.view(weight.shape[0], -1)


def _choose(magnitude: Tensor, rule: str) -> Tensor:
    """Best candidate for each row of `magnitude` [B, 32], as uint8 [B]."""
    plain = _absmax(magnitude.amax(-1))
    if rule == "absmax":
        return _biased(plain)
    finer = error(magnitude, _biased(plain - 1)) < error(magnitude, _biased(plain))
    return _biased(torch.where(finer, plain - 1, plain))


def _absmax(amax: Tensor) -> Tensor:
    """int32 k0 of fp32 magnitudes."""
    fraction, exponent = torch.frexp(amax)  # amax = fraction * 2**exponent with fraction in [0.5, 1)
    exponent = torch.where(fraction >= 0.875, exponent - 2, exponent - 3)
    return torch.where(amax > 0, exponent, SMALLEST_EXPONENT)


def _biased(exponent: Tensor) -> Tensor:
    return (exponent.clamp(SMALLEST_EXPONENT, LARGEST_EXPONENT) + BIAS).to(torch.uint8)


def error(magnitude: Tensor, exponent: Tensor) -> Tensor:
    """Squared error [B] of blocks [B, 32] under E8M0 exponents [B]; 0 for blocks below 2**-75, where k0 stays."""
    step = powers_of_two(exponent).unsqueeze(-1)
    return round_e2m1_magnitude(magnitude / step).mul_(step).sub_(magnitude).square_().sum(-1)
