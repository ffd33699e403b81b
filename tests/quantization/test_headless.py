"""Classifiers, reward models and embedding models: quantized as the language model without its output head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from conftest import TINY
from helpers.errors import raises
from helpers.tiny_families import FAMILIES, all_tensors, load, random_rows, same, write_rows
from snugfit.evaluation.evaluate import evaluate
from snugfit.evaluation.evaluated_model import open_head, open_model, pass_layers
from snugfit.inspection.inspect import inspect
from snugfit.planning.fit import fit
from snugfit.quantization.collect import collect_statistics
from snugfit.quantization.quantize import plan_quantization, quantize

CPU = torch.device("cpu")
HEADLESS: dict[str, tuple[str, Any]] = {
    "reward": ("qwen3", AutoModelForSequenceClassification),
    "classifier": ("llama", AutoModelForTokenClassification),
    "embedding": ("qwen3", AutoModel),
    "old names": ("gpt_neox", AutoModelForSequenceClassification),
}
RECIPES = ["fp8-dynamic", "nvfp4-four-over-six", "nvfp4-fp8-hybrid-four-over-six"]


def make(kind: str, folder: Path, *, auto: Any = None, dtype: torch.dtype = torch.float32) -> Path:
    """A tiny random model of HEADLESS, or with `auto` of another class, with the same layers."""
    family, own = HEADLESS[kind]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(TINY | FAMILIES.get(family, {}) | {"num_labels": 1, "pad_token_id": 0}))
    model = (auto or own).from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() == 2:
                torch.manual_seed(len(name.partition("layers")[2]))
                parameter.normal_(0.0, 0.08)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", HEADLESS)
def test_layers_get_the_codes_of_the_language_model(kind: str, recipe: str, tmp_path: Path) -> None:
    """Every tensor of the layers is the one of a model with the same layers and an output head; the rest is copied."""
    text = write_rows(tmp_path / "rows.jsonl", random_rows([48] * 4, stop=64))
    source, twin = make(kind, tmp_path / "source"), make(kind, tmp_path / "twin", auto=AutoModelForCausalLM)
    assert not [name for name in all_tensors(source) if "lm_head" in name or "embed_out" in name]
    quantize(source, recipe, output_dir=tmp_path / "out", dataset=[text])
    quantize(twin, recipe, output_dir=tmp_path / "twin-out", dataset=[text])
    found, expected = all_tensors(tmp_path / "out"), all_tensors(tmp_path / "twin-out")
    inside = {name.partition("layers.")[2]: tensor for name, tensor in found.items() if "layers." in name}
    wanted = {name.partition("layers.")[2]: tensor for name, tensor in expected.items() if "layers." in name}
    assert inside.keys() == wanted.keys()
    assert all(same(tensor, wanted[name]) for name, tensor in inside.items())
    kept = {name: tensor for name, tensor in all_tensors(source).items() if "layers." not in name}
    assert all(same(tensor, found[name]) for name, tensor in kept.items())
    ignored = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["quantization_config"][
        "ignore"
    ]
    assert ("score" in ignored) == ("score.weight" in kept)


@torch.no_grad()
def test_transformers_loads_a_quantized_reward_model(tmp_path: Path) -> None:
    """Its hidden states in transformers are the language model's with the same layers; the score is theirs."""
    ids = torch.tensor(random_rows([48] * 4, stop=64))
    source, twin = make("reward", tmp_path / "source"), make("reward", tmp_path / "twin", auto=AutoModelForCausalLM)
    for path in (source, twin):
        quantize(path, "fp8-dynamic", output_dir=path.with_suffix(".out"))
    model = AutoModelForSequenceClassification.from_pretrained(source.with_suffix(".out"), dtype="auto").eval()
    found = model(input_ids=ids, use_cache=False, output_hidden_states=True)
    expected = load(twin.with_suffix(".out"))(input_ids=ids, use_cache=False, output_hidden_states=True)
    hidden = expected.hidden_states[-1]
    assert torch.equal(found.hidden_states[-1], hidden)
    assert torch.allclose(found.logits[:, 0], hidden[:, -1] @ all_tensors(source)["score.weight"][0], atol=1e-5)


def test_every_verb_takes_a_model_without_head(tmp_path: Path) -> None:
    """Dry run, fit, inspect and statistics accept it; eval says that it predicts no tokens."""
    source = make("reward", tmp_path / "source", dtype=torch.bfloat16)
    text = write_rows(tmp_path / "rows.jsonl", random_rows([48] * 2, stop=64))
    assert plan_quantization(source, "nvfp4-four-over-six", dataset=[text]).records()
    assert all(row.problem is None for row in fit(source, "16GiB", recipes=["nvfp4-four-over-six"]).rows)
    assert not inspect(source).problems
    collect_statistics(source, output_dir=tmp_path / "statistics", dataset=[text])
    with raises("architecture-unsupported", where=source) as caught:
        evaluate([source], dataset=[text])
    assert "Qwen3ForSequenceClassification" in caught.value.what


def test_a_language_model_needs_its_head(tmp_path: Path) -> None:
    """A class that predicts tokens, and a config that names no class, still refuse a file without lm_head."""
    source = make("embedding", tmp_path / "source", auto=AutoModelForCausalLM)
    tensors = all_tensors(source)
    del tensors["lm_head.weight"]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    file = source / "config.json"
    for architectures in (["Qwen3ForCausalLM"], None):
        config = json.loads(file.read_text(encoding="utf-8")) | {"architectures": architectures}
        file.write_text(json.dumps(config), encoding="utf-8")
        with raises("weights-missing", where=source) as caught:
            plan_quantization(source, "fp8-dynamic")
        assert "lm_head.weight" in caught.value.what


@torch.no_grad()
def test_pads_are_never_seen(tmp_path: Path) -> None:
    """Where tokens see later ones, as in EmbeddingGemma, samples of several lengths run as each alone does."""
    settings = TINY | FAMILIES["gemma3_text"] | {"use_bidirectional_attention": True, "tie_word_embeddings": True}
    torch.manual_seed(0)
    config = AutoConfig.for_model("gemma3_text", **settings)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "model")
    model, evaluated = load(tmp_path / "model"), open_model(tmp_path / "model", activations="none")
    rows = random_rows([40, 30, 21, 40], stop=64)
    head = open_head(evaluated, CPU)
    for batch in pass_layers(evaluated, rows, CPU, tokens_per_batch=256):
        assert batch.valid is None
        for place, row in enumerate(batch.rows):
            alone = model(input_ids=torch.tensor([rows[row]]), use_cache=False).logits[0]
            assert torch.allclose(head(batch.hidden)[place], alone, atol=1e-5)
