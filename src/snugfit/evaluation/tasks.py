"""Benchmark tasks run by lm_eval on a checkpoint or a server, every item's score kept under a stable key."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from snugfit import machine
from snugfit.engines.profiles import DEFAULT_PROFILE
from snugfit.errors import UserError
from snugfit.evaluation.evaluated_model import TOKENS_PER_BATCH, open_model, refuse_hub_id
from snugfit.evaluation.gpu_memory import tokens_that_fit
from snugfit.evaluation.task_loading import check_tasks, load_tasks
from snugfit.evaluation.task_models import local_model, served_model
from snugfit.progress import SILENT, Progress, TerminalProgress
from snugfit.records.evaluation import TaskResult, TasksRecord
from snugfit.storage.staging import staged
from snugfit.version import __version__

SEED = 0  # of few-shot examples
_NUMBERS = (int, float, np.number, np.bool_)


@dataclass(frozen=True, kw_only=True)
class TasksRun:
    """The result of `run_tasks`: the record, and what is too long or too irregular for it.

    `samples` are the lines of the per-sample log (task, filter, key, doc_id, target, filtered responses, metrics), fit
    for JSON; `reported` lm_eval's own figures by task or group; `left_out` the metrics that have no score by item;
    `nonfinite` the number of requests with NaN or infinite logits, whose log-likelihood was taken as minus infinity;
    `warnings` what lm_eval and its libraries warned about.
    """

    record: TasksRecord
    samples: tuple[Mapping[str, Any], ...]
    reported: Mapping[str, Mapping[str, float]]
    left_out: tuple[str, ...]
    nonfinite: int
    warnings: tuple[str, ...]


def run_tasks(
    model: str | Path,
    tasks: Sequence[str],
    *,
    activations: str | None = None,
    limit: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    server: str | None = None,
    server_model: str | None = None,
    task_folder: str | Path | None = None,
    progress: Progress = SILENT,
) -> TasksRun:
    """Run lm_eval tasks on the model directory `model`, or on the `server` at a URL with that directory's tokenizer.

    `activations` is the engine profile of the model, by default vllm-blackwell. `limit` is the number of items of each
    task; `dtype` as in `evaluate`; `task_folder` has further YAML tasks, as `lm_eval --include_path`.

    UserError, before the model is run, for a missing extra, unknown tasks, data out of reach, a server that does not
    answer, and on a checkpoint for tasks that generate text.
    """
    _check_extra(server)
    refuse_hub_id(model)
    if limit is not None and limit < 1:
        raise UserError(f"must be >= 1, got {limit}.", code="option-invalid", where="limit")
    for name, value in (("activations", activations), ("device", device)):
        if server is not None and value is not None:
            what = "has no effect on what a server runs."
            raise UserError(what, code="option-conflict", where=name, remedy="Leave it out, or leave `server` out.")
    clock = machine.Clock()
    place = machine.pick_device("cpu" if server else device)
    arguments: dict[str, Any] = {"tasks": list(tasks), "limit": limit, "seed": SEED}
    arguments |= {"server": server, "server_model": server_model}
    with _quiet(progress) as warnings:
        with clock("load"):
            if server is None:
                profile = DEFAULT_PROFILE if activations is None else activations
                opened = open_model(model, activations=profile, arithmetic=machine.pick_dtype(dtype))
                batch = min(TOKENS_PER_BATCH, tokens_that_fit([opened], place))
                arguments |= {"activations": profile, "device": str(place), "tokens_per_batch": batch, "dtype": dtype}
                lm = local_model(opened, place, batch, progress)
            else:
                lm = served_model(Path(model), server, server_model, SEED)
            loaded = load_tasks(tasks, None if task_folder is None else Path(task_folder), seed=SEED)
            check_tasks(loaded["tasks"], generates=server is not None)
        with clock("evaluate"):
            results = _evaluate(lm, loaded, limit, server)
    rows, left_out = _convert(results, loaded["tasks"])
    versions = machine.versions() | {name: importlib.metadata.version(name) for name in ("lm_eval", "datasets")}
    record = TasksRecord(
        snugfit=__version__,
        model=Path(model).resolve().name,
        arguments=arguments,
        tasks=tuple(rows),
        seconds=clock.seconds,
        versions=versions | {f"task {name}": str(version) for name, version in results["versions"].items()},
    )
    return TasksRun(
        record=record,
        samples=tuple(_sample(name, line) for name in loaded["tasks"] for line in results["samples"][name]),
        reported=_reported(results),
        left_out=tuple(left_out),
        nonfinite=getattr(lm, "nonfinite", 0),
        warnings=tuple(warnings),
    )


def check_served_tasks(tasks: Sequence[str]) -> None:
    """UserError for what `run_tasks` would refuse of tasks on a server, before there is one."""
    _check_extra("any")
    with _quiet(SILENT):
        check_tasks(load_tasks(tasks, seed=SEED)["tasks"], generates=True)


def write_tasks(run: TasksRun, directory: str | Path) -> None:
    """Write tasks.json, samples.jsonl and lm_eval.json (its own figures) to a new directory, whole or not at all."""
    with staged(Path(directory)) as folder:
        lines = "".join(json.dumps(sample) + "\n" for sample in run.samples)
        names = ("reported", "left_out", "nonfinite", "warnings")
        rest = _as_json({name: getattr(run, name) for name in names})
        (folder / "tasks.json").write_text(run.record.to_json(), encoding="utf-8")
        (folder / "samples.jsonl").write_text(lines, encoding="utf-8")
        (folder / "lm_eval.json").write_text(json.dumps(rest, indent=2) + "\n", encoding="utf-8")


def _check_extra(server: str | None) -> None:
    for name in ("lm_eval", "tenacity") if server else ("lm_eval",):
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"tasks need the package {name}, which is not installed.",
                code="dependency-missing",
                where=name,
                remedy="Run: pip install 'snugfit[eval]'",
            )


class _Warnings(logging.Handler):
    """Collects the text of warnings and errors, each once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record's text."""
        text = record.getMessage().strip()
        if text not in self.texts:
            self.texts.append(text)


