"""Compare two result files: every item and every chunk of A with the same one of B, so that small differences show.

A test of unpaired scores treats the models as if they had answered different questions. They answered the same ones,
and only the items where they differ say anything: McNemar's test counts the items that only one of them has right, the
paired bootstrap resamples the differences. Of many rows some would pass 0.05 by chance; Holm's correction prevents
that. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from snugfit.errors import UserError
from snugfit.evaluation.results import MAKE_AGAIN, Result, load_result
from snugfit.evaluation.significance import Paired, holm, mcnemar, paired_bootstrap, tokens_to_settle, unpaired_z
from snugfit.records.comparison import CompareRecord, LossRow, Side, TaskRow, Unpaired
from snugfit.records.evaluation import MIN_CHUNKS_FOR_P, ContextFigures, EvalRecord, ModelFigures, TaskResult
from snugfit.report.comparison import comparison_csv, comparison_markdown
from snugfit.report.tables import context_name
from snugfit.storage.staging import staged
from snugfit.version import __version__

Key = tuple[str, str]  # task or context, metric
SAME_REFERENCE = 0.01  # nats a token: other arithmetic moves a 16-bit model's loss by less, another model by more
SEED = 0  # of the bootstrap


def compare(a: str | Path, b: str | Path, *, model_a: str | None = None, model_b: str | None = None) -> CompareRecord:
    """Compare two results: tasks item by item, losses and KL chunk by chunk.

    `a` and `b` are directories or files that `evaluate` or `run_tasks` wrote. `model_a` and `model_b` choose among
    several models of an evaluation; one file on both sides needs both. UserError where a file cannot be read, a choice
    is missing or wrong, or the items or tokens are not the same.
    """
    left, right = load_result(a), load_result(b)
    same, where = left.path.resolve() == right.path.resolve(), f"{left.path}, {right.path}"
    # tasks of one file are of one model
    tasks, unpaired = ([], []) if same else _pair_tasks(left, right)
    losses: list[LossRow] = []
    names: tuple[str | None, str | None] = (None, None)
    if left.eval and right.eval:
        names = chosen = _choose(left, model_a, "model_a", same), _choose(right, model_b, "model_b", same)
        if same and chosen[0] == chosen[1]:
            raise UserError(
                f"{chosen[0]} is compared with itself.",
                code="option-invalid",
                where=where,
                remedy="Choose two models with `model_a` and `model_b`.",
            )
        losses, lone = _pair_evals(left.eval, right.eval, chosen, where=where)
        unpaired += lone
    elif model_a or model_b:
        raise UserError(
            "not both results are evaluations, so there are no models to choose from.",
            code="option-conflict",
            where="model_a" if model_a else "model_b",
            remedy="Leave `model_a` and `model_b` out.",
        )
    else:
        sides = [(side, found.contexts) for side, found in (("A", left.eval), ("B", right.eval)) if found]
        unpaired += [Unpaired("losses", context_name(c.context), "", side) for side, found in sides for c in found]
    if not tasks and not losses:
        what = "one result is compared with itself." if same else "they share no task and no context of two models."
        remedy = "Give the results of two models, measured alike."
        raise UserError(what, code="results-mismatch", where=where, remedy=remedy)
    side_a, side_b = (
        Side(str(result.path), result.tasks.model if tasks and result.tasks else None, name if losses else None)
        for result, name in ((left, names[0]), (right, names[1]))
    )
    tasks = [replace(row, p_holm=p) for row, p in zip(tasks, holm([row.p for row in tasks]), strict=True)]
    losses = [replace(row, p_holm=p) for row, p in zip(losses, holm([row.p for row in losses]), strict=True)]
    return CompareRecord(
        snugfit=__version__,
        arguments={"a": str(a), "b": str(b), "model_a": model_a, "model_b": model_b, "seed": SEED},
        a=side_a,
        b=side_b,
        tasks=tuple(tasks),
        losses=tuple(losses),
        unpaired=tuple(unpaired),
    )


def write_comparison(record: CompareRecord, directory: str | Path) -> None:
    """Write compare.json, compare.csv and compare.md to a new directory, whole or not at all."""
    with staged(Path(directory)) as folder:
        (folder / "compare.json").write_text(record.to_json(), encoding="utf-8")
        (folder / "compare.csv").write_text(comparison_csv(record), encoding="utf-8")
        (folder / "compare.md").write_text(comparison_markdown(record), encoding="utf-8")


def _split(family: str, a: Mapping[Key, object], b: Mapping[Key, object]) -> tuple[list[Key], list[Unpaired]]:
    """(name, metric) of both sides in A's order, and what only one side has."""
    lone = [Unpaired(family, *key, "A") for key in a if key not in b]
    lone += [Unpaired(family, *key, "B") for key in b if key not in a]
    return [key for key in a if key in b], lone


