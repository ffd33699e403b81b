"""A plan on several processes: the files and figures of one process, whoever dies meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import MakeTiny
from helpers.killed import KILLED
from helpers.plan_scores import made_up_scores, save
from helpers.ranks import in_ranks
from helpers.tiny_families import FAMILIES, random_rows, write_rows
from helpers.tiny_mixtures import make_mixture
from helpers.tiny_tokenizer import add_tokenizer
from snugfit.model import forward_pass
from snugfit.model.layout import read_layout
from snugfit.planning import make_plan
from snugfit.planning.make_plan import plan
from snugfit.planning.plan_cost import estimate_plan
from snugfit.planning.shared_cost import crowding, largest_share, seconds_of_states

Options = dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def _without_plots() -> Iterator[None]:
    """Plots take their time, and are the main process's work."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_plan, "write_plan_plots", lambda *_: [])
        yield


@pytest.fixture(scope="module")
def dense(make_tiny: MakeTiny) -> Path:
    """Two layers of a llama."""
    folder = make_tiny(num_hidden_layers=2)
    add_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Options:
    """What and how to score and to prove: six batches of rows, held-out rows of several lengths."""
    folder = tmp_path_factory.mktemp("texts")
    return {
        "bits_per_weight": 9.0,
        "dataset": write_rows(folder / "rows.jsonl", random_rows([64] * 12)),
        "held_out": write_rows(folder / "held-out.jsonl", random_rows([64, 40, 33] * 4)),
        "max_seq_length": 64,
        "num_tokens": 700,
        "menu": ("nvfp4", "fp8-dynamic"),
        "alternatives": 1,
        "device": "cpu",
        "tokens_per_batch": 128,
    }


