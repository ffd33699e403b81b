"""The small grids and the packing of codes, against ml_dtypes' number types and compressed-tensors' own helpers."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from snugfit.formats import grids

INFINITY = torch.tensor(float("inf"))


def e2m1_reference(values: Tensor) -> Tensor:
    """fp32 values as ml_dtypes rounds them to E2M1."""
    return torch.from_numpy(values.numpy().astype(ml_dtypes.float4_e2m1fn).astype(np.float32))


def e4m3_reference(values: Tensor) -> Tensor:
    """fp32 values as ml_dtypes rounds them to E4M3, after the clamp to +-448."""
    clamped = np.clip(values.numpy(), -448, 448)
    return torch.from_numpy(clamped.astype(ml_dtypes.float8_e4m3fn).astype(np.float32))


def round_e2m1(values: Tensor) -> Tensor:
    """E2M1 values nearest to fp32 numbers of either sign, by the rounding of magnitudes."""
    return grids.round_e2m1_magnitude(values.abs()).copysign_(values)


def around_ties(positive: Tensor) -> Tensor:
    """Grid values, the midpoints between neighbours, and the fp32 numbers next to both, of either sign."""
    grid = positive.float()
    points = torch.cat([grid, (grid[:-1] + grid[1:]) / 2])
    points = torch.cat([points, points.nextafter(INFINITY), points.nextafter(-INFINITY)])
    return torch.cat([points, -points])


def every_16_bit_number() -> Tensor:
    """All finite bf16 and fp16 numbers as fp32."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    numbers = torch.cat([bits.view(torch.bfloat16).float(), bits.view(torch.float16).float()])
    return numbers[numbers.isfinite()]


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two fp32 tensors agree bit for bit."""
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def test_e2m1_values_are_those_of_all_sixteen_codes() -> None:
    """Every nibble has the value that ml_dtypes' float4_e2m1fn gives it, the sign of zero included."""
    codes = torch.arange(16, dtype=torch.uint8)
    reference = codes.numpy().view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert same(grids.e2m1_values(codes), torch.from_numpy(reference))
    assert tuple(reference[:8]) == grids.E2M1_VALUES


def test_every_e2m1_code_comes_back_from_its_value() -> None:
    """Rounding a grid value changes nothing, and its nibble is the one that it came from."""
    codes = torch.arange(16, dtype=torch.uint8)
    values = grids.e2m1_values(codes)
    assert same(round_e2m1(values), values)
    assert torch.equal(grids.e2m1_codes(values.abs(), values.signbit()), codes)


def test_e2m1_ties_go_to_the_even_code() -> None:
    """Each midpoint between two E2M1 values goes to the one with the even code, and one fp32 step decides off it."""
    values = grids.e2m1_values(torch.arange(8, dtype=torch.uint8))
    ties = (values[:-1] + values[1:]) / 2
    even = torch.tensor([code if code % 2 == 0 else code + 1 for code in range(7)])
    assert torch.equal(round_e2m1(ties), values[even])
    assert torch.equal(round_e2m1(ties.nextafter(INFINITY)), values[1:])
    assert torch.equal(round_e2m1(ties.nextafter(-INFINITY)), values[:-1])
    assert torch.equal(round_e2m1(-ties), -values[even])


@pytest.mark.parametrize("case", ["ties", "16 bits", "random"])
def test_e2m1_rounds_as_ml_dtypes(case: str) -> None:
    """E2M1 rounding equals ml_dtypes bit for bit around ties, for all 16-bit floats and for random fp32 numbers."""
    generator = torch.Generator().manual_seed(0)
    values = {
        "ties": around_ties(torch.tensor(grids.E2M1_VALUES)),
        "16 bits": every_16_bit_number(),
        "random": torch.randn(100_000, generator=generator) * 3,
    }[case]
    assert same(round_e2m1(values), e2m1_reference(values))


def test_e2m1_saturates_at_six() -> None:
    """Anything above 6, infinity included, becomes 6 of its sign."""
    large = torch.tensor([6.0, 6.0000005, 7.0, 8.0, 1e30, float("inf")])
    assert torch.equal(round_e2m1(large), torch.full_like(large, 6.0))
    assert torch.equal(round_e2m1(-large), torch.full_like(large, -6.0))


def test_e2m1_magnitude_overwrites_its_argument() -> None:
    """round_e2m1_magnitude works in place, as its docstring says."""
    values = torch.tensor([0.3, 2.6])
    assert grids.round_e2m1_magnitude(values).data_ptr() == values.data_ptr()
    assert values.tolist() == [0.5, 3.0]


