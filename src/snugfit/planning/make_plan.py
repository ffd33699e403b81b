"""`plan`: the mix of formats that fits a budget and loses least, found by scores and proven on held-out text.

Scores say what each group of weights costs in each format (planning/sensitivity.py), the search finds the best mixes
under the budget (planning/search.py), and the best of them are measured beside controls of as many bytes. A plan that
does not beat its control is refused, and the control's recipe is written in its place.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from snugfit.arguments import as_sequence
from snugfit.engines.profiles import DEFAULT_PROFILE
from snugfit.errors import UserError
from snugfit.model.layout import ModelLayout, read_layout
from snugfit.planning.constraints import LoadedConstraints, load_constraints
from snugfit.planning.controls import find_controls
from snugfit.planning.limits import Budget, impossible, read_place
from snugfit.planning.outcome import Outcome, record_of
from snugfit.planning.proving import ProofSettings, not_proven, prove_mixes
from snugfit.planning.search import Limit, Mix, Space, least_amount, least_bytes, least_kl, make_mix, scored, within
from snugfit.planning.space import Choices, read_choices
from snugfit.progress import SILENT, Progress
from snugfit.records.plan import PLAN_FILE, RECIPE_FILE, PlanRecord, ProvenKl
from snugfit.records.scores import KEEP, SCORES_FILE, Scores, check_model, load_scores, save_scores
from snugfit.records.statistics_file import STATISTICS_FILE, Statistics, load_statistics
from snugfit.report.plan import plan_markdown, write_plan_plots
from snugfit.storage.checkpoint import fingerprint, header_digest
from snugfit.storage.staging import check_stageable, resumable

ALTERNATIVES = 2
_SEARCHED_CONTEXTS = 24  # that are tried for the longest one
_PROFILE_OF = {"ampere": "marlin", "ada": "marlin", "hopper": "marlin"}


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What `plan` was asked for, beyond model and output; nothing here is checked yet. See `plan`."""

    budget: Budget
    menu: tuple[str, ...] = ()
    constraints: str | Path | None = None
    scores: str | Path | None = None
    dataset: Sequence[str | Path] = ()
    max_seq_length: int | None = None
    num_tokens: int | None = None
    rounding: str = "plain"
    target: str | None = None
    proof: ProofSettings = field(default_factory=ProofSettings)
    alternatives: int = ALTERNATIVES
    prove: bool = True
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A request that is decided and checked as far as headers and files of scores say."""

    request: PlanRequest
    layout: ModelLayout
    choices: Choices
    target: str
    scores: Scores | None
    statistics: Statistics | None
    notes: tuple[str, ...]

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats to score: those of the menu that any group can have, and no constraint excludes."""
        found = (one.format for menu in self.choices.space.menus for one in menu.options if one.format != KEEP)
        return tuple(dict.fromkeys(found))


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
    scores: str | Path | None = None,
    dataset: str | Path | Sequence[str | Path] = (),
    max_seq_length: int | None = None,
    num_tokens: int | None = None,
    rounding: str = "plain",
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
    progress: Progress = SILENT,
) -> PlanRecord:
    """The mix of formats that loses least under a budget, as a recipe, with scores, a record and plots in `output_dir`.

    The budget: a GPU and a context as in `fit`, `bytes` of all weights, `bits_per_weight`, `disk`; with `max_kl` the
    smallest file of at most that KL, or on a GPU without a context the longest context. `menu` are formats (none: those
    that the engine runs), `constraints` a YAML file. `scores` are reused from an earlier plan's directory or file, else
    made on `dataset` in contexts up to `max_seq_length`, `num_tokens` for each bucket of positions. Candidates and
    controls are measured on `held_out` (default: topics that scoring leaves out) unless `prove` is False.

    A plan that does not beat its control is refused: the record's verdict says so, and recipe.yaml is the control's.
    A run that was killed resumes with the same arguments. UserError for bad input and for a budget that no mix keeps.
    """
    request = PlanRequest(
        budget=Budget(
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
        ),
        menu=(menu,) if isinstance(menu, str) else tuple(menu),
        constraints=constraints,
        scores=scores,
        dataset=tuple(as_sequence(dataset)),
        max_seq_length=max_seq_length,
        num_tokens=num_tokens,
        rounding=rounding,
        target=target,
        proof=ProofSettings(
            held_out=tuple(as_sequence(held_out)),
            contexts=(held_out_contexts,) if isinstance(held_out_contexts, int) else tuple(held_out_contexts),
            max_tokens=max_tokens,
            device=device,
            tokens_per_batch=tokens_per_batch,
        ),
        alternatives=alternatives,
        prove=prove,
        seed=seed,
    )
    folder = Path(output_dir)
    check_stageable(folder, models=[model])
    prepared = prepare_plan(model, request)
    for note in prepared.notes:
        progress.message(note)
    with resumable(folder, restart=restart) as (directory, work):
        return _run(model, prepared, directory, work, progress)


