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


def boundaries_of(work: Callable[[], object], notes: Path, *, stride: int = 4) -> list[int]:
    """Numbers of the changes of the disk that `work` makes, 1 for the first, at which a kill may show something new.

    Where the kind of change is another than before, and of many of one kind every `stride`-th. It runs in a process of
    its own; `notes` is a file for the kinds.
    """

    def noted() -> None:
        kinds = notes.open("w", encoding="utf-8")

        def noting(real: Callable[..., Any], kind: str) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                kinds.write(f"{kind}\n")
                return real(*arguments, **options)

            return call

        for owner, name in WRITES:
            setattr(owner, name, noting(getattr(owner, name), name))
        work()
        kinds.close()

    assert in_child(noted) == 0
    kinds = notes.read_text(encoding="utf-8").splitlines()
    changed = [n for n, kind in enumerate(kinds, 1) if n == 1 or kind != kinds[n - 2]]
    return sorted({*changed, *range(1, len(kinds) + 1, stride)})


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
