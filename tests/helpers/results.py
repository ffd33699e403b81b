"""Result files of `evaluate` and `run_tasks` with chosen figures, as they are stored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from snugfit.records.base import as_json

COUNTS = [4, 4, 4, 4, 4, 2]
SHARED = [8.0, 9.0, 7.0, 10.0, 8.0, 5.0]  # losses that every model has
NO_KL = object()
TEXT = {"name": "novel.txt", "sha256": "0", "kind": "text"}
REFERENCE = {
    "name": "base",
    "header_digest": "0",
    "bytes": 1,
    "arithmetic": "bfloat16",
    "formats": {},
    "kv_cache": None,
    "stored_bytes": None,
}


def task(name: str, scores: list[float], *, metric: str = "acc", **changes: Any) -> dict[str, Any]:
    """One metric, with lm_eval's standard error."""
    items = {f"{number}-ab": score for number, score in enumerate(scores)}
    entry = {
        "task": name,
        "metric": metric,
        "kind": "accuracy" if set(scores) <= {0.0, 1.0} else "mean",
        "higher_is_better": True,
        "value": float(np.mean(scores)),
        "standard_error": float(np.std(scores, ddof=1) / math.sqrt(len(scores))) if len(scores) > 1 else None,
        "items": items,
    }
    return entry | changes


def write_tasks(path: Path, *tasks: Mapping[str, Any], model: str = "m") -> Path:
    document = {
        "snugfit": "0",
        "model": model,
        "arguments": {},
        "tasks": tasks,
        "seconds": {},
        "versions": {},
        "schema": "snugfit.tasks/1",
    }
    path.write_text(as_json(document), encoding="utf-8")
    return path


def model(name: str, sums: list[float], *, kl: Any = NO_KL, **changes: Any) -> dict[str, Any]:
    """One model at one context; `kl` are its chunks' sums."""
    loss = sum(sums) / sum(COUNTS)
    quantiles = dict.fromkeys(("mean", "standard_error", "median", "p90", "p95", "p99", "p999", "max"), 0.1)
    entry = {
        "name": name,
        "perplexity": math.exp(loss),
        "perplexity_error": None,
        "nll_by_chunk": sums,
        "tokens_by_chunk": COUNTS,
        "nonfinite": 0,
        "by_position": [],
        "kl": None if kl is NO_KL else quantiles | {"by_chunk": kl},
    }
    return entry | changes


def context(length: int, *models: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    entry = {
        "context": length,
        "chunks": len(COUNTS),
        "tokens": sum(COUNTS),
        "digest": f"d{length}",
        "chunk_tokens": COUNTS,
        "models": models,
        "pairs": [],
    }
    return entry | changes


def write_eval(path: Path, *contexts: Mapping[str, Any], **changes: Any) -> Path:
    document = {
        "snugfit": "0",
        "arguments": {},
        "metrics_version": 1,
        "reference": REFERENCE,
        "candidates": [],
        "texts": [TEXT],
        "contexts": contexts,
        "continuations": [],
        "seconds": {},
        "peak_rss_bytes": 1,
        "peak_gpu_bytes": None,
        "hardware": {},
        "versions": {},
        "schema": "snugfit.eval/1",
    }
    path.write_text(as_json(document | changes), encoding="utf-8")
    return path


def shifted(*by: float) -> list[float]:
    """SHARED plus a repeating shift a chunk."""
    return [loss + by[place % len(by)] for place, loss in enumerate(SHARED)]


def base() -> dict[str, Any]:
    """The reference of every evaluation."""
    return model("base", SHARED)


def evals(folder: Path, a: list[Mapping[str, Any]], b: list[Mapping[str, Any]]) -> tuple[Path, Path]:
    """Two files of one context of 512 tokens; the models of each come after the reference."""
    pair = folder / "a.json", folder / "b.json"
    return write_eval(pair[0], context(512, base(), *a)), write_eval(pair[1], context(512, base(), *b))


def fixed_scores() -> tuple[list[float], list[float]]:
    """200 items: 30 that only B has right, 5 that only A has right."""
    a = [1.0] * 100 + [0.0] * 65 + [0.0] * 30 + [1.0] * 5
    b = [1.0] * 100 + [0.0] * 65 + [1.0] * 30 + [0.0] * 5
    return a, b


def two_tasks(tmp_path: Path) -> tuple[Path, Path]:
    """An accuracy that differs much, and a loss of which nothing can be said."""
    a, b = fixed_scores()
    rng = np.random.default_rng(0)
    losses = rng.gamma(2.0, 1.0, 40)
    others = losses + rng.normal(0.0, 0.5, 40)
    lower: dict[str, Any] = {"metric": "loss", "higher_is_better": False}
    left = write_tasks(
        tmp_path / "a.json", task("hellaswag", a), task("lambada", losses.tolist(), **lower), model="nvfp4"
    )
    right = write_tasks(
        tmp_path / "b.json", task("hellaswag", b), task("lambada", others.tolist(), **lower), model="hybrid|v_2_"
    )
    return left, right