@pytest.fixture(scope="module")
def alone(dense: Path, options: Options, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of the llama."""
    folder = tmp_path_factory.mktemp("alone") / "out"
    plan(dense, output_dir=folder, **options)
    return folder


def contents(folder: Path) -> Iterator[tuple[str, Any]]:
    """The files of a plan, without what clocks say and how many processes there were."""
    for file in sorted(folder.iterdir()):
        found: Any = file.read_bytes()
        if file.name == "plan.json":
            found = json.loads(found)
            for key in ("seconds", "foreseen", "processes", "record_digest"):
                del found[key]
        yield file.name, found


def same(first: Path, second: Path) -> bool:
    """Whether two plans are the same in every file."""
    names = [dict(contents(folder)).keys() for folder in (first, second)]
    assert names[0] == names[1] >= {"recipe.yaml", "plan.json", "snugfit-scores.json", "snugfit-statistics.json"}
    return dict(contents(first)) == dict(contents(second))


def test_the_plan_of_one_process(alone: Path, dense: Path, options: Options, tmp_path: Path) -> None:
    """Scores, statistics, measured figures and the recipe have the bytes of one process; each returns the record."""

    def work(rank: int) -> None:
        record = plan(dense, output_dir=tmp_path / "many", **options)
        (tmp_path / f"{rank}.json").write_text(record.to_json())

    assert in_ranks(2, work) == [0, 0]
    assert same(tmp_path / "many", alone)
    written = (tmp_path / "many" / "plan.json").read_text()
    assert json.loads(written)["processes"] == 2
    assert {(tmp_path / f"{rank}.json").read_text() for rank in range(2)} == {written}


def test_more_processes_than_batches(options: Options, tmp_path: Path) -> None:
    """Of a mixture whose weights follow E[x^2], processes without samples round their part of the experts."""
    model = make_mixture("qwen3_moe", tmp_path / "model", num_hidden_layers=1)
    add_tokenizer(model)
    few = {**options, "num_tokens": 120, "rounding": "weighted", "menu": ("nvfp4",), "alternatives": 0}
    few["held_out"] = write_rows(tmp_path / "held-out.jsonl", random_rows([64] * 4))
    plan(model, output_dir=tmp_path / "one", **few)
    assert in_ranks(4, lambda _: plan(model, output_dir=tmp_path / "many", **few)) == [0] * 4
    assert same(tmp_path / "many", tmp_path / "one")


def _dies_at(number: int, work: Callable[[], object]) -> Callable[[int], None]:
    """Work in which the process 1 dies when it runs a layer for that time."""

    def run(rank: int) -> None:
        original, count = forward_pass.call_layer, 0

        def call(*arguments: Any, **more: Any) -> Any:
            nonlocal count
            count += 1
            if rank == 1 and count == number:
                os._exit(KILLED)
            return original(*arguments, **more)

        forward_pass.call_layer = call
        work()

    return run


def test_a_process_that_dies(
    alone: Path, dense: Path, options: Options, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The others stop with an error that says so, and other numbers of processes resume, to the same files."""

    def work() -> None:
        plan(dense, output_dir=tmp_path / "many", **options)

    def units() -> int:
        return len(list((tmp_path / "many.partial").rglob("unit-*.json")))

    assert in_ranks(3, _dies_at(14, work)) == [2, KILLED, 2]  # in the backward pass
    assert "rank-lost" in capfd.readouterr().err
    scored = units()
    assert in_ranks(2, _dies_at(60, work)) == [2, KILLED]  # in the passes of plans
    assert units() > scored > 0
    assert in_ranks(4, lambda _: work()) == [0] * 4
    assert same(tmp_path / "many", alone)


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        ({"bytes": 1000}, "plan-impossible"),  # before the work
        ({"held_out": "nowhere.txt"}, "dataset-unreadable"),
        ({"max_kl": 1e-12, "bytes": 120_000}, "plan-impossible"),  # by the search, with scores that were given
    ],
)
def test_what_all_refuse(
    bad: Options, code: str, dense: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The main process reports it, the others end silently, and nothing is left behind."""
    given: Options = {"scores": save(made_up_scores(read_layout(dense)), tmp_path / "scores.json"), "device": "cpu"}
    given |= {"prove": "held_out" in bad, "bits_per_weight": 9.0}
    assert in_ranks(2, lambda _: plan(dense, output_dir=tmp_path / "out", **given | bad)) == [2, 2]
    errors = capfd.readouterr().err
    assert f"rank 0: UserError {code}" in errors
    assert f"rank 1: OtherRankError {code}" in errors
    assert not (tmp_path / "out.partial").exists()


def test_scores_outlive_a_refusal(
    dense: Path, options: Options, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What the search refuses behind the scoring is reported once, and the scores are kept for another budget."""
    given = {**options, "prove": False, "menu": ("fp8-dynamic",), "num_tokens": 120}
    assert in_ranks(2, lambda _: plan(dense, output_dir=tmp_path / "out", max_kl=1e-12, **given)) == [2, 2]
    errors = capfd.readouterr().err
    assert "rank 0: Unfinished plan-impossible" in errors
    assert "rank 1: OtherRankError plan-impossible" in errors
    assert list((tmp_path / "out.partial").rglob("unit-*.json"))


def test_the_estimate_counts_processes(dense: Path, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process with the most batches decides; more threads than processors take longer; memory is each one's."""
    assert [largest_share(6, processes) for processes in (1, 2, 4, 9)] == [1, 0.5, 2 / 6, 1 / 6]
    assert crowding(torch.device("cpu")) == 1
    assert "processes" not in estimate_plan(dense, timed=False, **options).line()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr("snugfit.planning.shared_cost.processors", lambda: 2)
    assert crowding(torch.device("cpu")) == 2
    found = estimate_plan(dense, timed=False, **options)
    assert found.processes == 4
    assert "memory in each of 4 processes" in found.line()


def test_the_disk_of_the_states_is_timed(tmp_path: Path) -> None:
    """A batch's states are written and read where the run will have them, and nothing is left."""
    (batch,) = forward_pass.make_batches([[1] * 64] * 4, 256, torch.device("cpu"))
    batch.hidden = torch.zeros(4, 64, 32)
    assert 0 < seconds_of_states(batch, torch.device("cpu"), tmp_path / "out.partial" / "work") < 10
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_family_that_shares_keys(make_tiny: MakeTiny, options: Options, tmp_path: Path) -> None:
    """Gemma 4, whose later layers use keys and values of earlier ones, has the plan of one process, also resumed."""
    model = make_tiny("gemma4_text", **FAMILIES["gemma4_text"])
    add_tokenizer(model)
    given = {**options, "menu": ("fp8-dynamic",), "bits_per_weight": 12.0}
    plan(model, output_dir=tmp_path / "one", **given)
    work = _dies_at(40, lambda: plan(model, output_dir=tmp_path / "many", **given))
    assert in_ranks(2, work) == [2, KILLED]
    assert in_ranks(3, lambda _: plan(model, output_dir=tmp_path / "many", **given)) == [0] * 3
    assert same(tmp_path / "many", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("number", [3, 25, 33, 47, 80])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_killed_anywhere(family: str, number: int, options: Options, tmp_path: Path) -> None:
    """Wherever a process dies, another number of processes ends in the files of one."""
    model = make_mixture(family, tmp_path / "model")
    add_tokenizer(model)
    plan(model, output_dir=tmp_path / "one", **options)
    work = _dies_at(number, lambda: plan(model, output_dir=tmp_path / "many", **options))
    assert in_ranks(2, work) == [2, KILLED]
    plan(model, output_dir=tmp_path / "many", **options)
    assert same(tmp_path / "many", tmp_path / "one")


@pytest.mark.slow
def test_torchrun_itself(alone: Path, dense: Path, options: Options, tmp_path: Path) -> None:
    """The command line under torchrun: one report, the files of one process, one dry run, and a refusal once."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "snugfit"]
    command += ["plan", str(dense), "--bits-per-weight", "9", "-o", str(tmp_path / "many"), "--device", "cpu"]
    for name in ("dataset", "held_out", "max_seq_length", "num_tokens", "alternatives", "tokens_per_batch"):
        command += [f"--{name.replace('_', '-')}", str(options[name])]
    command += ["--menu", ",".join(options["menu"])]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    dry = subprocess.run([*command, "--dry-run"], check=True, capture_output=True, text=True, env=environment)
    assert dry.stdout.count("in each of 2 processes") == 1
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    accepted = json.loads((tmp_path / "many" / "plan.json").read_text())["verdict"]["accepted"]
    assert (done.returncode == 0) == accepted, done.stderr
    assert done.stdout.count("snugfit quantize") == 1
    found, expected = (dict(contents(folder)) for folder in (tmp_path / "many", alone))
    for name in expected.keys() - {"plan.md"}:  # it shows the plots
        assert found[name] == expected[name]
    again = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert again.returncode != 0
    assert again.stderr.count("output-exists") == 1
