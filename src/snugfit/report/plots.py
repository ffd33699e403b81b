"""Plots of an evaluation, from its record alone: by context length, and by position. PNG and SVG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snugfit.records import EvalRecord, ModelFigures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# colours that stay apart for colour-blind readers (Okabe and Ito), the reference in black
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#8B5A2B")
MARKERS = "osD^vPX*"
Point = tuple[float, float, float | None]


def write_plots(record: EvalRecord, directory: Path) -> list[str]:
    """Write perplexity and KL by context length, and KL (else perplexity) by position; the names of the files."""
    texts = [context for context in record.contexts if context.context]
    written = []
    if len(texts) > 1:
        by_context = [(c.context, c.models) for c in texts]
        written += _draw(
            directory,
            "perplexity-by-context",
            "context length, tokens",
            "perplexity",
            _lines(by_context, lambda m: (m.perplexity, m.perplexity_error)),
        )
        compared = _lines(by_context, lambda m: None if m.kl is None else (m.kl.mean, m.kl.standard_error))
        if compared:
            floors = _lines(by_context, lambda m: (m.floor.kl, m.floor.standard_error) if m.floor else None)
            written += _draw(
                directory, "kl-by-context", "context length, tokens", "KL to the reference, nats", compared, floors
            )
    for context in record.contexts[-1:]:
        found = [
            (m.name, [(b.low, b.kl, b.kl_error) for b in m.by_position if b.kl is not None]) for m in context.models
        ]
        lines = [(index, name, points) for index, (name, points) in enumerate(found) if points]
        if lines:
            where = f"position in the context ({context.context:,} tokens)" if context.context else "position"
            written += _draw(directory, "kl-by-position", where, "KL to the reference, nats", lines)
    return written


Line = tuple[int, str, list[Point]]


def _lines(
    contexts: Sequence[tuple[int, Sequence[ModelFigures]]],
    pick: Callable[[ModelFigures], tuple[float, float | None] | None],
) -> list[Line]:
    """One line a model: its place in the record, its name, its points (x, y, error)."""
    lines: list[Line] = []
    for place, model in enumerate(contexts[0][1]):
        points = []
        for x, models in contexts:
            found = pick(models[place])
            if found is not None:
                points.append((float(x), *found))
        if points:
            lines.append((place, model.name, points))
    return lines


def _draw(
    directory: Path, name: str, x_label: str, y_label: str, lines: Sequence[Line], floors: Sequence[Line] = ()
) -> list[str]:
    import matplotlib as mpl

    mpl.use("Agg")
    # the same record gives the same bytes
    mpl.rcParams["svg.hashsalt"] = "snugfit"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for place, label, points in lines:
        colour = "black" if place == 0 else COLOURS[(place - 1) % len(COLOURS)]
        _line(axes, points, label, color=colour, marker=MARKERS[place % len(MARKERS)])
    for place, label, points in floors:
        whose = "noise floor of the reference" if place == 0 else f"noise floor of {label}"
        colour = "black" if place == 0 else COLOURS[(place - 1) % len(COLOURS)]
        _line(axes, points, whose, color=colour, linestyle=":")
    axes.set_xscale("log", base=2)
    ticks = sorted({x for _, _, points in lines for x, _, _ in points})
    axes.set_xticks(ticks, [f"{x:,.0f}" for x in ticks])
    axes.minorticks_off()
    if y_label.startswith("KL"):
        axes.set_ylim(bottom=0)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(visible=True, color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    axes.set_title("bands: one standard error over chunks", fontsize=9, loc="right", color="0.4")
    for ending in ("png", "svg"):
        figure.savefig(directory / f"{name}.{ending}", dpi=150, metadata={"Date": None} if ending == "svg" else None)
    plt.close(figure)
    return [f"{name}.png", f"{name}.svg"]


def _line(axes: Axes, points: Sequence[Point], label: str, **style: Any) -> None:
    xs, ys = [x for x, _, _ in points], [y for _, y, _ in points]
    axes.plot(xs, ys, label=label, linewidth=1.6, markersize=5, **style)
    errors = [error or 0.0 for _, _, error in points]
    low, high = ([y + sign * e for y, e in zip(ys, errors, strict=True)] for sign in (-1, 1))
    axes.fill_between(xs, low, high, color=style["color"], alpha=0.15, linewidth=0)
