"""Results of other tools: real files of each, measured on a server of 4,000 prompt tokens and 50 tokens a second."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from helpers.errors import failed_with, raises
from snugfit.benchmarking.bench import write_bench
from snugfit.benchmarking.imported import import_bench
from snugfit.cli.app import app
from snugfit.records.base import DIGEST, as_json
from snugfit.report.bench import bench_csv, bench_lines, bench_markdown

FIXTURES = Path(__file__).parents[1] / "fixtures" / "bench"
TOOLS = {"vllm": ("vllm bench serve", None), "guidellm": ("guidellm", "0.8.1"), "aiperf": ("aiperf", "0.13.0")}


@pytest.mark.parametrize("tool", TOOLS)
def test_real_results_are_read(tool: str) -> None:
    """Eight users, 32 requests of 50 tokens: each tool's figures are those that it printed, in seconds."""
    record = import_bench(FIXTURES / f"{tool}.json")
    assert (record.tool, record.tool_version) == TOOLS[tool]
    (run,) = record.runs
    assert run.prefix_cache == "unknown"
    assert run.server.model == "mock/engine"
    (cell,) = run.cells
    assert (cell.kind, cell.concurrency, cell.requests, cell.errors, cell.output_tokens) == ("load", 8, 32, 0, 50)
    assert 215 < cell.prompt_tokens < 262
    assert cell.between_tokens is not None
    assert cell.decode is not None
    assert cell.latency is not None
    assert cell.first_token is not None
    assert cell.throughput is not None
    assert 0.020 < cell.between_tokens.median < 0.025  # 20 ms and the delays of a busy machine
    assert cell.decode.median == pytest.approx(1 / cell.between_tokens.median)
    assert cell.latency.median == pytest.approx(cell.first_token.median + 49 * cell.between_tokens.median, rel=0.05)
    assert cell.throughput.median == pytest.approx(8 * 50 / cell.latency.median, rel=0.1)
    assert cell.first_token.p99 is not None
    assert cell.first_token.p99 > cell.first_token.median


def test_a_record_reads_back(tmp_path: Path) -> None:
    """What `bench` wrote is read again as it was, and one of another version is refused."""
    record = import_bench(FIXTURES / "vllm.json")
    write_bench(record, tmp_path / "out")
    assert import_bench(tmp_path / "out" / "bench.json") == import_bench(tmp_path / "out") == record
    document = json.loads((tmp_path / "out" / "bench.json").read_text(encoding="utf-8"))
    file = tmp_path / "other.json"
    changes: list[dict[str, Any]] = [
        {"schema": "snugfit.bench/2"},
        {"runs": []},
        {"complete": "yes"},
        {"runs": [{"cells": 1}]},
    ]
    for change in changes:
        file.write_text(as_json(document | change), encoding="utf-8")
        with raises("result-invalid", where=file):
            import_bench(file)


def test_a_record_that_was_edited_is_refused(tmp_path: Path) -> None:
    """Another number under the old digest, and a record without a digest, as `report` and `push` refuse them."""
    write_bench(import_bench(FIXTURES / "vllm.json"), tmp_path / "out")
    file = tmp_path / "out" / "bench.json"
    document = json.loads(file.read_text(encoding="utf-8"))
    document["runs"][0]["cells"][0]["throughput"]["median"] *= 2
    without_digest = {key: value for key, value in document.items() if key != DIGEST}
    for changed in (document, without_digest):
        file.write_text(json.dumps(changed), encoding="utf-8")
        with raises("record-changed", where=file):
            import_bench(file)


def without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda document: document.pop(key)


@pytest.mark.parametrize(
    ("tool", "change"),
    [
        ("vllm", without("total_output_tokens")),
        ("vllm", lambda d: d.update(completed=-1)),
        ("vllm", lambda d: d.update(duration="5")),
        ("guidellm", lambda d: d.update(benchmarks=[])),
        ("guidellm", lambda d: d.update(benchmarks=[7])),
        ("guidellm", lambda d: d["benchmarks"][0].pop("metrics")),
        ("aiperf", without("request_count")),
        ("aiperf", without("aiperf_version")),
    ],
)
def test_damaged_results_are_refused(tool: str, change: Callable[[dict[str, Any]], Any], tmp_path: Path) -> None:
    """A figure that is needed and missing or impossible is an error that names the file."""
    document = json.loads((FIXTURES / f"{tool}.json").read_text(encoding="utf-8"))
    change(document)
    file = tmp_path / "result.json"
    file.write_text(json.dumps(document), encoding="utf-8")
    with raises("result-invalid", where=file):
        import_bench(file)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[1]", b"7", b"{}", b"[" * 100_000])
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    """Text, lists and other objects are not results."""
    file = tmp_path / "result.json"
    file.write_bytes(content)
    result = CliRunner().invoke(app, ["bench", "--import", str(file)])
    assert result.exit_code == 2
    assert "[json-invalid]" in result.stderr or "[result-invalid]" in result.stderr


def test_what_is_missing_stays_out() -> None:
    """A run without answers has failed and has no figures; errors keep their kinds; a cancelled run is partial."""
    record = import_bench(FIXTURES / "vllm.json")
    cell = replace(
        record.runs[0].cells[0], status="refused", reason="the cache", throughput=None, error_messages={"x": 2}
    )
    partial = replace(
        record, runs=(replace(record.runs[0], cells=(cell,)),), complete=False, stopped="interrupted", notes=("so",)
    )
    lines = "\n".join(bench_lines(partial))
    assert "PARTIAL: stopped early (interrupted)" in lines
    assert "refused: the cache" in lines
    assert "2 x x" in lines
    assert "| refused |" in bench_markdown(partial)
    header, row = bench_csv(partial).splitlines()
    assert len(header.split(",")) == len(row.split(","))


def test_the_command_line_of_an_import(tmp_path: Path) -> None:
    """`bench --import` prints the tables and writes the record; a URL beside it is refused."""
    file = str(FIXTURES / "guidellm.json")
    result = CliRunner().invoke(app, ["bench", "--import", file, "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "users at once" in result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["bench.csv", "bench.json", "bench.md"]
    assert failed_with(CliRunner().invoke(app, ["bench", "http://x", "--import", file]), "option-conflict")
    assert failed_with(CliRunner().invoke(app, ["bench"]), "option-missing")
    missing = CliRunner().invoke(app, ["bench", "--import", str(tmp_path / "none.json")])
    assert failed_with(missing, "file-unreadable", "none.json")
