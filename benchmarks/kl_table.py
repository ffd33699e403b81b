"""KL figures of several files on the same text, their paired ratios to one of them, and a Markdown table of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from snugfit.records.evaluation import EvalRecord, ModelFigures


def evaluated(
    files: Sequence[Path],
    reference: Path,
    texts: Sequence[Path],
    contexts: Sequence[int],
    *,
    target: str,
    max_tokens: int | None,
    device: str | None,
) -> EvalRecord:
    """`eval` of files beside their original, the first model of each context; inputs rounded as under `target`."""
    from snugfit.evaluation.evaluate import evaluate

    return evaluate(
        files,
        reference=reference,
        dataset=texts,
        contexts=contexts,
        max_tokens=max_tokens,
        activations=target,
        noise_floor="none",
        device=device,
    )


def figures_of(model: ModelFigures) -> dict[str, Any]:
    """KL with its standard error and its sums by chunk, perplexity, share of the same top token."""
    assert model.kl is not None
    return {
        "kl": model.kl.mean,
        "kl_error": model.kl.standard_error,
        "kl_by_chunk": [float(value) for value in model.kl.by_chunk],
        "perplexity": model.perplexity,
        "same_top": model.same_top,
    }


def with_ratio(figures: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """The figures without their chunks, and the ratio to the base's KL with two standard errors."""
    ratio, two_errors = paired_ratio(figures["kl_by_chunk"], base["kl_by_chunk"])
    kept = {name: value for name, value in figures.items() if name != "kl_by_chunk"}
    return {**kept, "ratio": ratio, "two_errors": two_errors}


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float | None]:
    """Ratio of two sums over the same chunks, and two of its standard errors (Cochran; None for one chunk)."""
    a, b = np.array(ours, float), np.array(theirs, float)
    ratio = float(a.sum() / b.sum())
    n = len(a)
    error = float(np.sqrt(n / (n - 1)) * np.linalg.norm(a - ratio * b) / b.sum()) if n > 1 else None
    return ratio, error and 2 * error


def print_table(entries: Sequence[dict[str, Any]]) -> None:
    """One line a target, context and file; one column a text: KL (ratio +- two errors). A missing figure is a dash."""
    texts = list(dict.fromkeys(entry["text"] for entry in entries))
    print("\n| target | context | file | " + " | ".join(texts) + " |\n|---|---|---|" + "---|" * len(texts))
    keys = dict.fromkeys((entry["target"], entry["context"], entry["file"]) for entry in entries)
    found = {(e["target"], e["context"], e["file"], e["text"]): e for e in entries}
    for key in keys:
        cells = [_cell(found.get((*key, text))) for text in texts]
        print("| " + " | ".join(map(str, key)) + " | " + " | ".join(cells) + " |")


def _cell(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "-"
    margin = "" if entry["two_errors"] is None else f" +- {entry['two_errors']:.2f}"
    return f"{entry['kl']:.4f} ({entry['ratio']:.2f}x{margin})"
