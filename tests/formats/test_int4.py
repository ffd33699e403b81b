"""INT4 in groups: scales, zero points and the error that they allow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from snugfit.formats import grids, int4

GROUPS = [32, 64, 128]


def random_weight(seed: int, dtype: torch.dtype = torch.float32, shift: float = 0.0) -> Tensor:
    """A weight [11, 256] with rows of different sizes, moved by `shift`."""
    generator = torch.Generator().manual_seed(seed)
    return ((torch.randn(11, 256, generator=generator) + shift) * torch.logspace(-2, 1, 11).unsqueeze(1)).to(dtype)


def errors(weight: Tensor, quantized: int4.INT4Weight) -> Tensor:
    """|error| in units of the group's scale, [11, groups, group]."""
    scale = quantized.scale.float().unsqueeze(-1)
    error = (int4.dequantize(quantized) - weight.float()).abs()
    return error.view(*scale.shape[:2], -1) / scale


@pytest.mark.parametrize("group", GROUPS)
def test_symmetric_codes_are_within_half_a_step(group: int) -> None:
    """Symmetric: scale = amax / 7.5, so no weight is farther than half a step from its stored value."""
    weight = random_weight(0)
    quantized = int4.quantize(weight, group_size=group, symmetric=True)
    assert quantized.zero_point is None
    assert torch.equal(quantized.scale, weight.view(11, -1, group).abs().amax(-1) / 7.5)
    assert float(errors(weight, quantized).max()) <= 0.5 + 1e-5


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("shift", [-3.0, 0.0, 3.0])
def test_asymmetric_codes_are_within_a_step(group: int, shift: float) -> None:
    """Asymmetric: scale spans the group with zero, the zero point is a code, and the ends lose at most half a step."""
    weight = random_weight(1, shift=shift)
    quantized = int4.quantize(weight, group_size=group, symmetric=False)
    assert quantized.zero_point is not None
    assert quantized.zero_point.dtype == torch.int8
    assert int(quantized.zero_point.min()) >= -8
    assert int(quantized.zero_point.max()) <= 7
    # rounding the zero point moves the range by up to half a step, which its far end then loses beside its own half
    assert float(errors(weight, quantized).max()) <= 1.0 + 1e-4
    groups = weight.view(11, -1, group)
    span = groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)
    assert torch.allclose(quantized.scale, span / 15, rtol=1e-6)


def test_asymmetric_beats_symmetric_on_shifted_weights() -> None:
    """Weights of one sign lose less with a zero point."""
    weight = random_weight(2, shift=4.0)
    losses = [
        float((int4.dequantize(int4.quantize(weight, group_size=64, symmetric=symmetric)) - weight).square().sum())
        for symmetric in (True, False)
    ]
    assert losses[1] < losses[0]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_groups_and_the_argument_survive(dtype: torch.dtype, *, symmetric: bool) -> None:
    """An all-zero group comes back as zeros under a finite scale, zero stays zero, and the weight is untouched."""
    weight = random_weight(3, dtype)
    weight[2, :64] = 0
    weight[:, 100] = 0
    before = weight.clone()
    quantized = int4.quantize(weight, group_size=32, symmetric=symmetric)
    back = int4.dequantize(quantized)
    assert torch.equal(weight, before)
    assert quantized.scale.dtype == dtype
    assert float(quantized.scale[2, 0]) == torch.finfo(dtype).eps
    assert torch.equal(back[2, :64], torch.zeros(64))
    assert torch.equal(back[:, 100], torch.zeros(11))


def test_codes_use_both_ends() -> None:
    """Symmetric codes run from -8 to 7: amax / 7.5 puts both ends half a step off, and the tie goes to the even -8."""
    weight = torch.tensor([[-7.5, 7.5, -7.4, 6.6, 0.5, 1.5, *[0.0] * 26]])
    codes = grids.unpack_int4(int4.quantize(weight, group_size=32, symmetric=True).packed, (1, 32))
    assert codes[0, :7].tolist() == [-8, 7, -7, 7, 0, 2, 0]
