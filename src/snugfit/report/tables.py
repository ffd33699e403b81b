"""Tables of an evaluation, from its record alone: for a terminal, as Markdown, as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from snugfit.records import Bin, ContextFigures, EvalRecord, ModelFigures, TasksRecord

CSV_COLUMNS = (
    *("context", "model", "chunks", "tokens", "perplexity", "perplexity_error", "kl", "kl_error", "kl_kind"),
    *("kl_median", "kl_p90", "kl_p95", "kl_p99", "kl_p999", "kl_max", "reverse_kl", "same_top", "rms_change"),
    *("floor_kl", "floor_error", "floor_tokens", "nonfinite"),
)


@dataclass(frozen=True)
class Sheet:
    """A table: its title, its headings, its cells as text; `left` columns are aligned left, the others right."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1
    note: str = ""

    def to_markdown(self) -> str:
        """As a Markdown table under its title."""
        marks = ["---"] * self.left + ["---:"] * (len(self.headings) - self.left)
        lines = [f"### {self.title}", ""]
        lines += [_line(self.headings), "|" + "|".join(marks) + "|", *(_line(row) for row in self.rows)]
        return "\n".join([*lines, "", *([self.note, ""] if self.note else [])])


def evaluation_sheets(record: EvalRecord) -> list[Sheet]:
    """What a terminal shows: figures by context length, then pairs of candidates."""
    sheets = [_by_context(record)]
    if any(context.pairs for context in record.contexts):
        sheets.append(_pairs(record))
    return sheets


def all_sheets(record: EvalRecord) -> list[Sheet]:
    """All that a report holds: those of the terminal, perplexities side by side, by position, by confidence."""
    sheets = [*evaluation_sheets(record)]
    if len(record.contexts) > 1:
        sheets.insert(1, _side_by_side(record))
    for context in record.contexts:
        name = context_name(context)
        sheets.append(_bins(f"By position, {name}", "position", context, [m.by_position for m in context.models]))
        if any(model.kl is not None for model in context.models):
            found = [m.by_confidence for m in context.models]
            sheets.append(_bins(f"By the reference's largest probability, {name}", "probability", context, found))
    return sheets


def task_sheet(record: TasksRecord) -> Sheet:
    """Every metric of every task, with lm_eval's standard error and the number of items."""
    rows = tuple(
        (result.task, result.metric, with_error(result.value, result.standard_error, 4), f"{len(result.items):,}")
        for result in record.tasks
    )
    return Sheet(record.model, ("task", "metric", "value", "items"), rows, 2)


def to_markdown(record: EvalRecord) -> str:
    """The report: tables, and below them what was measured on what."""
    sheets = (sheet.to_markdown() for sheet in all_sheets(record))
    parts = ["# What was lost", "", *sheets, *_continuations(record), *_sources(record)]
    return "\n".join(parts).rstrip() + "\n"


