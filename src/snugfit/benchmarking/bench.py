"""Measure running servers: speed of prompts and answers, alone and under load, and what memory they hold."""

from __future__ import annotations

import asyncio
import platform
import secrets
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx

from snugfit.benchmarking.measure import INTERRUPTED, Measured, measure
from snugfit.benchmarking.plan import BenchOptions, make_settings
from snugfit.benchmarking.target import Target, open_target
from snugfit.engines.metrics import cache_tokens
from snugfit.errors import UserError
from snugfit.machine import Clock, processors
from snugfit.progress import SILENT, Progress
from snugfit.records.bench import BenchMemory, BenchRecord, BenchRun, BenchServer
from snugfit.report.bench import bench_csv, bench_markdown
from snugfit.serving.client import Server, connect
from snugfit.serving.engine_log import memory_from_log, read_log
from snugfit.serving.nvml import GpuMemory, read_gpu
from snugfit.storage.staging import staged
from snugfit.version import __version__

_LOCAL = ("127.0.0.1", "localhost", "::1", "0.0.0.0")  # noqa: S104  # compared with, not bound to


def bench(
    server: str,
    *,
    against: str | None = None,
    options: BenchOptions | None = None,
    server_model: str | None = None,
    against_model: str | None = None,
    server_log: str | Path | None = None,
    gpu_index: int = 0,
    seed: int | None = None,
    timeout: float = 600.0,
    max_seconds: float | None = None,
    progress: Progress = SILENT,
) -> BenchRecord:
    """Speed and memory of the OpenAI-compatible server at a URL; with `against` of two in turn, with ratios.

    Every prompt is random, of exactly the tokens asked for where the server has /tokenize, and begins unlike any other
    (`seed`, by default a new one each run), so that no prefix cache can help; the server's counters prove it, and a
    cell with hits is refused. `server_log` is the log of the first server. `timeout` is the longest a request may take,
    `max_seconds` the whole run. GPU memory is that of GPU `gpu_index` of this machine, if the server is on it.

    Ctrl-C, `max_seconds` and a lost server end the measurement: the record then holds what was measured, with
    `complete` False. UserError for servers that cannot be measured at all, before anything is.
    """
    clock = Clock()
    options = options or BenchOptions()
    log = None if server_log is None else read_log(Path(server_log))
    seed = secrets.randbelow(2**32) if seed is None else seed
    for name, value in (("timeout", timeout), ("max_seconds", max_seconds)):
        if value is not None and not value > 0:
            raise UserError(f"must be > 0, got {value:g}.", code="option-invalid", where=name)
    make_settings(options, None)  # what no server could do
    with ExitStack() as stack:
        urls = [(server, server_model), *([(against, against_model)] if against is not None else [])]
        servers = [stack.enter_context(connect(url, model=model, timeout=30.0)) for url, model in urls]
        lengths = [one.max_model_len for one in servers if one.max_model_len is not None]
        settings, notes = make_settings(options, min(lengths, default=None))
        runner = stack.enter_context(asyncio.Runner())
        targets = []
        for one in servers:
            client = httpx.AsyncClient(
                base_url=one.client.base_url,
                headers=one.client.headers,
                timeout=timeout,
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=256),
            )
            stack.callback(_close, runner, client)
            opening = open_target(client, url=one.url, model=one.model, seed=seed, limit_seconds=timeout)
            target, remarks = runner.run(opening)
            targets.append(target)
            notes += remarks
        for note in notes:
            progress.message(note)
        found = measure(
            targets, settings, repeats=options.repeats, max_seconds=max_seconds, runner=runner, progress=progress
        )
        memory = _memory(targets, servers, log, gpu_index, found, runner)
    arguments = asdict(options) | {"server": server, "against": against, "seed": seed, "timeout": timeout}
    return _record(arguments | {"max_seconds": max_seconds}, servers, memory, found, notes, clock)


def _close(runner: asyncio.Runner, client: httpx.AsyncClient) -> None:
    runner.run(client.aclose())


def write_bench(record: BenchRecord, directory: str | Path) -> None:
    """Write bench.json, bench.md and bench.csv to a new directory, whole or not at all."""
    with staged(Path(directory)) as folder:
        (folder / "bench.json").write_text(record.to_json(), encoding="utf-8")
        (folder / "bench.md").write_text(bench_markdown(record), encoding="utf-8")
        (folder / "bench.csv").write_text(bench_csv(record), encoding="utf-8")


def _record(
    arguments: dict[str, Any],
    servers: Sequence[Server],
    memory: Sequence[BenchMemory],
    found: Measured,
    notes: Sequence[str],
    clock: Clock,
) -> BenchRecord:
    runs = []
    for one, cells, held in zip(servers, found.cells, memory, strict=True):
        counted = any(cell.prefix_hits is not None for cell in cells)
        described = BenchServer(name=Path(one.model).name, memory=held, **one.describe())
        runs.append(BenchRun(server=described, cells=tuple(cells), prefix_cache="counted" if counted else "unique"))
    return BenchRecord(
        snugfit=__version__,
        tool="snugfit",
        tool_version=__version__,
        arguments=arguments,
        runs=tuple(runs),
        ratios=tuple(found.ratios),
        complete=found.stopped is None,
        stopped=found.stopped,
        seconds=clock.seconds,
        hardware={"processor": platform.machine(), "processors": processors(), "gpu": memory[0].gpu},
        versions={"python": platform.python_version(), "httpx": httpx.__version__},
        notes=(*notes, *found.notes),
    )


def _memory(
    targets: Sequence[Target],
    servers: Sequence[Server],
    log: str | None,
    gpu_index: int,
    found: Measured,
    runner: asyncio.Runner,
) -> list[BenchMemory]:
    """What each server holds; the GPU only where one server runs on this machine."""
    result = []
    for place, target in enumerate(targets):
        text = "" if found.stopped == INTERRUPTED else runner.run(target.metrics())
        from_log = memory_from_log(log).cache_tokens if log is not None and place == 0 else None
        tokens = from_log or cache_tokens(text)
        gpu = read_gpu(gpu_index) if httpx.URL(servers[place].url).host in _LOCAL else None
        if isinstance(gpu, str) and gpu not in found.notes:
            found.notes.append(gpu)
        read = gpu if isinstance(gpu, GpuMemory) else None
        result.append(
            BenchMemory(
                gpu=None if read is None else read.name,
                gpu_total_bytes=None if read is None else read.total_bytes,
                gpu_used_bytes=None if read is None else read.used_bytes,
                kv_cache_tokens=tokens,
                kv_cache_source=None if tokens is None else "log" if from_log else "metrics",
            )
        )
    return result
