"""Blocks of FP8, MXFP4 and an FP8 KV cache from end to end: planned, written, read by snugfit and by transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.nvfp4 import base
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from conftest import MakeTiny
from helpers.plans import plan_of
from helpers.run_model import stream_logits
from snugfit.data.dataset import Dataset, load_dataset
from snugfit.evaluation.evaluated_model import open_model
from snugfit.formats.spec import FORMATS
from snugfit.inspection.inspect import inspect
from snugfit.planning.fit import fit
from snugfit.quantization.quantize import quantize
from snugfit.recipes.recipe import parse_recipe

RECIPES = ("fp8-block", "mxfp4-absmax", "fp8-dynamic-fp8kv", "nvfp4-fp8-hybrid-fp8kv-four-over-six")
# dimensions that 128 divides, one of them more than once, and a key of one block
WIDE = {"hidden_size": 256, "intermediate_size": 384}


@pytest.fixture(scope="module")
def llama(make_tiny: MakeTiny) -> Path:
    """A tiny llama in fp32 whose weights have whole blocks."""
    return make_tiny("llama", dtype=torch.float32, **WIDE)


@pytest.fixture(scope="module")
def written(llama: Path, token_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What each recipe makes of it."""
    work = tmp_path_factory.mktemp("written")
    for recipe in RECIPES:
        quantize(llama, recipe, output_dir=work / recipe, dataset=[token_rows])
    return {recipe: work / recipe for recipe in RECIPES}


@pytest.fixture(scope="module")
def rows(llama: Path, token_rows: Path) -> Dataset:
    """The samples that it was calibrated on."""
    return load_dataset(llama, [token_rows])


def transformers_logits(path: Path, rows: Dataset) -> Tensor:
    """Logits of transformers with compressed-tensors."""
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    with torch.no_grad():
        result: Tensor = model(input_ids=torch.tensor(rows.samples), use_cache=False).logits.float()
    return result


def snugfit_logits(path: Path, rows: Dataset, activations: str = "vllm-blackwell") -> Tensor:
    found = stream_logits(path, rows, activations=activations)
    return torch.cat([logits.float() for _, _, logits in found], dim=1)


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().mean() / one.abs().mean())


@pytest.mark.parametrize("recipe", RECIPES)
def test_planned_is_written(recipe: str, llama: Path, written: dict[str, Path]) -> None:
    """The file has exactly the tensors of the plan, with their dtypes and shapes, and the bytes add up."""
    plan = plan_of(llama, recipe)
    planned = {info.name: (info.dtype, info.shape) for infos in plan.outputs.values() for info in infos}
    with safe_open(written[recipe] / "model.safetensors", "pt") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
        assert {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()} == planned
    tensors = load_file(written[recipe] / "model.safetensors")
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) == plan.bytes


@pytest.mark.parametrize(
    ("recipe", "labels", "cache"),
    [
        ("fp8-block", {"fp8-block"}, None),
        ("mxfp4-absmax", {"mxfp4"}, None),
        ("fp8-dynamic-fp8kv", {"fp8-dynamic"}, "fp8"),
        ("nvfp4-fp8-hybrid-fp8kv-four-over-six", {"nvfp4", "fp8-dynamic"}, "fp8"),
    ],
)
def test_evaluation_reads_what_was_written(
    recipe: str, labels: set[str], cache: str | None, written: dict[str, Path]
) -> None:
    """A checkpoint opened for evaluation has the recipe's formats in all 21 linears, and its cache."""
    evaluated = open_model(written[recipe])
    assert {fmt.label() for fmt in evaluated.formats.values()} == labels
    assert (len(evaluated.formats), evaluated.kv_cache) == (21, cache)


@pytest.mark.parametrize("recipe", ["fp8-block", "fp8-dynamic-fp8kv"])
def test_emulated_inputs_agree_with_transformers(recipe: str, written: dict[str, Path], rows: Dataset) -> None:
    """In fp32, inputs of linears and the cache rounded, transformers' logits are snugfit's except for ties."""
    assert difference(transformers_logits(written[recipe], rows), snugfit_logits(written[recipe], rows)) < 1e-5
    # the roundings are much larger than that
    assert difference(transformers_logits(written[recipe], rows), snugfit_logits(written[recipe], rows, "none")) > 1e-3


def test_mxfp4_weights_agree_with_transformers(
    written: dict[str, Path], rows: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With inputs in 16 bits, which all engines treat alike, transformers' logits of MXFP4 are snugfit's."""
    unpack = base.unpack_fp4_from_uint8  # to bf16 by default, whatever the model's dtype is
    monkeypatch.setattr(base, "unpack_fp4_from_uint8", lambda p, m, n: unpack(p, m, n, dtype=torch.float32))
    for file in written["mxfp4-absmax"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        assert group["input_activations"]["dynamic"] is True
        group["input_activations"] = None
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert {fmt.label() for fmt in open_model(tmp_path).formats.values()} == {"mxfp4a16"}
    assert difference(transformers_logits(tmp_path, rows), snugfit_logits(tmp_path, rows)) < 1e-5
    assert difference(transformers_logits(tmp_path, rows), snugfit_logits(written["mxfp4-absmax"], rows)) > 1e-3


def test_scales_of_the_cache_are_those_of_the_samples(written: dict[str, Path], llama: Path, rows: Dataset) -> None:
    """Scales are the largest keys and values that the FP8 weights give on the calibration samples, divided by 448."""
    tensors = load_file(written["fp8-dynamic-fp8kv"] / "model.safetensors")
    config = json.loads((written["fp8-dynamic-fp8kv"] / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"]["num_bits"] == 8
    model: Any = AutoModelForCausalLM.from_pretrained(llama).eval()
    with torch.no_grad():
        cache = model(input_ids=torch.tensor(rows.samples), use_cache=True).past_key_values
    for layer, kept in enumerate(cache.layers):
        for which, states in (("k", kept.keys), ("v", kept.values)):
            scale = tensors[f"model.layers.{layer}.self_attn.{which}_scale"]
            assert scale.shape == (1,)
            # FP8 weights and inputs change the largest of some thousand values by a few per cent
            assert float(scale) * 448 == pytest.approx(float(states.abs().max()), rel=0.1)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_written_inspected_fitted_and_opened(
    name: str, make_tiny: MakeTiny, token_rows: Path, tmp_path: Path
) -> None:
    """A row of the format table works in every verb: same parameters, fewer bytes, a fit, a model that opens."""
    source = make_tiny("llama", **WIDE)
    recipe = parse_recipe(f"name: one\nrules:\n- {{role: linear, format: {name}}}\n", where="one.yaml")
    quantize(source, recipe, output_dir=tmp_path / "out", dataset=[token_rows], device="cpu")
    before, after = inspect(source), inspect(tmp_path / "out")
    assert after.parameters == before.parameters
    assert after.bytes < before.bytes
    assert not after.problems
    assert any(label.startswith(name) for part in after.parts for label in part.stored)
    row = next(row for row in fit(tmp_path / "out", "16GiB").rows if row.name.endswith("as it is"))
    assert row.bytes == after.bytes
    assert row.problem is None
    opened = open_model(tmp_path / "out")
    assert {fmt.name for fmt in opened.formats.values()} <= {name, "fp8"}
