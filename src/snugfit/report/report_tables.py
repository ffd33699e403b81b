"""The tables of a report, from records alone: what was not measured has no row, a table without rows is left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from snugfit.report.collection import CalibrationStatistics, Collection, QuantizedCheckpoint, counted, stated
from snugfit.report.loss_tables import ERRORS, loss_tables
from snugfit.report.plan_tables import plan_tables
from snugfit.report.speed import ENGINE_TITLES, speed_tables, started_table
from snugfit.report.table import Cell, Column, Table, numbered, without_empty
from snugfit.report.weights import components_of, layers_of, spans
from snugfit.report.words import why

Rows = list[Mapping[str, Cell]]


def tables_of(collection: Collection) -> list[Table]:
    """All tables, in the order of the card; none is empty."""
    tables = [*_formats(collection), *_layers(collection), *plan_tables(collection.plans)]
    tables += [_served(collection), *_kernels(collection), _fits(collection)]
    tables += [*loss_tables(collection), *speed_tables(collection.benches), started_table(collection.serves)]
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
                    "relative_error": component.relative_error,
                    "why": why(component, components, one.record),
                }
            )
        rows = [{key: value or None for key, value in row.items()} for row in rows]
        yield Table(
            name=numbered("formats", number),
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
            name=numbered("layers", number),
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
    for engine, title in ENGINE_TITLES.items():
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
