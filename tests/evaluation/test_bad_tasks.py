"""Bad input of `tasks`: exit code 2, a message with code and place, no work, nothing written."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from helpers.refusals import add_codes, copy, refuse_verb
from quantization.test_bad_input import Spoil, edit_config, tail_cut, write
from snugfit.evaluation import task_loading
from snugfit.storage.checkpoint import SINGLE_NAME


def refuse(out: Path, code: str, *arguments: object) -> str:
    """The message of a run of tasks that must be refused and leave everything around `out` as it was."""
    return refuse_verb(out, code, "tasks", "--device", "cpu", *arguments)


def make_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("not a model", encoding="utf-8")


class Manager:
    """A stand-in for lm_eval's index of tasks, which takes 10 seconds to make."""

    all_tasks = ("piqa", "hellaswag")

    def match_tasks(self, _: list[str]) -> list[str]:
        """No wildcard matches."""
        return []


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """An index of two tasks."""
    monkeypatch.setattr(task_loading, "_task_manager", lambda *_: Manager())


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("name", "hint"), [("pika", " piqa?"), ("?x*", "`lm_eval ls tasks`")])
def test_unknown_task(name: str, hint: str, good: Path, out: Path) -> None:
    """A task that lm_eval does not have is refused by its name, with the nearest."""
    message = refuse(out, "task-unknown", good, "--tasks", name)
    assert f"--tasks: lm_eval has no task {name!r}" in message
    assert hint in message


@pytest.mark.parametrize("names", ["", ",", " , "], ids=repr)
def test_no_task(names: str, good: Path, out: Path) -> None:
    """A list of no tasks is refused."""
    assert "--tasks: " in refuse(out, "option-invalid", good, "--tasks", names)


@pytest.mark.parametrize("limit", [0, -1])
def test_limit_that_leaves_no_item(limit: int, good: Path, out: Path) -> None:
    """A limit of no items is refused."""
    assert "--limit: " in refuse(out, "option-invalid", good, "--tasks", "piqa", "--limit", limit)


def test_hub_ids(out: Path) -> None:
    """The id of a model on the Hub is refused before anything is downloaded."""
    assert "snugfit: org/model: " in refuse(out, "option-invalid", "org/model", "--tasks", "piqa")


def test_a_folder_of_tasks_that_does_not_exist(good: Path, out: Path) -> None:
    """A folder of further tasks is refused by its path."""
    folder = out.parent / "nowhere"
    assert f"{folder}: " in refuse(out, "file-missing", good, "--tasks", "piqa", "--task-folder", folder)


def test_tasks_without_lm_eval(good: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks without the extra that they need are refused with the command that installs it."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    message = refuse(out, "dependency-missing", good, "--tasks", "piqa")
    assert "lm_eval" in message
    assert "pip install 'snugfit[eval]'" in message


def make_gptq(model: Path) -> None:
    edit_config(quantization_config={"quant_method": "gptq", "bits": 4})(model)
    add_codes(model)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (shutil.rmtree, "model-not-found"),
        (make_file, "model-not-found"),
        (lambda model: tail_cut(model / SINGLE_NAME), "file-damaged"),
        (make_gptq, "quantization-unknown"),
        (lambda model: (model / "tokenizer.json").unlink(), "tokenizer-unusable"),
        (write("tokenizer.json", b"{"), "tokenizer-unusable"),
    ],
    ids=["missing", "file", "cut", "gptq", "no tokenizer", "broken tokenizer"],
)
def test_tasks_on_what_is_not_a_model(spoil: Spoil, code: str, llama: Path, out: Path) -> None:
    """A checkpoint that cannot be read is refused by its path, as by an evaluation on texts."""
    model = copy(llama, out.parent / "model", spoil)
    assert str(model) in refuse(out, code, model, "--tasks", "piqa")
