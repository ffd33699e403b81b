"""Runs of the command line that must be refused: by code and place, before any work, with nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from snugfit.cli.app import app
from snugfit.errors import CODES


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def evaluate(*arguments: object) -> Any:
    """`snugfit eval` on the CPU, without noise floors, which change nothing here."""
    return run("eval", "--device", "cpu", "--noise-floor", "none", *arguments)


def message_of(result: Any, code: str = "", *, exit_code: int = 2, worked: bool = False) -> str:
    """The one line on stderr of a run that ended with `code`; a progress bar may only precede it if it `worked`."""
    assert not code or code in CODES, f"{code} is not a code of snugfit.errors.CODES"
    assert result.exit_code == exit_code, (result.exit_code, result.stderr, repr(result.exception))
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    if worked:
        lines = [line for line in lines if not line.startswith("evaluating")]
    assert len(lines) == 1, f"work was done before this was refused: {result.stderr}"
    assert lines[0].startswith("snugfit: ")
    assert not code or lines[0].endswith(f" [{code}]"), lines[0]
    return str(lines[0])


def add_codes(model: Path) -> None:
    """Give a one-file model a tensor that only quantized weights have: plain ones make a quantization config stale."""
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.qzeros"] = torch.zeros(1, 8, dtype=torch.int32)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def snapshot(folder: Path) -> dict[Path, bytes | str | None]:
    """Everything below a folder: contents of files, targets of links, None for folders."""
    return {
        path: str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def refuse(out: Path, code: str, *arguments: object, worked: bool = False) -> str:
    """The message of an evaluation that must be refused and leave everything around `out` as it was."""
    return refuse_verb(out, code, "eval", "--device", "cpu", "--noise-floor", "none", *arguments, worked=worked)


def refuse_verb(out: Path, code: str, *arguments: object, worked: bool = False) -> str:
    """The same of any verb."""
    before = snapshot(out.parent)
    message = message_of(run(*arguments, "-o", out), code, worked=worked)
    assert snapshot(out.parent) == before
    return message


def put_file(file: Path, content: str | bytes) -> Path:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def rows_file(file: Path, *lines: object) -> Path:
    return put_file(file, "".join(json.dumps(line) + "\n" for line in lines))


def copy(source: Path, target: Path, spoil: Callable[[Path], None] | None = None) -> Path:
    """A copy of a model, damaged by `spoil`."""
    shutil.copytree(source, target)
    if spoil is not None:
        spoil(target)
    return target
