"""Work on the disk that nothing waits for before the end: files are flushed, closed and removed beside other work."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, ParamSpec, Self, TypeVar

WORKERS = 4  # files at once
REMOVED = ".removed"  # what the name of a file ends with that is about to be removed

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class Background:
    """Threads for work that ends some time; an error is raised by `wait`, at the latest where a `with` block ends."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(WORKERS)
        self._pending: deque[Future[Any]] = deque()

    def submit(
        self, work: Callable[Parameters, Result], *arguments: Parameters.args, **options: Parameters.kwargs
    ) -> Future[Result]:
        """Begin, as soon as a thread is free."""
        found = self._pool.submit(work, *arguments, **options)
        self._pending.append(found)
        return found

    def wait(self) -> None:
        """Until all that was submitted has ended; raises the first error of it."""
        while self._pending:
            with suppress(CancelledError):
                self._pending.popleft().result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(wait=True)
        if kind is None:
            self.wait()


def remove_files(folder: Path, pattern: str, background: Background) -> list[Future[None]]:
    """Give the files of a folder that match another name at once, under which they are removed in the background.

    So are those that a run which was killed has left behind under that name.
    """
    for file in list(folder.glob(pattern)):
        file.rename(file.with_name(file.name + REMOVED))
    return [background.submit(_remove, file) for file in folder.glob(f"*{REMOVED}")]


def _remove(file: Path) -> None:
    file.unlink(missing_ok=True)  # a call before this one may have found it, too
