"""Integers under scales: groups and zero points of weights, engines' rules for 8-bit inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from snugfit.formats import integer


def codes_of(rows: int = 6, columns: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-128, 128, (rows, columns), generator=generator, dtype=torch.int8)


@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (6, 1), (6, 2), (6, 3), (6, 24)])
@pytest.mark.parametrize("zero_points", [True, False])
def test_every_value_takes_its_groups_scale_and_zero_point(rows: int, groups: int, *, zero_points: bool) -> None:
    """value = (code - zero point) * scale, of the group and row it stands in, or of the whole weight."""
    codes = codes_of()
    generator = torch.Generator().manual_seed(1)
    scale = torch.rand(rows, groups, generator=generator).bfloat16()
    zero_point = torch.randint(-128, 128, (rows, groups), generator=generator, dtype=torch.int8)
    found = integer.dequantize(integer.IntegerWeight(codes, scale, zero_point if zero_points else None))
    for row in range(6):
        for column in range(24):
            place = min(row, rows - 1), column * groups // 24
            offset = float(zero_point[place]) if zero_points else 0.0
            assert float(found[row, column]) == pytest.approx(
                (float(codes[row, column]) - offset) * float(scale[place])
            )


@pytest.mark.parametrize("zero_points", [True, False])
def test_columns_may_name_their_groups(*, zero_points: bool) -> None:
    """With a group a column, values are those of the weight whose neighbours form groups, columns moved along."""
    codes, order = codes_of(), torch.randperm(24, generator=torch.Generator().manual_seed(2))
    scale = torch.rand(6, 3, generator=torch.Generator().manual_seed(3))
    zero_point = codes[:, :3].contiguous() if zero_points else None
    plain = integer.dequantize(integer.IntegerWeight(codes, scale, zero_point))
    moved = integer.IntegerWeight(codes[:, order], scale, zero_point, (order // 8).to(torch.int32))
    assert torch.equal(integer.dequantize(moved), plain[:, order])


def test_dynamic_scales_use_the_range() -> None:
    """Symmetric inputs come back within amax / 254 and keep amax; asymmetric ones within range / 510 and their ends."""
    activations = torch.randn(5, 64, generator=torch.Generator().manual_seed(4)) + 3.0
    amax, span = activations.abs().amax(1, keepdim=True), activations.amax(1) - activations.amin(1)
    symmetric = integer.quantize_dequantize_input(activations)
    assert ((symmetric - activations).abs() <= amax / 254 * (1 + 1e-5)).all()
    assert torch.allclose(symmetric.abs().amax(1, keepdim=True), amax)
    asymmetric = integer.quantize_dequantize_input_asymmetric(activations)
    # the zero point is rounded as well
    assert ((asymmetric - activations).abs() <= span.unsqueeze(1) / 255 * (1 + 1e-4)).all()
    assert float((asymmetric - activations).square().sum()) < float((symmetric - activations).square().sum())


def test_static_scales_saturate() -> None:
    """Under a given multiplier and zero point values end at (-128 - z) s and (127 - z) s."""
    activations = torch.tensor([[-1e6, -1.0, 0.0, 0.26, 1e6]])
    plain = integer.quantize_dequantize_input_static(activations, torch.tensor(0.5))
    assert plain.tolist() == [[-64.0, -1.0, 0.0, 0.5, 63.5]]
    moved = integer.quantize_dequantize_input_static(activations, torch.tensor(0.5), torch.tensor(-28.0))
    assert moved.tolist() == [[-50.0, -1.0, 0.0, 0.5, 77.5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_are_left_alone_and_zeros_stay(dtype: torch.dtype) -> None:
    """No rule writes into its argument, and tokens of zeros come back as zeros."""
    activations = torch.randn(3, 16, generator=torch.Generator().manual_seed(5)).to(dtype)
    activations[1] = 0
    before = activations.clone()
    for found in (
        integer.quantize_dequantize_input(activations),
        integer.quantize_dequantize_input_asymmetric(activations),
        integer.quantize_dequantize_input_static(activations, torch.tensor(0.1)),
    ):
        assert found.dtype == dtype
        assert not found[1].any()
    assert torch.equal(activations, before)
