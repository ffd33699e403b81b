"""A model on the Hub is quantized without lying on the disk, and a lost network loses nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

import snugfit
from conftest import MakeTiny
from helpers.errors import failed_with, raises
from helpers.hub_server import COMMIT, Hub, files_of, serve
from helpers.tiny_families import random_rows, write_rows
from helpers.tiny_tokenizer import add_tokenizer
from snugfit.cli.app import app
from snugfit.quantization import run_time, stand_ins, unit_work
from snugfit.quantization.layer.choose import choose as choose_codes
from snugfit.quantization.quantize import plan_quantization, quantize
from snugfit.records.quantize import RECORD_FILE
from snugfit.records.statistics_file import STATISTICS_FILE
from snugfit.storage import http_ranges as ranges
from snugfit.storage.staging import units_done
from snugfit.storage.transfer import REMOTE_AHEAD_BYTES

RECIPE = "nvfp4-fp8-hybrid-four-over-six"


@pytest.fixture(scope="module")
def model(make_tiny: MakeTiny) -> Path:
    """Three layers in many weight files, and what else lies in a repository."""
    directory = make_tiny("llama", max_shard_size="60KB")
    (directory / "README.md").write_text("a card", encoding="utf-8")
    (directory / "pytorch_model.bin").write_bytes(b"never fetched")
    return directory


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that has it as org/name; failures are retried without waiting."""
    with serve(files_of(model)) as running:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(ranges, "WAIT_SECONDS", (0.0,) * len(ranges.WAIT_SECONDS))
        yield running
        huggingface_hub.close_session()


