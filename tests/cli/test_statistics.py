"""`snugfit statistics`: exit codes, what is printed where, what is written, and that nothing else is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from conftest import MakeTiny
from helpers.errors import failed_with
from helpers.tiny_families import random_rows, write_rows
from helpers.tiny_mixtures import make_mixture
from snugfit.cli.app import app
from snugfit.records.statistics_file import STATISTICS_FILE, load_statistics

PROGRESS = ("layers ", "this run will need", "resuming after")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of samples, and the folder for what is collected."""
    found = tmp_path_factory.mktemp("statistics")
    for number in range(2):
        write_rows(found / f"rows-{number}.jsonl", random_rows([40, 40], seed=number))
    return found


@pytest.fixture(scope="module")
def model(make_tiny: MakeTiny) -> Path:
    """A dense model of two layers."""
    return make_tiny("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def mixture(folder: Path) -> Path:
    """A mixture of two layers."""
    return make_mixture("mixtral", folder / "mixture")


@pytest.fixture(scope="module")
def parts(model: Path, folder: Path) -> list[Path]:
    """Two directories of statistics, one over each file."""
    for number in range(2):
        result = invoke("collect", model, "-o", folder / f"part-{number}", *text(folder, number))
        assert result.exit_code == 0, result.stderr
    return [folder / "part-0", folder / "part-1"]


def text(folder: Path, number: int) -> list[object]:
    return ["--dataset", folder / f"rows-{number}.jsonl", "--device", "cpu"]


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["statistics", *map(str, arguments)])


def refused(*arguments: object) -> str:
    """The one message on stderr of a command that must be refused with exit code 2, and print nothing."""
    result = invoke(*arguments)
    assert result.exit_code == 2, (result.exit_code, result.stderr, repr(result.exception))
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.strip() and not line.startswith(PROGRESS)]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("snugfit: ")
    return str(lines[0])


def test_collect_writes_statistics_and_tables(model: Path, folder: Path, tmp_path: Path) -> None:
    """Exit code 0, a table on stdout; statistics, a table and plots in the new directory, nothing else beside it."""
    result = invoke("collect", model, "-o", tmp_path / "out", *text(folder, 0))
    assert result.exit_code == 0, result.stderr
    assert "self_attn.q_proj" in result.stdout
    assert "Outliers of inputs" in result.stdout
    assert "What experts saw" not in result.stdout
    assert "this run will need" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {STATISTICS_FILE, "outliers.md", "outliers.csv"} <= names
    assert not [name for name in names if name.endswith(".safetensors")]
    assert load_statistics(tmp_path / "out").tokens == 80


def test_collect_prints_the_file_as_json(mixture: Path, folder: Path, tmp_path: Path) -> None:
    """--json prints on stdout the document that is in the directory, and nothing else."""
    result = invoke(
        "collect", mixture, "-o", tmp_path / "out", *text(folder, 0), "--json", "--no-moe-calibrate-all-experts"
    )
    assert result.exit_code == 0, result.stderr
    assert result.stdout == (tmp_path / "out" / STATISTICS_FILE).read_text(encoding="utf-8")
    document = json.loads(result.stdout)
    assert document["all_experts"] is False
    assert all(sum(e["forced"]) == 0 for layer in document["layers"].values() for e in layer["experts"].values())


def test_collect_of_a_mixture_shows_what_experts_saw(mixture: Path, folder: Path, tmp_path: Path) -> None:
    """A mixture has a table of its experts in addition; options bound samples and forced tokens."""
    options = "--num-samples", 1, "--max-seq-length", 20, "--max-forced-tokens", 5, "--tokens-per-batch", 16
    result = invoke("collect", mixture, "-o", tmp_path / "out", *text(folder, 0), *options)
    assert result.exit_code == 0, result.stderr
    assert "What experts saw" in result.stdout
    found = load_statistics(tmp_path / "out")
    assert (found.tokens, found.max_forced_tokens) == (20, 5)
    assert max(max(e.forced) for layer in found.layers.values() for e in layer.experts.values()) <= 5


@pytest.mark.parametrize(
    ("options", "code", "place"),
    [
        (["--max-forced-tokens", "-1"], "option-invalid", "--max-forced-tokens"),
        (["--tokens-per-batch", "0"], "option-invalid", "--tokens-per-batch"),
        (["--device", "tpu"], "option-invalid", "--device"),
        (["--dataset", "no-such-rows.jsonl"], "file-missing", "no-such-rows.jsonl"),
    ],
)
def test_collect_refuses_options(
    options: list[str], code: str, place: str, model: Path, folder: Path, tmp_path: Path
) -> None:
    """What no run can do is refused by the option's name, and leaves nothing."""
    message = refused("collect", model, "-o", tmp_path / "out", *text(folder, 0), *options)
    assert place in message
    assert f"[{code}]" in message
    assert not list(tmp_path.iterdir())


