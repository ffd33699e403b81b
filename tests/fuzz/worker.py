"""Runs fuzz cases in this process and says of each what is wrong. One again: python -m fuzz.worker TARGET NUMBER --keep.

Exit codes other than 0 and 2, exceptions, tracebacks, more than one message, messages that name no place or cannot be
printed, files left or written elsewhere, a changed source, processes, sockets, pickles, much time or memory: all wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from typer.main import get_command

from fuzz.cases import TARGETS, Command, rng_of
from snugfit.cli import app

SECONDS = {False: 5, True: 30}  # of CPU time, in all threads; heavy ones run a model
LONGEST = 120  # seconds on the clock, then the process is killed
MEMORY = {False: 400 << 20, True: 1500 << 20}  # more than before the case
MORE_ADDRESSES = 8 << 30
ABOVE = ("quantizing layers", "this run will need", "going on after", "evaluating", "about ")
FORBIDDEN = frozenset(
    {
        *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.startfile", "pty.spawn"),
        *("socket.connect", "socket.bind", "pickle.find_class", "code.__new__", "ftplib.connect", "urllib.Request"),
    }
)
CHANGES = frozenset(
    {
        "os.mkdir",
        "os.rename",
        "os.remove",
        "os.rmdir",
        "os.symlink",
        "os.link",
        "os.truncate",
        "os.chmod",
        "os.chown",
        "os.utime",
    }
)


class TooLong(BaseException):
    """The case took more time than it may; nothing of ours catches this."""


@dataclass
class Watch:
    """What audit events tell while a case runs: writes outside `root`, and what no verb has to do."""

    root: str = ""
    problems: list[str] | None = None

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.problems is None:
            return
        if event in FORBIDDEN:
            self.problems.append(f"{event} {arguments[:2]!r:.300}")
        elif event == "open":
            path, mode, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if writes and isinstance(path, (str, bytes)):
                self._check(event, path)
        elif event in CHANGES and isinstance(arguments[0], (str, bytes, os.PathLike)):
            folder = next((fd for fd in arguments[1:] if isinstance(fd, int) and fd >= 0), None)
            below = (
                "" if folder is None or event in ("os.mkdir", "os.chmod") else os.readlink(f"/proc/self/fd/{folder}")
            )
            self._check(event, os.path.join(below, os.fsdecode(arguments[0])))

    def _check(self, event: str, path: str | bytes | os.PathLike[Any]) -> None:
        place = os.path.abspath(os.fsdecode(path))
        if not place.startswith((self.root + "/", "/dev/")) and place != self.root:
            assert self.problems is not None
            self.problems.append(f"{event} {place}")


WATCH = Watch()
CODES: Counter[str] = Counter()  # verb and exit code


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int | str | None
    stdout: str
    stderr: str
    trace: str


def run(command: Command) -> Outcome:
    """A command of `snugfit`, run here as the shell would."""
    out, err = io.BytesIO(), io.BytesIO()
    streams = (
        io.TextIOWrapper(out, "utf-8", write_through=True),
        io.TextIOWrapper(err, "utf-8", "backslashreplace", write_through=True),
    )
    code: int | str | None = 0
    trace = ""
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            COMMAND.main(command, prog_name="snugfit")
        except SystemExit as error:
            code = error.code  # type: ignore[assignment]
        except TooLong:
            code, trace = "too long", _frames(traceback.format_exc())
        except BaseException:  # noqa: BLE001 (that is what is looked for)
            code, trace = "traceback", traceback.format_exc()
    return Outcome(
        0 if code is None else code,
        out.getvalue().decode("utf-8", "replace"),
        err.getvalue().decode("utf-8", "replace"),
        trace,
    )


COMMAND = get_command(app)


def _frames(trace: str) -> str:
    """Of a hang only where it was."""
    lines = [line for line in trace.splitlines() if "/snugfit/" in line]
    return "\n".join(lines[-6:])


def tree(root: Path) -> dict[str, Any]:
    """All below a folder, with contents and times of files."""
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        stat = path.lstat()
        plain = path.is_file() and not path.is_symlink() and stat.st_size < 4_000_000
        content = path.read_bytes() if plain else os.readlink(path) if path.is_symlink() else stat.st_size
        found[str(path.relative_to(root))] = (stat.st_mode, content, 0 if path.is_dir() else stat.st_mtime_ns)
    return found


def check(command: Command, outcome: Outcome, before: dict[str, Any], root: Path, shared: Path) -> Iterator[str]:
    """What is wrong with a command's outcome."""
    after = tree(root)
    out = option(command, "-o")
    names = {Path(out).name} if out else set()
    written = {name for name in after.keys() - before.keys()}
    if outcome.trace:
        yield f"{outcome.code}: {outcome.trace.strip().splitlines()[-1][:300]}"
        return
    if outcome.code not in (0, 2):
        yield f"exit code {outcome.code}: {outcome.stderr[-300:]}"
    if "Traceback" in outcome.stderr:
        yield "a traceback on stderr"
    for name, entry in before.items():
        if name not in after and not name.startswith(tuple(f"{n}.partial" for n in names)):
            yield f"removed {name}"
        elif name in after and after[name] != entry and not name.startswith(tuple(f"{n}.partial" for n in names)):
            yield f"changed {name}"
    if outcome.code == 0:
        allowed = () if "--dry-run" in command else tuple(names)
        odd = [name for name in written if name.partition("/")[0] not in allowed]
        if odd:
            yield f"wrote {odd[:3]}"
        yield from _check_answer(command, outcome, shared)
        return
    lines = [line for line in outcome.stderr.splitlines() if line.strip() and not line.startswith(ABOVE)]
    messages = [line for line in lines if line.startswith("snugfit: ")]
    if len(messages) != 1 or lines[-1] != messages[0]:
        yield f"{len(messages)} messages in {lines[-3:]!r:.600}"
        return
    message = messages[0].removeprefix("snugfit: ")
    if not message.isprintable() or len(message) > 3000:
        yield f"a message of {len(message)} characters: {ascii(message)[:200]}"
    if ": " not in message and str(root) not in message:
        yield f"no place in {message[:300]}"
    if outcome.stdout:
        yield f"an answer and an error: {outcome.stdout[:100]!r}"
    goes_on = any(words in message for words in ("unfinished run", "a run that was begun", ".partial keeps "))
    odd = [name for name in written if not (goes_on and name.startswith(f"{Path(out or 'x').name}.partial"))]
    if odd:
        yield f"left {odd[:3]}"
    if out and not goes_on and os.path.lexists(f"{out}.partial"):
        yield f"left {out}.partial"


