"""What `serve` saw, in words and tables, from its record alone."""

from __future__ import annotations

from snugfit.records.serve import ServeRecord
from snugfit.report.markdown import markdown_report
from snugfit.report.tables import Sheet


def serve_sheets(record: ServeRecord) -> list[Sheet]:
    """The memory that was predicted beside what was taken, and the answers; empty of what is unknown."""
    found = []
    rows = _memory_rows(record)
    if rows:
        title = f"{record.model} on {record.engine} {record.engine_version or ''}".rstrip()
        note = "Predicted by `fit` from headers alone; taken as the engine's log says it."
        found.append(Sheet(title, ("memory", "predicted", "taken", "difference"), tuple(rows), 1, note))
    if record.answers:
        answers = tuple(
            (one.verdict, one.question, " ".join(one.text.split())[:120], str(one.tokens)) for one in record.answers
        )
        found.append(Sheet("Greedy answers", ("looks", "question", "answer", "tokens"), answers, 3))
    return found


def serve_lines(record: ServeRecord) -> list[str]:
    """The outcome, the command, kernels, results and remarks."""
    lines = []
    if record.refusal is not None:
        lines.append(f"REFUSED: {record.refusal.reason}. {record.refusal.remedy}")
        lines.append(f"its log: {record.refusal.line}")
    if record.stopped is not None:
        lines.append(f"PARTIAL: {record.stopped}")
    lines.append(f"command: {' '.join(record.command)}")
    kernels = (*record.kernels.linear, *record.kernels.moe, *record.kernels.attention)
    if kernels:
        lines.append(f"kernels: {'; '.join(kernels)}")
    if record.predicted is not None and record.predicted.kernels:
        lines.append(f"kernels, predicted: {'; '.join(record.predicted.kernels)}")
    lines += [f"{verb}: {file}" for verb, file in record.results.items()]
    lines.append(f"log: {record.log}")
    return [*lines, *(f"note: {note}" for note in record.notes)]


def serve_markdown(record: ServeRecord) -> str:
    """The report."""
    return markdown_report("Served", (sheet.to_markdown() for sheet in serve_sheets(record)), serve_lines(record))


def _memory_rows(record: ServeRecord) -> list[tuple[str, str, str, str]]:
    predicted, taken = record.predicted, record.taken
    pairs = (
        ("weights, MiB", None if predicted is None else predicted.weight_bytes, taken.weight_bytes, 2**20),
        ("KV cache, MiB", None if predicted is None else predicted.cache_bytes, taken.cache_bytes, 2**20),
        ("KV cache, tokens", None if predicted is None else predicted.cache_tokens, taken.cache_tokens, 1),
        ("CUDA graphs, MiB", None, taken.graph_bytes, 2**20),
        ("whole GPU in use, MiB", None, taken.gpu_used_bytes, 2**20),
    )
    rows = []
    for name, expected, found, unit in pairs:
        if expected is None and found is None:
            continue
        cells = ["-" if value is None else f"{value / unit:,.0f}" for value in (expected, found)]
        difference = f"{expected / found - 1:+.1%}" if expected is not None and found else ""
        rows.append((name, cells[0], cells[1], difference))
    return rows
