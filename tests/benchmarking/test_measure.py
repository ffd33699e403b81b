"""What `bench` measures of an engine with set speeds, on a simulated clock."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from helpers.errors import raises
from helpers.mock_engine import MODEL, MockEngine, SimulatedLoop, Transport
from snugfit.benchmarking.measure import Measured, measure
from snugfit.benchmarking.plan import BenchOptions, Setting, make_settings
from snugfit.benchmarking.target import Target, open_target
from snugfit.progress import SILENT
from snugfit.records.bench import BenchCell


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        yield runner


def opened(runner: asyncio.Runner, engine: MockEngine, seed: int = 1) -> Target:
    client = httpx.AsyncClient(transport=Transport(engine), base_url="http://mock", timeout=None)  # noqa: S113
    opening = open_target(client, url="http://mock", model=MODEL, seed=seed, limit_seconds=600.0)
    return runner.run(opening)[0]


def run(
    runner: asyncio.Runner, engines: list[MockEngine], settings: list[Setting], *, repeats: int = 5, **more: Any
) -> Measured:
    targets = [opened(runner, engine) for engine in engines]
    options = {"max_seconds": None, "progress": SILENT, **more}
    return measure(targets, settings, repeats=repeats, runner=runner, **options)


def one(runner: asyncio.Runner, engine: MockEngine, setting: Setting, **more: Any) -> BenchCell:
    return run(runner, [engine], [setting], **more).cells[0][0]


@pytest.mark.parametrize("tokens", [512, 4096, 32768])
def test_prefill_rate_is_the_engines(runner: asyncio.Runner, tokens: int) -> None:
    """Prompt tokens a second and the time to the first token are what the engine was set to, within 1 %."""
    cell = one(runner, MockEngine(prefill_rate=7137.7), Setting("prefill", tokens, 1))
    assert cell.status == "measured"
    assert cell.prompt_tokens_counted == tokens
    assert cell.prefill is not None
    assert cell.first_token is not None
    assert cell.prefill.median == pytest.approx(7137.7, rel=0.01)
    assert cell.first_token.median == pytest.approx(tokens / 7137.7, rel=0.01)
    assert cell.requests == 5
    assert cell.errors == 0


def test_decode_rate_leaves_the_prompt_out(runner: asyncio.Runner) -> None:
    """One user's tokens a second do not contain the time of the prompt, however long it is."""
    for depth in (128, 16384):
        cell = one(runner, MockEngine(prefill_rate=2000, decode_rate=87.0), Setting("decode", depth, 128))
        assert cell.decode is not None
        assert cell.prefill is not None
        assert cell.latency is not None
        assert cell.decode.median == pytest.approx(87.0, rel=0.01)
        assert cell.prefill.median == pytest.approx(2000, rel=0.01)
        assert cell.latency.median == pytest.approx(depth / 2000 + 127 / 87, rel=0.01)


@pytest.mark.parametrize("users", [1, 8, 40, 64])
def test_throughput_and_percentiles_of_users(runner: asyncio.Runner, users: int) -> None:
    """Throughput of all users is their number times each one's rate, where prompts cost next to nothing."""
    engine = MockEngine(prefill_rate=1e9, decode_rate=50.0)
    cell = one(runner, engine, Setting("load", 256, 40, users))
    assert cell.throughput is not None
    assert cell.total_throughput is not None
    assert cell.decode is not None
    assert cell.throughput.median == pytest.approx(users * 40 / (39 / 50), rel=0.01)
    assert cell.total_throughput.median == pytest.approx(users * 296 / (39 / 50), rel=0.01)
    assert cell.decode.median == pytest.approx(50.0, rel=0.01)
    assert cell.requests == 5 * 2 * users
    assert cell.prefill is None


def test_spread_of_latency_is_found(runner: asyncio.Runner) -> None:
    """Percentiles of a log-normal spread of token times are its own, within 5 %."""
    engine = MockEngine(prefill_rate=1e9, decode_rate=50.0, spread=0.2)
    cell = one(runner, engine, Setting("load", 64, 12, 40), repeats=30)
    found = cell.between_tokens
    assert found is not None
    assert found.count == 2400
    assert found.values == ()
    for quantile, normal in (("median", 0.0), ("p95", 1.6449), ("p99", 2.3263)):
        assert getattr(found, quantile) == pytest.approx(math.exp(0.2 * normal) / 50, rel=0.05)


