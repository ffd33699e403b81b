"""What fits a GPU: every recipe with either KV cache, from headers and config alone. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from snugfit.arguments import as_sequence
from snugfit.engines.gpus import COMMON, GENERATIONS
from snugfit.engines.kernels import attention_kernel
from snugfit.engines.memory import ENGINE_NAMES, ENGINES, EngineMemory
from snugfit.errors import UserError
from snugfit.inspection.doctor import check_layout
from snugfit.model.layout import ModelLayout, read_layout
from snugfit.model.positions import max_positions
from snugfit.model.support import encoder_decoder
from snugfit.planning.candidates import Candidate, candidates_of, read_source, shortest
from snugfit.records.fit import (
    AttentionKernels,
    FitArguments,
    FitCache,
    FitEngine,
    FitGpu,
    FitMemory,
    FitRecord,
    FitRow,
)
from snugfit.version import __version__
from snugfit.vram.blocks import why_not_mixed
from snugfit.vram.budget import make_budget, read_widths
from snugfit.vram.fit import (
    FitResult,
    ServedModel,
    ServeSettings,
    bits_per_weight,
    fit_weights,
    kernel_labels,
    loading_status,
    merge_layers,
    serving_error,
    total_weight_bytes,
)
from snugfit.vram.kv_cache import ModelCache, check_split
from snugfit.vram.kv_cache_config import read_cache
from snugfit.vram.request import parse_gpu

# the longest context that is answered where config.json does not say what the model was made for
UNSTATED_POSITIONS = 2**20
_ACTIVATIONS_IN_4_BITS = ("nvfp4", "mxfp4")


def fit(
    model: str | Path,
    gpu: str,
    *,
    context: int | None = None,
    tensor_parallel_size: int = 1,
    engine: str = "vllm",
    gpu_memory_utilization: float | None = None,
    max_num_seqs: int = 1,
    recipes: str | Path | Sequence[str | Path] = (),
) -> FitRecord:
    """Which recipes, and the model as it is, fit `tensor_parallel_size` GPUs of a size ("16GiB") or name ("RTX 4090").

    Tries `recipes`, or all built-in ones, and whether `context` tokens fit in each of `max_num_seqs` sequences; without
    `context` it finds the longest. Reads headers and config.json of a directory or a Hub model. UserError for invalid
    arguments, a broken model, and a KV cache of unknown size.
    """
    arguments = FitArguments(
        model=str(model),
        gpu=gpu,
        context=context,
        tensor_parallel_size=tensor_parallel_size,
        engine=engine,
        gpu_memory_utilization=gpu_memory_utilization,
        max_num_seqs=max_num_seqs,
        recipes=tuple(map(str, as_sequence(recipes))),
    )
    return fit_beside(model, arguments)


def fit_beside(model: str | Path, arguments: FitArguments, kept_layers: Sequence[int] | None = ()) -> FitRecord:
    """As `fit`, where `kept_layers` keep 16 bits beside an FP8 cache; None: some do, and which ones is not known.

    Where it is not known what an engine takes for that, an FP8 cache counts as one in 16 bits, and a note says why.
    """
    settings = serve_settings(
        arguments.gpu,
        context=arguments.context,
        tensor_parallel_size=arguments.tensor_parallel_size,
        engine=arguments.engine,
        gpu_memory_utilization=arguments.gpu_memory_utilization,
        max_num_seqs=arguments.max_num_seqs,
    )
    layout = read_layout(model)
    for error in encoder_decoder(layout.checkpoint):
        raise error
    served, notes = read_served_model(layout, settings)
    source = read_source(layout)
    candidates, more_notes = candidates_of(source, list(arguments.recipes))
    more_notes += _faults(layout)
    why = "they are not given by number" if kept_layers is None else why_not_mixed(served.cache) if kept_layers else ""
    if why:
        kept_layers = None
        more_notes.append(f"layers keep 16 bits beside an FP8 cache, which counts as one in 16 bits: {why}")
    elements = source.elements()
    rows = sorted((_row(candidate, elements, served, settings, kept_layers) for candidate in candidates), key=_rank)
    return _record(layout.checkpoint.name, arguments, settings, served, rows, (*notes, *more_notes))


def serve_settings(
    gpu: str,
    *,
    context: int | None,
    tensor_parallel_size: int,
    engine: str,
    gpu_memory_utilization: float | None,
    max_num_seqs: int,
) -> ServeSettings:
    """Where and how a model is served, from arguments as in `fit`; UserError for invalid ones."""
    return ServeSettings(
        gpu=parse_gpu(gpu),
        engine=_engine(engine, gpu_memory_utilization, max_num_seqs),
        tensor_parallel_size=_at_least_one("tensor_parallel_size", tensor_parallel_size),
        gpu_memory_utilization=gpu_memory_utilization,
        context=None if context is None else _at_least_one("context", context),
        max_num_seqs=max_num_seqs,
    )


def _faults(layout: ModelLayout) -> list[str]:
    """What `doctor` finds in the headers of a checkpoint that is quantized already."""
    if not layout.method:
        return []
    found = (finding for finding in check_layout(layout) if finding.severity != "note")
    return [f"doctor: {f.severity} ({f.fault}): {f.where}: {f.what}" for f in found]


def _engine(name: str, gpu_memory_utilization: float | None, max_num_seqs: int) -> EngineMemory:
    """The engine's memory rules; UserError for an unknown engine, and for options that it does not have."""
    if name not in ENGINE_NAMES:
        remedy = f"Known engines: {', '.join(ENGINE_NAMES)}."
        raise UserError(f"unknown engine {name!r}.", code="option-invalid", where="engine", remedy=remedy)
    if gpu_memory_utilization is not None and not 0 < gpu_memory_utilization <= 1:
        raise UserError(
            f"must be > 0 and <= 1, got {gpu_memory_utilization:g}.",
            code="option-invalid",
            where="gpu_memory_utilization",
            remedy="Leave it out for the engine's own share.",
        )
    memory = ENGINES[name]
    if _at_least_one("max_num_seqs", max_num_seqs) > 1 and memory.sharing == "whole card":
        return ENGINES["aphrodite-many"]
    if gpu_memory_utilization is not None and memory.sharing == "whole card":
        raise UserError(
            f"{memory.title} takes the memory that one sequence needs, not a share of the GPU.",
            code="option-conflict",
            where="gpu_memory_utilization",
            remedy="Leave it out.",
        )
    return memory


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise UserError(f"must be >= 1, got {value}.", code="option-invalid", where=name, remedy="The minimum is 1.")
    return value


