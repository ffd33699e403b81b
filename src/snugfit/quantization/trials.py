"""Tries the ways to choose codes one after another, and keeps the one with the least KL on held-out samples.

Each way is a whole run into a folder of its own below the work folder, resumable like any other; then the quantized
model runs on the held-out samples, with its inputs rounded as the target engine rounds them. A later way takes the
place of an earlier one only if it is better beyond the error (records/trials.py); the loser's weights are deleted at
once, so that two results are on the disk at most. The winner's files are moved to where the result belongs. A way
behind the first that gives hidden states which are not finite has lost, too.

A way for which samples do no more than give ranges of inputs is measured with a few of them. It is made with all if it
is kept in the end, or if the next way is not much better.

What was measured stands in one file a way. Everything here follows from those files: a run that was killed anywhere
ends the same.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from snugfit import distributed
from snugfit.errors import UserError
from snugfit.evaluation.held_out import HeldOut, segments
from snugfit.evaluation.saturation import InputWatch, SeenInputs
from snugfit.machine import fix_cublas_workspace
from snugfit.quantization.learned import learn
from snugfit.quantization.prepare import PreparedRun
from snugfit.quantization.resume import open_finished, read_json, replace_json
from snugfit.quantization.run import LATE_ERRORS, Outcome, Run, norm_folds_of, run_layers
from snugfit.quantization.ways import Way
from snugfit.records.norm_folds import summary
from snugfit.records.saturation import InputSaturation
from snugfit.records.trials import Measured, Trial, judge
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


def run_trials(run: Run, write_config: Callable[[Path], None]) -> Tried:
    """Try all ways; the weight files of the best are in the run's directory then.

    `write_config` writes what is needed besides weights for a directory to be opened as a model.
    """
    prepared = run.prepared
    assert prepared.held_out is not None
    if any(way.learns for way in prepared.ways):
        fix_cublas_workspace()
    tokens, files = segments(prepared.held_out.samples, prepared.held_out.shares)
    trying = _Trying(run, write_config)
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
        if distributed.is_main():
            _forget_losers(run, tried.values(), champion)
    assert champion is not None
    inner = trying.whole(champion)
    content = distributed.from_main(read_json(_file(inner.directory)))
    outcome = Outcome(**content["outcome"])
    _move_files(inner, outcome, run.directory)
    saturation = tuple(InputSaturation(**site) for site in content["saturation"])
    return Tried(run=inner, outcome=outcome, trials=tuple(trials), saturation=saturation)


class _Trying:
    """Makes ways, and measures them on the held-out samples, which are opened when they are first asked for."""

    def __init__(self, run: Run, write_config: Callable[[Path], None]) -> None:
        self._run, self._write_config = run, write_config
        self._held_out: HeldOut | None = None

    def one(self, way: Way, champion: Way | None) -> Measured:
        """Quantize one way, and measure it; a way that learns starts from the files of the `champion`."""
        started = time.perf_counter()
        start = self.whole(champion) if way.learns and champion else None
        return self._measure(_run_of(self._run, way), start, started)

    def whole(self, way: Way) -> Run:
        """The run of a way with all samples; it is made now if the way was measured with a few."""
        return self._made(way)[0]

    def with_all(self, way: Way) -> Measured:
        """What is measured of a way with all samples."""
        return self._made(way)[1]

    def _made(self, way: Way) -> tuple[Run, Measured]:
        inner = _run_of(self._run, way, whole=True)
        known = distributed.from_main(_recalled(inner.directory))
        if known is None:
            self._run.progress.message(f"{way.name}, with all samples")
            known = self._measure(inner, None, time.perf_counter())
        return inner, known

    def _measure(self, inner: Run, start: Run | None, started: float) -> Measured:
        outcome = run_layers(inner) if start is None else learn(inner, start)
        if distributed.is_main():
            self._write_config(inner.directory)
        distributed.barrier()
        name = inner.prepared.way.name
        if folds := norm_folds_of(inner):
            inner.progress.message(f"{name}: {summary(folds)}")
        watch = InputWatch()
        self._held_out = self._held_out or _open_held_out(self._run.prepared)
        with inner.clock("trials"):
            kl = self._held_out.divergences(inner.directory, watch)
            distributed.barrier()  # nobody reads it any more
        measured = Measured(name, tuple(kl), time.perf_counter() - started)
        content = {
            "measured": asdict(measured),
            "outcome": asdict(outcome),
            "saturation": [asdict(site) for site in _beside_calibration(watch.result(), inner)],
        }
        if distributed.is_main():
            replace_json(_file(inner.directory), content)
        return measured


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


def _run_of(run: Run, way: Way, *, whole: bool = False) -> Run:
    """The run that takes one way, in its own folder; with a few samples where these are enough, unless `whole`."""
    prepared = run.prepared.taking(way)
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


def _move_files(run: Run, outcome: Outcome, directory: Path) -> None:
    """Move the weight files of a way to where the result belongs."""
    for name in outcome.files if distributed.is_main() else ():
        made = run.directory / name
        if made.exists():  # or it was moved before a kill
            made.replace(directory / name)


def _forget_losers(run: Run, tried: Iterable[Way], champion: Way) -> None:
    """Delete the weights of all ways but the `champion`, and all that were made with a few samples."""
    for way in tried:
        for folder in {_folder(run, way), _folder(run, way, whole=True)}:
            if way.name != champion.name or folder.name.endswith(FEW):
                _forget_weights(folder)


def _forget_weights(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink()
    shutil.rmtree(folder / WORK_NAME, ignore_errors=True)


def _line(trial: Trial) -> str:
    """One line for people."""
    if math.isnan(trial.kl):
        return f"{trial.name}: predictions on held-out samples are not finite: {'kept' if trial.kept else 'not kept'}"
    text = f"{trial.name}: KL {trial.kl:.4f} +- {trial.error:.4f} on held-out samples"
    if trial.gain is None or math.isnan(trial.gain):
        return text
    return f"{text}, {trial.gain:+.4f} +- {trial.gain_error:.4f} gained: {'kept' if trial.kept else 'not kept'}"
