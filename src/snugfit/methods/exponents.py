"""Block exponents for MXFP4: which power of two 2**k is the step of a block of 32 whose largest magnitude is a.

    absmax    k0, under which 3.5 <= a / 2**k0 < 7: the largest value becomes 4 or 6, and saturates from 6 on
    sweep     k0 or k0 - 1, whichever has the lower squared error; on a tie k0
    weighted  k0 .. k0 - 3, whichever has the lowest squared error weighted by importance; on a tie the largest

absmax is the rule of compressed-tensors and llm-compressor: the largest magnitude, rounded up to the next power of two
from a mantissa of 1.75 on, with its exponent lowered by two. No other exponent can have a lower squared error than the
sweep's two (a test compares by brute force): the grid of k0 holds all values of the grids above up to 6 steps, and no
magnitude is beyond 7; below k0 - 1 the largest value alone loses more by saturating than 31 others can win. Members of
a fused group need no common exponent. Once errors are weighted, an exponent above k0 still cannot win, for the first
reason; one below can, if the largest values matter least.

A lower error of weights is not a lower loss of the model: measured KL went down 7-8 % on a model whose outlier channels
were rotated away, up 12-16 % on one that has them, and stayed on a third, so absmax is the default.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from snugfit.formats.grids import powers_of_two, round_e2m1_magnitude
from snugfit.formats.mxfp4 import SMALLEST_EXPONENT
from snugfit.formats.spec import MXFP4_BLOCK
from snugfit.methods.importance import features_first, of_features, ordered_sum
from snugfit.methods.kernels import CHECKED_ROWS, Kernels, kernels_for

BIAS = 127
LARGEST_EXPONENT = 125  # 4 * 2**126 is beyond fp32
LOWER: Mapping[str, int] = {"absmax": 0, "sweep": 1, "weighted": 3}  # exponents tried below k0
# blocks handled at once: few enough for a core's cache, many enough to hide the cost of a torch call
CHUNK_BLOCKS = {"cpu": 4096, "cuda": 1 << 21}


def block_exponents(weight: Tensor, rule: str, importance: Tensor | None = None) -> Tensor:
    """E8M0 exponents, uint8 [N, K/32], of `weight` [N, K], chosen by `rule`; an all-zero block has the smallest.

    `importance` weights squared errors: E[x^2] of each input feature [K].
    """
    factors = None if importance is None else of_features(importance, MXFP4_BLOCK)

    def by(kernels: Kernels, part: Tensor) -> Tensor:
        return kernels.block_exponents(part, lower=LOWER[rule], factors=factors)

    def plainly(part: Tensor) -> Tensor:
        return plain_block_exponents(part, rule, importance)

    few, work = weight[:CHECKED_ROWS], ("mxfp4", rule, factors is None)
    kernels = kernels_for(weight, work, lambda found: by(found, few), lambda: plainly(few))
    return plainly(weight) if kernels is None else by(kernels, weight)


def plain_block_exponents(weight: Tensor, rule: str, importance: Tensor | None = None) -> Tensor:
    """`block_exponents` by its definition, in torch on any device; kernels are compared with it."""
    factors = None if importance is None else of_features(importance, MXFP4_BLOCK).t().unsqueeze(1)
    blocks = weight.unflatten(1, (-1, MXFP4_BLOCK))
    rows = max(1, CHUNK_BLOCKS["cuda" if weight.is_cuda else "cpu"] // max(1, blocks.shape[1]))
    return torch.cat([_choose(features_first(part).abs_(), rule, factors) for part in blocks.split(rows)])


def _choose(magnitude: Tensor, rule: str, factors: Tensor | None) -> Tensor:
    """Best candidate for each block of `magnitude` [32, ...], as uint8 [...]."""
    plain = _absmax(magnitude.amax(0))
    best = _biased(plain)
    if LOWER[rule] == 0:
        return best
    lowest = error(magnitude, best, factors)
    for lower in range(1, LOWER[rule] + 1):
        candidate = _biased(plain - lower)
        loss = error(magnitude, candidate, factors)
        better = loss < lowest
        lowest = torch.where(better, loss, lowest)
        best = torch.where(better, candidate, best)
    return best


def _absmax(amax: Tensor) -> Tensor:
    """int32 k0 of fp32 magnitudes."""
    fraction, exponent = torch.frexp(amax)  # amax = fraction * 2**exponent with fraction in [0.5, 1)
    exponent = torch.where(fraction >= 0.875, exponent - 2, exponent - 3)
    return torch.where(amax > 0, exponent, SMALLEST_EXPONENT)


def _biased(exponent: Tensor) -> Tensor:
    return (exponent.clamp(SMALLEST_EXPONENT, LARGEST_EXPONENT) + BIAS).to(torch.uint8)


def error(magnitude: Tensor, exponent: Tensor, factors: Tensor | None = None) -> Tensor:
    """Squared error [...] of blocks [32, ...] under E8M0 exponents; 0 for blocks below 2**-75, where k0 stays."""
    step = powers_of_two(exponent)
    square = round_e2m1_magnitude(magnitude / step).mul_(step).sub_(magnitude).square_()
    return ordered_sum(square if factors is None else square.mul_(factors))
