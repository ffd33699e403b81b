"""Compare two result files: every item and every chunk of A with the same one of B, so that small differences show.

The first seed's table tested the scores of its benchmarks as if the two models had answered different questions. They
answered the same ones, and what decides is where they differ: McNemar's test counts the items that only one of them has
right, the paired bootstrap takes the differences. Of many rows some would pass 0.05 by chance; Holm's correction stops
that. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from snugfit import __version__
from snugfit.errors import UserError
from snugfit.evaluation.results import MAKE_AGAIN, Context, Eval, Model, Result, Task, load_result
from snugfit.evaluation.significance import (
    FEWEST_CHUNKS,
    Paired,
    holm,
    mcnemar,
    paired_bootstrap,
    tokens_to_settle,
    unpaired_z,
)
from snugfit.records.comparison import CompareRecord, LossRow, Side, TaskRow, Unpaired
from snugfit.report.comparison import comparison_csv, comparison_markdown, context_name
from snugfit.storage.staging import staged

Key = tuple[str, str]  # task or context, metric
SAME_REFERENCE = 0.01  # nats a token: other arithmetic moves a 16-bit model's loss by less, another model by more


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
        unpaired += [Unpaired("losses", context_name(c.context), "", side) for side, found in sides for c in found]
    if not tasks and not losses and same:
        raise UserError("one result is compared with itself.", where=where, remedy="Name the results of two models.")
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
        (folder / "compare.csv").write_text(comparison_csv(record), encoding="utf-8")
        (folder / "compare.md").write_text(comparison_markdown(record), encoding="utf-8")


def _split(family: str, a: Mapping[Key, object], b: Mapping[Key, object]) -> tuple[list[Key], list[Unpaired]]:
    """(name, metric) of both sides in A's order, and those of one side alone."""
    lone = [Unpaired(family, *key, "A") for key in a if key not in b]
    lone += [Unpaired(family, *key, "B") for key in b if key not in a]
    return [key for key in a if key in b], lone


def _pair_tasks(a: Result, b: Result, seed: int) -> tuple[list[TaskRow], list[Unpaired]]:
    of_a, of_b = ({(t.task, t.metric): t for t in found.tasks.tasks} if found.tasks else {} for found in (a, b))
    shared, lone = _split("tasks", of_a, of_b)
    return [_pair_task(of_a[key], of_b[key], seed) for key in shared], lone


def _pair_task(a: Task, b: Task, seed: int) -> TaskRow:
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
    a: Eval, b: Eval, names: tuple[str, str], *, where: str, seed: int
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


def _figures(found: Eval, name: str) -> dict[Key, tuple[Context, Model]]:
    """The model of that name by context and figure."""
    models = [(context, model) for context in found.contexts for model in context.models if model.name == name]
    figures = {}
    for context, model in models:
        figures[context_name(context.context), "loss"] = context, model
        if model.kl is not None:
            figures[context_name(context.context), "KL"] = context, model
    return figures


def _same_reference(a: Context, b: Context) -> bool:
    """Whether the first models' losses agree up to arithmetic, chunk by chunk: names and paths may differ."""
    left, right = _all_finite(a.models[0].nll_by_chunk), _all_finite(b.models[0].nll_by_chunk)
    if left is None or right is None:
        return False
    moved = sum(abs(x - y) for x, y in zip(left, right, strict=True))
    return moved <= SAME_REFERENCE * sum(a.chunk_tokens)


def _pair_figure(context: Context, figure: str, a: Model, b: Model, *, same_base: bool, seed: int) -> LossRow:
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
    remark = "both are lower bounds." if any(bounds) else ""
    estimates = [side for side, model in (("A", a), ("B", b)) if figure == "KL" and model.kl_kind == "estimate"]
    if len(estimates) == 1:
        remark = f"{estimates[0]} is an estimate from a stored reference, the other is exact."
    found = paired_bootstrap(left, right, counts, seed=seed)
    return replace(
        row,
        difference=found.difference,
        low=found.low,
        high=found.high,
        p=found.p,
        more_tokens=tokens_to_settle(left, right, counts, p=found.p),
        note=" ".join(filter(None, [_no_interval(found), remark])),
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
