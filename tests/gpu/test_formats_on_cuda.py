"""Codes, scales and rounded activations are bit for bit the same on CUDA as on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from snugfit.formats import fp8, integer, mxfp4, nvfp4
from snugfit.formats.quantized_weight import QuantizedWeight, dequantize
from snugfit.formats.spec import FORMATS, INT4_GROUPS, TensorFormat
from snugfit.methods.rounding import round_and_compare
from snugfit.methods.scales import block_scales, global_scale

pytestmark = pytest.mark.gpu

CASES = [
    (TensorFormat(name), rule, "mse") for name, spec in FORMATS.items() if name != "int4" for rule in spec.scale_rules
]
CASES += [
    (TensorFormat("nvfp4"), rule, objective) for rule in ("four-over-six", "sweep") for objective in ("mae", "absmax")
]
CASES += [
    (TensorFormat("int4", group_size=size, symmetric=symmetric), "absmax", "mse")
    for size in INT4_GROUPS
    for symmetric in (True, False)
]


SUMS_ERRORS = ("four-over-six", "sweep")


def weights_of(dtype: torch.dtype) -> dict[str, Tensor]:
    """Two weights [384, 512]: usual values, outliers, a block of zeros, subnormals."""
    generator = torch.Generator().manual_seed(7)
    found = {name: torch.randn(384, 512, generator=generator) * 0.02 for name in ("a", "b")}
    found["a"][3, :64] *= 400
    found["a"][5, 128:256] = 0
    found["b"][9] *= 1e-6
    return {name: weight.to(dtype) for name, weight in found.items()}


def parts_of(quantized: QuantizedWeight) -> dict[str, object]:
    return {field.name: getattr(quantized, field.name) for field in fields(quantized)}


def differences(here: Tensor, there: Tensor) -> int:
    """Elements of which a byte differs."""
    return int((here.flatten().view(torch.uint8) != there.cpu().flatten().view(torch.uint8)).sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("fmt", "rule", "objective"), CASES, ids=lambda value: str(getattr(value, "name", value)))
def test_codes_are_the_same(
    cuda: torch.device, fmt: TensorFormat, rule: str, objective: str, dtype: torch.dtype
) -> None:
    """Every format and rule gives the same codes, scales and 16-bit values on both devices.

    Rules that compare summed errors of candidates may choose otherwise in a tie of a few blocks: the sums of 16 numbers
    round differently. The total squared error is then the same to 1e-6, or 1e-4 if they compare another error.
    """
    ties = 0 if rule not in SUMS_ERRORS else 1e-3
    weights = weights_of(dtype)
    here = list(round_and_compare(dict(weights), fmt, rule, objective, values=True))
    there = list(round_and_compare({n: w.to(cuda) for n, w in weights.items()}, fmt, rule, objective, values=True))
    for one, other in zip(here, there, strict=True):
        assert one.name == other.name
        assert one.values is not None
        assert other.values is not None
        assert differences(one.values, other.values) <= ties * one.values.nbytes
        for key, part in parts_of(one.weight).items():
            on_gpu = parts_of(other.weight)[key]
            if isinstance(part, Tensor):
                assert isinstance(on_gpu, Tensor)
                assert differences(part, on_gpu) <= ties * part.nbytes, (one.name, key)
            else:
                assert part == on_gpu
        close = 1e-6 if objective == "mse" else 1e-4
        assert float(one.relative_error) == pytest.approx(float(other.relative_error), rel=close, abs=1e-9)
        assert torch.equal(dequantize(other.weight).cpu(), dequantize(to_cpu(other.weight)))


def to_cpu(quantized: QuantizedWeight) -> QuantizedWeight:
    moved = {name: part.cpu() if isinstance(part, Tensor) else part for name, part in parts_of(quantized).items()}
    return type(quantized)(**moved)  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", ["absmax", "four-over-six", "sweep"])
def test_block_scales_are_the_same(cuda: torch.device, rule: str) -> None:
    """The choice among candidates does not depend on the device, but for ties, over a large weight [4096, 4096]."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(4096, 4096, generator=generator).to(torch.bfloat16)
    scale = global_scale(weight.float().abs().amax(), rule)
    here = block_scales(weight, scale, rule)
    there = block_scales(weight.to(cuda), scale.to(cuda), rule)
    found = differences(here, there)
    assert found <= (1e-4 * here.numel() if rule in SUMS_ERRORS else 0)


def _static(rounding: Callable[..., Tensor], scale: float) -> Callable[[Tensor], Tensor]:
    return lambda x: rounding(x, torch.tensor(scale, device=x.device))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "fp8 a token": fp8.quantize_dequantize_input,
    "fp8 in groups": lambda x: fp8.quantize_dequantize_input_groups(x, group=128),
    "fp8 static": _static(fp8.quantize_dequantize_input_static, 0.01),
    "int8 a token": integer.quantize_dequantize_input,
    "int8 with zero point": integer.quantize_dequantize_input_asymmetric,
    "mxfp4": mxfp4.quantize_dequantize_input,
    "nvfp4": lambda x: nvfp4.quantize_dequantize_input(x, nvfp4.input_global_scale(6.0).to(x.device)),
}


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_are_rounded_the_same(cuda: torch.device, kind: str) -> None:
    """What an engine does to activations is the same on both devices."""
    generator = torch.Generator().manual_seed(2)
    activations = torch.randn(3, 70, 512, generator=generator).to(torch.bfloat16)
    activations[0, 3] *= 100
    rounding = ACTIVATIONS[kind]
    assert torch.equal(rounding(activations), rounding(activations.to(cuda)).cpu())
