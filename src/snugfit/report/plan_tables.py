"""Tables and plots of plans in a report: what was chosen beside what, and why each group has its format."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from snugfit.records.plan import PlanPoint, PlanRecord, ProvenKl
from snugfit.report.plots import KL, Plot, Point, line_of
from snugfit.report.table import Cell, Column, Table, numbered, size_unit


def plan_tables(records: Sequence[PlanRecord]) -> Iterator[Table]:
    """For each plan a table of the points that were compared, and one of its groups."""
    for number, record in enumerate(records):
        yield Table(
            name=numbered("plan", number),
            title=f"Plan for {record.model}: what was compared",
            columns=(
                Column(key="name", heading="mix"),
                Column(key="kind", heading="kind"),
                Column(key="bytes", heading="weights", form="bytes"),
                Column(key="bits_per_weight", heading="bits a weight", form=2),
                Column(key="max_context", heading="longest context", form="count"),
                Column(key="fits", heading="keeps the limits"),
                Column(key="expected", heading="KL, expected", form=4, error="expected_error"),
                Column(key="measured", heading="KL, measured", form=4, error="measured_error"),
                Column(key="tokens", heading="on tokens", form="count"),
                Column(key="written", heading="written"),
            ),
            rows=tuple(_point(point, record) for point in record.points if point.kind != "frontier"),
            note=f"{record.verdict.statement} Nats a token on held-out text; ± is one standard error.".strip(),
        )
        yield Table(
            name=numbered("plan-groups", number),
            title=f"Plan for {record.model}: its groups",
            columns=(
                Column(key="name", heading="group", form="code"),
                Column(key="role", heading="role"),
                Column(key="layer", heading="layer", form="count"),
                Column(key="label", heading="format", form="code"),
                Column(key="arithmetic", heading="computes in"),
                Column(key="bytes", heading="size", form="bytes"),
                Column(key="cost", heading="costs, KL", form=6),
                Column(key="why", heading="why"),
            ),
            rows=tuple(
                {key: getattr(group, key) for key in ("name", "role", "layer", "label", "bytes", "cost")}
                | {"arithmetic": group.arithmetic or None, "why": group.why or None}
                for group in record.groups
            ),
            note="Costs: by how much the expected KL falls if this group alone is kept as it is.",
        )


def _point(point: PlanPoint, record: PlanRecord) -> Mapping[str, Cell]:
    whole = _whole(point)
    return {
        "name": point.name,
        "kind": point.kind,
        "bytes": point.bytes,
        "bits_per_weight": point.bits_per_weight,
        "max_context": point.max_context,
        "fits": point.fits,
        "expected": _known(point.expected.kl),
        "expected_error": _known(point.expected.error),
        "measured": whole.kl if whole else None,
        "measured_error": whole.error if whole else None,
        "tokens": whole.tokens if whole else None,
        "written": True if point.name == record.written else None,
    }


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _whole(point: PlanPoint) -> ProvenKl | None:
    """What was measured over all contexts and texts together, else the first measurement."""
    found = [one for one in point.measured if one.context is None and not one.text]
    return next(iter(found or point.measured), None)


def plan_plots(records: Sequence[PlanRecord]) -> list[Plot]:
    """KL against bytes: what was measured, a point for each mix; and the frontier that scores expect."""
    plots = []
    for number, record in enumerate(records):
        largest = max((point.bytes for point in record.points), default=0)
        unit, factor = size_unit(largest)
        measured = [(point, whole) for point in record.points if (whole := _whole(point)) and math.isfinite(whole.kl)]
        lines = [
            line_of(point.name, place, [(point.bytes / factor, whole.kl, _known(whole.error))], linestyle="none")
            for place, (point, whole) in enumerate(measured)
        ]
        frontier: list[Point] = sorted(
            (point.bytes / factor, point.expected.kl, None)
            for point in record.points
            if point.kind in ("frontier", "plan") and math.isfinite(point.expected.kl)
        )
        if len(frontier) > 1:
            lines.append(line_of("expected of the best mix", 6, frontier, marker=""))
        if lines:
            plots.append(
                Plot(
                    name=numbered("plan-kl-against-bytes", number),
                    x_label=f"size of the weights, {unit}",
                    y_label=KL,
                    title=f"Plan for {record.model}",
                    lines=tuple(lines),
                    caption="points: measured on held-out text, with one standard error",
                    linear=True,
                )
            )
    return plots
