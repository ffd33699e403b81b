"""Tables of an evaluation, from its record alone: for a terminal, as Markdown, as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from snugfit.records.evaluation import (
    MIN_CHUNKS_FOR_P,
    Bin,
    ContextFigures,
    EvalRecord,
    EvaluatedCheckpoint,
    EvaluatedServer,
    ModelFigures,
    PairFigures,
    TasksRecord,
)
from snugfit.report.markdown import escape_bars, markdown_table

CSV_COLUMNS = (
    *("context", "model", "chunks", "tokens", "perplexity", "perplexity_error", "kl", "kl_error", "kl_kind"),
    *("kl_median", "kl_p90", "kl_p95", "kl_p99", "kl_p999", "kl_max", "reverse_kl", "same_top", "rms_change"),
    *("floor_kl", "floor_error", "floor_tokens", "nonfinite", "loss_change", "loss_change_error"),
    *("acceptance", "acceptance_error"),
)
COMPARED = (  # columns that only a record with a reference has
    *(
        "KL",
        "floor",
        "loss - reference",
        "median",
        "p99",
        "p99.9",
        "max",
        "reverse KL",
        "same top",
        "acceptance",
        "RMS dp",
    ),
)
TERMINAL = ("context", "model", "perplexity", "KL", "floor", "same top", "not finite")  # 80 columns
TERMINAL_PAIRS = ("context", "A", "B", "figure", "A - B", "p (Holm)")
MIN_TOKENS_FOR_P999 = 1000  # with fewer, the quantile lies close to the largest value


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
        headings, *rows = ([escape_bars(cell) for cell in cells] for cells in (self.headings, *self.rows))
        table = markdown_table(headings, rows, left=self.left)
        return "\n".join([f"## {self.title}", "", table, "", *([self.note, ""] if self.note else [])])


def evaluation_sheets(record: EvalRecord) -> list[Sheet]:
    """For a terminal, narrow: the main figures by context length, then pairs of candidates."""
    sheets = [_by_context(record, narrow=True)]
    if any(context.pairs for context in record.contexts):
        sheets.append(_pairs(record, narrow=True))
    return [*sheets, *([_answers(record)] if record.answer_figures else [])]


def all_sheets(record: EvalRecord) -> list[Sheet]:
    """For a report: every figure, perplexities side by side, pairs, by position, by confidence."""
    sheets = [_by_context(record)]
    if len(record.contexts) > 1:
        sheets.append(_side_by_side(record))
    if any(context.pairs for context in record.contexts):
        sheets.append(_pairs(record))
    for context in record.contexts:
        name, labels = context_name(context.context, tokens=True), model_labels(record, context)
        by_position = [m.by_position for m in context.models]
        sheets.append(_bins(f"By position, {name}", "position", context, labels, by_position))
        if any(model.kl is not None for model in context.models):
            found = [m.by_confidence for m in context.models]
            title = f"By the reference's largest probability, {name}"
            sheets.append(_bins(title, "probability", context, labels, found))
    return [*sheets, *([_answers(record)] if record.answer_figures else [])]


def task_sheet(record: TasksRecord) -> Sheet:
    """Every metric of every task, with lm_eval's standard error and the number of items."""
    rows = tuple(
        (result.task, result.metric, with_error(result.value, result.standard_error, 4), f"{len(result.items):,}")
        for result in record.tasks
    )
    return Sheet(record.model, ("task", "metric", "value", "items"), rows, 2)


def to_markdown(record: EvalRecord) -> str:
    """The report: tables, and below them the models and texts that were measured."""
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
            p999 = kl.p999 if kl and sum(model.tokens_by_chunk) >= MIN_TOKENS_FOR_P999 else ""
            quantiles = [kl.median, kl.p90, kl.p95, kl.p99, p999, kl.max] if kl else [""] * 6
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
                    model.loss_change,
                    model.loss_change_error,
                    model.acceptance,
                    model.acceptance_error,
                ]
            )
    return output.getvalue()


