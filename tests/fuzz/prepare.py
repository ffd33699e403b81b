"""What fuzz cases with weights damage: a tiny model with a tokenizer, its quantized copy, a run that was stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import TINY
from helpers.importance import measure, write_gguf, write_legacy
from helpers.tiny_mixtures import make_mixture
from helpers.tiny_tokenizer import add_tokenizer
from quantization.test_resume import stop_in_layer
from snugfit.evaluation.evaluate import evaluate
from snugfit.quantization.collect import collect_statistics
from snugfit.quantization.quantize import quantize

UNFINISHED = "nvfp4-fp8-hybrid-fp8kv-four-over-six"
PROSE = "The quick brown fox jumps over the lazy dog, and nobody minds it. " * 12


def prepare_runs(shared: Path, *, unfinished: bool) -> None:
    """model, quantized, text.txt, rows.jsonl; where asked for out.partial and whole.json, the record of the whole."""
    import matplotlib.font_manager  # looks for fonts once
    from transformers import AutoConfig, AutoModelForCausalLM

    assert matplotlib.font_manager.fontManager
    torch.manual_seed(0)
    settings = AutoConfig.for_model("llama", **{**TINY, "num_hidden_layers": 2})
    AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16).save_pretrained(shared / "model")
    add_tokenizer(shared / "model")
    (shared / "text.txt").write_text(PROSE, encoding="utf-8")
    rows = torch.randint(3, 59, (3, 32)).tolist()
    (shared / "rows.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows), encoding="utf-8")
    asked: dict[str, Any] = {
        "dataset": [shared / "rows.jsonl"],
        "num_samples": 3,
        "max_seq_length": 32,
        "device": "cpu",
    }
    quantize(shared / "model", "nvfp4-fp8-hybrid-four-over-six", output_dir=shared / "quantized", **asked)
    evaluate(
        [shared / "quantized"],
        reference=shared / "model",
        dataset=[shared / "text.txt"],
        contexts=[16],
        max_chunks=2,
        reference_cache=shared / "references",
        device="cpu",
    )
    next((shared / "references").iterdir()).rename(shared / "reference.safetensors")
    if not unfinished:
        return
    record = quantize(shared / "model", UNFINISHED, output_dir=shared / "whole", **asked)
    (shared / "whole.json").write_text(record.to_json(), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        stop_in_layer(patch, 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            quantize(shared / "model", UNFINISHED, output_dir=shared / "out", **asked)
    shutil.rmtree(shared / "whole")


def prepare_statistics(shared: Path) -> None:
    """Besides a mixture, and statistics of both models over two files of rows: model-0.json to mixture-1.json."""
    make_mixture("mixtral", shared / "mixture")
    torch.manual_seed(1)
    other = torch.randint(3, 59, (3, 32)).tolist()
    (shared / "other.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in other), "utf-8")
    for model in ("model", "mixture"):
        for number, rows in enumerate(("rows", "other")):
            out = shared / "collected"
            collect_statistics(shared / model, output_dir=out, dataset=[shared / f"{rows}.jsonl"], device="cpu")
            (out / "snugfit-statistics.json").rename(shared / f"{model}-{number}.json")
            shutil.rmtree(out)


def prepare_imatrices(shared: Path) -> None:
    """Beside a mixture, importance matrices of both models in both formats: model.gguf to mixture.dat."""
    make_mixture("mixtral", shared / "mixture")
    rows = [json.loads(line)["input_ids"] for line in (shared / "rows.jsonl").read_text("utf-8").splitlines()]
    for model in ("model", "mixture"):
        sums = measure(shared / model, rows)
        write_gguf(shared / f"{model}.gguf", sums)
        write_legacy(shared / f"{model}.dat", sums)
