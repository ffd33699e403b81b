"""Two datasets on one model: what one shows that the other does not, and the error that this costs."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from typer.testing import CliRunner

import snugfit
from conftest import MakeTiny
from helpers.errors import failed_with, raises
from helpers.tiny_families import write_rows
from helpers.tiny_mixtures import make_mixture
from snugfit.cli.app import app


def rows(file: Path, tokens: range, seed: int = 0, count: int = 12, length: int = 64) -> Path:
    """Samples of some of the vocabulary's tokens."""
    generator = random.Random(seed)  # noqa: S311  # not for secrets
    write_rows(file, [[generator.choice(tokens) for _ in range(length)] for _ in range(count)])
    return file


@pytest.fixture(scope="module")
def model(make_tiny: MakeTiny) -> Path:
    """Two layers of 64 hidden features."""
    return make_tiny("llama", num_hidden_layers=2)


def test_what_one_leaves_uncovered(model: Path, tmp_path: Path) -> None:
    """A dataset of few tokens leaves channels to the other; weights that it quantized are worse on the other's rows."""
    few, all_tokens = rows(tmp_path / "few.jsonl", range(4)), rows(tmp_path / "all.jsonl", range(64))
    record = snugfit.compare_datasets(few, all_tokens, model=model)
    assert (record.a.source, record.b.source, record.shared_samples) == ("few.jsonl", "all.jsonl", 0)
    assert (record.a.tokens, record.b.tokens) == (12 * 64, 12 * 64)
    names = [one.name for one in record.linears]
    assert names[:4] == [
        f"model.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    ]
    assert len(names) == 8
    assert sum(one.raised_by_b for one in record.linears) > sum(one.raised_by_a for one in record.linears)
    for one in record.linears:
        assert one.channels == (128 if "down" in one.name else 64)
        assert one.largest_raise_b >= 1
        errors = one.error_a_on_a, one.error_b_on_a, one.error_a_on_b, one.error_b_on_b
        assert all(error is not None and 0 < error < 0.5 for error in errors)
        assert one.error_a_on_b is not None
        assert one.error_b_on_b is not None
        assert one.error_a_on_b > one.error_b_on_b


def test_the_other_way_round(model: Path, tmp_path: Path) -> None:
    """Swapped datasets give swapped figures; equal samples are counted."""
    a, b = rows(tmp_path / "a.jsonl", range(30)), rows(tmp_path / "b.jsonl", range(64), seed=1, count=8)
    with b.open("a", encoding="utf-8") as stream:
        stream.write(a.read_text(encoding="utf-8").splitlines()[3] + "\n")
    for form in ("int4", "nvfp4"):
        one = snugfit.compare_datasets(a, b, model=model, format=form)
        other = snugfit.compare_datasets(b, a, model=model, format=form)
        assert one.shared_samples == other.shared_samples == 1
        for first, second in zip(one.linears, other.linears, strict=True):
            assert (first.raised_by_a, first.raised_by_b) == (second.raised_by_b, second.raised_by_a)
            assert first.largest_raise_a == pytest.approx(second.largest_raise_b, rel=1e-3)
            assert first.error_a_on_b == pytest.approx(second.error_b_on_a, rel=0.02)
            assert first.error_a_on_a == pytest.approx(second.error_b_on_b, rel=0.02)


def test_experts(tmp_path: Path) -> None:
    """Tokens that each expert gets are those that statistics of either dataset count, and experts have errors too."""
    model = make_mixture("qwen3_moe", tmp_path / "model")
    a = rows(tmp_path / "a.jsonl", range(3), count=4)
    b = rows(tmp_path / "b.jsonl", range(64), seed=1, count=4)
    record = snugfit.compare_datasets(a, b, model=model)
    for side, file in (("routed_a", a), ("routed_b", b)):
        found = snugfit.collect_statistics(
            model, output_dir=tmp_path / f"stats-{side}", dataset=file, moe_calibrate_all_experts=False
        )
        counted = [experts.routed for layer in found.layers.values() for experts in layer.experts.values()]
        assert [getattr(one, side) for one in record.experts] == counted
    assert any("experts" in one.name and one.error_a_on_b is not None for one in record.linears)


def test_on_the_command_line(model: Path, tmp_path: Path) -> None:
    """The verb prints tables or the record; nothing is written."""
    a, b = rows(tmp_path / "a.jsonl", range(20)), rows(tmp_path / "b.jsonl", range(64), seed=1)
    before = sorted(tmp_path.iterdir())
    command = ["dataset", "compare", str(a), str(b), "--model", str(model), "--num-samples", "6"]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0
    assert "What each leaves uncovered" in shown.stdout
    found = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert found["a"]["num_samples"] == 6
    assert sorted(tmp_path.iterdir()) == before


def test_bad_input(model: Path, tmp_path: Path) -> None:
    """The same samples twice, a format without such errors, a file that does not exist."""
    a = rows(tmp_path / "a.jsonl", range(20))
    with raises("option-conflict", where="b"):
        snugfit.compare_datasets(a, a, model=model)
    with raises("option-invalid", where="format"):
        snugfit.compare_datasets(a, a, model=model, format="fp8")
    with raises("file-missing"):
        snugfit.compare_datasets(a, tmp_path / "b.jsonl", model=model)
    arguments = ["dataset", "compare", str(a), str(tmp_path / "b.yaml"), "--model", str(model)]
    assert failed_with(CliRunner().invoke(app, arguments), "file-missing", "b.yaml")
