"""A comparison as CSV and as Markdown, from its record alone."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict

from snugfit.records.comparison import CompareRecord, LossRow, TaskRow
from snugfit.report.markdown import escape, markdown_table
from snugfit.report.tables import context_name, more_tokens, p_value

SIGNIFICANT = 0.05
CSV_COLUMNS = (
    *("family", "name", "metric", "a", "b", "difference", "low", "high", "count", "p", "p_holm", "only_a", "only_b"),
    *("z", "tokens", "perplexity_a", "perplexity_b", "perplexity_ratio", "more_tokens", "note"),
)


def comparison_csv(record: CompareRecord) -> str:
    """A heading and one line for each comparison, numbers in full; what only one side has is a line with a note."""
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for task in record.tasks:
        writer.writerow(asdict(task) | {"family": "tasks", "name": task.task, "count": task.items})
    for loss in record.losses:
        names = {"family": "losses", "name": context_name(loss.context), "metric": loss.figure}
        writer.writerow(asdict(loss) | names | {"count": loss.chunks})
    for lone in record.unpaired:
        writer.writerow(asdict(lone) | {"note": f"only in {lone.side}"})
    return out.getvalue()


def comparison_markdown(record: CompareRecord) -> str:
    """A table of tasks, one of losses; under each the test that was made, at the end what was not tested, and why."""
    parts = []
    if record.tasks:
        parts += [_tasks_table(record), _tasks_caption(record.tasks)]
    if record.losses:
        parts += [_losses_table(record), _losses_caption(record.losses)]
    remarks = [(task.task, task.metric, task.note) for task in record.tasks]
    remarks += [(context_name(loss.context), loss.figure, loss.note) for loss in record.losses]
    remarks += [(lone.name, lone.metric, f"only in {lone.side}, not compared.") for lone in record.unpaired]
    lines = [f"- {', '.join(escape(part) for part in at if part)}: {escape(note)}" for *at, note in remarks if note]
    return "\n\n".join([*parts, *(["\n".join(lines)] if lines else [])]) + "\n"


def _tasks_table(record: CompareRecord) -> str:
    names = [f"{side}: {escape(at.tasks_model or '')}" for side, at in (("A", record.a), ("B", record.b))]
    headings = ["task", "metric", *names, "A - B", "95 % interval", "items", "only A / only B right"]
    rows, before = [], ""
    for row in record.tasks:
        form, scale, unit, points = (".2f", 100, "%", " pp") if row.kind == "accuracy" else (".4f", 1, "", "")
        values = [_number(value, form, scale, unit) for value in (row.a, row.b)]
        values = _bold(row, values, higher_is_better=row.higher_is_better)
        found = [_number(row.difference, f"+{form}", scale, points), _interval(row.low, row.high, f"+{form}", scale)]
        counts = [f"{row.items:,}", "" if row.only_a is None else f"{row.only_a:,} / {row.only_b:,}"]
        tests = [_p(row.p), _p(row.p_holm), _number(row.z, "+.2f")]
        task = "" if row.task == before else escape(row.task)  # once for all its metrics
        rows.append([task, escape(row.metric), *values, *found, *counts, *tests])
        before = row.task
    return markdown_table([*headings, "p", "p (Holm)", "z, unpaired"], rows, left=2)


def _tasks_caption(rows: Sequence[TaskRow]) -> str:
    items = sum({row.task: row.items for row in rows if row.difference is not None}.values())
    return (
        f"A minus B, paired on {items:,} items: McNemar's exact test for accuracies (pp: percentage points), a "
        f"studentized bootstrap over items for other scores and for every interval. {_bold_means(rows)} z is what the "
        "reported errors would say of unpaired scores, for reference."
    )


def _losses_table(record: CompareRecord) -> str:
    names = [f"{side}: {escape(at.eval_model or '')}" for side, at in (("A", record.a), ("B", record.b))]
    headings = ["context", "figure", *names, "A - B", "95 % interval", "perplexity A", "perplexity B", "ratio A / B"]
    rows, before = [], ""
    for row in record.losses:
        values = _bold(row, [_number(value, ".5f") for value in (row.a, row.b)], higher_is_better=False)
        found = [_number(row.difference, "+.5f"), _interval(row.low, row.high, "+.5f")]
        perplexities = [_number(v, ".4f") for v in (row.perplexity_a, row.perplexity_b, row.perplexity_ratio)]
        tests = [f"{row.chunks:,}", _p(row.p), _p(row.p_holm), more_tokens(row.more_tokens, row.p)]
        name = context_name(row.context)
        rows.append(["" if name == before else name, row.figure, *values, *found, *perplexities, *tests])
        before = name
    return markdown_table([*headings, "chunks", "p", "p (Holm)", "more tokens"], rows, left=2)


def _losses_caption(rows: Sequence[LossRow]) -> str:
    counts = {row.context: row.chunks for row in rows if row.difference is not None}
    chunks = ", ".join(f"{count:,}" for count in counts.values())
    return (
        f"A minus B in nats a token, paired on {chunks or 0} chunks: a studentized bootstrap over chunks. "
        f"{_bold_means(rows)} More tokens: how many would make p < {SIGNIFICANT} four times in five, were the "
        "difference what it seems; settled: it is below already."
    )


def _bold_means(rows: Sequence[TaskRow] | Sequence[LossRow]) -> str:
    tested = sum(row.p is not None for row in rows)
    tests = "1 test" if tested == 1 else f"{tested} tests"
    return f"**Bold**: the better side, where p < {SIGNIFICANT} after Holm's correction for {tests}."


def _bold(row: TaskRow | LossRow, values: list[str], *, higher_is_better: bool) -> list[str]:
    """The values of A and B, the better one in bold where the difference is significant."""
    if row.p_holm is None or row.p_holm >= SIGNIFICANT or row.a is None or row.b is None or row.a == row.b:
        return values
    better = 0 if (row.a > row.b) == higher_is_better else 1
    return [f"**{value}**" if side == better else value for side, value in enumerate(values)]


def _number(value: float | None, form: str, scale: float = 1, unit: str = "") -> str:
    return "" if value is None else f"{value * scale:{form}}{unit}"


def _interval(low: float | None, high: float | None, form: str, scale: float = 1) -> str:
    if low is None or high is None:
        return ""
    return "no difference" if low == high == 0 else f"[{low * scale:{form}}, {high * scale:{form}}]"


def _p(p: float | None) -> str:
    return "" if p is None else p_value(p)
