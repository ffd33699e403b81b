"""Hidden states that the device holds: the same bytes as with files, and a run resumes where they were saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import snugfit.quantization.unit_work
from conftest import MakeTiny
from helpers.killed import KILLED, boundaries_of, contents, in_child, kill_at
from helpers.ranks import in_ranks
from helpers.tiny_families import random_rows, write_rows
from helpers.tiny_mixtures import make_mixture
from snugfit.errors import UserError
from snugfit.quantization import states
from snugfit.quantization.estimate import Estimate
from snugfit.quantization.layer.propagate import propagate
from snugfit.quantization.quantize import quantize
from snugfit.records.quantize import QuantizeRecord

OPTIONS: dict[str, Any] = {"device": "cpu", "tokens_per_batch": 130, "min_tokens_per_expert": 0}
NEVER = 1e9
UNITS = 4  # three layers, and what is outside them


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of several lengths: batches are padded."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", random_rows([64] * 12 + [40, 33] * 4))


@pytest.fixture(scope="module")
def llama(make_tiny: MakeTiny) -> Path:
    """Three layers."""
    return make_tiny("llama", num_hidden_layers=3)


def hold(patch: pytest.MonkeyPatch, saved_every: float) -> None:
    """Hold the states in memory, and save them as often."""
    patch.setattr(Estimate, "with_states", lambda self, *_: self)
    patch.setattr(states, "SAVED_EVERY", saved_every)


def fail_at_third_layer(patch: pytest.MonkeyPatch) -> None:
    """Let the third layer show an error."""
    calls = 0

    def fails(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise UserError("not finite.", code="activations-not-finite", where="layer 2", remedy="Use bfloat16.")
        return propagate(*arguments)

    patch.setattr(snugfit.quantization.unit_work, "propagate", fails)


def run(model: Path, out: Path, rows: Path, effort: str | None = None, **more: Any) -> QuantizeRecord:
    recipe = "nvfp4-fp8-hybrid" if effort else "nvfp4-fp8-hybrid-four-over-six"
    return quantize(model, recipe, dataset=[rows], effort=effort, output_dir=out, **OPTIONS | more)


@pytest.mark.parametrize(("effort", "saved_every"), [(None, 0), ("fast", NEVER), ("good", NEVER)])
def test_the_bytes_of_files(
    effort: str | None, saved_every: float, llama: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """States in memory give the files of states on the disk, however often they are saved."""
    run(llama, tmp_path / "files", rows, effort)
    hold(monkeypatch, saved_every)
    run(llama, tmp_path / "held", rows, effort)
    assert contents(tmp_path / "held") == contents(tmp_path / "files")


@pytest.mark.parametrize("size", [None, 3])
def test_experts_and_processes(size: int | None, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for a mixture, whole or in pieces, whose states several processes hold."""
    model = make_mixture("qwen3_moe", tmp_path / "model")
    options: dict[str, Any] = OPTIONS | {"dataset": [rows], "effort": "fast", "experts_per_group": size}
    quantize(model, "nvfp4-moe", output_dir=tmp_path / "files", **options)
    hold(monkeypatch, 0)
    assert in_ranks(2, lambda _: quantize(model, "nvfp4-moe", output_dir=tmp_path / "held", **options)) == [0, 0]
    assert contents(tmp_path / "held") == contents(tmp_path / "files")


@pytest.mark.parametrize(("saved_every", "kept"), [(0, True), (NEVER, False)])
def test_killed_at_changes_of_the_disk(
    saved_every: float, kept: bool, llama: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it is killed, the same call ends in the same bytes; it resumes behind states that were saved."""
    run(llama, tmp_path / "files", rows)
    hold(monkeypatch, saved_every)
    found = boundaries_of(lambda: run(llama, tmp_path / "out" / "x", rows), tmp_path / "notes")
    resumed = 0
    for number, boundary in enumerate(found[len(found) // 4 :: max(1, len(found) // 5)]):
        out = tmp_path / str(number) / "x"
        out.parent.mkdir()

        def work(at: int = boundary, where: Path = out) -> None:
            kill_at(at)
            run(llama, where, rows)

        assert in_child(work) == KILLED
        if not out.exists():
            record = run(llama, out, rows)
            resumed += record.resumed is not None and 1 < record.resumed["units"] < UNITS
        assert contents(out) == contents(tmp_path / "files")
    assert (resumed > 0) == kept


@pytest.mark.parametrize(("saved_every", "code"), [(0, "kept"), (NEVER, "removed")])
def test_what_an_error_keeps(
    saved_every: float, code: str, llama: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that only a layer shows keeps what can be resumed, and says so; without saved states nothing stays."""
    hold(monkeypatch, saved_every)
    fail_at_third_layer(monkeypatch)
    with pytest.raises(UserError) as caught:
        run(llama, tmp_path / "out", rows)
    assert ("keeps the 2 finished layers" in caught.value.remedy) == (code == "kept")
    assert (tmp_path / "out.partial").exists() == (code == "kept")


@pytest.mark.parametrize("held", [True, False])
def test_resumes_where_there_is_another_room(
    held: bool, llama: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run goes on in files behind layers whose states were held, and the other way round, with the same bytes."""
    run(llama, tmp_path / "files", rows)
    with monkeypatch.context() as patch:
        if held:
            hold(patch, 0)
        fail_at_third_layer(patch)
        with pytest.raises(UserError):
            run(llama, tmp_path / "out", rows)
    if not held:
        hold(monkeypatch, 0)
    record = run(llama, tmp_path / "out", rows)
    assert record.resumed is not None
    assert record.resumed["units"] == UNITS - 1
    assert contents(tmp_path / "out") == contents(tmp_path / "files")
