"""Tries the ways to choose codes one after another, and keeps the one with the least KL on held-out samples.

Each way is a whole run into a folder of its own below the work folder, resumable like any other; then the quantized
model runs on the held-out samples, with its inputs rounded as the target engine rounds them. A later way takes the
place of an earlier one only if it is better beyond the error (records/trials.py). The next way takes the loser's files
and writes only what differs, so that two results are on the disk at most. The winner's files are moved to where the
result belongs. A way behind the first that gives hidden states which are not finite has lost, too.

Nothing waits for the files of a way that may lose: they are flushed, digested and closed in the background.
Before the winner's files are moved the disk has them.

A way for which samples do no more than give ranges of inputs is measured with a few of them. It is made with all if it
is kept in the end, or if the next way is not much better: in the same files, where its codes are already. What is the
source's is left out of them, and read of the source, until the way is kept in the end.

What was measured stands in one file a way. Everything here follows from those files: a run that was killed anywhere
ends the same.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import wait
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from snugfit import distributed
from snugfit.errors import UserError
from snugfit.evaluation.held_out import HeldOut, segments
from snugfit.evaluation.saturation import InputWatch, SeenInputs
from snugfit.machine import fix_cublas_workspace
from snugfit.quantization.learned import learn
from snugfit.quantization.loop import LATE_ERRORS, make_layers
from snugfit.quantization.plan import Plan
from snugfit.quantization.prepared_run import PreparedRun
from snugfit.quantization.resume import omitted, open_finished, read_json, replace_json
from snugfit.quantization.run import Made, Outcome, Run, norm_folds_of
from snugfit.quantization.ways import Way
from snugfit.records.norm_folds import summary
from snugfit.records.saturation import InputSaturation
from snugfit.records.trials import Measured, Trial, judge
from snugfit.storage.background import Background, remove_files
from snugfit.storage.staging import WORK_NAME

TRIALS_NAME = "trials"
CLOSE = 0.1  # of the KL of a way that a few samples measured: a smaller gain on it is measured again with all
FEW = "-few"  # what the folder of a way that is made with a few samples ends with


@dataclass(frozen=True, kw_only=True)
class Tried:
    """The run that made the files that were kept, its outcome, the trials, and what the files' input scales cut off."""

    run: Run
    outcome: Outcome
    trials: tuple[Trial, ...]
    saturation: tuple[InputSaturation, ...]


def run_trials(run: Run, write_config: Callable[[Path], None], background: Background) -> Tried:
    """Try all ways; the weight files of the best are in the run's directory then.

    `write_config` writes what is needed besides weights for a directory to be opened as a model. Files of the others
    may still be removed in the `background`.
    """
    prepared = run.prepared
    assert prepared.held_out is not None
    if any(way.learns for way in prepared.ways):
        fix_cublas_workspace()
    tokens, files = segments(prepared.held_out.samples, prepared.held_out.shares)
    trying = _Trying(run, write_config, background)
    found: list[Measured] = []
    trials: list[Trial] = []
    champion: Way | None = None
    tried: dict[str, Way] = {}
    for listed in prepared.ways:
        if any(trial.kept and trial.name in listed.unless for trial in trials):
            continue
        way = listed if champion is None else listed.on(champion)
        tried[way.name] = way
        known = distributed.from_main(_recalled(_folder(run, way)))
        if known is None:
            run.progress.message(f"trying {way.name}")
            try:
                known = trying.one(way, champion)
            except UserError as error:
                if champion is None or error.code not in LATE_ERRORS:
                    raise
                run.progress.message(f"{way.name}: {error.what}")
                known = _failed(run, way, len(tokens))
        found.append(known)
        trials = judge(found, tokens, files)
        if champion is not None and _is_close(run, champion, trials):
            found[[one.name for one in found].index(champion.name)] = trying.with_all(champion)
            trials = judge(found, tokens, files)
        run.progress.message(_line(trials[-1]))
        winner = [trial.name for trial in trials if trial.kept][-1]
        champion = tried[winner]
        trying.forget(tried.values(), champion)
    assert champion is not None
    inner = trying.whole(champion)
    trying.remove_spares()
    outcome = trying.outcome(inner)
    content = distributed.from_main(read_json(_file(inner.directory)))
    _move_files(inner, outcome, run.directory)
    saturation = tuple(InputSaturation(**site) for site in content["saturation"])
    return Tried(run=inner, outcome=outcome, trials=tuple(trials), saturation=saturation)


