"""Plots in one style, PNG and SVG: of an evaluation, from its record alone, by context length and by position."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snugfit.records.evaluation import Bin, ContextFigures, EvalRecord, ModelFigures
from snugfit.report.tables import model_labels, other_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# colours that colour-blind readers can distinguish (Okabe and Ito); the reference is black
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#8B5A2B")
MARKERS = "osD^vPX*"
LINE_STYLES = ("-", "--", ":", "-.")
LENGTHS = "context length, tokens"
POSITIONS = "position in the context (bins of powers of two, from)"
KL = "KL to the reference, nats a token"
LOG_RATIO = 10.0  # an axis is logarithmic where the largest value is this many times the smallest
PANEL_RATIO = 3.0  # floors have their own panel where the lowest line is this many times the highest floor
Point = tuple[float, float, float | None]


@dataclass(frozen=True)
class Line:
    """One model's points (x, y, error); x is a context length, or the lower edge of a bin."""

    label: str
    style: dict[str, Any]
    points: tuple[Point, ...]


@dataclass(frozen=True, kw_only=True)
class Plot:
    """One plot; `name` is its file's. `by_layer`: x are numbers of layers, and y is always logarithmic.

    `linear`: x is no number of tokens, and both axes are linear.
    """

    name: str
    x_label: str
    y_label: str
    title: str
    lines: tuple[Line, ...]
    floors: tuple[Line, ...] = ()
    caption: str = "bands: one standard error over chunks"
    by_layer: bool = False
    linear: bool = False


def write_plots(record: EvalRecord, directory: Path) -> list[str]:
    """Write the plots of an evaluation; returns the files' names."""
    return [file for plot in plots_of(record) for file in draw(plot, directory)]


def plots_of(record: EvalRecord) -> list[Plot]:
    """Perplexity and KL by context length, and KL (else perplexity) by position; none without lines.

    By position: the longest context and, in a file that ends in -chat, chat and rows.
    """
    texts = [context for context in record.contexts if context.context]
    plots = _by_context(record, texts) if len(texts) > 1 else []
    longest = [max(texts, key=lambda context: context.context)] if texts else []
    for context in (*longest, *(context for context in record.contexts if not context.context)):
        plots += _by_position(record, context)
    return [plot for plot in plots if plot.lines]


def _by_context(record: EvalRecord, texts: Sequence[ContextFigures]) -> list[Plot]:
    title = f"{_span([c.chunks for c in texts])} chunks, {_span([c.tokens for c in texts])} tokens a length"
    if other_text(record):
        title += ", each of other text"

    def lines(pick: Callable[[ModelFigures], tuple[float, float | None] | None]) -> list[tuple[Point, ...]]:
        return [
            tuple((float(c.context), *found) for c in texts if (found := pick(c.models[place])) is not None)
            for place in range(len(texts[0].models))
        ]

    perplexity = lines(lambda m: (m.perplexity, m.perplexity_error))
    kl = lines(lambda m: None if m.kl is None else (m.kl.mean, m.kl.standard_error))
    floor = lines(lambda m: None if m.floor is None else (m.floor.kl, m.floor.standard_error))
    labels = model_labels(record, texts[0])
    floor_labels = [f"noise floor of {label}" for label in labels]
    if record.reference is not None:
        floor_labels[0] = "noise floor of the reference"
    plots = [
        Plot(
            name="perplexity-by-context",
            x_label=LENGTHS,
            y_label="perplexity",
            title=title,
            lines=_styled(record, labels, perplexity),
        )
    ]
    compared = _styled(record, labels, kl)
    if compared:
        floors = _styled(record, floor_labels, floor, linestyle=":")
        plots.append(
            Plot(name="kl-by-context", x_label=LENGTHS, y_label=KL, title=title, lines=compared, floors=floors)
        )
    return plots


