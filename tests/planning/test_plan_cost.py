"""The dry run of a plan: it accepts what a run accepts, and says what it does not know."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from helpers.errors import failed_with, raises
from helpers.memory import leave_free
from helpers.ranks import in_ranks
from helpers.tiny_families import FAMILIES
from helpers.tiny_tokenizer import add_tokenizer
from snugfit.cli.app import app
from snugfit.planning import plan_cost, scoring_cost
from snugfit.planning.make_plan import plan
from snugfit.planning.plan_cost import estimate_plan

MakeTiny = Callable[..., Path]


def write_rows(file: Path, seed: int, count: int = 16) -> Path:
    """Rows of 64 token ids."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, 60, (count, 64), generator=generator).tolist()
    file.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    """A budget, and rows to score and to measure on, as arguments of `plan`."""
    return {
        "bits_per_weight": 15.0,
        "menu": ("nvfp4", "fp8-dynamic"),
        "dataset": write_rows(tmp_path / "rows.jsonl", 1),
        "held_out": write_rows(tmp_path / "held-out.jsonl", 2),
        "max_seq_length": 64,
        "num_tokens": 128,
        "device": "cpu",
    }


def command(model: Path, given: dict[str, Any]) -> list[str]:
    """The dry run with these arguments on the command line."""
    named = {**given, "menu": ",".join(given["menu"])}
    found = [part for name, value in named.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return ["plan", str(model), "--dry-run", *found]


@pytest.mark.parametrize("family", ["gpt_neox", "qwen3_5_text"])
def test_layers_that_have_no_cache_are_timed(family: str, make_tiny: MakeTiny, options: dict[str, Any]) -> None:
    """Layers without keys and values that calibration sees are timed without an FP8 cache, as they are scored."""
    found = estimate_plan(make_tiny(family, **FAMILIES[family]), **options)
    assert set(found.seconds) == {"scoring", "search", "proof"}


def test_processes_are_told_what_one_foresees(
    make_tiny: MakeTiny, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several processes the main one times a layer by itself, and the record of all has what it foresees."""
    monkeypatch.setattr(plan_cost, "ROUGH_SECONDS", 0.0)
    model = make_tiny()

    def work(_: int) -> None:
        found = plan(model, output_dir=tmp_path / "out", prove=False, **options)
        assert found.processes == 2
        assert set(found.foreseen) == {"scoring", "search", "proof"}

    assert in_ranks(2, work) == [0, 0]


def test_a_dry_run_prints_one_json_document(make_tiny: MakeTiny, options: dict[str, Any]) -> None:
    """With `--json` stdout has the estimate as one document, and the line for people is on stderr."""
    result = CliRunner().invoke(app, [*command(make_tiny(), options), "--json"])
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["mixes"] > 3
    assert document["scoring_seconds"] > 0
    assert "planning takes about" in result.stderr


def test_times_are_unknown_where_a_layer_cannot_be_tried(
    make_tiny: MakeTiny, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the device while a layer is timed leaves bytes and passes, and no times: nothing is made up."""

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(scoring_cost, "Rates", fail)
    found = estimate_plan(make_tiny(), **options)
    assert found.seconds == {}
    assert found.memory_bytes > 0
    assert "an unknown time" in found.line()


def test_a_layer_is_not_timed_where_memory_does_not_suffice(
    make_tiny: MakeTiny, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With too little memory the dry run shows bytes, and refuses before it runs anything."""
    timed: list[bool] = []

    def estimated(*arguments: Any, original: Any = plan_cost.estimate_prepared, **given: Any) -> Any:
        timed.append(given["timed"])
        return original(*arguments, **given)

    monkeypatch.setattr(plan_cost, "estimate_prepared", estimated)
    leave_free(monkeypatch, 1 << 20)
    result = CliRunner().invoke(app, command(make_tiny(), options))
    assert "planning takes" in result.stdout
    assert failed_with(result, "memory-insufficient", "")
    assert timed == [False]


def test_remedies_of_the_proof_name_the_options_of_plan(
    make_tiny: MakeTiny, options: dict[str, Any], tmp_path: Path
) -> None:
    """What is wrong with the proof's contexts is said by the name that `plan` has for them."""
    model = make_tiny()
    add_tokenizer(model)
    text = tmp_path / "text.txt"
    text.write_text("a text of many words " * 200, encoding="utf-8")
    with raises("option-invalid", where="max_tokens") as error:
        estimate_plan(model, timed=False, max_tokens=32, **{**options, "held_out": text})
    assert "`held_out_contexts`" in error.value.remedy
