"""Block scales for NVFP4: one search, three sets of candidates.

For a block of 16 with largest magnitude a_b, under a global scale g made from the largest magnitude A of the whole
fused group, the plain scale is h = a_b / (6 g), rounded to E4M3 (code k0):

    absmax          {E4M3(h)}                       g = A / (6 * 448)
    four-over-six   {E4M3(h), E4M3(1.5 h)}          g = A / (6 * 256), so that 1.5 * 256 still fits
    sweep           codes k0-3 .. k0+7, in 1..126   g = 1.75 * A / (6 * 448)

Four-over-six is arXiv 2512.02010: the block's largest value lands on 6 or on 4, whichever rounded scale has the lower
error. For mse the sweep's eleven candidates contain the optimum of all 126 wherever k0 is a normal number (arXiv
2606.07618; a test compares by brute force); of subnormal k0, blocks 2**15 below the largest, it misses 1 %.
The strict minimum of the objective wins; on a tie the earlier candidate stays, E4M3(h) first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from snugfit.formats import nvfp4
from snugfit.formats.grids import E2M1_MAX, E4M3_MAX, E4M3_TINY, divide, round_e2m1_magnitude
from snugfit.formats.spec import NVFP4_BLOCK

SWEEP_OFFSETS = (0, -3, -2, -1, 1, 2, 3, 4, 5, 6, 7)
LARGEST_CODE = 126

# the largest block's scale before rounding: A / (6 g)
TOP_SCALE: Mapping[str, float] = {"absmax": E4M3_MAX, "four-over-six": 256.0, "sweep": E4M3_MAX / 1.75}

OBJECTIVES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "mse": lambda error: error.square_().sum(-1),
    "mae": lambda error: error.abs_().sum(-1),
    "absmax": lambda error: error.abs_().amax(-1),
}

# blocks handled at once: few enough for a core's cache, many enough to hide the cost of a torch call
CHUNK_BLOCKS = {"cpu": 8192, "cuda": 1 << 20}


def global_scale(amax: Tensor, rule: str) -> Tensor:
    """fp32 scalar g for a fused group whose largest magnitude is `amax`; an all-zero group counts as amax 1."""
    safe = torch.where(amax > 0, amax.float(), 1.0)
    return nvfp4.stable_reciprocal_scale(divide(safe, E2M1_MAX * TOP_SCALE[rule]))


def block_scales(weight: Tensor, scale: Tensor, rule: str, objective: str = "mse") -> Tensor:
    """E4M3 block scales [N, K/16] of `weight` [N, K] under the global scale, chosen by `rule` and `objective`."""
    blocks = weight.reshape(-1, NVFP4_BLOCK)
    chunk = CHUNK_BLOCKS["cuda" if weight.is_cuda else "cpu"]
    chosen = torch.cat([_choose(part.float().abs(), scale, rule, objective) for part in blocks.split(chunk)])
    return chosen.view(weight.shape[0], -1)


def largest_magnitude(weight: Tensor) -> Tensor:
    """The largest magnitude of a weight, fp32 ()."""
    low, high = weight.aminmax()
    return torch.maximum(high, -low).float()


def _choose(magnitude: Tensor, scale: Tensor, rule: str, objective: str) -> Tensor:
    """Best candidate for each row of `magnitude` [B, 16], as E4M3 [B]."""
    plain = magnitude.amax(-1).div_(E2M1_MAX * scale)
    candidates = _candidates(plain, rule)
    best = candidates[0]
    if len(candidates) == 1:
        return best
    measure = OBJECTIVES[objective]
    lowest = measure(_error(magnitude, best, scale))
    for candidate in candidates[1:]:
        error = measure(_error(magnitude, candidate, scale))
        better = error < lowest
        lowest = torch.where(better, error, lowest)
        best = torch.where(better, candidate.view(torch.uint8), best.view(torch.uint8)).view(torch.float8_e4m3fn)
    return best


def _candidates(plain: Tensor, rule: str) -> list[Tensor]:
    first = _to_scale(plain)
    if rule == "absmax":
        return [first]
    if rule == "four-over-six":
        return [first, _to_scale(plain * 1.5)]
    codes = first.view(torch.uint8).to(torch.int16)
    return [(codes + o).clamp_(1, LARGEST_CODE).to(torch.uint8).view(torch.float8_e4m3fn) for o in SWEEP_OFFSETS]


def _to_scale(plain: Tensor) -> Tensor:
    """E4M3 scale, never zero: an all-zero block takes the smallest positive one."""
    return plain.clamp(E4M3_TINY, E4M3_MAX).to(torch.float8_e4m3fn)


def _error(magnitude: Tensor, block_scale: Tensor, scale: Tensor) -> Tensor:
    step = (block_scale.float() * scale).unsqueeze(-1)
    return round_e2m1_magnitude(magnitude / step).mul_(step).sub_(magnitude)
