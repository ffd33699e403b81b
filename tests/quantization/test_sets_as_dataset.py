"""Every verb that reads a dataset reads a set: the same samples, known by their digest, in every record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import snugfit
from conftest import MakeTiny
from helpers.errors import failed_with, raises
from helpers.tiny_tokenizer import add_tokenizer
from snugfit.cli.app import app
from snugfit.data.dataset import load_dataset

SET = """\
calibration_set:
  max_seq_length: 48
  datasets:
    - dataset: rows.jsonl
      columns: [q, a]
      formatter: prompt_answer
      num_samples: 12
    - dataset: book.txt
      num_samples: 4
"""


class Heard(snugfit.Progress):
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        """Keep it."""
        self.messages.append(text)


@pytest.fixture(scope="module")
def model(make_tiny: MakeTiny) -> Path:
    """A tiny model with a tokenizer and 64 positions."""
    return add_tokenizer(make_tiny("llama", num_hidden_layers=1, max_position_embeddings=64))


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A set of a dozen questions, of which one row is damaged, and a text."""
    entries = [{"q": f"What is {chr(97 + n)}?", "a": "A letter. " * n} for n in range(1, 13)]
    lines = [json.dumps(entry) for entry in entries]
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines[:3], "{}", *lines[3:]]), encoding="utf-8")
    (tmp_path / "book.txt").write_text("It was a dark and stormy night. " * 40, encoding="utf-8")
    file = tmp_path / "set.yaml"
    file.write_text(SET, encoding="utf-8")
    return file


def test_quantize_and_its_dry_run(model: Path, dataset: Path, tmp_path: Path) -> None:
    """Both read the set's samples; the record has their digest, the set's, and what each source gave."""
    expected = load_dataset(model, [dataset])
    plan = snugfit.plan_quantization(model, "nvfp4-absmax", dataset=dataset)
    assert plan.dataset == expected
    assert any("1 of 13 rows skipped" in note for note in plan.notes)
    record = snugfit.quantize(model, "nvfp4-absmax", output_dir=tmp_path / "out", dataset=[dataset])
    found = record.dataset
    assert found is not None
    assert (found["digest"], found["set_digest"], found["samples"]) == (expected.digest, expected.set_digest, 16)
    assert [(use["dataset"], use["samples"]) for use in found["sources"]] == [("rows.jsonl", 12), ("book.txt", 4)]
    assert record.arguments["num_samples"] is None
    assert json.loads(record.to_json())["dataset"]["sources"][0]["skipped"]


def test_samples_are_held_out_of_both_sources(model: Path, dataset: Path) -> None:
    """The gate's held-out samples are some of every source."""
    plan = snugfit.plan_quantization(model, "nvfp4", dataset=dataset, effort="good")
    assert plan.held_out is not None
    assert plan.dataset is not None
    assert (plan.dataset.shares, plan.held_out.shares) == ((11, 3), (1, 1))


def test_statistics(model: Path, dataset: Path, tmp_path: Path) -> None:
    """Statistics know the samples by the set's name and their digest, and take their place later."""
    found = snugfit.collect_statistics(model, output_dir=tmp_path / "stats", dataset=str(dataset))
    used = found.datasets[0]
    expected = load_dataset(model, [dataset])
    assert (used.source, used.digest, used.num_samples) == ("set.yaml", expected.digest, 16)
    plan = snugfit.plan_quantization(model, "nvfp4-absmax", statistics=tmp_path / "stats", dataset=dataset)
    assert plan.known is not None
    with raises("statistics-mismatch"):
        snugfit.plan_quantization(model, "nvfp4-absmax", statistics=tmp_path / "stats", dataset=dataset, num_samples=3)


