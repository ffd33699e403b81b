"""Compare two result files: every item and every chunk of A with the same one of B, so that small differences show.

The first seed's table tested the scores of its benchmarks as if the two models had answered different questions. They
answered the same ones, and what decides is where they differ: McNemar's test counts the items that only one of them has
right, the paired bootstrap takes the differences. Of many rows some would pass 0.05 by chance; Holm's correction stops
that. No torch here.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from snugfit import __version__
from snugfit.errors import UserError
from snugfit.evaluation.significance import (
    FEWEST_CHUNKS,
    Paired,
    holm,
    mcnemar,
    paired_bootstrap,
    tokens_to_settle,
    unpaired_z,
)
from snugfit.model.shards import staged
from snugfit.records import EVAL_SCHEMA, TASKS_SCHEMA

COMPARE_SCHEMA = "snugfit.compare/1"
SIGNIFICANT = 0.05
Key = tuple[str, str]  # task or context, metric
SAME_REFERENCE = 0.01  # nats a token: other arithmetic moves a 16-bit model's loss by less, another model by more
NAME_A_FILE = "Name a result of `snugfit eval`: its directory, eval.json or tasks.json."
MAKE_AGAIN = "Make the file again."
CSV_COLUMNS = (
    *("family", "name", "metric", "a", "b", "difference", "low", "high", "count", "p", "p_holm", "only_a", "only_b"),
    *("z", "tokens", "perplexity_a", "perplexity_b", "perplexity_ratio", "more_tokens", "note"),
)

# What is read of result files, a part of the records of the same names; null there stands for NaN and infinities.


@dataclass(frozen=True)
class _Spread:
    by_chunk: tuple[float | None, ...]


@dataclass(frozen=True)
class _Model:
    name: str
    perplexity: float | None
    nll_by_chunk: tuple[float | None, ...]
    tokens_by_chunk: tuple[int, ...]
    nonfinite: int
    kl: _Spread | None = None
    kl_kind: str = "exact"


@dataclass(frozen=True)
class _Context:
    context: int
    digest: str
    chunk_tokens: tuple[int, ...]
    models: tuple[_Model, ...]


@dataclass(frozen=True)
class _Text:
    name: str


@dataclass(frozen=True)
class _Eval:
    metrics_version: int
    reference: Mapping[str, Any] | None
    texts: tuple[_Text, ...]
    contexts: tuple[_Context, ...]


@dataclass(frozen=True)
class _Task:
    task: str
    metric: str
    kind: Literal["accuracy", "mean"]
    higher_is_better: bool
    value: float | None
    standard_error: float | None
    items: Mapping[str, float | None]


@dataclass(frozen=True)
class _Tasks:
    model: str
    tasks: tuple[_Task, ...]


@dataclass(frozen=True)
class Result:
    """What the file or directory `path` holds: an evaluation, tasks, or both."""

    path: Path
    eval: _Eval | None
    tasks: _Tasks | None


def load_result(path: str | Path) -> Result:
    """A result file, or a directory's eval.json and tasks.json; UserError where it is missing, broken or too new."""
    place = Path(path)
    files = [place / "eval.json", place / "tasks.json"] if place.is_dir() else [place]
    found = [_read(file) for file in files if file.is_file()]
    evals = [result for result in found if isinstance(result, _Eval)]
    tasks = [result for result in found if isinstance(result, _Tasks)]
    if not found or len(evals) > 1 or len(tasks) > 1:
        what = "eval.json and tasks.json are of one kind." if found else "there is no result here."
        raise UserError(what, where=str(place), remedy=NAME_A_FILE)
    return Result(place, evals[0] if evals else None, tasks[0] if tasks else None)


def _read(file: Path) -> _Eval | _Tasks:
    raw, where = file.read_bytes(), str(file)
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON: {error}.", where=where, remedy=NAME_A_FILE) from None
    schema = document.get("schema") if isinstance(document, dict) else None
    try:
        if schema == EVAL_SCHEMA:
            return _checked_eval(TypeAdapter(_Eval).validate_json(raw, strict=True), where)
        if schema == TASKS_SCHEMA:
            return _checked_tasks(TypeAdapter(_Tasks).validate_json(raw, strict=True), where)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{key}: {first['msg']}.", where=where, remedy=MAKE_AGAIN) from None
    known = {name.partition("/")[0]: name for name in (EVAL_SCHEMA, TASKS_SCHEMA)}
    wanted = known.get(str(schema).partition("/")[0])
    if wanted is None:
        raise UserError(f"schema {schema!r} is none of {', '.join(known.values())}.", where=where, remedy=NAME_A_FILE)
    what = f"schema {schema!r}, where snugfit {__version__} reads {wanted!r}."
    raise UserError(what, where=where, remedy="Use the snugfit that wrote it, or make the file again.")


