"""How far input scales reach beyond the calibrated range: who decides it, what is written, and that nothing else is."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import snugfit.quantization.unit_work
from conftest import MakeTiny
from helpers.errors import failed_with, raises
from helpers.killed import KILLED, boundaries_of, contents, in_child, kill_at
from helpers.tiny_families import all_tensors, random_rows, write_rows
from helpers.tiny_mixtures import make_mixture
from snugfit.cli.app import app
from snugfit.evaluation.evaluated_model import open_model
from snugfit.formats.inputs import InputRounding
from snugfit.formats.spec import DEFAULT_INPUT_HEADROOM
from snugfit.model import emulate
from snugfit.quantization.collect import collect_statistics
from snugfit.quantization.commits import Commits
from snugfit.quantization.layer.propagate import propagate
from snugfit.quantization.quantize import plan_quantization, quantize
from snugfit.recipes.recipe import LoadedRecipe, parse_recipe
from snugfit.records.quantize import QuantizeRecord
from snugfit.records.statistics_file import STATISTICS_FILE

OPTIONS: dict[str, Any] = {"device": "cpu", "effort": "fast"}
SCALE = ".input_global_scale"


@pytest.fixture(scope="module")
def model(make_tiny: MakeTiny) -> Path:
    """A tiny llama."""
    return make_tiny("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples enough to hold some of them out."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", random_rows((48,) * 8, stop=60))


def rules(*lines: str) -> LoadedRecipe:
    """A recipe of these rules."""
    return parse_recipe("name: a\nrules:\n" + "".join(f"- {{{line}}}\n" for line in lines), where="a.yaml")


def made(folder: Path, model: Path, rows: Path, recipe: Any = "nvfp4", **options: Any) -> QuantizeRecord:
    """A run into a new folder."""
    return quantize(model, recipe, output_dir=folder, dataset=[rows], **OPTIONS | options)


def divisor(headroom: float, amax: float) -> np.float32:
    """The tensor of a file by hand: 6 * 448 / (headroom * amax) in fp32, as the reciprocal of a stable scale."""
    one = np.float32(1)
    scale = one / (one / np.float32(headroom * amax / 2688))
    return np.float32(one / scale)


def test_the_scale_that_is_written(model: Path, rows: Path, tmp_path: Path) -> None:
    """Each input scale is that of the largest calibrated input times the factor; the record has both numbers."""
    record = made(tmp_path / "out", model, rows, input_headroom=2.5)
    tensors = all_tensors(tmp_path / "out")
    quantized = [tensor for tensor in record.tensors if tensor.format == "nvfp4"]
    assert len(quantized) == 14
    for tensor in quantized:
        assert tensor.input_headroom == 2.5
        assert tensor.input_amax is not None
        written = tensors[tensor.name.removesuffix(".weight") + SCALE]
        assert written.item() == divisor(2.5, tensor.input_amax)
        assert written.item() == pytest.approx(2688 / (2.5 * tensor.input_amax), rel=1e-6)
    assert {t.input_headroom for t in record.tensors if t.format != "nvfp4"} == {None}
    assert record.arguments["input_headroom"] == 2.5


def test_nothing_else_changes(model: Path, rows: Path, tmp_path: Path) -> None:
    """Files of two factors have the same bytes in every other tensor; 1 and amax are the same, whole files."""
    for name, headroom in (("one", 1), ("amax", "amax"), ("four", 4.0)):
        made(tmp_path / name, model, rows, "nvfp4-fp8-hybrid-fp8kv", input_headroom=headroom)
    assert contents(tmp_path / "one") == contents(tmp_path / "amax")
    one, four = all_tensors(tmp_path / "one"), all_tensors(tmp_path / "four")
    assert one.keys() == four.keys()
    changed = {name for name in one if not torch.equal(one[name].view(torch.uint8), four[name].view(torch.uint8))}
    assert changed == {name for name in one if name.endswith(SCALE)}
    assert len(changed) == 6
    for name in changed:  # powers of two move no other bit
        assert one[name].item() == 4 * four[name].item()


def test_the_default(model: Path, rows: Path, tmp_path: Path) -> None:
    """Without a word it is DEFAULT_INPUT_HEADROOM, in the bytes and in the record."""
    record = made(tmp_path / "default", model, rows)
    made(tmp_path / "named", model, rows, input_headroom=DEFAULT_INPUT_HEADROOM)
    assert contents(tmp_path / "default") == contents(tmp_path / "named")
    assert record.arguments["input_headroom"] == DEFAULT_INPUT_HEADROOM


@pytest.mark.parametrize("recipe", ["nvfp4-four-over-six", "nvfp4-fp8-hybrid-absmax"])
def test_exact_recipes_keep_the_calibrated_range(recipe: str, model: Path, rows: Path, tmp_path: Path) -> None:
    """A recipe that names its scale rules has amax whatever the run asks for, and says that nothing changes."""
    plain = made(tmp_path / "plain", model, rows, recipe, effort=None)
    asked = made(tmp_path / "asked", model, rows, recipe, effort=None, input_headroom=3)
    assert contents(tmp_path / "plain") == contents(tmp_path / "asked")
    for record in (plain, asked):
        assert {t.input_headroom for t in record.tensors if t.format == "nvfp4"} == {1.0}
        assert record.arguments["input_headroom"] is None
    tensors = all_tensors(tmp_path / "plain")
    for tensor in plain.tensors:
        if tensor.input_amax is not None:
            assert tensors[tensor.name.removesuffix(".weight") + SCALE].item() == divisor(1, tensor.input_amax)
    prepared = [
        plan_quantization(model, recipe, dataset=[rows], device="cpu", input_headroom=headroom)
        for headroom in (None, 3)
    ]
    (note,) = set(prepared[1].notes) - set(prepared[0].notes)
    assert "input_headroom" in note
    assert prepared[0].identity() == prepared[1].identity()


def test_a_rule_decides_for_itself(model: Path, rows: Path) -> None:
    """A rule's own factor is used beside a scale rule and without one; the others have that of the run."""
    recipe = rules(
        "role: down, format: nvfp4, scale_rule: sweep, input_headroom: 4",
        "role: [gate, up], format: nvfp4, input_headroom: amax",
        "role: o, format: nvfp4, scale_rule: absmax",
        "role: linear, format: nvfp4",
    )
    prepared = plan_quantization(model, recipe, dataset=[rows], input_headroom=3, **OPTIONS)
    found = {record.name.split(".")[-2]: record.input_headroom for record in prepared.records()}
    wanted = {"down_proj": 4, "gate_proj": 1, "up_proj": 1, "o_proj": 1, "q_proj": 3, "k_proj": 3, "v_proj": 3}
    assert {name: found[name] for name in wanted} == wanted
    assert prepared.identity()["input_headroom"] == 3
    (note,) = (note for note in prepared.notes if "input scales" in note)
    assert all(part in note for part in ("4 times for 2 weights", "3 times for 6", "1 times for 6"))


