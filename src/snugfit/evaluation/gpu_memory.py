"""How much a model's forward pass needs of memory, and the error where a GPU has not enough."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from snugfit.errors import UserError
from snugfit.evaluation.evaluated_model import EvaluatedModel
from snugfit.machine import free_bytes
from snugfit.model import experts

TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 16384}  # at most
# the remedy of a run that resumes
MORE_TO_RESUME = "Run the same command where more is free, or lower `tokens_per_batch` and set `force_resume`."
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


def experts_that_fit(models: Sequence[EvaluatedModel], device: torch.device) -> int | None:
    """How many routed experts of a layer may be in memory at once; None where all of a layer fit.

    A layer in the wider arithmetic of a noise floor, or as much of it, takes at most half of what is free; UserError
    where one expert is too much.
    """
    limit, size = free_bytes(device) // 2, None
    for model in models:
        skeleton, width = model.skeleton, 2 * model.arithmetic.itemsize
        for index, mixture in skeleton.experts.items():
            layer = skeleton.layers[index]
            module = layer.get_submodule(mixture.module)
            whole = sum(parameter.numel() for parameter in layer.parameters()) * width
            routed = sum(module.get_parameter(name).numel() for name in experts.parameters(module)) * width
            if whole <= limit:
                continue
            one = routed // experts.count(module)
            found = (limit - (whole - routed)) // max(1, one)
            if found < 1:
                need = whole - routed + one
                code = "gpu-memory-insufficient"
                if device.type == "cpu":
                    code = "memory-insufficient"
                raise UserError(
                    f"a layer with one expert needs {need / 1e9:.2f} GB, half of what is free is {limit / 1e9:.2f} GB.",
                    code=code,
                    where=model.name,
                    remedy="Free memory, or use another `device`.",
                )
            size = found if size is None else min(size, found)
    return size


@contextmanager
def gpu_memory_errors(where: object, remedy: str, kind: type[UserError] = UserError) -> Iterator[None]:
    """torch's error that a GPU's memory is full, as a UserError of this `kind`; `where` names the device."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        line = str(error).splitlines()[0]
        raise kind(
            f"out of GPU memory ({line}).", code="gpu-memory-insufficient", where=str(where), remedy=remedy
        ) from None
