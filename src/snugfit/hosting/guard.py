"""Ends an engine whose starter was killed: a program of its own, which waits at a pipe that only the starter holds.

It reads the engine's process id, then waits. A word more is an orderly end; an end of the pipe without one means that
the starter is gone, however that happened. It imports nothing but the standard library, and runs without snugfit.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time

STOP_SECONDS = 30.0  # from the first signal to the last
POLL_SECONDS = 0.1


def end_group(pid: int) -> None:
    """Ask a group's leader to end, and kill the whole group once it is gone or `STOP_SECONDS` have passed."""
    end = time.monotonic() + STOP_SECONDS
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGTERM)
        while time.monotonic() < end:
            os.kill(pid, 0)
            time.sleep(POLL_SECONDS)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def main() -> None:
    """Wait, and end the engine if nobody else will."""
    line = sys.stdin.buffer.readline().strip()
    if line.isdigit() and not sys.stdin.buffer.read():
        end_group(int(line))


if __name__ == "__main__":
    main()