def test_e4m3_rounds_every_code_to_itself() -> None:
    """All 254 finite E4M3 codes keep their value and their bits."""
    codes = torch.arange(256, dtype=torch.uint8)
    finite = codes[(codes & 0x7F) != 0x7F]
    values = torch.from_numpy(finite.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    assert len(finite) == 254
    assert torch.equal(grids.to_e4m3(values).view(torch.uint8), finite)
    assert torch.equal(grids.round_e4m3_(values.clone()), values)
    assert values.max() == grids.E4M3_MAX
    assert values[values > 0].min() == grids.E4M3_TINY


@pytest.mark.parametrize("case", ["ties", "16 bits", "random"])
def test_e4m3_rounds_as_ml_dtypes(case: str) -> None:
    """Both E4M3 roundings equal ml_dtypes around every tie, subnormals included, and for all 16-bit floats."""
    codes = torch.arange(127, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    values = {
        "ties": around_ties(codes.view(torch.float8_e4m3fn).float()),
        "16 bits": every_16_bit_number(),
        "random": torch.randn(100_000, generator=generator) * torch.logspace(-4, 3, 100_000),
    }[case]
    expected = e4m3_reference(values)
    assert same(grids.to_e4m3(values).float(), expected)
    assert torch.equal(grids.round_e4m3_(values.clamp(-448, 448)), expected)


def test_e4m3_never_makes_nan_of_large_values() -> None:
    """Values beyond 464, which some casts turn into NaN, become +-448, infinity too."""
    large = torch.tensor([448.0, 463.9, 464.0, 464.1, 480.0, 1e30, float("inf")])
    assert torch.equal(grids.to_e4m3(large).float(), torch.full_like(large, 448.0))
    assert torch.equal(grids.to_e4m3(-large).float(), torch.full_like(large, -448.0))


def test_round_e4m3_gives_positive_zeros() -> None:
    """Whatever rounds to zero in place comes out as +0, and the argument itself is overwritten."""
    small = torch.tensor([0.0, -0.0, -(2.0**-11), 2.0**-10, -(2.0**-10)])
    rounded = grids.round_e4m3_(small)
    assert same(rounded, torch.zeros(5))
    assert rounded.data_ptr() == small.data_ptr()


def test_nibbles_pack_every_byte_with_the_even_column_low() -> None:
    """Unpacking and packing restores all 256 bytes, and the low half of a byte is the even column."""
    every_byte = torch.arange(256, dtype=torch.uint8).view(16, 16)
    nibbles = grids.unpack_nibbles(every_byte)
    assert torch.equal(nibbles[:, 0::2], every_byte & 15)
    assert torch.equal(nibbles[:, 1::2], every_byte >> 4)
    assert torch.equal(grids.pack_nibbles(nibbles), every_byte)


def test_nibbles_pack_as_compressed_tensors_packs_them() -> None:
    """Bytes of all pairs of E2M1 values, signed zeros included, equal those of compressed-tensors, both ways."""
    every_byte = torch.arange(256, dtype=torch.uint8).view(16, 16)
    values = grids.e2m1_values(grids.unpack_nibbles(every_byte))
    assert torch.equal(pack_fp4_to_uint8(values), every_byte)
    assert same(unpack_fp4_from_uint8(every_byte, 16, 32, dtype=torch.float32), values)


def test_pairs_are_the_values_of_unpacked_nibbles() -> None:
    """The look-up of whole bytes gives what unpacking them and looking up each nibble gives."""
    every_byte = torch.arange(256, dtype=torch.uint8).view(2, 8, 16)
    assert same(grids.e2m1_pairs(every_byte), grids.e2m1_values(grids.unpack_nibbles(every_byte)))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 19),
    columns=st.integers(1, 70),
    dim=st.sampled_from([0, 1]),
    seed=st.integers(0, 2**31),
)
def test_int4_words_are_those_of_compressed_tensors(rows: int, columns: int, dim: int, seed: int) -> None:
    """int32 words of 4-bit integers equal pack_to_int32's along either side, multiples of eight or not, and unpack."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-8, 8, (rows, columns), generator=generator, dtype=torch.int8)
    words = grids.pack_int4(values, dim=dim)
    assert words.is_contiguous()
    assert words.dtype == torch.int32
    assert torch.equal(words, pack_to_int32(values, 4, packed_dim=dim))
    assert torch.equal(grids.pack_int4(values.float(), dim=dim), words)
    ours = grids.unpack_int4(words, (rows, columns), dim=dim)
    assert ours.dtype == torch.int8
    assert torch.equal(ours, values)
    assert torch.equal(unpack_from_int32(words, 4, values.shape, packed_dim=dim), values)


def test_int4_packs_least_significant_first() -> None:
    """Column j of a word sits at bits 4j..4j+3 as value + 8, and the top bit wraps into the sign."""
    row = torch.tensor([[-8, -7, 0, 7, 1, -1, 3, 7]], dtype=torch.int8)
    expected = sum((int(value) + 8) << (4 * column) for column, value in enumerate(row[0]))
    assert int(grids.pack_int4(row)) % 2**32 == expected
    assert int(grids.pack_int4(row)) < 0
