"""`bench` over HTTP: the verb, bad servers, memory, and a proof in real time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from helpers.errors import failed_with, raises
from helpers.mock_engine import MockEngine, served
from helpers.mock_vllm import Mock
from snugfit.benchmarking import bench as module
from snugfit.benchmarking.bench import bench, write_bench
from snugfit.benchmarking.plan import BenchOptions
from snugfit.cli.app import app
from snugfit.engines.metrics import cache_tokens, prefix_hits
from snugfit.records.bench import BenchRecord
from snugfit.serving import nvml
from snugfit.serving.nvml import GpuMemory

FAST: dict[str, Any] = {"prefill_rate": 1e6, "decode_rate": 2000.0}
SMALL = ["--prefill", "64", "--depths", "32", "--concurrency", "2", "--prompt-tokens", "32", "--output-tokens", "4"]


def test_the_verb(tmp_path: Path) -> None:
    """`snugfit bench URL` prints tables, and writes a record with its seed, cells, memory and cache proof."""
    engine = MockEngine(**FAST)
    with served(engine) as url:
        result = CliRunner().invoke(app, ["bench", url, *SMALL, "--repeats", "2", "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    for words in ("pp64", "tg4 @ d32", "users at once", "counters show no prompt tokens"):
        assert words in result.output
    record = json.loads((tmp_path / "out" / "bench.json").read_text(encoding="utf-8"))
    (run,) = record["runs"]
    assert record["complete"]
    assert record["arguments"]["seed"] > 0
    assert [cell["kind"] for cell in run["cells"]] == ["prefill", "decode", "load"]
    assert run["prefix_cache"] == "counted"
    assert run["server"]["memory"]["kv_cache_tokens"] == 2048 * 16
    assert run["server"]["memory"]["kv_cache_source"] == "metrics"


def test_two_servers(tmp_path: Path) -> None:
    """`--against` measures a second server and prints ratios."""
    with served(MockEngine(**FAST)) as first, served(MockEngine(**FAST)) as second:
        arguments = ["bench", first, "--against", second, *SMALL, "--repeats", "3", "-o", str(tmp_path / "out")]
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "bench.json").read_text(encoding="utf-8"))
    assert len(record["runs"]) == 2
    assert {ratio["figure"] for ratio in record["ratios"]} == {
        "prefill",
        "first_token",
        "decode",
        "latency",
        "throughput",
    }


def test_a_lost_server_ends_with_its_results(tmp_path: Path) -> None:
    """Where the server dies, what was measured is written and marked, and the verb ends with 2."""
    with served(MockEngine(**FAST, dies_after=1 + 3 + 1)) as url:
        result = CliRunner().invoke(app, ["bench", url, *SMALL, "--repeats", "2", "-o", str(tmp_path / "out")])
    assert result.exit_code == 2
    record = json.loads((tmp_path / "out" / "bench.json").read_text(encoding="utf-8"))
    assert not record["complete"]
    assert record["runs"][0]["cells"][0]["status"] == "measured"
    assert "PARTIAL" in (tmp_path / "out" / "bench.md").read_text(encoding="utf-8")


def test_servers_of_another_kind() -> None:
    """No server, no OpenAI-style server, an unknown model, a refused key and impossible numbers: errors with a code."""
    run = CliRunner()
    assert failed_with(run.invoke(app, ["bench", "http://127.0.0.1:9"]), "server-unreachable", "127.0.0.1:9")
    assert failed_with(run.invoke(app, ["bench", "ftp://x"]), "option-invalid", "ftp://x")
    with Mock() as mock:
        mock.pages["/v1/models"] = (404, {"detail": "Not Found"})
        assert failed_with(run.invoke(app, ["bench", mock.url]), "server-unsupported")
    with served(MockEngine(**FAST, max_model_len=128)) as url:
        assert failed_with(run.invoke(app, ["bench", url, "--server-model", "other"]), "option-invalid", "mock/engine")
        assert failed_with(run.invoke(app, ["bench", url, "--prefill", "4k"]), "sequence-too-long", "--prefill")
        assert failed_with(run.invoke(app, ["bench", url, "--prefill", "x"]), "option-invalid", "--prefill")
        assert failed_with(run.invoke(app, ["bench", url, "--timeout", "0"]), "option-invalid", "--timeout")
        missing = run.invoke(app, ["bench", url, "--server-log", "nowhere.log"])
        assert failed_with(missing, "file-unreadable", "nowhere.log")


def test_memory_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a driver the record has the card's memory; without its library a note says what to install."""
    options = BenchOptions(prefill=(32,), depths=(), concurrency=(), repeats=1)
    with served(MockEngine(**FAST)) as url:
        monkeypatch.setattr(module, "read_gpu", lambda _: GpuMemory("NVIDIA H100", 80 << 30, 70 << 30))
        held = bench(url, options=options).runs[0].server.memory
        assert (held.gpu, held.gpu_total_bytes, held.gpu_used_bytes) == ("NVIDIA H100", 80 << 30, 70 << 30)
        monkeypatch.setattr(module, "read_gpu", lambda _: nvml.MISSING)
        record = bench(url, options=options)
    assert record.runs[0].server.memory.gpu is None
    assert nvml.MISSING in record.notes


def test_no_gpu_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without nvidia-ml-py the reason is the answer, not an error."""

    def missing(_: str) -> None:
        raise ImportError

    monkeypatch.setattr("snugfit.serving.nvml.importlib.import_module", missing)
    assert nvml.read_gpu() == nvml.MISSING


def test_counters_of_engines() -> None:
    """Hits and sizes are read from the metrics of vLLM, Aphrodite and SGLang; other text has neither."""
    assert (
        prefix_hits('vllm:prefix_cache_hits_total{engine="0"} 32.0\nvllm:prefix_cache_hits_total{engine="1"} 1.6e1')
        == 48
    )
    assert (
        prefix_hits('sglang:cached_tokens_total{cache_source="device"} 5.0\nsglang:cached_tokens_total{a="h"} 2') == 7
    )
    assert prefix_hits('aphrodite:prefix_cache_hits_total{engine="0"} 3.0') == 3
    assert cache_tokens("sglang:max_total_num_tokens 471258.0") == 471_258
    assert cache_tokens('vllm:cache_config_info{block_size="16",num_gpu_blocks="100"} 1.0') == 1600
    for text in (
        "",
        "# HELP x",
        "<html>",
        'vllm:cache_config_info{block_size="None"} 1.0',
        "x{ 1",
        "vllm:prefix_cache_hits x",
    ):
        assert prefix_hits(text) is None
        assert cache_tokens(text) is None


def test_a_directory_that_exists_is_refused(tmp_path: Path) -> None:
    """Nothing is measured where the result could not be written."""
    with raises("output-exists"):
        write_bench(bench_of_nothing(), tmp_path)
    assert failed_with(CliRunner().invoke(app, ["bench", "http://127.0.0.1:9", "-o", str(tmp_path)]), "output-exists")


def bench_of_nothing() -> BenchRecord:
    return BenchRecord(
        snugfit="0",
        tool="snugfit",
        tool_version=None,
        arguments={},
        runs=(),
        ratios=(),
        complete=True,
        stopped=None,
        seconds={},
        hardware={},
        versions={},
    )
