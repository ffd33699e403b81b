"""Ways to quantize are tried on held-out samples: what is written, what is refused, and that kills change nothing."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import snugfit.quantization.prepare
import snugfit.quantization.prepared_run
from conftest import MakeTiny
from helpers.errors import failed_with, raises
from helpers.killed import KILLED, boundaries_of, contents, in_child, kill_at
from helpers.tiny_families import all_tensors, random_rows, write_rows
from helpers.tiny_mixtures import make_mixture
from helpers.tiny_tokenizer import add_tokenizer
from snugfit.cli.app import app
from snugfit.data.dataset import hold_out, load_dataset
from snugfit.engines.mixtures import NVFP4_EXPERTS_IN_TRANSFORMERS, SPLIT_EXPERTS_IN_TRANSFORMERS
from snugfit.evaluation.evaluate import evaluate
from snugfit.evaluation.held_out import SEGMENT_TOKENS, HeldOut, segments
from snugfit.machine import Clock
from snugfit.methods.calibrated import Calibrated
from snugfit.methods.method import Choice, Purpose, WeightGroup
from snugfit.methods.round_to_nearest import RoundToNearest
from snugfit.model.layout import read_layout
from snugfit.progress import SILENT, Progress
from snugfit.quantization.collect import collect_statistics
from snugfit.quantization.loop import run_layers
from snugfit.quantization.options import Calibration
from snugfit.quantization.plan import lay_out
from snugfit.quantization.prepare import prepare
from snugfit.quantization.quantize import plan_quantization, quantize
from snugfit.quantization.resume import FinishedUnits
from snugfit.quantization.run import Run
from snugfit.quantization.ways import FEWEST_SAMPLES, HELD_OUT_EVERY, PLAIN, Way
from snugfit.recipes.recipe import load_recipe
from snugfit.records.quantize import QuantizeRecord
from snugfit.records.statistics_file import STATISTICS_FILE, ExpertCalibration
from snugfit.storage.staging import resumable

CPU = torch.device("cpu")
SHARD = 30_000
OPTIONS: dict[str, Any] = {"device": "cpu", "tokens_per_batch": 512, "max_shard_size": SHARD}


@pytest.fixture(scope="module")
def model(make_tiny: MakeTiny) -> Path:
    """A tiny llama."""
    return make_tiny("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def small(make_tiny: MakeTiny) -> Path:
    """One layer, for runs that are killed many times: tests/quantization/test_gate.py has kills inside methods."""
    return make_tiny("llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two files of samples, of which two samples of 400 and 260 tokens will be held out."""
    folder = tmp_path_factory.mktemp("texts")
    first = write_rows(folder / "a.jsonl", random_rows((400,) * 6, stop=60))
    return [first, write_rows(folder / "b.jsonl", random_rows((260,) * 4, seed=2, stop=60))]


class Bad(RoundToNearest):
    """Round-to-nearest of weights that are turned around: a method that is bad on purpose."""

    def choose(self, groups: Iterable[WeightGroup], purpose: Purpose) -> Iterator[Choice]:
        """The choices for other weights."""
        for group in groups:
            if group.target is not None:
                for name in group.weights:
                    group.weights[name] = group.weights[name].flip(0)
            yield from super().choose([group], purpose)


class Infinite(RoundToNearest):
    """Round-to-nearest with norms that overflow."""

    def choose(self, groups: Iterable[WeightGroup], purpose: Purpose) -> Iterator[Choice]:
        """The choices, with kept tensors of the second layer infinite."""
        for choice in super().choose(groups, purpose):
            weight = choice.weight_16bit
            if choice.codes is None and weight is not None and "layers.1." in choice.name:
                yield replace(choice, weight_16bit=torch.full_like(weight, math.inf), changed=True)
            else:
                yield choice


GPTQ = Way("gptq", Calibrated("vllm-blackwell", gptq=True))
WEIGHTED = Way("weighted", Calibrated("vllm-blackwell"))
BAD = Way("bad", Bad())


def try_ways(monkeypatch: pytest.MonkeyPatch, *ways: Way) -> None:
    """Let runs of effort good try these ways."""
    monkeypatch.setattr(snugfit.quantization.prepare, "ways_of", lambda *_args, **_options: ways)


def run(model: Path, out: Path, texts: list[Path], recipe: str = "nvfp4", **options: Any) -> QuantizeRecord:
    """A run of effort good."""
    return quantize(model, recipe, output_dir=out, dataset=texts, **OPTIONS | {"effort": "good"} | options)


