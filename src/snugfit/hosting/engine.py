"""A server process: started in a group of its own, waited for, and ended with all of its children."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import httpx

from snugfit.engines.launch import Launch, given
from snugfit.engines.refusals import explain
from snugfit.errors import UserError
from snugfit.hosting import guard
from snugfit.records.serve import EngineRefusal

POLL_SECONDS = 0.5
HOST = "127.0.0.1"


class RefusedError(Exception):
    """The engine ended, or did not answer in time; `refusal` says why."""

    def __init__(self, refusal: EngineRefusal) -> None:
        super().__init__(refusal.reason)
        self.refusal = refusal


@dataclass(frozen=True, kw_only=True)
class Start:
    """What is started: the whole command, settings added to the environment, the port, and the page that answers."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    port: int
    ready: str

    @property
    def url(self) -> str:
        """The server's address."""
        return f"http://{HOST}:{self.port}"


def make_start(
    launch: Launch,
    model: str,
    *,
    python: str | None,
    command: str | None,
    port: int | None,
    options: Sequence[str],
    extra: Sequence[str],
) -> Start:
    """The command of an engine: of the interpreter `python`, or `command` (split as a shell would), then options.

    Options of `extra`, the user's, replace those that are given here.
    """
    if python is not None and command is not None:
        what = "`python` and `command` both say what to start."
        raise UserError(what, code="option-conflict", where="command", remedy="Leave one of them out.")
    if command is not None:
        try:
            parts = shlex.split(command)
        except ValueError as error:
            raise UserError(f"not a command ({error}).", code="option-invalid", where="command") from None
        head = [*parts, *launch.model_behind, model]
        if not parts:
            raise UserError("is empty.", code="option-invalid", where="command")
    elif python is not None:
        head = [python, "-m", launch.module, *launch.model, model]
    else:
        head = [*launch.command, *launch.model_behind, model]
    asked = next((extra[n + 1] for n, part in enumerate(extra[:-1]) if part == "--port"), None)
    chosen = port or (int(asked) if asked is not None and asked.isdecimal() else None) or _free_port()
    fixed = [*([] if given("--host", extra) else ["--host", HOST])]
    fixed += [] if given("--port", extra) else ["--port", str(chosen)]
    environment = {name: value for name, value in launch.environment.items() if name not in os.environ}
    return Start(
        command=(*head, *fixed, *_without(options, extra), *extra),
        environment=environment,
        port=chosen,
        ready=launch.ready,
    )


def _without(options: Sequence[str], extra: Sequence[str]) -> list[str]:
    """Pairs of option and value, without those that `extra` has."""
    pairs = zip(options[::2], options[1::2], strict=True)
    return [part for name, value in pairs if not given(name, extra) for part in (name, value)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(
    start: Start, log: Path, *, start_seconds: float, sleep: Callable[[float], None] = time.sleep
) -> Iterator[float]:
    """Start a server, its output in `log`, and yield the seconds it took to answer; at the end all of it is stopped.

    UserError where the command does not exist, RefusedError where the server ends or is silent for `start_seconds`.
    """
    began = time.monotonic()
    with _guarded() as guards, log.open("wb") as stream:
        try:
            process = subprocess.Popen(  # noqa: S603  # the user's own command
                start.command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, **start.environment},
                start_new_session=True,
            )
        except OSError as error:
            raise UserError(
                f"cannot be started ({error.strerror}).",
                code="option-invalid",
                where=start.command[0],
                remedy="Give the engine's interpreter as `python`, or its `command`.",
            ) from None
        try:
            guards(process.pid)
            _wait(start, process, log, began + start_seconds, sleep)
            yield time.monotonic() - began
        finally:
            stop(process)


@contextlib.contextmanager
def _guarded() -> Iterator[Callable[[int], None]]:
    """A process that ends an engine, named by its process id, if this process is killed before the end of the block."""
    command = (sys.executable, "-I", guard.__file__)
    with subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0, start_new_session=True) as process:  # noqa: S603
        pipe = cast("IO[bytes]", process.stdin)

        def say(words: str) -> None:
            with contextlib.suppress(OSError):  # somebody ended the guard
                pipe.write(f"{words}\n".encode())

        try:
            yield lambda pid: say(str(pid))
        finally:
            say("stopped")


def _wait(
    start: Start, process: subprocess.Popen[bytes], log: Path, end: float, sleep: Callable[[float], None]
) -> None:
    while True:
        if process.poll() is not None:
            raise RefusedError(refusal_of(log, f"it ended with code {process.returncode}"))
        try:
            if httpx.get(start.url + start.ready, timeout=5.0, trust_env=False).status_code == httpx.codes.OK:
                return
        except httpx.HTTPError:
            pass
        if time.monotonic() > end:
            raise RefusedError(refusal_of(log, "it did not answer in time"))
        sleep(POLL_SECONDS)


def refusal_of(log: Path, what: str) -> EngineRefusal:
    """Why an engine did not start, by its log."""
    line, found = explain(log.read_text(encoding="utf-8", errors="replace"))
    if found is None:
        return EngineRefusal(
            line=line, reason=f"{what}, for a reason that is not known here", remedy="Read its log.", known=False
        )
    return EngineRefusal(line=line, reason=found.reason, remedy=found.remedy, known=True)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and whatever it started: a request to end, then, after a while, the end of its whole group."""
    try:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(guard.STOP_SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # the group outlives its leader while a child lives
        process.wait()
