"""What a file says wins: its own head under a tied config, plain weights under a stale quantization, infinities."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from conftest import MakeTiny
from helpers.errors import raises
from helpers.tiny_families import all_tensors, load, make_vision_language
from helpers.tiny_mixtures import make_mixture, rewrite
from snugfit.evaluation.evaluate import evaluate
from snugfit.inspection.inspect import inspect
from snugfit.model.tied import TIED_BY_DEFAULT
from snugfit.planning.fit import fit
from snugfit.quantization.quantize import plan_quantization, quantize

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


def rewritten(source: Path, target: Path, change: dict[str, Tensor], **config: Any) -> Path:
    """A copy of a one-file checkpoint with further or other tensors, and with `config` in its config.json."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors") | change
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    given = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(given | config))
    return target


@pytest.fixture(scope="module")
def tied(make_tiny: MakeTiny) -> Path:
    """A tied llama in fp32, whose file has no head."""
    return make_tiny("llama", tie_word_embeddings=True, dtype=torch.float32)


def own_head(path: Path, name: str = EMBEDDINGS) -> Tensor:
    shape = all_tensors(path)[name].shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.3


def perplexity_by_transformers(path: Path, rows: Path) -> float:
    """exp of the mean loss of all tokens, by transformers' model of the file."""
    ids = torch.tensor([json.loads(line)["input_ids"] for line in rows.read_text().splitlines()])
    with torch.no_grad():
        logits = load(path)(input_ids=ids).logits.float()
    return math.exp(float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())))


def perplexity(path: Path, rows: Path) -> float:
    record = evaluate([path], dataset=[rows], contexts=[48], noise_floor="none", device="cpu")
    return float(record.contexts[0].models[0].perplexity)


def test_a_head_of_the_files_own_counts(tied: Path, tmp_path: Path, token_rows: Path) -> None:
    """A head that differs from the embeddings is evaluated, written untied and counted, as transformers 5 runs it."""
    path = rewritten(tied, tmp_path / "own", {HEAD: own_head(tied)})
    expected = perplexity_by_transformers(path, token_rows)
    assert expected > 1.2 * perplexity_by_transformers(tied, token_rows)  # the head makes a difference
    assert perplexity(path, token_rows) == pytest.approx(expected, rel=1e-5)
    notes = plan_quantization(path, "fp8-dynamic").notes
    assert any(HEAD in note for note in notes)
    quantize(path, "fp8-dynamic", output_dir=tmp_path / "out", device="cpu")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert torch.equal(all_tensors(tmp_path / "out")[HEAD], all_tensors(path)[HEAD])
    assert perplexity(tmp_path / "out", token_rows) == pytest.approx(expected, rel=0.05)
    found = inspect(path)
    assert not found.architecture.tied_embeddings
    assert any(HEAD in problem for problem in found.problems)
    assert any(HEAD in note for note in fit(path, "8GiB").notes)
    rows = [fit(one, "8GiB", recipes=["fp8-dynamic"]).rows for one in (tied, path)]
    sizes = [{row.name: row.bytes or 0 for row in given} for given in rows]
    assert {name: sizes[1][name] - size for name, size in sizes[0].items()} == dict.fromkeys(
        sizes[0], all_tensors(path)[HEAD].nbytes
    )


def test_a_copy_of_the_embeddings_stays_tied(tied: Path, tmp_path: Path, token_rows: Path) -> None:
    """A stored head with the values of the embeddings changes nothing: tied, not counted, tie_word_embeddings true."""
    path = rewritten(tied, tmp_path / "copy", {HEAD: all_tensors(tied)[EMBEDDINGS].clone()})
    assert perplexity(path, token_rows) == perplexity(tied, token_rows)
    quantize(path, "fp8-dynamic", output_dir=tmp_path / "out", device="cpu")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    assert inspect(path).architecture.tied_embeddings
    sizes = [{row.name: row.bytes for row in fit(one, "8GiB").rows} for one in (tied, path)]
    assert sizes[0] == sizes[1]


def test_a_head_without_embeddings_stays_tied(tied: Path, tmp_path: Path, token_rows: Path) -> None:
    """A tied file that stores the one matrix under the head's name alone is the same model, and as large."""
    tensors = load_file(tied / "model.safetensors")
    tensors[HEAD] = tensors.pop(EMBEDDINGS)
    path = rewritten(tied, tmp_path / "head", {})
    save_file(tensors, path / "model.safetensors")
    assert perplexity(path, token_rows) == perplexity(tied, token_rows)
    sizes = [{row.name: row.bytes for row in fit(one, "8GiB").rows} for one in (tied, path)]
    assert sizes[0] == sizes[1]


