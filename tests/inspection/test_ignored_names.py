"""Files of vision-language models by other tools: `ignore` in the names of modules, targets by the class Linear."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers.tiny_families import VISION_LANGUAGE, load, make_vision_language, random_rows, write_rows
from snugfit.dialects.targets import Targets
from snugfit.evaluation.evaluate import evaluate
from snugfit.inspection.inspect import inspect
from snugfit.quantization.quantize import quantize

FP8: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True}
GROUP: dict[str, Any] = {
    "targets": ["Linear"],
    "weights": FP8 | {"strategy": "channel", "dynamic": False},
    "input_activations": FP8 | {"strategy": "token", "dynamic": True},
}


def as_llm_compressor(model: Path, ignore: list[str]) -> None:
    """Replace the quantization config by one with one group for the class Linear, and this `ignore`."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": ignore,
        "config_groups": {"group_0": GROUP},
    }
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize("family", [family for family in VISION_LANGUAGE if family != "mllama"])
def test_a_sound_file_has_no_problems(family: str, tmp_path: Path) -> None:
    """`ignore` as transformers names its modules, in file names of any kind, is no problem, and `evaluate` reads it.

    A linear that neither is quantized nor ignored under any name still is a problem.
    """
    source, model = make_vision_language(tmp_path / "source", family, dtype=torch.bfloat16), tmp_path / "model"
    rows = write_rows(tmp_path / "rows.jsonl", random_rows([40] * 3, stop=59))
    quantize(source, "fp8-dynamic", output_dir=model, dataset=[rows])
    before = evaluate([model], dataset=[rows], contexts=(32,), continuations=0).contexts[0].models[0].perplexity
    names = [name for name, module in load(source).named_modules() if isinstance(module, nn.Linear)]
    layers = re.compile(r".*\.(language|text)_model\.layers\.(?!.*\.in_proj_[ab]$)")
    as_llm_compressor(model, [name for name in names if not layers.match(name)])
    found = inspect(model)
    assert found.problems == ()
    assert found.quantization is not None
    assert not found.quantization.refused
    after = evaluate([model], dataset=[rows], contexts=(32,), continuations=0).contexts[0].models[0].perplexity
    assert before == after
    as_llm_compressor(model, ["lm_head"])
    (problem,) = inspect(model).problems
    assert "fp8-dynamic, but" in problem


def test_an_ignored_name_that_no_tensor_has_is_still_told(make_tiny: Any, tmp_path: Path) -> None:
    """A name in `ignore` that no module has under any prefix is reported."""
    rows = write_rows(tmp_path / "rows.jsonl", random_rows([40] * 3))
    quantize(make_tiny("llama"), "fp8-dynamic", output_dir=tmp_path / "out", dataset=[rows])
    as_llm_compressor(tmp_path / "out", ["lm_head", "model.layers.9.self_attn.q_proj", "visual.blocks.0.attn.qkv"])
    (problem,) = inspect(tmp_path / "out").problems
    assert "model.layers.9.self_attn.q_proj" in problem
    assert "visual.blocks.0.attn.qkv" in problem


@pytest.mark.parametrize(
    ("module", "plain"),
    [
        ("visual.blocks.0.attn.qkv", True),  # ignored as model.visual.blocks.0.attn.qkv
        ("visual.blocks.1.attn.qkv", False),
        ("model.language_model.lm_head", True),
        ("model.visual.pos_embed", True),
        ("vision_model.embeddings.position_embedding", True),
        ("model.language_model.embed_tokens_per_layer", True),
        ("transformer.wpe", True),
        ("model.embed_vision.embedding_projection", False),
        ("gpt_neox.embed_out", False),
        ("model.named.pos_embed", False),  # a target names it
    ],
)
def test_modules_that_stay_plain(module: str, *, plain: bool) -> None:
    """A plain weight may stay plain where `ignore` has it by another prefix, or where it is no linear."""
    groups = [GROUP, GROUP | {"targets": ["model.named.pos_embed"]}]
    targets = Targets(groups, ["model.visual.blocks.0.attn.qkv", "lm_head"], where="config.json")
    assert targets.leaves_plain(module) is plain