@pytest.fixture(scope="module")
def local(model: Path, token_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What comes of the directory."""
    out = tmp_path_factory.mktemp("local") / "out"
    quantize(model, RECIPE, output_dir=out, dataset=[token_rows], device="cpu")
    return contents(out)


def contents(directory: Path) -> dict[str, bytes]:
    """All files except the record, which has times; statistics without the model's name and a digest, which differ."""
    found = {name: content for name, content in files_of(directory).items() if name != RECORD_FILE}
    statistics = json.loads(found[STATISTICS_FILE])
    same = {k: v for k, v in statistics.items() if k not in ("model", "record_digest")}
    found[STATISTICS_FILE] = json.dumps(same).encode()
    return found


def run(out: Path, token_rows: Path) -> Any:
    arguments = ["quantize", "org/name", "-r", RECIPE, "-o", out, "--dataset", token_rows, "--device", "cpu"]
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_same_files_as_from_a_directory(
    hub: Hub, token_rows: Path, local: dict[str, bytes], tmp_path: Path
) -> None:
    """A Hub id gives the files that its directory gives; no weight file is ever stored, none is read as a whole."""
    record = quantize("org/name", RECIPE, output_dir=tmp_path / "out", dataset=[token_rows], device="cpu")
    assert contents(tmp_path / "out") == local
    assert record.source == "org/name"
    stored = {name for name in files_of(tmp_path / "cache") if name.endswith((".safetensors", ".bin"))}
    assert stored == set()
    assert all(hub.ranges())


def test_faults_that_pass_change_nothing(hub: Hub, token_rows: Path, local: dict[str, bytes], tmp_path: Path) -> None:
    """Interrupted connections, temporary refusals and expired addresses are retried, and the files are the same."""
    # nine faults: whichever threads meet them, none meets more than it may (`WAIT_SECONDS`)
    faults = ["drop", "503", "none", "", "429", "403", "drop", "", "none", "503", "403"]
    assert sum(map(bool, faults)) <= len(ranges.WAIT_SECONDS)
    hub.faults.extend(["", "", "", "", *faults])
    quantize("org/name", RECIPE, output_dir=tmp_path / "out", dataset=[token_rows], device="cpu")
    assert not hub.faults
    assert contents(tmp_path / "out") == local


def test_weights_are_on_their_way_while_others_are_worked_on(
    hub: Hub, token_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of later layers are asked for before the first one is chosen, and never more than a bounded part."""
    asked: list[int] = []
    real = choose_codes

    def choose(*arguments: Any) -> Any:
        asked.append(len(hub.ranges()))
        return real(*arguments)

    monkeypatch.setattr(unit_work, "choose", choose)
    plan = plan_quantization("org/name", RECIPE, dataset=[token_rows], device="cpu")
    assert 0 < plan.read_ahead_bytes(plan.divisions()) <= REMOTE_AHEAD_BYTES
    quantize("org/name", RECIPE, output_dir=tmp_path / "out", dataset=[token_rows], device="cpu")
    assert asked[2] - asked[1] > len(plan.divisions()[1].coming)  # more than the first layer's


def test_a_lost_network_loses_nothing(hub: Hub, token_rows: Path, local: dict[str, bytes], tmp_path: Path) -> None:
    """A network that stays away ends the run with what is kept; the same command resumes and reads only the rest."""
    out = tmp_path / "out"
    quantize("org/name", RECIPE, output_dir=tmp_path / "first", dataset=[token_rows], device="cpu")
    needed = len(hub.ranges())
    hub.requests.clear()
    hub.faults.extend([""] * (needed * 2 // 3) + ["none"] * 10_000)
    stopped = run(out, token_rows)
    assert failed_with(stopped, "hub-unreachable", "org/name/")
    assert units_done(tmp_path / "out.partial") >= 2
    hub.faults.clear()
    hub.requests.clear()
    again = run(out, token_rows)
    assert again.exit_code == 0, again.stderr
    assert "resuming after" in again.stderr
    assert len(hub.ranges()) < needed
    assert contents(out) == local


def test_another_commit_is_not_mixed_in(
    hub: Hub, token_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run does not resume after the model got a new commit."""
    hub.faults.extend([""] * 24 + ["none"] * 10_000)
    assert failed_with(run(tmp_path / "out", token_rows), "hub-unreachable", "org/name/")
    hub.faults.clear()
    assert units_done(tmp_path / "out.partial") >= 1
    monkeypatch.setattr("helpers.hub_server.COMMIT", COMMIT[::-1])
    assert failed_with(run(tmp_path / "out", token_rows), "run-differs", tmp_path / "out.partial", "source files")


def test_ways_are_not_tried_on_a_model_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    """Effort good needs the original on this disk: asked for it is refused, by default it is fast and says so."""
    rows = write_rows(tmp_path / "rows.jsonl", random_rows((48,) * 8, stop=60))
    options: dict[str, Any] = {"dataset": [rows], "device": "cpu"}
    for effort in ("good", "best"):
        with raises("option-conflict", "effort") as caught:
            plan_quantization("org/name", "nvfp4", effort=effort, **options)
        assert "Download" in caught.value.remedy
        with raises("option-conflict", "effort"):
            quantize("org/name", "nvfp4", output_dir=tmp_path / "out", effort=effort, **options)
    given = ["quantize", "org/name", "-r", "nvfp4", "-o", tmp_path / "out", "--dataset", rows, "--effort", "good"]
    assert failed_with(CliRunner().invoke(app, [str(part) for part in given]), "option-conflict", "--effort")
    assert not any(path.name.startswith("out") for path in tmp_path.iterdir())
    prepared = plan_quantization("org/name", "nvfp4", **options)
    assert prepared.effort == "fast"
    assert any("Hub" in note for note in prepared.notes)
    record = quantize("org/name", "nvfp4", output_dir=tmp_path / "out", **options)
    assert record.arguments["effort"] == "fast"
    assert record.trials == ()
    assert all(hub.ranges())


def test_datasets_are_compared_on_a_model_of_the_hub(hub: Hub, model: Path, tmp_path: Path) -> None:
    """Texts are tokenized with the tokenizer of a model that nothing is cached of yet, as with that of a directory."""
    directory = add_tokenizer(Path(shutil.copytree(model, tmp_path / "model")))
    hub.files = files_of(directory)
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file, text in zip(files, ("ab cd " * 200, "xyz? " * 200), strict=True):
        file.write_text(text, encoding="utf-8")
    options: dict[str, Any] = {"num_samples": 2, "max_seq_length": 32, "device": "cpu"}
    found = snugfit.compare_datasets(*files, model="org/name", **options)
    expected = snugfit.compare_datasets(*files, model=directory, **options)
    assert (found.a.digest, found.b.digest) == (expected.a.digest, expected.b.digest)
    assert found.linears == expected.linears


def test_the_time_of_a_model_on_the_hub(hub: Hub, token_rows: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Some of one layer is read to know how long a run takes, and nothing of the other layers."""
    prepared = plan_quantization("org/name", RECIPE, dataset=[token_rows], device="cpu")
    hub.requests.clear()
    monkeypatch.setattr(stand_ins, "REMOTE_BYTES", 1 << 15)
    monkeypatch.setattr(run_time, "TIMED_BYTES", 1 << 15)
    found = run_time.estimate_run_time(prepared, tmp_path / "out")
    assert found is not None
    assert "reading" in found.line()
    ends = [asked.removeprefix("bytes=").split("-") for asked in hub.ranges()]
    sizes = [int(last) - int(first) + 1 for first, last in ends]
    layer = sum(prepared.plan.weights.file_bytes(name) for name in prepared.plan.units[2])
    assert 0 < sum(sizes) < layer