def test_failures_are_counted_and_left_out(runner: asyncio.Runner) -> None:
    """Failed requests are errors with their message, and the others' figures stay those of the engine."""
    engine = MockEngine(prefill_rate=1e9, decode_rate=50.0, failures=0.1)
    cell = one(runner, engine, Setting("load", 64, 10, 40), repeats=20)
    total = cell.requests + cell.errors
    assert total == 1600
    assert cell.errors / total == pytest.approx(0.1, abs=0.025)
    assert cell.error_messages == {"status 500: EngineCore encountered an issue.": cell.errors}
    assert cell.decode is not None
    assert cell.decode.median == pytest.approx(50.0, rel=0.01)


def test_only_errors_are_a_failed_cell(runner: asyncio.Runner) -> None:
    """A cell without an answer has failed, says why, has no figures, and the next cell is still measured."""
    engine = MockEngine()
    target = opened(runner, engine)
    engine.failures = 1.0
    found = measure([target], [Setting("decode", 128, 8)], repeats=5, max_seconds=None, runner=runner, progress=SILENT)
    cell = found.cells[0][0]
    assert (cell.status, cell.requests, cell.repeats) == ("failed", 0, 2)
    assert cell.reason is not None
    assert "EngineCore" in cell.reason
    assert cell.decode is None
    assert found.stopped is None


@pytest.mark.parametrize("ids", [True, False])
def test_prefix_cache_finds_nothing(runner: asyncio.Runner, ids: bool) -> None:
    """An engine with a prefix cache computes every prompt of a run, of ids or of words, and its counters show it."""
    engine = MockEngine(prefill_rate=5000, cache=True, ids=ids)
    settings = [Setting("prefill", 2048, 1), Setting("decode", 2048, 8), Setting("load", 512, 8, 16)]
    for cell in run(runner, [engine], settings).cells[0]:
        assert cell.status == "measured"
        assert cell.prefix_hits == 0
        assert cell.prompt_tokens_counted == pytest.approx(cell.prompt_tokens, rel=0.05)
        if cell.prefill is not None:
            assert cell.prefill.median == pytest.approx(5000, rel=0.01)


def test_cached_prompts_are_refused(runner: asyncio.Runner) -> None:
    """A second run with the first one's seed asks for the same prompts; its cells are refused, without figures."""
    engine = MockEngine(prefill_rate=5000)
    setting = Setting("prefill", 4096, 1)
    first, second = (one(runner, engine, setting) for _ in range(2))
    assert first.status == "measured"
    assert second.status == "refused"
    assert second.prefix_hits is not None
    assert second.prefix_hits > 4 * 4096
    assert second.prefill is None
    assert second.reason is not None
    assert "prefix cache" in second.reason
    engine.metrics = False  # a server that reports nothing: unique prompts of another seed are what is left
    target = opened(runner, engine, seed=2)
    found = measure([target], [setting], repeats=3, max_seconds=None, runner=runner, progress=SILENT)
    assert found.cells[0][0].prefix_hits is None
    assert found.cells[0][0].status == "measured"


def test_prompts_begin_unlike_any_other(runner: asyncio.Runner) -> None:
    """No two prompts of a run share their first eight tokens, and another seed has other prompts."""
    engine = MockEngine()
    run(runner, [engine], [Setting("load", 64, 2, 64)], repeats=4)
    prompts = [tuple(body["prompt"]) for body in engine.asked]
    assert len({prompt[:8] for prompt in prompts}) == len(prompts)
    assert len(prompts) > 500
    other = MockEngine()
    opened(runner, other, seed=2)
    assert tuple(other.asked[0]["prompt"][:8]) not in {prompt[:8] for prompt in prompts}


def test_two_servers_in_turn_give_ratios(runner: asyncio.Runner) -> None:
    """Ratios are those of the set speeds, inside their intervals; the order changes with every repeat."""
    engines = [
        MockEngine(prefill_rate=5000, decode_rate=60, spread=0.05),
        MockEngine(prefill_rate=8000, decode_rate=90, spread=0.05, seed=5),
    ]
    settings = [Setting("prefill", 2048, 1), Setting("decode", 128, 64), Setting("load", 128, 64, 8)]
    found = run(runner, engines, settings, repeats=9)
    by = {(ratio.kind, ratio.figure): ratio for ratio in found.ratios}
    assert by["prefill", "prefill"].ratio == pytest.approx(1.6, rel=0.01)
    decode = by["decode", "decode"]
    assert decode.low is not None
    assert decode.high is not None
    assert decode.low < 1.5 < decode.high
    assert decode.high / decode.low < 1.2
    assert decode.pairs == 9
    assert by["load", "throughput"].ratio == pytest.approx(1.5, rel=0.07)
    assert by["load", "latency"].ratio < 1