def test_evaluation_scores_answers(model: Path, dataset: Path) -> None:
    """Of conversations the assistant's tokens are scored, of texts all; a note says which rows were skipped."""
    heard = Heard()
    record = snugfit.evaluate([model], dataset=dataset, noise_floor="none", progress=heard)
    assert any("1 of 13 rows skipped" in message for message in heard.messages)
    assert [(text.name, text.kind) for text in record.texts] == [("set.yaml", "set")]
    (row,) = record.contexts
    assert row.chunks == 16
    tokens = sum(len(sample) for sample in load_dataset(model, [dataset]).samples)
    assert 4 * 47 < row.tokens < tokens
    limited = snugfit.evaluate([model], dataset=dataset, noise_floor="none", max_chunks=5)
    assert limited.contexts[0].chunks == 5


def test_evaluation_refuses_limits_beside_a_set(model: Path, dataset: Path) -> None:
    """Context lengths and tokens that would have no effect are refused, and a set that packs is noted."""
    for name, value in (("contexts", (16, 32)), ("contexts", (64,)), ("max_tokens", 100)):
        options: dict[str, Any] = {name: value}
        with raises("option-conflict", where=name):
            snugfit.evaluate([model], dataset=dataset, noise_floor="none", **options)
    arguments = ["eval", str(model), "--dataset", str(dataset)]
    for option, text in (("--context", "32"), ("--max-tokens", "100")):
        assert failed_with(CliRunner().invoke(app, [*arguments, option, text]), "option-conflict", option)
    heard = Heard()
    snugfit.evaluate([model], dataset=dataset, noise_floor="none", progress=heard)
    assert not any("packing" in message for message in heard.messages)
    dataset.write_text(SET + "      packing: true\n", encoding="utf-8")
    snugfit.evaluate([model], dataset=dataset, noise_floor="none", progress=heard)
    assert any("packing" in message for message in heard.messages)


def test_samples_are_cut_at_the_models_positions(model: Path, dataset: Path) -> None:
    """A set's length is cut at the positions of the model; one that a caller asks for is refused beyond them."""
    dataset.write_text(SET.replace("48", "4096"), encoding="utf-8")
    plan = snugfit.plan_quantization(model, "nvfp4-absmax", dataset=dataset)
    assert plan.dataset is not None
    assert max(map(len, plan.dataset.samples)) == 64
    assert snugfit.evaluate([model], dataset=dataset, noise_floor="none").contexts
    with raises("sequence-too-long"):
        snugfit.plan_quantization(model, "nvfp4-absmax", dataset=dataset, max_seq_length=100)


def test_a_set_by_name(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name of a set of this package is a dataset, for Python and the command line; a file of this name goes first."""
    monkeypatch.chdir(tmp_path)
    plan = snugfit.plan_quantization(model, "nvfp4-absmax", dataset="offline", num_samples=6)
    assert plan.dataset is not None
    assert plan.dataset.source == "offline"
    assert len(plan.dataset.samples) == 6
    arguments = ["quantize", str(model), "-r", "nvfp4-absmax", "--dry-run", "--num-samples", "6", "--dataset"]
    assert CliRunner().invoke(app, [*arguments, "offline"]).exit_code == 0
    assert failed_with(CliRunner().invoke(app, [*arguments, "offlin"]), "file-missing", "offline")
    (tmp_path / "offline").write_text("A text of this name. " * 100, encoding="utf-8")
    file = snugfit.plan_quantization(model, "nvfp4-absmax", dataset="offline", max_seq_length=64)
    assert file.dataset is not None
    assert file.dataset.set_digest is None


def test_a_set_stands_alone(model: Path, dataset: Path) -> None:
    """A set beside other files, or one that is not valid, is refused before anything is read."""
    with raises("option-conflict", where="set.yaml"):
        snugfit.plan_quantization(model, "nvfp4-absmax", dataset=[dataset, dataset.with_name("book.txt")])
    dataset.write_text(SET.replace("formatter:", "formater:"), encoding="utf-8")
    with raises("dataset-set-invalid", where="set.yaml:6"):
        snugfit.plan_quantization(model, "fp8-dynamic", dataset=dataset)
    with raises("dataset-set-invalid", where="set.yaml:6"):
        snugfit.evaluate([model], dataset=dataset)
