"""A plan for people: tables for a terminal and as Markdown, the curve of KL against bytes, layers x projections.

Made from the record alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snugfit.byte_counts import size
from snugfit.engines.launch import LAUNCHES
from snugfit.errors import plain
from snugfit.model.names import role_order
from snugfit.records.plan import (
    RECIPE_FILE,
    PlanDifferences,
    PlannedGroup,
    PlanPoint,
    PlanRecord,
    ProvenKl,
    layer_runs,
)
from snugfit.records.statistics_file import STATISTICS_FILE
from snugfit.report.markdown import escape
from snugfit.report.plots import COLOURS, KL, draw_figure
from snugfit.report.tables import Sheet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

KEEP = "keep"
# a format's colour is the same in every plot
FORMAT_COLOURS = {
    "nvfp4": COLOURS[0],
    "nvfp4a16": COLOURS[5],
    "mxfp4": COLOURS[3],
    "int4": COLOURS[1],
    "fp8-dynamic": COLOURS[4],
    "fp8-block": COLOURS[7],
    KEEP: COLOURS[2],
}
# kind of a point -> its marker, colour and size
_MARKS = {
    "built-in": ("o", COLOURS[0], 6),
    "uniform": ("s", COLOURS[2], 5),
    "byte-matched": ("D", COLOURS[3], 6),
    "alternative": (".", COLOURS[4], 9),
    "plan": ("*", COLOURS[1], 15),
}
_ROLES = ("qkv", "q", "k", "v", "qkv_a", "attention", "o", "gate_up", "gate", "up", "mlp", "down", "experts")


def plan_lines(record: PlanRecord) -> list[str]:
    """What a terminal shows above the tables: the budget, what was found, and how much of the budget that takes."""
    lines = [f"{record.model}: {budget_words(record)}", _fits(record), *_room(record)]
    return [plain(line) for line in lines]


def closing_lines(record: PlanRecord) -> list[str]:
    """The verdict and remarks, below the tables."""
    lines = [record.verdict.statement]
    lines += [f"16-bit KV cache: {record.kv_caches[KEEP]}; FP8 KV cache: {record.kv_caches['fp8']}"]
    lines += [f"note: {note}" for note in record.notes]
    return [plain(line) for line in lines]


def next_commands(record: PlanRecord, model: str, folder: Path) -> list[str]:
    """How to carry out a plan in `folder`: write the model, and serve it where the engine is vLLM."""
    commands = [f"snugfit quantize {model} --recipe {folder / RECIPE_FILE} --output-dir OUT"]
    budget = record.budget
    if budget.gpu is not None and budget.engine.startswith("vllm"):
        options = [f"vllm serve OUT --max-model-len {record.context}"]
        written = _written(record)
        options += ["--kv-cache-dtype fp8"] if written.kv_cache == "fp8" else []
        if written.cache_kept_in:
            layers = " ".join(map(str, written.cache_kept_in))
            options += [f"{LAUNCHES[budget.engine].skip_layers} {layers}"]
        tp, share = budget.tensor_parallel_size, budget.gpu_memory_utilization
        options += [f"--tensor-parallel-size {tp}"] if tp > 1 else []
        options += [] if share is None else [f"--gpu-memory-utilization {share:g}"]
        commands.append(" ".join(options))
    lines = [f"next: {'; '.join(commands)}"]
    if record.effort != "plain" and record.verdict.accepted is not None and (folder / STATISTICS_FILE).is_file():
        measured = "writes the very weights that were measured here, and runs no sample"
        lines.append(f"`quantize` tries to lose less than was measured; with `--statistics {folder}` it {measured}")
    return lines


def _written(record: PlanRecord) -> PlanPoint:
    return next(point for point in record.points if point.name == record.written)


def budget_words(record: PlanRecord) -> str:
    """The budget as a person asked for it."""
    budget, parts = record.budget, []
    if budget.gpu_title is not None:
        count = budget.tensor_parallel_size
        gpus = budget.gpu_title if count == 1 else f"{count} x {budget.gpu_title}"
        wanted = "the longest context" if budget.context is None else f"{budget.context:,} tokens"
        wanted += f" in each of {budget.max_num_seqs} sequences" if budget.max_num_seqs > 1 else ""
        parts.append(f"{wanted} on {gpus} under {budget.engine_title}")
    parts += [] if budget.bytes is None else [f"{budget.bytes:,} bytes"]
    parts += [] if budget.bits_per_weight is None else [f"{budget.bits_per_weight:g} bits a weight"]
    parts += [] if budget.disk is None else [f"{budget.disk:,} bytes of disk"]
    parts += [] if budget.max_kl is None else [f"a KL of at most {budget.max_kl:g}"]
    return ", ".join(parts)


def _fits(record: PlanRecord) -> str:
    point = record.plan
    parts = [f"{point.bytes / 10**9:.3f} GB, {point.bits_per_weight:.2f} bits a weight"]
    parts.append(f"KV cache in {_cache(point)}")
    if point.max_context is not None:
        parts.append(f"up to {point.max_context:,} tokens fit")
    return ", ".join(parts)


def _room(record: PlanRecord) -> list[str]:
    """How much of each limit the plan takes, as one line; none without limits."""
    parts = []
    for limit in record.limits:
        if limit.name == "max_kl":  # made of the plan's own size
            continue
        share = f"{size(limit.used)} of {size(limit.bytes)} ({limit.used / max(1, limit.bytes):.1%})"
        beside = f" that each GPU has for weights beside {record.context:,} tokens"
        what = {"gpu": beside, "disk": " for weight files"}.get(limit.name, "")
        parts.append(f"`{limit.name}`: {share}{what}")
    return [f"used of {'; '.join(parts)}"] if parts else []


def _cache(point: PlanPoint) -> str:
    """In what a point keeps keys and values."""
    if point.kv_cache != "fp8":
        return "16 bits"
    return f"FP8, layers {layer_runs(point.cache_kept_in)} in 16 bits" if point.cache_kept_in else "FP8"


def group_sheet(record: PlanRecord) -> Sheet:
    """One row for each role and format: the layers, bytes and what it costs."""
    found: dict[tuple[str, str], list[PlannedGroup]] = {}
    for group in record.groups:
        found.setdefault((group.role, group.label), []).append(group)
    order = sorted(found, key=lambda key: (_role_place(key[0]), min(g.layer or 0 for g in found[key]), key[1]))
    rows = []
    for role, label in order:
        groups = found[role, label]
        arithmetic = groups[0].arithmetic
        layers = layer_runs([group.layer for group in groups if group.layer is not None])
        cost = math.fsum(group.cost for group in groups)
        held = sum(group.bytes for group in groups)
        rows.append((role, layers or "-", label, arithmetic or "-", f"{held / 10**6:,.2f}", _kl(cost)))
    outside = f"{record.outside_bytes / 10**6:,.2f}"
    rows.append(("embeddings, norms and other", "-", "as they are", "-", outside, "-"))
    return Sheet(
        title="Formats",
        headings=("weights", "layers", "format", "kernel", "MB", "KL cost"),
        rows=tuple(rows),
        left=4,
        note="KL cost: by how much the expected KL falls if these weights alone are kept, in nats a token",
    )


def point_sheet(record: PlanRecord, *, narrow: bool = False) -> Sheet:
    """The plan beside its alternatives, controls and built-in recipes; `narrow`: only what fits or was measured."""
    shown = [p for p in record.points if p.kind != "frontier"]
    if narrow:
        shown = [p for p in shown if p.measured or (p.fits and p.kind in ("plan", "alternative"))]
        rest = [
            p for p in record.points if p.kind in ("built-in", "uniform", "byte-matched") and p.fits and p not in shown
        ]
        shown += sorted(rest, key=lambda p: (math.isnan(p.expected.kl), p.expected.kl))[:3]
    contexts = list(dict.fromkeys((m.context, m.text) for p in shown for m in p.measured if not m.text))
    contexts = contexts if len(contexts) > 2 else contexts[1:]  # all is the same as the only one
    rows = []
    for point in sorted(shown, key=lambda p: (p.kind != "plan", not p.fits, math.isnan(p.expected.kl), p.expected.kl)):
        measured = [_proven(point.measured, context, text) for context, text in contexts]
        name = f"**{point.name}**" if point.name == record.written else point.name
        cache = _cache(point)
        expected = _kl(point.expected.kl, point.expected.error)
        fits = "yes" if point.fits else "no"
        rules = str(point.rules) if point.rules else "-"
        rows.append((name, point.kind, cache, rules, f"{point.bytes / 10**6:,.1f}", fits, expected, *measured))
    headings = [f"measured, {_context(context)}" for context, _ in contexts]
    return Sheet(
        title="KL to the original",
        headings=("mix", "kind", "KV cache", "rules", "MB", "fits", f"expected, {record.context:,} tokens", *headings),
        rows=tuple(rows),
        left=3,
        note=f"KL in nats a token, with one standard error; the recipe that was written is {record.written}, in bold",
    )


def text_sheet(record: PlanRecord) -> Sheet | None:
    """Measured KL by text and context; None where nothing was measured by text."""
    measured = [point for point in record.points if any(m.text for m in point.measured)]
    keys = list(dict.fromkeys((m.text, m.context) for point in measured for m in point.measured if m.text))
    if not keys:
        return None
    rows = tuple(
        (escape(text), _context(context), *(_proven(point.measured, context, text) for point in measured))
        for text, context in keys
    )
    return Sheet(
        title="Measured by text",
        headings=("text", "context", *(point.name for point in measured)),
        rows=rows,
        left=1,
        note="KL in nats a token, with one standard error",
    )


def every_group_sheet(record: PlanRecord) -> Sheet:
    """One row for each group, with the reason for its format."""
    rows = tuple((escape(g.name), g.label, f"{g.bytes:,}", _kl(g.cost), escape(g.why)) for g in record.groups)
    return Sheet(title="Every group", headings=("group", "format", "bytes", "KL cost", "why"), rows=rows, left=2)


def plan_markdown(record: PlanRecord, images: Iterable[str]) -> str:
    """The whole plan as Markdown."""
    sheets = [group_sheet(record), point_sheet(record), text_sheet(record), every_group_sheet(record)]
    pictures = [f"![{name.removesuffix('.png')}]({name})" for name in images if name.endswith(".png")]
    parts = [
        f"# A plan for {escape(record.model)}",
        *(escape(line) for line in plan_lines(record)),
        *(escape(line) for line in closing_lines(record)),
        *pictures,
        *(sheet.to_markdown() for sheet in sheets if sheet is not None),
        f"## The recipe\n\n```yaml\n{record.recipe}```",
    ]
    return "\n\n".join(parts) + "\n"


def differences_sheet(found: PlanDifferences) -> Sheet:
    """Where two plans differ."""
    rows = [(row.place, row.layers or "-", row.a, row.b, str(row.weights)) for row in found.rows]
    if found.kv_cache[0] != found.kv_cache[1]:
        rows.append(("KV cache", "-", found.kv_cache[0], found.kv_cache[1], "-"))
    alone = [
        f"only in {name}: {', '.join(places)}"
        for name, places in ((found.a, found.only_a), (found.b, found.only_b))
        if places
    ]
    note = f"{found.different:,} of {found.weights:,} linears differ"
    return Sheet(
        title=f"{found.a} and {found.b}",
        headings=("weights", "layers", found.a, found.b, "linears"),
        rows=tuple(rows),
        left=4,
        note="; ".join([note, *alone]),
    )


def write_plan_plots(record: PlanRecord, directory: Path) -> list[str]:
    """Write the curve of KL against bytes and the picture of layers x projections; returns the files' names."""
    names = draw_figure("kl-by-bytes", directory, lambda figure: _draw_curve(figure, record))
    return names + draw_figure("layers", directory, lambda figure: _draw_layers(figure, record), height=_height(record))


