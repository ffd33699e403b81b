"""What calibration measured, for people: how far inputs stand out, and which tokens the experts of mixtures saw.

Made from statistics alone: tables for a terminal and as Markdown, CSV, and plots by layer.
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
from snugfit.report.plots import Line, Plot, Point, draw, line_of
from snugfit.report.tables import Sheet

NARROW_ROWS = 12  # rows of a table for the terminal
CSV_COLUMNS = ("layer", "projection", "tokens", "amax", "p999", "amax_over_p999")
_LAYERS = "decoder layer"


def outliers_of(statistics: Statistics) -> tuple[Outlier, ...]:
    """One figure for each layer and projection, in their order; none where no ranges were measured."""
    if not statistics.ranges:
        return ()
    return tuple(
        Outlier(
            layer=number,
            projection=_inside(name, number),
            tokens=one.tokens,
            amax=one.amax,
            p999=one.quantile(0.999),
            ratio=one.outlier_ratio,
        )
        for number, layer in sorted(statistics.layers.items())
        for name, one in layer.inputs.items()
    )


def coverage_of(statistics: Statistics) -> tuple[Coverage, ...]:
    """One figure for each layer's routed experts; empty for a dense model."""
    return tuple(
        _coverage(number, _inside(name, number), experts)
        for number, layer in sorted(statistics.layers.items())
        for name, experts in layer.experts.items()
        if experts.routed
    )


def outlier_sheet(statistics: Statistics, *, narrow: bool = False) -> Sheet:
    """A row for each layer and projection; `narrow`, for a terminal: the NARROW_ROWS largest ratios alone."""
    return sheet_of_outliers(outliers_of(statistics), narrow=narrow)


def coverage_sheet(statistics: Statistics, *, narrow: bool = False) -> Sheet:
    """A row for each layer's experts; `narrow`, for a terminal: the NARROW_ROWS with the fewest routed tokens alone."""
    return sheet_of_coverage(coverage_of(statistics), narrow=narrow)


def write_outliers(statistics: Statistics, directory: Path) -> list[str]:
    """Write outliers.md, outliers.csv and plots by layer into a directory; returns the files' names."""
    outliers, coverage = outliers_of(statistics), coverage_of(statistics)
    (directory / "outliers.md").write_text(_markdown(statistics, outliers, coverage), encoding="utf-8")
    (directory / "outliers.csv").write_text(_csv(outliers), encoding="utf-8")
    plots = [_outlier_plot(statistics, outliers), _coverage_plot(statistics, coverage)]
    return ["outliers.md", "outliers.csv", *(file for plot in plots if plot.lines for file in draw(plot, directory))]


def sheet_of_outliers(outliers: Sequence[Outlier], *, narrow: bool = False) -> Sheet:
    """The table of `outlier_sheet` made from figures."""
    shown = sorted(outliers, key=_largest_first)[:NARROW_ROWS] if narrow else outliers
    rows = tuple(
        (str(s.layer), s.projection, f"{s.amax:.4g}", f"{s.p999:.4g}", f"{s.ratio:,.1f}" if s.ratio else "-")
        for s in shown
    )
    note = (
        "Magnitudes of inputs; a name stands for all linears that share its input. "
        f"Percentiles are over 1 token in {SAMPLED}."
    )
    if any(outlier.projection.endswith("experts.down") for outlier in shown):
        note += " Inputs of the experts' down are of routed tokens alone."
    if len(shown) < len(outliers):
        note += f" The {len(shown)} largest ratios of {len(outliers):,}."
    headings = ("layer", "projection", "largest", "99.9th percentile", "largest / 99.9th")
    return Sheet("Outliers of inputs", headings, rows, 2, note)


