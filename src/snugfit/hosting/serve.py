"""Serve a checkpoint with an engine, look at what it answers, measure it, and stop it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from snugfit.benchmarking.bench import bench as run_bench
from snugfit.benchmarking.bench import write_bench
from snugfit.benchmarking.measure import INTERRUPTED
from snugfit.engines.gpus import find_card
from snugfit.engines.launch import LAUNCHES, Launch, asks_for_fp8_cache, layers_in_16_bits
from snugfit.engines.memory import GIB
from snugfit.errors import UserError
from snugfit.hosting.engine import RefusedError, Start, make_start, running
from snugfit.hosting.questions import ask
from snugfit.hosting.request import Measures, ServeOptions, check_request
from snugfit.machine import Clock
from snugfit.planning.fit import fit_beside
from snugfit.progress import SILENT, Progress
from snugfit.records.evaluation import KernelReport
from snugfit.records.fit import FitArguments, FitRecord, FitRow
from snugfit.records.serve import EngineRefusal, ServeAnswer, ServePrediction, ServeRecord, ServeTaken
from snugfit.report.serve import serve_markdown
from snugfit.serving.client import Server, connect
from snugfit.serving.engine_log import kernels_from_log, memory_from_log
from snugfit.serving.nvml import GpuMemory, read_gpu
from snugfit.serving.questions import QUESTIONS, language_of
from snugfit.storage.open import is_hub_id
from snugfit.storage.staging import staged
from snugfit.version import __version__

LOG = "engine.log"


def serve(
    model: str | Path,
    *,
    output_dir: str | Path | None = None,
    options: ServeOptions | None = None,
    measures: Measures | None = None,
    hold: Callable[[str], None] | None = None,
    progress: Progress = SILENT,
) -> ServeRecord:
    """Start an engine on a checkpoint (directory or Hub id), ask it a few questions, measure it, and stop it.

    The flags are those that this file, this GPU and this context need, as `fit` computes them; its prediction is
    recorded beside what the engine took. `hold` is called with the URL before the server is stopped. The new directory
    `output_dir` gets serve.json, serve.md, the engine's log and the results of `measures`; without it the log is in a
    temporary folder. An engine that refuses the file is a record with `started` False and the reason; an interrupt, or
    a measurement that fails, one with `stopped`. UserError for bad input, before anything is started.
    """
    options, measures = options or ServeOptions(), measures or Measures()
    check_request(model, options, measures, output_dir)
    keeps = output_dir is not None
    with _log_folder() if output_dir is None else staged(Path(output_dir)) as folder:
        record = _serve(_Job(model, folder, options, measures, progress), hold, keeps=keeps)
        if keeps:
            (folder / "serve.json").write_text(record.to_json(), encoding="utf-8")
            (folder / "serve.md").write_text(serve_markdown(record), encoding="utf-8")
    return record


@contextmanager
def _log_folder() -> Iterator[Path]:
    """A temporary folder for the engine's log, which stays; removed where anything goes wrong, as `staged` does."""
    folder = Path(tempfile.mkdtemp(prefix="snugfit-serve-"))
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@dataclass(frozen=True)
class _Job:
    """What is served, how, what is measured, and the folder of the engine's log and the results."""

    model: str | Path
    folder: Path
    options: ServeOptions
    measures: Measures
    progress: Progress
    clock: Clock = field(default_factory=Clock)

    @property
    def log(self) -> Path:
        """The engine's log."""
        return self.folder / LOG


@dataclass
class _Seen:
    """What a run showed: of the server, and why it ended early."""

    answers: tuple[ServeAnswer, ...] = ()
    version: str | None = None
    results: dict[str, str] = field(default_factory=dict)
    refusal: EngineRefusal | None = None
    started: bool = False
    stopped: str | None = None
    gpu_used: int | None = None
    notes: list[str] = field(default_factory=list)


