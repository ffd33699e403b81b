"""The option `effort`: which rules follow it, its default, what it excludes, and what is recorded of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from conftest import MakeTiny
from helpers.errors import failed_with, raises
from helpers.tiny_families import random_rows, write_rows
from snugfit.cli.app import app
from snugfit.formats.spec import EFFORT
from snugfit.methods import kernels
from snugfit.quantization.collect import collect_statistics
from snugfit.quantization.quantize import plan_quantization, quantize
from snugfit.recipes.recipe import parse_recipe
from snugfit.records.statistics_file import STATISTICS_FILE

WIDE = {"hidden_size": 128, "intermediate_size": 256}
NEITHER = ("nvfp4-four-over-six", "nvfp4-absmax", "fp8-dynamic", "int4-w4a16-absmax", "mxfp4-absmax")


@pytest.fixture
def model(make_tiny: MakeTiny) -> Path:
    """A tiny llama whose sides every 4-bit format divides."""
    return make_tiny("llama", **WIDE)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples enough to hold some of them out."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", random_rows((48,) * 8, stop=64))


@pytest.fixture
def statistics(model: Path, rows: Path, tmp_path: Path) -> Path:
    """Statistics of the model."""
    collect_statistics(model, output_dir=tmp_path / "statistics", dataset=[rows], device="cpu")
    return tmp_path / "statistics" / STATISTICS_FILE


@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4a16", "mxfp4", "int4-w4a16", "nvfp4-fp8-hybrid", "fp8-int4"])
def test_the_default_is_good(recipe: str, model: Path, rows: Path) -> None:
    """A recipe that names no scale rule follows `good` unless asked otherwise, and says so before the run."""
    for effort in (None, "fast", "good", "best"):
        prepared = plan_quantization(model, recipe, dataset=[rows], device="cpu", effort=effort)
        assert prepared.effort == prepared.identity()["effort"] == (effort or "good")
        assert not any("effort changes nothing" in note for note in prepared.notes)
    quantized = [record for record in prepared.records() if record.scale_rule]
    assert {record.scale_rule for record in quantized} == {EFFORT}  # FP8 along with the others


def test_statistics_make_it_fast(model: Path, statistics: Path) -> None:
    """Statistics in place of samples leave `fast`, which is the default then; more is refused."""
    for effort in (None, "fast"):
        prepared = plan_quantization(model, "nvfp4", statistics=statistics, device="cpu", effort=effort)
        assert prepared.effort == "fast"
    for effort in ("good", "best"):
        with raises("option-conflict", "effort") as caught:
            plan_quantization(model, "nvfp4", statistics=statistics, device="cpu", effort=effort)
        assert "`statistics`" in caught.value.remedy


@pytest.mark.parametrize("recipe", NEITHER)
def test_a_recipe_that_names_its_scale_rules_has_no_effort(recipe: str, model: Path, rows: Path) -> None:
    """The effort is None in such a run's identity; one that is asked for all the same gives a note, not an error."""
    options: dict[str, Any] = {"dataset": [rows], "device": "cpu"}
    plain = plan_quantization(model, recipe, **options)
    asked = plan_quantization(model, recipe, effort="best", **options)
    assert plain.effort is asked.effort is plain.identity()["effort"] is None
    assert plain.identity() == asked.identity()
    (note,) = set(asked.notes) - set(plain.notes)
    assert "effort" in note


@pytest.mark.parametrize("recipe", ["nvfp4", "fp8-dynamic"])
@pytest.mark.parametrize("effort", ["most", "", "Good", "effort"])
def test_an_unknown_effort(recipe: str, effort: str, model: Path, rows: Path, tmp_path: Path) -> None:
    """Another value is refused at its place, whether or not the recipe would follow it."""
    with raises("option-invalid", "effort") as caught:
        quantize(model, recipe, output_dir=tmp_path / "out", dataset=[rows], effort=effort)
    assert all(name in caught.value.remedy for name in ("fast", "good", "best"))
    assert not (tmp_path / "out").exists()


def test_the_record_says_what_was_done(model: Path, rows: Path, tmp_path: Path) -> None:
    """A record has the effort that was followed, and for each weight the rule that chose its scales."""
    options: dict[str, Any] = {"dataset": [rows], "device": "cpu"}
    fast = quantize(model, "nvfp4-fp8-hybrid", output_dir=tmp_path / "fast", effort="fast", **options)
    assert fast.arguments["effort"] == "fast"
    rules = {record.scale_rule for record in fast.tensors if record.format == "nvfp4"}
    assert rules
    assert EFFORT not in rules
    exact = quantize(model, "nvfp4-four-over-six", output_dir=tmp_path / "exact", **options)
    assert exact.arguments["effort"] is None
    assert {record.scale_rule for record in exact.tensors if record.format == "nvfp4"} == {"four-over-six"}


def test_a_mixed_recipe_keeps_its_exact_rules(model: Path, rows: Path, tmp_path: Path) -> None:
    """Beside a rule that follows the effort, one that names its scale rule gets exactly that."""
    text = "name: a\nrules:\n- {role: mlp, format: nvfp4, scale_rule: absmax}\n- {role: linear, format: mxfp4}\n"
    recipe = parse_recipe(text, where="a.yaml")
    out = tmp_path / "out"
    record = quantize(model, recipe, output_dir=out, dataset=[rows], device="cpu", effort="fast")
    assert {one.scale_rule for one in record.tensors if one.format == "nvfp4"} == {"absmax"}
    assert {one.scale_rule for one in record.tensors if one.format == "mxfp4"} == {"weighted"}
    assert record.arguments["effort"] == "fast"


def test_another_effort_does_not_resume(model: Path, rows: Path, tmp_path: Path) -> None:
    """An unfinished run of one effort is not continued by another, nor by its exact recipe's name."""
    options: dict[str, Any] = {"dataset": [rows], "device": "cpu"}
    good, fast = (plan_quantization(model, "nvfp4", effort=effort, **options) for effort in ("good", "fast"))
    differences = {key for key, value in good.identity().items() if fast.identity()[key] != value}
    assert {"effort", "way"} <= differences <= {"effort", "way", "held_out", "samples"}


def test_effort_on_the_command_line(model: Path, rows: Path, statistics: Path, tmp_path: Path) -> None:
    """`--effort` takes the three names; a conflict and a note name it as the command line does."""
    given = ["quantize", str(model), "--dry-run", "--device", "cpu"]
    given_rows, stored = ["--dataset", str(rows)], ["--statistics", str(statistics)]
    runner = CliRunner()
    assert runner.invoke(app, [*given, *given_rows, "-r", "nvfp4", "--effort", "best"]).exit_code == 0
    assert runner.invoke(app, [*given, *given_rows, "-r", "nvfp4", "--effort", "most"]).exit_code == 2
    noted = runner.invoke(app, [*given, *given_rows, "-r", "fp8-dynamic", "--effort", "best"])
    assert noted.exit_code == 0
    assert "effort" in noted.stderr
    refused = runner.invoke(app, [*given, *stored, "-r", "nvfp4", "--effort", "good"])
    assert failed_with(refused, "option-conflict", "--effort", "--statistics")


def test_a_kernel_that_was_done_without_is_reported(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run says which kernels gave other bits or did not start, because it was slower for it."""
    monkeypatch.setattr(kernels, "_problems", {"feedback e2m1: other bits": None})
    ran = CliRunner().invoke(app, ["quantize", str(model), "-r", "mxfp4-absmax", "-o", str(tmp_path / "out")])
    assert ran.exit_code == 0, ran.output
    assert "feedback e2m1: other bits" in " ".join(ran.output.split())