def read_served_model(layout: ModelLayout, settings: ServeSettings) -> tuple[ServedModel, list[str]]:
    """Shapes from config.json, and remarks on them; UserError where the model cannot be served as asked."""
    for blocker in layout.blockers:
        if blocker.error.code == "config-invalid":
            raise blocker.error
    config = layout.config
    try:
        cache = read_cache(config)
    except UserError as error:
        raise error.at(layout.config_file) from None
    check_split(cache, settings.tensor_parallel_size)
    notes = [*cache.notes, *layout.contradictions, *([] if settings.gpu.note is None else [settings.gpu.note])]
    positions = max_positions(config)
    if positions is None:
        positions = UNSTATED_POSITIONS
        notes.append(f"config.json does not state the longest context of the model: {positions:,} tokens are assumed")
    if settings.context is not None and settings.context > positions:
        raise UserError(
            f"{settings.context:,} tokens are more than the {positions:,} that the model was made for.",
            code="sequence-too-long",
            where="context",
            remedy=f"Ask for {positions} at most.",
        )
    return ServedModel(cache, read_widths(config, cache), positions), notes


def _record(
    model: str,
    arguments: FitArguments,
    settings: ServeSettings,
    served: ServedModel,
    rows: Sequence[FitRow],
    notes: tuple[str, ...],
) -> FitRecord:
    gpu, engine, tp = settings.gpu, settings.engine, settings.tensor_parallel_size
    sizes = served.cache.size(tp=tp)
    budget = make_budget(0, served.widths, engine, gpu, gpu_memory_utilization=settings.gpu_memory_utilization, tp=tp)
    return FitRecord(
        snugfit=__version__,
        model=model,
        arguments=arguments,
        gpu=FitGpu(gpu.title, gpu.reported_bytes, gpu.generation and GENERATIONS[gpu.generation]),
        engine=FitEngine(engine.name, engine.title, engine.sharing),
        memory=FitMemory(
            share_bytes=budget.share_bytes,
            activation_bytes=budget.activation_bytes,
            position_table_bytes=budget.weight_bytes,
            other_bytes=budget.other_bytes,
            outside_budget_bytes=budget.outside_budget_bytes,
        ),
        attention=_attention(served.cache, settings),
        context=settings.context,
        max_positions=served.max_positions,
        windows=tuple(window for window, _ in sizes.windows),
        state_bytes=sizes.state_bytes,
        rows=tuple(rows),
        notes=notes,
    )


