"""The seconds that a run will take, before it begins: what is worked on for it, what it says, what it leaves alone."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from numba import njit, types
from typer.testing import CliRunner

from helpers.fp8_sources import Kind, as_fp8
from helpers.killed import contents
from helpers.ranks import in_ranks
from helpers.tiny_families import random_rows, write_rows
from helpers.tiny_mixtures import Source
from snugfit import machine
from snugfit.cli.app import app
from snugfit.formats import machine_code
from snugfit.machine import NO_TIME, Seconds
from snugfit.methods.calibrated import Calibrated
from snugfit.model import experts
from snugfit.progress import SILENT
from snugfit.quantization import quantize as quantizing
from snugfit.quantization import rehearsal, run_time, stand_ins
from snugfit.quantization.collect import collect_statistics
from snugfit.quantization.loop import run_layers
from snugfit.quantization.prepared_run import PreparedRun
from snugfit.quantization.quantize import plan_quantization, quantize
from snugfit.quantization.rehearsal import LayerTime
from snugfit.quantization.resume import FinishedUnits, omitted
from snugfit.quantization.run import Run
from snugfit.quantization.run_time import RunTime, Writing, estimate_run_time
from snugfit.records.quantize import RECORD_FILE
from snugfit.storage.transfer import Transfer

KEEPS_THE_REST = "name: mine\nrules: [{role: mlp, format: nvfp4}, {role: linear, format: keep}]\n"
ONE_WAY = "name: mine\nrules: [{role: linear, format: nvfp4, scale_rule: four-over-six, input_headroom: 2}]\n"
ROWS = random_rows([64] * 10 + [40, 33] * 3)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The samples as a file."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS)


def prepared_run(model: Path, recipe: str, rows: Path, **options: Any) -> PreparedRun:
    """A run on the CPU."""
    fixed: dict[str, Any] = {"device": "cpu", "tokens_per_batch": 130, "min_tokens_per_expert": 0}
    return plan_quantization(model, recipe, dataset=[rows], **fixed, **options)


def time_of(prepared: PreparedRun, folder: Path) -> RunTime:
    """The estimate, which is made."""
    found = estimate_run_time(prepared, folder / "out")
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("family", "recipe", "effort", "size"),
    [
        ("llama", "nvfp4-fp8-hybrid", "fast", None),
        ("llama", "fp8-int4-absmax", None, None),  # no samples
        ("qwen3_moe", "fp8-int4-moe-absmax", None, 2),
        ("llama", "nvfp4-fp8-hybrid", "best", None),
        ("qwen3_moe", "nvfp4-moe-four-over-six", None, 2),
        ("mixtral", "fp8-int4-awq", "good", None),
    ],
)
def test_every_way_has_its_time(
    family: str, recipe: str, effort: str | None, size: int | None, source: Source, rows: Path, tmp_path: Path
) -> None:
    """Of every way that is sure to be tried seconds are foreseen, they add up, and nothing is left on the disk."""
    prepared = prepared_run(source(family), recipe, rows, effort=effort, experts_per_group=size)
    found = time_of(prepared, tmp_path)
    assert [name for name, _ in found.ways] == [way.name for way in prepared.ways if not way.unless]
    assert all(one.wall > 0 and one.cpu > 0 for _, one in found.ways)
    assert found.seconds.wall == pytest.approx(sum(one.wall for _, one in found.ways))
    assert not list(tmp_path.iterdir())
    assert found.line().startswith("this run will take about")


def test_kernels_that_are_compiled_do_not_count(source: Source, rows: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Where kernels are compiled while the layer is worked on, as on a machine's first run, it is worked on again."""
    times: list[int] = []
    original = rehearsal.Rehearsal._work

    def first_compiles(self: rehearsal.Rehearsal, *arguments: Any) -> Seconds:
        times.append(1)
        if len(times) == 1:
            machine_code.compiled(_doubled, types.float32[::1])
        return replace(original(self, *arguments), cpu=rehearsal.QUICK["cpu"])  # too long for a second time otherwise

    monkeypatch.setattr(rehearsal.Rehearsal, "_work", first_compiles)
    monkeypatch.setattr("snugfit.formats.machine_code.njit", _without_cache)
    time_of(prepared_run(source("llama"), "nvfp4-fp8-hybrid-four-over-six", rows), tmp_path)
    assert len(times) == 2
    time_of(prepared_run(source("llama"), "nvfp4-fp8-hybrid-four-over-six", rows), tmp_path)
    assert len(times) == 3