def _checked_eval(found: _Eval, where: str) -> _Eval:
    """`found`, if its names are distinct and its lists belong together."""
    if not found.contexts:
        raise UserError("no context was evaluated.", where=where, remedy=MAKE_AGAIN)
    _refuse_repeats([str(context.context) for context in found.contexts], "context", where)
    for context in found.contexts:
        _refuse_repeats([model.name for model in context.models], "model", where)
        if not context.models or sum(context.chunk_tokens) < 1 or min(context.chunk_tokens) < 0:
            raise UserError(f"nothing was scored at context {context.context}.", where=where, remedy=MAKE_AGAIN)
        for model in context.models:
            lists = (model.nll_by_chunk, model.tokens_by_chunk, model.kl.by_chunk if model.kl else model.nll_by_chunk)
            if any(len(entries) != len(context.chunk_tokens) for entries in lists):
                what = f"{model.name} at context {context.context} has other chunks than the context."
                raise UserError(what, where=where, remedy=MAKE_AGAIN)
    return found


def _checked_tasks(found: _Tasks, where: str) -> _Tasks:
    """`found`, if each metric is there once and an accuracy's scores are 0 or 1."""
    _refuse_repeats([f"{task.task}, {task.metric}" for task in found.tasks], "task", where)
    for task in found.tasks:
        if not task.items:
            raise UserError(f"{task.task}, {task.metric} has no items.", where=where, remedy=MAKE_AGAIN)
        if task.kind == "accuracy" and not set(task.items.values()) <= {0.0, 1.0, None}:
            what = f"{task.task}, {task.metric} is an accuracy, but has scores other than 0 and 1."
            raise UserError(what, where=where, remedy=MAKE_AGAIN)
    return found


def _refuse_repeats(names: Iterable[str], what: str, where: str) -> None:
    repeated = [name for name, times in Counter(names).items() if times > 1]
    if repeated:
        raise UserError(f"{what} {repeated[0]} is there more than once.", where=where, remedy=MAKE_AGAIN)


@dataclass(frozen=True)
class TaskRow:
    """One metric of one task: what both report, and their paired difference (`a` minus `b`, mean over the items).

    `only_a` and `only_b` are the items that only one has right, None where scores are not 0 or 1. `p` is McNemar's for
    those, else the paired bootstrap's, as the 95 % interval always is. `z` is the unpaired score, for reference.
    """

    task: str
    metric: str
    kind: str
    higher_is_better: bool
    a: float | None
    b: float | None
    items: int
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    only_a: int | None = None
    only_b: int | None = None
    p: float | None = None
    p_holm: float | None = None
    z: float | None = None
    note: str = ""


@dataclass(frozen=True)
class LossRow:
    """Loss or KL at one context length (0: chat rows), nats a token; `a` minus `b`, paired over chunks.

    The perplexities and their ratio, a over b, belong to the loss; `more_tokens` is what `tokens_to_settle` says.
    """

    context: int
    figure: str
    a: float | None
    b: float | None
    chunks: int
    tokens: int
    perplexity_a: float | None = None
    perplexity_b: float | None = None
    perplexity_ratio: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    more_tokens: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Unpaired:
    """What only side "A" or "B" has."""

    family: str
    name: str
    metric: str
    side: str


@dataclass(frozen=True)
class Side:
    """One of the two: its file or directory, and the models in it whose tasks and losses were compared."""

    path: str
    tasks_model: str | None
    eval_model: str | None