def context_name(context: int, *, tokens: bool = False) -> str:
    """The name of a context length: "4096", or in `tokens`, "4,096 tokens"; 0 is "chat and rows"."""
    if not context:
        return "chat and rows"
    return f"{context:,} tokens" if tokens else str(context)


def model_labels(record: EvalRecord, context: ContextFigures) -> list[str]:
    """The names of a context's models in tables and plots: the reference is marked."""
    names = [model.name for model in context.models]
    return [f"{names[0]} (reference)", *names[1:]] if record.reference is not None else names


def other_text(record: EvalRecord) -> bool:
    """Whether context lengths may have been measured on different parts of the texts."""
    several = sum(bool(context.context) for context in record.contexts) > 1
    return several and record.arguments.get("max_chunks") is not None


def _by_context(record: EvalRecord, *, narrow: bool = False) -> Sheet:
    rows = []
    for context in record.contexts:
        floor = context.models[0].floor
        shared = floor.kl if floor else None
        name = context_name(context.context, tokens=True)
        for label, model in zip(model_labels(record, context), context.models, strict=True):
            names = {"context": name.removesuffix(" tokens") if narrow else name, "model": label}
            rows.append(names | _figures(model, shared))
    headings = [name for name in rows[0] if record.reference is not None or name not in COMPARED]
    if narrow:
        optional = [name for name in ("floor", "not finite") if not any(row[name] for row in rows)]
        headings = [name for name in TERMINAL if name in headings and name not in optional]
    title = "Perplexity" if record.reference is None else "Loss against the reference"
    cells = tuple(tuple(row[name] for name in headings) for row in rows)
    return Sheet(title, tuple(headings), cells, 2, _by_context_note(record, narrow=narrow))


def _figures(model: ModelFigures, reference_floor: float | None) -> dict[str, str]:
    """The cells of one model at one context."""
    tokens = sum(model.tokens_by_chunk)
    cells = {"tokens": f"{tokens:,}", "perplexity": with_error(model.perplexity, model.perplexity_error, 3)}
    cells |= dict.fromkeys(COMPARED, "")
    if model.loss_change is not None:
        cells["loss - reference"] = with_error(model.loss_change, model.loss_change_error, 4, sign="+")
    if model.kl is not None:
        mark = {"exact": "", "estimate": "~", "lower bound": ">= "}[model.kl_kind]
        bound = "" if model.kl_kind == "exact" else ">= "  # single tokens of an estimate are known from below
        cells["KL"] = mark + with_error(model.kl.mean, model.kl.standard_error, 4)
        own = model.floor.kl if model.floor else None
        cells["floor"] = " / ".join(f"{value:.4f}" for value in (reference_floor, own) if value is not None)
        quantiles = {"median": model.kl.median, "p99": model.kl.p99, "p99.9": model.kl.p999, "max": model.kl.max}
        cells |= {name: f"{bound}{value:.4f}" for name, value in quantiles.items()}
        if tokens < MIN_TOKENS_FOR_P999:
            cells["p99.9"] = ""
        cells["reverse KL"] = f"{bound}{model.reverse_kl.mean:.4f}" if model.reverse_kl else ""
        cells["same top"] = "" if model.same_top is None else f"{model.same_top:.2%}"
        accepted = "<= " if model.kl_kind == "lower bound" else ""
        cells["acceptance"] = "" if model.acceptance is None else f"{accepted}{model.acceptance:.2%}"
        cells["RMS dp"] = "" if model.rms_change is None else f"{model.rms_change:.4f}"
    return cells | {"not finite": str(model.nonfinite or "")}


