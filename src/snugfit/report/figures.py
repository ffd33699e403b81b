"""The plots of a report, from records alone; the same ones are drawn as pictures and on the page."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from snugfit.records.evaluation import EvalRecord, EvaluatedServer
from snugfit.report.collection import Collection, QuantizedCheckpoint
from snugfit.report.plan_tables import plan_plots
from snugfit.report.plots import KL, Line, Plot, Point, line_of, plots_of
from snugfit.report.speed import speed_plots
from snugfit.report.table import numbered, size_unit
from snugfit.report.weights import LayerWeight, layers_of

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # magnitudes of a 4-bit float
_STEPS = 600  # points of the curves of rounding errors


def figures_of(collection: Collection) -> list[Plot]:
    """All plots of a report, in the order of the card; none without lines."""
    plots = [plot for one in collection.checkpoints for plot in _by_layer(one, collection)]
    for number, record in enumerate(collection.evals):
        found = [*plots_of(record), *_against_bytes(record)]
        plots += [replace(plot, name=numbered(plot.name, number)) for plot in found]
    plots += plan_plots(collection.plans)
    plots += speed_plots(collection.benches)
    if collection.checkpoint is not None and uses_four_over_six(collection.checkpoint):
        plots.append(rounding_plot())
    return [plot for plot in plots if plot.lines]


def _by_layer(one: QuantizedCheckpoint, collection: Collection) -> Iterator[Plot]:
    """Bits a weight and relative error by layer, a line for each projection."""
    place = collection.checkpoints.index(one)
    weights = layers_of(one.record)
    names = list(dict.fromkeys(weight.projection for weight in weights))
    if len({weight.layer for weight in weights}) < 2:
        return

    def lines(figure: str) -> tuple[Line, ...]:
        found = []
        for number, name in enumerate(names):
            points = [_point(weight, figure) for weight in weights if weight.projection == name]
            known = [point for point in points if point is not None]
            if known:
                found.append(line_of(name, number, known))
        return tuple(found)

    for figure, name, label in (
        ("relative_error", "error-by-layer", "relative error of the weights"),
        ("bits", "bits-by-layer", "bits a weight, scales included"),
    ):
        yield Plot(
            name=numbered(name, place),
            x_label="decoder layer",
            y_label=label,
            title=f"{one.name}, recipe {one.record.recipe}",
            lines=lines(figure),
            caption="",
            by_layer=True,
        )


def _point(weight: LayerWeight, figure: str) -> Point | None:
    value = getattr(weight, figure)
    return None if not value or not math.isfinite(value) else (float(weight.layer), float(value), None)


def _against_bytes(record: EvalRecord) -> Iterator[Plot]:
    """KL against size at the longest context of text, a point for each candidate; two at least."""
    sizes = {c.name: c.bytes for c in record.candidates if not isinstance(c, EvaluatedServer)}
    texts = [context for context in record.contexts if context.context]
    if not texts:
        return
    longest = max(texts, key=lambda context: context.context)
    unit, factor = size_unit(max(sizes.values(), default=0))
    first = 0 if record.reference is None else 1  # colours are those of other plots
    lines = [
        line_of(
            model.name,
            n - first,
            [(sizes[model.name] / factor, model.kl.mean, model.kl.standard_error)],
            linestyle="none",
        )
        for n, model in enumerate(longest.models)
        if model.kl is not None and model.name in sizes and math.isfinite(model.kl.mean)
    ]
    if len(lines) > 1:
        yield Plot(
            name="kl-against-bytes",
            x_label=f"size of all tensors, {unit}",
            y_label=KL,
            title=f"{longest.context:,} tokens of context: {longest.chunks:,} chunks, {longest.tokens:,} tokens",
            lines=tuple(lines),
            caption="",
            linear=True,
        )


def uses_four_over_six(one: QuantizedCheckpoint) -> bool:
    """Whether any weight chose between scales to 6 and to 4."""
    return any("four-over-six" in tensor.scale_rule for tensor in one.record.tensors)


def rounding_plot() -> Plot:
    """The proportional error of rounding a weight to 4-bit floats, by its share of its block's largest weight.

    A block whose largest magnitude becomes 6 has no code between 4 and 6; one whose largest becomes 4 has coarser small
    codes. This is arithmetic of the format, not a measurement.
    """
    curves = [
        (
            f"largest weight becomes {top}",
            [_rounding_error(step / _STEPS, top) for step in range(_STEPS // 20, _STEPS + 1)],
        )
        for top in (6, 4)
    ]
    lines = [line_of(label, n, points, marker="") for n, (label, points) in enumerate(curves)]
    return Plot(
        name="rounding-error",
        x_label="weight over the largest weight of its block",
        y_label="error of rounding, % of the weight",
        title="Rounding to 4-bit floats (E2M1) under an exact scale",
        lines=tuple(lines),
        caption="Four Over Six takes, for each block of 16 weights, the scale with the smaller squared error",
        linear=True,
    )


def _rounding_error(share: float, top: int) -> Point:
    """The share, and its proportional error in percent."""
    value = share * top
    nearest = min((code for code in E2M1 if code <= top), key=lambda code: abs(code - value))
    return share, 100 * abs(nearest - value) / value, None
