"""`plan`: the mix of formats that fits a budget and loses least, found by scores and proven on held-out text.

Scores say what each group of weights costs in each format (planning/sensitivity.py), the search finds the best mixes
under the budget (planning/budgeted.py), and the best of them are measured beside controls of as many bytes. A plan that
does not beat its control is refused, and the control's recipe is written in its place.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from snugfit import distributed
from snugfit.errors import Unfinished, UserError
from snugfit.evaluation.gpu_memory import MORE_TO_RESUME, gpu_memory_errors
from snugfit.machine import fix_cublas_workspace
from snugfit.planning.budgeted import scored_choices, search
from snugfit.planning.controls import Control, find_controls
from snugfit.planning.outcome import RUNS_OF, Outcome, record_of
from snugfit.planning.plan_cost import PlanEstimate, check_resources, estimate_prepared, expected
from snugfit.planning.prepare_plan import ALTERNATIVES, PlanRequest, Prepared, prepare_plan, request_of
from snugfit.planning.proving import not_proven, prove_mixes
from snugfit.planning.search import Mix, Space, simplest_near
from snugfit.progress import SILENT, Progress, duration
from snugfit.records.plan import PLAN_FILE, RECIPE_FILE, PlanRecord, ProvenKl
from snugfit.records.scores import SCORES_FILE, Scores, save_scores
from snugfit.records.statistics_file import STATISTICS_FILE, Statistics, load_statistics, save_statistics
from snugfit.report.plan import plan_markdown, write_plan_plots
from snugfit.storage.staging import check_stageable, resumable

_SHOWN_SECONDS = 0.5  # of a part of the run, below which it is not told


@distributed.together
def plan(
    model: str | Path,
    *,
    output_dir: str | Path,
    gpu: str | None = None,
    context: int | None = None,
    tensor_parallel_size: int = 1,
    engine: str = "vllm",
    gpu_memory_utilization: float | None = None,
    max_num_seqs: int = 1,
    bytes: int | None = None,  # noqa: A002  # the option's name
    bits_per_weight: float | None = None,
    disk: int | None = None,
    max_kl: float | None = None,
    menu: str | Sequence[str] = (),
    constraints: str | Path | None = None,
    scores: str | Path | Sequence[str | Path] = (),
    dataset: str | Path | Sequence[str | Path] = (),
    max_seq_length: int | None = None,
    num_tokens: int | None = None,
    rounding: str | None = None,
    target: str | None = None,
    held_out: str | Path | Sequence[str | Path] = (),
    held_out_contexts: int | Sequence[int] = (),
    max_tokens: int | None = None,
    alternatives: int = ALTERNATIVES,
    prove: bool = True,
    device: str | None = None,
    tokens_per_batch: int | None = None,
    seed: int = 0,
    restart: bool = False,
    force_resume: bool = False,
    progress: Progress = SILENT,
) -> PlanRecord:
    """The mix of formats that loses least under a budget, as a recipe, with scores, a record and plots in `output_dir`.

    The budget: a GPU and a context as in `fit`, `bytes` of all weights, `bits_per_weight`, `disk`; with `max_kl` the
    smallest file of at most that KL, or on a GPU without a context the longest context. `menu` are formats (none: those
    that the engine runs), `constraints` a YAML file. `scores` are reused from an earlier plan's directory or file, or
    merged of several (other formats on the same samples, or the same formats on other samples), else made on `dataset`
    in contexts up to `max_seq_length`, `num_tokens` for each bucket of positions. `rounding` is how weights are rounded
    then: by default `weighted`, or as in `scores`. Candidates and controls are measured
    on `held_out` (default: topics that scoring leaves out) unless `prove` is False.

    A plan that does not beat its control is refused: the record's verdict says so, and recipe.yaml is the control's.
    A run that was killed resumes with the same arguments, on another machine, library version or batch only with
    `force_resume`; `restart` starts again. Processes that torchrun started share the scoring and the
    proof, and each returns the record. UserError for bad input and for a budget that no mix keeps.
    """
    request = request_of(
        gpu=gpu,
        context=context,
        tensor_parallel_size=tensor_parallel_size,
        engine=engine,
        gpu_memory_utilization=gpu_memory_utilization,
        max_num_seqs=max_num_seqs,
        bytes=bytes,
        bits_per_weight=bits_per_weight,
        disk=disk,
        max_kl=max_kl,
        menu=menu,
        constraints=constraints,
        scores=scores,
        dataset=dataset,
        max_seq_length=max_seq_length,
        num_tokens=num_tokens,
        rounding=rounding,
        target=target,
        held_out=held_out,
        held_out_contexts=held_out_contexts,
        max_tokens=max_tokens,
        alternatives=alternatives,
        prove=prove,
        device=device,
        tokens_per_batch=tokens_per_batch,
        seed=seed,
    )
    folder = Path(output_dir)
    progress = progress if distributed.is_main() else SILENT
    fix_cublas_workspace()  # before the first product, in a run that resumes as in one that is timed first
    prepared, estimate = distributed.in_all(lambda: _prepare(model, request, folder))
    for note in prepared.notes:
        progress.message(note)
    timed = distributed.by_main(lambda: expected(prepared, estimate, folder))
    if timed is not None:
        progress.message(timed.line())
    full_gpu = gpu_memory_errors("device", MORE_TO_RESUME, Unfinished)  # what is finished stays
    with resumable(folder, restart=restart) as (directory, work), full_gpu:
        foreseen = {} if timed is None else timed.seconds
        return _run(model, prepared, foreseen, directory, work, progress, force_resume=force_resume)


def _prepare(model: str | Path, request: PlanRequest, folder: Path) -> tuple[Prepared, PlanEstimate]:
    """Everything that can be refused before the long work, and what that takes of memory and disk."""
    if distributed.is_main():
        check_stageable(folder, models=[model])
    prepared = prepare_plan(model, request)
    estimate = estimate_prepared(prepared, timed=False, folder=folder)
    check_resources(estimate, folder, request.proof.device)
    return prepared, estimate


def _run(
    model: str | Path,
    prepared: Prepared,
    foreseen: Mapping[str, float],
    directory: Path,
    work: Path,
    progress: Progress,
    *,
    force_resume: bool,
) -> PlanRecord:
    """The long work, and the files of the result."""
    seconds: dict[str, float] = {}
    started = time.monotonic()
    scores, statistics = _scores(prepared, work, progress, force_resume=force_resume)
    seconds["scoring"] = time.monotonic() - started
    with _keeping_scores(prepared):
        record, measured = _plan_with(
            model, prepared, scores, statistics, seconds, work, progress, force_resume=force_resume
        )
        record = replace(record, foreseen=foreseen)
        distributed.by_main(lambda: _write(record, scores, measured, prepared, directory))
    took = [
        f"{name} {duration(taken)}" + (f" (foreseen {duration(foreseen[name])})" if name in foreseen else "")
        for name, taken in record.seconds.items()
        if max(taken, foreseen.get(name, 0.0)) >= _SHOWN_SECONDS
    ]
    if took:
        progress.message(f"it took: {', '.join(took)}")
    return record


@contextmanager
def _keeping_scores(prepared: Prepared) -> Iterator[None]:
    """Errors behind the scoring leave the scores, so that another budget can have them."""
    try:
        yield
    except (Unfinished, distributed.OtherRankError):
        raise
    except UserError as error:
        if prepared.scores is not None:
            raise
        remedy = f"{error.remedy} The scores are kept: the same `output_dir` with other options reuses them."
        raise Unfinished(error.what, code=error.code, where=error.where, remedy=remedy.strip()) from None


def _plan_with(
    model: str | Path,
    prepared: Prepared,
    scores: Scores,
    statistics: Statistics | None,
    seconds: dict[str, float],
    work: Path,
    progress: Progress,
    *,
    force_resume: bool,
) -> tuple[PlanRecord, Statistics | None]:
    """The record of the plan that scores give, and the statistics that it was measured with."""
    choices = scored_choices(prepared.choices, scores)

    def find() -> tuple[int, list[tuple[str, Mix]], Space, list[Control]]:
        context, candidates, space = search(choices, scores, prepared.request.alternatives + 1)
        named = [(f"mix {number}", mix) for number, mix in enumerate(candidates, 1)]
        named += _simpler(space, scores, candidates) if prepared.request.alternatives else []
        return context, named, space, find_controls(prepared.layout, choices.everything, space, scores, context)

    started = time.monotonic()
    context, named, space, controls = distributed.by_main(find)
    seconds["search"] = time.monotonic() - started
    started = time.monotonic()
    measured: Mapping[str, tuple[ProvenKl, ...]] = {}
    if prepared.request.prove:
        if statistics is None:
            statistics = _calibrated(prepared, work, progress)
        proven = prove_mixes(
            model,
            named,
            controls,
            scores,
            statistics,
            work / "proof",
            prepared.request.proof,
            progress,
            force_resume=force_resume,
        )
        measured, verdict, chosen = proven.measured, proven.verdict, proven.plan
    else:
        verdict, chosen = not_proven(controls, "nothing was measured"), named[0][0]
    seconds["proof"] = time.monotonic() - started
    outcome = Outcome(
        budget=prepared.request.budget,
        choices=choices,
        space=space,
        scores=scores,
        context=context,
        candidates=tuple(named),
        controls=tuple(controls),
        measured=measured,
        verdict=verdict,
        chosen=chosen,
        notes=prepared.notes,
        seconds=seconds,
    )

    def recorded() -> PlanRecord:
        began = time.monotonic()
        record = record_of(outcome)  # it searches the curve
        return replace(record, seconds={**seconds, "search": seconds["search"] + time.monotonic() - began})

    return distributed.by_main(recorded), statistics


def _simpler(space: Space, scores: Scores, candidates: Sequence[Mix]) -> list[tuple[str, Mix]]:
    """A mix with fewer rules than the best one and hardly more KL, by its name, if it is none of the candidates."""
    found = simplest_near(space, scores, candidates[0])
    if found is None or any(found[1].formats == mix.formats for mix in candidates):
        return []
    length, mix = found
    return [(f"{RUNS_OF}{length} layers", mix)]


def _scores(
    prepared: Prepared, work: Path, progress: Progress, *, force_resume: bool
) -> tuple[Scores, Statistics | None]:
    """The scores that were given, or new ones with the statistics that they were made with."""
    if prepared.scores is not None:
        return prepared.scores, prepared.statistics
    from snugfit.planning.calibration import STATISTICS_NAME
    from snugfit.planning.sensitivity import SCORES, score_samples

    request = prepared.request
    assert prepared.samples is not None
    found = score_samples(
        prepared.layout,
        prepared.samples,
        prepared.score_settings(),
        work / SCORES,
        device=request.proof.device,
        tokens_per_batch=request.proof.tokens_per_batch,
        force_resume=force_resume,
        progress=progress,
    )
    return found, distributed.in_all(lambda: load_statistics(work / SCORES / STATISTICS_NAME))


def _calibrated(prepared: Prepared, work: Path, progress: Progress) -> Statistics:
    """Statistics for scores that came without."""
    from snugfit.planning.calibration import calibrate

    request = prepared.request
    assert prepared.samples is not None
    return calibrate(
        prepared.layout,
        prepared.samples.dataset,
        work / "calibration",
        device=request.proof.device,
        tokens_per_batch=request.proof.tokens_per_batch,
        progress=progress,
    )


def _write(
    record: PlanRecord, scores: Scores, statistics: Statistics | None, prepared: Prepared, directory: Path
) -> None:
    """All files of the result."""
    (directory / RECIPE_FILE).write_text(record.recipe, encoding="utf-8")
    (directory / PLAN_FILE).write_text(record.to_json(), encoding="utf-8")
    for name in (SCORES_FILE, STATISTICS_FILE):
        (directory / name).unlink(missing_ok=True)  # of a run that was killed while it wrote
    save_scores(scores, directory / SCORES_FILE)
    if statistics is not None:
        save_statistics(statistics, directory / STATISTICS_FILE)
    if prepared.request.constraints is not None:
        shutil.copyfile(prepared.request.constraints, directory / "constraints.yaml")
    images = write_plan_plots(record, directory)
    (directory / "plan.md").write_text(plan_markdown(record, images), encoding="utf-8")