def _pair_tasks(a: Result, b: Result) -> tuple[list[TaskRow], list[Unpaired]]:
    of_a, of_b = ({(t.task, t.metric): t for t in found.tasks.tasks} if found.tasks else {} for found in (a, b))
    shared, lone = _split("tasks", of_a, of_b)
    return [_pair_task(of_a[key], of_b[key]) for key in shared], lone


def _pair_task(a: TaskResult, b: TaskResult) -> TaskRow:
    """One metric on the same items; accuracies by McNemar's test where both are accuracies."""
    where = f"{a.task}, {a.metric}"
    missing = len(a.items.keys() - b.items.keys()), len(b.items.keys() - a.items.keys())
    if any(missing):
        counts = f"{missing[0]} of A's {len(a.items)} are not in B, {missing[1]} of B's {len(b.items)} not in A."
        raise UserError(
            f"the items differ: {counts}",
            code="results-mismatch",
            where=where,
            remedy="Run the same version of the task with the same `limit` on both.",
        )
    if a.higher_is_better != b.higher_is_better:
        what = "higher is better in one, lower in the other."
        raise UserError(what, code="results-mismatch", where=where, remedy=MAKE_AGAIN)
    kind = "accuracy" if a.kind == b.kind == "accuracy" else "mean"
    row = TaskRow(
        task=a.task,
        metric=a.metric,
        kind=kind,
        higher_is_better=a.higher_is_better,
        a=_finite(a.value),
        b=_finite(b.value),
        items=len(a.items),
    )
    if row.a is not None and row.b is not None:
        row = replace(row, z=unpaired_z(row.a, a.standard_error, row.b, b.standard_error)[0])
    keys = sorted(a.items)  # so that exchanging A and B mirrors the row
    left, right = _all_finite([a.items[key] for key in keys]), _all_finite([b.items[key] for key in keys])
    if left is None or right is None:
        return replace(row, note="scores are missing or not finite; not paired.")
    found = paired_bootstrap(left, right, [1] * len(keys), seed=SEED)
    notes = [_no_interval(found)]
    if not (_is_mean(row.a, left) and _is_mean(row.b, right)):
        notes.append("a value is not the mean of its items; the difference and the test are of the items' mean.")
    note = " ".join(filter(None, notes))
    row = replace(row, difference=found.difference, low=found.low, high=found.high, p=found.p, note=note)
    if kind == "mean":
        return row
    counted = mcnemar(left, right)
    return replace(row, only_a=counted.only_a, only_b=counted.only_b, p=counted.p)


def _choose(result: Result, wanted: str | None, option: str, same: bool) -> str:
    """The name of the model to compare: the one asked for, by default the only one that is not the reference."""
    assert result.eval is not None
    names = list(dict.fromkeys(model.name for context in result.eval.contexts for model in context.models))
    others = names[1:] if result.eval.reference is not None and len(names) > 1 else names
    if wanted is not None and wanted not in names:
        what, remedy = f"no model {wanted!r}.", f"`{option}` can be {', '.join(names)}."
        raise UserError(what, code="option-invalid", where=str(result.path), remedy=remedy)
    if wanted is None and (same or len(others) != 1):
        what, remedy = f"several models: {', '.join(names)}.", f"Choose one with `{option}`."
        raise UserError(what, code="option-invalid", where=str(result.path), remedy=remedy)
    return wanted or others[0]