@pytest.mark.parametrize("value", ["0.99", "0", "-2", ".nan", ".inf", "449", "true", "'2'", "twice", "[2]"])
def test_a_bad_number_in_a_rule(value: str) -> None:
    """What is no factor from 1 to 448 is refused at the key's line."""
    with raises("recipe-invalid", "a.yaml:3: rules[0].input_headroom"):
        rules(f"role: linear, format: nvfp4, input_headroom: {value}")


@pytest.mark.parametrize("fmt", ["fp8-dynamic", "fp8-block", "nvfp4a16", "mxfp4", "int4", "keep"])
def test_formats_without_a_calibrated_input_scale(fmt: str) -> None:
    """Where a file has no such scale the key is an error, not a word without effect."""
    with raises("recipe-invalid", "input_headroom"):
        rules(f"role: linear, format: {fmt}, input_headroom: 2")


@pytest.mark.parametrize("value", [0.5, 0, -1, math.nan, math.inf, 1000, True, "2", "max", ""])
@pytest.mark.parametrize("recipe", ["nvfp4", "fp8-dynamic"])
def test_a_bad_number_for_the_run(recipe: str, value: Any, model: Path, rows: Path, tmp_path: Path) -> None:
    """The run and the dry run refuse it before anything is written, whether or not the recipe would use it."""
    with raises("option-invalid", "input_headroom"):
        plan_quantization(model, recipe, dataset=[rows], input_headroom=value, **OPTIONS)
    with raises("option-invalid", "input_headroom"):
        made(tmp_path / "out", model, rows, recipe, input_headroom=value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "pair",
    [
        ("role: gate, format: nvfp4, input_headroom: 2", "role: linear, format: nvfp4"),
        ("role: q, format: nvfp4, input_headroom: 2", "role: linear, format: nvfp4, input_headroom: 3"),
    ],
)
def test_a_fused_group_has_one_factor(pair: tuple[str, str], model: Path, rows: Path) -> None:
    """Members of a fused group share one input scale in engines, so two factors among them are refused."""
    with raises("recipe-splits-group") as caught:
        plan_quantization(model, rules(*pair), dataset=[rows], **OPTIONS)
    assert "input_headroom" in str(caught.value)


