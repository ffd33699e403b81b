"""What `serve` is asked for, checked before an engine is started: what fails then would fail behind minutes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from snugfit.benchmarking.plan import BenchOptions, make_settings
from snugfit.engines.profiles import DEFAULT_PROFILE
from snugfit.errors import UserError
from snugfit.serving.questions import QUESTIONS
from snugfit.storage.open import is_hub_id

START_SECONDS = 1200.0
CONTEXTS = (2048,)
LAST_PORT = 65535


@dataclass(frozen=True, kw_only=True)
class Measures:
    """What is run on the server beside the questions: `bench` with options, `evaluate` against a reference, tasks.

    `contexts`, `dataset` and `max_chunks` are those of `evaluate`; `tasks` are names for `run_tasks`.
    """

    bench: BenchOptions | None = None
    reference: str | Path | None = None
    dataset: Sequence[str | Path] = ()
    contexts: Sequence[int] = CONTEXTS
    max_chunks: int | None = None
    tasks: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How the engine is started; None for the engine's own choice or a free port.

    `python` is the interpreter of the engine's environment, or `command` what starts it ("vllm serve", "docker run
    ..."). `gpu` is a card's name or a size for `fit`, by default the GPU that the driver names. `extra` are options for
    the engine, which replace those chosen here.
    """

    engine: str = "vllm"
    python: str | None = None
    command: str | None = None
    gpu: str | None = None
    gpu_index: int = 0
    context: int | None = None
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float | None = None
    max_num_seqs: int | None = None
    port: int | None = None
    start_seconds: float = START_SECONDS
    language: str | None = None
    extra: Sequence[str] = ()


def check_request(model: str | Path, options: ServeOptions, measures: Measures, output_dir: str | Path | None) -> None:
    """UserError for what can be told to be wrong without an engine."""
    if not is_hub_id(model) and not (Path(model) / "config.json").is_file():
        raise UserError(
            "there is no model here.", code="model-not-found", where=str(model), remedy="Give a directory or a Hub id."
        )
    if options.language is not None and options.language not in QUESTIONS:
        remedy = f"Known: {', '.join(QUESTIONS)}."
        raise UserError(
            f"no questions in {options.language!r}.", code="option-invalid", where="language", remedy=remedy
        )
    _check_numbers(options)
    if output_dir is None and (measures.bench or measures.reference is not None or measures.tasks):
        what = "results are written beside the engine's log, and no directory is given."
        raise UserError(what, code="option-missing", where="output_dir", remedy="Name a new directory.")
    if measures.bench is not None:
        make_settings(measures.bench, options.context)
    _check_evaluation(measures)
    if measures.tasks:
        _check_tasks(model, measures.tasks)


def _check_numbers(options: ServeOptions) -> None:
    """UserError for a number out of its range."""
    for name, least in (
        ("gpu_index", 0),
        ("context", 1),
        ("tensor_parallel_size", 1),
        ("max_num_seqs", 1),
        ("port", 1),
    ):
        given = getattr(options, name)
        if given is not None and given < least:
            raise UserError(f"must be >= {least}, got {given}.", code="option-invalid", where=name)
    share = options.gpu_memory_utilization
    if share is not None and not 0 < share <= 1:
        what = f"must be > 0 and <= 1, got {share:g}."
        raise UserError(what, code="option-invalid", where="gpu_memory_utilization")
    if options.port is not None and options.port > LAST_PORT:
        raise UserError(f"must be <= {LAST_PORT}, got {options.port}.", code="option-invalid", where="port")
    if not options.start_seconds > 0:
        raise UserError(f"must be > 0, got {options.start_seconds:g}.", code="option-invalid", where="start_seconds")


def _check_evaluation(measures: Measures) -> None:
    """What `evaluate` would refuse of the reference and the texts."""
    if measures.reference is None:
        given = {"dataset": bool(measures.dataset), "contexts": tuple(measures.contexts) != CONTEXTS}
        given["max_chunks"] = measures.max_chunks is not None
        for name in (name for name, is_given in given.items() if is_given):
            what, remedy = "has no effect without `reference`.", "Give `reference`, or leave it out."
            raise UserError(what, code="option-conflict", where=name, remedy=remedy)
        return
    if not (Path(measures.reference) / "config.json").is_file():
        raise UserError(
            "there is no model here.",
            code="model-not-found",
            where=str(measures.reference),
            remedy="Give the original model's directory as `reference`.",
        )
    from snugfit.evaluation.plan import make_plan

    make_plan(
        (),
        measures.reference,
        measures.dataset,
        measures.contexts,
        max_chunks=measures.max_chunks,
        max_tokens=None,
        activations=DEFAULT_PROFILE,
        arithmetic=None,
        allow_long_context=False,
    )


def _check_tasks(model: str | Path, tasks: Sequence[str]) -> None:
    if is_hub_id(model):
        raise UserError("tasks need the model's files here.", code="option-conflict", where="tasks")
    from snugfit.evaluation.tasks import check_served_tasks

    check_served_tasks(tasks)