def _check_answer(command: Command, outcome: Outcome, shared: Path) -> Iterator[str]:
    """Whether what a verb printed and wrote holds together."""
    document: Any = None
    if "--json" in command:
        try:
            document = json.loads(outcome.stdout, parse_constant=lambda name: name)
        except ValueError as error:
            yield f"no JSON on stdout: {error}"
    odd = [c for c in outcome.stdout if not c.isprintable() and c != "\n"]
    if odd and document is None:
        yield f"characters on stdout that are not printed: {odd[:5]!r}"
    if command[0] != "quantize" or document is None:
        return
    if document["bytes"] != sum(tensor["bytes"] for tensor in document["tensors"]):
        yield "the tensors' bytes are not those of the whole"
    out = option(command, "-o")
    if "--dry-run" in command or out is None:
        return
    from snugfit.model.checkpoint import open_directory

    stored = open_directory(Path(out))
    if sum(tensor.bytes for tensor in stored.tensors.values()) != document["bytes"]:
        yield "other bytes were written than planned"
    whole = shared / "whole.json"
    if (
        out.endswith("out")
        and whole.exists()
        and option(command, "-r") == "nvfp4-fp8-hybrid-fp8kv"
        and str(shared / "model") == command[1]
    ):
        if document["files"] != json.loads(whole.read_text())["files"]:
            yield "a run that went on wrote other files"