def _draw_curve(figure: Figure, record: PlanRecord) -> None:
    axes = figure.subplots()
    frontier = sorted((p.bytes, p.expected.kl) for p in record.points if p.kind == "frontier")
    if frontier:
        axes.plot(*zip(*frontier, strict=True), color="0.6", linewidth=1.4, label="best mix at that size, expected")
    for kind, (marker, colour, width) in _MARKS.items():
        points = [p for p in record.points if p.kind == kind and (p.measured or kind != "byte-matched")]
        if any(p.measured or p.expected.kl > 0 for p in points):
            axes.plot([], [], marker, color=colour, markersize=width, label=kind)
        _scatter(axes, points, marker, colour, width)
    limits = [limit for limit in record.limits if limit.name in ("bytes", "bits_per_weight", "disk", "gpu")]
    for limit in limits:
        axes.axvline(record.plan.bytes + limit.bytes - limit.used, color="0.8", linewidth=1, linestyle=":")
    axes.set_yscale("log")
    axes.set_xlabel("bytes of all weights")
    axes.set_ylabel(KL)
    axes.grid(visible=True, color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_formatter(
        lambda value, _: f"{value / 10**9:g} GB" if value >= 10**9 else f"{value / 10**6:g} MB"
    )
    title = f"{record.model}: hollow marks expected at {record.context:,} tokens, filled ones measured"
    title += "; dotted: the budget" if limits else ""
    axes.set_title(title, fontsize=9, loc="left", color="0.3")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    set_apart(figure, axes.texts)


def set_apart(figure: Figure, names: Sequence[Text]) -> None:
    """Move names of points below those that they would cover."""
    from matplotlib.text import Annotation

    figure.draw_without_rendering()
    notes = [name for name in names if isinstance(name, Annotation)]
    placed: list[Bbox] = []
    for note in sorted(notes, key=lambda note: -note.get_window_extent().y0):
        while any(note.get_window_extent().overlaps(other) for other in placed):
            x, y = note.xyann
            note.xyann = x, y - 1
        placed.append(note.get_window_extent())


def _scatter(axes: Axes, points: Sequence[PlanPoint], marker: str, colour: str, width: float) -> None:
    """Expected values hollow, measured ones filled with their error, both under the point's name."""
    for point in points:
        expected, measured = point.expected.kl, _longest(point.measured)
        style: dict[str, Any] = {"marker": marker, "color": colour, "markersize": width, "linestyle": "none"}
        shown = expected if expected > 0 else None
        if shown is not None:
            axes.plot([point.bytes], [shown], markerfacecolor="white", zorder=3, **style)
        if measured is not None and measured.kl > 0:
            axes.errorbar([point.bytes], [measured.kl], yerr=[measured.error], zorder=4, **style)
            shown = measured.kl
        if shown is not None and point.kind not in ("alternative", "uniform"):
            note = axes.annotate(point.name, (point.bytes, shown), (5, 3), textcoords="offset points", fontsize=6)
            note.set_parse_math(False)


def _draw_layers(figure: Figure, record: PlanRecord) -> None:
    from matplotlib.patches import Patch, Rectangle

    axes = figure.subplots()
    roles = _roles(record.groups)
    largest = max((group.cost for group in record.groups if math.isfinite(group.cost)), default=0.0) or 1.0
    formats = dict.fromkeys(sorted((group.format for group in record.groups), key=list(FORMAT_COLOURS).index))
    last = 1 + max((group.layer for group in record.groups if group.layer is not None), default=0)
    for group in record.groups:
        x = last + 0.5 if group.layer is None else group.layer
        row = roles.index(_row_of(group))
        axes.add_patch(Rectangle((x - 0.5, row - 0.45), 1, 0.9, facecolor=FORMAT_COLOURS[group.format], linewidth=0))
        if group.cost > 0:  # a dot whose area is the cost
            axes.plot([x], [row], "o", color="white", markersize=9 * math.sqrt(group.cost / largest), markeredgewidth=0)
    axes.set_xlim(-0.5, last + (1 if any(g.layer is None for g in record.groups) else -0.5))
    axes.set_ylim(len(roles) - 0.5, -0.5)
    axes.set_yticks(range(len(roles)), roles)
    axes.set_xlabel("decoder layer")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(
        f"{record.model}: area of a dot is what a group costs, {largest:.2g} nats the largest",
        fontsize=9,
        loc="left",
        color="0.3",
    )
    handles = [Patch(color=FORMAT_COLOURS[name], label=name) for name in formats]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)