@dataclass(frozen=True)
class CompareRecord:
    """A finished comparison. Tasks are one family of Holm's correction, losses and KL together another."""

    snugfit: str
    arguments: Mapping[str, Any]
    a: Side
    b: Side
    tasks: tuple[TaskRow, ...]
    losses: tuple[LossRow, ...]
    unpaired: tuple[Unpaired, ...]
    schema: str = COMPARE_SCHEMA

    def to_json(self) -> str:
        """The record as one JSON document."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def to_csv(self) -> str:
        """A heading and one line a comparison, numbers in full; what one side alone has is a line with only a note."""
        out = io.StringIO()
        writer = csv.DictWriter(out, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for task in self.tasks:
            writer.writerow(asdict(task) | {"family": "tasks", "name": task.task, "count": task.items})
        for loss in self.losses:
            names = {"family": "losses", "name": _context_name(loss.context), "metric": loss.figure}
            writer.writerow(asdict(loss) | names | {"count": loss.chunks})
        for lone in self.unpaired:
            writer.writerow(asdict(lone) | {"note": f"only in {lone.side}"})
        return out.getvalue()

    def to_markdown(self) -> str:
        """A table of tasks, one of losses; under each a line that says what was tested, last what was not and why."""
        parts = []
        if self.tasks:
            parts += [_tasks_table(self), _tasks_caption(self.tasks)]
        if self.losses:
            parts += [_losses_table(self), _losses_caption(self.losses)]
        remarks = [(task.task, task.metric, task.note) for task in self.tasks]
        remarks += [(_context_name(loss.context), loss.figure, loss.note) for loss in self.losses]
        remarks += [(lone.name, lone.metric, f"only in {lone.side}, not compared.") for lone in self.unpaired]
        lines = [
            f"- {', '.join(_escape(part) for part in at if part)}: {_escape(note)}" for *at, note in remarks if note
        ]
        return "\n\n".join([*parts, *(["\n".join(lines)] if lines else [])]) + "\n"


def _tasks_table(record: CompareRecord) -> str:
    names = [f"{side}: {_escape(at.tasks_model or '')}" for side, at in (("A", record.a), ("B", record.b))]
    headings = ["task", "metric", *names, "A - B", "95 % interval", "items", "only A / only B right"]
    rows, before = [], ""
    for row in record.tasks:
        form, scale, unit, points = (".2f", 100, "%", " pp") if row.kind == "accuracy" else (".4f", 1, "", "")
        values = [_number(value, form, scale, unit) for value in (row.a, row.b)]
        values = _bold(row, values, higher_is_better=row.higher_is_better)
        found = [_number(row.difference, f"+{form}", scale, points), _interval(row.low, row.high, f"+{form}", scale)]
        counts = [f"{row.items:,}", "" if row.only_a is None else f"{row.only_a:,} / {row.only_b:,}"]
        tests = [_p(row.p), _p(row.p_holm), _number(row.z, "+.2f")]
        task = "" if row.task == before else _escape(row.task)  # as in the first seed's table: once a task
        rows.append([task, _escape(row.metric), *values, *found, *counts, *tests])
        before = row.task
    return _table([*headings, "p", "p (Holm)", "z, unpaired"], rows)


def _tasks_caption(rows: Sequence[TaskRow]) -> str:
    items = sum({row.task: row.items for row in rows if row.difference is not None}.values())
    return (
        f"A minus B, paired on {items:,} items: McNemar's exact test for accuracies (pp: percentage points), a "
        f"studentized bootstrap over items for other scores and for every interval. {_bold_means(rows)} z is what the "
        "reported errors would say of unpaired scores, for reference."
    )


def _losses_table(record: CompareRecord) -> str:
    names = [f"{side}: {_escape(at.eval_model or '')}" for side, at in (("A", record.a), ("B", record.b))]
    headings = ["context", "figure", *names, "A - B", "95 % interval", "perplexity A", "perplexity B", "ratio A / B"]
    rows, before = [], ""
    for row in record.losses:
        values = _bold(row, [_number(value, ".5f") for value in (row.a, row.b)], higher_is_better=False)
        found = [_number(row.difference, "+.5f"), _interval(row.low, row.high, "+.5f")]
        perplexities = [_number(v, ".4f") for v in (row.perplexity_a, row.perplexity_b, row.perplexity_ratio)]
        tests = [f"{row.chunks:,}", _p(row.p), _p(row.p_holm), _number(row.more_tokens, ",")]
        name = _context_name(row.context)
        rows.append(["" if name == before else name, row.figure, *values, *found, *perplexities, *tests])
        before = name
    return _table([*headings, "chunks", "p", "p (Holm)", "more tokens"], rows)


def _losses_caption(rows: Sequence[LossRow]) -> str:
    chunks = sum({row.context: row.chunks for row in rows if row.difference is not None}.values())
    return (
        f"A minus B in nats a token, paired on {chunks:,} chunks: a studentized bootstrap over chunks. "
        f"{_bold_means(rows)} More tokens: how many would make p < {SIGNIFICANT} four times in five, were the "
        "difference what it seems."
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
    return "" if low is None or high is None else f"[{low * scale:{form}}, {high * scale:{form}}]"


def _p(p: float | None) -> str:
    return "<0.0001" if p is not None and p < 1e-4 else _number(p, ".4f")


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, the first two columns to the left, numbers to the right."""
    marks = ["---", "---"] + ["---:"] * (len(headings) - 2)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [headings, marks, *rows])


