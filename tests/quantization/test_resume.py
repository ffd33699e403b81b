"""A run that is stopped anywhere goes on where it was and ends in the same bytes."""

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

import snugfit.quantization.run
from conftest import MakeTiny
from helpers.killed import KILLED, contents, in_child
from snugfit.cli.app import app
from snugfit.errors import Unfinished, UserError
from snugfit.quantization.layer import calibrate as calibrate_layer
from snugfit.quantization.layer import quantize_unit
from snugfit.quantization.quantize import RECORD_FILE, quantize_checkpoint
from snugfit.storage.staging import WORK_NAME, units_done

RECIPE = "nvfp4-fp8-hybrid-fp8kv"
# everything that changes the disk
WRITES: list[tuple[Any, str]] = [
    (os, "pwrite"),
    (os, "ftruncate"),
    (os, "fsync"),
    (os, "unlink"),
    (os, "rmdir"),
    (Path, "write_text"),
    (Path, "replace"),
    (Path, "rename"),
    (Path, "mkdir"),
    (Path, "unlink"),
    (shutil, "copyfile"),
]


@pytest.fixture(scope="module")
def model(make_tiny: MakeTiny) -> Path:
    """Two layers in several weight files."""
    return make_tiny("llama", num_hidden_layers=2, max_shard_size="60KB")


def quantize(model: Path, out: Path, token_rows: Path, **options: Any) -> Any:
    settings: dict[str, Any] = {"text": [token_rows], "tokens_per_batch": 96, "max_shard_bytes": 30_000}
    return quantize_checkpoint(model, out, RECIPE, device="cpu", **(settings | options))


def partial_of(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


@pytest.fixture(scope="module")
def whole(model: Path, token_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run in one piece writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    quantize(model, out, token_rows)
    return contents(out)


def kill_at(boundary: int) -> None:
    """From now on the process dies at its `boundary`-th change of the disk, before it happens."""
    count = 0

    def guarded(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == boundary:
                os._exit(KILLED)
            return real(*arguments, **options)

        return call

    for owner, name in WRITES:
        setattr(owner, name, guarded(getattr(owner, name)))


def boundaries(model: Path, token_rows: Path, out: Path) -> Iterator[tuple[int, int]]:
    """(boundary, exit code) of runs killed at the first change of the disk, the second, and so on to the end."""
    boundary, code = 0, KILLED
    while code == KILLED:
        boundary += 1

        def run(at: int = boundary) -> None:
            kill_at(at)
            quantize(model, out, token_rows)

        code = in_child(run)
        yield boundary, code


def test_killed_at_every_change_of_the_disk(
    model: Path, token_rows: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """Wherever a run is killed, the same command ends in the same bytes, and nothing of it is left beside."""
    out, resumed, last = tmp_path / "out", 0, 0
    for boundary, code in boundaries(model, token_rows, out):
        last = boundary
        resumed += units_done(partial_of(out)) > 0
        if out.exists() and code == KILLED:
            with pytest.raises(UserError, match="exists already"):  # all was done but tidying up
                quantize(model, out, token_rows)
        elif code == KILLED:
            quantize(model, out, token_rows)
        assert contents(out) == whole, boundary
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        shutil.rmtree(out)
    assert code == 0
    assert last > 60
    assert resumed > 40


def test_killed_again_and_again(model: Path, token_rows: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """A run that is killed at every seventh change of the disk, over and over, still ends, in the same bytes."""
    out, step, tries = tmp_path / "out", 25, 0

    def run() -> None:
        kill_at(step)
        quantize(model, out, token_rows)

    while (code := in_child(run)) == KILLED:
        tries += 1
        step += 2  # each start has changes of its own
        assert tries < 50
    assert code == 0
    assert tries > 2
    assert contents(out) == whole


def stop_in_layer(monkeypatch: pytest.MonkeyPatch, layer: int, error: BaseException) -> None:
    """`error` comes once decoder layer `layer` is to be run."""
    real = calibrate_layer

    def calibrate(*arguments: Any) -> Any:
        if arguments[2] == layer:
            raise error
        return real(*arguments)

    monkeypatch.setattr(snugfit.quantization.run, "calibrate", calibrate)


def command(model: Path, out: Path, token_rows: Path, *options: str) -> Any:
    given = ["quantize", model, "-r", RECIPE, "-o", out, "--text", token_rows, "--device", "cpu"]
    batch = ["--tokens-per-batch", "96", "--max-shard-size", "0.00003"]
    return CliRunner().invoke(app, [str(argument) for argument in (*given, *batch, *options)])


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (KeyboardInterrupt(), 130, "stopped; "),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 2, os.strerror(errno.ENOSPC)),
        (Unfinished("lost the network.", where="org/name"), 2, "lost the network."),
    ],
    ids=["Ctrl-C", "disk full", "network"],
)
def test_stopped_and_gone_on(
    error: BaseException,
    code: int,
    says: str,
    model: Path,
    token_rows: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C, a full disk and a lost network say what is kept; the same command goes on and ends in the same bytes."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_in_layer(patch, 1, error)
        stopped = command(model, out, token_rows)
    assert stopped.exit_code == code
    assert says in stopped.stderr
    if not isinstance(error, UserError):
        assert f"{partial_of(out)} keeps 1 layer" in stopped.stderr
    assert not out.exists()
    again = command(model, out, token_rows)
    assert again.exit_code == 0, again.stderr
    assert "going on after 1 of 2 layers" in again.stderr
    assert contents(out) == whole
    record = json.loads((out / RECORD_FILE).read_text(encoding="utf-8"))
    assert record["resumed"] == {"units": 2, "differences": []}
    assert len(record["tensors"]) == len({tensor["name"] for tensor in record["tensors"]})


def stopped_after(model: Path, out: Path, token_rows: Path, layer: int) -> None:
    """An unfinished run at `out`, stopped in layer `layer`."""
    with pytest.MonkeyPatch.context() as patch:
        stop_in_layer(patch, layer, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            quantize(model, out, token_rows)


def test_records_of_both_halves_agree(model: Path, token_rows: Path, tmp_path: Path) -> None:
    """The record of a run in two pieces says of every tensor what that of a run in one piece says."""
    one = quantize(model, tmp_path / "one", token_rows)
    stopped_after(model, tmp_path / "two", token_rows, 1)
    two = quantize(model, tmp_path / "two", token_rows)
    assert two.tensors == one.tensors
    assert two.files == one.files


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"tokens_per_batch": 48}, "tokens per batch"),
        ({"rows": 3}, "rows"),
        ({"max_shard_bytes": 10**9}, "weight files"),
    ],
    ids=["batch", "rows", "shards"],
)
def test_another_command_is_refused(
    options: dict[str, Any], key: str, model: Path, token_rows: Path, tmp_path: Path
) -> None:
    """A run that would end in other bytes does not go on from an unfinished one, and says what differs."""
    out = tmp_path / "out"
    stopped_after(model, out, token_rows, 1)
    with pytest.raises(UserError, match=key):
        quantize(model, out, token_rows, **options)
    assert units_done(partial_of(out)) == 2