def _by_context_note(record: EvalRecord, *, narrow: bool) -> str:
    models = [model for context in record.contexts for model in context.models]
    parts = ["Nats a token; errors are one standard error over chunks."]
    if record.reference is None:
        parts = ["Errors are one standard error over chunks. KL needs a reference, the original model."]
    elif not narrow:
        parts.append("Loss - reference: candidate minus reference, its error of the differences chunk by chunk.")
        parts.append("Acceptance: the share of its draft tokens that the reference would accept, sum min(p, q).")
        parts.append("RMS dp: root mean square change of the true token's probability.")
    if other_text(record):
        parts.append("Each length has other text: a limit of tokens instead of chunks gives all lengths the same text.")
    if any(model.floor for model in models):
        parts.append(
            "Floor: KL of a model to itself in another equally valid arithmetic (the next wider one), of the reference "
            "and, after a slash, of the candidate: the part of a KL that rounding alone can cause."
        )
    kinds = {model.kl_kind for model in models if model.kl}
    if "estimate" in kinds:
        errors = [model.kl_sampling_error for model in models if model.kl_sampling_error is not None]
        parts.append(f"~: against a stored reference; sampling makes {max(errors, default=0):.1e} of the error.")
        if not narrow:
            parts.append("Its quantiles and reverse KL are lower bounds, marked >=.")
    if "lower bound" in kinds:
        parts.append(">=: a lower bound, from the tokens that the server names.")
    if any(model.nonfinite for model in models):
        parts.append("Tokens with NaN or infinite logits are only counted, in the last column, and a model with such")
        parts.append("tokens is not paired with others.")
    return " ".join(parts)


def _side_by_side(record: EvalRecord) -> Sheet:
    names = model_labels(record, record.contexts[0])
    rows = tuple(
        (
            context_name(context.context, tokens=True),
            *(with_error(model.perplexity, None, 4) for model in context.models),
        )
        for context in record.contexts
    )
    return Sheet("Perplexity by context length", ("context", *names), rows)


def _answers(record: EvalRecord) -> Sheet:
    """Length and repetition of the greedy answers."""
    rows = []
    for one in record.answer_figures:
        length = "" if one.length_change is None else f"{one.length_change:+.1%}"
        if one.length_change_error is not None:
            length += f" +- {one.length_change_error:.1%}"
        change = (
            ""
            if one.repeated_change is None
            else with_error(one.repeated_change, one.repeated_change_error, 4, sign="+")
        )
        shared = "" if one.same_tokens is None else f"{one.same_tokens:.1f}"
        cells = with_error(one.tokens, one.tokens_error, 1), length, with_error(one.repeated, one.repeated_error, 4)
        rows.append((one.model, *cells, change, str(one.loops), str(one.unfinished), shared))
    headings = ("model", "tokens", "length", "repeated", "repeated - reference", "loops", "unfinished", "same tokens")
    first = record.answer_figures[0]
    note = (
        f"Greedy answers to {first.questions} questions, at most {first.limit} tokens. Length: tokens against the "
        "reference's. Repeated: share of 4-token sequences that occurred before in the answer. Loops: answers that end "
        "in a repeated piece. Same tokens: shared with the reference's answer from its beginning."
    )
    return Sheet("Greedy answers", headings, tuple(rows), 1, note)


def _pairs(record: EvalRecord, *, narrow: bool = False) -> Sheet:
    rows = [
        _pair(context_name(context.context, tokens=True), pair) for context in record.contexts for pair in context.pairs
    ]
    headings = tuple(rows[0])
    if narrow:
        headings = TERMINAL_PAIRS
        for row in rows:
            row["context"] = row["context"].removesuffix(" tokens")
            row["p (Holm)"] = row["p (Holm)"] or row["p"]  # without one, the reason
    note = (
        "Paired bootstrap over chunks, nats a token; below zero A is better; bold where Holm's p over all pairs < 0.05."
    )
    cells = tuple(tuple(row[name] for name in headings) for row in rows)
    return Sheet("Candidates against each other", headings, cells, 4, note)