def _escape(text: str) -> str:
    """`text` as Markdown shows it unchanged, in one line; underscores within a word need no escape."""
    plain = re.sub(r"\s+", " ", text)
    return re.sub(r"[\\|*`<>\[\]~&]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", plain)


def compare_results(
    path_a: str | Path,
    path_b: str | Path,
    *,
    model_a: str | None = None,
    model_b: str | None = None,
    seed: int = 0,
) -> CompareRecord:
    """Compare what both hold: tasks item by item, losses and KL chunk by chunk; `seed` is the bootstrap's.

    `model_a` and `model_b` choose among several models of an evaluation; one file on both sides needs both. UserError
    where a file cannot be read, a choice is missing or wrong, or the items or tokens are not the same.
    """
    a, b = load_result(path_a), load_result(path_b)
    same, where = a.path.resolve() == b.path.resolve(), f"{a.path}, {b.path}"
    arguments = {"a": str(path_a), "b": str(path_b), "model_a": model_a, "model_b": model_b, "seed": seed}
    tasks: list[TaskRow] = []
    losses: list[LossRow] = []
    unpaired: list[Unpaired] = []
    if not same:  # tasks of one file are one model's
        tasks, unpaired = _pair_tasks(a, b, seed)
    if a.eval and b.eval:
        model_a = _choose(a, model_a, "--model-a", same)
        model_b = _choose(b, model_b, "--model-b", same)
        if same and model_a == model_b:
            raise UserError(f"{model_a} is compared with itself.", where=where, remedy="Choose two models.")
        losses, lone = _pair_evals(a.eval, b.eval, (model_a, model_b), where=where, seed=seed)
        unpaired += lone
    elif model_a or model_b:
        what = "there are no evaluations on both sides to choose models in."
        raise UserError(what, where=where, remedy="Leave --model-a and --model-b out.")
    else:
        sides = [(side, found.contexts) for side, found in (("A", a.eval), ("B", b.eval)) if found]
        unpaired += [Unpaired("losses", _context_name(c.context), "", side) for side, found in sides for c in found]
    if not tasks and not losses:
        what = "they share no task and no context of two models."
        raise UserError(what, where=where, remedy="Name the results of two models, measured alike.")
    in_a, in_b = (
        Side(str(result.path), result.tasks.model if tasks and result.tasks else None, name if losses else None)
        for result, name in ((a, model_a), (b, model_b))
    )
    tasks = [replace(row, p_holm=p) for row, p in zip(tasks, holm([row.p for row in tasks]), strict=True)]
    losses = [replace(row, p_holm=p) for row, p in zip(losses, holm([row.p for row in losses]), strict=True)]
    return CompareRecord(__version__, arguments, in_a, in_b, tuple(tasks), tuple(losses), tuple(unpaired))


def write_comparison(record: CompareRecord, directory: str | Path) -> None:
    """compare.json, compare.csv and compare.md in a new directory, whole or not at all; UserError where it exists."""
    with staged(Path(directory)) as folder:
        (folder / "compare.json").write_text(record.to_json(), encoding="utf-8")
        (folder / "compare.csv").write_text(record.to_csv(), encoding="utf-8")
        (folder / "compare.md").write_text(record.to_markdown(), encoding="utf-8")


