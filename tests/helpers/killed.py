"""Runs that are killed in a process of their own, and the contents of directories afterwards."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from snugfit.records.quantize import RECORD_FILE

KILLED = 9


def contents(directory: Path) -> dict[str, bytes]:
    """All files except the record, which has times."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files if path.name != RECORD_FILE}


def in_child(work: Callable[[], None]) -> int:
    """Exit code of `work` in a process of its own: 0, what it exits with, or 1 for an exception."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        work()
        os._exit(0)
    except BaseException:  # noqa: BLE001
        os._exit(1)