class _Trying:
    """Makes ways, and measures them on the held-out samples, which are opened when they are first asked for.

    `_made` are the ways whose files are digested, flushed and closed in the background, by their folder. `_spares` are
    folders of ways that were not kept, whose files the next way takes.
    """

    def __init__(self, run: Run, write_config: Callable[[Path], None], background: Background) -> None:
        self._run, self._write_config, self._background = run, write_config, background
        self._held_out: HeldOut | None = None
        self._made: dict[Path, Made] = {}
        self._spares: list[Path] = []

    def one(self, way: Way, champion: Way | None) -> Measured:
        """Quantize one way, and measure it; a way that learns starts from the files of the `champion`."""
        started = time.perf_counter()
        start = self.whole(champion) if way.learns and champion else None
        return self._measure(_run_of(self._run, way), start, started)

    def whole(self, way: Way) -> Run:
        """The run of a way with all samples and whole files; they are made now if the way was measured without."""
        inner, _ = self._with_all(way, lasts=True)
        made, content = self._made.get(inner.directory), distributed.from_main(read_json(_file(inner.directory)))
        if omitted(inner.finished) and (made is None or not made.lasts) and _outcome_of(content) is None:
            self._made[inner.directory] = make_layers(inner, self._background)
        return inner

    def with_all(self, way: Way) -> Measured:
        """What is measured of a way with all samples."""
        return self._with_all(way, lasts=False)[1]

    def outcome(self, inner: Run) -> Outcome:
        """What a way that was measured has made, its files on the disk; noted in its file before they are moved."""
        content = distributed.from_main(read_json(_file(inner.directory)))
        if (known := _outcome_of(content)) is not None:
            return known
        made = self._made.get(inner.directory)
        if made is None:  # of a run that was stopped: what it wrote is read again
            made = make_layers(inner, self._background)
        with inner.clock("finish"):
            outcome = made.outcome()
        if distributed.is_main():
            replace_json(_file(inner.directory), content | {"outcome": asdict(outcome)})
        return outcome

    def forget(self, tried: Iterable[Way], champion: Way) -> None:
        """Nobody needs the weights of other ways than the champion any more: the next way may take the files."""
        others = [way for way in tried if way.name != champion.name]
        folders = {_folder(self._run, way, whole=whole): None for way in others for whole in (False, True)}
        self._spares = list(folders)
        for folder in folders:
            if (made := self._made.pop(folder, None)) is not None:
                made.files.forget()

    def remove_spares(self) -> None:
        """Delete the weights that no way has taken."""
        for folder in self._spares if distributed.is_main() else ():
            _forget_weights(folder, self._run.prepared.plan, self._background)
        self._spares = []

    def _take_files(self, inner: Run) -> None:
        """Give a run the files of a way that was not kept, of which it writes only what differs.

        A run with all samples takes those of its way with a few, whose codes are the same, unless another way's have
        more that is the same: the source's tensors.
        """
        few = _folder(self._run, inner.prepared.way)
        if few != inner.directory:
            first = not inner.prepared.lasts or 2 * inner.prepared.plan.copied_bytes <= inner.prepared.plan.bytes
            self._spares.insert(0 if first else len(self._spares), few)
            if (made := self._made.pop(few, None)) is not None:
                made.files.forget()
        for shard in inner.prepared.plan.shards if distributed.is_main() else ():
            target = inner.directory / shard.name
            for folder in self._spares:
                if (file := folder / shard.name).exists() and not target.exists():
                    file.rename(target)
        self.remove_spares()

    def _with_all(self, way: Way, *, lasts: bool) -> tuple[Run, Measured]:
        inner = _run_of(self._run, way, whole=True, lasts=lasts)
        known = distributed.from_main(_recalled(inner.directory))
        if known is None:
            self._run.progress.message(f"{way.name}, with all samples")
            known = self._measure(inner, None, time.perf_counter())
        return inner, known

    def _measure(self, inner: Run, start: Run | None, started: float) -> Measured:
        outcome = None
        self._take_files(inner)
        if start is None:
            self._made[inner.directory] = make_layers(inner, self._background, partial(self._open, inner.directory))
        else:
            outcome = learn(inner, start)
            self._open(inner.directory)
        name = inner.prepared.way.name
        if folds := norm_folds_of(inner):
            inner.progress.message(f"{name}: {summary(folds)}")
        watch = InputWatch()
        with inner.clock("trials"):
            assert self._held_out is not None
            distributed.barrier()  # the files of all processes are whole
            same = () if inner.prepared.lasts else omitted(inner.finished)
            kl = self._held_out.divergences(inner.directory, watch, same=same)
            distributed.barrier()  # nobody reads it any more
        measured = Measured(name, tuple(kl), time.perf_counter() - started)
        content = {
            "measured": asdict(measured),
            "outcome": None if outcome is None else asdict(outcome),
            "saturation": [asdict(site) for site in _beside_calibration(watch.result(), inner)],
        }
        if distributed.is_main():
            replace_json(_file(inner.directory), content)
        return measured

    def _open(self, folder: Path) -> None:
        """Open what measures ways, and a way's folder, for which it writes what it needs besides weights."""
        with self._run.clock("trials"):
            if distributed.is_main():
                self._write_config(folder)
            self._held_out = self._held_out or _open_held_out(self._run.prepared)
            distributed.barrier()
            self._held_out.open(folder)


def _is_close(run: Run, champion: Way, trials: Sequence[Trial]) -> bool:
    """Whether the last way took the place of one that a few samples measured, and gained little."""
    before, last = next(trial for trial in trials if trial.name == champion.name), trials[-1]
    small = last.kept and last.gain is not None and last.gain < CLOSE * before.kl
    return small and run.prepared.taking(champion).few_are_enough