def _attention(cache: ModelCache, settings: ServeSettings) -> dict[str, AttentionKernels]:
    """The kernels that read the KV cache, by GPU generation."""
    generations = (settings.gpu.generation,) if settings.gpu.generation else COMMON
    latent = any(attention.latent for attention in cache.attention)
    engine = settings.engine.engine
    return {
        GENERATIONS[generation]: AttentionKernels(
            auto=attention_kernel(engine, generation, fp8=False, latent=latent),
            fp8=attention_kernel(engine, generation, fp8=True, latent=latent),
        )
        for generation in generations
    }


def _row(
    candidate: Candidate,
    elements: Mapping[str, int],
    model: ServedModel,
    settings: ServeSettings,
    kept_layers: Sequence[int] | None,
) -> FitRow:
    tensors, tp = merge_layers(candidate.tensors), settings.tensor_parallel_size
    formats = tuple(dict.fromkeys(tensor.format.label() for tensor in tensors if tensor.format is not None))
    names = (*candidate.recipes, *candidate.with_fp8_cache)
    problem = candidate.problem or serving_error(model, tensors, settings, tp)
    if problem is not None:
        return FitRow(name=candidate.name, recipes=names, formats=formats, problem=problem)
    auto = fit_weights(model, tensors, settings, fp8=False)
    narrow, kept = kept_layers is not None, kept_layers or ()
    fp8 = fit_weights(model, tensors, settings, fp8=narrow, kept_layers=kept)
    plain = shortest(candidate.recipes) if candidate.recipes else None
    scaled = shortest(candidate.with_fp8_cache) if candidate.with_fp8_cache else plain
    return FitRow(
        name=candidate.name,
        recipes=names,
        formats=formats,
        bytes=total_weight_bytes(tensors),
        bytes_per_gpu=auto.weight_bytes,
        bits_per_weight=bits_per_weight(tensors, elements),
        caches=(
            _cache("auto", plain, auto, model.cache.size(tp=tp).bytes_per_token),
            _cache("fp8", scaled, fp8, model.cache.size(fp8=narrow, tp=tp, kept_layers=kept).bytes_per_token),
        ),
        kernels={
            GENERATIONS[key]: labels for key, labels in kernel_labels(tensors, settings, model.cache.kv_heads).items()
        },
        loads={GENERATIONS[key]: status for key, status in loading_status(tensors, settings).items()},
    )


def _cache(kv_cache: str, recipe: str | None, found: FitResult, bytes_per_token: int) -> FitCache:
    return FitCache(
        kv_cache=kv_cache,
        recipe=recipe,
        bytes_per_token=bytes_per_token,
        max_context=found.max_context,
        fits=found.fits,
        headroom_bytes=found.headroom_bytes,
        gpus_needed=found.gpus_needed,
    )


def _rank(row: FitRow) -> tuple[int, float, float]:
    """Sort key: rows that fit, more bits first (an FP8 cache costs less than fewer bits); then by missing memory."""
    if row.problem is not None:
        return 2, 0.0, 0.0
    bits = -round(row.bits_per_weight or 0.0, 2)
    if row.fits:
        # of the same bits, 16-bit activations lose less
        return 0, bits, sum(label in _ACTIVATIONS_IN_4_BITS for label in row.formats)
    return 1, -max(cache.headroom_bytes for cache in row.caches), bits
