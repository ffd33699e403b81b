"""Result files of `evaluate` and `run_tasks`, read strictly into their records: nothing is read that disagrees.

Keys that this version does not know are ignored; null stands for NaN and infinities. No torch here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from snugfit.errors import UserError
from snugfit.records.base import SCHEMA
from snugfit.records.evaluation import EVAL_SCHEMA, TASKS_SCHEMA, EvalRecord, TasksRecord
from snugfit.records.reading import parse_record, read_json

GIVE_A_RESULT = "Give a result of `evaluate` or `run_tasks`: its directory, eval.json or tasks.json."
MAKE_AGAIN = "Make the file again."


@dataclass(frozen=True)
class Result:
    """What the file or directory `path` holds: an evaluation, tasks, or both."""

    path: Path
    eval: EvalRecord | None
    tasks: TasksRecord | None


def load_result(path: str | Path) -> Result:
    """A result file, or a directory's eval.json and tasks.json.

    UserError where it is missing or damaged, was changed after it was written, or is of another version.
    """
    place = Path(path)
    files = [place / "eval.json", place / "tasks.json"] if place.is_dir() else [place]
    found = [_read(file) for file in files if file.is_file()]
    evals = [result for result in found if isinstance(result, EvalRecord)]
    tasks = [result for result in found if isinstance(result, TasksRecord)]
    if not found:
        raise UserError("there is no result.", code="file-missing", where=str(place), remedy=GIVE_A_RESULT)
    if len(evals) > 1 or len(tasks) > 1:
        raise _invalid("eval.json and tasks.json are of one kind.", place, GIVE_A_RESULT)
    return Result(place, evals[0] if evals else None, tasks[0] if tasks else None)


def _invalid(what: str, where: Path, remedy: str = MAKE_AGAIN) -> UserError:
    return UserError(what, code="result-invalid", where=str(where), remedy=remedy)


def _read(file: Path) -> EvalRecord | TasksRecord:
    document = read_json(file, GIVE_A_RESULT)
    schema = document.get(SCHEMA) if isinstance(document, dict) else None
    kinds = EVAL_SCHEMA, TASKS_SCHEMA
    if str(schema).partition("/")[0] not in {kind.partition("/")[0] for kind in kinds}:
        raise _invalid(f"its schema is {schema!r}, not one of {', '.join(kinds)}.", file, GIVE_A_RESULT)
    record = parse_record(document, str(file))
    return checked_eval(record, file) if isinstance(record, EvalRecord) else checked_tasks(record, file)


def checked_eval(found: EvalRecord, file: Path) -> EvalRecord:
    """`found`, if its names are distinct and its lists have the same lengths; else UserError."""
    if not found.contexts:
        raise _invalid("no context was evaluated.", file)
    _refuse_repeats([str(context.context) for context in found.contexts], "context", file)
    for context in found.contexts:
        _refuse_repeats([model.name for model in context.models], "model", file)
        if not context.models or sum(context.chunk_tokens) < 1 or min(context.chunk_tokens) < 0:
            raise _invalid(f"nothing was scored at context {context.context}.", file)
        for model in context.models:
            lists = (model.nll_by_chunk, model.tokens_by_chunk, model.kl.by_chunk if model.kl else model.nll_by_chunk)
            if any(len(entries) != len(context.chunk_tokens) for entries in lists):
                what = f"{model.name} at context {context.context} has other chunks than the context."
                raise _invalid(what, file)
    return found


def checked_tasks(found: TasksRecord, file: Path) -> TasksRecord:
    """`found`, if each metric occurs once and an accuracy's scores are 0, 1 or missing; else UserError."""
    _refuse_repeats([f"{task.task}, {task.metric}" for task in found.tasks], "task", file)
    for task in found.tasks:
        if not task.items:
            raise _invalid(f"{task.task}, {task.metric} has no items.", file)
        scores = [score for score in task.items.values() if not math.isnan(score)]
        if task.kind == "accuracy" and not set(scores) <= {0.0, 1.0}:
            what = f"{task.task}, {task.metric} is an accuracy, but has scores other than 0 and 1."
            raise _invalid(what, file)
    return found


def _refuse_repeats(names: Iterable[str], what: str, file: Path) -> None:
    repeated = [name for name, times in Counter(names).items() if times > 1]
    if repeated:
        raise _invalid(f"{what} {repeated[0]} occurs more than once.", file)
