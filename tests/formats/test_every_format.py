"""What holds for every format of the table. A format without cases here fails."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from helpers.errors import raises
from helpers.rounding import bytes_for, round_group
from snugfit.dialects.compressed_tensors import decode, encode, formats_of, layout, quantization_config
from snugfit.formats import fp8, int4, mxfp4, nvfp4
from snugfit.formats.quantized_weight import QuantizedWeight, dequantize, dequantize_all
from snugfit.formats.spec import FORMATS, FP8_BLOCK, INT4_GROUPS, READ_ONLY, TensorFormat, check_shape
from snugfit.methods.rounding import ROUNDERS
from snugfit.recipes.recipe import parse_recipe

# every setting of a format, and the relative squared error that rounding fused_pair() to it stays below: a tenth more
# than the largest measured over eight seeds, both members and all scale rules
CASES: Mapping[str, tuple[tuple[TensorFormat, float], ...]] = {
    "nvfp4": ((TensorFormat("nvfp4"), 0.0103),),
    "nvfp4a16": ((TensorFormat("nvfp4a16"), 0.0103),),
    "fp8-dynamic": ((TensorFormat("fp8-dynamic"), 0.0008),),
    "fp8-block": ((TensorFormat("fp8-block"), 0.0009),),
    "mxfp4": ((TensorFormat("mxfp4"), 0.0145),),
    "int4": (
        (TensorFormat("int4", 128, symmetric=True), 0.0147),
        (TensorFormat("int4", 64, symmetric=True), 0.0122),
        (TensorFormat("int4", 32, symmetric=True), 0.0103),
        (TensorFormat("int4", 128, symmetric=False), 0.0116),
        (TensorFormat("int4", 64, symmetric=False), 0.0093),
        (TensorFormat("int4", 32, symmetric=False), 0.0074),
    ),
}
KINDS: Mapping[str, type[QuantizedWeight]] = {
    "nvfp4": nvfp4.NVFP4Weight,
    "nvfp4a16": nvfp4.NVFP4Weight,
    "fp8-dynamic": fp8.FP8Weight,
    "fp8-block": fp8.FP8Weight,
    "mxfp4": mxfp4.MXFP4Weight,
    "int4": int4.INT4Weight,
}
every_name = pytest.mark.parametrize("name", FORMATS)


def cases(name: str) -> tuple[tuple[TensorFormat, float], ...]:
    found = CASES.get(name, ())
    assert found, f"{name} is in FORMATS and has no cases in {__file__}"
    return found


def fused_pair(seed: int = 0) -> dict[str, Tensor]:
    """Two bf16 weights of one fused group, the second three times the first's size."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(rows, 256, generator=generator) * size).bfloat16()
        for name, rows, size in (("gate", 24, 0.02), ("up", 40, 0.06))
    }


@every_name
def test_every_rule_of_a_format_rounds_with_little_error(name: str) -> None:
    """Each scale rule of each setting gives the format's own kind of weight with an error below the setting's bound."""
    for fmt, bound in cases(name):
        for rule in fmt.spec.scale_rules:
            weights = fused_pair()
            quantized = round_group(weights, fmt, rule, "mse")
            assert list(quantized) == list(weights)
            for member, weight in weights.items():
                assert type(quantized[member]) is KINDS[name]
                seen = dequantize(quantized[member])
                assert seen.dtype == torch.float32
                assert seen.shape == weight.shape
                error = (seen - weight.float()).square().sum() / weight.float().square().sum()
                assert 0 < float(error) < bound, (fmt.label(), rule)


