"""How much a model's forward pass needs of a GPU, and the error where there is not enough."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from snugfit.errors import UserError
from snugfit.evaluation.evaluated_model import EvaluatedModel
from snugfit.machine import free_bytes

TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 16384}  # at most
BYTES_PER_VALUE = 24  # of a layer's widest activations in flight: several of them in 16 bits, slices of them in fp32


def tokens_that_fit(models: Sequence[EvaluatedModel], device: torch.device) -> int:
    """Tokens in one forward pass whose activations take at most a quarter of a GPU's free memory, at least 1.

    A row of more tokens is run by itself, whatever it needs.
    """
    most = TOKENS_PER_BATCH[device.type]
    if device.type == "cpu":
        return most
    widths = [max(p.shape) for model in models for p in model.skeleton.layers.parameters() if p.dim() == 2]
    return max(1, min(most, free_bytes(device) // (4 * BYTES_PER_VALUE * max(widths, default=1))))


@contextmanager
def gpu_memory_errors(device: torch.device, remedy: str) -> Iterator[None]:
    """torch's error that a GPU's memory is full, as a UserError with this remedy."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        line = str(error).splitlines()[0]
        raise UserError(
            f"out of GPU memory ({line}).", code="gpu-memory-insufficient", where=str(device), remedy=remedy
        ) from None