def _height(record: PlanRecord) -> float:
    return 1.4 + 0.45 * len(_roles(record.groups))


def _roles(groups: Sequence[PlannedGroup]) -> list[str]:
    """The rows of the picture, in the order of a layer."""
    return sorted(dict.fromkeys(map(_row_of, groups)), key=lambda row: (_role_place(row), row))


def _row_of(group: PlannedGroup) -> str:
    """The role, or the last part of the name where a role has several groups in a layer."""
    return group.role if group.role in _ROLES or group.layer is None else group.name.rpartition(".")[2]


def _role_place(role: str) -> int:
    if role in _ROLES:
        return _ROLES.index(role)
    return len(_ROLES) + (100 if role == "lm_head" else role_order(role))


def _longest(measured: Sequence[ProvenKl]) -> ProvenKl | None:
    return max((one for one in measured if not one.text), key=lambda one: one.context or 0, default=None)


def _context(context: int | None) -> str:
    return "all" if context is None else f"{context:,} tokens" if context else "rows"


def _proven(measured: Sequence[ProvenKl], context: int | None, text: str) -> str:
    found = next((one for one in measured if (one.context, one.text) == (context, text)), None)
    return "-" if found is None else _kl(found.kl, found.error)


def _kl(value: float, error: float | None = None) -> str:
    """A KL with as many digits as its error has, or three."""
    if not math.isfinite(value):
        return "-"
    if error is None or not math.isfinite(error) or error <= 0:
        return f"{value:.3g}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{digits}f} +- {error:.{digits}f}"