def sheet_of_coverage(coverage: Sequence[Coverage], *, narrow: bool = False) -> Sheet:
    """The table of `coverage_sheet` made from figures."""
    shown = list(coverage)
    if narrow and len(shown) > NARROW_ROWS:
        shown = sorted(sorted(shown, key=lambda c: c.routed.least)[:NARROW_ROWS], key=lambda c: c.layer)
    several = len({c.layer for c in coverage}) < len(coverage)
    rows = tuple(
        (
            f"{c.layer} {c.module}" if several else str(c.layer),
            *(f"{c.experts:,}", _range_words(c.routed), _range_words(c.forced), f"{c.unrouted:,}"),
            *(f"{c.forced_gate_up:,}", f"{c.forced_down:,}", _times(c.times_gate_up), _times(c.times_down)),
        )
        for c in shown
    )
    note = (
        "Tokens of an expert: least / median / most. Forced: tokens that the router did not send to it. Only forced: "
        "experts without a routed token. Largest by forced: experts whose largest input came from a forced token. Over "
        "routed: the layer's largest input over the largest of routed tokens."
    )
    if len(shown) < len(coverage):
        note += f" The {len(shown)} of {len(coverage)} layers with the fewest routed tokens."
    headings = (
        *("layer", "experts", "routed", "forced", "only forced", "gate/up: largest by forced"),
        *("down: largest by forced", "gate/up: over routed", "down: over routed"),
    )
    return Sheet("What experts saw", headings, rows, 1, note)


def coverage_words(coverage: Sequence[Coverage]) -> str:
    """One line: how many experts saw how many tokens, routed and forced."""
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
        layer=layer,
        module=module,
        experts=len(experts.routed),
        tokens=_range(experts.tokens),
        routed=_range(experts.routed),
        forced=_range(experts.forced),
        unrouted=sum(not count for count in experts.routed),
        forced_gate_up=by_forced(experts.gate_up_routed, experts.gate_up_forced),
        forced_down=by_forced(experts.down_routed, experts.down_forced),
        times_gate_up=_over(experts.gate_up, max(experts.gate_up_routed)),
        times_down=_over(experts.down, max(experts.down_routed)),
    )


def _range(counts: Sequence[int]) -> Range:
    return Range(min(counts), median(counts), max(counts))


def _over(largest: float, largest_routed: float) -> float | None:
    return largest / largest_routed if largest_routed else None


def _inside(name: str, layer: int) -> str:
    """A module's name inside its layer."""
    return name.partition(f".{layer}.")[2] or name


def _largest_first(outlier: Outlier) -> float:
    return -outlier.ratio if math.isfinite(outlier.ratio) else -math.inf


def _range_words(given: Range) -> str:
    if given.least == given.most:
        return f"{given.least:,}"
    return f"{given.least:,} / {given.median:,.0f} / {given.most:,}"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.3f}"


def _markdown(statistics: Statistics, outliers: Sequence[Outlier], coverage: Sequence[Coverage]) -> str:
    sheets = [sheet_of_coverage(coverage)] if coverage else []
    parts = ["# What calibration saw", "", *(sheet.to_markdown() for sheet in sheets)]
    parts += [sheet_of_outliers(outliers).to_markdown(), "## What was measured", ""]
    weights = "its own weights" if statistics.recipe is None else f"weights quantized by {statistics.recipe}"
    parts.append(f"- model: {statistics.model}, headers {statistics.header_digest[:16]}, {weights}")
    parts += [
        f"- {one.source}: {one.num_samples:,} samples, {one.tokens:,} tokens, digest {one.digest[:16]}"
        for one in statistics.datasets
    ]
    if coverage and statistics.all_experts:
        parts.append(f"- experts: all, at most {statistics.max_forced_tokens:,} tokens forced on an expert and layer")
    elif coverage:
        parts.append("- experts: routed tokens alone")
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
    lines = tuple(line_of(label, number, found) for number, (label, found) in enumerate(points.items()))
    label = "largest input over the 99.9th percentile"
    return _plot("outliers-by-layer", label, statistics, lines)


def _coverage_plot(statistics: Statistics, coverage: Sequence[Coverage]) -> Plot:
    rows = {
        "most": [(float(c.layer), float(c.routed.most), None) for c in coverage],
        "median": [(float(c.layer), float(c.routed.median), None) for c in coverage],
        "least": [(float(c.layer), float(c.routed.least), None) for c in coverage],
    }
    lines = tuple(line_of(label, number, found) for number, (label, found) in enumerate(rows.items()) if found)
    label = "tokens routed to an expert"
    return _plot("tokens-by-layer", label, statistics, lines)


def _title(statistics: Statistics) -> str:
    samples, tokens = statistics.num_samples, statistics.tokens
    return f"{Path(statistics.model).name}: {samples:,} samples, {tokens:,} tokens"


def _plot(name: str, y_label: str, statistics: Statistics, lines: tuple[Line, ...]) -> Plot:
    return Plot(
        name=name,
        x_label=_LAYERS,
        y_label=y_label,
        title=_title(statistics),
        lines=lines,
        caption="",
        by_layer=True,
    )
