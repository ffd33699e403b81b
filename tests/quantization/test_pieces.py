"""Routed experts in memory some at a time: the same bytes and numbers as all at once, for less memory."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from helpers.errors import raises
from helpers.killed import KILLED, contents, in_child
from helpers.memory import leave_free
from helpers.tiny_families import random_rows, write_rows
from helpers.tiny_mixtures import Source, make_mixture
from snugfit.cli.app import app
from snugfit.evaluation import continuations, evaluated_model
from snugfit.evaluation.continuations import continue_greedily
from snugfit.evaluation.evaluate import evaluate
from snugfit.evaluation.evaluated_model import last_states, open_model
from snugfit.evaluation.saturation import InputWatch
from snugfit.model import experts, pieces
from snugfit.quantization.collect import collect_statistics
from snugfit.quantization.quantize import plan_quantization, quantize
from snugfit.records.quantize import RECORD_FILE
from snugfit.records.statistics_file import STATISTICS_FILE

CPU = torch.device("cpu")
LENGTHS = [64] * 6 + [40, 33] * 2  # of several lengths: batches are padded
ROWS = random_rows(LENGTHS)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The samples as a file."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS)


def records_of(folder: Path) -> Any:
    """What the record says of tensors and of the gate, but for seconds."""
    record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    trials = [{key: value for key, value in one.items() if key != "seconds"} for one in record["trials"]]
    return record["tensors"], record["input_saturation"], trials


@pytest.mark.parametrize(
    ("family", "recipe", "effort"),
    [
        ("qwen3_moe", "nvfp4-moe-four-over-six", None),
        ("deepseek_v3", "nvfp4-moe", "fast"),  # group and shared experts, dense first layers, heads of prediction
        ("gpt_oss", "fp8-int4-moe-absmax", None),  # stacked and transposed, with biases; no samples
        ("mixtral", "fp8-int4-awq", "good"),  # observed, folded inside experts, and gated on held-out samples
    ],
)
def test_the_same_files(
    family: str, recipe: str, effort: str | None, source: Source, rows: Path, tmp_path: Path
) -> None:
    """A run with three experts in memory at a time writes the files, and measures the numbers, of one with all."""
    options: dict[str, Any] = {"dataset": [rows], "device": "cpu", "tokens_per_batch": 130, "effort": effort}
    options |= {"allow_unverified": True, "min_tokens_per_expert": 0}
    for name, size in (("whole", None), ("pieces", 3)):
        quantize(source(family), recipe, output_dir=tmp_path / name, experts_per_group=size, **options)
    assert contents(tmp_path / "pieces") == contents(tmp_path / "whole")
    assert records_of(tmp_path / "pieces") == records_of(tmp_path / "whole")


def test_experts_that_stay_in_stacked_files(source: Source, rows: Path, tmp_path: Path) -> None:
    """A tensor of all experts that stays whole is run a few experts at a time, and copied as it is."""
    recipe = tmp_path / "attention.yaml"
    recipe.write_text(
        "name: a\nrules: [{role: attention, format: fp8-dynamic}, {role: linear, format: keep}]\nkv_cache: fp8\n",
        encoding="utf-8",
    )
    options: dict[str, Any] = {"dataset": [rows], "device": "cpu", "allow_unverified": True}
    for name, size in (("whole", None), ("pieces", 1)):
        quantize(source("granitemoe"), recipe, output_dir=tmp_path / name, experts_per_group=size, **options)
    assert contents(tmp_path / "pieces") == contents(tmp_path / "whole")


def test_the_same_statistics_and_a_run_from_them(source: Source, rows: Path, tmp_path: Path) -> None:
    """Statistics of experts in pieces have the same bytes, and a run from them folds each piece as the whole layer."""
    model, options = source("minimax_m2"), {"dataset": [rows], "device": "cpu", "tokens_per_batch": 130}
    for name, size in (("whole", None), ("pieces", 3)):
        collect_statistics(model, output_dir=tmp_path / name, experts_per_group=size, **options)  # type: ignore[arg-type]
    found = [(tmp_path / name / STATISTICS_FILE).read_bytes() for name in ("whole", "pieces")]
    assert found[0] == found[1]
    known: dict[str, Any] = {"statistics": tmp_path / "whole", "device": "cpu", "min_tokens_per_expert": 0}
    for name, size in (("a", None), ("b", 3)):
        quantize(model, "fp8-int4-awq", output_dir=tmp_path / name, experts_per_group=size, **known)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert records_of(tmp_path / "a") == records_of(tmp_path / "b")


@pytest.mark.parametrize("activations", ["none", "vllm-blackwell"])
def test_the_same_hidden_states(activations: str, source: Source, rows: Path, tmp_path: Path) -> None:
    """`eval` computes the same hidden states, and sees the same inputs, of a source and of a quantized mixture."""
    quantize(source("deepseek_v3"), "nvfp4-moe-four-over-six", output_dir=tmp_path / "out", dataset=[rows])
    positions = [torch.arange(len(row)) for row in ROWS]
    for path in (source("deepseek_v3"), tmp_path / "out"):
        model, watches = open_model(path, activations=activations), (InputWatch(), InputWatch())
        whole = last_states(model, ROWS, positions, CPU, tokens_per_batch=130, watch=watches[0])
        few = replace(model, experts_per_group=3)
        some = last_states(few, ROWS, positions, CPU, tokens_per_batch=130, watch=watches[1])
        assert all(torch.equal(a, b) for a, b in zip(whole, some, strict=True))
        assert watches[0].result() == watches[1].result()


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_the_same_continuations(
    family: str, source: Source, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy continuations are the same, and no layer holds more experts than were asked for."""
    options: dict[str, Any] = {"dataset": [rows], "allow_unverified": True}
    quantize(source(family), "nvfp4-moe-four-over-six", output_dir=tmp_path / "out", **options)
    held: list[int] = []
    opened = evaluated_model.open_layer

    def open_layer(model: Any, index: int, *rest: Any) -> Any:
        found = opened(model, index, *rest)
        if index in model.skeleton.experts:
            held.append(experts.count(found[0].get_submodule(model.skeleton.experts[index].module)))
        return found

    monkeypatch.setattr(continuations, "open_layer", open_layer)
    prompts = [row[:9] for row in ROWS[:2]]
    for path in (source(family), tmp_path / "out"):
        model = open_model(path)
        whole = continue_greedily(model, prompts, CPU, tokens=5)
        held.clear()
        some = continue_greedily(replace(model, experts_per_group=3), prompts, CPU, tokens=5)
        assert whole == some
        assert set(held) == {3}


