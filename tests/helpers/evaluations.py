"""Records of evaluations whose numbers are known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from snugfit.records.evaluation import (
    Bin,
    ContextFigures,
    EvalRecord,
    EvaluatedCheckpoint,
    Floor,
    ModelFigures,
    PairFigures,
    Spread,
    TextRecord,
)


def _bin(
    low: float,
    high: float,
    tokens: int,
    perplexity: float,
    error: float | None,
    kl: float | None = None,
    kl_error: float | None = None,
    same_top: float | None = None,
) -> Bin:
    return Bin(
        low=low,
        high=high,
        tokens=tokens,
        perplexity=perplexity,
        perplexity_error=error,
        kl=kl,
        kl_error=kl_error,
        same_top=same_top,
    )


def _spread(mean: float, error: float | None) -> Spread:
    quantiles = {"median": 0.03, "p90": 0.1, "p95": 0.2, "p99": 0.3, "p999": 0.4, "max": 0.5}
    return Spread(mean=mean, standard_error=error, by_chunk=(60.0, 94.0), **quantiles)


def model(name: str, **given: Any) -> ModelFigures:
    bins = (_bin(1, 2, 3, 8.0, 0.5), _bin(2, 4, 5, 7.0, None))
    settings: dict[str, Any] = {
        "perplexity": 7.25,
        "perplexity_error": 0.5,
        "nll_by_chunk": (800.0, 1200.0),
        "tokens_by_chunk": (600, 634),
        "nonfinite": 0,
        "by_position": bins,
        "by_confidence": (_bin(0.0, 0.1, 3, 9.0, None), _bin(0.99, 1.0, 5, 6.0, None)),
    }
    return ModelFigures(name=name, **(settings | given))


def candidate(name: str, **given: Any) -> ModelFigures:
    bins = (_bin(1, 2, 3, 8.5, 0.5, 0.5, 0.25, 0.5), _bin(2, 4, 5, 7.5, None, 0.125, None, 1.0))
    settings: dict[str, Any] = {
        "kl": _spread(0.125, 0.0625),
        "reverse_kl": _spread(0.25, None),
        "same_top": 0.875,
        "same_top_error": 0.01,
        "rms_change": 0.0123,
        "loss_change": 0.03125,
        "loss_change_error": 0.0025,
        "by_position": bins,
        "by_confidence": (_bin(0.0, 0.1, 3, 9.0, None, 0.75, 0.5), _bin(0.99, 1.0, 5, 6.0, None, 0.25, None)),
    }
    return model(name, **(settings | given))


FLOOR = Floor(kl=0.0012, standard_error=0.0001, same_top=0.99, chunks=2, tokens=300, arithmetic="float32")


def record_of(*contexts: tuple[int, Sequence[ModelFigures], Sequence[PairFigures]], **given: Any) -> EvalRecord:
    figures = tuple(
        ContextFigures(
            context=length,
            chunks=2,
            tokens=1234,
            digest="0123456789abcdef" * 4,
            chunk_tokens=(600, 634),
            models=tuple(models),
            pairs=tuple(pairs),
        )
        for length, models, pairs in contexts
    )
    settings: dict[str, Any] = {
        "snugfit": "9.9",
        "arguments": {"activations": "vllm-blackwell"},
        "metrics_version": 1,
        "reference": checkpoint("base"),
        "candidates": (checkpoint("plain"), checkpoint("small", nvfp4=14, **{"fp8-dynamic": 7})),
        "texts": (TextRecord("a.txt", "f" * 64, "text"),),
        "contexts": figures,
        "continuations": (),
        "seconds": {"total": 12.3},
        "peak_rss_bytes": 1,
        "peak_gpu_bytes": None,
        "hardware": {"processor": "abacus", "gpu": None},
        "versions": {"torch": "2", "transformers": "5"},
    }
    return EvalRecord(**(settings | given))


def pair(
    a: str,
    b: str,
    figure: Literal["loss", "kl"],
    difference: float,
    interval: tuple[float, float] | None,
    p: float | None,
    chunks: int,
    more_tokens: int | None,
    p_holm: float | None = None,
) -> PairFigures:
    low, high = interval or (None, None)
    return PairFigures(
        a=a,
        b=b,
        figure=figure,
        difference=difference,
        low=low,
        high=high,
        p=p,
        chunks=chunks,
        more_tokens=more_tokens,
        p_holm=p_holm,
    )


def checkpoint(name: str, **formats: int) -> EvaluatedCheckpoint:
    return EvaluatedCheckpoint(
        name=name, header_digest="0", bytes=1, arithmetic="bfloat16", formats=formats, kv_cache=None
    )


PAIRS = (
    pair("plain", "small", "loss", -0.25, (-0.5, -0.125), 0.0002, 12, 0, 0.0004),
    pair("plain", "small", "kl", 0.03125, (-0.25, 0.5), 0.04, 12, 123456, 0.08),
    pair("plain", "c", "kl", 0.5, None, None, 4, None),
)


def two_contexts() -> EvalRecord:
    """Two contexts of a reference and two candidates, and pairs of them at the first."""
    base = model("base", floor=FLOOR)
    small = candidate("small", kl_kind="estimate", kl_sampling_error=0.00045, floor=replace(FLOOR, kl=0.0034))
    served = candidate("m|n (served)", kl_kind="lower bound", perplexity_error=None)
    return record_of(
        (1024, [base, candidate("plain"), small], PAIRS),
        (4096, [base, served, candidate("bad", perplexity=math.nan, nonfinite=17, kl=None, reverse_kl=None)], ()),
    )


def checkpoints(record: EvalRecord) -> list[EvaluatedCheckpoint]:
    """Descriptions of the candidates, none of which is a server."""
    found = [entry for entry in record.candidates if isinstance(entry, EvaluatedCheckpoint)]
    assert len(found) == len(record.candidates)
    return found
