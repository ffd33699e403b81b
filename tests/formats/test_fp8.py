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
    quantized = fp8.quantize(weight.clone())
    expected = (weight.double().abs().amax(1, keepdim=True).float() / 448).to(dtype)
    assert quantized.scale.dtype == dtype
    assert torch.equal(quantized.scale, expected)
    largest = quantized.codes.float().abs().amax(1)
    assert torch.equal(largest, torch.full((16,), 448.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_within_half_a_step(dtype: torch.dtype) -> None:
    """Every dequantized weight is within E4M3's relative half step of the original, or half a subnormal step."""
    weight = random_rows(1).to(dtype)
    quantized = fp8.quantize(weight.clone())
    error = (fp8.dequantize(quantized) - weight.float()).abs()
    # the scale's own rounding can cut the row's largest value: by half a bf16 step at most
    bound = torch.maximum(weight.float().abs() * (2.0**-4 + 2.0**-9), quantized.scale.float() * 2.0**-10)
    assert (error <= bound * (1 + 1e-5)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_zero_rows_stay_zero_under_a_finite_scale(dtype: torch.dtype) -> None:
    """An all-zero row gets the dtype's epsilon as its scale, and zeros come back."""
    weight = random_rows(2).to(dtype)
    weight[3] = 0
    quantized = fp8.quantize(weight.clone())
    assert float(quantized.scale[3]) == torch.finfo(dtype).eps
    assert torch.equal(fp8.dequantize(quantized)[3], torch.zeros(48))


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


@pytest.mark.parametrize("block", [(4, 8), (5, 7), (16, 48), (100, 100)])
def test_blocks_take_their_own_scale(block: tuple[int, int]) -> None:
    """Each value is its code times the scale of the block it stands in, also in blocks cut off at the edges."""
    codes = random_rows(5).clamp(-448, 448).to(torch.float8_e4m3fn)
    grid = -(-16 // block[0]), -(-48 // block[1])
    scale = torch.rand(grid, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = fp8.dequantize(fp8.FP8Weight(codes, scale, block))
    for row, column in ((0, 0), (3, 9), (15, 47), (8, 24), (15, 0)):
        expected = codes[row, column].float() * scale[row // block[0], column // block[1]].float()
        assert found[row, column] == expected
    with pytest.raises(ValueError, match="scales for blocks"):
        fp8.dequantize(fp8.FP8Weight(codes, torch.ones(grid[0] + 1, grid[1]), block))


def test_requantized_codes_are_the_nearest_under_the_new_scale() -> None:
    """Under a scale three times as large each value moves by half a step of that scale at most, zero stays."""
    quantized = fp8.quantize(random_rows(6))
    scale = quantized.scale.amax() * 3
    moved = fp8.requantize(quantized, scale)
    assert moved.scale.shape == (1, 1)
    exact, found = fp8.dequantize(quantized), fp8.dequantize(moved)
    assert ((found - exact).abs() <= torch.maximum(exact.abs() * 2.0**-4, scale * 2.0**-10) * (1 + 1e-6)).all()
    assert not found[exact == 0].any()
    assert torch.equal(fp8.dequantize(fp8.requantize(moved, scale)), found)


@pytest.mark.parametrize("columns", [128, 256, 300, 40])
def test_groups_of_inputs_take_their_own_scale(columns: int) -> None:
    """A group of 128 columns, the last one smaller, is rounded as a token of that width would be."""
    activations = random_rows(7, columns=columns)
    found = fp8.quantize_dequantize_input_groups(activations, 128)
    parts = [fp8.quantize_dequantize_input(part) for part in activations.split(128, 1)]
    assert torch.equal(found, torch.cat(parts, 1))


def test_a_static_scale_saturates() -> None:
    """Under a given multiplier inputs are E4M3 times that multiplier, at most 448 of it."""
    activations = random_rows(8)
    found = fp8.quantize_dequantize_input_static(activations, torch.tensor(0.1))
    expected = (activations / 0.1).clamp(-448, 448).to(torch.float8_e4m3fn).float() * 0.1
    assert torch.equal(found, expected)
    assert float(found.abs().max()) == pytest.approx(44.8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (130, 129), (1, 300)])
def test_blocks_are_quantized_as_rows_of_one_block(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """A block's scale is its amax / 448 in the weight's dtype, and its codes are those of one long row of it."""
    weight = random_rows(9, *shape).to(dtype)
    before = weight.clone()
    quantized = fp8.quantize_blocks(weight, (128, 128))
    assert torch.equal(weight, before)
    assert (quantized.codes.shape, quantized.scale.shape) == (shape, (-(-shape[0] // 128), -(-shape[1] // 128)))
    assert quantized.codes.is_contiguous()
    for i in range(quantized.scale.shape[0]):
        for j in range(quantized.scale.shape[1]):
            place = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            alone = fp8.quantize(weight[place].reshape(1, -1))
            assert torch.equal(quantized.scale[i, j], alone.scale[0, 0])
            assert torch.equal(quantized.codes[place].flatten().float(), alone.codes[0].float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_zero_blocks_stay_zero_under_a_finite_scale(dtype: torch.dtype) -> None:
    """An all-zero block gets the dtype's epsilon as its scale, and zeros come back."""
    weight = random_rows(10, 128, 256).to(dtype)
    weight[:, 128:] = 0
    quantized = fp8.quantize_blocks(weight, (128, 128))
    assert float(quantized.scale[0, 1]) == torch.finfo(dtype).eps
    assert not fp8.dequantize(quantized)[:, 128:].any()
