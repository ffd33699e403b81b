"""Result files of `evaluate` and `run_tasks`, read strictly into their records: nothing is read that disagrees.

Keys that this version does not know are ignored; null stands for NaN and infinities. No torch here.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from snugfit.errors import UserError
from snugfit.records.evaluation import EVAL_SCHEMA, TASKS_SCHEMA, EvalRecord, TasksRecord
from snugfit.version import __version__

GIVE_A_RESULT = "Give a result of `evaluate` or `run_tasks`: its directory, eval.json or tasks.json."
MAKE_AGAIN = "Make the file again."


@dataclass(frozen=True)
class Result:
    """What the file or directory `path` holds: an evaluation, tasks, or both."""

    path: Path
    eval: EvalRecord | None
    tasks: TasksRecord | None


def load_result(path: str | Path) -> Result:
    """A result file, or a directory's eval.json and tasks.json; UserError where it is missing, damaged or too new."""
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
    try:
        raw = file.read_bytes().decode("utf-8-sig")  # an editor may have put a byte order mark in front
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        what = f"not JSON: {error}."
        raise UserError(what, code="json-invalid", where=str(file), remedy=GIVE_A_RESULT) from None
    schema = document.get("schema") if isinstance(document, dict) else None
    try:
        if schema == EVAL_SCHEMA:
            return checked_eval(TypeAdapter(EvalRecord).validate_json(raw, strict=True), file)
        if schema == TASKS_SCHEMA:
            return checked_tasks(TypeAdapter(TasksRecord).validate_json(raw, strict=True), file)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise _invalid(f"{key or 'the document'}: {first['msg']}.", file) from None
    known = {name.partition("/")[0]: name for name in (EVAL_SCHEMA, TASKS_SCHEMA)}
    wanted = known.get(str(schema).partition("/")[0])
    if wanted is None:
        raise _invalid(f"its schema is {schema!r}, not one of {', '.join(known.values())}.", file, GIVE_A_RESULT)
    what = f"its schema is {schema!r}, but snugfit {__version__} reads {wanted!r}."
    raise _invalid(what, file, "Use the snugfit that wrote it, or make the file again.")


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