def weights_of(folder: Path) -> dict[str, bytes]:
    """The weight files of a folder."""
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def alone(model: Path, out: Path, texts: list[Path], way: Way, recipe: str = "nvfp4") -> dict[str, bytes]:
    """The weight files of a run that takes this way alone, on the samples that a run of effort good works with."""
    used, _ = hold_out(load_dataset(model, texts), HELD_OUT_EVERY)
    rows = write_rows(out.with_suffix(".jsonl"), used.samples)
    calibration = Calibration(
        dataset=[rows],
        num_samples=32,
        max_seq_length=1024,
        device="cpu",
        tokens_per_batch=OPTIONS["tokens_per_batch"],
        experts=ExpertCalibration(),
    )
    plan = lay_out(read_layout(model), load_recipe(recipe), max_shard_size=SHARD)
    prepared = prepare(plan, calibration, way.method)
    with resumable(out) as (directory, work):
        finished = FinishedUnits(work, prepared.identity())
        settings: dict[str, Any] = {"clock": Clock(), "progress": SILENT}
        run_layers(Run(prepared=prepared, directory=directory, work=work, finished=finished, **settings))
    return weights_of(out)


@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4a16"])
def test_the_winner_is_written(recipe: str, model: Path, texts: list[Path], tmp_path: Path) -> None:
    """The files are, byte for byte, those of a run that takes the winning way alone on the same samples."""
    prepared = plan_quantization(model, recipe, dataset=texts, effort="good", **OPTIONS)
    record = run(model, tmp_path / "out", texts, recipe)
    assert [way.name for way in prepared.ways] == ["plain", "gptq+folds", "gptq", "weighted"]
    assert [trial.name for trial in record.trials] == ["plain", "gptq+folds"]  # which was kept
    winner = [trial.name for trial in record.trials if trial.kept][-1]
    assert winner.startswith("gptq")
    (way,) = (way for way in prepared.ways if way.name == winner)
    assert weights_of(tmp_path / "out") == alone(model, tmp_path / "alone", texts, way, recipe)
    assert isinstance(way.method, Calibrated)
    rules = {tensor.scale_rule for tensor in record.tensors if tensor.format == recipe}
    assert rules == {way.method.scale_rule}
    assert record.held_out is not None
    assert record.dataset is not None
    assert (record.held_out["samples"], record.dataset["samples"]) == (2, 8)
    assert record.arguments["effort"] == "good"
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []
    assert not any(path.name.startswith(".") for path in (tmp_path / "out").iterdir())


