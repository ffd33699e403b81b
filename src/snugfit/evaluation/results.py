"""Result files of `snugfit eval`, read strictly: what other verbs use of them, and nothing that does not hold together.

The dataclasses are a part of the records of the same names; null there stands for NaN and infinities. No torch here.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from snugfit import __version__
from snugfit.errors import UserError
from snugfit.records.evaluation import EVAL_SCHEMA, TASKS_SCHEMA

NAME_A_FILE = "Name a result of `snugfit eval`: its directory, eval.json or tasks.json."
MAKE_AGAIN = "Make the file again."


@dataclass(frozen=True)
class _Spread:
    by_chunk: tuple[float | None, ...]


@dataclass(frozen=True)
class Model:
    """One model at one context."""

    name: str
    perplexity: float | None
    nll_by_chunk: tuple[float | None, ...]
    tokens_by_chunk: tuple[int, ...]
    nonfinite: int
    kl: _Spread | None = None
    kl_kind: str = "exact"


@dataclass(frozen=True)
class Context:
    """All models at one context length, the reference first."""

    context: int
    digest: str
    chunk_tokens: tuple[int, ...]
    models: tuple[Model, ...]


@dataclass(frozen=True)
class _Text:
    name: str


@dataclass(frozen=True)
class Eval:
    """An evaluation."""

    metrics_version: int
    reference: Mapping[str, Any] | None
    texts: tuple[_Text, ...]
    contexts: tuple[Context, ...]


@dataclass(frozen=True)
class Task:
    """One metric of one task, every item's score."""

    task: str
    metric: str
    kind: Literal["accuracy", "mean"]
    higher_is_better: bool
    value: float | None
    standard_error: float | None
    items: Mapping[str, float | None]


@dataclass(frozen=True)
class _Tasks:
    model: str
    tasks: tuple[Task, ...]


@dataclass(frozen=True)
class Result:
    """What the file or directory `path` holds: an evaluation, tasks, or both."""

    path: Path
    eval: Eval | None
    tasks: _Tasks | None


def load_result(path: str | Path) -> Result:
    """A result file, or a directory's eval.json and tasks.json; UserError where it is missing, broken or too new."""
    place = Path(path)
    files = [place / "eval.json", place / "tasks.json"] if place.is_dir() else [place]
    found = [_read(file) for file in files if file.is_file()]
    evals = [result for result in found if isinstance(result, Eval)]
    tasks = [result for result in found if isinstance(result, _Tasks)]
    if not found or len(evals) > 1 or len(tasks) > 1:
        what = "eval.json and tasks.json are of one kind." if found else "there is no result here."
        raise UserError(what, where=str(place), remedy=NAME_A_FILE)
    return Result(place, evals[0] if evals else None, tasks[0] if tasks else None)


def _read(file: Path) -> Eval | _Tasks:
    where = str(file)
    try:
        raw = file.read_bytes().decode("utf-8-sig")  # an editor may have put a mark in front
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON: {error}.", where=where, remedy=NAME_A_FILE) from None
    schema = document.get("schema") if isinstance(document, dict) else None
    try:
        if schema == EVAL_SCHEMA:
            return _checked_eval(TypeAdapter(Eval).validate_json(raw, strict=True), where)
        if schema == TASKS_SCHEMA:
            return _checked_tasks(TypeAdapter(_Tasks).validate_json(raw, strict=True), where)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{key or 'the whole'}: {first['msg']}.", where=where, remedy=MAKE_AGAIN) from None
    known = {name.partition("/")[0]: name for name in (EVAL_SCHEMA, TASKS_SCHEMA)}
    wanted = known.get(str(schema).partition("/")[0])
    if wanted is None:
        raise UserError(f"schema {schema!r} is none of {', '.join(known.values())}.", where=where, remedy=NAME_A_FILE)
    what = f"schema {schema!r}, where snugfit {__version__} reads {wanted!r}."
    raise UserError(what, where=where, remedy="Use the snugfit that wrote it, or make the file again.")


def _checked_eval(found: Eval, where: str) -> Eval:
    """`found`, if its names are distinct and its lists belong together."""
    if not found.contexts:
        raise UserError("no context was evaluated.", where=where, remedy=MAKE_AGAIN)
    _refuse_repeats([str(context.context) for context in found.contexts], "context", where)
    for context in found.contexts:
        _refuse_repeats([model.name for model in context.models], "model", where)
        if not context.models or sum(context.chunk_tokens) < 1 or min(context.chunk_tokens) < 0:
            raise UserError(f"nothing was scored at context {context.context}.", where=where, remedy=MAKE_AGAIN)
        for model in context.models:
            lists = (model.nll_by_chunk, model.tokens_by_chunk, model.kl.by_chunk if model.kl else model.nll_by_chunk)
            if any(len(entries) != len(context.chunk_tokens) for entries in lists):
                what = f"{model.name} at context {context.context} has other chunks than the context."
                raise UserError(what, where=where, remedy=MAKE_AGAIN)
    return found


def _checked_tasks(found: _Tasks, where: str) -> _Tasks:
    """`found`, if each metric is there once and an accuracy's scores are 0 or 1."""
    _refuse_repeats([f"{task.task}, {task.metric}" for task in found.tasks], "task", where)
    for task in found.tasks:
        if not task.items:
            raise UserError(f"{task.task}, {task.metric} has no items.", where=where, remedy=MAKE_AGAIN)
        if task.kind == "accuracy" and not set(task.items.values()) <= {0.0, 1.0, None}:
            what = f"{task.task}, {task.metric} is an accuracy, but has scores other than 0 and 1."
            raise UserError(what, where=where, remedy=MAKE_AGAIN)
    return found


def _refuse_repeats(names: Iterable[str], what: str, where: str) -> None:
    repeated = [name for name, times in Counter(names).items() if times > 1]
    if repeated:
        raise UserError(f"{what} {repeated[0]} is there more than once.", where=where, remedy=MAKE_AGAIN)