def option(command: Sequence[str], name: str) -> str | None:
    """The value of an option."""
    return command[command.index(name) + 1] if name in command else None


def prepare(target: str, shared: Path) -> None:
    """What heavy cases damage: a model with weights and a tokenizer, its quantized copy, an unfinished run."""
    import torch

    from fuzz.prepare import prepare_runs

    torch.set_num_threads(1)
    prepare_runs(shared, unfinished=target == "unfinished")


def run_case(target: str, number: int, root: Path, shared: Path) -> list[dict[str, Any]]:
    """The problems of one case."""
    heavy = TARGETS[target].heavy
    root.mkdir()
    commands = TARGETS[target].make(rng_of(target, number), root, shared)
    problems: list[dict[str, Any]] = []
    for command in commands:
        before = tree(root)
        reset_peak()
        resident = peak()
        WATCH.root, WATCH.problems = str(root), []
        faulthandler.dump_traceback_later(LONGEST, exit=True)
        signal.setitimer(signal.ITIMER_PROF, SECONDS[heavy])
        try:
            outcome = run(command)
        except TooLong:
            outcome = Outcome("too long", "", "", "in the runner")
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            faulthandler.cancel_dump_traceback_later()
        seen, WATCH.problems = WATCH.problems, None
        CODES[f"{command[0]} {outcome.code}"] += 1
        found = [*check(command, outcome, before, root, shared), *seen]
        if peak() - resident > MEMORY[heavy]:
            found.append(f"memory: {(peak() - resident) >> 20} MB more")
        problems += [
            {
                "case": f"{target} {number}",
                "command": command,
                "problem": problem,
                "trace": outcome.trace,
                "stderr": outcome.stderr[-1500:],
            }
            for problem in found
        ]
    return problems


def reset_peak() -> None:
    """From now on VmHWM is of what comes."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """The largest resident memory, in bytes."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(r"VmHWM:\s+(\d+) kB", text)
    return int(found[1]) * 1024 if found else 0


def interrupt(*_: object) -> None:
    """What ends a case that takes too long."""
    raise TooLong


def main() -> None:
    """Run cases NUMBER to NUMBER + COUNT - 1 of a target, a JSON line each on stdout."""
    parser = argparse.ArgumentParser()
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("number", type=int)
    parser.add_argument("count", type=int, nargs="?", default=1)
    parser.add_argument("--keep", action="store_true", help="keep the case's folder, and print the commands and errors")
    asked = parser.parse_args()
    sys.dont_write_bytecode = True
    heavy = TARGETS[asked.target].heavy
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        place = Path(scratch).resolve()
        os.environ |= {"MPLCONFIGDIR": str(place), "HF_HOME": str(place / "hf"), "HF_HUB_OFFLINE": "1"}
        shared = place / "shared"
        shared.mkdir()
        if heavy:
            prepare(asked.target, shared)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MORE_ADDRESSES, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGPROF, interrupt)
        sys.addaudithook(WATCH)
        for number in range(asked.number, asked.number + asked.count):
            print(json.dumps({"begin": number}), flush=True)
            root = place / f"case-{number}"
            for problem in run_case(asked.target, number, root, shared):
                print(json.dumps(problem), flush=True)
                if asked.keep:
                    print(problem["trace"], problem["stderr"], sep="\n", file=sys.stderr)
            if asked.keep:
                kept = Path.cwd() / root.name
                shutil.copytree(
                    root,
                    kept,
                    symlinks=True,
                    ignore=lambda folder, names: [
                        n for n in names if not (Path(folder) / n).is_file() and not (Path(folder) / n).is_dir()
                    ],
                )
                print(f"kept in {kept}", file=sys.stderr)
            shutil.rmtree(root)
    print(json.dumps({"codes": CODES}), flush=True)


if __name__ == "__main__":
    try:
        main()
    except typer.Exit:
        raise AssertionError from None
