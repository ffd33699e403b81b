"""Rounds to the small grids of numbers, and packs codes.

E2M1 is a float of one sign, two exponent and one mantissa bit: magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6. E4M3 is torch's
float8_e4m3fn: largest finite value 448, smallest positive 2**-9. All rounding is to nearest, ties to the even code.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_TINY = 2.0**-9
FP32_TINY = 2.0**-126  # the smallest normal fp32 number
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

# Adding and subtracting 2**22 times a value's power of two leaves one mantissa bit of it, rounded by the hardware to
# nearest even: an fp32 number has 23. The sum's exponent field is the value's plus 22.
_ONE_MANTISSA_BIT = 22 << 23
_THREE_MANTISSA_BITS = 20 << 23
_EXPONENT = 0x7F800000


def divide(values: Tensor, number: float) -> Tensor:
    """values / number, rounded once on every device.

    On CUDA torch multiplies by the reciprocal of a Python number, which gives another last bit than the CPU does. A
    divisor that is a tensor of the same device is divided by.
    """
    return values / torch.full((), number, dtype=values.dtype, device=values.device)


def round_e2m1_magnitude(magnitude: Tensor) -> Tensor:
    """E2M1 values nearest to non-negative fp32 numbers, saturating at 6; overwrites and returns its argument."""
    magnitude.clamp_(max=E2M1_MAX)
    # below 1 the grid is subnormal: its step stays that of [1, 2)
    anchor = magnitude.clamp(min=1.0).view(torch.int32)
    anchor.bitwise_and_(_EXPONENT).add_(_ONE_MANTISSA_BIT)
    offset = anchor.view(torch.float32)
    return magnitude.add_(offset).sub_(offset)


def e2m1_codes(magnitude: Tensor, negative: Tensor) -> Tensor:
    """Nibbles (uint8, sign << 3 | index) of E2M1 magnitudes; `negative` is a bool tensor of the same shape.

    The index is 2v up to 2, then grows by one a step: 2v - max(v-2, 0) - max(v-4, 0)/2.
    """
    index = 2 * magnitude - (magnitude - 2).relu_() - (magnitude - 4).relu_().mul_(0.5)
    return index.to(torch.uint8).add_(negative.to(torch.uint8), alpha=8)


def e2m1_values(codes: Tensor) -> Tensor:
    """fp32 values of E2M1 nibbles (uint8 0..15)."""
    table = torch.tensor((*E2M1_VALUES, *(-v for v in E2M1_VALUES)), dtype=torch.float32, device=codes.device)
    return table[codes.to(torch.int32)]


def e2m1_pairs(packed: Tensor) -> Tensor:
    """fp32 values [..., 2K] of packed nibbles uint8 [..., K]: one look-up gives both halves of a byte."""
    found = _pairs_of_bytes(packed.device).index_select(0, packed.flatten().to(torch.int32))
    return found.view(packed.shape).view(torch.float32)


@cache
def _pairs_of_bytes(device: torch.device) -> Tensor:
    """The two fp32 values of every byte's nibbles as one int64 each, [256]: a CPU looks numbers up faster than rows.

    Made once: a GPU waits while a table is copied to it.
    """
    values = e2m1_values(unpack_nibbles(torch.arange(256, dtype=torch.uint8, device=device).unsqueeze(-1)))
    return values.view(torch.int64).squeeze(-1)


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 [..., K/2] from nibbles uint8 [..., K]; the even index takes the low half."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Nibbles uint8 [..., 2K] from uint8 [..., K], the low half first."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def to_e4m3(values: Tensor) -> Tensor:
    """float8_e4m3fn nearest to fp32 values, clamped to +-448 first: the bare cast turns values above 464 into NaN."""
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def round_e4m3_(values: Tensor) -> Tensor:
    """Round fp32 values within +-448 to the E4M3 grid, in place: `to_e4m3` without the slow casts.

    Zeros come out positive.
    """
    anchor = values.abs().clamp_(min=2.0**-6).view(torch.int32)
    anchor.bitwise_and_(_EXPONENT).add_(_THREE_MANTISSA_BITS)
    # 1.5 times the power of two keeps the sum in one binade for either sign
    offset = anchor.view(torch.float32).mul_(1.5)
    return values.add_(offset).sub_(offset)


def pack_int4(values: Tensor, *, dim: int = 1) -> Tensor:
    """int32 words of eight signed 4-bit integers (stored as value + 8), lowest bits first, along `dim`.

    `values` is a tensor [N, K] of whole numbers within -8..7; a last partial word is filled with stored 0.
    """
    if dim == 0:
        return pack_int4(values.t()).t().contiguous()
    n, k = values.shape
    stored = values.to(torch.int32) + 8
    if k % 8:
        stored = torch.nn.functional.pad(stored, (0, 8 - k % 8))
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=values.device)
    # eight disjoint nibbles: a sum is their union, and int32 wraps the top one into the sign as it should
    return (stored.view(n, -1, 8) << shifts).sum(-1, dtype=torch.int64).to(torch.int32)


def unpack_int4(words: Tensor, shape: tuple[int, int], *, dim: int = 1) -> Tensor:
    """int8 values -8..7 of shape [N, K] from `pack_int4`'s words."""
    return unpack_integers(words, shape, bits=4, dim=dim)


def unpack_integers(words: Tensor, shape: tuple[int, int], *, bits: int, dim: int = 1) -> Tensor:
    """int8 values of shape [N, K] from int32 words of 32 / `bits` integers (4 or 8 bits), lowest bits first."""
    if dim == 0:
        return unpack_integers(words.t().contiguous(), (shape[1], shape[0]), bits=bits).t().contiguous()
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    stored = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return (stored.flatten(1)[:, : shape[1]] - (1 << (bits - 1))).to(torch.int8)


def powers_of_two(exponents: Tensor) -> Tensor:
    """fp32 values 2**(e - 127) of E8M0 exponents (uint8); 255 is NaN."""
    return exponents.view(torch.float8_e8m0fnu).float()