def test_another_source_is_refused(model: Path, token_rows: Path, tmp_path: Path) -> None:
    """Weights that were touched since the run began are not mixed with what was made of the old ones."""
    source, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(model, source)
    stopped_after(source, out, token_rows, 1)
    os.utime(next(source.glob("*.safetensors")), ns=(1, 1))
    with pytest.raises(UserError, match="source files"):
        quantize(source, out, token_rows)


@pytest.mark.parametrize("key", ["versions", "hardware"])
def test_another_machine_is_refused_or_asked_for(
    key: str, model: Path, token_rows: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """Other library versions or hardware are refused with what differs; asked for, the run goes on and records it."""
    out = tmp_path / "out"
    stopped_after(model, out, token_rows, 1)
    file = partial_of(out) / WORK_NAME / "run.json"
    identity = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(identity | {key: {"torch": "1.0"}}), encoding="utf-8")
    with pytest.raises(UserError, match=key):
        quantize(model, out, token_rows)
    record = quantize(model, out, token_rows, resume_anyway=True)
    assert record.resumed == {"units": 2, "differences": [key]}
    assert contents(out) == whole


def test_another_batch_can_be_asked_for(model: Path, token_rows: Path, tmp_path: Path) -> None:
    """Hidden states lie by row: a run may go on with another batch where that is asked for."""
    out = tmp_path / "out"
    stopped_after(model, out, token_rows, 1)
    record = quantize(model, out, token_rows, tokens_per_batch=48, resume_anyway=True)
    assert record.resumed == {"units": 2, "differences": ["tokens_per_batch"]}


def test_restart(model: Path, token_rows: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """--restart forgets an unfinished run, whatever it was."""
    out = tmp_path / "out"
    stopped_after(model, out, token_rows, 1)
    record = quantize(model, out, token_rows, restart=True)
    assert record.resumed is None
    assert contents(out) == whole


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


def spoil_identity(partial: Path) -> None:
    (partial / WORK_NAME / "run.json").write_bytes(b"")


@pytest.mark.parametrize(
    "spoil", [spoil_tensors, spoil_states, truncate_weights, spoil_entry, spoil_identity], ids=lambda f: f.__name__
)
def test_what_a_power_cut_loses_is_done_again(
    spoil: Callable[[Path], None], model: Path, token_rows: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """Files that are not what an unfinished run says it wrote are made anew, and the result is right."""
    out = tmp_path / "out"
    stopped_after(model, out, token_rows, 1)
    spoil(partial_of(out))
    quantize(model, out, token_rows)
    assert contents(out) == whole


def test_rows_of_many_lengths(model: Path, tmp_path: Path) -> None:
    """Ragged rows, which are padded in their batches, also go on to the same bytes."""
    rows = tmp_path / "rows.jsonl"
    generator = torch.Generator().manual_seed(3)
    lengths = (5, 64, 65, 130, 131, 200, 7, 100)
    ids = [torch.randint(3, 64, (length,), generator=generator).tolist() for length in lengths]
    rows.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids), encoding="utf-8")
    quantize(model, tmp_path / "one", rows)
    stopped_after(model, tmp_path / "two", rows, 1)
    quantize(model, tmp_path / "two", rows)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_a_recipe_without_data_goes_on_too(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without rows there are no hidden states to keep, and finished layers are still not done again."""
    real, seen = quantize_unit, []

    def stop(*arguments: Any) -> Any:
        seen.append(arguments)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(snugfit.quantization.run, "quantize_unit", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(model, tmp_path / "out", "fp8-dynamic", device="cpu")
    record = quantize_checkpoint(model, tmp_path / "out", "fp8-dynamic", device="cpu")
    assert record.resumed is not None
    quantize_checkpoint(model, tmp_path / "one", "fp8-dynamic", device="cpu")
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
