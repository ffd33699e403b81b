"""The longest context of a checkpoint as it is on many GPUs at once, for reports. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from snugfit.engines.gpus import CARDS, GENERATIONS, Card
from snugfit.engines.loading import loading
from snugfit.engines.memory import ENGINES
from snugfit.errors import UserError
from snugfit.model.layout import ModelLayout, read_layout
from snugfit.planning.candidates import Candidate, as_it_is, read_source
from snugfit.planning.fit import read_served_model
from snugfit.report.collection import KernelUse, ServedFit
from snugfit.vram.fit import (
    FitResult,
    ServedModel,
    ServeSettings,
    fit_weights,
    kernels_of,
    linears_on_gpu,
    merge_layers,
    serving_error,
)
from snugfit.vram.request import gpu_of

# engine -> its memory rules, for one sequence and for more
REPORTED_ENGINES = ("vllm", "aphrodite", "sglang")
GPU_COUNTS, SEQUENCES = (1, 2, 4), (1, 8, 40)


@dataclass(frozen=True, kw_only=True)
class Served:
    """What engines do with a checkpoint: the tokens that it was made for, what fits each GPU, and the kernels."""

    max_positions: int
    fits: tuple[ServedFit, ...]
    kernels: tuple[KernelUse, ...]


def served_fits(
    model: str | Path,
    *,
    cards: Sequence[Card] = CARDS,
    gpu_counts: Sequence[int] = GPU_COUNTS,
    sequences: Sequence[int] = SEQUENCES,
) -> Served:
    """What fits each card, engine, number of cards and of sequences, and which kernels run there.

    Reads headers and config.json. UserError for a broken model, and for a KV cache of unknown size.
    """
    layout = read_layout(model)
    candidate = as_it_is(read_source(layout))
    if candidate.problem is not None:
        raise UserError(candidate.problem, code="quantization-invalid", where=layout.config_file)
    candidate = replace(candidate, tensors=merge_layers(candidate.tensors))
    # the shapes that each GPU of a number of them has, or why the heads cannot be split; one GPU needs no split
    shapes = {gpus: _shapes(layout, gpus) for gpus in gpu_counts}
    found = [
        _fit(shapes[gpus], candidate, card, engine, gpus, count)
        for card in cards
        for engine in REPORTED_ENGINES
        for gpus in gpu_counts
        for count in sequences
    ]
    served, _ = read_served_model(layout, _settings(cards[0], REPORTED_ENGINES[0], 1, 1))
    return Served(max_positions=served.max_positions, fits=tuple(found), kernels=tuple(_kernels(candidate)))


def _kernels(candidate: Candidate) -> Iterator[KernelUse]:
    """For each engine, generation and quantized format, experts where theirs differ."""
    linears = linears_on_gpu(candidate.tensors, 1, None)
    for engine in REPORTED_ENGINES:
        for generation, title in GENERATIONS.items():
            for (fmt, experts), some in linears.items():
                kernels = kernels_of(engine, fmt, generation, some, experts=experts)
                yield KernelUse(
                    engine=engine,
                    generation=title,
                    format=f"{fmt}, experts" if experts else fmt,
                    kernel=", ".join(kernel.name for kernel in kernels) or None,
                    arithmetic=kernels[0].arithmetic if kernels else None,
                    seen=loading(engine, fmt, generation) == "seen",
                )


def _settings(card: Card, engine: str, gpus: int, sequences: int) -> ServeSettings:
    name = "aphrodite-many" if engine == "aphrodite" and sequences > 1 else engine
    return ServeSettings(
        gpu=gpu_of(card),
        engine=ENGINES[name],
        tensor_parallel_size=gpus,
        gpu_memory_utilization=None,
        context=None,
        max_num_seqs=sequences,
    )


def _shapes(layout: ModelLayout, gpus: int) -> ServedModel | str:
    try:
        return read_served_model(layout, _settings(CARDS[0], REPORTED_ENGINES[0], gpus, 1))[0]
    except UserError as error:
        if gpus == 1:
            raise
        return error.what  # its heads cannot be split


def _fit(
    served: ServedModel | str, candidate: Candidate, card: Card, engine: str, gpus: int, sequences: int
) -> ServedFit:
    settings = _settings(card, engine, gpus, sequences)
    found = ServedFit(
        card=card.name,
        engine=engine,
        engine_title=settings.engine.title,
        tensor_parallel_size=gpus,
        max_num_seqs=sequences,
        auto=0,
        fp8=0,
        headroom_bytes=0,
    )
    if isinstance(served, str):
        return replace(found, problem=served)
    problem = serving_error(served, candidate.tensors, settings, gpus)
    if problem is not None:
        return replace(found, problem=problem)
    auto, fp8 = _both(served, candidate, settings)
    return replace(found, auto=auto.max_context, fp8=fp8.max_context, headroom_bytes=auto.headroom_bytes)


def _both(served: ServedModel, candidate: Candidate, settings: ServeSettings) -> tuple[FitResult, FitResult]:
    """With a 16-bit and with an FP8 KV cache."""
    return (
        fit_weights(served, candidate.tensors, settings, fp8=False),
        fit_weights(served, candidate.tensors, settings, fp8=True),
    )
