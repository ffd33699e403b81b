"""A run that is stopped anywhere resumes where it was and ends in the same bytes."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import snugfit.quantization.unit_work
from conftest import MakeTiny
from helpers.errors import failed_with, raises
from helpers.killed import KILLED, boundaries_of, contents, in_child, kill_at
from snugfit.cli.app import app
from snugfit.errors import Unfinished, UserError
from snugfit.quantization.layer.choose import choose
from snugfit.quantization.layer.layer_pass import LayerPass
from snugfit.quantization.layer.propagate import propagate
from snugfit.quantization.quantize import quantize
from snugfit.records.quantize import RECORD_FILE, QuantizeRecord
from snugfit.storage.shards import file_digests
from snugfit.storage.staging import WORK_NAME, units_done

RECIPE = "nvfp4-fp8-hybrid-fp8kv-four-over-six"
ENDS = 6


@pytest.fixture(scope="module")
def model(make_tiny: MakeTiny) -> Path:
    """Two layers in several weight files."""
    return make_tiny("llama", num_hidden_layers=2, max_shard_size="60KB")


def run(model: Path, out: Path, token_rows: Path, **options: Any) -> QuantizeRecord:
    settings: dict[str, Any] = {"dataset": [token_rows], "tokens_per_batch": 96, "max_shard_size": 30_000}
    return quantize(model, RECIPE, output_dir=out, device="cpu", **settings | options)


def partial_of(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


@pytest.fixture(scope="module")
def uninterrupted(model: Path, token_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run without an interruption writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(model, out, token_rows)
    return contents(out)


def boundaries(model: Path, token_rows: Path, out: Path, notes: Path, every: int) -> Iterator[tuple[int, int]]:
    """(boundary, exit code) of runs killed at changes of the disk of every kind, and of one behind the last.

    Between the first and the last ones, which begin and end a run, `every`-th is taken.
    """
    found = boundaries_of(lambda: run(model, out, token_rows), notes)
    shutil.rmtree(out)
    chosen = [*found[:ENDS], *found[ENDS:-ENDS:every], *found[-ENDS:]]
    for boundary in (*chosen, found[-1] + 1000):

        def work(at: int = boundary) -> None:
            kill_at(at)
            run(model, out, token_rows)

        yield boundary, in_child(work)


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_changes_of_the_disk(
    every: int, model: Path, token_rows: Path, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    """Wherever a run is killed, the same call ends in the same bytes, and leaves no other file behind.

    `make slow` kills it at all of these places.
    """
    (tmp_path / "runs").mkdir()
    out, resumed, killed = tmp_path / "runs" / "out", 0, 0
    for boundary, code in boundaries(model, token_rows, out, tmp_path / "notes", every):
        killed += code == KILLED
        resumed += units_done(partial_of(out)) > 0
        if out.exists() and code == KILLED:
            with raises("output-exists", where=out):  # only cleaning up was left
                run(model, out, token_rows)
        elif code == KILLED:
            run(model, out, token_rows)
        assert contents(out) == uninterrupted, boundary
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        shutil.rmtree(out)
    assert code == 0
    assert killed > 30 / every + ENDS
    assert resumed > 15 / every + ENDS / 2


def test_killed_again_and_again(model: Path, token_rows: Path, uninterrupted: dict[str, bytes], tmp_path: Path) -> None:
    """A run that is killed every 25 and more changes of the disk still ends, in the same bytes."""
    out, step, tries = tmp_path / "out", 25, 0

    def work() -> None:
        kill_at(step)
        run(model, out, token_rows)

    while (code := in_child(work)) == KILLED and not out.exists():
        tries += 1
        step += 2  # each start has changes of its own
        assert tries < 50
    if code == KILLED:
        with raises("output-exists", out):  # only cleaning up was left
            run(model, out, token_rows)
    else:
        assert code == 0
    assert tries > 2
    assert contents(out) == uninterrupted
    digests: dict[str, str] = json.loads((out / RECORD_FILE).read_text(encoding="utf-8"))["files"]
    assert len(digests) == 3
    assert digests == file_digests(out, list(digests))


def stop_in_layer(monkeypatch: pytest.MonkeyPatch, layer: int, error: BaseException) -> None:
    """Raise `error` when decoder layer `layer` is to be run."""

    def stopping(run: LayerPass, tensors: Any, roundings: Any) -> Any:
        if run.index == layer:
            raise error
        return propagate(run, tensors, roundings)

    monkeypatch.setattr(snugfit.quantization.unit_work, "propagate", stopping)


def command(model: Path, out: Path, token_rows: Path, *options: str) -> Any:
    given = ["quantize", model, "-r", RECIPE, "-o", out, "--dataset", token_rows, "--device", "cpu"]
    batch = ["--tokens-per-batch", "96", "--max-shard-size", "0.00003"]
    return CliRunner().invoke(app, [str(argument) for argument in (*given, *batch, *options)])


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), ""),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "system-error"),
        (Unfinished("lost the network.", code="hub-unreachable", where="org/name"), "hub-unreachable"),
    ],
    ids=["Ctrl-C", "disk full", "network"],
)
def test_stopped_and_resumed(
    error: BaseException,
    code: str,
    model: Path,
    token_rows: Path,
    uninterrupted: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C and a full disk say what is kept; after them, and a lost network, the same command resumes."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_in_layer(patch, 1, error)
        stopped = command(model, out, token_rows)
    assert failed_with(stopped, code) if code else stopped.exit_code == 130
    if not isinstance(error, UserError):
        assert f"{partial_of(out)} keeps 1 layer" in stopped.stderr
    assert not out.exists()
    again = command(model, out, token_rows)
    assert again.exit_code == 0, again.stderr
    assert "after 1 of 2 layers" in again.stderr
    assert contents(out) == uninterrupted
    record = json.loads((out / RECORD_FILE).read_text(encoding="utf-8"))
    assert record["resumed"] == {"units": 2, "differences": []}
    assert len(record["tensors"]) == len({tensor["name"] for tensor in record["tensors"]})


def stopped_after(model: Path, out: Path, token_rows: Path, layer: int) -> None:
    """An unfinished run at `out`, stopped in layer `layer`."""
    with pytest.MonkeyPatch.context() as patch:
        stop_in_layer(patch, layer, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(model, out, token_rows)


def test_records_of_both_halves_agree(model: Path, token_rows: Path, tmp_path: Path) -> None:
    """The record of a run that was interrupted says the same of every tensor as that of a run that was not."""
    one = run(model, tmp_path / "one", token_rows)
    stopped_after(model, tmp_path / "two", token_rows, 1)
    two = run(model, tmp_path / "two", token_rows)
    assert two.tensors == one.tensors
    assert two.files == one.files


@pytest.mark.parametrize(
    ("options", "code", "key"),
    [
        ({"tokens_per_batch": 48}, "machine-differs", "tokens per batch"),
        ({"num_samples": 3}, "run-differs", "samples"),
        ({"max_shard_size": 10**9}, "run-differs", "weight files"),
    ],
    ids=["batch", "samples", "shards"],
)
def test_other_settings_are_refused(
    options: dict[str, Any], code: str, key: str, *, model: Path, token_rows: Path, tmp_path: Path
) -> None:
    """A run that would end in other bytes does not resume an unfinished one, and says what differs."""
    out = tmp_path / "out"
    stopped_after(model, out, token_rows, 1)
    with raises(code, where=partial_of(out)) as caught:
        run(model, out, token_rows, **options)
    assert key in caught.value.what
    assert units_done(partial_of(out)) == 2


def test_another_source_is_refused(model: Path, token_rows: Path, tmp_path: Path) -> None:
    """Weight files that changed since the run began are not mixed with what was made of the old ones."""
    source, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(model, source)
    stopped_after(source, out, token_rows, 1)
    os.utime(next(source.glob("*.safetensors")), ns=(1, 1))
    with raises("run-differs", where=partial_of(out)) as caught:
        run(source, out, token_rows)
    assert "source files" in caught.value.what


@pytest.mark.parametrize("key", ["versions", "hardware"])
def test_another_machine_needs_force_resume(
    key: str, model: Path, token_rows: Path, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    """Other library versions or hardware are refused; with `force_resume` the run resumes and records them."""
    out = tmp_path / "out"
    stopped_after(model, out, token_rows, 1)
    file = partial_of(out) / WORK_NAME / "run.json"
    identity = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(identity | {key: {"torch": "1.0"}}), encoding="utf-8")
    with raises("machine-differs", where=partial_of(out)) as caught:
        run(model, out, token_rows)
    assert key in caught.value.what
    record = run(model, out, token_rows, force_resume=True)
    assert record.resumed == {"units": 2, "differences": [key]}
    assert contents(out) == uninterrupted


def test_another_batch_with_force_resume(model: Path, token_rows: Path, tmp_path: Path) -> None:
    """Hidden states are stored by sample: with `force_resume` a run may resume with another batch."""
    out = tmp_path / "out"
    stopped_after(model, out, token_rows, 1)
    record = run(model, out, token_rows, tokens_per_batch=48, force_resume=True)
    assert record.resumed == {"units": 2, "differences": ["tokens_per_batch"]}


def test_restart(model: Path, token_rows: Path, uninterrupted: dict[str, bytes], tmp_path: Path) -> None:
    """`restart` removes an unfinished run, whatever its settings were."""
    out = tmp_path / "out"
    stopped_after(model, out, token_rows, 1)
    record = run(model, out, token_rows, restart=True)
    assert record.resumed is None
    assert contents(out) == uninterrupted


def spoil_tensors(partial: Path) -> None:
    """Other bytes in the middle of each weight file."""
    for file in partial.glob("*.safetensors"):
        with file.open("r+b") as stream:
            stream.seek(file.stat().st_size // 2)
            stream.write(b"\xff" * 64)


def spoil_states(partial: Path) -> None:
    for file in (partial / WORK_NAME).glob("states-*"):
        file.write_bytes(b"\0" * file.stat().st_size)


def truncate_weights(partial: Path) -> None:
    for file in partial.glob("*.safetensors"):
        os.truncate(file, 100)


def spoil_entry(partial: Path) -> None:
    (partial / WORK_NAME / "unit-00001.json").write_bytes(b"{")


@pytest.mark.parametrize(
    "spoil", [spoil_tensors, spoil_states, truncate_weights, spoil_entry], ids=lambda spoil: spoil.__name__
)
def test_what_a_power_cut_loses_is_done_again(
    spoil: Callable[[Path], None], model: Path, token_rows: Path, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    """Files that are not what an unfinished run says it wrote are written again, and the result is the same."""
    out = tmp_path / "out"
    stopped_after(model, out, token_rows, 1)
    spoil(partial_of(out))
    run(model, out, token_rows)
    assert contents(out) == uninterrupted


@pytest.mark.parametrize("damage", ["missing", "empty", "garbage"])
def test_a_run_without_its_identity_is_refused(
    damage: str, model: Path, token_rows: Path, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    """Finished units of an unknown run are neither used nor removed silently; `restart` removes them."""
    out = tmp_path / "out"
    stopped_after(model, out, token_rows, 1)
    identity = partial_of(out) / WORK_NAME / "run.json"
    if damage == "missing":
        identity.unlink()
    else:
        identity.write_bytes(b"" if damage == "empty" else b"[1, 2]")
    kept = contents(partial_of(out))
    with raises("run-damaged", where=identity) as caught:
        run(model, out, token_rows)
    assert isinstance(caught.value, Unfinished)
    assert "`restart`" in caught.value.remedy
    assert contents(partial_of(out)) == kept
    assert run(model, out, token_rows, restart=True).resumed is None
    assert contents(out) == uninterrupted


def test_samples_of_many_lengths(model: Path, tmp_path: Path) -> None:
    """Samples of unequal length, which are padded in their batches, also resume to the same bytes."""
    rows = tmp_path / "rows.jsonl"
    generator = torch.Generator().manual_seed(3)
    lengths = (5, 64, 65, 130, 131, 200, 7, 100)
    ids = [torch.randint(3, 64, (length,), generator=generator).tolist() for length in lengths]
    rows.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids), encoding="utf-8")
    run(model, tmp_path / "one", rows)
    stopped_after(model, tmp_path / "two", rows, 1)
    run(model, tmp_path / "two", rows)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_a_recipe_without_samples_resumes_too(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without samples there are no hidden states to keep, and finished layers are still not done again."""
    seen = []

    def stop(*arguments: Any) -> Any:
        seen.append(arguments)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return choose(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(snugfit.quantization.unit_work, "choose", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize(model, "fp8-dynamic", output_dir=tmp_path / "out", device="cpu")
    record = quantize(model, "fp8-dynamic", output_dir=tmp_path / "out", device="cpu")
    assert record.resumed is not None
    quantize(model, "fp8-dynamic", output_dir=tmp_path / "one", device="cpu")
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