def _split(family: str, a: Mapping[Key, object], b: Mapping[Key, object]) -> tuple[list[Key], list[Unpaired]]:
    """(name, metric) of both sides in A's order, and those of one side alone."""
    lone = [Unpaired(family, *key, "A") for key in a if key not in b]
    lone += [Unpaired(family, *key, "B") for key in b if key not in a]
    return [key for key in a if key in b], lone


def _pair_tasks(a: Result, b: Result, seed: int) -> tuple[list[TaskRow], list[Unpaired]]:
    of_a, of_b = ({(t.task, t.metric): t for t in found.tasks.tasks} if found.tasks else {} for found in (a, b))
    shared, lone = _split("tasks", of_a, of_b)
    return [_pair_task(of_a[key], of_b[key], seed) for key in shared], lone


def _pair_task(a: _Task, b: _Task, seed: int) -> TaskRow:
    """One metric on the same items; accuracies by McNemar's test where both are accuracies."""
    where = f"{a.task}, {a.metric}"
    missing = len(a.items.keys() - b.items.keys()), len(b.items.keys() - a.items.keys())
    if any(missing):
        counts = f"{missing[0]} of A's {len(a.items)} are not in B, {missing[1]} of B's {len(b.items)} not in A."
        raise UserError(
            f"other items: {counts}",
            where=where,
            remedy="Run the same version of the task with the same --limit on both.",
        )
    if a.higher_is_better != b.higher_is_better:
        raise UserError("higher is better in one, lower in the other.", where=where, remedy=MAKE_AGAIN)
    kind = "accuracy" if a.kind == b.kind == "accuracy" else "mean"
    row = TaskRow(a.task, a.metric, kind, a.higher_is_better, _finite(a.value), _finite(b.value), len(a.items))
    if row.a is not None and row.b is not None:
        row = replace(row, z=unpaired_z(row.a, a.standard_error, row.b, b.standard_error)[0])
    keys = sorted(a.items)  # so that exchanging A and B mirrors the row
    left, right = _all_finite([a.items[key] for key in keys]), _all_finite([b.items[key] for key in keys])
    if left is None or right is None:
        return replace(row, note="scores are missing or not finite; not paired.")
    found = paired_bootstrap(left, right, [1] * len(keys), seed=seed)
    notes = [_no_interval(found)]
    if not (_is_mean(row.a, left) and _is_mean(row.b, right)):
        notes.append("a value is not the mean of its items; difference and test are of the items' mean.")
    note = " ".join(filter(None, notes))
    row = replace(row, difference=found.difference, low=found.low, high=found.high, p=found.p, note=note)
    if kind == "mean":
        return row
    counted = mcnemar(left, right)
    return replace(row, only_a=counted.only_a, only_b=counted.only_b, p=counted.p)


def _choose(result: Result, wanted: str | None, option: str, same: bool) -> str:
    """The name of the model to compare: the one that is no reference, or the one asked for."""
    assert result.eval is not None
    names = list(dict.fromkeys(model.name for context in result.eval.contexts for model in context.models))
    others = names[1:] if result.eval.reference is not None and len(names) > 1 else names
    if wanted is not None and wanted not in names:
        raise UserError(f"no model {wanted!r}.", where=str(result.path), remedy=f"{option}: {', '.join(names)}.")
    if wanted is None and (same or len(others) != 1):
        what = f"which of {', '.join(names)} is to be compared?"
        raise UserError(what, where=str(result.path), remedy=f"Choose one with {option}.")
    return wanted or others[0]


def _pair_evals(
    a: _Eval, b: _Eval, names: tuple[str, str], *, where: str, seed: int
) -> tuple[list[LossRow], list[Unpaired]]:
    """Rows of loss and KL at every context length that both models have, and what only one has."""
    if a.metrics_version != b.metrics_version:
        what = f"figures of versions {a.metrics_version} and {b.metrics_version}."
        raise UserError(what, where=where, remedy="Evaluate both with one snugfit.")
    figures_a, figures_b = _figures(a, names[0]), _figures(b, names[1])
    shared, lone = _split("losses", figures_a, figures_b)
    rows = []
    for key in shared:
        (context, left), (other, right) = figures_a[key], figures_b[key]
        if context.digest != other.digest or context.chunk_tokens != other.chunk_tokens:
            texts = [" and ".join(text.name for text in found.texts) for found in (a, b)]
            what = f"context {key[0]}: other tokens were scored, A on {texts[0]}, B on {texts[1]}."
            remedy = "Evaluate both on the same texts and contexts, with one tokenizer."
            raise UserError(what, where=where, remedy=remedy)
        same_base = key[1] == "loss" or _same_reference(context, other)
        rows.append(_pair_figure(context, key[1], left, right, same_base=same_base, seed=seed))
    return rows, lone