def test_one_changed_value_is_another_head(tied: Path, tmp_path: Path) -> None:
    """The values are compared to the last one, and a head in another dtype counts as one of its own."""
    head = all_tensors(tied)[EMBEDDINGS].clone()
    head[-1, -1] += 1
    assert not inspect(rewritten(tied, tmp_path / "last", {HEAD: head})).architecture.tied_embeddings
    wide = all_tensors(tied)[EMBEDDINGS].double()
    assert not inspect(rewritten(tied, tmp_path / "wide", {HEAD: wide})).architecture.tied_embeddings


def test_families_that_tie_without_saying_so() -> None:
    """The list of model types that tie by default is that of transformers' config classes."""
    names = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, *TIED_BY_DEFAULT}
    fields = {name: CONFIG_MAPPING[name].__dataclass_fields__ for name in names if name in CONFIG_MAPPING}
    ties = {
        name for name, found in fields.items() if getattr(found.get("tie_word_embeddings"), "default", None) is True
    }
    assert ties == TIED_BY_DEFAULT


@pytest.mark.parametrize("kind", ["starcoder2", "lfm2"])
def test_an_own_head_under_a_tie_by_default(kind: str, make_tiny: MakeTiny, tmp_path: Path, token_rows: Path) -> None:
    """A family that ties where config.json says nothing gets the file's head, too, and the result says so."""
    more = {"layer_types": ["conv", "full_attention", "conv"]} if kind == "lfm2" else {}
    source = make_tiny(kind, tie_word_embeddings=True, dtype=torch.float32, **more)
    path = rewritten(source, tmp_path / "own", {HEAD: own_head(source)})
    config = json.loads((path / "config.json").read_text())
    del config["tie_word_embeddings"]
    (path / "config.json").write_text(json.dumps(config))
    assert perplexity(path, token_rows) == pytest.approx(perplexity_by_transformers(path, token_rows), rel=1e-4)
    quantize(path, "fp8-dynamic", output_dir=tmp_path / "out", device="cpu")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_vl", "mistral3"])
def test_an_own_head_of_a_vision_language_model(kind: str, tmp_path: Path, token_rows: Path) -> None:
    """With a nested text config every level of config.json is untied."""
    source = make_vision_language(tmp_path / "source", kind, tied=True)
    name = next(n for n in all_tensors(source) if n.endswith("embed_tokens.weight"))
    path = rewritten(source, tmp_path / "own", {HEAD: own_head(source, name)})
    assert perplexity(path, token_rows) == pytest.approx(perplexity_by_transformers(path, token_rows), rel=1e-4)
    quantize(path, "fp8-dynamic", output_dir=tmp_path / "out", device="cpu")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [config["tie_word_embeddings"], config["text_config"]["tie_word_embeddings"]] == [False, False]


STALE: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True, "_load_in_4bit": True},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "unknown": {"quant_method": "somebodys"},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}}},
    },
    "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "damaged": {"quant_method": "compressed-tensors", "config_groups": 3},
}


