"""Outputs and servers that cannot be used: exit code 2, a message with code and place, nothing written."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer

import snugfit.evaluation.evaluate
from helpers.errors import failed_with
from helpers.refusals import evaluate, message_of, refuse, run, snapshot
from helpers.results import evals, model
from snugfit.report import plots

# --- the output


def out_is_a_file(out: Path) -> None:
    out.write_text("mine", encoding="utf-8")


def out_has_files(out: Path) -> None:
    out.mkdir()
    (out / "eval.json").write_text("mine", encoding="utf-8")


def out_dangles(out: Path) -> None:
    out.symlink_to(out.parent / "nowhere")


@pytest.mark.parametrize("make", [out_is_a_file, out_has_files, Path.mkdir, out_dangles])
@pytest.mark.parametrize("verb", ["eval", "tasks", "compare"])
def test_output_exists(make: Callable[[Path], None], verb: str, good: Path, out: Path) -> None:
    """An output that exists is refused before anything is read, and left alone."""
    make(out)
    commands: dict[str, Sequence[object]] = {
        "eval": ["eval", good, "-o", out],
        "tasks": ["tasks", good, "--tasks", "piqa", "-o", out],
        "compare": ["compare", "a", "b", "-o", out],
    }
    before = snapshot(out.parent)
    assert f"{out}: " in message_of(run(*commands[verb]), "output-exists")
    assert snapshot(out.parent) == before


def test_output_below_a_file(good: Path, text: Path, out: Path) -> None:
    """An output that can never be written is refused before any model is run."""
    out_is_a_file(out)
    message = refuse(out / "below", "output-not-writable", good, "--dataset", text, "--context", 64)
    assert str(out) in message
    assert out.read_text(encoding="utf-8") == "mine"


def test_a_partial_of_somebody_else(good: Path, text: Path, out: Path) -> None:
    """A directory OUT.partial that snugfit did not make is refused before any model is run, and keeps its files."""
    out_has_files(out.with_name("out.partial"))
    assert f"{out}.partial: " in refuse(out, "output-exists", good, "--dataset", text, "--context", 64)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_output_without_permission(good: Path, text: Path, out: Path) -> None:
    """An output whose parent may not be written is refused before any model is run."""
    locked = out.parent / "locked"
    locked.mkdir(mode=0o555)
    assert str(locked) in refuse(locked / "out", "output-not-writable", good, "--dataset", text, "--context", 64)


def test_interrupted(good: Path, llama: Path, text: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C during the work leaves nothing, reports it, and is exit code 130."""

    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(snugfit.evaluation.evaluate, "measure", stop)
    before = snapshot(out.parent)
    options = ["--dataset", text, "--context", 64, "--reference-cache", out.parent / "cache", "-o", out]
    result = evaluate(good, "--reference", llama, *options)
    assert "nothing was written" in message_of(result, exit_code=130, worked=True)
    assert snapshot(out.parent) == before


def test_full_disk(good: Path, text: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up ends the run with the system's words and leaves nothing."""

    def fail(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(plots, "write_plots", fail)
    arguments = ["--dataset", text, "--context", 64, "--max-chunks", 1]
    assert os.strerror(errno.ENOSPC) in refuse(out, "system-error", good, *arguments, worked=True)


@pytest.mark.parametrize("verb", ["eval", "compare"])
def test_a_closed_stdout(verb: str, good: Path, text: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader of stdout that goes away does not make the message deny what was written."""
    if verb == "eval":
        options: list[object] = ["--context", 64, "--max-chunks", 1, "--device", "cpu"]
        arguments: list[object] = ["eval", good, "--dataset", text, *options]
    else:
        arguments = ["compare", *evals(out.parent, [model("x", [1.0] * 6)], [model("y", [2.0] * 6)])]

    def fail(message: object = None, *, nl: bool = True, err: bool = False) -> None:
        if not err:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        real(message, nl=nl, err=err)

    real = typer.echo
    monkeypatch.setattr(typer, "echo", fail)
    result = run(*arguments, "-o", out)
    assert (out / f"{verb}.json").is_file()
    assert result.exit_code != 0
    assert "othing was written" not in result.stderr
    assert str(out) in result.stderr


def test_defects_leave_nothing_either(good: Path, text: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception that is not the user's fault passes through with its traceback, and still leaves nothing."""

    def fail(*arguments: Any) -> Any:
        raise ZeroDivisionError(len(arguments))

    monkeypatch.setattr(plots, "write_plots", fail)
    before = snapshot(out.parent)
    result = evaluate(good, "--dataset", text, "--context", 64, "--max-chunks", 1, "-o", out)
    assert isinstance(result.exception, ZeroDivisionError)
    assert snapshot(out.parent) == before


# --- a server


@pytest.mark.parametrize(
    ("options", "code", "place"),
    [
        (["--top-logprobs", "many"], "option-invalid", "--top-logprobs: "),
        (["--top-logprobs", "0"], "option-invalid", "--top-logprobs: "),
        (["--top-logprobs", "-1"], "option-invalid", "--top-logprobs: "),
        (["--server-log", "nowhere.log"], "file-unreadable", "nowhere.log: "),
    ],
    ids=str,
)
def test_server_options(options: list[str], code: str, place: str, llama: Path, text: Path, out: Path) -> None:
    """What cannot be asked of a server is refused before it is asked."""
    arguments = ["--server", "http://127.0.0.1:9", *options, "--reference", llama, "--dataset", text, "--context", 64]
    before = snapshot(out.parent)
    result = evaluate("-o", out, *arguments)
    assert failed_with(result, code, place)
    assert snapshot(out.parent) == before


def test_a_server_needs_an_output_and_a_reference(llama: Path, text: Path, out: Path) -> None:
    """A server without a place for its answers, or without the original, is refused by an option's name."""
    arguments = ["--server", "http://127.0.0.1:9", "--dataset", text, "--context", 64]
    assert "--output-dir: " in message_of(evaluate(*arguments, "--reference", llama), "option-missing")
    message = refuse(out, "option-missing", *arguments)
    assert "--server: " in message
    assert "`--reference`" in message
