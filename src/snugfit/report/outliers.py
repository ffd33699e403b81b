"""What calibration measured, for people: how far inputs stand out, and which tokens mixtures' experts saw.

From statistics alone: tables for a terminal and as Markdown, CSV, plots by layer.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from snugfit.records.statistics import SAMPLED, Coverage, ExpertStatistics, Outlier, Range
from snugfit.records.statistics_file import Statistics
from snugfit.report.plots import COLOURS, MARKERS, Line, Plot, Point, draw
from snugfit.report.tables import Sheet

WORST = 12  # rows of a table for the terminal
CSV_COLUMNS = ("layer", "projection", "tokens", "amax", "p999", "amax_over_p999")
_LINE_STYLES = ("-", "--", ":", "-.")
_LAYERS = "decoder layer"


def outliers_of(statistics: Statistics) -> tuple[Outlier, ...]:
    """A figure for each layer and projection, in their order."""
    return tuple(
        Outlier(number, _inside(name, number), one.tokens, one.amax, one.quantile(0.999), one.outlier_ratio)
        for number, layer in sorted(statistics.layers.items())
        for name, one in layer.inputs.items()
    )


def coverage_of(statistics: Statistics) -> tuple[Coverage, ...]:
    """A figure for each layer's routed experts; none of a dense model."""
    return tuple(
        _coverage(number, _inside(name, number), experts)
        for number, layer in sorted(statistics.layers.items())
        for name, experts in layer.experts.items()
        if experts.routed
    )


def outlier_sheet(statistics: Statistics, *, narrow: bool = False) -> Sheet:
    """A row a layer and projection; `narrow`: of those that stand out farthest alone, for a terminal."""
    return sheet_of_outliers(outliers_of(statistics), narrow=narrow)


def coverage_sheet(statistics: Statistics, *, narrow: bool = False) -> Sheet:
    """A row a layer's experts; `narrow`: of those with the fewest routed tokens alone, for a terminal."""
    return sheet_of_coverage(coverage_of(statistics), narrow=narrow)


def write_outliers(statistics: Statistics, directory: Path) -> list[str]:
    """Write outliers.md, outliers.csv and plots by layer into a directory; the names of the files."""
    outliers, coverage = outliers_of(statistics), coverage_of(statistics)
    (directory / "outliers.md").write_text(_markdown(statistics, outliers, coverage), encoding="utf-8")
    (directory / "outliers.csv").write_text(_csv(outliers), encoding="utf-8")
    plots = [_outlier_plot(statistics, outliers), _coverage_plot(statistics, coverage)]
    return ["outliers.md", "outliers.csv", *(file for plot in plots if plot.lines for file in draw(plot, directory))]


def sheet_of_outliers(outliers: Sequence[Outlier], *, narrow: bool = False) -> Sheet:
    """The same as `outlier_sheet`, of figures."""
    shown = sorted(outliers, key=_farthest)[:WORST] if narrow else outliers
    rows = tuple(
        (str(s.layer), s.projection, f"{s.amax:.4g}", f"{s.p999:.4g}", f"{s.ratio:,.1f}" if s.ratio else "-")
        for s in shown
    )
    note = (
        "Magnitudes of what goes in; a name stands for all that share its input. "
        f"Percentiles are of 1 token in {SAMPLED}."
    )
    if any(outlier.projection.endswith("experts.down") for outlier in shown):
        note += " Of experts, down is measured on routed tokens."
    if len(shown) < len(outliers):
        note += f" The worst of {len(outliers):,}."
    headings = ("layer", "projection", "largest", "99.9th percentile", "largest / 99.9th")
    return Sheet("Outliers of inputs", headings, rows, 2, note)


def sheet_of_coverage(coverage: Sequence[Coverage], *, narrow: bool = False) -> Sheet:
    """The same as `coverage_sheet`, of figures."""
    shown = list(coverage)
    if narrow and len(shown) > WORST:
        shown = sorted(sorted(shown, key=lambda c: c.routed.least)[:WORST], key=lambda c: c.layer)
    several = len({c.layer for c in coverage}) < len(coverage)
    rows = tuple(
        (
            f"{c.layer} {c.module}" if several else str(c.layer),
            *(f"{c.experts:,}", _span(c.routed), _span(c.forced), f"{c.unrouted:,}"),
            *(f"{c.forced_gate_up:,}", f"{c.forced_down:,}", _times(c.times_gate_up), _times(c.times_down)),
        )
        for c in shown
    )
    note = (
        "Tokens an expert: least / median / most. Forced are those that its router did not send. Only forced: experts "
        "that none was sent to. Largest by forced: experts whose largest input came from a forced token. Over routed: "
        "the layer's largest input over that of routed tokens."
    )
    if len(shown) < len(coverage):
        note += f" The {len(shown)} of {len(coverage)} layers with the fewest routed tokens."
    headings = (
        *("layer", "experts", "routed", "forced", "only forced", "gate/up: largest by forced"),
        *("down: largest by forced", "gate/up: over routed", "down: over routed"),
    )
    return Sheet("What experts saw", headings, rows, 1, note)


