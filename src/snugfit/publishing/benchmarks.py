"""Scores of benchmarks that the Hub registers, as files in .eval_results: huggingface.co/docs/hub/eval-results.

A file has what the benchmark's own rules ask for: whole tasks, no limit of items, the published checkpoint's scores
alone. Scores are in percent, as on the benchmarks' leaderboards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from snugfit.records.evaluation import TaskResult, TasksRecord
from snugfit.report.collection import Collection, counted

FOLDER = ".eval_results"
_MMLU_PRO = (
    *("biology", "business", "chemistry", "computer_science", "economics", "engineering", "health", "history", "law"),
    *("math", "other", "philosophy", "physics", "psychology"),
)


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of the Hub: its dataset and task there, lm_eval's tasks that make it up, and their metric."""

    dataset: str
    task: str
    tasks: tuple[str, ...]
    metric: str


# registered datasets and their tasks: huggingface/hub-docs, docs/hub/eval-results.md; lm_eval's names of the same items
BENCHMARKS: tuple[Benchmark, ...] = (
    Benchmark("openai/gsm8k", "gsm8k", ("gsm8k",), "exact_match,flexible-extract"),
    Benchmark("openai/gsm8k", "gsm8k", ("gsm8k_cot",), "exact_match,flexible-extract"),
    Benchmark("Idavidrein/gpqa", "gpqa_diamond", ("gpqa_diamond_cot_zeroshot",), "exact_match,flexible-extract"),
    Benchmark("Idavidrein/gpqa", "gpqa_diamond", ("gpqa_diamond_zeroshot",), "acc_norm"),
    Benchmark(
        "TIGER-Lab/MMLU-Pro",
        "mmlu_pro",
        tuple(f"mmlu_pro_{subject}" for subject in _MMLU_PRO),
        "exact_match,custom-extract",
    ),
)


def write_hub_results(collection: Collection, folder: Path) -> None:
    """Write a file for each registered benchmark whose tasks were run whole on the published checkpoint."""
    one = collection.checkpoint
    entries: dict[str, Mapping[str, Any]] = {}
    for record in collection.tasks:
        if one is None or record.model != one.name or counted(record.arguments, "limit") is not None:
            continue
        for name, entry in hub_results(record):
            entries.setdefault(name, entry)
    if entries:
        (folder / FOLDER).mkdir()
    for name, entry in entries.items():
        text = yaml.safe_dump([entry], sort_keys=False, allow_unicode=True)
        (folder / FOLDER / f"{name}.yaml").write_text(text, encoding="utf-8")


def hub_results(record: TasksRecord) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """File name and entry of each benchmark whose tasks and metric a record has; a score is the mean over all items."""
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    found = {(result.task, result.metric): result for result in record.tasks}
    for benchmark in BENCHMARKS:
        parts = [found.get((task, benchmark.metric)) for task in benchmark.tasks]
        scores = [score for part in parts if part is not None for score in part.items.values()]
        if any(part is None for part in parts) or not scores or not all(map(math.isfinite, scores)):
            continue
        entry = EvalResultEntry(
            dataset_id=benchmark.dataset,
            task_id=benchmark.task,
            value=round(100 * math.fsum(scores) / len(scores), 2),
            notes=_notes(record, [part for part in parts if part is not None]),
        )
        yield (
            benchmark.tasks[0] if len(benchmark.tasks) == 1 else benchmark.task,
            eval_result_entries_to_yaml([entry])[0],
        )


def _notes(record: TasksRecord, parts: list[TaskResult]) -> str:
    """What ran, in words: the harness, its task, the number of items, one standard error."""
    items = sum(len(part.items) for part in parts)
    name = parts[0].task if len(parts) == 1 else f"{len(parts)} tasks"
    error = parts[0].standard_error if len(parts) == 1 else None
    shown = f", standard error {100 * error:.2f}" if error is not None and math.isfinite(error) else ""
    version = record.versions.get("lm_eval", "")
    return f"lm_eval {version}: {name}, {parts[0].metric}, {items:,} items{shown}; quantized checkpoint"
