"""Tables of what a checkpoint lost: perplexity, KL, pairs, tasks, comparisons, greedy answers; from records alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from snugfit.records.evaluation import MIN_CHUNKS_FOR_P, EvalRecord, EvaluatedServer
from snugfit.report.collection import Collection, counted, stated
from snugfit.report.table import Cell, Column, Table, numbered
from snugfit.report.tables import MIN_TOKENS_FOR_P999, context_name

Rows = list[Mapping[str, Cell]]
ERRORS = "± is one standard error."


def loss_tables(collection: Collection) -> Iterator[Table]:
    """Every table of losses, in the order of the card; some without rows."""
    yield from _evaluations(collection)
    yield from _pairs(collection)
    yield _tasks(collection)
    yield from _comparisons(collection)
    yield from _answers(collection)


def evaluation_title(record: EvalRecord) -> str:
    """What an evaluation was on: its texts and the arithmetic of inputs, or the servers that ran it."""
    texts = ", ".join(Path(text.name).name for text in record.texts[:3]) + (", ..." if len(record.texts) > 3 else "")
    profile = stated(record.arguments, "activations")
    if any(isinstance(candidate, EvaluatedServer) for candidate in record.candidates):
        profile = "served"
    return f"{texts}; inputs as under {profile}" if profile not in ("", "served") else texts


def _evaluations(collection: Collection) -> Iterator[Table]:
    for number, record in enumerate(collection.evals):
        rows: Rows = []
        for context in record.contexts:
            for place, model in enumerate(context.models):
                tokens = sum(model.tokens_by_chunk)
                reference = record.reference is not None and place == 0
                kl = model.kl
                rows.append(
                    {
                        "context": context_name(context.context, tokens=True),
                        "model": f"{model.name} (original)" if reference else model.name,
                        "perplexity": model.perplexity,
                        "perplexity_error": model.perplexity_error,
                        "loss_change": model.loss_change,
                        "loss_change_error": model.loss_change_error,
                        "kl": kl.mean if kl else None,
                        "kl_error": kl.standard_error if kl else None,
                        "kl_kind": model.kl_kind if kl and model.kl_kind != "exact" else None,
                        "kl_p99": kl.p99 if kl else None,
                        "kl_p999": kl.p999 if kl and tokens >= MIN_TOKENS_FOR_P999 else None,
                        "same_top": model.same_top,
                        "same_top_error": model.same_top_error,
                        "acceptance": model.acceptance,
                        "acceptance_error": model.acceptance_error,
                        "floor": model.floor.kl if model.floor else None,
                        "nonfinite": model.nonfinite or None,
                        "tokens": tokens,
                    }
                )
        yield Table(
            name=numbered("evaluation", number),
            title=f"Perplexity and KL: {evaluation_title(record)}",
            columns=(
                Column(key="context", heading="context"),
                Column(key="model", heading="model"),
                Column(key="perplexity", heading="perplexity", form=3, error="perplexity_error"),
                Column(key="loss_change", heading="loss, change", form=4, error="loss_change_error", signed=True),
                Column(key="kl", heading="KL to the original", form=4, error="kl_error"),
                Column(key="kl_kind", heading="KL is"),
                Column(key="kl_p99", heading="99 % of tokens below", form=3),
                Column(key="kl_p999", heading="99.9 % below", form=3),
                Column(key="same_top", heading="same top token", form="percent", error="same_top_error"),
                Column(key="acceptance", heading="acceptance rate", form="percent", error="acceptance_error"),
                Column(key="floor", heading="KL by rounding alone", form=4),
                Column(key="nonfinite", heading="not finite", form="count"),
                Column(key="tokens", heading="tokens", form="count"),
            ),
            rows=tuple(rows),
            note=f"Nats a token. {ERRORS} Models of a context are measured on the same tokens, so that changes have"
            " smaller errors than the perplexities themselves.",
        )


def _pairs(collection: Collection) -> Iterator[Table]:
    for number, record in enumerate(collection.evals):
        rows: Rows = [
            {
                "context": context_name(context.context, tokens=True),
                "a": pair.a,
                "b": pair.b,
                "figure": "KL" if pair.figure == "kl" else pair.figure,
                "difference": pair.difference,
                "low": pair.low,
                "high": pair.high,
                "p": pair.p,
                "p_holm": pair.p_holm,
                "chunks": pair.chunks,
            }
            for context in record.contexts
            for pair in context.pairs
        ]
        yield Table(
            name=numbered("pairs", number),
            title="Candidates against each other",
            columns=(
                Column(key="context", heading="context"),
                Column(key="a", heading="A"),
                Column(key="b", heading="B"),
                Column(key="figure", heading="figure"),
                Column(key="difference", heading="A - B", form=4, signed=True),
                Column(key="low", heading="95 % from", form=4, signed=True),
                Column(key="high", heading="to", form=4, signed=True),
                Column(key="p", heading="p", form=4),
                Column(key="p_holm", heading="p (Holm)", form=4),
                Column(key="chunks", heading="chunks", form="count"),
            ),
            rows=tuple(rows),
            note=f"Paired bootstrap over chunks, nats a token; no p with fewer than {MIN_CHUNKS_FOR_P} chunks.",
        )


def _tasks(collection: Collection) -> Table:
    names = list(dict.fromkeys(record.model for record in collection.tasks))
    rows: dict[tuple[str, str], dict[str, Cell]] = {}
    for record in collection.tasks:
        place = names.index(record.model)
        for result in record.tasks:
            row = rows.setdefault((result.task, result.metric), {"task": result.task, "metric": result.metric})
            row |= {f"m{place}": result.value, f"m{place}_error": result.standard_error, "items": len(result.items)}
            limit = counted(record.arguments, "limit")
            row["limit"] = limit
    models = [Column(key=f"m{n}", heading=name, form=4, error=f"m{n}_error") for n, name in enumerate(names)]
    return Table(
        name="tasks",
        title="Tasks",
        columns=(
            Column(key="task", heading="task"),
            Column(key="metric", heading="metric"),
            *models,
            Column(key="items", heading="items", form="count"),
            Column(key="limit", heading="limit of items", form="count"),
        ),
        rows=tuple(rows.values()),
        note=f"lm_eval's own values and errors. {ERRORS}",
    )


def _answers(collection: Collection) -> Iterator[Table]:
    """Repetition and length of greedy answers."""
    for number, record in enumerate(collection.evals):
        yield Table(
            name=numbered("answers", number),
            title="Greedy answers: length and repetition",
            columns=(
                Column(key="model", heading="model"),
                Column(key="tokens", heading="tokens", form=1, error="tokens_error"),
                Column(
                    key="length_change",
                    heading="length, change",
                    form="percent",
                    error="length_change_error",
                    signed=True,
                ),
                Column(key="repeated", heading="repeated", form="percent", error="repeated_error"),
                Column(
                    key="repeated_change",
                    heading="repeated, change",
                    form="percent",
                    error="repeated_change_error",
                    signed=True,
                ),
                Column(key="loops", heading="loops", form="count"),
                Column(key="unfinished", heading="cut off", form="count"),
                Column(key="same_tokens", heading="tokens as the original's", form=1),
                Column(key="questions", heading="questions", form="count"),
            ),
            rows=tuple(asdict(figures) for figures in record.answer_figures),
            note=f"Repeated: 4-token sequences that occurred in the answer before. {ERRORS}",
        )


def _comparisons(collection: Collection) -> Iterator[Table]:
    for number, record in enumerate(collection.comparisons):
        rows: Rows = [
            {**asdict(row), "name": row.task, "figure": row.metric, "count": row.items} for row in record.tasks
        ]
        rows += [
            {**asdict(row), "name": context_name(row.context, tokens=True), "count": row.chunks}
            for row in record.losses
        ]
        a = record.a.tasks_model or record.a.eval_model or "A"
        b = record.b.tasks_model or record.b.eval_model or "B"
        yield Table(
            name=numbered("comparison", number),
            title=f"Is the difference real? {a} minus {b}",
            columns=(
                Column(key="name", heading="task or context"),
                Column(key="figure", heading="metric"),
                Column(key="a", heading=a, form=4),
                Column(key="b", heading=b, form=4),
                Column(key="difference", heading="difference", form=4, signed=True),
                Column(key="low", heading="95 % from", form=4, signed=True),
                Column(key="high", heading="to", form=4, signed=True),
                Column(key="only_a", heading="only A right", form="count"),
                Column(key="only_b", heading="only B right", form="count"),
                Column(key="p", heading="p", form=4),
                Column(key="p_holm", heading="p (Holm)", form=4),
                Column(key="z", heading="z, unpaired", form=2, signed=True),
                Column(key="count", heading="items or chunks", form="count"),
                Column(key="note", heading="note"),
            ),
            rows=tuple({key: value if value != "" else None for key, value in row.items()} for row in rows),
            note="Paired on the same items or chunks: McNemar's exact test for accuracies, a bootstrap for all else;"
            " p (Holm) is adjusted to all rows of its kind.",
        )
