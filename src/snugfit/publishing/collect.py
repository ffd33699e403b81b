"""Collect the records of runs: read strictly, their digests checked, all of one model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from snugfit.errors import UserError
from snugfit.evaluation.results import checked_eval, checked_tasks
from snugfit.inspection.inspect import inspect
from snugfit.planning.served import served_fits
from snugfit.recipes.recipe import parse_recipe
from snugfit.records.base import DIGEST, MAKE_AGAIN, SCHEMA
from snugfit.records.bench import BenchRecord
from snugfit.records.comparison import CompareRecord
from snugfit.records.evaluation import EvalRecord, EvaluatedCheckpoint, TasksRecord
from snugfit.records.fit import FitRecord
from snugfit.records.plan import PlanRecord
from snugfit.records.quantize import RECIPE_FILE, RECORD_FILE, QuantizeRecord
from snugfit.records.reading import parse_record, read_document
from snugfit.records.report import REPORT_SCHEMA
from snugfit.records.serve import ServeRecord
from snugfit.records.statistics_file import SQUARES_SCHEMA, STATISTICS_SCHEMA, Statistics, load_statistics, text_digest
from snugfit.report.collection import CalibrationStatistics, Collection, QuantizedCheckpoint, Source, last_part
from snugfit.report.outliers import coverage_of, outliers_of
from snugfit.storage.checkpoint import header_digest, open_directory

_STATISTICS = (STATISTICS_SCHEMA, SQUARES_SCHEMA)
GIVE_RUNS = "Give directories or files that snugfit's verbs wrote."


@dataclass
class _Found:
    """Records by kind, while files are read."""

    checkpoints: list[QuantizedCheckpoint] = field(default_factory=list)
    evals: list[EvalRecord] = field(default_factory=list)
    tasks: list[TasksRecord] = field(default_factory=list)
    comparisons: list[CompareRecord] = field(default_factory=list)
    fits: list[FitRecord] = field(default_factory=list)
    plans: list[PlanRecord] = field(default_factory=list)
    benches: list[BenchRecord] = field(default_factory=list)
    serves: list[ServeRecord] = field(default_factory=list)
    statistics: CalibrationStatistics | None = None
    statistics_digest: str | None = None
    sources: list[Source] = field(default_factory=list)


def collect(runs: Sequence[str | Path]) -> Collection:
    """All records in the files and directories `runs`; the first record of `quantize` is the model to publish.

    Of a directory these are the JSON files at its top that are records; all others are left alone. UserError for a
    missing place, a place without a record, a record that is damaged, changed, or of another version, and for records
    of different models.
    """
    if not runs:
        raise UserError("no run is given.", code="option-missing", where="runs", remedy=GIVE_RUNS)
    found = _Found()
    for run in runs:
        place = Path(run)
        if not place.exists():
            raise UserError("no such file or directory.", code="file-missing", where=str(place), remedy=GIVE_RUNS)
        files = sorted(place.glob("*.json")) if place.is_dir() else [place]
        if not sum(_take(file, found) for file in files):
            raise UserError("no record here.", code="file-missing", where=str(place), remedy=GIVE_RUNS)
    _check_one_model(found)
    return _with_fits(found)


def _take(file: Path, found: _Found) -> bool:
    """Add the record in a file; False where it holds none."""
    document = read_document(file)
    if document is None or document[SCHEMA] == REPORT_SCHEMA:
        return False
    of_statistics = document[SCHEMA] in _STATISTICS
    record = load_statistics(file) if of_statistics else parse_record(document, str(file))
    digest = document[DIGEST]
    if digest in [source.digest for source in found.sources]:
        return True  # the same record twice
    found.sources.append(Source(file=str(file), schema=document[SCHEMA], digest=digest))
    if isinstance(record, Statistics):
        _take_statistics(record, found)
    elif isinstance(record, QuantizeRecord):
        found.checkpoints.append(_checkpoint(record, file))
    elif isinstance(record, EvalRecord):
        found.evals.append(checked_eval(record, file))
    elif isinstance(record, TasksRecord):
        found.tasks.append(checked_tasks(record, file))
    else:
        _take_plain(record, found)
    if isinstance(record, ServeRecord):
        for name in record.results.values():
            _take_beside(file.parent, name, found)
    return True


def _take_beside(folder: Path, name: str, found: _Found) -> None:
    """Add a result that a start of an engine names, if it is still in the folder beside its record."""
    inside = not Path(name).is_absolute() and ".." not in Path(name).parts
    if inside and name and (folder / name).is_file():
        _take(folder / name, found)


def _take_plain(record: Any, found: _Found) -> None:
    """Add a record that needs no further check."""
    if isinstance(record, CompareRecord):
        found.comparisons.append(record)
    elif isinstance(record, FitRecord):
        found.fits.append(record)
    elif isinstance(record, PlanRecord):
        found.plans.append(record)
    elif isinstance(record, BenchRecord):
        found.benches.append(record)
    elif isinstance(record, ServeRecord):
        found.serves.append(record)


def _take_statistics(statistics: Statistics, found: _Found) -> None:
    """Outliers and coverage of statistics; those of the first file alone."""
    if found.statistics is not None:
        return
    found.statistics_digest = statistics.header_digest
    found.statistics = CalibrationStatistics(
        samples=statistics.num_samples,
        tokens=statistics.tokens,
        all_experts=statistics.all_experts,
        outliers=outliers_of(statistics),
        coverage=coverage_of(statistics),
    )


def _checkpoint(record: QuantizeRecord, file: Path) -> QuantizedCheckpoint:
    """A checkpoint with what its directory says, if the record lies in it."""
    _check_quantize(record, file)
    folder = file.parent
    one = QuantizedCheckpoint(record=record)
    if file.name != RECORD_FILE or not (folder / "config.json").is_file():
        return one
    checkpoint = open_directory(folder)
    missing = sorted(set(record.files) - set(checkpoint.shards))
    if missing:
        what, remedy = f"{missing[0]} of the record is missing.", "Give the directory as the run left it."
        raise UserError(what, code="weights-missing", where=str(folder), remedy=remedy)
    shown = inspect(folder)
    text, description = _recipe(record, folder)
    return replace(
        one,
        header_digest=header_digest(checkpoint),
        recipe_text=text,
        recipe_description=description,
        kv_cache=shown.quantization.kv_cache if shown.quantization else None,
        architecture=", ".join(shown.architecture.architectures),
        folder=str(folder),
    )


def _recipe(record: QuantizeRecord, folder: Path) -> tuple[str, str]:
    """The recipe's text and description; UserError where its file is not that of the record."""
    file = folder / RECIPE_FILE
    if not file.is_file():
        return "", ""
    text = file.read_text(encoding="utf-8", errors="replace")
    if text_digest(text) != record.recipe_digest:
        what = "it is not the recipe of the record: its digest differs."
        raise UserError(what, code="record-changed", where=str(file), remedy="Quantize again.")
    return text, parse_recipe(text, where=str(file)).recipe.description


