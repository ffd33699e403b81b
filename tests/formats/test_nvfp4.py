"""NVFP4 under given scales: codes, the scale that survives its own reciprocal, activations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from snugfit.formats import grids, nvfp4

E4M3 = torch.float8_e4m3fn


def heavy_tailed(rows: int, columns: int, seed: int) -> Tensor:
    """fp32 [rows, columns] whose blocks differ in size by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(rows, columns // 16, generator=generator).mul_(2).exp_().repeat_interleave(16, 1)
    return torch.randn(rows, columns, generator=generator) * spread


def test_stable_reciprocal_is_stable_for_every_mantissa() -> None:
    """For all 2**23 mantissas the scale equals the reciprocal of its reciprocal and is within one step of the given."""
    bits = torch.arange(2**23, dtype=torch.int32) | (127 << 23)
    given = bits.view(torch.float32)
    stable = nvfp4.stable_reciprocal_scale(given)
    divisor = stable.reciprocal()
    assert torch.equal(divisor.reciprocal(), stable)
    steps = stable.view(torch.int32) - bits
    assert int(steps.abs().max()) == 1
    assert 0 < int((steps != 0).sum()) < 2**23


@pytest.mark.parametrize("exponent", [-125, -60, -20, 20, 60, 125])
def test_stable_reciprocal_is_stable_in_other_binades(exponent: int) -> None:
    """A power of two changes nothing: random mantissas far from 1 survive being stored as reciprocals."""
    generator = torch.Generator().manual_seed(exponent)
    given = (torch.rand(100_000, generator=generator) + 1) * 2.0**exponent
    stable = nvfp4.stable_reciprocal_scale(given)
    assert torch.equal(stable.reciprocal().reciprocal(), stable)
    assert torch.isfinite(stable).all()


def test_codes_are_the_nearest_values_under_the_step() -> None:
    """Each stored value is no farther from w than any other of the 16 code values times the block's step."""
    weight = heavy_tailed(8, 64, seed=0)
    scale = torch.tensor(0.01)
    generator = torch.Generator().manual_seed(1)
    block_scale = torch.randint(8, 127, (8, 4), generator=generator, dtype=torch.uint8).view(E4M3)
    quantized = nvfp4.quantize(weight, block_scale, scale)
    chosen = (nvfp4.dequantize(quantized) - weight).abs()
    step = (block_scale.float() * scale).repeat_interleave(16, 1)
    every_value = grids.e2m1_values(torch.arange(16, dtype=torch.uint8))
    best = (every_value * step.unsqueeze(-1) - weight.unsqueeze(-1)).abs().amin(-1)
    assert torch.allclose(chosen, best, rtol=1e-5, atol=0)


def test_negative_values_that_round_to_zero_keep_their_sign_bit() -> None:
    """A negative weight below a quarter step is stored as nibble 8, plus zero and minus zero as nibble 0."""
    weight = torch.tensor([[-0.1, 0.1, 0.0, -0.0, -0.25, 0.25, -6.0, 6.0, *[0.0] * 8]])
    one = torch.ones(1, 1).to(E4M3)
    quantized = nvfp4.quantize(weight, one, torch.tensor(1.0))
    assert grids.unpack_nibbles(quantized.packed)[0, :8].tolist() == [8, 0, 0, 0, 8, 0, 15, 7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantize_leaves_the_weight_alone(dtype: torch.dtype) -> None:
    """Quantizing a weight or activations of any dtype does not write into them."""
    weight = heavy_tailed(4, 32, seed=0).to(dtype)
    before = weight.clone()
    quantized = nvfp4.quantize(weight, torch.ones(4, 2).to(E4M3), torch.tensor(1.0))
    nvfp4.quantize_dequantize_input(weight, torch.tensor(0.01))
    nvfp4.dequantize(quantized)
    assert torch.equal(weight, before)


def test_input_scale_lets_the_largest_activation_just_fit() -> None:
    """Under the scale made of amax, an activation of that size comes back with its own value up to fp32 rounding."""
    amax = 37.3
    scale = nvfp4.input_global_scale(amax)
    assert scale.shape == ()
    assert scale.dtype == torch.float32
    assert torch.equal(scale.reciprocal().reciprocal(), scale)
    activations = torch.zeros(1, 16)
    activations[0, 3] = -amax
    seen = nvfp4.quantize_dequantize_input(activations, scale)
    assert float(seen[0, 3]) == pytest.approx(-amax, rel=1e-6)
    assert int((seen != 0).sum()) == 1


def test_activations_beyond_the_calibrated_range_saturate() -> None:
    """An activation above the calibrated amax becomes that amax, not infinity and not NaN."""
    scale = nvfp4.input_global_scale(2.0)
    seen = nvfp4.quantize_dequantize_input(torch.full((2, 16), 1e6), scale)
    assert torch.allclose(seen, torch.full((2, 16), 2.0), rtol=1e-6)


def test_all_zero_activations_stay_zero() -> None:
    """A block without any activation gives zeros beside blocks that have some."""
    activations = heavy_tailed(3, 32, seed=2)
    activations[:, :16] = 0
    seen = nvfp4.quantize_dequantize_input(activations, nvfp4.input_global_scale(float(activations.abs().max())))
    assert torch.equal(seen[:, :16], torch.zeros(3, 16))
    assert (seen[:, 16:] != 0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_activations_keep_dtype_and_shape(dtype: torch.dtype) -> None:
    """Activations of any leading shape come back in it, in their own dtype, as the fp32 result rounded once."""
    activations = heavy_tailed(6, 48, seed=3).view(2, 3, 48).to(dtype)
    scale = nvfp4.input_global_scale(float(activations.abs().max()))
    seen = nvfp4.quantize_dequantize_input(activations, scale)
    assert seen.dtype == dtype
    assert seen.shape == activations.shape
    assert torch.equal(seen, nvfp4.quantize_dequantize_input(activations.float(), scale).to(dtype))


def test_blocks_whose_scale_rounds_to_zero_give_zeros() -> None:
    """Where amax_block / (6 g) is at most 2**-10 its E4M3 scale is 0, and an engine sees zeros in that block."""
    activations = torch.full((2, 32), 0.9)
    activations[:, :16] = torch.tensor([[0.5], [1.0]]) * 6 * 2.0**-10
    seen = nvfp4.quantize_dequantize_input(activations, torch.tensor(1.0))
    assert torch.equal(seen[:, :16], torch.zeros(2, 16))


def test_the_smallest_input_scale_is_positive_and_finite_as_divisor() -> None:
    """An amax so small that its divisor would overflow gives a scale whose reciprocal is still a finite number."""
    scale = nvfp4.input_global_scale(1e-36)
    assert float(scale) > 0
    assert float(scale.reciprocal()) < float("inf")
