"""The cells of one server, or of two in turn, one after another; whatever ends the run, finished repeats are kept."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from snugfit.benchmarking.figures import Repeat, make_cell, ratios
from snugfit.benchmarking.plan import Setting
from snugfit.benchmarking.target import Target
from snugfit.progress import Progress
from snugfit.records.bench import BenchCell, BenchRatio

INTERRUPTED, OUT_OF_TIME = "interrupted", "`max_seconds` are over"
BUSY = 0.85  # share of the time in which this process computed, from which on it may be what limits the server


class _StoppedError(Exception):
    """The run cannot go on; the reason is its text."""


@dataclass
class Measured:
    """What was measured: cells of each target in order, ratios of two, why it stopped early (None: it did not)."""

    cells: list[list[BenchCell]]
    ratios: list[BenchRatio] = field(default_factory=list)
    stopped: str | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class _Open:
    """A cell that is being measured on one target."""

    hits_before: float | None
    repeats: list[Repeat] = field(default_factory=list)
    seconds: float = 0.0


def measure(
    targets: Sequence[Target],
    settings: Sequence[Setting],
    *,
    repeats: int,
    max_seconds: float | None,
    runner: asyncio.Runner,
    progress: Progress,
) -> Measured:
    """Measure every setting on each target: warm-up, then `repeats`, the targets in turn, in the other order each time.

    Ctrl-C, a server that is lost and `max_seconds` end it; what was measured until then is returned.
    """
    found = Measured([[] for _ in targets])
    clock = runner.get_loop().time
    end = None if max_seconds is None else clock() + max_seconds
    with progress.bar(len(settings) * (repeats + 1) * len(targets), "measuring") as advance:
        for setting in settings:
            opened: list[_Open] = []
            try:
                _measure_cell(targets, setting, opened, repeats, end, runner, advance, found.notes)
            except KeyboardInterrupt:
                found.stopped = INTERRUPTED
            except _StoppedError as error:
                found.stopped = str(error)
            _close_cell(targets, setting, opened, repeats, found, runner)
            if found.stopped is not None:
                break
    return found


def _measure_cell(
    targets: Sequence[Target],
    setting: Setting,
    opened: list[_Open],
    repeats: int,
    end: float | None,
    runner: asyncio.Runner,
    advance: Callable[[], None],
    notes: list[str],
) -> None:
    clock = runner.get_loop().time
    opened.extend(_Open(runner.run(target.hits())) for target in targets)
    for target in targets:
        runner.run(target.warm_up(setting))
        advance()
    for number in range(repeats):
        for place in range(len(targets)) if number % 2 == 0 else reversed(range(len(targets))):
            if end is not None and clock() >= end:
                raise _StoppedError(OUT_OF_TIME)
            computed, began = time.process_time(), time.perf_counter()
            repeat = runner.run(targets[place].repeat(setting))
            share = (time.process_time() - computed) / max(time.perf_counter() - began, 1e-9)
            opened[place].repeats.append(repeat)
            opened[place].seconds += repeat.seconds
            if setting.users > 1 and share > BUSY:
                users = f"with {setting.users} users"
                note = f"this process was busy {share:.0%} of the time {users}: the server may be faster"
                notes.extend([] if any(users in one for one in notes) else [note])
            advance()
            if any(timing.lost for timing in repeat.timings) and not runner.run(targets[place].alive()):
                raise _StoppedError(f"{targets[place].url} stopped answering")
        if all(len(one.repeats) > 1 and not any(repeat.answered for repeat in one.repeats) for one in opened):
            return  # nothing but errors: more of them say nothing new


def _close_cell(
    targets: Sequence[Target],
    setting: Setting,
    opened: Sequence[_Open],
    repeats: int,
    found: Measured,
    runner: asyncio.Runner,
) -> None:
    """Add what was measured of a cell; nothing where no repeat was finished."""
    cells = []
    for place, one in enumerate(opened):
        if not one.repeats:
            continue
        cell = make_cell(
            setting,
            one.repeats,
            wanted=repeats,
            hits=_hits(targets[place], one, runner, found),
            seconds=one.seconds,
        )
        found.cells[place].append(cell)
        cells.append(cell)
    if len(cells) == 2 and all(cell.status in ("measured", "partial") for cell in cells):
        found.ratios.extend(ratios(setting, opened[0].repeats, opened[1].repeats))


def _hits(target: Target, one: _Open, runner: asyncio.Runner, found: Measured) -> int | None:
    """Prompt tokens of this cell that came from a cache, by the server's counters or by its answers."""
    cached = [t.cached_tokens for repeat in one.repeats for t in repeat.timings if t.cached_tokens is not None]
    in_answers = sum(cached) if cached else None
    if one.hits_before is None or found.stopped is not None:
        return in_answers
    try:
        after = runner.run(target.hits())
    except KeyboardInterrupt:
        found.stopped = INTERRUPTED
        return in_answers
    if after is None:
        return in_answers
    return max(int(after - one.hits_before), in_answers or 0)
