"""The tables of a report, from records alone: what was not measured has no row, a table without rows is left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from snugfit.records.evaluation import MIN_CHUNKS_FOR_P, EvalRecord, EvaluatedServer
from snugfit.report.collection import CalibrationStatistics, Collection, QuantizedCheckpoint, counted, stated
from snugfit.report.plan_tables import plan_tables
from snugfit.report.speed import speed_tables, started_table
from snugfit.report.table import Cell, Column, Table, without_empty
from snugfit.report.tables import MIN_TOKENS_FOR_P999, context_name
from snugfit.report.weights import components_of, layers_of, spans
from snugfit.report.words import why

Rows = list[Mapping[str, Cell]]
ERRORS = "± is one standard error."


def tables_of(collection: Collection) -> list[Table]:
    """All tables, in the order of the card; none is empty."""
    tables = [*_formats(collection), *_layers(collection), *plan_tables(collection.plans)]
    tables += [_served(collection), *_kernels(collection), _fits(collection)]
    tables += [*_evaluations(collection), *_pairs(collection), _tasks(collection), *_comparisons(collection)]
    tables += [*_answers(collection), *speed_tables(collection.benches), started_table(collection.serves)]
    tables += [_calibration(collection), _trials(collection), _saturation(collection)]
    if collection.statistics is not None:
        tables += [_coverage(collection.statistics), _outliers(collection.statistics)]
    return without_empty([*tables, _checkpoints(collection)])


def _checkpoints(collection: Collection) -> Table:
    rows: Rows = [
        {
            "name": one.name,
            "recipe": one.record.recipe,
            "bytes": one.record.bytes,
            "of": one.record.bytes / max(1, one.record.source_bytes),
            "bits": 8 * one.record.bytes / weights if (weights := weights_of(one)) else None,
            "seconds": one.record.seconds.get("total"),
            "peak": one.record.peak_rss_bytes,
            "gpu_peak": one.record.peak_gpu_bytes,
        }
        for one in collection.checkpoints
    ]
    return Table(
        name="checkpoints",
        title="Checkpoints",
        columns=(
            Column(key="name", heading="checkpoint"),
            Column(key="recipe", heading="recipe", form="code"),
            Column(key="bytes", heading="size", form="bytes"),
            Column(key="of", heading="of the original", form="percent"),
            Column(key="bits", heading="bits a weight", form=2),
            Column(key="seconds", heading="seconds to quantize", form=1),
            Column(key="peak", heading="memory", form="bytes"),
            Column(key="gpu_peak", heading="GPU memory", form="bytes"),
        ),
        rows=tuple(rows),
        note="Sizes are of all tensors; bits a weight count everything, embeddings too.",
    )


def weights_of(checkpoint: QuantizedCheckpoint) -> int:
    """The number of weights of a checkpoint, unpacked."""
    return sum(component.weights for component in components_of(checkpoint.record) if component.name != "KV cache")


def _formats(collection: Collection) -> Iterator[Table]:
    for number, one in enumerate(collection.checkpoints):
        components = components_of(one.record)
        rows: Rows = []
        for component in components:
            names = component.projections
            inside = ", ".join(names) if component.share is not None and len(names) < 9 else ""
            rows.append(
                {
                    "component": component.name + (f": {inside}" if inside else ""),
                    "layers": "" if component.all_layers or not component.layers else spans(component.layers),
                    "format": component.format,
                    "scale_rule": ", ".join(component.scale_rules),
                    "bits": component.bits if component.weights else None,
                    "bytes": component.bytes,
                    "tensors": component.tensors,
                    "relative_error": component.relative_error,
                    "why": why(component, components, one.record),
                }
            )
        rows = [{key: value or None for key, value in row.items()} for row in rows]
        yield Table(
            name="formats" if not number else f"formats-{number + 1}",
            title=f"Components of {one.name}",
            columns=(
                Column(key="component", heading="component"),
                Column(key="layers", heading="layers"),
                Column(key="format", heading="format", form="code"),
                Column(key="scale_rule", heading="scales", form="code"),
                Column(key="bits", heading="bits a weight", form=2),
                Column(key="bytes", heading="size", form="bytes"),
                Column(key="relative_error", heading="relative error", form=5),
                Column(key="why", heading="why"),
            ),
            rows=tuple(rows),
            note="Relative error: sum of squared differences to the original weights over the sum of their squares.",
        )


def _layers(collection: Collection) -> Iterator[Table]:
    for number, one in enumerate(collection.checkpoints):
        yield Table(
            name="layers" if not number else f"layers-{number + 1}",
            title="Bits and error by layer" if not number else f"Bits and error by layer: {one.name}",
            columns=(
                Column(key="layer", heading="layer", form="count"),
                Column(key="projection", heading="projection", form="code"),
                Column(key="format", heading="format", form="code"),
                Column(key="bits", heading="bits a weight", form=2),
                Column(key="relative_error", heading="relative error", form=6),
                Column(key="input_amax", heading="largest input", form=2),
            ),
            rows=tuple(asdict(weight) for weight in layers_of(one.record)),
        )


def _served(collection: Collection) -> Table:
    """The longest context on common cards, one GPU and one sequence; cards that are alike share a row."""
    cards: dict[str, dict[str, Cell]] = {}
    engines: dict[str, str] = {}
    problems: dict[str, None] = {}
    for fit in collection.served:
        if fit.tensor_parallel_size != 1 or fit.max_num_seqs != 1:
            continue
        engines[fit.engine] = fit.engine_title
        row = cards.setdefault(fit.card, {})
        for kind, tokens in (("auto", fit.auto), ("fp8", fit.fp8)):
            row[f"{fit.engine}_{kind}"] = "-" if fit.problem else _context(tokens, collection.max_positions)
        if fit.problem:
            problems[fit.problem] = None
    alike: dict[tuple[Cell, ...], list[str]] = {}
    for card, row in cards.items():
        alike.setdefault(tuple(row.values()), []).append(card)
    keys = [f"{engine}_{kind}" for engine in engines for kind in ("auto", "fp8")]
    rows: Rows = [dict(zip(keys, values, strict=True)) | {"card": ", ".join(names)} for values, names in alike.items()]
    columns = [Column(key="card", heading="GPU")]
    for engine, title in engines.items():
        columns += [
            Column(key=f"{engine}_auto", heading=f"{title}, 16-bit KV cache"),
            Column(key=f"{engine}_fp8", heading="FP8 KV cache"),
        ]
    reasons = f" -: {'; '.join(problems)}." if problems else ""
    return Table(
        name="context",
        title="Longest context on common GPUs",
        columns=tuple(columns),
        rows=tuple(rows),
        note="Tokens of one sequence on one GPU, predicted from the file's headers and each engine's own memory rules,"
        f" with its default share of the GPU; not measured.{reasons}",
    )


def _context(tokens: int, most: int | None) -> str:
    return f"{tokens:,}{' (all)' if tokens == most else ''}" if tokens else "does not fit"


def _kernels(collection: Collection) -> Iterator[Table]:
    """Which kernel runs each format on each generation of GPUs, a table for each engine with kernels of its own."""
    names = {"vllm": "vLLM and Aphrodite", "sglang": "SGLang"}
    for engine, title in names.items():
        uses = [use for use in collection.kernels if use.engine == engine]
        formats = list(dict.fromkeys(use.format for use in uses))
        rows: dict[str, dict[str, Cell]] = {}
        for use in uses:
            shown = f"{use.kernel} ({use.arithmetic})" + (", seen" if use.seen else "") if use.kernel else "none known"
            rows.setdefault(use.generation, {"generation": use.generation})[use.format] = shown
        yield Table(
            name=f"kernels-{engine}",
            title=f"Kernels of {title}",
            columns=(
                Column(key="generation", heading="GPU"),
                *(Column(key=fmt, heading=fmt, form="text") for fmt in formats),
            ),
            rows=tuple(rows.values()),
            note="W4A16 computes in 16 bits: it saves memory and bandwidth; W4A4 and W8A8 compute in 4 and 8 bits."
            " Read in the engines' lists; seen: this project saw the engine choose it.",
        )


def _fits(collection: Collection) -> Table:
    rows: Rows = [
        {
            "model": fit.model,
            "gpu": fit.gpu.name,
            "gpus": fit.arguments.tensor_parallel_size,
            "sequences": fit.arguments.max_num_seqs,
            "engine": fit.engine.title,
            "weights": row.name,
            "bytes_per_gpu": row.bytes_per_gpu,
            "bits": row.bits_per_weight,
            "kv_cache": cache.kv_cache,
            "context": fit.context,
            "max_context": cache.max_context,
            "fits": cache.fits,
            "headroom_bytes": cache.headroom_bytes,
        }
        for fit in collection.fits
        for row in fit.rows
        for cache in row.caches
    ]
    return Table(
        name="fit",
        title="What fits",
        columns=(
            Column(key="model", heading="model"),
            Column(key="gpu", heading="GPU"),
            Column(key="engine", heading="engine"),
            Column(key="weights", heading="weights"),
            Column(key="kv_cache", heading="KV cache", form="code"),
            Column(key="gpus", heading="GPUs", form="count"),
            Column(key="sequences", heading="sequences", form="count"),
            Column(key="bytes_per_gpu", heading="weights a GPU", form="gib"),
            Column(key="bits", heading="bits a weight", form=2),
            Column(key="context", heading="wanted context", form="count"),
            Column(key="max_context", heading="longest context", form="count"),
            Column(key="fits", heading="fits"),
            Column(key="headroom_bytes", heading="left", form="gib", signed=True),
        ),
        rows=tuple(rows),
        note="Predicted by `snugfit fit`, not measured.",
    )


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
            name="evaluation" if not number else f"evaluation-{number + 1}",
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
            name="pairs" if not number else f"pairs-{number + 1}",
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
            name="answers" if not number else f"answers-{number + 1}",
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
            name="comparison" if not number else f"comparison-{number + 1}",
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


def _calibration(collection: Collection) -> Table:
    one = collection.checkpoint
    rows: Rows = []
    if one is not None:
        for use, data in (("calibration", one.record.dataset), ("held out, to choose", one.record.held_out)):
            rows += _datasets(use, data)
    return Table(
        name="calibration",
        title="Datasets",
        columns=(
            Column(key="use", heading="use"),
            Column(key="source", heading="dataset"),
            Column(key="subset", heading="subset"),
            Column(key="split", heading="split"),
            Column(key="revision", heading="revision", form="code"),
            Column(key="formatter", heading="formatter", form="code"),
            Column(key="samples", heading="samples", form="count"),
            Column(key="tokens", heading="tokens", form="count"),
            Column(key="digest", heading="SHA-256 of the samples", form="code"),
        ),
        rows=tuple(rows),
    )


def _datasets(use: str, data: Mapping[str, Any] | None) -> Iterator[Mapping[str, Cell]]:
    """The whole dataset, and below it its sources."""
    if not data:
        return
    whole = {"use": use, "source": stated(data, "source"), "digest": stated(data, "digest")}
    yield whole | {"samples": counted(data, "samples"), "tokens": counted(data, "tokens")}
    sources = data.get("sources")
    for source in sources if isinstance(sources, list | tuple) else ():
        if isinstance(source, Mapping):
            texts = {key: stated(source, key) or None for key in ("subset", "split", "revision", "formatter")}
            counts = {key: counted(source, key) for key in ("samples", "tokens")}
            yield {"use": "of which", "source": stated(source, "dataset"), **texts, **counts}


def _trials(collection: Collection) -> Table:
    trials = collection.checkpoint.record.trials if collection.checkpoint else ()
    return Table(
        name="trials",
        title="Ways that were tried",
        columns=(
            Column(key="name", heading="way"),
            Column(key="kl", heading="KL, held out", form=4, error="error"),
            Column(key="gain", heading="gain over the last one kept", form=4, error="gain_error", signed=True),
            Column(key="kept", heading="kept"),
            Column(key="seconds", heading="seconds", form="count"),
        ),
        rows=tuple(asdict(trial) for trial in trials),
        note=f"Nats a token to the original on held-out samples; the last one kept is this checkpoint. {ERRORS}",
    )


def _saturation(collection: Collection) -> Table:
    sites = collection.checkpoint.record.input_saturation if collection.checkpoint else ()
    return Table(
        name="saturation",
        title="Input scales on held-out samples",
        columns=(
            Column(key="module", heading="module", form="code"),
            Column(key="tokens", heading="tokens", form="count"),
            Column(key="saturated_tokens", heading="tokens beyond the range", form="count"),
            Column(key="amax", heading="largest input", form=2),
            Column(key="range", heading="range", form=2),
            Column(key="ratio", heading="of what calibration saw", form=2),
        ),
        rows=tuple(asdict(site) for site in sites),
    )


def _coverage(statistics: CalibrationStatistics) -> Table:
    rows: Rows = [
        {
            "layer": one.layer,
            "experts": one.experts,
            "routed_least": one.routed.least,
            "routed_median": one.routed.median,
            "routed_most": one.routed.most,
            "forced_median": one.forced.median,
            "unrouted": one.unrouted,
        }
        for one in statistics.coverage
    ]
    return Table(
        name="experts",
        title="Tokens that each expert saw in calibration",
        columns=(
            Column(key="layer", heading="layer", form="count"),
            Column(key="experts", heading="experts", form="count"),
            Column(key="routed_least", heading="routed: least", form="count"),
            Column(key="routed_median", heading="median", form="count"),
            Column(key="routed_most", heading="most", form="count"),
            Column(key="forced_median", heading="added by calibration: median", form="count"),
            Column(key="unrouted", heading="experts that no token chose", form="count"),
        ),
        rows=tuple(rows),
    )


def _outliers(statistics: CalibrationStatistics) -> Table:
    return Table(
        name="outliers",
        title="Outliers of inputs",
        columns=(
            Column(key="layer", heading="layer", form="count"),
            Column(key="projection", heading="projection", form="code"),
            Column(key="amax", heading="largest input", form=2),
            Column(key="p999", heading="99.9 % below", form=3),
            Column(key="ratio", heading="ratio", form=1),
            Column(key="tokens", heading="tokens", form="count"),
        ),
        rows=tuple(asdict(one) for one in statistics.outliers),
    )