def _open_held_out(prepared: PreparedRun) -> HeldOut:
    assert prepared.held_out is not None
    return HeldOut(
        prepared.plan.checkpoint.path,
        prepared.held_out.samples,
        prepared.device,
        profile=prepared.target,
        tokens_per_batch=prepared.tokens_per_batch,
        experts_per_group=prepared.experts_per_group,
        same_head=all(map(prepared.plan.is_copied, prepared.plan.units[0])),
    )


def _beside_calibration(found: Sequence[SeenInputs], run: Run) -> list[InputSaturation]:
    """What came to each static input scale, beside the largest input that the scale was made of."""
    made_of = {one["name"]: one["input_amax"] for entry in run.finished.entries for one in entry["tensors"]}
    sites = []
    for seen in found:
        calibrated: float | None = made_of.get(seen.weight)
        sites.append(
            InputSaturation(
                module=seen.module,
                tokens=seen.tokens,
                saturated_tokens=seen.saturated_tokens,
                saturated_values=seen.saturated_values,
                amax=seen.amax,
                ratio=seen.amax / (calibrated or seen.range),
                range=seen.range,
                calibrated_amax=calibrated,
            )
        )
    return sites


def _failed(run: Run, way: Way, count: int) -> Measured:
    """Note that a way gave nothing that could be measured on the `count` segments."""
    measured = Measured(way.name, (math.nan,) * count, 0.0)
    if distributed.is_main():
        replace_json(_file(_folder(run, way)), {"measured": asdict(measured), "saturation": []})
    return measured


def _run_of(run: Run, way: Way, *, whole: bool = False, lasts: bool = True) -> Run:
    """The run that takes one way, in its own folder; with a few samples where these are enough, unless `whole`.

    Its files last if `lasts`, unless it has a few samples.
    """
    prepared = replace(run.prepared.taking(way), lasts=lasts)
    if _has_few(run, way, whole=whole):
        prepared = prepared.on_few()
    directory = _folder(run, way, whole=whole)
    work = directory / WORK_NAME
    if distributed.is_main():
        work.mkdir(parents=True, exist_ok=True)
    finished = open_finished(work, prepared.identity(), force=True)  # the whole run's identity was checked
    return Run(
        prepared=prepared, directory=directory, work=work, finished=finished, clock=run.clock, progress=run.progress
    )


def _folder(run: Run, way: Way, *, whole: bool = False) -> Path:
    return run.work / TRIALS_NAME / (f"{way.name}{FEW}" if _has_few(run, way, whole=whole) else way.name)


def _has_few(run: Run, way: Way, *, whole: bool) -> bool:
    return not whole and run.prepared.taking(way).few_are_enough


def _file(folder: Path) -> Path:
    """Where it stands what was measured of the way in this folder."""
    return folder.with_name(f"{folder.name}.json")


def _recalled(folder: Path) -> Measured | None:
    """What was measured of a way before this run was stopped; None if it was not, or if the file is damaged."""
    content = read_json(_file(folder))
    try:
        one, _ = content["measured"], [InputSaturation(**site) for site in content["saturation"]]
        return Measured(str(one["name"]), tuple(map(float, one["kl"])), float(one["seconds"]))
    except (KeyError, TypeError, ValueError):
        return None


def _outcome_of(content: Mapping[str, Any]) -> Outcome | None:
    """What the file of a way says of its files; None if it says nothing, or is damaged."""
    try:
        known = content["outcome"]
        files = {str(name): str(digest) for name, digest in known["files"].items()}
        return Outcome(files=files, resumed=int(known["resumed"]), expected_seconds=known["expected_seconds"])
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def _move_files(run: Run, outcome: Outcome, directory: Path) -> None:
    """Move the weight files of a way to where the result belongs."""
    for name in outcome.files if distributed.is_main() else ():
        made = run.directory / name
        if made.exists():  # or it was moved before a kill
            made.replace(directory / name)


def _forget_weights(folder: Path, plan: Plan, background: Background) -> None:
    """Remove a way's weights in the background, at once where the disk may not have the space for the next way's."""
    removed = remove_files(folder, "*.safetensors", background)
    if removed and shutil.disk_usage(folder).free < sum(shard.bytes for shard in plan.shards):
        wait(removed)
    shutil.rmtree(folder / WORK_NAME, ignore_errors=True)


def _line(trial: Trial) -> str:
    """One line for people."""
    if math.isnan(trial.kl):
        return f"{trial.name}: predictions on held-out samples are not finite: {'kept' if trial.kept else 'not kept'}"
    text = f"{trial.name}: KL {trial.kl:.4f} +- {trial.error:.4f} on held-out samples"
    if trial.gain is None or math.isnan(trial.gain):
        return text
    return f"{text}, {trial.gain:+.4f} +- {trial.gain_error:.4f} gained: {'kept' if trial.kept else 'not kept'}"