@pytest.mark.parametrize("method", STALE)
def test_a_stale_quantization_config_is_dropped(tied: Path, tmp_path: Path, token_rows: Path, method: str) -> None:
    """Over plain weights a quantization_config counts for nothing: every verb says so, and the result is the same."""
    path = rewritten(tied, tmp_path / "stale", {}, quantization_config=STALE[method])
    (path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    assert perplexity(path, token_rows) == perplexity(tied, token_rows)
    for source in (tied, path):
        quantize(source, "fp8-dynamic", output_dir=tmp_path / f"out-{source.name}", device="cpu")
    clean, out = tmp_path / f"out-{tied.name}", tmp_path / "out-stale"
    assert (out / "model.safetensors").read_bytes() == (clean / "model.safetensors").read_bytes()
    assert (out / "config.json").read_text() == (clean / "config.json").read_text()
    assert not (out / "hf_quant_config.json").exists()
    assert any("quantization" in note for note in plan_quantization(path, "fp8-dynamic").notes)
    assert any("quantization" in problem for problem in inspect(path).problems)
    rows = {row.name: row.problem for row in fit(path, "8GiB").rows}
    served = [name for name in rows if name.endswith("as it is")]
    assert len(served) == 1
    assert "quantization_config" in (rows[served[0]] or "")
    assert rows["fp8-dynamic"] is None


def test_codes_and_scales_are_not_stale(tied: Path, tmp_path: Path) -> None:
    """A config that asks for codes stays in force where a scale or a code shows that some weights have them."""
    quantized = {"quantization_config": STALE["compressed-tensors"]}
    name = "model.layers.0.mlp.up_proj"
    beside = {f"{name}.weight_scale": torch.ones(1)}
    with raises("quantization-invalid"):
        evaluate([rewritten(tied, tmp_path / "scale", beside, **quantized)], noise_floor="none", device="cpu")
    codes = {f"{name}.weight": all_tensors(tied)[f"{name}.weight"].to(torch.float8_e4m3fn)}
    with raises("quantization-invalid"):
        evaluate([rewritten(tied, tmp_path / "codes", codes, **quantized)], noise_floor="none", device="cpu")


INFINITE = {
    "model.layers.0.self_attn.masked_bias": torch.tensor(-math.inf),
    "model.layers.1.self_attn.mask": torch.full((4, 4), -math.inf).triu(1),
    "model.vision_tower.layers.0.mlp.input_max": torch.tensor(math.inf),
    "model.vision_tower.layers.0.mlp.output_min": torch.tensor([-math.inf], dtype=torch.bfloat16),
    "model.vision_tower.bounds": torch.tensor([math.inf, -math.inf], dtype=torch.float16),
}


def test_infinite_values_that_belong_there_are_copied(make_tiny: MakeTiny, tmp_path: Path, token_rows: Path) -> None:
    """Masks, clipping bounds and biases may be infinite, also if the layer runs: they arrive bit for bit."""
    source = make_tiny("llama", attention_bias=True, dtype=torch.bfloat16)
    bias = all_tensors(source)["model.layers.1.self_attn.q_proj.bias"].clone()
    bias[3] = -math.inf
    for name, recipe, more in (
        ("copied", "fp8-dynamic", {"model.layers.1.self_attn.q_proj.bias": bias}),
        ("run", "nvfp4-four-over-six", {}),
    ):
        path = rewritten(source, tmp_path / name, INFINITE | more)
        quantize(path, recipe, output_dir=tmp_path / f"{name}-out", dataset=[token_rows], device="cpu")
        written = all_tensors(tmp_path / f"{name}-out")
        for one, tensor in (INFINITE | more).items():
            assert torch.equal(written[one], tensor), one


@pytest.mark.parametrize("name", list(INFINITE))
def test_nan_is_damage_everywhere(name: str, make_tiny: MakeTiny, tmp_path: Path) -> None:
    """NaN is refused in tensors that may be infinite, too."""
    path = rewritten(make_tiny("llama"), tmp_path / "nan", {name: torch.full_like(INFINITE[name], math.nan)})
    with raises("tensor-not-finite", where=name):
        quantize(path, "fp8-dynamic", output_dir=tmp_path / "out", device="cpu")


def test_a_router_bias_that_masks_an_expert(tmp_path: Path, token_rows: Path) -> None:
    """A correction bias of -inf, by which a pruned expert is never chosen, is copied and runs."""
    source = make_mixture("deepseek_v3", tmp_path / "source", wide=True)
    name = next(n for n in all_tensors(source) if n.endswith("e_score_correction_bias"))
    tensors = all_tensors(source)
    tensors[name][1] = -math.inf
    rewrite(source, tensors)
    quantize(source, "fp8-dynamic", output_dir=tmp_path / "out", dataset=[token_rows], device="cpu")
    assert torch.equal(all_tensors(tmp_path / "out")[name], tensors[name])
    assert math.isfinite(perplexity(tmp_path / "out", token_rows))


@pytest.mark.parametrize("name", ["model.norm.weight", EMBEDDINGS, "model.layers.0.mlp.up_proj.weight"])
def test_infinite_weights_are_refused(name: str, make_tiny: MakeTiny, tmp_path: Path) -> None:
    """What is quantized or run as a weight must be finite."""
    source = make_tiny("llama")
    tensor = all_tensors(source)[name].clone()
    tensor.view(-1)[5] = math.inf
    with raises("tensor-not-finite", where=name):
        quantize(
            rewritten(source, tmp_path / "inf", {name: tensor}),
            "fp8-dynamic",
            output_dir=tmp_path / "out",
            device="cpu",
        )