def coverage_words(coverage: Sequence[Coverage]) -> str:
    """In one line: how many experts saw how many tokens, routed and forced."""
    counts = sorted({c.experts for c in coverage})
    many = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    layers = f"{many} experts of {len(coverage)} layer{'s' * (len(coverage) > 1)}"
    least, most = min(c.tokens.least for c in coverage), max(c.tokens.most for c in coverage)
    routed = f"{min(c.routed.least for c in coverage):,} to {max(c.routed.most for c in coverage):,}"
    if not any(c.forced.most for c in coverage):
        return f"{layers} saw {least:,} to {most:,} tokens, all routed"
    return f"{'all ' * bool(least)}{layers} saw >= {least:,} tokens (routed {routed}, rest forced)"


def _coverage(layer: int, module: str, experts: ExpertStatistics) -> Coverage:
    def by_forced(routed: Sequence[float], forced: Sequence[float]) -> int:
        return sum(b > a for a, b in zip(routed, forced, strict=True))

    return Coverage(
        *(layer, module, len(experts.routed)),
        *(_range(experts.tokens), _range(experts.routed), _range(experts.forced)),
        sum(not count for count in experts.routed),
        by_forced(experts.gate_up_routed, experts.gate_up_forced),
        by_forced(experts.down_routed, experts.down_forced),
        _over(experts.gate_up, max(experts.gate_up_routed)),
        _over(experts.down, max(experts.down_routed)),
    )


def _range(counts: Sequence[int]) -> Range:
    return Range(min(counts), median(counts), max(counts))


def _over(whole: float, part: float) -> float | None:
    return whole / part if part else None


def _inside(name: str, layer: int) -> str:
    """A module's name inside its layer."""
    return name.partition(f".{layer}.")[2] or name


def _farthest(outlier: Outlier) -> float:
    return -outlier.ratio if math.isfinite(outlier.ratio) else -math.inf


def _span(given: Range) -> str:
    if given.least == given.most:
        return f"{given.least:,}"
    return f"{given.least:,} / {given.median:,.0f} / {given.most:,}"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.3f}"


def _markdown(statistics: Statistics, outliers: Sequence[Outlier], coverage: Sequence[Coverage]) -> str:
    sheets = [sheet_of_coverage(coverage)] if coverage else []
    parts = ["# What calibration saw", "", *(sheet.to_markdown() for sheet in sheets)]
    parts += [sheet_of_outliers(outliers).to_markdown(), "## What was measured", ""]
    walked = "its own weights" if statistics.recipe is None else f"weights quantized by {statistics.recipe}"
    parts.append(f"- model: {statistics.model}, headers {statistics.header_digest[:16]}, {walked}")
    parts += [f"- {r.source}: {r.rows:,} rows, {r.tokens:,} tokens, digest {r.digest[:16]}" for r in statistics.rows]
    if coverage:
        forced = f", at most {statistics.forced_tokens:,} forced on an expert and layer" * (statistics.experts == "all")
        parts.append(f"- experts: {statistics.experts}{forced}")
    return "\n".join([*parts, f"- snugfit {statistics.snugfit}"]) + "\n"


def _csv(outliers: Sequence[Outlier]) -> str:
    output = io.StringIO()
    writer = csv.writer(output, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    writer.writerows((s.layer, s.projection, s.tokens, s.amax, s.p999, s.ratio or "") for s in outliers)
    return output.getvalue()


def _outlier_plot(statistics: Statistics, outliers: Sequence[Outlier]) -> Plot:
    points: dict[str, list[Point]] = {}
    for outlier in outliers:
        if outlier.ratio > 0 and math.isfinite(outlier.ratio):
            points.setdefault(outlier.projection, []).append((float(outlier.layer), outlier.ratio, None))
    lines = tuple(_line(label, place, found) for place, (label, found) in enumerate(points.items()))
    label = "largest input over the 99.9th percentile"
    return Plot("outliers-by-layer", _LAYERS, label, _title(statistics), lines, caption="", by_layer=True)


def _coverage_plot(statistics: Statistics, coverage: Sequence[Coverage]) -> Plot:
    rows = {
        "most": [(float(c.layer), float(c.routed.most), None) for c in coverage],
        "median": [(float(c.layer), float(c.routed.median), None) for c in coverage],
        "least": [(float(c.layer), float(c.routed.least), None) for c in coverage],
    }
    lines = tuple(_line(label, place, found) for place, (label, found) in enumerate(rows.items()) if found)
    label = "tokens routed to an expert"
    return Plot("tokens-by-layer", _LAYERS, label, _title(statistics), lines, caption="", by_layer=True)


def _line(label: str, place: int, points: Sequence[Point]) -> Line:
    """A line that differs from the others in colour and marker, and where these begin again in its strokes."""
    style = {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": _LINE_STYLES[place // len(COLOURS) % len(_LINE_STYLES)],
    }
    shown = f" {label}" if label.startswith("_") else label  # which matplotlib would keep out of a legend
    return Line(shown, style, tuple(points))


def _title(statistics: Statistics) -> str:
    return f"{Path(statistics.model).name}: {sum(r.rows for r in statistics.rows):,} rows, {statistics.tokens:,} tokens"
