"""Block scales for NVFP4: one search, candidates x objective.

For a block of 16 with largest magnitude a_b, under a global scale g made from the largest magnitude A of the whole
fused group, the plain scale is h = a_b / (6 g), rounded to E4M3 (code k0):

    absmax          {E4M3(h)}                        g = A / (6 * 448)
    four-over-six   {E4M3(h), E4M3(1.5 h)}           g = A / (6 * 256), so that 1.5 * 256 still fits
    sweep           codes k0-3 .. k0+7, in 1..126    g = 1.75 * A / (6 * 448)
    weighted        codes k0-10 .. k0+7, in 1..126   g as sweep's
    exhaustive      codes 1 .. 126                   g as sweep's

Four-over-six is arXiv 2512.02010: the block's largest value lands on 6 or on 4, whichever rounded scale has the lower
error. For mse the sweep's eleven candidates contain the optimum of all 126 wherever k0 is a normal number (arXiv
2606.07618; a test compares by brute force); of subnormal k0, blocks 2**15 below the largest, it misses 1 %. Once errors
are weighted by importance there is no such bound: the largest value may matter least.
The strict minimum of the objective wins; on a tie the earlier candidate stays, E4M3(h) first, then from the lowest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from snugfit.formats import nvfp4
from snugfit.formats.grids import E2M1_MAX, E4M3_MAX, E4M3_TINY, divide, round_e2m1_magnitude
from snugfit.formats.spec import NVFP4_BLOCK
from snugfit.methods.candidates import BY_OFFSET, EVERY_CODE, FOUR_OVER_SIX
from snugfit.methods.importance import features_first, of_features, of_pairs, ordered_sum, quadratic
from snugfit.methods.kernels import CHECKED_ROWS, Kernels, kernels_for

LARGEST_CODE = 126

# codes tried, counted from k0; where they are not, 0 for each candidate
OFFSETS: Mapping[str, tuple[int, ...]] = {
    "absmax": (0,),
    "four-over-six": (0, 0),
    "sweep": (0, *range(-3, 0), *range(1, 8)),
    "weighted": (0, *range(-10, 0), *range(1, 8)),
    "exhaustive": (0,) * (LARGEST_CODE + 1),
}

# the largest block's scale before rounding: A / (6 g)
TOP_SCALE: Mapping[str, float] = {
    "absmax": E4M3_MAX,
    "four-over-six": 256.0,
    "sweep": E4M3_MAX / 1.75,
    "weighted": E4M3_MAX / 1.75,
    "exhaustive": E4M3_MAX / 1.75,
}

OBJECTIVES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "mse": lambda error: ordered_sum(error.square()),
    "mae": lambda error: ordered_sum(error.abs()),
    "absmax": lambda error: error.abs().amax(0),
}

# blocks handled at once: few enough for a core's cache, many enough to hide the cost of a torch call
CHUNK_BLOCKS = {"cpu": 8192, "cuda": 1 << 20}


def global_scale(amax: Tensor, rule: str) -> Tensor:
    """fp32 scalar g for a fused group whose largest magnitude is `amax`; an all-zero group counts as amax 1."""
    safe = torch.where(amax > 0, amax.float(), 1.0)
    return nvfp4.stable_reciprocal_scale(divide(safe, E2M1_MAX * TOP_SCALE[rule]))


def largest_magnitude(weight: Tensor) -> Tensor:
    """The largest magnitude of a weight, fp32 ()."""
    low, high = weight.aminmax()
    return torch.maximum(high, -low).float()


def block_scales(
    weight: Tensor, scale: Tensor, rule: str, objective: str = "mse", importance: Tensor | None = None
) -> Tensor:
    """E4M3 block scales [N, K/16] of `weight` [N, K] under the global scale, chosen by `rule` and `objective`.

    `importance` weights squared errors: E[x^2] of each input feature [K], or E[x x^T] of each block's [K/16, 16, 16].
    """
    factors = _factors(objective, importance)
    kind = {"four-over-six": FOUR_OVER_SIX, "exhaustive": EVERY_CODE}.get(rule, BY_OFFSET)

    def by(kernels: Kernels, part: Tensor) -> Tensor:
        return kernels.block_scales(part, scale, offsets=OFFSETS[rule], kind=kind, objective=objective, factors=factors)

    def plainly(part: Tensor) -> Tensor:
        return plain_block_scales(part, scale, rule, objective, importance)

    few, dimensions = weight[:CHECKED_ROWS], 0 if factors is None else factors.dim()
    work = "nvfp4", rule, objective, dimensions
    kernels = kernels_for(weight, work, lambda found: by(found, few), lambda: plainly(few))
    return plainly(weight) if kernels is None else by(kernels, weight)


def plain_block_scales(
    weight: Tensor, scale: Tensor, rule: str, objective: str = "mse", importance: Tensor | None = None
) -> Tensor:
    """`block_scales` by its definition, in torch on any device; kernels are compared with it."""
    measure = _measure(objective, importance)
    blocks = weight.unflatten(1, (-1, NVFP4_BLOCK))
    rows = max(1, CHUNK_BLOCKS["cuda" if weight.is_cuda else "cpu"] // max(1, blocks.shape[1]))
    return torch.cat([_choose(features_first(part), scale, rule, measure) for part in blocks.split(rows)])


def _factors(objective: str, importance: Tensor | None) -> Tensor | None:
    """fp32 factors of squared errors [K/16, 16], or of products of errors [K/16, 16, 16]."""
    if importance is None:
        return None
    if objective != "mse":
        raise ValueError(f"importance weights squared errors, not {objective}")
    return of_features(importance, NVFP4_BLOCK) if importance.dim() == 1 else of_pairs(importance)


def _measure(objective: str, importance: Tensor | None) -> Callable[[Tensor], Tensor]:
    """What makes objectives [R, blocks] of signed errors [16, R, blocks]."""
    factors = _factors(objective, importance)
    if factors is None:
        return OBJECTIVES[objective]
    if factors.dim() == 3:
        return lambda error: quadratic(error, factors)
    by_feature = factors.t().unsqueeze(1)
    return lambda error: ordered_sum(error.square().mul_(by_feature))


def _choose(blocks: Tensor, scale: Tensor, rule: str, measure: Callable[[Tensor], Tensor]) -> Tensor:
    """Best candidate for each block of fp32 [16, ...], as E4M3 [...]."""
    candidates = _candidates(blocks.abs().amax(0).div_(E2M1_MAX * scale), rule)
    best = candidates[0]
    if len(candidates) == 1:
        return best
    lowest = measure(_error(blocks, best, scale))
    for candidate in candidates[1:]:
        error = measure(_error(blocks, candidate, scale))
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
    if rule == "exhaustive":
        tried = [codes, *(torch.full_like(codes, code) for code in range(1, LARGEST_CODE + 1))]
    else:
        tried = [codes + offset for offset in OFFSETS[rule]]
    return [code.clamp(1, LARGEST_CODE).to(torch.uint8).view(torch.float8_e4m3fn) for code in tried]


def _to_scale(plain: Tensor) -> Tensor:
    """E4M3 scale, never zero: an all-zero block takes the smallest positive one."""
    return plain.clamp(E4M3_TINY, E4M3_MAX).to(torch.float8_e4m3fn)


def _error(blocks: Tensor, block_scale: Tensor, scale: Tensor) -> Tensor:
    """w_hat - w of blocks [16, ...] under E4M3 scales [...]."""
    step = block_scale.float() * scale
    magnitude = blocks.abs()
    error = round_e2m1_magnitude(magnitude / step).mul_(step).sub_(magnitude)
    return torch.where(blocks < 0, -error, error)
