"""MXFP4: powers of two as scales, against ml_dtypes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from snugfit.formats import grids, mxfp4


def test_exponents_are_those_of_ml_dtypes() -> None:
    """All 256 E8M0 bytes have ml_dtypes' values, 255 NaN."""
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    expected = torch.from_numpy(every.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32))
    assert torch.equal(grids.powers_of_two(every).nan_to_num(-1), expected.nan_to_num(-1))
    assert torch.isnan(expected[255])


def test_every_code_under_every_scale() -> None:
    """A weight's value is that of its nibble, the low one first, times the power of two of its block of 32."""
    packed = torch.arange(256, dtype=torch.int32).to(torch.uint8).reshape(8, 32)
    exponent = torch.tensor([[0, 1], [120, 121], [127, 128], [130, 100], [90, 140], [127, 127], [126, 125], [252, 3]])
    found = mxfp4.dequantize(mxfp4.MXFP4Weight(packed, exponent.to(torch.uint8)))
    nibbles = torch.stack((packed & 15, packed >> 4), -1).flatten(1).numpy().astype(np.uint8)
    values = torch.from_numpy(nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float64))
    expected = values * 2.0 ** (exponent.double() - 127).repeat_interleave(32, 1)
    assert torch.equal(found.double(), expected)


def test_inputs_take_the_smallest_power_of_two_that_fits() -> None:
    """A block's step is the least power of two s with amax <= 6 s, so that its largest value is rounded, never cut."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randn(500, 32, generator=generator) * torch.randn(500, 1, generator=generator).mul(4).exp()
    blocks[:4, 0] = torch.tensor([6.0, 6.0 * 2**-7, 3.0, 1.5]) * 2
    blocks[:4, 1:] *= 1e-3
    exact = blocks.double()
    step = 2.0 ** torch.ceil(torch.log2(exact.abs().amax(1, keepdim=True) / 6))
    codes = (exact / step).float().numpy().astype(ml_dtypes.float4_e2m1fn).astype(np.float64)
    found = mxfp4.quantize_dequantize_input(blocks)
    assert torch.equal(found.double(), torch.from_numpy(codes) * step)
    assert torch.equal(found[:4, 0], blocks[:4, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inputs_are_left_alone_and_zeros_stay(dtype: torch.dtype) -> None:
    """Rounding keeps dtype and shape, does not write into its argument, and gives zeros for a block of zeros."""
    activations = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    activations[0, 0, :32] = 0
    before = activations.clone()
    found = mxfp4.quantize_dequantize_input(activations)
    assert torch.equal(activations, before)
    assert (found.dtype, found.shape) == (dtype, activations.shape)
    assert not found[0, 0, :32].any()
    assert found[0, 0, 32:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_rounded_under_given_exponents(dtype: torch.dtype) -> None:
    """Codes are the nearest E2M1 numbers under each block's power of two, saturating at 6, as ml_dtypes rounds."""
    generator = torch.Generator().manual_seed(2)
    weight = (torch.randn(40, 96, generator=generator) * torch.randn(40, 1, generator=generator).exp()).to(dtype)
    before = weight.clone()
    exponent = torch.randint(124, 129, (40, 3), generator=generator).to(torch.uint8)
    quantized = mxfp4.quantize(weight, exponent)
    assert torch.equal(weight, before)
    step = 2.0 ** (exponent.double() - 127).repeat_interleave(32, 1)
    codes = (weight.double() / step).float().numpy().astype(ml_dtypes.float4_e2m1fn).astype(np.float64)
    assert torch.equal(mxfp4.dequantize(quantized).double(), torch.from_numpy(codes) * step)
    assert quantized.packed.shape == (40, 48)
    assert float(mxfp4.dequantize(quantized).abs().max()) == 6 * float(step[weight.abs() > 6 * step].max())
