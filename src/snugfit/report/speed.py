"""Tables and plots of speed, from records of `bench` and `serve` alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from snugfit.records.bench import BenchCell, BenchRecord, BenchRun, Distribution
from snugfit.records.serve import ServeRecord
from snugfit.report.collection import last_part
from snugfit.report.plots import LENGTHS, Plot, Point, line_of
from snugfit.report.table import Cell, Column, Table

MEDIANS = "Medians; quartiles beside them."
BANDS = "medians; bands: half the distance between the quartiles"
ENGINE_TITLES = {"vllm": "vLLM", "aphrodite": "Aphrodite", "sglang": "SGLang"}
_PREFIX_CACHE = {
    "counted": "the server's counters of prefix-cache hits did not move",
    "unique": "no two prompts begin alike; the server reports no cache hits",
    "unknown": "whether a prefix cache answered is not known",
}


def speed_tables(records: Sequence[BenchRecord]) -> Iterator[Table]:
    """Prefill, decoding by depth, load by users, ratios of two servers, memory of servers."""
    runs = [(record, run) for record in records for run in record.runs]
    yield _cells_table("prefill", "Prefill", runs, (*_prompt(), _rate("prefill", "prompt tokens/s"), *_first_token()))
    decode = (*_prompt(), _rate("decode", "tokens/s of one user"), *_first_token())
    yield _cells_table("decode", "Decoding by depth of context", runs, decode)
    load = (
        Column(key="concurrency", heading="users", form="count"),
        *_prompt(),
        Column(key="output_tokens", heading="asked for", form="count"),
        _rate("throughput", "output tokens/s, all"),
        _rate("decode", "tokens/s, each"),
        *_first_token(),
        Column(key="latency", heading="latency, s", form=2),
        Column(key="latency_p95", heading="95 % below", form=2),
    )
    yield _cells_table("load", "Throughput by number of users", runs, load)
    yield _ratios(records)
    yield _memory(runs)


def engine_name(name: str | None, version: str | None) -> str:
    """An engine and its version as tables write them; "" where neither is known."""
    shown = ENGINE_TITLES.get((name or "").lower(), name)
    return " ".join(filter(None, (shown, version)))


def _rate(key: str, heading: str) -> Column:
    return Column(key=key, heading=heading, form=1)


def _prompt() -> tuple[Column, ...]:
    return (Column(key="prompt_tokens", heading="prompt tokens", form="count"),)


def _first_token() -> tuple[Column, ...]:
    return (
        Column(key="first_token", heading="first token after, s", form=3),
        Column(key="first_token_p95", heading="95 % below", form=3),
    )


def _cells_table(
    kind: str, title: str, runs: Sequence[tuple[BenchRecord, BenchRun]], columns: Sequence[Column]
) -> Table:
    rows = [_row(run, cell) for _, run in runs for cell in run.cells if cell.kind == kind]
    shown: list[Column] = []
    for column in columns:
        shown.append(column)
        if column.key in _WITH_QUARTILES:
            low, high = (Column(key=f"{column.key}_{q}", heading=h, form=column.form) for q, h in _QUARTILES)
            shown += [low, high]
    notes = [MEDIANS, *_notes(runs, kind)]
    return Table(
        name=kind,
        title=title,
        columns=(
            Column(key="server", heading="server"),
            *shown,
            Column(key="requests", heading="requests", form="count"),
            Column(key="errors", heading="errors", form="count"),
            Column(key="status", heading="status"),
        ),
        rows=tuple(rows),
        note=" ".join(notes),
    )


_QUARTILES = (("p25", "25 %"), ("p75", "75 %"))
_WITH_QUARTILES = frozenset({"prefill", "decode", "throughput"})


def _notes(runs: Sequence[tuple[BenchRecord, BenchRun]], kind: str) -> Iterator[str]:
    """What measured, on which hardware, and how the prefix cache is known to be out of play."""
    lines: dict[str, None] = {}
    for record, run in runs:
        if not any(cell.kind == kind for cell in run.cells):
            continue
        server = run.server
        engine = engine_name(server.engine, server.version) or "unknown engine"
        gpu = server.memory.gpu or record.hardware.get("gpu")
        place = f" on {gpu}" if isinstance(gpu, str) and gpu else ""
        by = f"{record.tool} {record.tool_version or ''}".strip()
        lines[f"{server.name}: {engine}{place}, by {by}; {_PREFIX_CACHE[run.prefix_cache]}."] = None
        if not record.complete:
            lines[f"The run was stopped ({record.stopped or 'no reason'}): what was measured by then."] = None
    yield from lines


def _row(run: BenchRun, cell: BenchCell) -> Mapping[str, Cell]:
    row: dict[str, Cell] = {
        "server": run.server.name,
        "prompt_tokens": cell.prompt_tokens,
        "output_tokens": cell.output_tokens,
        "concurrency": cell.concurrency,
        "requests": cell.requests,
        "errors": cell.errors or None,
        "status": None if cell.status == "measured" else f"{cell.status}: {cell.reason or ''}".rstrip(": "),
    }
    if cell.status == "refused":
        return row  # its figures are of the cache
    for key in ("prefill", "first_token", "decode", "latency", "throughput"):
        found: Distribution | None = getattr(cell, key)
        if found is not None:
            row[key] = found.median
            row |= {f"{key}_{q}": getattr(found, q) for q in ("p25", "p75", "p95")}
    return row


def _ratios(records: Sequence[BenchRecord]) -> Table:
    rows: list[Mapping[str, Cell]] = [
        {
            "servers": f"{record.runs[1].server.name} over {record.runs[0].server.name}",
            "kind": ratio.kind,
            "prompt_tokens": ratio.prompt_tokens,
            "concurrency": ratio.concurrency,
            "figure": ratio.figure.replace("_", " "),
            "ratio": ratio.ratio,
            "low": ratio.low,
            "high": ratio.high,
            "pairs": ratio.pairs,
        }
        for record in records
        if len(record.runs) > 1
        for ratio in record.ratios
    ]
    return Table(
        name="ratios",
        title="Two servers in turn",
        columns=(
            Column(key="servers", heading="servers"),
            Column(key="kind", heading="kind"),
            Column(key="figure", heading="figure"),
            Column(key="prompt_tokens", heading="prompt tokens", form="count"),
            Column(key="concurrency", heading="users", form="count"),
            Column(key="ratio", heading="ratio", form=3),
            Column(key="low", heading="95 % from", form=3),
            Column(key="high", heading="to", form=3),
            Column(key="pairs", heading="pairs", form="count"),
        ),
        rows=tuple(rows),
        note="Measured in turn. Of rates (prefill, decode, throughput) above 1 is faster, of times below 1.",
    )


def _memory(runs: Sequence[tuple[BenchRecord, BenchRun]]) -> Table:
    rows: list[Mapping[str, Cell]] = [
        {
            "server": run.server.name,
            "engine": engine_name(run.server.engine, run.server.version),
            "gpu": run.server.memory.gpu,
            "used": run.server.memory.gpu_used_bytes,
            "total": run.server.memory.gpu_total_bytes,
            "kv_cache_tokens": run.server.memory.kv_cache_tokens,
            "max_model_len": run.server.max_model_len,
        }
        for _, run in runs
        if run.server.memory.gpu_used_bytes is not None or run.server.memory.kv_cache_tokens is not None
    ]
    return Table(
        name="memory",
        title="Memory of the servers",
        columns=(
            Column(key="server", heading="server"),
            Column(key="engine", heading="engine"),
            Column(key="gpu", heading="GPU"),
            Column(key="used", heading="used", form="gib"),
            Column(key="total", heading="of", form="gib"),
            Column(key="kv_cache_tokens", heading="tokens in the KV cache", form="count"),
            Column(key="max_model_len", heading="longest context", form="count"),
        ),
        rows=tuple(rows),
        note="Measured on the running server; the whole GPU, with every process on it.",
    )


def started_table(records: Sequence[ServeRecord]) -> Table:
    """What `fit` predicted beside what an engine took, or why it refused."""
    rows: list[Mapping[str, Cell]] = []
    for record in records:
        predicted, taken = record.predicted, record.taken
        sound = sum(answer.verdict == "answers" for answer in record.answers)
        rows.append(
            {
                "model": last_part(record.model),
                "engine": engine_name(record.engine, record.engine_version),
                "gpu": record.gpu,
                "started": record.started,
                "weights_predicted": predicted.weight_bytes if predicted else None,
                "weights_taken": taken.weight_bytes,
                "cache_predicted": predicted.cache_tokens if predicted else None,
                "cache_taken": taken.cache_tokens,
                "used": taken.gpu_used_bytes,
                "answers": f"{sound} of {len(record.answers)}" if record.answers else None,
                "refusal": record.refusal.reason if record.refusal else None,
            }
        )
    return Table(
        name="started",
        title="Predicted and taken",
        columns=(
            Column(key="model", heading="model"),
            Column(key="engine", heading="engine"),
            Column(key="gpu", heading="GPU"),
            Column(key="started", heading="started"),
            Column(key="weights_predicted", heading="weights, predicted", form="gib"),
            Column(key="weights_taken", heading="weights, taken", form="gib"),
            Column(key="cache_predicted", heading="cache tokens, predicted", form="count"),
            Column(key="cache_taken", heading="cache tokens, taken", form="count"),
            Column(key="used", heading="GPU memory used", form="gib"),
            Column(key="answers", heading="sound answers"),
            Column(key="refusal", heading="why it refused"),
        ),
        rows=tuple(rows),
        note="Predicted by `fit` before the engine started; taken: from the engine's log and the GPU.",
    )


def speed_plots(records: Sequence[BenchRecord]) -> list[Plot]:
    """Prefill by length, throughput by users, decoding by depth: a line for each server."""
    runs = [run for record in records for run in record.runs]
    wanted: tuple[tuple[str, str, str, str, Callable[[BenchCell], float], str], ...] = (
        ("prefill", "prefill", "prefill-by-length", "prompt tokens a second", _length, "prompt length, tokens"),
        ("load", "throughput", "throughput-by-users", "output tokens a second, all users", _users, "users at once"),
        ("decode", "decode", "decode-by-depth", "tokens a second of one user", _length, LENGTHS),
    )
    places = {engine_name(run.server.engine, run.server.version): None for run in runs}
    gpus = {run.server.memory.gpu: None for run in runs}
    title = " on ".join(filter(None, (next(iter(one)) for one in (places, gpus) if len(one) == 1)))
    plots = []
    for kind, figure, name, label, x_of, x_label in wanted:
        lines = []
        for number, run in enumerate(runs):
            points = _points(run, kind, figure, x_of)
            if points:
                lines.append(line_of(run.server.name, number, points))
        if lines and max(len(line.points) for line in lines) > 1:
            drawn = tuple(lines)
            plots.append(Plot(name=name, x_label=x_label, y_label=label, title=title, lines=drawn, caption=BANDS))
    return plots


def _length(cell: BenchCell) -> float:
    return float(cell.prompt_tokens)


def _users(cell: BenchCell) -> float:
    return float(cell.concurrency)


def _points(run: BenchRun, kind: str, figure: str, x_of: Callable[[BenchCell], float]) -> list[Point]:
    """Medians by x, with half the distance between the quartiles; positive ones alone, as axes are logarithmic."""
    points: dict[float, Point] = {}
    for cell in run.cells:
        found: Distribution | None = getattr(cell, figure)
        if cell.kind != kind or cell.status not in ("measured", "partial") or found is None:
            continue
        x, median = x_of(cell), found.median
        if x > 0 and math.isfinite(median) and median > 0:
            spread = (found.p75 - found.p25) / 2 if found.p25 is not None and found.p75 is not None else None
            points[x] = (x, median, spread if spread is not None and math.isfinite(spread) else None)
    return [points[x] for x in sorted(points)]
