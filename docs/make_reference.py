"""Write docs/reference.md (every `--help`), docs/errors.md and docs/faults.md (every code): `make reference`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
import typer.main

from snugfit.cli.app import app
from snugfit.errors import CODES
from snugfit.records.doctor import FAULTS, Fault

FOLDER = Path(__file__).parent
WIDTH = 100


def reference() -> str:
    """The help of every verb, as a terminal shows it."""
    parts = ["# Command line\n\nMade by `make reference` from `--help`.\n"]
    parts += [f"## {name}\n\n```\n{text}\n```\n" for name, text in _helps(typer.main.get_command(app), "snugfit")]
    return "\n".join(parts)


def _helps(command: Any, name: str, parent: Any = None) -> Iterator[tuple[str, str]]:
    info = name.rpartition(" ")[2]
    context = command.make_context(info, [], parent=parent, resilient_parsing=True, terminal_width=WIDTH)
    yield name, context.get_help()
    for verb in getattr(command, "commands", {}):
        yield from _helps(command.commands[verb], f"{name} {verb}", context)


def errors() -> str:
    """The table of error codes."""
    rows = "".join(f"| `{code}` | {meaning} |\n" for code, meaning in CODES.items())
    return (
        "# Error codes\n\nMade by `make reference` from `snugfit.errors.CODES`. A code is stable, the message beside it"
        " is not.\nThe command line ends with exit code 2 and prints `snugfit: WHERE: WHAT REMEDY [code]`; functions"
        " raise\n`snugfit.UserError` with `code`, `where`, `what` and `remedy`.\n\n| code | meaning |\n|---|---|\n"
        + rows
    )


def faults() -> str:
    """The table of what `doctor` can find."""
    rows = "".join(_row(code, fault) for code, fault in FAULTS.items())
    return (
        "# Faults\n\nMade by `make reference` from `snugfit.records.doctor.FAULTS`: what [`snugfit doctor`](doctor.md)"
        " can find.\nOf faults that are marked lossless `snugfit repair` corrects those that the record calls"
        " `repairable`.\n\n| code | severity | lossless | meaning | remedy |\n|---|---|---|---|---|\n" + rows
    )


def _row(code: str, fault: Fault) -> str:
    remedy = fault.remedy.replace("`repair`", "`snugfit repair`").replace("`evaluate`", "`snugfit eval`")
    return f"| `{code}` | {fault.severity} | {'yes' if fault.lossless else ''} | {fault.meaning} | {remedy} |\n"


if __name__ == "__main__":
    (FOLDER / "reference.md").write_text(reference(), encoding="utf-8")
    (FOLDER / "errors.md").write_text(errors(), encoding="utf-8")
    (FOLDER / "faults.md").write_text(faults(), encoding="utf-8")