def test_collect_overwrites_nothing(model: Path, folder: Path, parts: list[Path]) -> None:
    """An output that exists is refused and stays as it is."""
    before = {path: path.read_bytes() for path in parts[0].iterdir()}
    assert str(parts[0]) in refused("collect", model, "-o", parts[0], *text(folder, 1))
    assert {path: path.read_bytes() for path in parts[0].iterdir()} == before


def test_show_prints_what_was_collected(parts: list[Path]) -> None:
    """A file and its directory show the same: tables, or with --json the document."""
    for given in (parts[0], parts[0] / STATISTICS_FILE):
        plain, document = invoke("show", given), invoke("show", given, "--json")
        assert (plain.exit_code, document.exit_code) == (0, 0)
        assert "Outliers of inputs" in plain.stdout
        assert document.stdout == (parts[0] / STATISTICS_FILE).read_text(encoding="utf-8")
        assert (plain.stderr, document.stderr) == ("", "")


def test_show_writes_tables_where_asked(parts: list[Path], tmp_path: Path) -> None:
    """With -o the tables and plots of `collect` are written again; an output that exists is refused."""
    result = invoke("show", parts[0], "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    for name in ("outliers.md", "outliers.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (parts[0] / name).read_bytes()
    assert str(tmp_path / "out") in refused("show", parts[0], "-o", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_show_refuses_what_is_no_statistics(model: Path, parts: list[Path], tmp_path: Path) -> None:
    """A model, a missing file and a cut one are refused with the file's name, also with -o."""
    cut = tmp_path / "cut.json"
    cut.write_bytes((parts[0] / STATISTICS_FILE).read_bytes()[:-20])
    for given in (model, tmp_path / "none.json", cut):
        assert str(given) in refused("show", given)
        assert str(given) in refused("show", given, "-o", tmp_path / "out", "--json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.json"]


def test_merge_joins_files(parts: list[Path], model: Path, tmp_path: Path) -> None:
    """Exit code 0, a line that counts what was joined; the file is shown, and taken by `quantize --statistics`."""
    target = tmp_path / "all.json"
    result = invoke("merge", *parts, "-o", target)
    assert result.exit_code == 0, result.stderr
    assert "2 files, 4 samples, 160 tokens" in result.stdout
    shown = invoke("show", target, "--json")
    assert shown.stdout == target.read_text(encoding="utf-8")
    assert [one["num_samples"] for one in json.loads(shown.stdout)["datasets"]] == [2, 2]
    arguments = [
        "quantize",
        model,
        "-r",
        "nvfp4-four-over-six",
        "-o",
        tmp_path / "out",
        "--device",
        "cpu",
        "--statistics",
        target,
    ]
    quantized = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert quantized.exit_code == 0, quantized.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.json", "out"]


def test_merge_refuses_what_does_not_go_together(
    parts: list[Path], mixture: Path, folder: Path, tmp_path: Path
) -> None:
    """The same samples twice, another model, a missing file and an output that exists: exit code 2, nothing written."""
    result = invoke("collect", mixture, "-o", tmp_path / "mixture", *text(folder, 1))
    assert result.exit_code == 0, result.stderr
    target = tmp_path / "all.json"
    for second in (parts[0] / STATISTICS_FILE, tmp_path / "mixture"):
        message = refused("merge", parts[0], second, "-o", target)
        assert "[statistics-mismatch]" in message
        assert str(second) in message
    assert "none.json" in refused("merge", parts[0], tmp_path / "none.json", "-o", target)
    assert not target.exists()
    target.write_text("mine", encoding="utf-8")
    assert str(target) in refused("merge", *parts, "-o", target)
    assert target.read_text(encoding="utf-8") == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.json", "mixture"]


def test_quantize_refuses_statistics_that_do_not_belong(
    parts: list[Path], mixture: Path, folder: Path, tmp_path: Path
) -> None:
    """`quantize --statistics` of another model ends with exit code 2, the file's name, and no output."""
    arguments = ["quantize", mixture, "-r", "nvfp4-moe-four-over-six", "-o", tmp_path / "out", "--statistics", parts[0]]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert failed_with(result, "statistics-mismatch", parts[0])
    assert not list(tmp_path.iterdir())


def test_no_verb_is_no_run() -> None:
    """Without a verb the group explains itself."""
    result = invoke()
    assert all(verb in result.output for verb in ("collect", "show", "merge"))
