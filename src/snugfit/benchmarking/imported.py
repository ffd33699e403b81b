"""Results of other tools as a record: `vllm bench serve`, guidellm and aiperf, and records that snugfit wrote.

Read are the summaries of vLLM 0.32 (`--save-result`), guidellm 0.8 (its JSON report) and aiperf 0.13
(profile_export_aiperf.json). What a file does not say is absent. None says whether a prefix cache helped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from snugfit.errors import UserError
from snugfit.records.bench import (
    BENCH_SCHEMA,
    BenchCell,
    BenchMemory,
    BenchRecord,
    BenchRun,
    BenchServer,
    CellKind,
    Distribution,
)
from snugfit.records.reading import parse_record, read_json
from snugfit.version import __version__

_KNOWN = "Give a result of `vllm bench serve --save-result`, guidellm, aiperf, or a bench.json."
_MOST = 10**12  # no count or time of a sound file is larger


def import_bench(path: str | Path) -> BenchRecord:
    """The record of a file that another tool, or snugfit, wrote; of a directory its bench.json.

    UserError for a file of another kind, for one whose figures are missing or impossible, and for a record of ours that
    was changed after it was written.
    """
    file = Path(path) / "bench.json" if Path(path).is_dir() else Path(path)
    document = read_json(file, _KNOWN)
    if not isinstance(document, dict):
        raise _invalid("it holds no object.", file)
    if str(document.get("schema")).partition("/")[0] == BENCH_SCHEMA.partition("/")[0]:
        return _own(document, file)
    for matches, read in _READERS:
        if matches(document):
            return _record(read(_Reader(file), document))
    raise _invalid("it is not a result that can be read.", file)


@dataclass
class _Found:
    """What a file says."""

    tool: str
    version: str | None
    model: str
    url: str | None
    engine: str | None = None
    cells: list[BenchCell] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    stopped: str | None = None


@dataclass(frozen=True)
class _Reader:
    """Reads numbers out of a document; what is not one is None, or an error where it is needed."""

    file: Path

    def number(self, document: Any, *keys: str) -> float | None:
        """The finite number >= 0 under these keys; None where there is none."""
        for key in keys:
            document = document.get(key) if isinstance(document, Mapping) else None
        if isinstance(document, bool) or not isinstance(document, int | float):
            return None
        return float(document) if 0 <= document <= _MOST else None

    def needed(self, document: Any, *keys: str) -> float:
        """The same; UserError where there is none."""
        found = self.number(document, *keys)
        if found is None:
            raise _invalid(f"{'.'.join(keys)} is not a number >= 0.", self.file)
        return found

    def text(self, document: Any, *keys: str) -> str | None:
        """The text under these keys; None where there is none."""
        for key in keys:
            document = document.get(key) if isinstance(document, Mapping) else None
        return document if isinstance(document, str) else None

    def distribution(self, names: Mapping[str, float | None], count: int, unit: float) -> Distribution | None:
        """Of named quantiles in units of `unit`; None without a median."""
        values: dict[str, Any] = {name: value * unit for name, value in names.items() if value is not None}
        return Distribution(count=count, **values) if "median" in values else None


def _invalid(what: str, file: Path) -> UserError:
    return UserError(what, code="result-invalid", where=str(file), remedy=_KNOWN)


def _own(document: Mapping[str, Any], file: Path) -> BenchRecord:
    found: BenchRecord = parse_record(document, str(file))
    if not found.runs or (found.ratios and len(found.runs) != 2):
        raise _invalid("its runs and ratios do not belong together.", file)
    return found


def _record(found: _Found) -> BenchRecord:
    server = BenchServer(
        name=Path(found.model).name or found.model,
        url=found.url,
        engine=found.engine,
        version=None,
        model=found.model,
        root=None,
        max_model_len=None,
        memory=BenchMemory(),
    )
    return BenchRecord(
        snugfit=__version__,
        tool=found.tool,
        tool_version=found.version,
        arguments={},
        runs=(BenchRun(server=server, cells=tuple(found.cells), prefix_cache="unknown"),),
        ratios=(),
        complete=found.stopped is None,
        stopped=found.stopped,
        seconds={},
        hardware={},
        versions={},
        notes=tuple(found.notes),
    )


def _cell(
    *,
    prompt: float,
    output: float,
    users: float,
    requests: float,
    errors: float,
    seconds: float,
    messages: Mapping[str, int] | None = None,
    first_token: Distribution | None,
    between: Distribution | None,
    latency: Distribution | None,
    output_rate: float | None,
    total_rate: float | None,
) -> BenchCell:
    """A cell of a tool that reports one figure of throughput for its whole run."""
    kind: CellKind = "load" if users > 1 else "prefill" if output < 2 else "decode"
    prefill = None
    if kind != "load" and first_token is not None and first_token.median:
        prefill = Distribution(count=first_token.count, median=prompt / first_token.median)
    decode = None
    if between is not None and between.median:
        decode = Distribution(count=between.count, median=1 / between.median)
    rates = [Distribution(count=1, median=rate) if rate is not None else None for rate in (output_rate, total_rate)]
    failed = requests == 0
    return BenchCell(
        kind=kind,
        prompt_tokens=round(prompt),
        output_tokens=round(output),
        concurrency=max(1, round(users)),
        status="failed" if failed else "measured",
        reason="no request was answered" if failed else None,
        requests=round(requests),
        errors=round(errors),
        error_messages=dict(messages or {}),
        repeats=1,
        seconds=seconds,
        prompt_tokens_counted=prompt,
        prefill=prefill,
        first_token=first_token,
        decode=None if kind == "prefill" else decode,
        between_tokens=None if kind == "prefill" else between,
        latency=latency,
        throughput=rates[0] if kind == "load" else None,
        total_throughput=rates[1] if kind == "load" else None,
    )


# vllm bench serve


def _is_vllm(document: Mapping[str, Any]) -> bool:
    return "completed" in document and "total_input_tokens" in document and "model_id" in document


def _read_vllm(reader: _Reader, document: Mapping[str, Any]) -> _Found:
    completed = reader.needed(document, "completed")
    found = _Found("vllm bench serve", None, reader.text(document, "model_id") or "unknown", None)
    found.engine = reader.text(document, "backend")
    users = reader.number(document, "max_concurrency")
    if users is None:
        users = reader.number(document, "max_concurrent_requests") or reader.needed(document, "num_prompts")
        found.notes.append(f"requests came at a rate; {users:.0f} is the most that were in work at once")

    def milliseconds(name: str) -> Distribution | None:
        names = ("mean", "median", "p25", "p75", "p90", "p95", "p99")
        values = {key: reader.number(document, f"{key}_{name}_ms") for key in names}
        return reader.distribution(values, round(completed), 1e-3)

    each = max(completed, 1.0)
    found.cells.append(
        _cell(
            prompt=reader.needed(document, "total_input_tokens") / each,
            output=reader.needed(document, "total_output_tokens") / each,
            users=users,
            requests=completed,
            errors=reader.number(document, "failed") or 0,
            seconds=reader.needed(document, "duration"),
            first_token=milliseconds("ttft"),
            between=milliseconds("tpot"),
            latency=milliseconds("e2el"),
            output_rate=reader.number(document, "output_throughput"),
            total_rate=reader.number(document, "total_token_throughput"),
        )
    )
    return found


# guidellm


def _is_guidellm(document: Mapping[str, Any]) -> bool:
    return isinstance(document.get("benchmarks"), list) and isinstance(document.get("metadata"), dict)


def _read_guidellm(reader: _Reader, document: Mapping[str, Any]) -> _Found:
    spec = ("config", "spec", "backend")
    found = _Found(
        "guidellm",
        reader.text(document, "metadata", "guidellm_version"),
        reader.text(document, *spec, "model") or "unknown",
        reader.text(document, *spec, "target"),
    )
    for benchmark in document["benchmarks"]:
        metrics = benchmark.get("metrics") if isinstance(benchmark, dict) else None
        totals = metrics.get("request_totals") if isinstance(metrics, dict) else None
        requests = reader.needed(totals, "successful")

        def of(name: str, unit: float, metrics: Any = metrics, requests: float = requests) -> Distribution | None:
            summary = metrics.get(name) if isinstance(metrics, dict) else None
            good = summary.get("successful") if isinstance(summary, dict) else None
            values = {key: reader.number(good, key) for key in ("mean", "median", "min", "max")}
            values |= {key: reader.number(good, "percentiles", key) for key in ("p25", "p75", "p90", "p95", "p99")}
            return reader.distribution(values, round(reader.number(good, "count") or requests), unit)

        users = reader.number(benchmark, "config", "strategy", "streams")
        if users is None:
            users = reader.number(metrics, "request_concurrency", "successful", "mean") or 1.0
            found.notes.append(f"requests came at a rate; {users:.1f} is the mean number in work at once")
        found.cells.append(
            _cell(
                prompt=reader.number(metrics, "prompt_token_count", "successful", "mean") or 0.0,
                output=reader.number(metrics, "output_token_count", "successful", "mean") or 0.0,
                users=users,
                requests=requests,
                errors=reader.number(totals, "errored") or 0.0,
                seconds=reader.needed(benchmark, "duration"),
                first_token=of("time_to_first_token_ms", 1e-3),
                between=of("inter_token_latency_ms", 1e-3),
                latency=of("request_latency", 1.0),
                output_rate=reader.number(metrics, "output_tokens_per_second", "successful", "mean"),
                total_rate=reader.number(metrics, "tokens_per_second", "successful", "mean"),
            )
        )
    if not found.cells:
        raise _invalid("it holds no benchmark.", reader.file)
    return found


# aiperf


def _is_aiperf(document: Mapping[str, Any]) -> bool:
    return "aiperf_version" in document


def _read_aiperf(reader: _Reader, document: Mapping[str, Any]) -> _Found:
    config = document.get("input_config")
    config = config if isinstance(config, dict) else {}
    found = _Found("aiperf", reader.text(document, "aiperf_version"), _first(config, "models", "items", "name"), None)
    urls = config.get("endpoint", {}).get("urls") if isinstance(config.get("endpoint"), dict) else None
    found.url = urls[0] if isinstance(urls, list) and urls and isinstance(urls[0], str) else None
    if document.get("was_cancelled") is True:
        found.stopped = "cancelled"
    requests = reader.needed(document, "request_count", "avg")

    def of(name: str) -> Distribution | None:
        entry = document.get(name)
        unit = {"ms": 1e-3, "sec": 1.0, "s": 1.0, "us": 1e-6, "ns": 1e-9}.get(
            reader.text(entry, "unit") or "", math.nan
        )
        if math.isnan(unit):
            return None
        values = {key: reader.number(entry, key) for key in ("p25", "p75", "p90", "p95", "p99", "min", "max")}
        values |= {"mean": reader.number(entry, "avg"), "median": reader.number(entry, "p50")}
        return reader.distribution(values, round(reader.number(entry, "count") or requests), unit)

    phases = config.get("phases")
    phase = (
        next((p for p in phases if isinstance(p, dict) and p.get("kind") == "profiling"), None)
        if isinstance(phases, list)
        else None
    )
    users = reader.number(phase, "concurrency")
    if users is None:
        users = reader.number(document, "effective_concurrency", "avg") or 1.0
        found.notes.append(f"the file names no concurrency; {users:.1f} is the mean number in work at once")
    found.cells.append(
        _cell(
            prompt=reader.number(document, "usage_prompt_tokens", "avg")
            or reader.number(document, "input_sequence_length", "avg")
            or 0.0,
            output=reader.number(document, "output_sequence_length", "avg") or 0.0,
            users=users,
            requests=requests,
            errors=sum(_errors(document).values()) or reader.number(document, "error_request_count", "avg") or 0.0,
            seconds=reader.number(document, "benchmark_duration", "avg") or 0.0,
            messages=_errors(document),
            first_token=of("time_to_first_token"),
            between=of("inter_token_latency"),
            latency=of("request_latency"),
            output_rate=reader.number(document, "output_token_throughput", "avg"),
            total_rate=reader.number(document, "total_token_throughput", "avg"),
        )
    )
    return found


def _errors(document: Mapping[str, Any]) -> dict[str, int]:
    """aiperf's kinds of errors and how often each occurred."""
    found: dict[str, int] = {}
    summary = document.get("error_summary")
    for entry in summary if isinstance(summary, list) else ():
        count = entry.get("count") if isinstance(entry, dict) else None
        if type(count) is int and 0 <= count <= _MOST:
            details = entry.get("error_details")
            kind = details.get("type") if isinstance(details, dict) else None
            found[str(kind or "error")[:160]] = found.get(str(kind or "error")[:160], 0) + count
    return found


def _first(document: Mapping[str, Any], outer: str, inner: str, name: str) -> str:
    """The name of the first item of a list two levels down."""
    items = document.get(outer)
    items = items.get(inner) if isinstance(items, dict) else None
    item = items[0] if isinstance(items, list) and items and isinstance(items[0], dict) else {}
    found = item.get(name)
    return found if isinstance(found, str) else "unknown"


_READERS: tuple[tuple[Callable[[Mapping[str, Any]], bool], Callable[[_Reader, Mapping[str, Any]], _Found]], ...] = (
    (_is_vllm, _read_vllm),
    (_is_guidellm, _read_guidellm),
    (_is_aiperf, _read_aiperf),
)
