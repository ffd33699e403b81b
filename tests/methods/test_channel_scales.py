"""FP8's scales, one an output channel, and codes under them that make up for one another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from snugfit.formats import fp8
from snugfit.formats.quantized_weight import dequantize
from snugfit.formats.spec import TensorFormat
from snugfit.methods import channel_scales
from snugfit.methods.calibrated import choose_scales
from snugfit.methods.channel_scales import FACTORS
from snugfit.methods.gptq import descend, feedback_of, round_weight

FP8 = TensorFormat("fp8-dynamic")


def random(seed: int, *shape: int) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def losses(weight: Tensor, scale: Tensor, importance: Tensor) -> Tensor:
    """fp64 [N] of the nearest codes under a scale."""
    error = fp8.dequantize(fp8.quantize_under(weight, scale)).double() - weight.double()
    return error.square() @ importance.double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_scale_of_least_error_is_chosen(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, *, weighted: bool
) -> None:
    """Each channel gets the best of all candidates by its own error, however many rows are handled at once."""
    weight = random(1, 40, 96) * torch.logspace(-3, 1, 40).unsqueeze(1)
    importance = random(2, 96).square() if weighted else torch.ones(96)
    found = channel_scales.channel_scales(weight, dtype, importance if weighted else None)
    assert found.dtype == dtype
    assert found.shape == (40, 1)
    candidates = torch.stack([losses(weight, fp8.channel_scale(weight, dtype, f), importance) for f in FACTORS])
    torch.testing.assert_close(losses(weight, found, importance), candidates.amin(0), rtol=1e-5, atol=0)
    plain = fp8.quantize(weight.to(dtype)).scale
    assert (losses(weight, found, importance) < losses(weight, plain, importance)).float().mean() > 0.5
    monkeypatch.setattr(channel_scales, "CHUNK_VALUES", {"cpu": 1})
    assert torch.equal(channel_scales.channel_scales(weight, dtype, importance if weighted else None), found)


def test_channels_and_inputs_of_zeros() -> None:
    """A channel of zeros has epsilon for its scale, as the plain rule has; inputs of zeros weight nothing."""
    weight = random(3, 4, 32)
    weight[1] = 0
    found = channel_scales.channel_scales(weight, torch.bfloat16, torch.zeros(32))
    assert float(found[1]) == torch.finfo(torch.bfloat16).eps
    assert torch.equal(found, channel_scales.channel_scales(weight, torch.bfloat16))
    assert not fp8.dequantize(fp8.quantize_under(weight, found))[1].any()


def test_values_are_on_the_grid_and_lose_less() -> None:
    """GPTQ's values are what their codes say, and lower the error of outputs; descent lowers it again."""
    weight = random(4, 64, 128)
    inputs = random(5, 2048, 128) @ (random(6, 128, 128) + 2 * torch.ones(128, 1))
    gram = inputs.t() @ inputs / len(inputs)
    scales = choose_scales({"": weight}, FP8, gram.diagonal())[""]
    nearest = round_weight(weight, scales.steps, None)
    values = round_weight(weight, scales.steps, feedback_of(gram))
    descended = descend(weight, values, scales.steps, gram, 2)
    for one in (nearest, values, descended):
        assert torch.equal(dequantize(scales.encode(one)), one)
    errors = [float((inputs @ (one - weight).t()).square().sum()) for one in (nearest, values, descended)]
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] < errors[1]
