"""An output head in FP8: written, stated in the config, noted in a dry run, and read back by `eval`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig

from conftest import MakeTiny
from helpers.errors import raises
from helpers.tiny_families import all_tensors, random_rows, write_rows
from snugfit.dialects.targets import write_targets
from snugfit.evaluation.evaluate import evaluate
from snugfit.evaluation.evaluated_model import open_head, open_model
from snugfit.formats.spec import TensorFormat
from snugfit.inspection.inspect import inspect
from snugfit.planning.fit import fit
from snugfit.quantization.quantize import plan_quantization, quantize

CPU = torch.device("cpu")
RULES = ("role: lm_head, format: fp8-dynamic", "role: linear, format: keep")


def recipe_file(folder: Path, *rules: str) -> str:
    file = folder / "recipe.yaml"
    file.write_text("name: mine\nrules:\n" + "".join(f"- {{{rule}}}\n" for rule in rules), encoding="utf-8")
    return str(file)


@pytest.fixture(scope="module")
def llama(make_tiny: MakeTiny) -> Path:
    """A model with an output head of its own."""
    return make_tiny("llama", tie_word_embeddings=False)


def test_a_head_in_fp8(llama: Path, tmp_path: Path) -> None:
    """Codes and scales are amax / 448 of each output in plain torch, and the library's compressor reads them."""
    record = quantize(llama, recipe_file(tmp_path, *RULES), output_dir=tmp_path / "out", device="cpu")
    weight, written = all_tensors(llama)["lm_head.weight"], all_tensors(tmp_path / "out")
    scale = (weight.float().abs().amax(1, keepdim=True) / 448).to(weight.dtype)
    codes = (weight.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(written["lm_head.weight_scale"], scale)
    assert torch.equal(written["lm_head.weight"].view(torch.uint8), codes.view(torch.uint8))
    config = json.loads((tmp_path / "out/config.json").read_text(encoding="utf-8"))
    given = QuantizationConfig.model_validate(config["quantization_config"])
    (group,) = given.config_groups.values()
    assert [bool(re.match(t.removeprefix("re:"), "lm_head")) for t in group.targets] == [True]
    assert "lm_head" not in given.ignore
    parts = {"weight": written["lm_head.weight"], "weight_scale": written["lm_head.weight_scale"]}
    read = BaseCompressor.get_value_from_registry(group.format).decompress(parts, group)["weight"]
    assert torch.equal(read, codes.to(read.dtype) * scale)
    assert next(t for t in record.tensors if t.name == "lm_head.weight").format == "fp8-dynamic"


@torch.no_grad()
def test_eval_rounds_the_heads_inputs(llama: Path, tmp_path: Path) -> None:
    """Logits are those of the decoded head on inputs in FP8, one scale a token; `eval` counts the head's format."""
    quantize(llama, recipe_file(tmp_path, *RULES), output_dir=tmp_path / "out", device="cpu")
    opened = open_model(tmp_path / "out")
    assert {name: fmt.label() for name, fmt in opened.formats.items()} == {"lm_head": "fp8-dynamic"}
    states = torch.randn(1, 5, opened.skeleton.hidden_size, generator=torch.Generator().manual_seed(1)).bfloat16()
    normed = torch.nn.functional.rms_norm(states.float(), states.shape[-1:], eps=1e-6).bfloat16()
    written = all_tensors(tmp_path / "out")
    value = (written["lm_head.weight"].float() * written["lm_head.weight_scale"].float()).bfloat16().float()
    step = normed.float().abs().amax(-1, keepdim=True) / 448
    rounded = (normed.float() / step).to(torch.float8_e4m3fn).float() * step
    logits = open_head(opened, CPU)(states).float()
    exact, plain = rounded @ value.t(), normed.float() @ value.t()
    assert float((logits - exact).abs().max()) < 0.3 * float((plain - exact).abs().max()) + 0.01
    rows = write_rows(tmp_path / "rows.jsonl", random_rows([64] * 2))
    found = evaluate([tmp_path / "out"], reference=llama, dataset=[rows], contexts=(64,), device="cpu")
    assert found is not None


def test_every_verb_knows_a_head_in_fp8(llama: Path, tmp_path: Path) -> None:
    """A dry run says which engines load it, `inspect` that it can be FP8, and `fit` counts its bytes."""
    recipe = recipe_file(tmp_path, *RULES)
    plan = plan_quantization(llama, recipe)
    assert any("vLLM 0.32" in note for note in plan.notes)
    (head,) = [part for part in inspect(llama).parts if part.part == "lm_head"]
    assert head.can_be == ("fp8-dynamic",)
    rows = fit(llama, "24GiB", recipes=[recipe]).rows
    vocabulary, hidden = all_tensors(llama)["lm_head.weight"].shape
    as_it_is, quantized = sorted((row.bytes or 0 for row in rows), reverse=True)
    assert as_it_is - quantized == vocabulary * (hidden - 2)


def test_a_quantized_head_is_a_source(llama: Path, tmp_path: Path) -> None:
    """A head that the source has in FP8 stays under any recipe."""
    quantize(llama, recipe_file(tmp_path, *RULES), output_dir=tmp_path / "once", device="cpu")
    quantize(tmp_path / "once", "fp8-dynamic", output_dir=tmp_path / "twice", device="cpu")
    once, twice = all_tensors(tmp_path / "once"), all_tensors(tmp_path / "twice")
    for name in ("lm_head.weight", "lm_head.weight_scale"):
        assert torch.equal(once[name].view(torch.uint8), twice[name].view(torch.uint8))
    assert open_model(tmp_path / "twice").formats["lm_head"].label() == "fp8-dynamic"


@pytest.mark.parametrize("rule", ["role: lm_head", "name: lm_head"])
def test_tied_heads_are_refused_with_a_remedy(rule: str, make_tiny: MakeTiny, tmp_path: Path) -> None:
    """A head that is the embeddings cannot be quantized alone; untied as the remedy says it can."""
    recipe = recipe_file(tmp_path, f"{rule}, format: fp8-dynamic", "role: linear, format: keep")
    tied = make_tiny("llama", tie_word_embeddings=True)
    with raises("recipe-not-quantizable", where="rules[0]") as caught:
        plan_quantization(tied, recipe)
    assert "tie_word_embeddings" in caught.value.remedy


@pytest.mark.parametrize("name", ["lm_head", "language_model.lm_head", "embed_out"])
def test_the_target_of_a_head(name: str) -> None:
    """The target matches under every prefix that readers give a head, and no other module."""
    fp8 = TensorFormat("fp8-dynamic")
    (target,) = write_targets({name: fp8}, ["model.layers.0.mlp.up_proj"])[fp8]
    pattern, leaf = target.removeprefix("re:"), name.rpartition(".")[2]
    assert all(re.match(pattern, found) for found in (leaf, f"language_model.{leaf}", f"model.{leaf}"))
    assert not any(re.match(pattern, found) for found in ("model.layers.0.mlp.up_proj", f"{leaf}.x", f"my_{leaf}"))
