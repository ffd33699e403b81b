"""Tables of a benchmark, from its record alone: for a terminal, as Markdown, as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import fields

from snugfit.records.bench import BenchCell, BenchRatio, BenchRecord, BenchRun, Distribution
from snugfit.report.markdown import markdown_report
from snugfit.report.tables import Sheet

_FIGURES = ("prefill", "first_token", "decode", "between_tokens", "latency", "throughput", "total_throughput")
_QUANTILES = tuple(one.name for one in fields(Distribution) if one.name != "values")
CSV_COLUMNS = (
    *("server", "model", "kind", "prompt_tokens", "output_tokens", "concurrency", "status", "requests", "errors"),
    *("prefix_hits", *(f"{figure}_{name}" for figure in _FIGURES for name in _QUANTILES)),
)
_PREFIX = {
    "counted": "the server's own counters show no prompt tokens out of its prefix cache, except where a cell says so",
    "unique": "no two prompts begin alike; the server does not report the hits of its prefix cache",
    "unknown": "whether prompts came out of a prefix cache is unknown",
}


def bench_sheets(record: BenchRecord) -> list[Sheet]:
    """Each server's prompts and single answers, its load, and the ratios of two servers."""
    found = []
    for run in record.runs:
        single = [cell for cell in run.cells if cell.kind != "load"]
        load = [cell for cell in run.cells if cell.kind == "load"]
        found += [_single(run, single)] if single else []
        found += [_load(run, load)] if load else []
    return [*found, *([_ratios(record)] if record.ratios else [])]


def bench_lines(record: BenchRecord) -> list[str]:
    """What a reader has to know beside the tables: how, with what memory, what is missing."""
    lines = []
    if not record.complete:
        lines.append(f"PARTIAL: stopped early ({record.stopped}).")
    lines.append(f"Measured by {record.tool} {record.tool_version or ''}".rstrip() + ".")
    for run in record.runs:
        lines += [f"{run.server.name}: {text}." for text in (_PREFIX[run.prefix_cache], _memory(run)) if text]
        for cell in run.cells:
            if cell.reason is not None:
                lines.append(f"{run.server.name}, {cell.label}: {cell.status}: {cell.reason}.")
            for message, count in cell.error_messages.items():
                lines.append(f"{run.server.name}, {cell.label}: {count} x {message}")
    return [*lines, *(f"Note: {note}." for note in record.notes)]


def bench_markdown(record: BenchRecord) -> str:
    """The report."""
    return markdown_report("Speed", (sheet.to_markdown() for sheet in bench_sheets(record)), bench_lines(record))


def bench_csv(record: BenchRecord) -> str:
    """One line for each server and cell, numbers in full."""
    output = io.StringIO()
    writer = csv.writer(output, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for run in record.runs:
        for cell in run.cells:
            row = [run.server.url, run.server.model, cell.kind, cell.prompt_tokens, cell.output_tokens]
            row += [cell.concurrency, cell.status, cell.requests, cell.errors, cell.prefix_hits]
            for figure in _FIGURES:
                found: Distribution | None = getattr(cell, figure)
                row += [None if found is None else getattr(found, name) for name in _QUANTILES]
            writer.writerow(row)
    return output.getvalue()


def _single(run: BenchRun, cells: Sequence[BenchCell]) -> Sheet:
    """In the shape of llama-benchy's table: pp for prompts, tg for tokens behind a prompt of depth d."""
    rows = tuple(
        (
            cell.label,
            _rate(cell.decode if cell.kind == "decode" else cell.prefill),
            _milliseconds(cell.first_token),
            f"{cell.requests:,}",
            f"{cell.errors:,}",
            cell.status,
        )
        for cell in cells
    )
    note = (
        "t/s: prompt tokens to the first token (pp), answer tokens after the first (tg), medians [quartiles]; first "
        "token in ms."
    )
    return Sheet(_title(run, "one user"), ("test", "t/s", "first token", "answered", "errors", "status"), rows, 1, note)


def _load(run: BenchRun, cells: Sequence[BenchCell]) -> Sheet:
    rows = tuple(
        (
            str(cell.concurrency),
            _rate(cell.throughput),
            _rate(cell.decode),
            _quantiles(cell.first_token),
            _quantiles(cell.between_tokens),
            _quantiles(cell.latency),
            f"{cell.requests:,}",
            f"{cell.errors:,}",
            cell.status,
        )
        for cell in cells
    )
    headings = (
        *("users", "all t/s", "each t/s", "first token p50/p95/p99", "a token p50/p95/p99", "latency p50/p95/p99"),
        *("answered", "errors", "status"),
    )
    first = cells[0]
    note = (
        f"Prompts of {first.prompt_tokens:,} tokens, answers of {first.output_tokens:,}; t/s: answer tokens a second, "
        "medians [quartiles]; times in ms, of requests."
    )
    return Sheet(_title(run, "users at once"), headings, rows, 0, note)


def _ratios(record: BenchRecord) -> Sheet:
    first, second = (run.server.name for run in record.runs[:2])
    rows = tuple((one.label, one.figure.replace("_", " "), _interval(one), str(one.pairs)) for one in record.ratios)
    title = f"{second} over {first}"
    note = "Geometric means over repeats in turn, [95 % interval]; rates above 1: the second is faster."
    return Sheet(title, ("test", "figure", "ratio", "pairs"), rows, 2, note)


def _interval(one: BenchRatio) -> str:
    bounds = "" if one.low is None or one.high is None else f" [{one.low:.3f}, {one.high:.3f}]"
    return f"{one.ratio:.3f}{bounds}"


def _title(run: BenchRun, what: str) -> str:
    engine = " ".join(part for part in (run.server.engine, run.server.version) if part)
    return f"{run.server.name}{f' on {engine}' if engine else ''}, {what}"


def _memory(run: BenchRun) -> str:
    held, parts = run.server.memory, []
    if held.gpu is not None and held.gpu_used_bytes is not None and held.gpu_total_bytes is not None:
        used, total = held.gpu_used_bytes / 2**20, held.gpu_total_bytes / 2**20
        parts.append(f"{used:,.0f} of {total:,.0f} MiB in use on {held.gpu}")
    if held.kv_cache_tokens is not None:
        parts.append(f"a KV cache of {held.kv_cache_tokens:,} tokens (its {held.kv_cache_source})")
    return ", ".join(parts)


def _rate(found: Distribution | None) -> str:
    if found is None:
        return "-"
    quartiles = "" if found.p25 is None or found.count < 2 else f" [{_number(found.p25)}, {_number(found.p75)}]"
    return f"{_number(found.median)}{quartiles}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:,.1f}"


def _milliseconds(found: Distribution | None) -> str:
    return "-" if found is None else _number(1000 * found.median)


def _quantiles(found: Distribution | None) -> str:
    if found is None:
        return "-"
    values = (found.median, found.p95, found.p99)
    return " / ".join("-" if value is None else _number(1000 * value) for value in values)
