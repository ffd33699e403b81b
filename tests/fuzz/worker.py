"""Runs fuzz cases in this process and says what is wrong; one alone: python -m fuzz.worker TARGET NUMBER --keep.

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

from typer.main import get_command

from fuzz.bases import BASES
from fuzz.cases import TARGETS, Command, rng_of
from snugfit.cli.app import app
from snugfit.errors import CODES as ERROR_CODES

SECONDS = {False: 5, True: 30}  # of CPU time, in all threads; heavy ones run a model
LONGEST = 120  # seconds on the clock, then the process is killed
MEMORY = {False: 400 << 20, True: 1500 << 20}  # more than before the case
MORE_ADDRESSES = 8 << 30
# errors after which an unfinished run stays, so that it can resume
KEEPING = frozenset({"run-differs", "machine-differs", "run-damaged"})
# errors after which it stays if a layer was finished; their message then names it
KEEPING_LAYERS = frozenset({"system-error", "activations-not-finite", "amax-invalid"})
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
        """Hear of an event."""
        if self.problems is None:
            return
        if event in FORBIDDEN:
            self.problems.append(f"{event} {arguments[:2]!r:.300}")
        elif event == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if writes and isinstance(path, (str, bytes)):
                self._check(event, Path(os.fsdecode(path)))
        elif event in CHANGES and isinstance(arguments[0], (str, bytes, os.PathLike)):
            numbers = () if event in ("os.mkdir", "os.chmod") else arguments[1:]  # there a mode follows
            folder = next((fd for fd in numbers if isinstance(fd, int) and fd >= 0), None)
            below = Path() if folder is None else Path(f"/proc/self/fd/{folder}").readlink()
            self._check(event, below / os.fsdecode(arguments[0]))

    def _check(self, event: str, path: Path) -> None:
        place = os.path.normpath(Path.cwd() / path)
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
            code = error.code
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
        content = path.read_bytes() if plain else str(path.readlink()) if path.is_symlink() else stat.st_size
        found[str(path.relative_to(root))] = (stat.st_mode, content, 0 if path.is_dir() else stat.st_mtime_ns)
    return found


def check(command: Command, outcome: Outcome, before: dict[str, Any], root: Path, shared: Path) -> Iterator[str]:
    """What is wrong with a command's outcome."""
    after = tree(root)
    out = option(command, "-o")
    partial = f"{Path(out or 'nothing').name}.partial"
    if outcome.trace:
        yield f"{outcome.code}: {outcome.trace.strip().splitlines()[-1][:300]}"
        return
    answers = (0, 1) if command[0] == "doctor" else (0,)  # 1: it found a fault
    if outcome.code not in (*answers, 2):
        yield f"exit code {outcome.code}: {outcome.stderr[-300:]}"
    if "Traceback" in outcome.stderr:
        yield "a traceback on stderr"
    changed = [name for name, entry in before.items() if after.get(name) != entry and not name.startswith(partial)]
    if changed:
        yield f"changed or removed {changed[:3]}"
    resumable = False
    allowed = "" if out is None or "--dry-run" in command else Path(out).name
    if outcome.code in answers:
        yield from _check_answer(command, outcome, shared)
    else:
        yield from _check_message(outcome, root)
        code = error_code(outcome)
        resumable = code in KEEPING or (code in KEEPING_LAYERS and partial in outcome.stderr)
        allowed = partial if resumable else ""
    odd = [name for name in after.keys() - before.keys() if not allowed or name.partition("/")[0] != allowed]
    if odd:
        yield f"left {odd[:3]}"
    if out and not resumable and os.path.lexists(f"{out}.partial"):
        yield f"left {out}.partial"


def error_code(outcome: Outcome) -> str:
    """The code at the end of a verb's message, "" without one."""
    found = re.search(r" \[([a-z-]+)\]$", outcome.stderr.rstrip())
    return found[1] if found else ""