def _by_position(record: EvalRecord, context: ContextFigures) -> list[Plot]:
    """KL by position, else perplexity, of one context; no plot without a finite value."""
    where = f"{context.context:,} tokens of context" if context.context else "chat and rows"
    title = f"{where}: {context.chunks:,} chunks, {context.tokens:,} tokens"
    ending = "" if context.context else "-chat"

    def lines(pick: Callable[[Bin], tuple[float | None, float | None]]) -> tuple[Line, ...]:
        points = [
            tuple((b.low, y, error) for b in m.by_position for y, error in (pick(b),) if y is not None)
            for m in context.models
        ]
        return _styled(record, model_labels(record, context), points)

    found = lines(lambda b: (b.kl, b.kl_error))
    if found:
        return [Plot(name=f"kl-by-position{ending}", x_label=POSITIONS, y_label=KL, title=title, lines=found)]
    found = lines(lambda b: (b.perplexity, b.perplexity_error))
    if not found:
        return []
    name = f"perplexity-by-position{ending}"
    return [Plot(name=name, x_label=POSITIONS, y_label="perplexity", title=title, lines=found)]


def _styled(
    record: EvalRecord, labels: Sequence[str], points: Sequence[Sequence[Point]], **given: Any
) -> tuple[Line, ...]:
    """Lines of the models that have a finite point, each in its model's colour."""
    lines = []
    first = 0 if record.reference is None else 1  # the reference is black
    for place, label in enumerate(labels):
        finite = tuple(point for point in points[place] if math.isfinite(point[1]))
        colour = "black" if place < first else COLOURS[(place - first) % len(COLOURS)]
        marker = "." if given else MARKERS[place % len(MARKERS)]
        if finite:
            shown = f" {label}" if label.startswith("_") else label  # matplotlib omits labels with _ from legends
            lines.append(Line(shown, {"color": colour, "marker": marker, **given}, finite))
    return tuple(lines)


def line_of(label: str, number: int, points: Sequence[Point], **style: Any) -> Line:
    """A line in the colour, marker and dashes of its number among the lines of a plot."""
    dashes = LINE_STYLES[number // len(COLOURS) % len(LINE_STYLES)]
    look = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "linestyle": dashes}
    shown = f" {label}" if label.startswith("_") else label  # matplotlib leaves labels with a leading _ out of legends
    return Line(shown, look | style, tuple(points))


def _span(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def draw(plot: Plot, directory: Path) -> list[str]:
    """Write a plot that has lines into a directory as PNG and SVG; returns the files' names.

    The same plot gives the same bytes, and the caller's matplotlib settings and back end stay as they are.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "snugfit"}):
        figure = Figure(figsize=(9.5, 5.5), layout="constrained")
        FigureCanvasAgg(figure)
        _draw_lines(figure, plot)
        for ending in ("png", "svg"):
            metadata = {"Date": None} if ending == "svg" else None
            figure.savefig(directory / f"{plot.name}.{ending}", dpi=150, metadata=metadata)
    return [f"{plot.name}.png", f"{plot.name}.svg"]


def _draw_lines(figure: Figure, plot: Plot) -> None:
    """Lines and floors in one panel, or in two where floors are far below."""
    values = [y for line in plot.lines for _, y, _ in line.points]
    floors = [y for line in plot.floors for _, y, _ in line.points]
    split = bool(floors) and min(floors) > 0 and min(values) > PANEL_RATIO * max(floors)
    rows, heights = (2, [4, 1]) if split else (1, [1])
    panels = [row[0] for row in figure.subplots(rows, 1, sharex=True, height_ratios=heights, squeeze=False)]
    if split:
        _scale(panels[0], values, logarithmic=True)
        _scale(panels[1], floors, logarithmic=True, margin=1.25)
        _mark_break(panels)
    else:
        both = [*values, *floors]
        wide = plot.y_label != KL and not plot.linear and max(both) > LOG_RATIO * min(both)
        _scale(panels[0], both, logarithmic=min(both) > 0 and (bool(floors) or wide or plot.by_layer))
        if plot.by_layer and min(both) <= 0:
            _scale_from_zero(panels[0], max(both))
    for line in plot.lines:
        _line(panels[0], line)
    for line in plot.floors:
        _line(panels[-1], line)
    if plot.y_label == KL and min([*values, *floors]) >= 0 and panels[0].get_yscale() == "linear":
        panels[0].set_ylim(bottom=0)
    _label(figure, panels, plot)


def _line(axes: Axes, line: Line) -> None:
    """A line and the band of its errors, multiplied on a logarithmic axis; no band at points without an error."""
    xs, ys = [x for x, _, _ in line.points], [y for _, y, _ in line.points]
    axes.plot(xs, ys, label=line.label, linewidth=1.6, markersize=5, **line.style)
    known = [error is not None for _, _, error in line.points]
    errors = [error or 0.0 for _, _, error in line.points]
    if axes.get_yscale() == "log":
        low, high = (
            [y * math.exp(sign * min(e / y, 50.0)) for y, e in zip(ys, errors, strict=True)] for sign in (-1, 1)
        )
    else:
        low, high = ([y + sign * e for y, e in zip(ys, errors, strict=True)] for sign in (-1, 1))
    axes.fill_between(xs, low, high, where=known, color=line.style["color"], alpha=0.15, linewidth=0)


def _scale(axes: Axes, values: Sequence[float], *, logarithmic: bool, margin: float = 1.04) -> None:
    """The y axis, with plain numbers; a logarithmic one leaves a margin around the lines, not around their bands."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = min(values), max(values)
    if logarithmic:
        axes.set_yscale("log")
        margin = max((high / low) ** 0.15, margin)
        axes.set_ylim(low / margin, high * margin)
        wide = high > LOG_RATIO * low
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if wide else MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _plain(value)))


