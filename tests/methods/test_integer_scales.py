"""INT4 scales chosen by error: never worse than the plain ones, and what importance asks for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from snugfit.formats import int4
from snugfit.methods import integer_scales

GROUPS = [32, 64, 128]


def random_weight(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[40, 256], some rows of one sign."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(40, 256, generator=generator)
    weight[::5] += 3
    return weight.to(dtype)


def group_errors(weight: Tensor, scale: Tensor, zero: Tensor | None, factors: Tensor | None = None) -> Tensor:
    """The squared error [N, groups] of what files hold."""
    square = (int4.dequantize(int4.quantize_under(weight, scale, zero)) - weight.float()).double().square()
    weighted = square if factors is None else square * factors.double()
    return weighted.reshape(*scale.shape, -1).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", GROUPS)
def test_with_one_factor_scales_are_the_plain_ones(
    group: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, *, symmetric: bool
) -> None:
    """The first candidate is the range as it is: with no other the codes are those of `int4.quantize`."""
    monkeypatch.setattr(integer_scales, "FACTORS", integer_scales.FACTORS[:1])
    weight = random_weight(0, dtype)
    found = int4.quantize_under(weight, *integer_scales.integer_scales(weight, group, symmetric))
    wanted = int4.quantize(weight, group_size=group, symmetric=symmetric)
    assert torch.equal(found.packed, wanted.packed)
    assert torch.equal(found.scale, wanted.scale)
    assert found.scale.dtype == dtype


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", GROUPS)
def test_no_group_loses_and_the_whole_gains(group: int, *, symmetric: bool, weighted: bool) -> None:
    """Each group's error, weighted as asked, is at most the plain scale's; all together at least 5 % less."""
    weight = random_weight(1, torch.bfloat16)
    factors = torch.logspace(-2, 2, 256)[torch.randperm(256, generator=torch.Generator().manual_seed(2))]
    importance = factors if weighted else None
    plain = group_errors(weight, *int4.plain_scales(weight, group_size=group, symmetric=symmetric), importance)
    found = group_errors(weight, *integer_scales.integer_scales(weight, group, symmetric, importance), importance)
    assert (found <= plain * (1 + 1e-6)).all()
    assert found.sum() < 0.95 * plain.sum()


def test_the_largest_value_saturates_where_it_does_not_matter() -> None:
    """A group whose outlier meets inputs of zero takes a range near that of its others."""
    weight = torch.full((1, 32), 0.01)
    weight[0, 0], weight[0, 1:] = 1.0, torch.linspace(-0.55, 0.55, 31)
    ignored = torch.ones(32)
    ignored[0] = 0
    scale, _ = integer_scales.integer_scales(weight, 32, symmetric=True, importance=ignored)
    assert 0.5 / 7.5 <= float(scale) <= 0.625 / 7.5


def test_ties_keep_the_plain_scale() -> None:
    """A group of zeros, and one under importance that is zero everywhere, keep what they have without a search."""
    weight = torch.zeros(1, 64)
    weight[0, 32:] = torch.arange(-8, 8).repeat_interleave(2) / 7.5 * 0.9375
    scale, _ = integer_scales.integer_scales(weight, 32, symmetric=True)
    plain, _ = int4.plain_scales(weight, group_size=32, symmetric=True)
    assert float(scale[0, 0]) == float(plain[0, 0]) == torch.finfo(torch.float32).eps
    unweighted = integer_scales.integer_scales(random_weight(3), 32, symmetric=True)[0]
    zero = integer_scales.integer_scales(random_weight(3), 32, symmetric=True, importance=torch.zeros(256))[0]
    assert torch.equal(unweighted, zero)