def to_csv(record: EvalRecord) -> str:
    """One line for each context and model, numbers in full."""
    output = io.StringIO()
    writer = csv.writer(output, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for context in record.contexts:
        for model in context.models:
            kl, floor = model.kl, model.floor
            quantiles = [kl.median, kl.p90, kl.p95, kl.p99, kl.p999, kl.max] if kl else [""] * 6
            writer.writerow(
                [
                    context.context,
                    model.name,
                    context.chunks,
                    sum(model.tokens_by_chunk),
                    model.perplexity,
                    model.perplexity_error,
                    kl.mean if kl else "",
                    kl.standard_error if kl else "",
                    model.kl_kind if kl else "",
                    *quantiles,
                    model.reverse_kl.mean if model.reverse_kl else "",
                    model.same_top,
                    model.rms_change,
                    floor.kl if floor else "",
                    floor.standard_error if floor else "",
                    floor.tokens if floor else "",
                    model.nonfinite,
                ]
            )
    return output.getvalue()


def context_name(context: ContextFigures) -> str:
    """How tables and plots call a context length."""
    return f"{context.context:,} tokens" if context.context else "chat and rows"


def _by_context(record: EvalRecord) -> Sheet:
    headings = (
        *("context", "model", "tokens", "perplexity", "KL", "floor", "median", "p99", "p99.9", "max"),
        *("reverse KL", "same top", "RMS dp", "not finite"),
    )
    rows = []
    for context in record.contexts:
        floor = context.models[0].floor
        shared = floor.kl if floor else None
        rows += [(context_name(context), model.name, *_figures(model, shared)) for model in context.models]
    return Sheet("Loss against the reference", headings, tuple(rows), 2, _by_context_note(record))


def _figures(model: ModelFigures, reference_floor: float | None) -> Iterator[str]:
    yield f"{sum(model.tokens_by_chunk):,}"
    yield with_error(model.perplexity, model.perplexity_error, 3)
    if model.kl is None:
        yield from ("",) * 9
    else:
        mark = {"exact": "", "estimate": "~", "lower bound": ">= "}[model.kl_kind]
        yield mark + with_error(model.kl.mean, model.kl.standard_error, 4)
        own = model.floor.kl if model.floor else None
        floors = [f"{value:.4f}" for value in (reference_floor, own) if value is not None]
        yield " / ".join(floors)
        yield from (f"{v:.4f}" for v in (model.kl.median, model.kl.p99, model.kl.p999, model.kl.max))
        yield f"{model.reverse_kl.mean:.4f}" if model.reverse_kl else ""
        yield "" if model.same_top is None else f"{model.same_top:.2%}"
        yield "" if model.rms_change is None else f"{model.rms_change:.4f}"
    yield str(model.nonfinite or "")


def _by_context_note(record: EvalRecord) -> str:
    parts = ["Nats a token; errors are one standard error over chunks."]
    if any(model.floor for context in record.contexts for model in context.models):
        parts.append(
            "Floor: KL of the reference (and, behind a stroke, of the candidate) against itself in wider arithmetic, "
            "on some of the chunks: differences of that size show nothing."
        )
    kinds = {model.kl_kind for context in record.contexts for model in context.models if model.kl}
    if "estimate" in kinds:
        errors = [m.kl_sampling_error for c in record.contexts for m in c.models if m.kl_sampling_error is not None]
        parts.append(f"~: against a stored reference; of the error, sampling is {max(errors, default=0):.1e}.")
        parts.append("Quantiles and reverse KL there are lower bounds.")
    if "lower bound" in kinds:
        parts.append(">=: a lower bound, made of the tokens that the server names.")
    if any(model.nonfinite for context in record.contexts for model in context.models):
        parts.append("Tokens whose logits were NaN or infinite are counted in the last column and nowhere else, and a")
        parts.append("model with such tokens is not paired with others.")
    return " ".join(parts)


def _side_by_side(record: EvalRecord) -> Sheet:
    names = [model.name for model in record.contexts[0].models]
    rows = tuple(
        (context_name(context), *(with_error(model.perplexity, None, 4) for model in context.models))
        for context in record.contexts
    )
    return Sheet("Perplexity by context length", ("context", *names), rows)


def _pairs(record: EvalRecord) -> Sheet:
    headings = (
        "context",
        "A",
        "B",
        "figure",
        "A - B",
        "95 % interval",
        "p",
        "p (Holm)",
        "chunks",
        "more tokens to settle",
    )
    rows = []
    for context in record.contexts:
        for pair in context.pairs:
            interval = "" if pair.low is None or pair.high is None else f"{pair.low:+.4f} .. {pair.high:+.4f}"
            p = "too few chunks" if pair.p is None else p_value(pair.p)
            corrected = "" if pair.p_holm is None else p_value(pair.p_holm)
            more = {0: "settled", None: ""}.get(pair.more_tokens, f"{pair.more_tokens:,}" if pair.more_tokens else "")
            difference = f"{pair.difference:+.4f}"
            bold = pair.p_holm is not None and pair.p_holm < 0.05
            shown = f"**{difference}**" if bold else difference
            rows.append(
                (
                    context_name(context),
                    pair.a,
                    pair.b,
                    pair.figure,
                    shown,
                    interval,
                    p,
                    corrected,
                    str(pair.chunks),
                    more,
                )
            )
    note = (
        "Paired bootstrap over chunks, nats a token; below zero A is better; bold where Holm's p over all pairs < 0.05."
    )
    return Sheet("Candidates against each other", headings, tuple(rows), 4, note)


def _bins(title: str, what: str, context: ContextFigures, found: Sequence[Sequence[Bin]]) -> Sheet:
    ranges = list(dict.fromkeys((b.low, b.high) for bins in found for b in bins))
    lookup = [{(b.low, b.high): b for b in bins} for bins in found]
    compared = [model.kl is not None for model in context.models]
    headings = [what, "tokens"]
    for model, against in zip(context.models, compared, strict=True):
        headings += [f"{model.name}: perplexity", *([f"{model.name}: KL"] if against else [])]
    rows = []
    for low, high in sorted(ranges):
        cells = [_range(what, low, high), ""]
        for bins, against in zip(lookup, compared, strict=True):
            entry = bins.get((low, high))
            cells[1] = cells[1] or (f"{entry.tokens:,}" if entry else "")
            cells.append(with_error(entry.perplexity, None, 3) if entry else "")
            if against:
                shown = entry is not None and entry.kl is not None
                cells.append(with_error(entry.kl or 0.0, entry.kl_error, 4) if shown and entry else "")
        rows.append(tuple(cells))
    return Sheet(title, tuple(headings), tuple(rows))


def _range(what: str, low: float, high: float) -> str:
    return f"{low:.0f} .. {high - 1:.0f}" if what == "position" else f"{low:g} .. {high:g}"


def _continuations(record: EvalRecord) -> Iterator[str]:
    """Side by side: what the reference and a candidate say from where they are farthest apart."""
    entries = (record.chat or {}).get("continuations", [])
    if not entries:
        return
    yield "### Where they part in the conversations"
    yield ""
    for entry in entries:
        yield f"**{entry['model']}**, {entry['where']}, token {entry['position']}, KL {entry['kl']:.3f}, first"
        yield f"{entry['same_tokens']} tokens alike. The log goes on with {entry['text']!r}."
        yield ""
        for name in ("before", "reference_says", "model_says"):
            yield f"    {name.replace('_', ' '):15} {entry[name]!r}"
        yield ""


def _sources(record: EvalRecord) -> Iterator[str]:
    yield "### What was measured"
    yield ""
    if record.reference:
        yield f"- reference: {record.reference['name']}, {record.reference['arithmetic']}"
    for entry in record.candidates:
        yield f"- {entry['name']}: {_stored(entry)}"
    yield f"- activations: profile {record.arguments['activations']}"
    for text in record.texts:
        yield f"- {text.name}: SHA-256 {text.sha256}"
    for context in record.contexts:
        size = f"{context.chunks} chunks, {context.tokens:,} tokens scored"
        yield f"- {context_name(context)}: {size}, digest {context.digest[:16]}"
    yield f"- {record.hardware.get('gpu') or record.hardware['processor']}, torch {record.versions['torch']}, "
    yield f"  transformers {record.versions['transformers']}, snugfit {record.snugfit}; {record.seconds['total']:.0f} s"


def _stored(entry: Mapping[str, Any]) -> str:
    """What a candidate is: formats of its linears and its KV cache, or the server that runs it."""
    if "url" in entry:
        return f"{entry['model']} at {entry['url']}, {entry['engine']} {entry['version']}"
    formats = ", ".join(f"{label} x {count}" for label, count in entry["formats"].items()) or "16-bit"
    return formats + (f", KV cache {entry['kv_cache']}" if entry["kv_cache"] else "")


def with_error(value: float, error: float | None, digits: int) -> str:
    """`value +- error`, the error left out where there is none."""
    if not math.isfinite(value):
        return "-"
    return f"{value:.{digits}f}" + ("" if error is None else f" +- {error:.{digits}f}")


def p_value(p: float) -> str:
    """A p value as people write it."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
