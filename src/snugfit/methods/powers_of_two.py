"""NVFP4 of weights that lie on MXFP4's grid: block scales that are powers of two store them without an error.

gpt-oss's and DeepSeek-V4's experts are released in MXFP4, or in 16 bits made of it. A block of 32 values code * 2**e is
two blocks of 16 under the same power of two, which is an E4M3 scale times a global scale that is a power of two, too:
E4M3 has 2**-9 to 2**8. So a fused group is stored exactly if its blocks' scales lie within a factor of 2**17; values of
smaller blocks round to the nearest.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from snugfit.formats.grids import E2M1_MAX, round_e2m1_magnitude
from snugfit.formats.spec import NVFP4_BLOCK

LARGEST, SMALLEST = 8, -9  # exponents of E4M3's powers of two
CHECKED_OUTPUTS = 16  # of a weight, before all of it
_OUTPUTS = 1024  # looked at at once
_NONE = -200  # of a block of zeros


def exact_global_scale(weights: Iterable[Tensor]) -> Tensor | None:
    """The global scale under which `block_scales` store weights [N, K] exactly; None unless all are on MXFP4's grid."""
    weights = list(weights)
    if any(weight.shape[-1] % NVFP4_BLOCK for weight in weights):
        return None
    if not all(_is_on_grid(weight[:CHECKED_OUTPUTS]) for weight in weights):
        return None
    if not all(_is_on_grid(part) for weight in weights for part in weight.split(_OUTPUTS)):
        return None
    largest = torch.stack([_exponents(part).amax() for weight in weights for part in weight.split(_OUTPUTS)]).amax()
    if int(largest) <= -118 or int(largest) > 120:  # no weights; out of fp32's range with their divisors
        return None
    return torch.ldexp(torch.ones((), device=largest.device), largest - LARGEST)


def block_scales(weight: Tensor, global_scale: Tensor) -> Tensor:
    """Block scales, E4M3 [N, K/16]: of each block the smallest power of two under which it saturates nowhere."""
    relative = _exponents(weight) - torch.frexp(global_scale).exponent + 1
    exponents = relative.clamp(SMALLEST, LARGEST)
    return torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents).to(torch.float8_e4m3fn)


def _exponents(weight: Tensor) -> Tensor:
    """Of each block of 16 values the smallest e with amax <= 6 * 2**e, int32 [N, K/16]."""
    amax = weight.float().unflatten(-1, (-1, NVFP4_BLOCK)).abs().amax(-1)
    fraction, exponent = torch.frexp(amax)  # amax = fraction * 2**exponent, 0.5 <= fraction < 1
    found = torch.where(fraction > E2M1_MAX / 8, exponent - 2, exponent - 3)
    return torch.where(amax == 0, _NONE, found)


def _is_on_grid(weight: Tensor) -> bool:
    """Whether each block of 16 values is E2M1's under a power of two; its smallest, for larger ones give subsets."""
    blocks = weight.float().unflatten(-1, (-1, NVFP4_BLOCK)).abs()
    scaled = torch.ldexp(blocks, -_exponents(weight).clamp(min=-126).unsqueeze(-1))
    return bool((round_e2m1_magnitude(scaled.clone()) == scaled).all())