def test_a_killed_run_resumes_with_other_groups(source: Source, rows: Path, tmp_path: Path) -> None:
    """A run that dies in the middle of a layer's experts resumes with groups of another size, to the same bytes."""
    options: dict[str, Any] = {"dataset": [rows], "device": "cpu", "tokens_per_batch": 130}
    model, recipe = source("qwen3_moe"), "nvfp4-moe-four-over-six"
    quantize(model, recipe, output_dir=tmp_path / "whole", **options)

    def dies() -> None:
        count = 0

        def add(kept: Any, some: range, original: Any = pieces._Kept.add) -> None:
            nonlocal count
            count += 1
            if count == 25:  # in the second layer
                os._exit(KILLED)
            original(kept, some)

        pieces._Kept.add = add  # type: ignore[method-assign,assignment]
        quantize(model, recipe, output_dir=tmp_path / "pieces", experts_per_group=3, **options)

    assert in_child(dies) == KILLED
    assert any(name.endswith("unit-00001.json") for name in map(str, contents(tmp_path / "pieces.partial")))
    quantize(model, recipe, output_dir=tmp_path / "pieces", experts_per_group=5, **options)
    assert contents(tmp_path / "pieces") == contents(tmp_path / "whole")


def test_groups_are_chosen_by_free_memory(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without memory for a layer a run takes the largest group of experts that fits, and says so, or is refused."""
    model = make_mixture("qwen3_moe", tmp_path / "wide", hidden_size=512, inner=2048)
    options: dict[str, Any] = {"dataset": [rows], "device": "cpu"}

    def planned(free: int = 1 << 40, **more: Any) -> Any:
        leave_free(monkeypatch, free)
        return plan_quantization(model, "nvfp4-moe-four-over-six", **options, **more)

    whole, one, three = planned(), planned(experts_per_group=1), planned(experts_per_group=3)
    assert one.estimate.ram < three.estimate.ram < whole.estimate.ram
    chosen = planned(three.estimate.ram + 2_000_000)
    assert chosen.experts_per_group in (3, 4)
    assert any("experts_per_group" in note for note in chosen.notes)
    chosen.check_resources()
    with raises("memory-insufficient"):
        planned(1_000_000).check_resources()


def test_the_command_line(source: Source, rows: Path, tmp_path: Path) -> None:
    """`--experts-per-group` reaches quantize, collect and eval; 0 is refused."""
    model, recipe = str(source("qwen3_moe")), "nvfp4-moe-four-over-six"
    run = CliRunner()
    done = run.invoke(
        app, ["quantize", model, "-r", recipe, "--dataset", str(rows), "--experts-per-group", "2", "--dry-run"]
    )
    assert done.exit_code == 0, done.output
    with raises("option-invalid", where="experts_per_group"):
        quantize(model, recipe, output_dir=tmp_path / "out", experts_per_group=0)
    with raises("option-invalid", where="experts_per_group"):
        evaluate(model, experts_per_group=0)
    record = evaluate(model, dataset=[rows], contexts=[32], experts_per_group=2, device="cpu")
    whole = evaluate(model, dataset=[rows], contexts=[32], device="cpu")
    assert record.contexts == whole.contexts
