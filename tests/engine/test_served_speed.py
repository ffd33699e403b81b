"""A stock vLLM (CPU build) started by `snugfit serve`: BF16 and `fp8-int4`, asked, measured in turn, and stopped."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from snugfit.benchmarking.plan import BenchOptions
from snugfit.hosting.request import Measures, ServeOptions
from snugfit.hosting.serve import serve
from snugfit.quantization.quantize import quantize
from snugfit.records.serve import ServeRecord

pytestmark = pytest.mark.engine

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_INT4_W4A8": "0",
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}
BENCH = BenchOptions(prefill=(256,), depths=(64,), concurrency=(2,), prompt_tokens=64, output_tokens=8, repeats=2)
OPTIONS = ("--dtype", "bfloat16", "--enforce-eager", "--max-num-seqs", "4")


def served(model: Path, out: Path, *options: str) -> ServeRecord:
    python = os.environ.get("SNUGFIT_VLLM_PYTHON")
    if not python:
        pytest.fail("SNUGFIT_VLLM_PYTHON must name the Python of a vLLM environment: run `make engine`")
    return serve(
        model,
        output_dir=out,
        options=ServeOptions(python=python, gpu="8GiB", context=1024, extra=(*OPTIONS, *options)),
        measures=Measures(bench=BENCH),
    )


def test_stock_engine_is_served_and_measured(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both files start, answer that Paris is the capital, and are measured without a hit of the prefix cache."""
    from snugfit.benchmarking.imported import import_bench

    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    quantize(smollm2, "fp8-int4-absmax", output_dir=tmp_path / "fp8-int4", num_samples=4, max_seq_length=128)
    for model in (smollm2, tmp_path / "fp8-int4"):
        out = tmp_path / f"served-{model.name}"
        record = served(model, out)
        assert record.started
        assert record.stopped is None
        assert "Paris" in record.answers[0].text
        assert record.taken.cache_tokens is not None
        (run,) = import_bench(out / "bench" / "bench.json").runs
        assert [cell.status for cell in run.cells] == ["measured"] * 3
        assert [cell.prompt_tokens_counted for cell in run.cells] == [256, 64, 64]
        assert run.prefix_cache == "counted"
        assert all(cell.prefix_hits == 0 for cell in run.cells)


def test_an_option_that_the_engine_lacks_is_explained(smollm2: Path, tmp_path: Path) -> None:
    """The engine's usage error becomes a plain reason."""
    record = served(smollm2, tmp_path / "out", "--no-such-option-at-all")
    assert record.refusal is not None
    assert "does not have one of the options" in record.refusal.reason