def _serve(job: _Job, hold: Callable[[str], None] | None, *, keeps: bool) -> ServeRecord:
    """The run, its files in the job's folder; without `keeps` that is a folder for the log alone."""
    model, options, seen = job.model, job.options, _Seen()
    launch = _launch(options)
    gpu = _gpu(options, seen.notes)
    fitted = None if gpu is None else _fit(model, gpu, options, seen.notes)
    row = None if fitted is None else _as_it_is(fitted)
    predicted = (
        None if fitted is None or row is None else _predict(fitted, row, fp8=asks_for_fp8_cache(launch, options.extra))
    )
    start = _start(launch, model, options, fitted, predicted)
    for note in seen.notes:
        job.progress.message(note)
    job.progress.message(" ".join(start.command))
    _run(start, job, hold, seen)
    text = job.log.read_text(encoding="utf-8", errors="replace")
    kernels = kernels_from_log(text)
    return ServeRecord(
        snugfit=__version__,
        model=Path(model).name if not is_hub_id(model) else str(model),
        engine=launch.name,
        engine_version=kernels.engine_version or seen.version,
        arguments=_arguments(options, job.measures),
        command=start.command,
        gpu=gpu,
        formats=() if row is None else row.formats,
        started=seen.started,
        refusal=seen.refusal,
        stopped=seen.stopped,
        predicted=predicted,
        taken=_taken(text, seen),
        kernels=kernels or KernelReport(),
        answers=seen.answers,
        results=seen.results,
        seconds=job.clock.seconds,
        log=LOG if keeps else str(job.log),
        notes=tuple(seen.notes),
    )


def _run(start: Start, job: _Job, hold: Callable[[str], None] | None, seen: _Seen) -> None:
    """Start the engine, look at it, hold it and stop it; what ended that early is in `seen`."""
    try:
        with ExitStack() as stack:
            with job.clock("start"):
                seconds = stack.enter_context(running(start, job.log, start_seconds=job.options.start_seconds))
            seen.started = True
            job.progress.message(f"{start.url} answers after {seconds:.0f} s")
            _look(start.url, job, seen)
            if hold is not None:
                hold(start.url)
    except RefusedError as error:
        seen.refusal = error.refusal
    except KeyboardInterrupt:
        seen.stopped = INTERRUPTED
    except UserError as error:
        if not seen.started:
            raise
        seen.stopped = str(error)  # of a measurement: what was done before it is kept


def _launch(options: ServeOptions) -> Launch:
    if options.engine not in LAUNCHES:
        remedy = f"Known engines: {', '.join(LAUNCHES)}."
        raise UserError(f"unknown engine {options.engine!r}.", code="option-invalid", where="engine", remedy=remedy)
    return LAUNCHES[options.engine]


def _gpu(options: ServeOptions, notes: list[str]) -> str | None:
    """The GPU for `fit`: as given, else the one that the driver names, by name where it is known."""
    if options.gpu is not None:
        return options.gpu
    found = read_gpu(options.gpu_index)
    if isinstance(found, str):
        notes.append(f"{found}; nothing is predicted, and the engine chooses its own context, unless `gpu` is given")
        return None
    words = found.name.split()
    for last in range(len(words), 0, -1):
        card = find_card(" ".join(words[:last]))
        if card is not None and abs(card.reported_mib / (found.total_bytes / 2**20) - 1) < 0.1:
            return card.name
    return f"{found.total_bytes / GIB:.2f}GiB"


def _fit(model: str | Path, gpu: str, options: ServeOptions, notes: list[str]) -> FitRecord | None:
    """What `fit` says of the file; None, with a remark, where it cannot say anything."""
    arguments = FitArguments(
        model=str(model),
        gpu=gpu,
        context=options.context,
        tensor_parallel_size=options.tensor_parallel_size,
        engine=options.engine,
        gpu_memory_utilization=options.gpu_memory_utilization,
        max_num_seqs=options.max_num_seqs or 1,
        recipes=(),
    )
    kept = layers_in_16_bits(LAUNCHES[options.engine], options.extra)
    try:
        found = fit_beside(model, arguments, kept)
    except UserError as error:
        if error.code.startswith("option") or error.where in ("context", "gpu"):
            raise
        notes.append(f"nothing is predicted: {error}")
        return None
    notes += found.notes
    return found


def _as_it_is(fitted: FitRecord) -> FitRow | None:
    """The row of the file itself; None where it is impossible."""
    return next((row for row in fitted.rows if not row.recipes and row.problem is None), None)