def _scale_from_zero(axes: Axes, highest: float) -> None:
    """A logarithmic y axis of counts that includes 0."""
    from matplotlib.ticker import FuncFormatter

    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(-0.1, 2 * max(highest, 1.0))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _plain(value)))


def _plain(value: float) -> str:
    """A tick's number without an exponent."""
    text = f"{value:,.8f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def _mark_break(panels: Sequence[Axes]) -> None:
    """Strokes at the break between two panels of one axis."""
    from matplotlib.ticker import MaxNLocator

    panels[0].tick_params(bottom=False)
    panels[0].spines["bottom"].set_visible(False)
    panels[1].yaxis.set_major_locator(MaxNLocator(2))
    stroke: dict[str, Any] = {"marker": [(-1, -0.5), (1, 0.5)], "markersize": 9, "linestyle": "none", "color": "black"}
    for axes, height in zip(panels, (0, 1), strict=True):
        axes.plot([0], [height], transform=axes.transAxes, clip_on=False, mew=1, **stroke)


def _label(figure: Figure, panels: Sequence[Axes], plot: Plot) -> None:
    """Ticks of x, labels, title, and a legend beside the lines, in the order of their last points."""
    ticks = sorted({x for line in plot.lines for x, _, _ in line.points})
    if plot.linear:
        ticks = list(panels[-1].get_xticks())[1:-1]
    elif plot.by_layer:
        step = max(1, math.ceil((ticks[-1] - ticks[0]) / 16))
        ticks = [float(x) for x in range(round(ticks[0]), round(ticks[-1]) + 1, step)]
    else:
        panels[-1].set_xscale("log", base=2)
    size = 9 if len(ticks) < 14 else 7
    panels[-1].set_xticks(ticks, [_plain(x) if plot.linear else f"{x:,.0f}" for x in ticks], fontsize=size)
    for axes in panels:
        axes.minorticks_off()
        axes.grid(visible=True, color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel(plot.x_label)
    panels[0].set_ylabel(plot.y_label)
    panels[0].set_title("\n".join(filter(None, (plot.title, plot.caption))), fontsize=9, loc="left", color="0.3")
    handles = {handle.get_label(): handle for axes in panels for handle in axes.get_legend_handles_labels()[0]}
    ordered = sorted(plot.lines, key=lambda line: -line.points[-1][1])
    labels = [line.label for line in (*ordered, *plot.floors)]
    legend = figure.legend(
        [handles[label] for label in labels], labels, loc="outside right upper", frameon=False, fontsize=9
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