def _pair_evals(
    a: EvalRecord, b: EvalRecord, names: tuple[str, str], *, where: str
) -> tuple[list[LossRow], list[Unpaired]]:
    """Rows of loss and KL at every context length that both models have, and what only one has."""
    if a.metrics_version != b.metrics_version:
        what = f"their metrics have versions {a.metrics_version} and {b.metrics_version}."
        remedy = "Evaluate both with one version of snugfit."
        raise UserError(what, code="results-mismatch", where=where, remedy=remedy)
    figures_a, figures_b = _figures(a, names[0]), _figures(b, names[1])
    shared, lone = _split("losses", figures_a, figures_b)
    rows = []
    for key in shared:
        (context, left), (other, right) = figures_a[key], figures_b[key]
        if context.digest != other.digest or context.chunk_tokens != other.chunk_tokens:
            texts = [" and ".join(text.name for text in found.texts) for found in (a, b)]
            what = f"context {key[0]}: other tokens were scored, A on {texts[0]}, B on {texts[1]}."
            remedy = "Evaluate both on the same texts and contexts, with one tokenizer."
            raise UserError(what, code="results-mismatch", where=where, remedy=remedy)
        same_reference = key[1] == "loss" or _same_reference(context, other)
        rows.append(_pair_figure(context, key[1], left, right, same_reference=same_reference))
    return rows, lone


def _figures(found: EvalRecord, name: str) -> dict[Key, tuple[ContextFigures, ModelFigures]]:
    """The model of that name by context and figure."""
    models = [(context, model) for context in found.contexts for model in context.models if model.name == name]
    figures = {}
    for context, model in models:
        figures[context_name(context.context), "loss"] = context, model
        if model.kl is not None:
            figures[context_name(context.context), "KL"] = context, model
    return figures


def _same_reference(a: ContextFigures, b: ContextFigures) -> bool:
    """Whether the first models' losses agree up to rounding, chunk by chunk: names and paths may differ."""
    left, right = _all_finite(a.models[0].nll_by_chunk), _all_finite(b.models[0].nll_by_chunk)
    if left is None or right is None:
        return False
    moved = sum(abs(x - y) for x, y in zip(left, right, strict=True))
    return moved <= SAME_REFERENCE * sum(a.chunk_tokens)


def _pair_figure(
    context: ContextFigures, figure: str, a: ModelFigures, b: ModelFigures, *, same_reference: bool
) -> LossRow:
    """Loss or KL of two models on the same chunks."""
    counts = context.chunk_tokens
    sums_a, sums_b = ((m.nll_by_chunk if m.kl is None or figure == "loss" else m.kl.by_chunk) for m in (a, b))
    left, right = _all_finite(sums_a), _all_finite(sums_b)
    mean_a, mean_b = _mean(left, a.tokens_by_chunk), _mean(right, b.tokens_by_chunk)
    row = LossRow(context=context.context, figure=figure, a=mean_a, b=mean_b, chunks=len(counts), tokens=sum(counts))
    if figure == "loss":
        row = replace(row, perplexity_a=_finite(a.perplexity), perplexity_b=_finite(b.perplexity))
        if row.perplexity_a is not None and row.perplexity_b:
            row = replace(row, perplexity_ratio=_finite(row.perplexity_a / row.perplexity_b))
    if a.nonfinite or b.nonfinite:
        left_out = f"tokens with NaN or infinite logits left out, {a.nonfinite} in A, {b.nonfinite} in B; not paired."
        return replace(row, note=left_out)
    if left is None or right is None or not a.tokens_by_chunk == b.tokens_by_chunk == counts:
        return replace(row, note="chunks are missing or not finite; not paired.")
    if not same_reference:
        return replace(row, note="the references differ; not paired.")
    bounds = [model.kl_kind == "lower bound" for model in (a, b) if figure == "KL"]
    if any(bounds) and not all(bounds):
        return replace(row, note="a lower bound in one, not in the other; not paired.")
    remark = "both are lower bounds." if any(bounds) else ""
    estimates = [side for side, model in (("A", a), ("B", b)) if figure == "KL" and model.kl_kind == "estimate"]
    if len(estimates) == 1:
        remark = f"{estimates[0]} is an estimate from a stored reference, the other is exact."
    found = paired_bootstrap(left, right, counts, seed=SEED)
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
    if found.chunks < MIN_CHUNKS_FOR_P:
        return f"no interval from fewer than {MIN_CHUNKS_FOR_P}."
    return "no interval: hardly any differ, or all by the same amount."


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
