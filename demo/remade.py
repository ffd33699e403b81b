"""Read, write and check a one-file checkpoint: shared by the scripts that rotate and upcycle SmolLM2."""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from snugfit.data.dataset import load_dataset
from snugfit.data.python_docs import python_topics
from unpack_smollm2 import file_digest  # scripts import each other by name

WEIGHTS = "model.safetensors"


def read_model(source: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and weights of the directory `source`; SystemExit if either is missing."""
    if not (source / WEIGHTS).is_file() or not (source / "config.json").is_file():
        sys.exit(f"{source} has no {WEIGHTS} or no config.json: unpack the model first")
    return json.loads((source / "config.json").read_text(encoding="utf-8")), load_file(source / WEIGHTS)


def write_model(source: Path, target: Path, config: Mapping[str, Any], weights: dict[str, Tensor]) -> None:
    """Fill the directory `target` with a config, weights, and all other files of `source`."""
    save_file(weights, target / WEIGHTS, metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file in source.iterdir():
        if file.is_file() and file.name not in (WEIGHTS, "config.json"):
            shutil.copy(file, target)


def check(before: Path, after: Path, tolerance: float, failure: str) -> None:
    """Print the perplexity of both on 2 x 512 tokens of Python's documentation; SystemExit if it changed."""
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text.txt"
        text.write_text(python_topics("evaluation"), encoding="utf-8")
        rows = torch.tensor(load_dataset(before, [text], num_samples=2, max_seq_length=512).samples)
    old, new = plain_perplexity(before, rows), plain_perplexity(after, rows)
    print(f"perplexity {old:.4f} -> {new:.4f}; {WEIGHTS} {file_digest(after / WEIGHTS)}")
    if not abs(new / old - 1) < tolerance:
        sys.exit(f"{failure}: nothing was written")


@torch.no_grad()
def plain_perplexity(model: Path, rows: Tensor) -> float:
    """transformers' own perplexity in fp32: bf16 arithmetic alone changes it by 0.6 % on so few tokens."""
    from transformers import AutoModelForCausalLM

    loss = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(input_ids=rows, labels=rows).loss
    return math.exp(float(loss))
