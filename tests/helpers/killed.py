"""Runs that are killed in a process of their own, and the contents of directories afterwards."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from snugfit.records.quantize import RECORD_FILE

KILLED = 9
# everything that changes the disk
WRITES: list[tuple[Any, str]] = [
    (os, "pwrite"),
    (os, "ftruncate"),
    (os, "fsync"),
    (os, "unlink"),
    (os, "rmdir"),
    (Path, "write_text"),
    (Path, "replace"),
    (Path, "rename"),
    (Path, "mkdir"),
    (Path, "unlink"),
    (shutil, "copyfile"),
]


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


def kill_at(boundary: int) -> None:
    """From now on the process dies at its `boundary`-th change of the disk, before it happens."""
    count = 0

    def guarded(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == boundary:
                os._exit(KILLED)
            return real(*arguments, **options)

        return call

    for owner, name in WRITES:
        setattr(owner, name, guarded(getattr(owner, name)))