@contextlib.contextmanager
def _quiet(progress: Progress) -> Iterator[list[str]]:
    """Keep lm_eval's output off stdout, and off stderr unless progress is shown there; yields its warnings.

    Its prints and bars are progress; warnings, in logs or by Python's `warnings`, are collected and reported later.
    """
    sink = sys.stderr if isinstance(progress, TerminalProgress) else io.StringIO()
    handler = _Warnings()
    root = logging.getLogger()
    root.addHandler(handler)
    logging.captureWarnings(capture=True)
    try:
        with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            yield handler.texts
    finally:
        logging.captureWarnings(capture=False)
        root.removeHandler(handler)
        for text in handler.texts:
            progress.message(f"warning: {text}")


def _evaluate(lm: Any, loaded: Mapping[str, Any], limit: int | None, server: str | None) -> Any:
    from lm_eval.evaluator import evaluate

    try:
        return evaluate(lm, loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    except UserError:
        raise
    except Exception as error:
        if server is None:
            raise
        # lm_eval's client alone runs here: what it raises comes from the connection or from the answers
        line = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"a request failed ({type(error).__name__}: {line}).",
            code="server-unsupported",
            where=server,
            remedy="The server must answer /v1/completions with token ids as prompt, echo and logprobs, as vLLM does.",
        ) from error


def _convert(results: Any, tasks: Mapping[str, Any]) -> tuple[list[TaskResult], list[str]]:
    """A row for each metric with a score by item, and the names of the other metrics."""
    rows: dict[tuple[str, str], TaskResult] = {}
    left_out: list[str] = []
    for name, task in tasks.items():
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for line in results["samples"][name]:
            for metric in line["metrics"]:
                found.setdefault((metric, line["filter"]), {})[_key(line)] = line[metric]
        for (metric, chosen), values in found.items():
            suffix = "" if chosen == "none" else f",{chosen}"
            row = _row(name, task, metric, suffix, values)
            if row is None:
                left_out.append(f"{name}: {metric}{suffix}")
            else:
                rows.setdefault((name, row.metric), row)
    return list(rows.values()), left_out


def _key(line: Mapping[str, Any]) -> str:
    return f"{line['doc_id']}:{line['doc_hash'][:12]}"


def _row(name: str, task: Any, metric: str, suffix: str, values: Mapping[str, Any]) -> TaskResult | None:
    """One metric with every item's score; None where lm_eval does not report a mean over items."""
    from lm_eval.api import metrics

    aggregate = task.aggregation().get(metric, metrics.mean)
    higher_is_better = bool(task.higher_is_better().get(metric, True))
    kind: Literal["accuracy", "mean"] = "mean"
    if aggregate in (metrics.perplexity, metrics.weighted_perplexity, metrics.bits_per_byte):
        # an exponential or a ratio over all items, made from each item's log-likelihood
        metric, higher_is_better = "loss", False
        items = {key: -float(value[0] if isinstance(value, tuple) else value) for key, value in values.items()}
    elif aggregate in (metrics.mean, metrics.nanmean) and all(isinstance(v, _NUMBERS) for v in values.values()):
        drop = aggregate is metrics.nanmean
        items = {key: float(value) for key, value in values.items() if not (drop and math.isnan(value))}
        kind = "accuracy" if not drop and set(items.values()) <= {0.0, 1.0} else "mean"
    else:
        return None
    scores = list(items.values())
    if not scores:
        return None
    error = float(metrics.mean_stderr(scores)) if len(scores) > 1 else None
    return TaskResult(
        task=name,
        metric=metric + suffix,
        kind=kind,
        higher_is_better=higher_is_better,
        value=float(metrics.mean(scores)),
        standard_error=error,
        items=items,
    )


def _sample(name: str, line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the per-sample log."""
    entry = {"task": name, "filter": line["filter"], "key": _key(line)}
    entry |= {part: line[part] for part in ("doc_id", "target", "filtered_resps")}
    entry["metrics"] = {metric: line[metric] for metric in line["metrics"]}
    return _as_json(entry)


def _as_json(entry: Mapping[str, Any]) -> dict[str, Any]:
    """`entry` in JSON's types, None for NaN and infinities."""
    from lm_eval.utils import handle_non_serializable

    text = json.dumps(entry, default=handle_non_serializable)
    converted: dict[str, Any] = json.loads(text, parse_constant=lambda _: None)
    return converted


def _reported(results: Any) -> dict[str, dict[str, float]]:
    """lm_eval's table: metric,filter -> figure, by task and group."""
    return {
        name: {key: float(v) for key, v in row.items() if "," in key and isinstance(v, _NUMBERS)}
        for name, row in results["results"].items()
    }
