"""What fits: recipes x KV caches on a GPU, from headers and config alone. Imports no torch and no transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import snugfit
from snugfit.engines.gpus import COMMON, GENERATIONS
from snugfit.engines.kernels import attention_kernel
from snugfit.engines.memory import ENGINES, GIB, OFFERED
from snugfit.errors import UserError
from snugfit.planning.candidates import Candidate, candidates_of, read_source, shortest, stored_by_plan
from snugfit.quantization.plan import Plan
from snugfit.records.fit import FitCache, FitRecord, FitRow
from snugfit.report.fit import say_cache
from snugfit.storage.open import open_headers
from snugfit.vram.budget import longest_position, read_widths, share_out
from snugfit.vram.fit import (
    Answer,
    Model,
    Setting,
    answer,
    bits_per_weight,
    kernels,
    per_gpu,
    problem,
    total,
)
from snugfit.vram.kv_cache import ModelCache, check_split
from snugfit.vram.kv_cache_config import read_cache
from snugfit.vram.request import parse_gpu

UNLIMITED = 2**20


def fit_model(
    model: str | Path,
    gpu: str,
    *,
    context: int | None = None,
    tp: int = 1,
    engine: str = "vllm",
    utilization: float | None = None,
    sequences: int = 1,
    recipes: Sequence[str] = (),
) -> FitRecord:
    """What fits on `tp` GPUs of that size or name, of every built-in recipe (or of `recipes`) and the model as it is.

    `context` tokens in each of `sequences` are asked for; without, the longest is told. Reads headers and config.json
    of a directory or of a Hub model; UserError for bad input, and for a cache of an unknown kind.
    """
    setting = _setting(gpu, engine, tp, utilization, context, sequences)
    checkpoint = open_headers(model)
    shape, notes = _read_model(checkpoint.config, setting)
    source = read_source(checkpoint)
    candidates, more = candidates_of(source, recipes)
    elements = source.elements()
    rows = sorted((_row(candidate, elements, shape, setting) for candidate in candidates), key=_order)
    arguments: dict[str, Any] = {"model": str(model), "gpu": gpu, "context": context, "tp": tp, "engine": engine}
    arguments |= {"utilization": utilization, "sequences": sequences, "recipes": list(recipes)}
    sizes = shape.cache.size(tp=tp)
    budget = share_out(0, shape.widths, setting.engine, setting.gpu.device, utilization=utilization, tp=tp)
    return FitRecord(
        snugfit=snugfit.__version__,
        model=checkpoint.name,
        arguments=arguments,
        gpu={
            "name": setting.gpu.title,
            "reported_bytes": setting.gpu.device.reported,
            "generation": setting.gpu.generation and GENERATIONS[setting.gpu.generation],
        },
        engine={"name": setting.engine.name, "title": setting.engine.title, "sharing": setting.engine.sharing},
        memory={
            "share": budget.share,
            "activations": budget.activations,
            "besides": budget.besides,
            "positions": budget.weights,
            "outside": budget.on_top,
        },
        attention=_attention(shape.cache, setting),
        context=context,
        limit=shape.limit,
        windows=tuple(window for window, _ in sizes.windows),
        state_bytes=sizes.state_bytes,
        rows=tuple(rows),
        notes=(*notes, *more),
    )


def fit_line(plan: Plan, gpu: str, *, context: int | None = None, tp: int = 1, engine: str = "vllm") -> str:
    """One line on a planned quantization: its weights on that GPU, and the context that fits with either KV cache."""
    setting = _setting(gpu, engine, tp, None, context, 1)
    model, _ = _read_model(plan.checkpoint.config, setting)
    stored = stored_by_plan(plan)
    place = f"{setting.gpu.title if tp == 1 else f'{tp} x {setting.gpu.title}'}, {setting.engine.title}"
    uneven = problem(model, stored, setting, tp)
    if uneven is not None:
        return f"{place}: {uneven}"
    told = []
    for kind, name in (("auto", "a 16-bit KV cache"), ("fp8", "an FP8 one")):
        found = _cache(kind, None, answer(model, stored, setting, fp8=kind == "fp8"), 0)
        told.append(f"{say_cache(found, context, model.limit)} with {name}")
    heads = next((a.heads for a in model.cache.attention if not a.latent), None)
    return f"{place}: {per_gpu(stored, tp, heads) / GIB:.2f} GiB of weights; {', '.join(told)}"


def _read_model(config: Mapping[str, Any], setting: Setting) -> tuple[Model, list[str]]:
    """Shapes from config.json, and what is to be said of them; UserError where they cannot be served as asked."""
    cache = read_cache(config)
    check_split(cache, setting.tp)
    notes = [*cache.notes, *([] if setting.gpu.note is None else [setting.gpu.note])]
    limit = longest_position(config)
    if limit is None:
        limit = UNLIMITED
        notes.append(f"config.json does not say how many tokens the model was made for: {limit:,} are told at most")
    if setting.context is not None and setting.context > limit:
        what = f"the model was made for {limit:,} tokens."
        raise UserError(what, where=f"--context {setting.context}", remedy="Ask for less.")
    return Model(cache, read_widths(config, cache), limit), notes


def _attention(cache: ModelCache, setting: Setting) -> dict[str, tuple[str, str]]:
    """What reads the cache in 16 bits and in FP8, by GPU generation."""
    generations = (setting.gpu.generation,) if setting.gpu.generation else COMMON
    latent = any(attention.latent for attention in cache.attention)
    engine = setting.engine.engine
    return {
        GENERATIONS[generation]: (
            attention_kernel(engine, generation, fp8=False, latent=latent),
            attention_kernel(engine, generation, fp8=True, latent=latent),
        )
        for generation in generations
    }


def _setting(gpu: str, engine: str, tp: int, utilization: float | None, context: int | None, sequences: int) -> Setting:
    """What was asked for, checked."""
    if engine not in OFFERED:
        raise UserError(f"no engine {engine!r} here.", where="--engine", remedy=f"Known: {', '.join(OFFERED)}.")
    for name, value in (("--tp", tp), ("--sequences", sequences), ("--context", 1 if context is None else context)):
        if value < 1:
            raise UserError(f"{value} is none.", where=name, remedy="Give a number from 1 on.")
    if utilization is not None and not 0 < utilization <= 1:
        raise UserError(
            f"a share of {utilization:g} is none.", where="--gpu-memory-utilization", remedy="Give one up to 1."
        )
    memory = ENGINES[engine]
    if memory.sharing == "whole card":
        if sequences > 1:
            memory = ENGINES["aphrodite-many"]
        elif utilization is not None:
            raise UserError(
                f"{memory.title} takes what one sequence needs, not a share.",
                where="--gpu-memory-utilization",
                remedy="Leave it out.",
            )
    return Setting(parse_gpu(gpu), memory, tp, utilization, context, sequences)


def _row(candidate: Candidate, elements: Mapping[str, int], model: Model, setting: Setting) -> FitRow:
    formats = tuple(dict.fromkeys(w.format.label() for w in candidate.stored if w.format is not None))
    reason = candidate.problem or problem(model, candidate.stored, setting, setting.tp)
    names = (*candidate.recipes, *candidate.with_fp8_cache)
    if reason is not None:
        return FitRow(candidate.name, names, formats, problem=reason)
    answers = [answer(model, candidate.stored, setting, fp8=fp8) for fp8 in (False, True)]
    plain = shortest(candidate.recipes) if candidate.recipes else None
    scaled = shortest(candidate.with_fp8_cache) if candidate.with_fp8_cache else plain
    caches = [
        _cache("auto", plain, answers[0], model.cache.size(tp=setting.tp).bytes_per_token),
        _cache("fp8", scaled, answers[1], model.cache.size(fp8=True, tp=setting.tp).bytes_per_token),
    ]
    return FitRow(
        name=candidate.name,
        recipes=names,
        formats=formats,
        bytes=total(candidate.stored),
        gpu_bytes=answers[0].weights,
        bits_per_weight=bits_per_weight(candidate.stored, elements),
        caches=tuple(caches),
        kernels={GENERATIONS[key]: words for key, words in kernels(candidate.stored, setting).items()},
    )


def _cache(kind: str, recipe: str | None, found: Answer, token: int) -> FitCache:
    return FitCache(kind, recipe, token, found.longest, found.fits, found.spare, found.gpus)


def _order(row: FitRow) -> tuple[int, float, float]:
    """What fits goes first, more bits before fewer (an FP8 cache costs less than fewer bits); then what lacks least."""
    if row.problem is not None:
        return 2, 0.0, 0.0
    bits = -round(row.bits_per_weight or 0.0, 2)
    if row.fits:
        # of the same bits, 16-bit activations lose less
        return 0, bits, sum(label in ("nvfp4", "mxfp4") for label in row.formats)
    return 1, -max(cache.spare_bytes for cache in row.caches), bits