def _predict(fitted: FitRecord, row: FitRow, *, fp8: bool) -> ServePrediction:
    """Weights and cache as the engine's log will name them; with an FP8 cache if asked for, or if only that fits."""
    memory = fitted.memory
    cache = next((cache for cache in row.caches if cache.fits), row.caches[0])
    if fp8:
        cache = next(cache for cache in row.caches if cache.kv_cache == "fp8")
    weights = (row.bytes_per_gpu or 0) + memory.position_table_bytes
    held = memory.share_bytes - memory.activation_bytes - memory.other_bytes - weights
    plain = not fitted.windows and not fitted.state_bytes
    generation = fitted.gpu.generation
    return ServePrediction(
        gpu=fitted.gpu.name,
        engine=fitted.engine.title,
        kv_cache=cache.kv_cache,
        weight_bytes=weights,
        cache_bytes=held,
        cache_tokens=max(0, held // cache.bytes_per_token) if plain and cache.bytes_per_token else None,
        max_context=cache.max_context,
        kernels=tuple(row.kernels.get(generation, ())) if generation else (),
    )


def _start(
    launch: Launch,
    model: str | Path,
    options: ServeOptions,
    fitted: FitRecord | None,
    predicted: ServePrediction | None,
) -> Start:
    """The command with the flags that are needed: the context that fits, an FP8 cache where only that fits."""
    flags: list[str] = []
    context = options.context
    if context is None and predicted is not None and fitted is not None and predicted.max_context:
        context = predicted.max_context if predicted.max_context < fitted.max_positions else None
    for name, value in (
        (launch.context, context),
        (launch.sequences, options.max_num_seqs),
        (launch.share, options.gpu_memory_utilization),
        (launch.parallel, options.tensor_parallel_size if options.tensor_parallel_size > 1 else None),
        (launch.cache_dtype, launch.fp8_cache if predicted is not None and predicted.kv_cache == "fp8" else None),
    ):
        flags += [] if value is None else [name, str(value)]
    return make_start(
        launch,
        str(model),
        python=options.python,
        command=options.command,
        port=options.port,
        options=flags,
        extra=list(options.extra),
    )


def _look(url: str, job: _Job, seen: _Seen) -> None:
    """Ask the questions, read the GPU's memory, run the measures."""
    with connect(url, timeout=300.0) as server:
        seen.version = server.version
        held = read_gpu(job.options.gpu_index)
        seen.gpu_used = held.used_bytes if isinstance(held, GpuMemory) else None
        language = job.options.language or language_of(Path(job.model))
        with job.clock("questions"):
            seen.answers, remarks = ask(server, QUESTIONS[language])
        seen.notes += remarks
        for answer in seen.answers:
            job.progress.message(f"{answer.verdict}: {answer.question} -> {answer.text.strip()!r}")
        _measure(server, job, seen)


def _measure(server: Server, job: _Job, seen: _Seen) -> None:
    """Run what was asked for on the server; its files go below the job's folder."""
    measures = job.measures
    if measures.bench is not None:
        with job.clock("bench"):
            record = run_bench(
                server.url,
                options=measures.bench,
                server_log=job.log,
                gpu_index=job.options.gpu_index,
                progress=job.progress,
            )
        write_bench(record, job.folder / "bench")
        seen.results["bench"] = "bench/bench.json"
        if record.stopped == INTERRUPTED:
            raise KeyboardInterrupt
    if measures.reference is not None:
        with job.clock("eval"):
            _evaluate(server, job)
        seen.results["eval"] = "eval/eval.json"
    if measures.tasks:
        from snugfit.evaluation.tasks import run_tasks, write_tasks

        with job.clock("tasks"):
            found = run_tasks(job.model, measures.tasks, server=server.url, progress=job.progress)
            write_tasks(found, job.folder / "tasks")
        seen.results["tasks"] = "tasks/tasks.json"


def _evaluate(server: Server, job: _Job) -> None:
    from snugfit.evaluation.evaluate import evaluate, write_results
    from snugfit.evaluation.served import ServerOptions

    journal = job.folder / "eval.journal"
    record = evaluate(
        (),
        reference=job.measures.reference,
        dataset=job.measures.dataset,
        contexts=job.measures.contexts,
        max_chunks=job.measures.max_chunks,
        noise_floor="none",
        server=ServerOptions(url=server.url, journal=journal, log=job.log),
        progress=job.progress,
    )
    write_results(record, job.folder / "eval")
    journal.unlink(missing_ok=True)


def _taken(log: str, seen: _Seen) -> ServeTaken:
    said = memory_from_log(log)
    return ServeTaken(
        weight_bytes=said.weight_bytes,
        cache_bytes=said.cache_bytes,
        cache_tokens=said.cache_tokens,
        graph_bytes=said.graph_bytes,
        gpu_used_bytes=seen.gpu_used,
    )


def _arguments(options: ServeOptions, measures: Measures) -> Mapping[str, Any]:
    names = ("engine", "gpu", "context", "tensor_parallel_size", "gpu_memory_utilization", "max_num_seqs", "language")
    found: dict[str, Any] = {name: getattr(options, name) for name in names}
    found["extra"] = list(options.extra)
    found["tasks"] = list(measures.tasks)
    found["reference"] = None if measures.reference is None else Path(measures.reference).name
    return found