def _figures(found: _Eval, name: str) -> dict[Key, tuple[_Context, _Model]]:
    """The model of that name by context and figure."""
    models = [(context, model) for context in found.contexts for model in context.models if model.name == name]
    figures = {}
    for context, model in models:
        figures[_context_name(context.context), "loss"] = context, model
        if model.kl is not None:
            figures[_context_name(context.context), "KL"] = context, model
    return figures


def _same_reference(a: _Context, b: _Context) -> bool:
    """Whether the first models' losses agree up to arithmetic, chunk by chunk: names and paths may differ."""
    left, right = _all_finite(a.models[0].nll_by_chunk), _all_finite(b.models[0].nll_by_chunk)
    if left is None or right is None:
        return False
    moved = sum(abs(x - y) for x, y in zip(left, right, strict=True))
    return moved <= SAME_REFERENCE * sum(a.chunk_tokens)


def _pair_figure(context: _Context, figure: str, a: _Model, b: _Model, *, same_base: bool, seed: int) -> LossRow:
    """Loss or KL of two models on the same chunks."""
    counts = context.chunk_tokens
    sums_a, sums_b = ((m.nll_by_chunk if m.kl is None or figure == "loss" else m.kl.by_chunk) for m in (a, b))
    left, right = _all_finite(sums_a), _all_finite(sums_b)
    mean_a, mean_b = _mean(left, a.tokens_by_chunk), _mean(right, b.tokens_by_chunk)
    row = LossRow(context.context, figure, mean_a, mean_b, len(counts), sum(counts))
    if figure == "loss":
        row = replace(row, perplexity_a=_finite(a.perplexity), perplexity_b=_finite(b.perplexity))
        if row.perplexity_a is not None and row.perplexity_b:
            row = replace(row, perplexity_ratio=_finite(row.perplexity_a / row.perplexity_b))
    if a.nonfinite or b.nonfinite:
        left_out = f"tokens with NaN or infinite logits left out, {a.nonfinite} in A, {b.nonfinite} in B; not paired."
        return replace(row, note=left_out)
    if left is None or right is None or not a.tokens_by_chunk == b.tokens_by_chunk == counts:
        return replace(row, note="chunks are missing or not finite; not paired.")
    if not same_base:
        return replace(row, note="the references differ; not paired.")
    bounds = [model.kl_kind == "lower bound" for model in (a, b) if figure == "KL"]
    if any(bounds) and not all(bounds):
        return replace(row, note="a lower bound in one, not in the other; not paired.")
    found = paired_bootstrap(left, right, counts, seed=seed)
    return replace(
        row,
        difference=found.difference,
        low=found.low,
        high=found.high,
        p=found.p,
        more_tokens=tokens_to_settle(left, right, counts, p=found.p),
        note=" ".join(filter(None, [_no_interval(found), "both are lower bounds." if any(bounds) else ""])),
    )


def _no_interval(found: Paired) -> str:
    if found.low is not None:
        return ""
    if found.chunks < FEWEST_CHUNKS:
        return f"no interval from fewer than {FEWEST_CHUNKS}."
    return "no interval: hardly any differ, or all by the same."


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _all_finite(values: Sequence[float | None]) -> list[float] | None:
    """The values, None where one is missing or not finite."""
    kept = [value for value in map(_finite, values) if value is not None]
    return kept if len(kept) == len(values) else None


def _mean(sums: Sequence[float] | None, counts: Sequence[int]) -> float | None:
    return sum(sums) / tokens if sums is not None and (tokens := sum(counts)) else None


def _is_mean(value: float | None, scores: Sequence[float]) -> bool:
    return value is not None and math.isclose(value, sum(scores) / len(scores), rel_tol=1e-6, abs_tol=1e-9)


def _context_name(context: int) -> str:
    return str(context) if context else "chat"
