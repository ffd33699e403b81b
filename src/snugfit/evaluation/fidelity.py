"""Perplexity of one checkpoint, layer by layer, with the activations that a named engine profile would see."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from snugfit.data.dataset import Dataset
from snugfit.engines.profiles import DEFAULT_PROFILE
from snugfit.evaluation.significance import ratio_mean
from snugfit.evaluation.subject import TOKENS_PER_BATCH, open_head, open_subject, pass_layers
from snugfit.model import forward_pass


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of tokens 2.. of each row; the error is one standard error over rows."""

    value: float
    standard_error: float
    tokens: int
    rows: int
    nll_by_row: tuple[float, ...]


def perplexity(
    checkpoint: str | Path, rows: Dataset, *, activations: str = DEFAULT_PROFILE, device: str = "cpu"
) -> Perplexity:
    """Perplexity of a model directory (16-bit or quantized) on token rows; linears' inputs per profile."""
    sums = [0.0] * len(rows.samples)
    for batch, start, logits in stream_logits(checkpoint, rows, activations=activations, device=device):
        wanted = batch.tokens[:, start + 1 : start + 1 + logits.shape[1]]
        losses = torch.nn.functional.cross_entropy(
            logits[:, : wanted.shape[1]].float().transpose(1, 2), wanted, reduction="none"
        )
        for place, row in enumerate(batch.rows):
            sums[row] += float(losses[place, : max(0, batch.lengths[place] - 1 - start)].double().sum())
    counts = [len(row) - 1 for row in rows.samples]
    return summarize(sums, counts)


def summarize(sums: list[float], counts: list[int]) -> Perplexity:
    """Perplexity from each row's summed negative log-likelihood and number of predicted tokens.

    The standard error is that of the ratio sum/count over rows, carried through exp to first order.
    """
    mean, error = ratio_mean(sums, counts)
    value = math.exp(mean)
    return Perplexity(value, math.nan if error is None else value * error, sum(counts), len(counts), tuple(sums))


@torch.no_grad()
def stream_logits(
    checkpoint: str | Path, rows: Dataset, *, activations: str = DEFAULT_PROFILE, device: str = "cpu"
) -> Iterator[tuple[forward_pass.Batch, int, Tensor]]:
    """Logits of every row, piece by piece: (batch, first position, [B, t, V]); one decoder layer in memory."""
    place = torch.device(device)
    subject = open_subject(checkpoint, activations=activations)
    batches = pass_layers(subject, rows.samples, place, tokens_per_batch=TOKENS_PER_BATCH)
    yield from forward_pass.logits(open_head(subject, place), batches)