@every_name
def test_every_format_is_written_and_read(name: str) -> None:
    """Tensors on disk are those of the layout, their bytes those announced, and reading them gives the same weight."""
    for fmt, _ in cases(name):
        weight = fused_pair()["gate"]
        quantized = round_group({"gate": weight}, fmt, fmt.spec.scale_rules[0], "mse")["gate"]
        scale = nvfp4.input_global_scale(1.5) if fmt.spec.calibrated else None
        parts = encode(quantized, scale)
        assert {part: tuple(t.shape) for part, t in parts.items()} == {
            part: shape for part, (_, shape) in layout(fmt, tuple(weight.shape), "BF16").items()
        }
        written = sum(part.numel() * part.element_size() for part in parts.values())
        assert written == bytes_for(fmt, (24, 256), 2) + (4 if fmt.spec.calibrated else 0)
        read, input_scale = decode(fmt, parts)
        assert torch.equal(dequantize(read), dequantize(quantized))
        assert (input_scale is None) == (not fmt.spec.calibrated)


@every_name
def test_weights_are_dequantized_together_as_alone(name: str) -> None:
    """Several weights, two of them of one width and under scales of their own, have the same values, bit for bit."""
    for fmt, _ in cases(name):
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(rows, width, generator=generator) for rows, width in ((24, 256), (8, 128), (40, 256))]
        rule = fmt.spec.scale_rules[0]
        quantized = [round_group({"one": w.bfloat16() * 2**n}, fmt, rule, "mse")["one"] for n, w in enumerate(weights)]
        for together, one in zip(dequantize_all(quantized), quantized, strict=True):
            assert torch.equal(together, dequantize(one))


@every_name
def test_every_format_has_a_config_that_names_it(name: str) -> None:
    """The config of a file in one format reads back as that format with its options."""
    for fmt, _ in cases(name):
        module = "model.layers.3.mlp.up_proj"
        config = quantization_config({module: fmt}, ["lm_head"])
        assert formats_of(config, [module, "lm_head"], {}, where="config.json") == {module: fmt}


@every_name
def test_every_format_refuses_shapes_that_it_cannot_hold(name: str) -> None:
    """In_features that a format allows pass; others, and other ranks, end in an error with a remedy."""
    for fmt, _ in cases(name):
        multiple = fmt.group_size or fmt.spec.in_features_multiple
        rows = FP8_BLOCK if name == "fp8-block" else 7
        check_shape(fmt, (rows, 3 * multiple), where="here")
        with raises("recipe-shape", "here"):
            check_shape(fmt, (2, rows, 3 * multiple), where="here")
        if multiple > 1:
            with raises("recipe-shape", "here") as caught:
                check_shape(fmt, (rows, 3 * multiple + 1), where="here")
            assert f"divisible by {multiple}" in caught.value.what
            assert "fp8-dynamic" in caught.value.remedy
        if name == "fp8-block":
            with raises("recipe-shape", "here") as caught:
                check_shape(fmt, (7, 3 * multiple), where="here")
            assert "7 x 384" in caught.value.what


def test_the_table_and_the_rounders_name_the_same_formats() -> None:
    """Every format has a rounder and its own key, every group size a case and every setting a label of its own."""
    assert set(ROUNDERS) == set(FORMATS)
    assert {key: spec.name for key, spec in FORMATS.items()} == {key: key for key in FORMATS}
    labels = [fmt.label() for name in FORMATS for fmt, _ in cases(name)]
    assert len(set(labels)) == len(labels)
    for spec in FORMATS.values():
        assert spec.scale_rules
        assert not (spec.calibrated and spec.inputs == "none")
    assert {fmt.group_size for fmt, _ in CASES["int4"]} == set(INT4_GROUPS)


@pytest.mark.parametrize("name", READ_ONLY)
def test_what_is_only_read_is_not_written(name: str) -> None:
    """A format without a rounder is refused in a recipe, with the names of those that are written."""
    assert name not in FORMATS
    assert READ_ONLY[name].name == name
    assert not READ_ONLY[name].scale_rules
    with raises("recipe-invalid", "rules[0].format") as caught:
        parse_recipe(f"name: mine\nrules: [{{role: linear, format: {name}}}]", where="mine.yaml")
    assert all(known in caught.value.remedy for known in FORMATS)