def test_a_layer_is_tried_without_numba(source: Source, rows: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Where numba cannot be imported nothing is compiled, and the layer is timed as it would run."""
    monkeypatch.setitem(sys.modules, "snugfit.formats.machine_code", None)
    assert time_of(prepared_run(source("llama"), "nvfp4-fp8-hybrid-four-over-six", rows), tmp_path).seconds.wall > 0


def _doubled(values: Any) -> None:
    for place in range(values.size):
        values[place] *= 2


def _without_cache(*arguments: Any, **options: Any) -> Any:
    return njit(*arguments, **{name: value for name, value in options.items() if name != "cache"})


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_one_layer_is_read(family: str, source: Source, rows: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Of the decoder layers one is read; of its many experts some."""
    read: list[tuple[str, int | None]] = []
    original = Transfer.read

    def watched(self: Transfer, checkpoint: Any, name: str, expert: int | None = None) -> Any:
        read.append((name, expert))
        return original(self, checkpoint, name, expert)

    monkeypatch.setattr(Transfer, "read", watched)
    monkeypatch.setattr(rehearsal, "EXPERT_BYTES", {"cpu": 1})
    prepared = prepared_run(source(family), "nvfp4-fp8-hybrid" if family == "llama" else "nvfp4-moe", rows)
    time_of(prepared, tmp_path)
    numbers = {name.split(".layers.")[1].split(".")[0] for name, _ in read if ".layers." in name}
    assert len(numbers) == 1
    if family == "qwen3_moe":
        tried = {name.split(".experts.")[1].split(".")[0] for name, _ in read if ".experts." in name}
        count = next(iter(prepared.skeleton.experts.values())).count
        assert len(tried) < count


def test_experts_that_are_not_tried_count(source: Source, rows: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """One expert stands for all of a layer: a clock that counts runs of experts gives the same."""
    runs, found = 0, []
    original = experts._middle

    def counted(*arguments: Any) -> torch.Tensor:
        nonlocal runs
        runs += 1
        return original(*arguments)

    def ticks(_: object = None) -> Any:
        return Seconds(float(runs), float(runs))

    monkeypatch.setattr(experts, "_middle", counted)
    for module in (stand_ins, rehearsal):
        monkeypatch.setattr(module, "now", ticks)
    for size in (1 << 30, 1):
        monkeypatch.setattr(rehearsal, "EXPERT_BYTES", {"cpu": size})
        prepared = prepared_run(source("mixtral"), "nvfp4-moe-four-over-six", rows)
        with Transfer(torch.device("cpu")) as transfer:
            trial = rehearsal.Rehearsal(prepared, transfer, 1)
            found.append(trial.time(prepared.ways[0]).passes.wall)
    assert found[0] > 0
    assert found[1] == pytest.approx(found[0], rel=0.1)


def test_parts_of_large_weights_count_for_all(source: Source, rows: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Of weights that are large a part is rounded, and what rounding grows with makes up for the rest."""
    seen: list[tuple[int, ...]] = []
    original = Calibrated.choose

    def watched(self: Calibrated, groups: Iterable[Any], purpose: Any) -> Any:
        groups = list(groups)
        seen.extend(tuple(w.shape) for g in groups if g.target is not None for w in g.weights.values())
        return original(self, groups, purpose)

    monkeypatch.setattr(Calibrated, "choose", watched)
    monkeypatch.setattr(stand_ins, "VALUES", {"cpu": 1024})
    monkeypatch.setattr(stand_ins, "FEATURES", {"cpu": 32})
    time_of(prepared_run(source("llama"), "nvfp4", rows, effort="good"), tmp_path)
    assert seen
    assert all(columns <= 32 for _, columns in seen)
    assert stand_ins.work_of([(256, 64)], deep=False) == 4 * stand_ins.work_of([(128, 32)], deep=False)
    assert stand_ins.work_of([(128, 64)], deep=True) == 128 * 64**2 + 2 * 64**3


@pytest.mark.parametrize("processes", [1, 2])
def test_the_run_is_the_same(processes: int, source: Source, rows: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A run that was timed before it began has the same bytes, and its record has both times side by side."""
    options: dict[str, Any] = {"dataset": [rows], "device": "cpu", "tokens_per_batch": 130, "effort": "fast"}
    model = source("llama")
    quantize(model, "nvfp4-fp8-hybrid", output_dir=tmp_path / "plain", **options)
    monkeypatch.setattr(quantizing, "WORTH_AN_ESTIMATE", 0.0)
    if processes == 1:
        quantize(model, "nvfp4-fp8-hybrid", output_dir=tmp_path / "timed", **options)
    else:
        work = lambda _: quantize(model, "nvfp4-fp8-hybrid", output_dir=tmp_path / "timed", **options)  # noqa: E731
        assert in_ranks(processes, work) == [0] * processes
    assert contents(tmp_path / "timed") == contents(tmp_path / "plain")
    for name, timed in (("plain", False), ("timed", True)):
        estimates = json.loads((tmp_path / name / RECORD_FILE).read_text(encoding="utf-8"))["estimates"]
        for key in ("seconds", "cpu_seconds"):
            assert (estimates[key]["estimated"] is not None) == timed
            assert estimates[key]["actual"] > 0


def test_a_layer_that_cannot_be_tried(source: Source, rows: Path, tmp_path: Path) -> None:
    """Damaged weights are the run's to report: there is no time, and no error."""
    model = tmp_path / "model"
    shutil.copytree(source("llama"), model)
    prepared = prepared_run(model, "nvfp4", rows, effort="fast")
    file = next(model.glob("*.safetensors"))
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size // 2)
    assert estimate_run_time(prepared, tmp_path / "out") is None


def test_a_kill_leaves_nothing(source: Source, rows: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """What is written to measure a rate has no name in the folder while it is there."""
    seen: list[list[Path]] = []
    original = machine.timed

    def watched(work: Callable[[], object], *arguments: Any) -> Seconds:
        def look() -> None:
            work()
            seen.append(list(tmp_path.iterdir()))

        return original(look, *arguments)

    monkeypatch.setattr(run_time, "timed", watched)
    time_of(prepared_run(source("llama"), "nvfp4", rows, effort="fast"), tmp_path)
    assert seen == [[], []]  # while it is written, and while the disk takes it


def test_files_to_be_judged_by(source: Source, rows: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A way with a few samples writes nothing that is the source's, and nothing has the disk take its files."""
    monkeypatch.setattr("snugfit.quantization.prepared_run.SOME_TOKENS", 200)
    monkeypatch.setattr(run_time, "_writing", lambda *_: Writing(write=Seconds(1.0, 0.0), keep=Seconds(2.0, 0.0)))
    prepared = prepared_run(source("llama"), "nvfp4-fp8-hybrid", rows, effort="good")
    plan, found = prepared.plan, dict(time_of(prepared, tmp_path).ways)
    assert found["plain"].wall == pytest.approx(plan.bytes - plan.copied_bytes, rel=1e-3)
    assert found["gptq+folds"].wall == pytest.approx(3 * plan.bytes, rel=1e-3)


@pytest.mark.parametrize("kind", [None, "ct-channel"])
def test_what_is_left_out_of_them(kind: Kind | None, source: Source, rows: Path, tmp_path: Path) -> None:
    """The bytes that a plan counts as the source's are those that files which do not last lack, copied codes too."""
    model = source("llama") if kind is None else as_fp8(source("llama"), tmp_path / "fp8", kind)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(KEEPS_THE_REST, encoding="utf-8")
    prepared = prepared_run(model, str(recipe), rows, effort="good").on_few()
    folder = tmp_path / "out"
    folder.mkdir()
    finished = FinishedUnits(folder, prepared.identity())
    run = Run(
        prepared=prepared, directory=folder, work=folder, finished=finished, clock=machine.Clock(), progress=SILENT
    )
    run_layers(run)
    sizes = {info.name: info.bytes for infos in prepared.plan.outputs.values() for info in infos}
    left_out = sum(sizes[name] for name in omitted(finished))
    assert 0 < left_out == prepared.plan.copied_bytes < prepared.plan.bytes


def test_one_way_has_all_samples(source: Source, rows: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A way that nothing is compared with runs all samples, also where a few would tell how good it is."""
    whole = Seconds(1.0, 1.0)
    time = LayerTime(weights=NO_TIME, passes=whole, forward=whole, decode=NO_TIME)
    monkeypatch.setattr(rehearsal.Rehearsal, "time", lambda *_: time)
    recipe, found = tmp_path / "recipe.yaml", []
    recipe.write_text(ONE_WAY, encoding="utf-8")
    for some in (1 << 30, 200):
        monkeypatch.setattr("snugfit.quantization.prepared_run.SOME_TOKENS", some)
        prepared = prepared_run(source("llama"), str(recipe), rows)
        found.append(time_of(prepared, tmp_path).seconds.cpu)
    assert prepared.few_are_enough
    assert found[1] == pytest.approx(found[0], rel=0.1)
    assert found[0] >= prepared.plan.num_layers


def test_a_dry_run_says_it(source: Source, rows: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A dry run prints the time, of a very small model that it is short, and writes nothing."""
    command = ["quantize", str(source("llama")), "-r", "nvfp4", "--dry-run", "--dataset", str(rows), "--device", "cpu"]
    command += ["-o", str(tmp_path / "out")]
    assert "less than a minute" in CliRunner().invoke(app, command).stdout
    monkeypatch.setattr(run_time, "SHORT_SECONDS", 0.0)
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0
    assert "this run will take about" in result.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [None, 2])
def test_a_run_from_statistics(size: int | None, source: Source, rows: Path, tmp_path: Path) -> None:
    """A run that takes statistics in place of samples has its time, experts in pieces too."""
    model = source("mixtral")
    collect_statistics(model, output_dir=tmp_path / "found", dataset=[rows], device="cpu", tokens_per_batch=130)
    prepared = plan_quantization(
        model,
        "fp8-int4-awq",
        statistics=tmp_path / "found",
        device="cpu",
        min_tokens_per_expert=0,
        experts_per_group=size,
    )
    assert time_of(prepared, tmp_path).seconds.cpu > 0