def _check_message(outcome: Outcome, root: Path) -> Iterator[str]:
    """Whether a verb refused with one readable message at the end of stderr, with a place and a code."""
    lines = [line for line in outcome.stderr.splitlines() if line.strip()]
    messages = [line for line in lines if line.startswith("snugfit: ")]
    if len(messages) != 1 or lines[-1] != messages[0]:
        yield f"{len(messages)} messages in {lines[-3:]!r:.600}"
        return
    message = messages[0].removeprefix("snugfit: ")
    if error_code(outcome) not in ERROR_CODES:
        yield f"no code in {message[-300:]}"
    if not message.isprintable() or len(message) > 5000:
        yield f"a message of {len(message)} characters: {ascii(message)[:200]}"
    if ": " not in message and str(root) not in message:
        yield f"no place in {message[:300]}"
    if outcome.stdout:
        yield f"an answer and an error: {outcome.stdout[:100]!r}"


def _check_answer(command: Command, outcome: Outcome, shared: Path) -> Iterator[str]:
    """Whether what a verb printed and wrote holds together."""
    if "--json" not in command:
        odd = [c for c in outcome.stdout if not c.isprintable() and c != "\n"]
        if odd:
            yield f"characters on stdout that are not printed: {odd[:5]!r}"
        return
    try:
        document = json.loads(outcome.stdout)
    except ValueError as error:
        yield f"no JSON on stdout: {error}"
        return
    if command[0] == "doctor" and (document["verdict"] == "sound") is not (outcome.code == 0):
        yield f"exit code {outcome.code} for {document['verdict']}"
    if command[0] != "quantize":
        return
    if document["bytes"] != sum(tensor["bytes"] for tensor in document["tensors"]):
        yield "the tensors' bytes are not those of the whole"
    if "--dry-run" in command:
        return
    from snugfit.storage.checkpoint import open_directory

    stored = open_directory(Path(option(command, "-o") or ""))
    if sum(tensor.bytes for tensor in stored.tensors.values()) != document["bytes"]:
        yield "other bytes were written than planned"
    whole = shared / "whole.json"
    if whole.exists() and document["files"] != json.loads(whole.read_text(encoding="utf-8"))["files"]:
        yield "a run that resumed wrote other files"


def option(command: Sequence[str], name: str) -> str | None:
    """The value of an option."""
    return command[command.index(name) + 1] if name in command else None


def import_libraries(folder: Path) -> None:
    """One dry run of an undamaged model: torch creates a cache of its own when it is imported for the first time."""
    outcome = run(["quantize", str(BASES["16-bit"].write(folder)), "-r", "fp8-block", "--dry-run"])
    assert outcome.code == 0, outcome.stderr


def prepare(target: str, shared: Path) -> None:
    """What heavy cases damage: models with weights, a tokenizer, a quantized copy, an unfinished run, statistics."""
    import torch

    from fuzz.prepare import prepare_imatrices, prepare_runs, prepare_statistics

    torch.set_num_threads(1)
    prepare_runs(shared, unfinished=target == "unfinished")
    if target == "statistics":
        prepare_statistics(shared)
    if target == "imatrix":
        prepare_imatrices(shared)


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
        import_libraries(place / "undamaged")
        if heavy:
            prepare(asked.target, shared)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MORE_ADDRESSES, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGPROF, interrupt)
        sys.addaudithook(WATCH)
        for number in range(asked.number, asked.number + asked.count):
            tell({"begin": number})
            root = place / f"case-{number}"
            for problem in run_case(asked.target, number, root, shared):
                tell(problem)
                if asked.keep:
                    sys.stderr.write(f"{problem['trace']}\n{problem['stderr']}\n")
            if asked.keep:
                shutil.copytree(root, Path.cwd() / root.name, symlinks=True, ignore=_no_pipes)
                sys.stderr.write(f"kept in {Path.cwd() / root.name}\n")
            shutil.rmtree(root)
    tell({"codes": CODES})


def tell(line: object) -> None:
    """A line of JSON for whoever started this process."""
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def _no_pipes(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if (Path(folder) / name).is_fifo()]


if __name__ == "__main__":
    main()
