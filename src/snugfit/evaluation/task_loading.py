"""Benchmark tasks of lm_eval: found by name, loaded with their data, and checked before a model is run."""

from __future__ import annotations

import difflib
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from snugfit.errors import UserError

REFUSED = {"UNSAFE_CODE": "runs code that the model writes", "MULTIMODAL": "shows pictures or sound"}


def load_tasks(names: Sequence[str], folder: Path | None = None, *, seed: int = 0) -> dict[str, Any]:
    """lm_eval's task and group objects by name, data sets loaded, few-shot examples determined by `seed`.

    `folder` holds further YAML tasks. UserError for names that lm_eval does not know and for data that is out of reach.
    """
    if not names:
        remedy = "Name some, such as piqa or hellaswag."
        raise UserError("no task is named.", code="option-invalid", where="tasks", remedy=remedy)
    if folder is not None and not folder.is_dir():
        raise UserError("there is no such folder of tasks.", code="file-missing", where=str(folder))
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (tasks that shuffle choices use the global generators)
    manager = _task_manager(names, folder)
    matches = [match for name in names for match in _matches(manager, name)]
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}}
    for match in matches:
        one = _load_task(manager, match)
        loaded["tasks"] |= one["tasks"]
        loaded["groups"] |= one["groups"]
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    return loaded


def _task_manager(names: Sequence[str], folder: Path | None) -> Any:
    """An index of the tasks in `folder`, and of lm_eval's own where one of those is needed."""
    from lm_eval.tasks import TaskManager

    if folder is None:
        return TaskManager()
    only_folder = TaskManager(include_path=str(folder), include_defaults=False)
    if set(names) <= set(only_folder.all_tasks):
        return only_folder  # lm_eval's own 15,000 YAML files take 10 seconds to read
    return TaskManager(include_path=str(folder))


def _matches(manager: Any, name: str) -> list[str]:
    """The tasks, groups and tags that `name`, perhaps with wildcards, refers to."""
    known = set(manager.all_tasks)
    matches: list[str] = manager.match_tasks([name]) if set(name) & set("*?[") else [name] if name in known else []
    if not matches:
        close = difflib.get_close_matches(name, known, n=5)
        hint = f"Did you mean {', '.join(close)}?" if close else "`lm_eval ls tasks` lists them."
        raise UserError(f"lm_eval has no task {name!r}.", code="task-unknown", where="tasks", remedy=hint)
    return matches


def _load_task(manager: Any, name: str) -> Any:
    where = f"task {name}"
    try:
        return manager.load([name])
    except (ConnectionError, FileNotFoundError, TimeoutError) as error:
        raise UserError(
            f"its data set is not on this machine and cannot be downloaded ({_first_line(error)}).",
            code="task-unusable",
            where=where,
            remedy="Run once with network access, which caches it, or give tasks with local data as `task_folder`.",
        ) from error
    except Exception as error:  # a task is a program and data of others: what it can raise has no end
        what = f"lm_eval cannot load it ({type(error).__name__}: {_first_line(error)})."
        raise UserError(what, code="task-unusable", where=where) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def check_tasks(tasks: Mapping[str, Any], *, generates: bool) -> None:
    """UserError for tasks that cannot be run on this model; `generates`: it can write text."""
    written = [name for name, task in tasks.items() if task.OUTPUT_TYPE == "generate_until"]
    if written and not generates:
        raise needs_server(written)
    for attribute, what in REFUSED.items():
        names = [name for name, task in tasks.items() if getattr(task, attribute, False)]
        if names:
            raise UserError(
                f"it {what}, which snugfit does not do.",
                code="task-unusable",
                where=f"task {names[0]}",
                remedy="Leave it out.",
            )


def needs_server(names: Sequence[str]) -> UserError:
    """The error for tasks that generate text, on a checkpoint."""
    return UserError(
        "the model has to generate text, which only a server does.",
        code="task-unusable",
        where=f"task {', '.join(names)}",
        remedy="Serve the checkpoint, with vLLM for example, and give its URL as `server`.",
    )
