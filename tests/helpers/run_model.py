"""A checkpoint on given samples, as snugfit runs it: its logits, and its figures by `evaluate`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from snugfit.data.dataset import Dataset
from snugfit.engines.profiles import DEFAULT_PROFILE
from snugfit.evaluation.evaluate import evaluate
from snugfit.evaluation.evaluated_model import TOKENS_PER_BATCH, open_head, open_model, pass_layers
from snugfit.model import forward_pass
from snugfit.records.evaluation import ModelFigures


@torch.no_grad()
def stream_logits(
    checkpoint: str | Path, dataset: Dataset, *, activations: str = DEFAULT_PROFILE
) -> Iterator[tuple[forward_pass.Batch, int, Tensor]]:
    """Logits of every sample, piece by piece: (batch, first position, [B, t, V]); one decoder layer in memory."""
    device = torch.device("cpu")
    model = open_model(checkpoint, activations=activations)
    batches = pass_layers(model, dataset.samples, device, tokens_per_batch=TOKENS_PER_BATCH)
    yield from forward_pass.logits(open_head(model, device), batches)


def figures_of(checkpoint: str | Path, dataset: Dataset, **options: Any) -> ModelFigures:
    """Perplexity of a checkpoint on samples, and loss by sample."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "samples.jsonl"
        file.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in dataset.samples), encoding="utf-8")
        record = evaluate([checkpoint], dataset=[file], continuations=0, **options)
    return record.contexts[0].models[0]
