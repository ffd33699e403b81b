"""FP8: one scale an output channel for weights, one a token for activations."""

from __future__ import annotations

import pytest
import torch

from snugfit.formats import fp8

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_rows(seed: int, rows: int = 16, columns: int = 48) -> torch.Tensor:
    """fp32 rows of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.logspace(-2, 2, rows).unsqueeze(1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_is_the_row_maximum_over_448_in_the_weights_dtype(dtype: torch.dtype) -> None:
    """A row's scale is amax / 448 rounded to the weight's dtype, and its codes use all of +-448."""
    weight = random_rows(0).to(dtype)
    stored = fp8.quantize(weight.clone())
    expected = (weight.double().abs().amax(1, keepdim=True).float() / 448).to(dtype)
    assert stored.scale.dtype == dtype
    assert torch.equal(stored.scale, expected)
    largest = stored.codes.float().abs().amax(1)
    assert torch.equal(largest, torch.full((16,), 448.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_within_half_a_step(dtype: torch.dtype) -> None:
    """Every dequantized weight is within E4M3's relative half step of the original, or half a subnormal step."""
    weight = random_rows(1).to(dtype)
    stored = fp8.quantize(weight.clone())
    error = (fp8.dequantize(stored) - weight.float()).abs()
    # the scale's own rounding can cut the row's largest value: by half a bf16 step at most
    bound = torch.maximum(weight.float().abs() * (2.0**-4 + 2.0**-9), stored.scale.float() * 2.0**-10)
    assert (error <= bound * (1 + 1e-5)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_zero_rows_stay_zero_under_a_finite_scale(dtype: torch.dtype) -> None:
    """An all-zero row gets the dtype's epsilon as its scale, and zeros come back."""
    weight = random_rows(2).to(dtype)
    weight[3] = 0
    stored = fp8.quantize(weight.clone())
    assert float(stored.scale[3]) == torch.finfo(dtype).eps
    assert torch.equal(fp8.dequantize(stored)[3], torch.zeros(48))


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32), *DTYPES[1:]])
def test_quantize_leaves_the_weight_alone(dtype: torch.dtype) -> None:
    """Quantizing a weight of any dtype does not write into it."""
    weight = random_rows(3).to(dtype)
    before = weight.clone()
    fp8.quantize(weight)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32), *DTYPES[1:]])
def test_input_quantization_leaves_the_activations_alone(dtype: torch.dtype) -> None:
    """Imitating an engine's activations of any dtype does not write into the given ones."""
    activations = random_rows(4).to(dtype)
    before = activations.clone()
    fp8.quantize_dequantize_input(activations)
    assert torch.equal(activations, before)


def test_tokens_smaller_than_engines_resolve_use_the_least_scale() -> None:
    """A token with amax below 448 times the engines' least scale is rounded under that scale, and zeros stay zero."""
    tokens = torch.tensor([[1e-3, -3e-4, 0.0], [0.0, 0.0, 0.0]])
    seen = fp8.quantize_dequantize_input(tokens.clone())
    expected = (tokens[0] / fp8.TOKEN_SCALE_MIN).to(torch.float8_e4m3fn).float() * fp8.TOKEN_SCALE_MIN
    assert torch.equal(seen[0], expected)
    assert torch.equal(seen[1], torch.zeros(3))


def test_each_token_has_a_scale_of_its_own() -> None:
    """A token's result does not depend on the other tokens of the batch, and the shape is kept."""
    tokens = random_rows(5)
    together = fp8.quantize_dequantize_input(tokens.view(2, 8, 48).clone())
    alone = torch.stack([fp8.quantize_dequantize_input(token.clone()) for token in tokens])
    assert torch.equal(together, alone.view(2, 8, 48))