def _pair(context: str, pair: PairFigures) -> dict[str, str]:
    interval = "" if pair.low is None or pair.high is None else f"{pair.low:+.4f} .. {pair.high:+.4f}"
    if pair.low == pair.high == 0:
        interval = "no difference"
    none = "too few chunks" if pair.chunks < MIN_CHUNKS_FOR_P else "no spread"
    difference = f"{pair.difference:+.4f}"
    return {
        "context": context,
        "A": pair.a,
        "B": pair.b,
        "figure": "KL" if pair.figure == "kl" else pair.figure,
        "A - B": f"**{difference}**" if pair.p_holm is not None and pair.p_holm < 0.05 else difference,
        "95 % interval": interval,
        "p": none if pair.p is None else p_value(pair.p),
        "p (Holm)": "" if pair.p_holm is None else p_value(pair.p_holm),
        "chunks": str(pair.chunks),
        "more tokens to settle": more_tokens(pair.more_tokens, pair.p),
    }


def _bins(
    title: str, what: str, context: ContextFigures, labels: Sequence[str], found: Sequence[Sequence[Bin]]
) -> Sheet:
    ranges = list(dict.fromkeys((b.low, b.high) for bins in found for b in bins))
    lookup = [{(b.low, b.high): b for b in bins} for bins in found]
    compared = [model.kl is not None for model in context.models]
    headings = [what, "tokens"]
    for label, against in zip(labels, compared, strict=True):
        headings += [f"{label}: perplexity", *([f"{label}: KL"] if against else [])]
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
    """How the reference and a candidate continue from where they diverge most."""
    if not record.continuations:
        return
    yield "## Largest divergences in the conversations"
    yield ""
    for one in record.continuations:
        yield f"**{one.model}**, {one.source}, token {one.position}, KL {one.kl:.3f}; the continuations share"
        yield f"their first {one.same_tokens} tokens. The next token of the conversation is {one.text!r}."
        yield ""
        yield f"    {'before':15} {one.before!r}"
        yield f"    {'reference':15} {one.reference_continuation!r}"
        yield f"    {'model':15} {one.model_continuation!r}"
        yield ""


def _sources(record: EvalRecord) -> Iterator[str]:
    yield "## What was measured"
    yield ""
    if record.reference:
        yield f"- reference: {record.reference.name}, {record.reference.arithmetic}"
    for entry in record.candidates:
        yield f"- {entry.name}: {_stored(entry)}"
    yield f"- activations: profile {record.arguments['activations']}"
    for text in record.texts:
        yield f"- {text.name}: SHA-256 {text.sha256}"
    for context in record.contexts:
        size = f"{context.chunks} chunks, {context.tokens:,} tokens scored"
        yield f"- {context_name(context.context, tokens=True)}: {size}, digest {context.digest[:16]}"
    yield f"- {record.hardware.get('gpu') or record.hardware['processor']}, torch {record.versions['torch']}, "
    yield f"  transformers {record.versions['transformers']}, snugfit {record.snugfit}; {record.seconds['total']:.0f} s"


def _stored(entry: EvaluatedCheckpoint | EvaluatedServer) -> str:
    """A candidate's formats of linears and KV cache, or the server that runs it."""
    if isinstance(entry, EvaluatedServer):
        return f"{entry.model} at {entry.url}, {entry.engine} {entry.version}"
    formats = ", ".join(f"{label} x {count}" for label, count in entry.formats.items()) or "16-bit"
    return formats + (f", KV cache {entry.kv_cache}" if entry.kv_cache else "")


def with_error(value: float, error: float | None, digits: int, sign: str = "") -> str:
    """`value +- error`, without an error just the value; `sign` "+" shows the sign of positive values too."""
    if not math.isfinite(value):
        return "-"
    return f"{value:{sign}.{digits}f}" + ("" if error is None else f" +- {error:.{digits}f}")


def p_value(p: float) -> str:
    """A p value with three digits."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def more_tokens(count: int | None, p: float | None) -> str:
    """How many more tokens settle a difference: "" where it has no p."""
    if count is None or p is None:
        return ""
    return f"{count:,}" if count else "settled"