def prepare_plan(model: str | Path, request: PlanRequest) -> Prepared:
    """Everything that can be checked before the long work; UserError as in `plan`."""
    if request.alternatives < 0:
        what = f"must be >= 0, got {request.alternatives}."
        raise UserError(what, code="option-invalid", where="alternatives", remedy="0 lists none.")
    loaded = LoadedConstraints() if request.constraints is None else load_constraints(request.constraints)
    layout = read_layout(model)
    layout.check_quantizable()
    place = read_place(layout, request.budget)
    choices = read_choices(layout, place, request.menu, loaded)
    _check_possible(choices)
    generation = place.server.settings.gpu.generation if place.server.settings else None
    fitting = _PROFILE_OF.get(generation or "", DEFAULT_PROFILE)
    found, statistics, notes = None, None, list(place.notes)
    if request.scores is not None:
        found = load_scores(Path(request.scores))
        check_model(found, header_digest(layout.checkpoint), fingerprint(layout.checkpoint), where="scores")
        statistics = _statistics_beside(Path(request.scores), found)
        if request.target not in (None, found.target):
            what = f"these scores were made for {found.target}, not {request.target}."
            raise UserError(what, code="scores-mismatch", where="scores", remedy="Score again, or leave `target` out.")
        if generation is not None and found.target != fitting:
            notes.append(f"the scores were made for {found.target}, but inputs are rounded as in {fitting} on this GPU")
        choices = replace(choices, space=scored(choices.space, found))
    target = found.target if found else request.target or fitting
    if generation is None and request.target is None and found is None:
        notes.append(f"inputs are rounded as {target} does it: no GPU is named")
    return Prepared(
        request=request,
        layout=layout,
        choices=choices,
        target=target,
        scores=found,
        statistics=statistics,
        notes=tuple(notes),
    )


def _check_possible(choices: Choices) -> None:
    """UserError where no mix keeps the limits, and where the model keeps all of them as it is."""
    space, longest = choices.space, choices.place.budget.longest
    spaces = choices.at(1) if longest else space
    fitting = [
        cache
        for cache, limits in spaces.limits.items()
        if all(least_amount(spaces, limit, cache) <= limit.bytes for limit in limits)
    ]
    if not fitting:
        raise impossible(spaces, choices.place)
    _check_needed(choices)


def _check_needed(choices: Choices) -> None:
    """UserError where the model keeps all limits as it is."""
    budget, served, space = choices.place.budget, choices.place.served, choices.space
    if budget.longest and served is not None:
        space = choices.at(served.max_positions)
    elif budget.max_kl is not None:
        return
    if KEEP not in space.limits or any(menu.options[0].format != KEEP for menu in space.menus):
        return
    kept = {menu.group.name: menu.options[0] for menu in choices.everything}
    mix = make_mix(kept, KEEP, space.outside[KEEP], None, 1)
    if within(mix, space.limits[KEEP]):
        what = f"the model fits as it is ({mix.bytes.file:,} bytes): nothing has to be quantized."
        where = next(iter(space.limits[KEEP])).name
        raise UserError(what, code="recipe-changes-nothing", where=where, remedy="Ask for less.")


def _changes(mix: Mix) -> bool:
    """Whether a mix is anything but the model as it is."""
    return mix.kv_cache != KEEP or any(one.format != KEEP for one in mix.options.values())


def _statistics_beside(given: Path, scores: Scores) -> Statistics | None:
    """The statistics of the calibration that scores were made with, where they lie beside them."""
    file = (given if given.is_dir() else given.parent) / STATISTICS_FILE
    if not file.is_file():
        return None
    found = load_statistics(file)
    same = (found.header_digest, found.fingerprint) == (scores.header_digest, scores.fingerprint)
    return found if same else None