def test_experts_have_one_factor(tmp_path: Path, rows: Path) -> None:
    """All routed experts of a layer share the scales of their inputs: one for gate and up, one for down."""
    model = make_mixture("qwen3_moe", tmp_path / "moe", wide=True)
    rest = "role: linear, format: nvfp4"
    with raises("recipe-splits-group") as caught:
        some = "name: '*.experts.1.*', format: nvfp4, input_headroom: 2"
        plan_quantization(model, rules(some, rest), dataset=[rows], **OPTIONS)
    assert "input_headroom" in str(caught.value)
    plan_quantization(model, rules("role: down, format: nvfp4, input_headroom: 2", rest), dataset=[rows], **OPTIONS)


def test_statistics_serve_every_factor(model: Path, rows: Path, tmp_path: Path) -> None:
    """Statistics hold what was seen, so a factor gives from them the bytes that it gives from the samples."""
    collect_statistics(model, output_dir=tmp_path / "s", dataset=[rows], device="cpu")
    known = tmp_path / "s" / STATISTICS_FILE
    scales = {}
    for headroom in (1, 2):
        record = quantize(
            model, "nvfp4", output_dir=tmp_path / f"{headroom}", statistics=known, input_headroom=headroom, **OPTIONS
        )
        scales[headroom] = {t.name: t.input_amax for t in record.tensors}
        tensors = all_tensors(tmp_path / f"{headroom}")
        for name, amax in scales[headroom].items():
            if amax is not None:
                assert tensors[name.removesuffix(".weight") + SCALE].item() == divisor(headroom, amax)
    assert scales[1] == scales[2]
    assert (tmp_path / "1" / STATISTICS_FILE).read_text() == (tmp_path / "2" / STATISTICS_FILE).read_text()
    first = made(tmp_path / "with", model, rows, input_headroom=2)
    again = quantize(
        model, "nvfp4-absmax", output_dir=tmp_path / "again", statistics=tmp_path / "with" / STATISTICS_FILE,
        device="cpu",
    )  # fmt: skip
    seen = {t.name: t.input_amax for t in first.tensors}
    assert {t.name: t.input_amax for t in again.tensors} == seen


