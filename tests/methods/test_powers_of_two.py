"""NVFP4 of weights on MXFP4's grid: exact, by closed form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.tiny_families import all_tensors, random_rows, write_rows
from helpers.tiny_mixtures import make_mixture
from snugfit.dialects.dialect import open_dialect
from snugfit.formats import mxfp4, nvfp4
from snugfit.formats.quantized_weight import dequantize
from snugfit.formats.spec import TensorFormat
from snugfit.methods.calibrated import choose_scales
from snugfit.methods.powers_of_two import exact_global_scale
from snugfit.methods.rounding import round_and_compare
from snugfit.quantization.quantize import quantize
from snugfit.recipes.recipe import parse_recipe

NVFP4 = TensorFormat("nvfp4")


def on_grid(low: int, high: int, *, seed: int = 0, outputs: int = 40, inputs: int = 96) -> torch.Tensor:
    """A weight of random MXFP4 codes under random exponents low..high."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, generator=generator)
    exponent = torch.randint(127 + low, 128 + high, (outputs, inputs // 32), generator=generator).to(torch.uint8)
    packed[0] = 0  # blocks of zeros
    packed[1, 0] = 0x07  # one value of 6 alone
    return mxfp4.dequantize(mxfp4.MXFP4Weight(packed, exponent))


@pytest.mark.parametrize(("low", "high"), [(-9, 5), (-40, -26), (100, 114), (-100, -96)])
@pytest.mark.parametrize("rule", ["four-over-six", "sweep"])
def test_weights_on_the_grid_are_stored_exactly(low: int, high: int, rule: str) -> None:
    """Two fused weights of any exponents within 15 binades come back bit for bit, under one global scale."""
    exact = {"a": on_grid(low, high), "b": on_grid(low, high, seed=1)}
    given = {name: weight.clone() for name, weight in exact.items()}
    found = {one.name: one for one in round_and_compare(given, NVFP4, rule, "mse", values=True)}
    scales = set()
    for name, weight in exact.items():
        quantized = found[name].weight
        assert isinstance(quantized, nvfp4.NVFP4Weight)
        assert torch.equal(dequantize(quantized), weight)
        assert float(found[name].relative_error) == 0.0
        scales.add(float(quantized.global_scale))
        stable = nvfp4.stable_reciprocal_scale(quantized.global_scale)
        assert torch.equal(stable, quantized.global_scale)
    assert len(scales) == 1


def test_blocks_that_are_too_small_round_to_the_nearest() -> None:
    """Where scales differ by more than 2**17 the largest blocks stay exact, and others err by a quarter of a step."""
    weight = on_grid(-30, 0)
    (one,) = round_and_compare({"a": weight.clone()}, NVFP4, "four-over-six", "mse", values=False)
    found = dequantize(one.weight)
    error = (found - weight).abs()
    assert float(error.amax()) <= 0.25 * 2.0**-17
    large = weight.abs() >= 2.0**-12
    assert torch.equal(found[large], weight[large])


def test_other_weights_are_not_touched() -> None:
    """A weight with one value off the grid, or `absmax` by name, takes the scales of its rule."""
    weight = on_grid(-9, 5)
    assert exact_global_scale([weight]) is not None
    off = weight.clone()
    off[30, 50] = 1.25 * 2.0**-9 * 1.1
    assert exact_global_scale([off]) is None
    assert exact_global_scale([torch.randn(32, 64)]) is None
    assert exact_global_scale([torch.zeros(32, 64)]) is None
    (one,) = round_and_compare({"a": weight.clone()}, NVFP4, "absmax", "mse", values=False)
    assert float(one.relative_error) > 0


def test_weighted_scales_are_exact_too() -> None:
    """The scales that efforts choose are those of the closed form, whatever the inputs weigh."""
    weight = on_grid(-9, 5)
    chosen = choose_scales({"": weight.clone()}, NVFP4, torch.rand(96))[""]
    assert torch.equal(dequantize(chosen.encode(weight)), weight)


@pytest.mark.parametrize("size", [None, 3])
def test_a_run_from_mxfp4_experts(size: int | None, tmp_path: Path) -> None:
    """Experts of a compressed-tensors MXFP4 source become NVFP4 of the same values, all at once or in pieces."""
    rows = write_rows(tmp_path / "rows.jsonl", random_rows([64] * 4))
    model, options = make_mixture("qwen3_moe", tmp_path / "model"), {"device": "cpu", "min_tokens_per_expert": 0}
    first = parse_recipe("name: a\nrules: [{role: experts, format: mxfp4}, {role: linear, format: keep}]", where="a")
    given: dict[str, Any] = {"allow_unverified": True, "effort": "fast", "dataset": [rows]} | options
    quantize(model, first, output_dir=tmp_path / "mx", **given)
    second = parse_recipe("name: b\nrules: [{role: experts, format: nvfp4}, {role: linear, format: keep}]", where="b")
    record = quantize(tmp_path / "mx", second, output_dir=tmp_path / "nv", experts_per_group=size, **given)
    errors = [tensor.relative_error for tensor in record.tensors if ".experts." in tensor.name]
    assert errors
    assert set(errors) == {0.0}
    values = []
    for name, fmt in (("mx", "mxfp4"), ("nv", "nvfp4")):
        tensors = all_tensors(tmp_path / name)

        dialect = open_dialect(json.loads((tmp_path / name / "config.json").read_text()))
        module = "model.layers.1.mlp.experts.5.up_proj"
        parts = {key.rpartition(".")[2]: one for key, one in tensors.items() if key.startswith(f"{module}.")}
        values.append(dequantize(dialect.decode(module, TensorFormat(fmt), parts)[0]))
    assert torch.equal(values[0], values[1])
