"""Sources that would give a wrong result silently: FP8 outside linears, damaged scales, statistics of another model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from conftest import MakeTiny
from helpers.errors import raises
from helpers.fp8_sources import as_fp8, as_mxfp4, dequantized
from helpers.plans import plan_of
from helpers.tiny_families import all_tensors, random_rows, write_rows
from helpers.tiny_mixtures import make_mixture, rewrite
from snugfit.evaluation.evaluated_model import open_model
from snugfit.model.emulate import ExpertInputs
from snugfit.quantization.quantize import quantize
from snugfit.recipes.recipe import LoadedRecipe, parse_recipe
from snugfit.records.statistics_file import STATISTICS_FILE, load_statistics
from snugfit.storage.checkpoint import fingerprint
from snugfit.storage.open import open_checkpoint


def recipe(*rules: str, cache: str = "keep") -> LoadedRecipe:
    lines = "".join(f"  - {{{rule}}}\n" for rule in rules)
    return parse_recipe(f"name: mine\nkv_cache: {cache}\nrules:\n{lines}", where="mine.yaml")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", random_rows([32, 32]))


def test_experts_out_of_fp8_into_16_bits(tmp_path: Path, rows: Path) -> None:
    """Experts with `format: keep` and `requantize` are written as the values of their codes, also if the layer runs."""
    source = as_fp8(make_mixture("qwen3_moe", tmp_path / "wide", wide=True), tmp_path / "fp8", "hf-tensor")
    asked = recipe(
        "role: attention, format: nvfp4, scale_rule: four-over-six, requantize: true",
        "role: experts, format: keep, requantize: true",
    )
    quantize(source, asked, output_dir=tmp_path / "out", dataset=[rows])
    meant, written = dequantized(source), all_tensors(tmp_path / "out")
    experts = [name for name in meant if ".experts." in name]
    assert experts
    for name in experts:
        assert torch.equal(written[name], meant[name].bfloat16())


@pytest.mark.parametrize("place", ["experts.down_proj", "embed_tokens.weight"])
def test_fp8_outside_linears_is_refused(place: str, tmp_path: Path) -> None:
    """FP8 in a tensor of all experts, or in embeddings, is refused with its name and not read as plain numbers."""
    source = make_mixture("qwen3_vl_moe", tmp_path / "source")
    tensors = all_tensors(source)
    name = next(name for name in tensors if name.endswith(place))
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    rewrite(source, tensors)
    code = "dtype-unsupported" if place.startswith("experts") else "already-quantized"
    with raises(code, where=source) as caught:
        plan_of(source, "fp8-int4-moe-absmax")
    assert name.removesuffix(".weight") in str(caught.value)


def test_fp8_in_a_tensor_of_all_experts_is_not_evaluated(tmp_path: Path) -> None:
    """Evaluation refuses such a tensor with its name too: its codes are not values."""
    source = make_mixture("qwen3_vl_moe", tmp_path / "source")
    tensors = all_tensors(source)
    name = next(name for name in tensors if name.endswith("experts.down_proj"))
    rewrite(source, tensors | {name: tensors[name].to(torch.float8_e4m3fn)})
    with raises("dtype-unsupported", where=source) as caught:
        open_model(source)
    assert name in str(caught.value)


def test_mxfp4_scales_that_are_nan(tmp_path: Path, rows: Path) -> None:
    """An MXFP4 exponent that means NaN is refused with expert and tensor, whatever format the experts get."""
    source = as_mxfp4(make_mixture("gpt_oss", tmp_path / "bf16", wide=True), tmp_path / "mxfp4")
    tensors = all_tensors(source)
    name = "model.layers.1.mlp.experts.down_proj_scales"
    tensors[name][2, 3, 0] = 255
    rewrite(source, tensors)
    for asked in ("int4", "mxfp4", "nvfp4"):
        rules = f"role: experts, format: {asked}", "role: linear, format: fp8-dynamic"
        with raises("scale-invalid", where=source) as caught:
            quantize(source, recipe(*rules), output_dir=tmp_path / "out", dataset=[rows], allow_unverified=True)
        assert name in caught.value.what
        assert "expert 2" in caught.value.what
        assert not (tmp_path / "out").exists()


def test_an_fp8_head_is_copied_or_refused(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """An output head in FP8 stays as it is; a rule that gives it another format is refused, as for any head."""
    dense = make_tiny("llama", hidden_size=128, intermediate_size=256, tie_word_embeddings=False)
    source = as_fp8(dense, tmp_path / "fp8", "hf-tensor")
    tensors = all_tensors(source)
    head = tensors["lm_head.weight"].float()
    scale = head.abs().max() / 448
    tensors["lm_head.weight"] = (head / scale).to(torch.float8_e4m3fn)
    tensors["lm_head.weight_scale"] = scale.reshape(1)
    rewrite(source, tensors)
    plan = plan_of(source, "nvfp4-fp8-hybrid-four-over-six")
    assert plan.assignments["lm_head.weight"].keeps_codes
    for fmt in ("int4", "nvfp4a16"):
        rules = f"role: lm_head, format: {fmt}", "role: linear, format: int4, scale_rule: absmax"
        with raises("recipe-not-quantizable", where="mine.yaml") as caught:
            plan_of(source, recipe(*rules))
        assert "lm_head" in str(caught.value)


def test_the_sources_fp8_cache_stays(make_tiny: MakeTiny, tmp_path: Path, rows: Path) -> None:
    """Scales of an FP8 cache in a compressed-tensors source stay, and so does its entry in the config."""
    quantize(make_tiny("llama"), "fp8-dynamic-fp8kv", output_dir=tmp_path / "fp8", dataset=[rows])
    quantize(
        tmp_path / "fp8",
        recipe("role: mlp, format: int4, scale_rule: absmax", "role: linear, format: keep"),
        output_dir=tmp_path / "out",
    )
    before, after = all_tensors(tmp_path / "fp8"), all_tensors(tmp_path / "out")
    name = "model.layers.1.self_attn.k_scale"
    assert torch.equal(before[name], after[name])
    configs = [json.loads((tmp_path / part / "config.json").read_text()) for part in ("fp8", "out")]
    schemes = [config["quantization_config"]["kv_cache_scheme"] for config in configs]
    assert schemes[0] == schemes[1] is not None


def test_a_result_contains_its_statistics(make_tiny: MakeTiny, tmp_path: Path, rows: Path) -> None:
    """A result that was made from statistics contains them, and its record has their digest."""
    model = make_tiny("llama")
    quantize(model, "nvfp4-four-over-six", output_dir=tmp_path / "first", dataset=[rows])
    record = quantize(model, "nvfp4-four-over-six", output_dir=tmp_path / "second", statistics=tmp_path / "first")
    assert load_statistics(tmp_path / "second") == load_statistics(tmp_path / "first")
    assert (tmp_path / "second" / STATISTICS_FILE).exists()
    assert len(record.arguments["statistics"]) == 64


@pytest.mark.parametrize("leaf", ["o_proj", "up_proj", "down_proj", "norm"])
def test_a_fine_tuned_model_has_another_fingerprint(leaf: str, make_tiny: MakeTiny, tmp_path: Path) -> None:
    """A change to one projection of every layer changes the fingerprint, also of a model of 32 layers."""
    source = make_tiny("llama", num_hidden_layers=32)
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    (tuned / "config.json").write_bytes((source / "config.json").read_bytes())
    rewrite(tuned, {name: t * 1.5 if leaf in name else t for name, t in all_tensors(source).items()})
    assert fingerprint(open_checkpoint(source)) != fingerprint(open_checkpoint(tuned))


def test_experts_share_the_largest_static_scale(tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If gate and up of FP8 experts have different input scales, calibration rounds under the larger, as engines do."""
    source = as_fp8(make_mixture("mixtral", tmp_path / "wide", wide=True), tmp_path / "fp8", "hf-tensor-static")
    tensors = all_tensors(source)
    larger = {name: t * 4 for name, t in tensors.items() if ".w1.input_scale" in name}
    rewrite(source, tensors | larger)
    seen = []

    def first(self: ExpertInputs, hidden: torch.Tensor) -> torch.Tensor:
        assert self.gate_up is not None
        seen.append(float(self.gate_up(torch.full((1, 4), 1e6)).max()))
        return hidden

    monkeypatch.setattr(ExpertInputs, "first", first)
    asked = recipe(
        "role: experts, format: keep", "role: linear, format: nvfp4, scale_rule: four-over-six, requantize: true"
    )
    quantize(source, asked, output_dir=tmp_path / "out", dataset=[rows])
    scales = [float(t) for name, t in larger.items() if "layers.0." in name]
    assert seen[0] == pytest.approx(448 * max(scales), rel=0.01)  # what it saturates at