def test_another_factor_does_not_resume(model: Path, rows: Path, tmp_path: Path) -> None:
    """An unfinished run is refused under another factor, which is named, and resumes under its own: the same bytes."""
    found = boundaries_of(lambda: made(tmp_path / "whole", model, rows, input_headroom=2), tmp_path / "notes")
    out = tmp_path / "out"

    def work() -> None:
        kill_at(found[-1] // 2)
        made(out, model, rows, input_headroom=2)

    assert in_child(work) == KILLED
    for other in (1, "amax", 3):
        with raises("run-differs", "out.partial") as caught:
            made(out, model, rows, input_headroom=other)
        assert "input headroom" in caught.value.what
    record = made(out, model, rows, input_headroom=2)
    assert record.resumed is not None
    assert contents(out) == contents(tmp_path / "whole")


def test_another_recipe_behind_finished_layers(model: Path, rows: Path, tmp_path: Path) -> None:
    """A recipe with another factor for later layers takes finished ones over; one that changes these is refused."""
    out, exact = tmp_path / "out", "role: linear, format: nvfp4, scale_rule: sweep"

    def work() -> None:
        with pytest.MonkeyPatch.context() as patch:

            def stop(layer: Any, *others: Any) -> Any:
                if layer.index == 1:
                    os._exit(KILLED)
                return propagate(layer, *others)

            patch.setattr(snugfit.quantization.unit_work, "propagate", stop)
            patch.setattr(Commits, "start", lambda self, *given: (start(self, *given), self.wait()))
            made(out, model, rows, rules(exact), effort=None)

    start = Commits.start
    assert in_child(work) == KILLED
    first, second = (f"{exact}, layers: {layer}, input_headroom: 2" for layer in range(2))
    with raises("run-differs", "out.partial"):
        made(out, model, rows, rules(first, exact), effort=None)
    record = made(out, model, rows, rules(second, exact), effort=None)
    assert record.resumed is not None
    made(tmp_path / "whole", model, rows, rules(second, exact), effort=None)
    assert contents(out) == contents(tmp_path / "whole")


def test_emulation_reads_the_same_number(model: Path, rows: Path, tmp_path: Path) -> None:
    """Evaluation rounds inputs under the file's scale: what headroom keeps, amax cuts off; what fits hardly differs."""
    amax: dict[int, float] = {}
    rounded: dict[int, torch.Tensor] = {}
    inputs = torch.linspace(-1, 1, 64, dtype=torch.float32)
    for headroom in (1, 2):
        record = made(tmp_path / f"{headroom}", model, rows, input_headroom=headroom)
        name = "model.layers.1.mlp.down_proj"
        amax[headroom] = next(t.input_amax for t in record.tensors if t.name == f"{name}.weight") or 0.0
        opened = open_model(tmp_path / f"{headroom}")
        _, quantizers = emulate.read_layer(
            opened.checkpoint,
            opened.dialect,
            "model.layers.1",
            opened.skeleton.layers[1],
            opened.formats,
            "vllm-blackwell",
        )
        rounding = quantizers["mlp.down_proj"]
        assert isinstance(rounding, InputRounding)
        assert rounding.scale is not None
        assert rounding.scale.item() == 1 / divisor(headroom, amax[headroom])
        rounded[headroom] = rounding(inputs * 1.9 * amax[headroom])
    assert amax[1] == amax[2]
    largest = float(np.float32(amax[1]))
    assert rounded[1].abs().amax().item() == pytest.approx(largest, rel=1e-6)
    assert rounded[2].abs().amax().item() == pytest.approx(1.9 * largest, rel=0.07)
    error = (rounded[2] - inputs * 1.9 * largest).abs().amax().item()
    assert error < 1.9 * largest / 6 * 1.05  # half the widest step of E2M1, under a rounded block scale


def test_on_the_command_line(model: Path, rows: Path, tmp_path: Path) -> None:
    """`--input-headroom` takes a number or amax; a dry run says what ranges become, in words and in JSON."""
    given = ["quantize", str(model), "-r", "nvfp4", "--dry-run", "--device", "cpu", "--dataset", str(rows)]
    runner = CliRunner()
    shown = runner.invoke(app, [*given, "--input-headroom", "2.5"])
    assert shown.exit_code == 0, shown.stderr
    assert "2.5 times for 14 weights" in shown.stderr
    documents = {
        value: json.loads(runner.invoke(app, [*given, "--json", "--input-headroom", value]).stdout)["tensors"]
        for value in ("2.5", "amax")
    }
    for value, factor in (("2.5", 2.5), ("amax", 1.0)):
        assert {t.get("input_headroom") for t in documents[value] if t["format"] == "nvfp4"} == {factor}
    assert "input scales" not in runner.invoke(app, [*given, "--input-headroom", "amax"]).stderr
    for value in ("0.5", "nan", "inf", "449", "twice", ""):
        refused = runner.invoke(app, [*given, "--input-headroom", value])
        assert failed_with(refused, "option-invalid", "--input-headroom")
    del tmp_path
