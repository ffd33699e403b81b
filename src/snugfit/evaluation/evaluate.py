"""Evaluate models: checkpoints and texts in, a record of what quantization cost at every context length out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError

from snugfit import distributed
from snugfit.arguments import as_sequence
from snugfit.data import texts
from snugfit.data.python_docs import no_dataset_message
from snugfit.data.texts import DEFAULT_CONTEXTS
from snugfit.engines.profiles import DEFAULT_PROFILE
from snugfit.errors import UserError
from snugfit.evaluation.answers import ANSWER_TOKENS, answer_all, answer_figures, choose_questions
from snugfit.evaluation.continuations import compare_continuations
from snugfit.evaluation.evaluated_model import EvaluatedModel
from snugfit.evaluation.gpu_memory import experts_that_fit, gpu_memory_errors, tokens_that_fit
from snugfit.evaluation.measure import Found, Measurement, measure
from snugfit.evaluation.plan import (
    METRICS_VERSION,
    EvaluationPlan,
    ReferenceFile,
    check_options,
    check_server,
    make_plan,
    plan_measurements,
    use_reference_cache,
)
from snugfit.evaluation.reference import Collector, save_reference
from snugfit.evaluation.served import ServerOptions, ask_server
from snugfit.evaluation.summarize import summarize
from snugfit.formats.inputs import kernel_problems
from snugfit.machine import (
    Clock,
    hardware,
    peak_gpu_bytes,
    peak_rss_bytes,
    pick_device,
    pick_dtype,
    reset_peak_gpu_bytes,
    versions,
)
from snugfit.progress import SILENT, Progress
from snugfit.records.evaluation import ContextFigures, Continuation, EvalRecord
from snugfit.report import plots, tables
from snugfit.storage.staging import staged
from snugfit.version import __version__

DEFAULT_CONTINUATIONS = 5


@distributed.together
def evaluate(
    models: str | Path | Sequence[str | Path],
    *,
    reference: str | Path | None = None,
    dataset: str | Path | Sequence[str | Path] = (),
    contexts: Sequence[int] = DEFAULT_CONTEXTS,
    max_chunks: int | None = None,
    max_tokens: int | None = None,
    activations: str = DEFAULT_PROFILE,
    noise_floor: str = "reference",
    reference_cache: str | Path | None = None,
    continuations: int = DEFAULT_CONTINUATIONS,
    answers: int = 0,
    questions: str | Path | None = None,
    answer_tokens: int = ANSWER_TOKENS,
    server: ServerOptions | None = None,
    device: str | None = None,
    tokens_per_batch: int | None = None,
    dtype: str | None = None,
    experts_per_group: int | None = None,
    allow_long_context: bool = False,
    progress: Progress = SILENT,
) -> EvalRecord:
    """Perplexity of every model at every context length and, with a reference, KL and agreement with it.

    `models` and `reference` are model directories (the reference may be a file that `reference_cache`, a folder, keeps
    its predictions in). `dataset`: texts, JSONL or Parquet files, folders; or a set. `activations`: the engine profile
    of all models. `noise_floor`: "reference", "all" or "none", the models that are run a second time in wider
    arithmetic, on one chunk in eight. In conversations both models continue from the `continuations` positions where a
    model diverges most from the reference. With `answers` all models, and the server, answer that many `questions` (a
    file with one a line, by default built-in ones) greedily, `answer_tokens` each at most. A `server` is one more
    model, after the others. `dtype` ("bfloat16", "float16", "float32") is what models are run in, by default each
    config's own. Of a mixture, `experts_per_group` routed experts of a layer are in memory at once (default: all, or
    as many as there is memory for). `allow_long_context` permits contexts beyond the models' positions. Raises
    UserError for bad input, before the long work where possible.
    """
    clock = Clock()
    models, dataset = as_sequence(models), as_sequence(dataset)
    place = pick_device(device)
    reset_peak_gpu_bytes(place)
    check_options(noise_floor, tokens_per_batch, continuations, reference_cache, reference, experts_per_group)
    check_server(server, reference)
    progress = progress if distributed.is_main() else SILENT
    if server is not None and distributed.world_size() > 1:
        what, remedy = "one process alone asks a server.", "Start it without torchrun."
        raise UserError(what, code="option-conflict", where="server", remedy=remedy)
    asked = choose_questions(answers, questions, answer_tokens, reference)
    if not dataset:
        progress.message(no_dataset_message("evaluation"))
    with clock("prepare"):
        plan = distributed.in_all(
            lambda: make_plan(
                models,
                reference,
                dataset,
                contexts,
                max_chunks=max_chunks,
                max_tokens=max_tokens,
                activations=activations,
                arithmetic=pick_dtype(dtype),
                allow_long_context=allow_long_context,
            )
        )
        for note in plan.notes:
            progress.message(note)
        for model in plan.models:
            for note in model.notes:
                progress.message(f"{model.name}: {note}")
        plan, file = use_reference_cache(
            plan, reference_cache, noise_floor, served=server is not None, progress=progress
        )
    plan = _in_groups(plan, experts_per_group, place, progress)
    batch = tokens_per_batch or min(distributed.gather(tokens_that_fit(plan.models, place)))
    if server is not None:
        with clock("ask"):
            plan = replace(plan, served=ask_server(server, plan.groups, plan.models[0].vocabulary, progress))
    measurements = plan_measurements(plan, noise_floor, place)
    collector = None if file is None else Collector(plan.groups, plan.models[0].vocabulary)
    keep = None if collector is None else collector.keep
    with clock("measure"), gpu_memory_errors(place, "Lower `tokens_per_batch`, or free memory of the GPU."):
        found = measure(measurements, plan.groups, place, tokens_per_batch=batch, keep=keep, progress=progress)
    for problem in kernel_problems():
        progress.message(f"activations were rounded by slower kernels, to the same bits ({problem})")
    with clock("summarize"):
        results = summarize(plan, measurements, found)
        if file is not None and collector is not None and distributed.is_main() and not file.path.exists():
            progress.message(_store(file, plan, collector, results))
    with clock("continue"), gpu_memory_errors(place, "Set `continuations` to 0, or free memory of the GPU."):
        continued = _continue(plan, measurements, found, continuations, place) if distributed.is_main() else ()
    asked = asked if distributed.is_main() else ()
    with clock("answer"), gpu_memory_errors(place, "Set `answers` to 0, or free memory of the GPU."):
        answered = answer_all(plan, asked, answer_tokens, server, place, progress) if asked else ()
    record = EvalRecord(
        snugfit=__version__,
        arguments={
            "models": [str(path) for path in models],
            "reference": None if reference is None else str(reference),
            "dataset": [str(file) for file in dataset],
            "contexts": sorted(contexts),
            "max_chunks": max_chunks,
            "max_tokens": max_tokens,
            "activations": activations,
            "noise_floor": noise_floor,
            "continuations": continuations,
            "answers": answers,
            "answer_tokens": answer_tokens,
            "server": None if plan.served is None else plan.served.description.url,
            "allow_long_context": allow_long_context,
            "device": str(place),
            "tokens_per_batch": batch,
            "dtype": dtype,
        },
        metrics_version=METRICS_VERSION,
        reference=None if plan.reference is None else plan.reference.description,
        candidates=plan.descriptions,
        texts=plan.texts,
        contexts=results,
        continuations=continued,
        seconds=clock.seconds,
        peak_rss_bytes=peak_rss_bytes(),
        peak_gpu_bytes=peak_gpu_bytes(place),
        hardware=hardware(place),
        versions=versions(),
        answers=answered,
        answer_figures=answer_figures(answered, answer_tokens, plan.reference is not None),
    )
    return distributed.from_main(record)


def _in_groups(plan: EvaluationPlan, asked: int | None, device: torch.device, progress: Progress) -> EvaluationPlan:
    """The plan with routed experts in groups, where that is asked for or needed."""
    fits = distributed.gather(asked or experts_that_fit(plan.models, device))
    size = min((one for one in fits if one is not None), default=None)
    if size is None:
        return plan
    if asked is None:
        progress.message(f"{size} routed experts of a layer are in memory at once: {device} has no memory for all")
    candidates = tuple(replace(model, experts_per_group=size) for model in plan.candidates)
    reference = plan.reference
    if isinstance(reference, EvaluatedModel):
        reference = replace(reference, experts_per_group=size)
    return replace(plan, candidates=candidates, reference=reference)


def _store(file: ReferenceFile, plan: EvaluationPlan, collector: Collector, results: Sequence[ContextFigures]) -> str:
    """Store the reference's predictions; a message says where. A full disk need not cost what is measured."""
    assert isinstance(plan.reference, EvaluatedModel)
    floors = {one.context: one.models[0].floor for one in results if one.models[0].floor is not None}
    try:
        save_reference(file.path, file.key, plan.reference.description, collector, floors)
    except (OSError, SafetensorError) as error:
        return f"warning: {file.path}: the reference's predictions could not be stored ({error})"
    return f"{file.path}: the reference's predictions are stored in this file"


def _continue(
    plan: EvaluationPlan, measurements: Sequence[Measurement], found: Found, count: int, device: torch.device
) -> tuple[Continuation, ...]:
    """Continuations in the conversations; none without them, or without a reference that can be run."""
    group = plan.groups[-1]
    if group.context != texts.CHAT or not isinstance(plan.reference, EvaluatedModel):
        return ()
    candidates = [(one.model, found[one][-1].kl) for one in measurements if one.kind == "candidate" and one.model]

    def decode(ids: Sequence[int]) -> str:
        return str(plan.tokenizer.raw.decode(ids))

    return compare_continuations(plan.reference, candidates, group, count, decode, device)


def write_results(record: EvalRecord, directory: str | Path) -> list[str]:
    """Write eval.json, eval.csv, eval.md and the plots to a new directory, whole or not at all; the plots' names."""
    with staged(Path(directory)) as folder:
        (folder / "eval.json").write_text(record.to_json(), encoding="utf-8")
        (folder / "eval.csv").write_text(tables.to_csv(record), encoding="utf-8")
        (folder / "eval.md").write_text(tables.to_markdown(record), encoding="utf-8")
        return plots.write_plots(record, folder)
