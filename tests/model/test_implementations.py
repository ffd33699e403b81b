"""A config.json that asks for kernels of attention or experts gives the results of one that does not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.tiny_families import all_tensors, random_rows, same, write_rows
from snugfit.evaluation.evaluate import evaluate
from snugfit.quantization.quantize import quantize

MakeTiny = Callable[..., Path]


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "_experts_implementation"])
@pytest.mark.parametrize("value", ["flash_attention_2", "flex_attention", "eager"])
def test_what_a_config_asks_for_changes_nothing(key: str, value: str, make_tiny: MakeTiny, tmp_path: Path) -> None:
    """`quantize` writes the same bytes and `evaluate` finds the same perplexity, also without that package."""
    plain, asking = make_tiny("llama"), tmp_path / "asking"
    shutil.copytree(plain, asking)
    config = json.loads((asking / "config.json").read_text(encoding="utf-8"))
    (asking / "config.json").write_text(json.dumps(config | {key: value}), encoding="utf-8")
    rows = write_rows(tmp_path / "rows.jsonl", random_rows([40] * 4))
    found = []
    for model in (plain, asking):
        out = tmp_path / f"{model.name}-out"
        quantize(model, "nvfp4-four-over-six", output_dir=out, dataset=[rows])
        record = evaluate([model], dataset=[rows], contexts=(32,), continuations=0)
        found.append((all_tensors(out), record.contexts[0].models[0].perplexity))
    (before, perplexity), (after, again) = found
    assert before.keys() == after.keys()
    assert all(same(before[name], after[name]) for name in before)
    assert perplexity == again
