"""When each part of a run began and ended: units, bytes of each file, its digest, what the disk took, and the end.

    python timeline.py MODEL WORK --recipe nvfp4-fp8-hybrid --effort fast [--rows rows.jsonl] [--rounds 2]

Prints a line for each part that took at least `--least` seconds, in the order in which they began, counted from the
call of `quantize`; then for each file when its first and its last byte were written, and when it was digested; last how
long the call went on after the last unit was worked on. Rounds after the first one have everything imported and
compiled. The model and its rows may be those that gpu_speed.py or disk_limit.py made.
"""

from __future__ import annotations

import argparse
import os
import shutil
import threading
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import snugfit.quantization.quantize as main_path
from snugfit.methods import kernels
from snugfit.quantization import loop
from snugfit.quantization.commits import Commits
from snugfit.quantization.resume import FinishedUnits
from snugfit.quantization.run import Made
from snugfit.quantization.unit_work import Work
from snugfit.storage import growing, shards, staging, transfer

Part = tuple[float, float, str, str]


class Timeline:
    """Notes of all threads, in seconds since the beginning."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.files: dict[str, list[float]] = {}
        self.begin = 0.0

    def now(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self.begin

    def watch(self, owner: Any, name: str, label: Callable[..., str] = lambda *_: "") -> None:
        """Note every call of a function or method."""
        real = getattr(owner, name)

        @wraps(real)
        def noted(*given: Any, **options: Any) -> Any:
            begin = self.now()
            try:
                return real(*given, **options)
            finally:
                thread = threading.current_thread().name.removeprefix("ThreadPoolExecutor-")
                self.parts.append((begin, self.now(), thread, f"{name} {label(*given)}"))

        setattr(owner, name, noted)

    def watch_files(self) -> None:
        """Note when the bytes of each file are written, and when it is digested."""
        growing_file: Any = growing.GrowingFile
        real, create = growing_file.note, growing_file.__init__

        def begin(file: Any, handle: int, *given: Any) -> None:
            create(file, handle, *given)
            line = self.files[file_name(handle)] = [0.0, 0.0, 0.0]
            if file.digest is not None:
                file.digest.add_done_callback(lambda _: line.__setitem__(2, self.now()))

        def note(file: Any, start: int, end: int) -> None:
            line = self.files[file_name(file.handle)]
            if start:  # the header is written when the file is made
                line[0], line[1] = line[0] or self.now(), self.now()
            real(file, start, end)

        growing_file.__init__, growing_file.note = begin, note


def main() -> None:
    """Quantize with everything watched, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--recipe", default="nvfp4-fp8-hybrid")
    parser.add_argument("--effort")
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--device")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--least", type=float, default=0.02, help="seconds")
    options = parser.parse_args()
    timeline = watched()
    for number in range(options.rounds):
        out = options.work / "timeline"
        shutil.rmtree(out, ignore_errors=True)
        os.sync()
        timeline.parts.clear()
        timeline.files.clear()
        timeline.begin = time.perf_counter()
        record = main_path.quantize(
            options.model,
            options.recipe,
            output_dir=out,
            dataset=[options.rows] if options.rows else (),
            num_samples=10_000,
            max_seq_length=1 << 20,
            effort=options.effort,
            device=options.device,
        )
        show(f"round {number}", timeline, dict(record.seconds), options.least)


def watched() -> Timeline:
    """A timeline that hears of all that takes time at the beginning and at the end of a run."""
    timeline = Timeline()
    for function in ("plan_quantization", "_expected", "_write_other_files", "_other_files", "check_files", "_record"):
        timeline.watch(main_path, function)
    timeline.watch(kernels, "warm_up")
    for function in ("_open_writer", "batches_of", "check_finished", "embed", "open_work"):
        timeline.watch(loop, function)
    timeline.watch(Work, "quantize", lambda _, number, *__: str(number))
    timeline.watch(Made, "outcome")
    timeline.watch(Commits, "wait")
    timeline.watch(FinishedUnits, "commit", lambda units, *_: str(units.done - 1))
    timeline.watch(shards.ShardWriter, "close")
    timeline.watch(transfer.Transfer, "close")
    timeline.watch(staging, "_finish")
    timeline.watch(staging, "_tidy")
    timeline.watch(os, "fdatasync", file_name)
    timeline.watch_files()
    return timeline


def file_name(handle: int) -> str:
    """The name of an open file."""
    return Path(f"/proc/self/fd/{handle}").readlink().name


def show(title: str, timeline: Timeline, stages: dict[str, float], least: float) -> None:
    """Print what a round took."""
    total = timeline.now()
    print(f"\n{title}: {total:.2f} s; " + ", ".join(f"{name} {seconds:.2f}" for name, seconds in stages.items()))
    for begin, end, thread, name in sorted(timeline.parts):
        if end - begin >= least or name.startswith("quantize"):
            print(f"{begin:7.3f} to {end:7.3f} ({end - begin:6.3f})  {thread:12} {name}")
    for name, (first, last, digested) in sorted(timeline.files.items()):
        print(f"{name}: written from {first:.3f} to {last:.3f}, digested at {digested:.3f}")
    worked = max(end for _, end, _, name in timeline.parts if name.startswith("quantize"))
    print(f"after the last unit: {total - worked:.3f} s")


if __name__ == "__main__":
    main()