def test_a_bad_method_is_not_kept(
    model: Path, texts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A way that is bad on purpose loses wherever it stands; if all do, the file is the plain one."""
    plain = alone(model, tmp_path / "plain", texts, PLAIN)
    try_ways(monkeypatch, PLAIN, BAD, Way("bad too", Bad()))
    record = run(model, tmp_path / "out", texts)
    assert [trial.kept for trial in record.trials] == [True, False, False]
    assert all(trial.gain is not None and trial.gain < 0 for trial in record.trials[1:])
    assert weights_of(tmp_path / "out") == plain
    try_ways(monkeypatch, PLAIN, BAD, GPTQ)
    record = run(model, tmp_path / "again", texts)
    assert [trial.kept for trial in record.trials] == [True, False, True]
    assert weights_of(tmp_path / "again") == alone(model, tmp_path / "gptq", texts, GPTQ)


def test_a_way_that_overflows_has_lost(
    model: Path, texts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states that are not finite lose the trial, not the run; of the first way they stop it."""
    try_ways(monkeypatch, PLAIN, Way("infinite", Infinite()), GPTQ)
    record = run(model, tmp_path / "out", texts)
    assert [trial.kept for trial in record.trials] == [True, False, True]
    assert math.isnan(record.trials[1].kl)
    assert weights_of(tmp_path / "out") == alone(model, tmp_path / "gptq", texts, GPTQ)
    try_ways(monkeypatch, Way("infinite", Infinite()), PLAIN)
    with raises("activations-not-finite", "layers.1"):
        run(model, tmp_path / "first", texts)


class Spy(Progress):
    """Counts the folders below a run's directory that hold weights, at every message and every layer."""

    def __init__(self, out: Path) -> None:
        self.partial = out.with_name(out.name + ".partial")
        self.most = 0
        self.lines: list[str] = []

    def look(self) -> None:
        """Count."""
        self.most = max(self.most, len({file.parent for file in self.partial.rglob("*.safetensors")}))

    def message(self, text: str) -> None:
        """Count, and keep the line."""
        self.lines.append(text)
        self.look()

    def bar(self, total: int, description: str) -> Any:
        """Count at each step."""
        from contextlib import nullcontext

        del total, description
        return nullcontext(self.look)


def test_two_results_are_on_the_disk_at_most(model: Path, texts: list[Path], tmp_path: Path) -> None:
    """The best so far and the one that is tried; the estimate has both. The same seed gives the same bytes again."""
    spy = Spy(tmp_path / "out")
    run(model, tmp_path / "out", texts, progress=spy)
    assert spy.most == 2
    assert sum(line.startswith("trying ") for line in spy.lines) == 2  # GPTQ with folds is kept
    assert any("held-out" in line and "gptq+folds" in line for line in spy.lines)
    good, fast = (
        plan_quantization(model, "nvfp4", dataset=texts, effort=effort, **OPTIONS) for effort in ("good", "fast")
    )
    assert good.dataset is not None
    assert fast.dataset is not None
    states = 2 * 64 * 2  # two files of hidden states, 64 values of 2 bytes a token
    one = fast.estimate.disk - states * fast.dataset.tokens
    assert one >= fast.bytes
    assert good.estimate.disk - states * good.dataset.tokens == 2 * one
    run(model, tmp_path / "again", texts)
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_divergences_are_those_of_evaluate(model: Path, tmp_path: Path) -> None:
    """The mean over all segments is the KL that `evaluate` gives for the same rows under the same profile."""
    rows = random_rows((300, 300, 300), seed=5, stop=60)
    quantize(
        model, "nvfp4", output_dir=tmp_path / "out", dataset=[write_rows(tmp_path / "r.jsonl", rows)],
        effort="fast", **OPTIONS,
    )  # fmt: skip
    held_out = HeldOut(model, rows, CPU, profile="vllm-blackwell", tokens_per_batch=512)
    found = held_out.divergences(tmp_path / "out")
    tokens, files = segments(rows, (1, 2))
    assert tokens == [SEGMENT_TOKENS, SEGMENT_TOKENS, 299 - 2 * SEGMENT_TOKENS] * 3
    assert files == [0] * 3 + [1] * 6
    assert len(found) == len(tokens)
    mean = sum(kl * count for kl, count in zip(found, tokens, strict=True)) / sum(tokens)
    record = evaluate(
        tmp_path / "out",
        reference=model,
        dataset=[tmp_path / "r.jsonl"],
        contexts=[300],
        noise_floor="none",
        continuations=0,
        device="cpu",
        tokens_per_batch=512,
    )
    measured = record.contexts[0].models[-1].kl
    assert measured is not None
    assert mean == pytest.approx(measured.mean, rel=1e-5)
    assert held_out.divergences(model) == [0.0] * len(tokens)
    assert held_out.divergences(tmp_path / "out") == found
    again = HeldOut(model, rows, CPU, profile="vllm-blackwell", tokens_per_batch=512, same_head=True)
    assert again.divergences(tmp_path / "out") == found


def test_killed_at_any_boundary(
    small: Path, texts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between units, between trials and between moves of files, the same call ends in the same bytes."""
    try_ways(monkeypatch, PLAIN, GPTQ, BAD)
    run(small, tmp_path / "whole", texts)
    whole = contents(tmp_path / "whole")
    out, boundary, resumed = tmp_path / "out", 5, 0
    while True:

        def work(at: int = boundary) -> None:
            kill_at(at)
            run(small, out, texts)

        code = in_child(work)
        if code == KILLED and not out.exists():
            resumed += 1
            run(small, out, texts)
        elif code == KILLED:
            with raises("output-exists", out):  # only cleaning up was left
                run(small, out, texts)
        assert contents(out) == whole, boundary
        shutil.rmtree(out)
        if code != KILLED:
            break
        boundary += 67
    assert code == 0
    assert resumed > 3


def test_killed_again_and_again(
    small: Path, texts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed every few changes of the disk still ends, in the same bytes."""
    try_ways(monkeypatch, PLAIN, GPTQ, BAD)
    run(small, tmp_path / "whole", texts)
    out, step, tries = tmp_path / "out", 40, 0

    def work() -> None:
        kill_at(step)
        run(small, out, texts)

    while (code := in_child(work)) == KILLED and not out.exists():
        tries += 1
        step += 4  # each start has changes of its own
        assert tries < 30
    if code == KILLED:
        with raises("output-exists", out):  # only cleaning up was left
            run(small, out, texts)
    else:
        assert code == 0
    assert tries > 2
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("number", [1, 2])
def test_killed_while_the_winner_moves(
    number: int, model: Path, texts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between two of the winner's files leaves nothing lost: nothing is tried again, the bytes are the same."""
    try_ways(monkeypatch, PLAIN, GPTQ)
    run(model, tmp_path / "whole", texts)
    out = tmp_path / "out"

    def work() -> None:
        moved, real = 0, Path.replace

        def replace_file(self: Path, target: Any) -> Path:
            nonlocal moved
            if self.suffix == ".safetensors":
                moved += 1
                if moved == number:
                    import os

                    os._exit(KILLED)
            return real(self, target)

        Path.replace = replace_file  # type: ignore[method-assign,assignment]
        run(model, out, texts)

    assert in_child(work) == KILLED
    assert not out.exists()
    spy = Spy(out)
    run(model, out, texts, progress=spy)
    assert not any(line.startswith("trying") for line in spy.lines)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_power_cut_behind_the_verdict(
    small: Path, texts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing waits for the disk before a way is kept: what it has lost of the winner then is made again."""
    try_ways(monkeypatch, PLAIN, GPTQ)
    run(small, tmp_path / "whole", texts)
    out = tmp_path / "out"

    class Stops(Spy):
        """Ends the process when the verdict on the last way is known."""

        def message(self, text: str) -> None:
            """Look, or end."""
            if text.startswith("gptq: KL"):
                os._exit(KILLED)

    def work() -> None:
        run(small, out, texts, progress=Stops(out))

    assert in_child(work) == KILLED
    file = next(out.with_name("out.partial").rglob("gptq/*.safetensors"))
    with file.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last[0] ^ 1]))
    spy = Spy(out)
    run(small, out, texts, progress=spy)
    assert not any(line.startswith("trying") for line in spy.lines)
    assert contents(out) == contents(tmp_path / "whole")


def test_few_samples_measure_what_needs_no_more(
    model: Path, texts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain codes are tried with a few samples; a file that keeps them is made with all, also behind a kill."""
    monkeypatch.setattr(snugfit.quantization.prepared_run, "SOME_TOKENS", 800)
    out, said = tmp_path / "out", "plain, with all samples"
    try_ways(monkeypatch, PLAIN, GPTQ)
    spy = Spy(tmp_path / "gptq")
    record = run(model, tmp_path / "gptq", texts, progress=spy)
    assert [trial.kept for trial in record.trials] == [True, True]
    assert said not in spy.lines
    assert spy.most <= 2  # codes that a few samples measured are there until another way is kept
    assert weights_of(tmp_path / "gptq") == alone(model, tmp_path / "alone", texts, GPTQ)
    try_ways(monkeypatch, PLAIN, BAD)

    class Stops(Spy):
        """Ends the process when plain codes are made again."""

        def message(self, text: str) -> None:
            """Look, or end."""
            if text == said:
                os._exit(KILLED)
            super().message(text)

    def work() -> None:
        run(model, out, texts, progress=Stops(out))

    assert in_child(work) == KILLED
    spy = Spy(out)
    record = run(model, out, texts, progress=spy)
    assert [trial.kept for trial in record.trials] == [True, False]
    assert said in spy.lines
    assert not any(line.startswith("trying") for line in spy.lines)
    assert weights_of(out) == alone(model, tmp_path / "plain", texts, PLAIN)
    assert {tensor.input_amax for tensor in record.tensors if tensor.format == "nvfp4"} != {None}
    assert record.input_saturation


def test_a_small_gain_on_few_samples_is_measured_again(
    model: Path, texts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A way that gains little on one which a few samples measured has to gain on it with all samples, too."""
    try_ways(monkeypatch, PLAIN, GPTQ)
    exact = run(model, tmp_path / "exact", texts).trials
    monkeypatch.setattr(snugfit.quantization.prepared_run, "SOME_TOKENS", 800)
    few = run(model, tmp_path / "few", texts).trials
    assert few[0].kl != exact[0].kl
    monkeypatch.setattr(snugfit.quantization.trials, "CLOSE", 10.0)
    spy = Spy(tmp_path / "again")
    again = run(model, tmp_path / "again", texts, progress=spy).trials
    assert "plain, with all samples" in spy.lines
    assert [replace(trial, seconds=0.0) for trial in again] == [replace(trial, seconds=0.0) for trial in exact]
    assert weights_of(tmp_path / "again") == weights_of(tmp_path / "exact")


def forced(monkeypatch: pytest.MonkeyPatch, **kl: float) -> None:
    """Give ways, and with `_few` ways as a few samples measure them, this KL, whatever they are."""

    def divergences(self: HeldOut, candidate: Path, *_: object, **_options: object) -> list[float]:
        self.open(candidate)
        name = candidate.name.replace("-", "_")
        return [kl.get(name, kl.get(name.removesuffix("_few"), 0.0))] * len(segments(self._samples, ())[0])

    monkeypatch.setattr(HeldOut, "divergences", divergences)


def sizes(model: Path, folder: Path) -> tuple[int, int, int]:
    """Bytes of a result's tensors that are the source's, of the others, and of its headers."""
    source, made = all_tensors(model), all_tensors(folder)
    kept = sum(tensor.nbytes for name, tensor in made.items() if name in source and torch.equal(tensor, source[name]))
    every = sum(tensor.nbytes for tensor in made.values())
    return kept, every - kept, sum(file.stat().st_size for file in folder.glob("*.safetensors")) - every


@pytest.mark.parametrize(
    ("ways", "kl", "codes", "kept"),
    [
        ((PLAIN, GPTQ), {"plain_few": 1.0, "gptq": 0.95, "plain": 1.0}, 2, 1),  # which is close
        ((PLAIN, GPTQ), {"plain_few": 1.0, "gptq": 0.95, "plain": 0.5}, 2, 2),
        ((PLAIN, GPTQ, WEIGHTED), {"plain_few": 1.0, "gptq": 2.0, "weighted": 2.0}, 3, 2),
        ((PLAIN, GPTQ, WEIGHTED), {"plain_few": 1.0, "gptq": 0.5, "weighted": 2.0}, 3, 2),
        ((PLAIN, GPTQ, WEIGHTED), {"plain_few": 1.0, "gptq": 0.5, "weighted": 0.2}, 3, 2),
    ],
)
def test_what_is_the_same_is_written_once(
    ways: tuple[Way, ...],
    kl: dict[str, float],
    codes: int,
    kept: int,
    model: Path,
    texts: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Codes are written once a way, however it is measured; tensors of the source twice at most, for three files."""
    monkeypatch.setattr(snugfit.quantization.prepared_run, "SOME_TOKENS", 800)
    try_ways(monkeypatch, *ways)
    forced(monkeypatch, **kl)
    written, real = 0, os.pwrite

    def pwrite(handle: int, data: Any, offset: int) -> int:
        nonlocal written
        if Path(f"/proc/self/fd/{handle}").readlink().suffix == ".safetensors":
            written += len(data)
        return real(handle, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    record = run(model, tmp_path / "out", texts, max_shard_size=10**9)
    found = sizes(model, tmp_path / "out")
    most = kept * found[0] + codes * found[1] + (len(ways) + 1) * found[2]
    scales = 4 * sum(tensor.format == "nvfp4" for tensor in record.tensors)
    assert (codes - 1) * found[1] < written <= most + 2 * scales


def test_killed_while_files_go_from_way_to_way(
    small: Path, texts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain codes are measured again, win, and get what was left out of them: killed anywhere, they end the same."""
    monkeypatch.setattr(snugfit.quantization.prepared_run, "SOME_TOKENS", 800)
    try_ways(monkeypatch, PLAIN, GPTQ, BAD)
    forced(monkeypatch, plain_few=1.0, gptq=0.95, plain=0.5, bad=2.0)
    spy = Spy(tmp_path / "whole")
    record = run(small, tmp_path / "whole", texts, progress=spy)
    assert [trial.kept for trial in record.trials] == [True, False, False]
    assert "plain, with all samples" in spy.lines
    assert spy.most == 2
    assert weights_of(tmp_path / "whole") == alone(small, tmp_path / "alone", texts, PLAIN)
    out, whole, kinds = tmp_path / "out", contents(tmp_path / "whole"), tmp_path / "kinds"
    boundaries_of(lambda: run(small, tmp_path / "noted", texts), kinds)
    made = [number for number, kind in enumerate(kinds.read_text().splitlines(), 1) if kind == "pwrite"]
    moved = [number for number, kind in enumerate(kinds.read_text().splitlines(), 1) if kind == "rename"]
    for boundary in (moved[1], moved[len(moved) // 2], made[-30], moved[-2], made[-1]):

        def work(at: int = boundary) -> None:
            kill_at(at)
            run(small, out, texts)

        assert in_child(work) == KILLED
        assert not out.exists()
        run(small, out, texts)
        assert contents(out) == whole, boundary
        shutil.rmtree(out)


def test_ranges_without_room_take_all_samples(
    model: Path, texts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where ranges end at the largest value that was seen, a few samples do not tell what all would give."""
    monkeypatch.setattr(snugfit.quantization.prepared_run, "SOME_TOKENS", 800)
    cached = tmp_path / "cached.yaml"
    cached.write_text("name: cached\nrules: [{role: linear, format: nvfp4}]\nkv_cache: fp8\n")

    def few(recipe: str | Path, headroom: str | float | None) -> bool:
        prepared = plan_quantization(
            model, recipe, dataset=texts, effort="good", input_headroom=headroom, **OPTIONS | {"dtype": "float32"}
        )
        return prepared.few_are_enough

    assert few("nvfp4", None)
    assert not few("nvfp4", "amax")
    assert not few(cached, None)


def test_other_ways_do_not_resume(
    model: Path, texts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unfinished run of other ways, another target or other held-out samples is refused, and stays."""
    try_ways(monkeypatch, PLAIN, GPTQ)
    out = tmp_path / "out"

    def work() -> None:
        kill_at(120)
        run(model, out, texts)

    assert in_child(work) == KILLED
    for change in ({"target": "marlin"}, {"effort": "fast"}, {"num_samples": 9}):
        with raises("run-differs", "out.partial"):
            run(model, out, texts, **change)
    try_ways(monkeypatch, PLAIN, BAD)
    with raises("run-differs", "out.partial"):
        run(model, out, texts)
    try_ways(monkeypatch, PLAIN, GPTQ)
    run(model, out, texts)


# --- when nothing can be tried


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """One sample less than trials need."""
    return write_rows(tmp_path / "few.jsonl", random_rows((40,) * (FEWEST_SAMPLES - 1), stop=60))


def test_too_few_samples(model: Path, few: Path, tmp_path: Path) -> None:
    """Effort good that was asked for is refused; the default is fast then, with a note, in the same bytes as fast."""
    for effort in ("good", "best"):
        for call in (plan_quantization, quantize):
            options = OPTIONS if call is plan_quantization else OPTIONS | {"output_dir": tmp_path / "out"}
            with raises("option-conflict", "effort"):
                call(model, "nvfp4", dataset=[few], effort=effort, **options)
    prepared = plan_quantization(model, "nvfp4", dataset=[few], **OPTIONS)
    assert prepared.effort == "fast"
    assert [way.name for way in prepared.ways] == ["weighted"]
    (note,) = (note for note in prepared.notes if "effort" in note)
    assert str(FEWEST_SAMPLES) in note
    efforts: dict[str, str | None] = {"default": None, "fast": "fast"}
    for name, asked in efforts.items():
        record = quantize(model, "nvfp4", output_dir=tmp_path / name, dataset=[few], effort=asked, **OPTIONS)
        assert record.arguments["effort"] == "fast"
    assert contents(tmp_path / "default") == contents(tmp_path / "fast")
    weight_only = plan_quantization(model, "nvfp4a16", dataset=[few], **OPTIONS)
    assert weight_only.ways == (PLAIN,)
    assert weight_only.dataset is None


def test_samples_enough(model: Path, tmp_path: Path) -> None:
    """With so many samples that some can be held out, the default is good."""
    rows = write_rows(tmp_path / "enough.jsonl", random_rows((40,) * FEWEST_SAMPLES, stop=60))
    prepared = plan_quantization(model, "nvfp4", dataset=[rows], **OPTIONS)
    assert prepared.effort == "good"
    assert prepared.held_out is not None
    assert prepared.dataset is not None
    assert (len(prepared.held_out.samples), len(prepared.dataset.samples)) == (1, FEWEST_SAMPLES - 1)
    single = [write_rows(tmp_path / f"{n}.jsonl", random_rows((40,), seed=n, stop=60)) for n in range(FEWEST_SAMPLES)]
    prepared = plan_quantization(model, "nvfp4", dataset=single, **OPTIONS)
    assert prepared.held_out is not None
    assert len(prepared.held_out.samples) == 1


def test_no_samples_that_anyone_asked_for(model: Path, texts: list[Path]) -> None:
    """A model without a tokenizer: a weight-only recipe by default is fast, with a note; good and W4A4 are refused."""
    prepared = plan_quantization(model, "nvfp4a16", **OPTIONS)
    assert prepared.effort == "fast"
    assert prepared.ways == (PLAIN,)
    assert any("effort" in note for note in prepared.notes)
    for recipe, effort in (("nvfp4a16", "good"), ("nvfp4", None)):
        with raises("tokenizer-unusable"):
            plan_quantization(model, recipe, effort=effort, **OPTIONS)
    assert plan_quantization(model, "nvfp4a16", dataset=texts, **OPTIONS).effort == "good"


def test_a_model_without_a_head(make_tiny: MakeTiny, texts: list[Path], tmp_path: Path) -> None:
    """A backbone predicts nothing to compare: good is refused, the default is fast, and the run works."""
    from transformers import AutoModel

    tiny = make_tiny("llama", num_hidden_layers=1)
    model = tmp_path / "model"
    AutoModel.from_pretrained(tiny, dtype="auto").save_pretrained(model)
    with raises("option-conflict", "effort"):
        plan_quantization(model, "nvfp4", dataset=texts, effort="good", **OPTIONS)
    prepared = plan_quantization(model, "nvfp4", dataset=texts, **OPTIONS)
    assert prepared.effort == "fast"
    assert any("head" in note for note in prepared.notes)
    record = quantize(model, "nvfp4", output_dir=tmp_path / "out", dataset=texts, **OPTIONS)
    assert {t.scale_rule for t in record.tensors if t.format == "nvfp4"} == {"weighted"}


def test_statistics(model: Path, texts: list[Path], tmp_path: Path) -> None:
    """With statistics good is refused, and fast has weighted scales and folds by their E[x^2], or plain scales without.

    Those of a run of effort good, which have ranges alone, serve with the same files again.
    """
    collect_statistics(model, output_dir=tmp_path / "s", dataset=texts, device="cpu")
    known = tmp_path / "s" / STATISTICS_FILE
    for effort in ("good", "best"):
        with raises("option-conflict", "effort"):
            plan_quantization(model, "nvfp4", statistics=known, effort=effort, **OPTIONS)
    prepared = plan_quantization(model, "nvfp4", statistics=known, **OPTIONS)
    assert prepared.effort == "fast"
    assert [way.name for way in prepared.ways] == ["weighted+folds"]
    run(model, tmp_path / "out", texts)
    prepared = plan_quantization(model, "nvfp4", statistics=tmp_path / "out", dataset=texts, **OPTIONS)
    assert prepared.ways == (PLAIN,)
    with raises("statistics-mismatch"):
        plan_quantization(model, "nvfp4", statistics=tmp_path / "out", dataset=texts[:1], **OPTIONS)


@pytest.mark.parametrize("recipe", ["nvfp4", "fp8-dynamic"])
def test_an_unknown_target(recipe: str, model: Path, texts: list[Path], tmp_path: Path) -> None:
    """A profile that there is not is refused at its place, by the dry run and the run, whatever the recipe."""
    for target in ("", "blackwell", "VLLM-Blackwell"):
        with raises("option-invalid", "target") as caught:
            plan_quantization(model, recipe, dataset=texts, target=target, **OPTIONS)
        assert "marlin" in caught.value.remedy
        with raises("option-invalid", "target"):
            run(model, tmp_path / "out", texts, recipe, target=target)
    result = CliRunner().invoke(app, ["quantize", str(model), "-r", recipe, "--dry-run", "--target", "none-such"])
    assert failed_with(result, "option-invalid", "--target")


def test_the_dry_run_shows_the_ways(model: Path, texts: list[Path]) -> None:
    """Before a run, the command line names the ways that it will try."""
    given = ["quantize", str(model), "-r", "nvfp4", "--dry-run", "--device", "cpu"]
    given += [part for text in texts for part in ("--dataset", str(text))]
    for effort, ways in (("good", ("gptq+folds",)), ("best", ("gptq+folds+descent", "learned")), ("fast", ())):
        result = CliRunner().invoke(app, [*given, "--effort", effort])
        assert result.exit_code == 0, result.stderr
        assert all(way in result.stderr for way in ways)
        assert ("held-out" in result.stderr) == bool(ways)


def test_the_target_decides_how_inputs_are_rounded(model: Path, texts: list[Path], tmp_path: Path) -> None:
    """For weight-only users the same recipe is measured, and chosen, with 16-bit inputs: the KL is another."""
    found = {target: run(model, tmp_path / target, texts, target=target) for target in ("vllm-blackwell", "marlin")}
    assert found["marlin"].trials[0].kl < 0.8 * found["vllm-blackwell"].trials[0].kl
    assert found["marlin"].arguments["target"] == "marlin"
    same = [all_tensors(tmp_path / target)["model.layers.0.mlp.up_proj.weight_packed"] for target in found]
    assert not torch.equal(*same)


def test_texts_with_a_tokenizer(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """Text files are cut, split and tried like rows."""
    from helpers.tiny_tokenizer import PROSE

    model = add_tokenizer(make_tiny("llama", num_hidden_layers=1))
    text = tmp_path / "text.txt"
    text.write_text(PROSE * 3, encoding="utf-8")
    prepared = plan_quantization(model, "nvfp4", dataset=[text], max_seq_length=32, **OPTIONS)
    assert prepared.effort == "good"
    record = quantize(model, "nvfp4", output_dir=tmp_path / "out", dataset=[text], max_seq_length=32, **OPTIONS)
    assert {trial.name for trial in record.trials} >= {"plain", "gptq+folds"}


@pytest.mark.parametrize(
    ("family", "recipe", "ways"),
    [
        (
            "qwen3_moe",
            "fp8-int4-awq",
            ["plain", "weighted", "weighted+expert-folds", "weighted+expert-folds+norm-folds"],
        ),
        (
            "qwen3_moe",
            "int4-w4a16",
            [
                "plain",
                "gptq+folds",
                "gptq",
                "weighted",
                "gptq+folds+expert-folds",
                "gptq+folds+expert-folds+norm-folds",
            ],
        ),
        ("gpt_oss", "fp8-int4-moe", ["plain", "weighted", "weighted+norm-folds"]),
        ("nemotron_h", "fp8-int4-moe", ["plain", "weighted", "weighted+norm-folds"]),
        ("mixtral", "nvfp4-moe", ["plain", "weighted", "weighted+expert-folds", "weighted+expert-folds+norm-folds"]),
    ],
)
def test_ways_for_mixtures(family: str, recipe: str, ways: list[str], texts: list[Path], tmp_path: Path) -> None:
    """Folds inside experts are tried behind the ways before; of experts that allow none a dry run says why."""
    model = make_mixture(family, tmp_path / "model")
    options: dict[str, Any] = OPTIONS | {"allow_unverified": True}
    prepared = plan_quantization(model, recipe, dataset=texts, effort="good", **options)
    assert [way.name for way in prepared.ways] == ways
    said = [note for note in prepared.notes if "not folded" in note]
    assert bool(said) == (family in ("gpt_oss", "nemotron_h"))
    assert (NVFP4_EXPERTS_IN_TRANSFORMERS in prepared.notes) == ("nvfp4" in recipe)
    assert (SPLIT_EXPERTS_IN_TRANSFORMERS in prepared.notes) == (family == "gpt_oss")
    best = [w.name for w in plan_quantization(model, recipe, dataset=texts, effort="best", **options).ways]
    assert best[: len(ways) - 1] == ways[:-1]
    assert best[-1].endswith("+norm-folds")
    assert ("descent" in best[-1]) == ("gptq" in ways)


def test_folds_inside_experts_are_written_if_they_win(texts: list[Path], tmp_path: Path) -> None:
    """The files of a mixture are those of the way that the gate kept, byte for byte."""
    model = make_mixture("qwen3_moe", tmp_path / "model")
    record = run(model, tmp_path / "out", texts, "fp8-int4-awq", min_tokens_per_expert=0)
    prepared = plan_quantization(model, "fp8-int4-awq", dataset=texts, effort="good", **OPTIONS)
    winner = [trial.name for trial in record.trials if trial.kept][-1]
    (way,) = (way for way in prepared.ways if way.name == winner)
    assert weights_of(tmp_path / "out") == alone(model, tmp_path / "alone", texts, way, "fp8-int4-awq")