def _check_quantize(record: QuantizeRecord, file: Path) -> None:
    """UserError for a record of `quantize` with impossible numbers."""
    if not record.tensors or record.bytes < 1 or record.source_bytes < 1:
        raise UserError("it has no tensors.", code="result-invalid", where=str(file), remedy=MAKE_AGAIN)
    for tensor in record.tensors:
        if min((*tensor.shape, tensor.bytes, tensor.source_bytes), default=0) < 0:
            what = f"{tensor.name} has a negative size."
            raise UserError(what, code="result-invalid", where=str(file), remedy=MAKE_AGAIN)


def _check_one_model(found: _Found) -> None:
    """UserError for records of different models."""
    digests: dict[str, str] = {}  # header digest of the original -> the record that has it
    for one in found.checkpoints:
        digests.setdefault(one.record.source_header_digest, f"{one.name}, quantized from {one.record.source}")
    for record in found.evals:
        if record.reference is not None:
            name = f"an evaluation against {record.reference.name}"
            digests.setdefault(record.reference.header_digest, name)
    if found.statistics_digest is not None:
        digests.setdefault(found.statistics_digest, "statistics")
    if len(digests) > 1:
        raise _mixed(" and ".join(list(digests.values())[:2]) + " have different originals.")
    _check_same_files(found)
    known = set(_names(found))
    if not known:
        known = {record.model for record in found.fits}
    known |= {last_part(name) for name in known}
    for kind, names in _named(found):
        if known and not any(name in known or last_part(name) in known for name in names):
            raise _mixed(f"{kind} of {names[0]}, but the other records are of {', '.join(sorted(known))}.")


def _mixed(what: str) -> UserError:
    return UserError(what, code="models-mismatch", where="runs", remedy="Give records of one model alone.")


def _check_same_files(found: _Found) -> None:
    """UserError where an evaluated checkpoint has the name of a quantized one, but other files."""
    made: Mapping[str, str] = {one.name: one.header_digest for one in found.checkpoints if one.header_digest}
    for record in found.evals:
        for candidate in record.candidates:
            if not isinstance(candidate, EvaluatedCheckpoint):
                continue
            if made.get(candidate.name, candidate.header_digest) != candidate.header_digest:
                raise _mixed(f"the {candidate.name} that was evaluated is not the one that was quantized.")


def _names(found: _Found) -> Iterator[str]:
    """Names of the original and of its candidates, as records that know digests have them."""
    for one in found.checkpoints:
        yield one.name
        yield one.record.source
    for record in found.evals:
        if record.reference is not None:
            yield record.reference.name
        yield from (candidate.name for candidate in record.candidates)


def _named(found: _Found) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What has no digest of a model, each with the names under which it may know its model; one of them must fit."""
    for tasks in found.tasks:
        yield "tasks", (tasks.model,)
    for comparison in found.comparisons:
        for side in (comparison.a, comparison.b):
            names = (side.tasks_model, side.eval_model)
            yield from (("a comparison", (name,)) for name in names if name is not None)
    for fit in found.fits:
        yield "a fit", (fit.model,)
    for plan in found.plans:
        yield "a plan", (plan.model,)
    for bench in found.benches:
        for run in bench.runs:
            server = run.server
            yield "a benchmark", tuple(name for name in (server.model, server.root, server.name) if name)
    for serve in found.serves:
        yield "a start of an engine", (serve.model,)


def _with_fits(found: _Found) -> Collection:
    """The collection, with what fits on common GPUs where the published checkpoint's files are there."""
    first = found.checkpoints[0] if found.checkpoints else None
    served = served_fits(first.folder) if first is not None and first.folder is not None else None
    return Collection(
        checkpoints=tuple(found.checkpoints),
        evals=tuple(found.evals),
        tasks=tuple(found.tasks),
        comparisons=tuple(found.comparisons),
        fits=tuple(found.fits),
        plans=tuple(found.plans),
        benches=tuple(found.benches),
        serves=tuple(found.serves),
        statistics=found.statistics,
        served=served.fits if served else (),
        kernels=served.kernels if served else (),
        max_positions=served.max_positions if served else None,
        sources=tuple(found.sources),
    )