def test_a_lost_server_keeps_what_was_measured(runner: asyncio.Runner) -> None:
    """Where the engine dies within a cell, finished cells are whole, this one is partial, later ones are absent."""
    engine = MockEngine(dies_after=1 + 6 + 4)  # a probe, a cell with its warm-up, and within the next
    settings = [Setting("prefill", tokens, 1) for tokens in (512, 1024, 2048)]
    found = run(runner, [engine], settings)
    assert found.stopped is not None
    assert "stopped answering" in found.stopped
    first, second = found.cells[0]
    assert first.status == "measured"
    assert second.status == "partial"
    assert second.requests == 3
    assert second.errors == 1
    assert second.prefill is not None


def test_time_runs_out(runner: asyncio.Runner) -> None:
    """`max_seconds` ends the run between two repeats, and what was measured is kept."""
    engine = MockEngine(prefill_rate=1000)
    found = run(runner, [engine], [Setting("prefill", 1000, 1), Setting("prefill", 2000, 1)], max_seconds=9.0)
    assert found.stopped == "`max_seconds` are over"
    assert [cell.status for cell in found.cells[0]] == ["measured", "partial"]


def test_an_interrupt_keeps_what_was_measured(runner: asyncio.Runner) -> None:
    """Ctrl-C in the second cell: the first is whole, the second partial."""

    class Interrupting(Target):
        async def repeat(self, setting: Setting) -> Any:
            if setting.prompt_tokens == 2000 and len(self.prompts._used) > 9:
                raise KeyboardInterrupt
            return await super().repeat(setting)

    target = opened(runner, MockEngine())
    target.__class__ = Interrupting
    settings = [Setting("prefill", 1000, 1), Setting("prefill", 2000, 1), Setting("prefill", 3000, 1)]
    found = measure([target], settings, repeats=5, max_seconds=None, runner=runner, progress=SILENT)
    assert found.stopped == "interrupted"
    assert [(cell.status, cell.requests) for cell in found.cells[0]] == [("measured", 5), ("partial", 2)]


def test_a_silent_server_is_a_time_out(runner: asyncio.Runner) -> None:
    """A request that takes longer than the limit is an error with that reason, not a wait without end."""
    engine = MockEngine(prefill_rate=1000)
    target = opened(runner, engine)
    target.limit_seconds = 2.0
    found = measure(
        [target], [Setting("prefill", 8000, 1)], repeats=3, max_seconds=None, runner=runner, progress=SILENT
    )
    assert found.cells[0][0].error_messages == {"no answer within 2 s": 2}


def test_strict_and_silent_servers(runner: asyncio.Runner) -> None:
    """A server that refuses unknown keys, or counts no tokens, is measured all the same."""
    for engine in (MockEngine(strict=True), MockEngine(counts=False, ids=False)):
        cell = one(runner, engine, Setting("decode", 256, 32))
        assert cell.status == "measured"
        assert cell.decode is not None
        assert cell.decode.median == pytest.approx(100.0, rel=0.01)


def test_unusable_servers_are_refused_before_the_run(runner: asyncio.Runner) -> None:
    """A server that answers no prompt raises its own words; one that is gone is unreachable."""
    with raises("server-unsupported", where="http://mock"):
        opened(runner, MockEngine(failures=1.0))
    with raises("server-unreachable", where="http://mock"):
        opened(runner, MockEngine(dies_after=-1))


def test_settings_follow_the_servers_context() -> None:
    """Default lengths beyond the server's context are left out with a remark; those that were asked for are errors."""
    settings, notes = make_settings(BenchOptions(), 8192)
    assert max(setting.prompt_tokens for setting in settings) == 4096
    assert len(notes) == 2
    with raises("sequence-too-long", where="prefill"):
        make_settings(BenchOptions(prefill=(8192,)), 8192)
    with raises("option-missing", where="prefill"):
        make_settings(BenchOptions(prefill=(), depths=(), concurrency=()), None)
    for bad in ({"repeats": 0}, {"output_tokens": 1}, {"concurrency": (0,)}):
        with raises("option-invalid", where=next(iter(bad))):
            make_settings(BenchOptions(**bad), None)
