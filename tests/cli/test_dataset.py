"""`snugfit dataset`: sets are listed, printed, described; bad input is one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from helpers.errors import failed_with
from helpers.tiny_tokenizer import add_tokenizer
from snugfit.cli.app import app
from snugfit.data.dataset import load_dataset
from snugfit.data.sets import builtin_sets, load_set

SET = """\
calibration_set:
  datasets:
    - dataset: rows.jsonl
      columns: [t]
      formatter: raw_text
      formatter_params:
        prefix: "Use {{ ['C', 'D', 'E'][hash(row|string) % 3] }}\\n***\\n"
      num_samples: 10
      category: Questions
    - {dataset: rows.jsonl, columns: [t], formatter: text, num_samples: 5, draw: random, category: Texts}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of single characters with a chat template."""
    return add_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A set of one file, as conversations and as texts."""
    lines = "".join(json.dumps({"t": "text " * n}) + "\n" for n in range(1, 30))
    (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
    file = tmp_path / "set.yaml"
    file.write_text(SET, encoding="utf-8")
    return file


def run(*arguments: object) -> tuple[int, str, object]:
    result = CliRunner().invoke(app, ["dataset", *map(str, arguments)])
    return result.exit_code, result.stdout, result


def test_sets_are_listed_and_printed() -> None:
    """Without a set all of this package are listed, without a model one set's YAML is printed."""
    code, text, _ = run()
    assert code == 0
    assert all(name in text for name in builtin_sets())
    assert run("offline")[1] == load_set("offline").text
    assert json.loads(run("offline", "--json")[1])["seed"] == 42
    assert {one["name"] for one in json.loads(run("--json")[1])} == set(builtin_sets())


def test_a_set_is_described(model: Path, dataset: Path, tmp_path: Path) -> None:
    """`show` need not be written; JSON has the digest of the samples, and the parts that are written are rows."""
    code, text, _ = run(dataset, "--model", model, "--held-out", "20%")
    assert code == 0
    for word in ("15 samples", "Questions", "66.67 %", "held out: 3 samples", "--- sample 2"):
        assert word in text
    assert run("show", dataset, "--model", model, "--held-out", "20%")[1] == text
    found = json.loads(run(dataset, "-m", model, "--json", "-o", tmp_path / "out")[1])
    assert found["digest"] == load_dataset(model, [dataset]).digest
    assert (tmp_path / "out" / "samples.jsonl").is_file()


def test_one_digest_in_every_process(model: Path, dataset: Path) -> None:
    """A process with another seed of Python's hash, on files with other line endings, prints the same digests."""
    command = ["dataset", str(dataset), "--model", str(model), "--json"]
    here = json.loads(CliRunner().invoke(app, command).stdout)
    for file in (dataset, dataset.with_name("rows.jsonl")):
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    done = subprocess.run(
        [sys.executable, "-m", "snugfit", *command],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    there = json.loads(done.stdout)
    assert (there["digest"], there["set_digest"]) == (here["digest"], here["set_digest"])


def test_bad_input(model: Path, dataset: Path, tmp_path: Path) -> None:
    """Unknown sets with the nearest, options without effect, a formatter that does not exist: exit code 2, one line."""
    assert failed_with(run("ofline", "--model", model)[2], "file-missing", "offline")
    assert failed_with(run("softwareengineer")[2], "file-missing", "software-engineer")
    assert failed_with(run(dataset, "--held-out", "10%")[2], "option-conflict", "--held-out")
    for option, value in (
        ("--num-samples", 3),
        ("--max-seq-length", 64),
        ("--shuffle-seed", 0),
        ("-o", tmp_path / "new"),
    ):
        place = "--output-dir" if option == "-o" else option
        assert failed_with(run(dataset, option, value)[2], "option-conflict", place)
        assert failed_with(run(option, value)[2], "option-conflict", place)
    assert failed_with(run(dataset.with_name("rows.jsonl"))[2], "option-missing", "--model")
    assert failed_with(run(dataset, "--model", model, "--held-out", "99%")[2], "option-invalid", "--held-out")
    dataset.write_text(SET.replace("raw_text", "raw_txt"), encoding="utf-8")
    result = run(dataset, "--model", model, "-o", tmp_path / "out")[2]
    assert failed_with(result, "dataset-set-invalid", "set.yaml:5: calibration_set.datasets[0].formatter", "raw_text")
    assert not (tmp_path / "out").exists()
