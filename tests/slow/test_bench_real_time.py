"""Set speeds of an engine over HTTP, by the real clock; on a simulated one in tests/benchmarking."""

from __future__ import annotations

import pytest

from helpers.mock_engine import MockEngine, served
from snugfit.benchmarking.bench import bench
from snugfit.benchmarking.plan import BenchOptions


@pytest.mark.slow
def test_real_time_within_five_per_cent() -> None:
    """Over HTTP and by the real clock, set speeds come back within 5 %: prompts of 2 s, tokens of 200 ms, 8 users."""
    engine = MockEngine(prefill_rate=1000.0, decode_rate=5.0)
    options = BenchOptions(
        prefill=(2000,), depths=(400,), concurrency=(8,), prompt_tokens=2, output_tokens=12, repeats=2
    )
    with served(engine) as url:
        prefill, decode, load = bench(url, options=options).runs[0].cells
    assert prefill.prefill is not None
    assert decode.decode is not None
    assert load.throughput is not None
    assert prefill.prefill.median == pytest.approx(1000, rel=0.05)
    assert decode.decode.median == pytest.approx(5, rel=0.05)
    assert load.throughput.median == pytest.approx(8 * 12 / (11 / 5), rel=0.05)