def _run(model: str | Path, prepared: Prepared, directory: Path, work: Path, progress: Progress) -> PlanRecord:
    """The long work, and the files of the result."""
    seconds: dict[str, float] = {}
    started = time.monotonic()
    scores, statistics = _scores(prepared, work, progress)
    seconds["scoring"] = time.monotonic() - started
    choices = replace(prepared.choices, space=scored(prepared.choices.space, scores))
    started = time.monotonic()
    context, candidates, space = search(choices, scores, prepared.request.alternatives + 1)
    if not _changes(candidates[0]):
        what = "the best mix is the model as it is: nothing has to be quantized."
        raise UserError(what, code="recipe-changes-nothing", where="max_kl", remedy="Ask for less, or allow more KL.")
    candidates = [mix for mix in candidates if _changes(mix)]
    controls = find_controls(prepared.layout, choices.everything, space, scores, context)
    seconds["search"] = time.monotonic() - started
    named = [(f"mix {number}", mix) for number, mix in enumerate(candidates, 1)]
    started = time.monotonic()
    measured: Mapping[str, tuple[ProvenKl, ...]] = {}
    if prepared.request.prove:
        if statistics is None:
            statistics = _calibrated(prepared, work, progress)
        proven = prove_mixes(
            model, named, controls, scores, statistics, work / "proof", prepared.request.proof, progress
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
    record = record_of(outcome)
    _write(record, scores, statistics, prepared, directory)
    return record


def search(choices: Choices, scores: Scores, count: int) -> tuple[int, list[Mix], Space]:
    """The context, the best mixes for it, and the space under the limits that controls have to keep, too.

    UserError where no mix keeps the budget.
    """
    budget, space = choices.place.budget, choices.space
    distance = max(1, len(space.menus) // 12)
    if budget.longest:  # of the mixes at that context the one of least KL
        context = _longest(choices, scores)
        space = choices.at(context)
        return context, least_kl(space, scores, context, count=count, distance=distance), space
    context = budget.context or scores.edges[-1]
    if budget.max_kl is None:
        found = least_kl(space, scores, context, count=count, distance=distance)
        if not found:
            raise impossible(space, choices.place)
        return context, found, space
    smallest = least_bytes(space, scores, context, budget.max_kl)
    if smallest is None:
        raise _too_lossy(least_kl(space, scores, context), choices)
    # others of as many bytes, and controls, have to fit what the smallest takes
    as_small = {
        cache: (*limits, Limit(name="max_kl", kind="file", bytes=smallest.bytes.file))
        for cache, limits in space.limits.items()
    }
    narrow = space.with_limits(as_small)
    others = least_kl(narrow, scores, context, count=count, distance=distance)
    return context, [smallest, *(mix for mix in others if mix.formats != smallest.formats)][:count], narrow


def _longest(choices: Choices, scores: Scores) -> int:
    """The longest context for which some mix is expected to lose at most `max_kl`; UserError where there is none.

    KL need not grow with the context: halves of the longest are tried first, then what lies between.
    """
    budget, served = choices.place.budget, choices.place.served
    assert served is not None
    assert budget.max_kl is not None

    def works(context: int) -> bool:
        found = least_kl(choices.at(context), scores, context)
        return bool(found) and found[0].predicted.kl <= (budget.max_kl or 0.0)

    high = served.max_positions
    if works(high):
        return high
    low = high // 2
    while low >= 1 and not works(low):
        high, low = low, low // 2
    if low < 1:
        raise _too_lossy(least_kl(choices.at(1), scores, 1), choices)
    for _ in range(_SEARCHED_CONTEXTS):
        middle = (low + high) // 2
        if middle in (low, high) or high - low <= max(1, low // 512):
            break
        low, high = (middle, high) if works(middle) else (low, middle)
    return low


def _too_lossy(found: Sequence[Mix], choices: Choices) -> UserError:
    """Why no mix has at most the KL that was asked for."""
    if not found:
        return impossible(choices.space, choices.place)
    least = found[0].predicted.kl
    what = f"every mix that fits is expected to lose more than {choices.place.budget.max_kl:g} nats a token."
    remedy = f"The least that works is `max_kl={least * 1.001:.3g}`."
    return UserError(what, code="plan-impossible", where="max_kl", remedy=remedy)


def _scores(prepared: Prepared, work: Path, progress: Progress) -> tuple[Scores, Statistics | None]:
    """The scores that were given, or new ones with the statistics that they were made with."""
    if prepared.scores is not None:
        return prepared.scores, prepared.statistics
    from snugfit.planning.calibration import STATISTICS_NAME
    from snugfit.planning.samples import read_samples
    from snugfit.planning.sensitivity import ScoreSettings, check_settings, score_samples

    request = prepared.request
    settings = ScoreSettings(
        formats=prepared.formats,
        rounding=request.rounding,
        target=prepared.target,
        kv_cache="fp8" in prepared.choices.space.limits,
        seed=request.seed,
    )
    check_settings(settings)
    samples = read_samples(
        prepared.layout, request.dataset, context=request.max_seq_length, num_tokens=request.num_tokens
    )
    found = score_samples(
        prepared.layout,
        samples,
        settings,
        work / "scores",
        device=request.proof.device,
        tokens_per_batch=request.proof.tokens_per_batch,
        progress=progress,
    )
    return found, load_statistics(work / "scores" / STATISTICS_NAME)


def _calibrated(prepared: Prepared, work: Path, progress: Progress) -> Statistics:
    """Statistics for scores that came without."""
    from snugfit.planning.calibration import calibrate
    from snugfit.planning.samples import read_samples

    request = prepared.request
    samples = read_samples(
        prepared.layout, request.dataset, context=request.max_seq_length, num_tokens=request.num_tokens
    )
    return calibrate(
        prepared.layout,
        samples.dataset,
        work / "calibration",
        device=request.proof.device,
        tokens_per_batch=request.proof.tokens_per_batch,
        progress=progress,
    )


def _write(
    record: PlanRecord, scores: Scores, statistics: Statistics | None, prepared: Prepared, directory: Path
) -> None:
    """All files of the result."""
    from snugfit.records.statistics_file import save_statistics

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
