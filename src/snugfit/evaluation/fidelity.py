"""Perplexity of a checkpoint, layer by layer, with the activations that a named engine profile would see."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from snugfit.calibration.dataset import Rows
from snugfit.dialects import compressed_tensors as dialect
from snugfit.engines.profiles import DEFAULT_PROFILE, PROFILES
from snugfit.errors import UserError
from snugfit.formats.spec import TensorFormat
from snugfit.model import emulate, layers, walk
from snugfit.model.checkpoint import Checkpoint, open_checkpoint

TOKENS_PER_BATCH = 4096


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of tokens 2.. of each row; the error is one standard error over rows."""

    value: float
    standard_error: float
    tokens: int
    rows: int
    nll_by_row: tuple[float, ...]


def perplexity(
    checkpoint: str | Path, rows: Rows, *, activations: str = DEFAULT_PROFILE, device: str = "cpu"
) -> Perplexity:
    """Perplexity of a model directory (16-bit or compressed-tensors) on token rows; linears' inputs per profile."""
    sums = [0.0] * len(rows.rows)
    for batch, start, logits in stream_logits(checkpoint, rows, activations=activations, device=device):
        wanted = batch.tokens[:, start + 1 : start + 1 + logits.shape[1]]
        losses = torch.nn.functional.cross_entropy(
            logits[:, : wanted.shape[1]].float().transpose(1, 2), wanted, reduction="none"
        )
        for place, row in enumerate(batch.rows):
            sums[row] += float(losses[place, : max(0, batch.lengths[place] - 1 - start)].double().sum())
    counts = [len(row) - 1 for row in rows.rows]
    return summarize(sums, counts)


def summarize(sums: list[float], counts: list[int]) -> Perplexity:
    """Perplexity from each row's summed negative log-likelihood and number of predicted tokens.

    The standard error is that of the ratio sum/count over rows, carried through exp to first order.
    """
    tokens = sum(counts)
    mean = sum(sums) / tokens
    value = math.exp(mean)
    rows = len(counts)
    if rows < 2:
        return Perplexity(value, math.nan, tokens, rows, tuple(sums))
    spread = sum((s - mean * c) ** 2 for s, c in zip(sums, counts, strict=True)) * rows / (rows - 1)
    return Perplexity(value, value * math.sqrt(spread) / tokens, tokens, rows, tuple(sums))


@torch.no_grad()
def stream_logits(
    checkpoint: str | Path, rows: Rows, *, activations: str = DEFAULT_PROFILE, device: str = "cpu"
) -> Iterator[tuple[walk.Batch, int, Tensor]]:
    """Logits of every row, piece by piece: (batch, first position, [B, t, V]); one decoder layer in memory."""
    if activations not in PROFILES:
        raise UserError(f"unknown activation profile {activations!r}.", remedy=f"Known: {', '.join(PROFILES)}.")
    opened = open_checkpoint(checkpoint)
    place = torch.device(device)
    skeleton = layers.build_skeleton(opened)
    formats: dict[str, TensorFormat] = {}
    if "quantization_config" in opened.config:
        formats = dialect.read_formats(opened.config, sorted(layers.linear_names(skeleton)))
    outside = [module for module in formats if not module.startswith(skeleton.layers_name + ".")]
    if outside:
        raise UserError(f"{outside[0]} is quantized, which is not read yet.", where=str(opened.path))
    batches = walk.make_batches(rows.rows, TOKENS_PER_BATCH, place)
    walk.embed(skeleton, layers.outer_weights(skeleton, opened, head=False), batches, place)
    for index in range(len(skeleton.layers)):
        _pass_layer(opened, skeleton, index, formats, activations, batches, place)
    yield from walk.logits(skeleton, layers.outer_weights(skeleton, opened, head=True), batches, place)


def _pass_layer(
    checkpoint: Checkpoint,
    skeleton: layers.Skeleton,
    index: int,
    formats: Mapping[str, TensorFormat],
    activations: str,
    batches: Sequence[walk.Batch],
    device: torch.device,
) -> None:
    """All batches through one layer, which is gone from memory when this returns."""
    prefix = f"{skeleton.layers_name}.{index}"
    weights, quantizers = emulate.read_layer(checkpoint, prefix, skeleton.layers[index], formats, activations)
    layer = layers.resident_layer(skeleton, index, weights, device)
    emulate.quantize_inputs(layer, quantizers)
    walk.run_layer(layer, index, batches)
