"""How a long run reports to the person who waits for it: messages and progress bars, silent unless asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Progress:
    """Discards every message and draws no bar: the default of every function of the Python API."""

    def message(self, text: str) -> None:
        """Report one line: what the run will need, how far it is."""

    def time_left(self, seconds: float) -> None:
        """Report how long the work will go on, if that is worth a line."""
        if seconds > 10:
            self.message(f"about {seconds / 60:.0f} min left" if seconds > 90 else f"about {seconds:.0f} s left")

    @contextmanager
    def bar(self, total: int, description: str) -> Iterator[Callable[[], None]]:
        """Count `total` steps; yields the function that counts one."""
        del total, description
        yield lambda: None


SILENT = Progress()


def duration(seconds: float | None) -> str:
    """A time in words."""
    if seconds is None:
        return "an unknown time"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class TerminalProgress(Progress):
    """Writes messages and progress bars to stderr."""

    def message(self, text: str) -> None:
        """Print one line to stderr."""
        print(text, file=sys.stderr, flush=True)  # noqa: T201

    @contextmanager
    def bar(self, total: int, description: str) -> Iterator[Callable[[], None]]:
        """Draw a bar of `total` steps; yields the function that advances it by one."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        console = Console(file=sys.stderr)
        with Bars(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bars:
            task = bars.add_task(description, total=total)
            yield lambda: bars.advance(task)
