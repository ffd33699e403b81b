"""The page of a report: one HTML file that loads nothing from the network, made of the same tables and plots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from snugfit.report.card import facts as facts_of
from snugfit.report.card import groups_of, limits
from snugfit.report.card import summary as summary_of
from snugfit.report.collection import Collection, ServedFit
from snugfit.report.markdown import unescape
from snugfit.report.plots import COLOURS, KL, Line, Plot
from snugfit.report.serving_words import how_to_serve
from snugfit.report.table import Column, Table, finite, show
from snugfit.report.templating import read_template, render, script_json
from snugfit.report.weights import layers_of
from snugfit.version import __version__

COMMON_CARD = "RTX 4090"  # the GPU that is chosen when the page opens
_DASHES = {"--": "7 4", ":": "2 4", "-.": "7 4 2 4"}
_LOSSES = ("evaluation", "pairs", "tasks", "comparison", "answers")
_SPEED = ("prefill", "decode", "load", "ratios")
_CALIBRATION = ("calibration", "trials", "saturation", "experts", "outliers")
_LONG = 36  # characters from which a cell of text gets a wide column


def page(collection: Collection, tables: Sequence[Table], plots: Sequence[Plot]) -> str:
    """The text of index.html."""
    groups = groups_of(tables)
    one = collection.checkpoint
    models = models_of(collection)
    howto = how_to_serve(collection)
    remarks = [unescape(limit) for limit in limits(collection)] if one is not None else []
    has = {
        "losses": any(kind in groups for kind in _LOSSES),
        "speed": any(kind in groups for kind in _SPEED),
        "calibration": any(kind in groups for kind in _CALIBRATION),
    }
    fits = collection.served
    named = (
        ("fit", "Does it fit?", bool(fits) or any(kind in groups for kind in ("fit", "memory", "started"))),
        ("formats", "What is stored how", bool(collection.checkpoints)),
        ("plan", "How the formats were chosen", "plan" in groups),
        ("losses", "What was lost", has["losses"]),
        ("speed", "How fast", has["speed"]),
        ("serve", "How to serve it", bool(howto)),
        ("calibration", "Calibration", has["calibration"]),
        ("limits", "Limits", bool(remarks)),
    )
    cards = list(dict.fromkeys(fit.card for fit in fits))
    document = {
        "plots": {plot.name: _plot(plot) for plot in plots},
        "maps": [_map(one.record) for one in collection.checkpoints],
        "fits": _fits(fits, cards, collection.max_positions),
    }
    return render(
        "page.html.j2",
        title=collection.title,
        description=unescape(summary_of(collection, links=False)) if one is not None else "Results of measurements",
        facts=[(name, unescape(value)) for name, value in facts_of(collection)] if one is not None else [],
        sections=[(name, title) for name, title, there in named if there],
        models=models,
        fits=fits,
        cards=cards,
        chosen_card=COMMON_CARD if COMMON_CARD in cards else None,
        gpu_counts=sorted({fit.tensor_parallel_size for fit in fits}),
        sequences=sorted({fit.max_num_seqs for fit in fits}),
        engines=list({fit.engine: _engine(fit.engine_title) for fit in reversed(fits)}.items())[::-1],
        max_positions=collection.max_positions,
        checkpoints=collection.checkpoints,
        tables={table.name: _table(table, models) for table in tables},
        groups=groups,
        plots=plots,
        has_losses=has["losses"],
        has_speed=has["speed"],
        has_calibration=has["calibration"],
        howto=howto,
        limits=remarks,
        version=__version__,
        source_count=len(collection.sources),
        number_of=_number_of,
        data=script_json(document),
        css=read_template("page.css"),
        js=read_template("page.js"),
    )


def _number_of(name: str) -> int:
    """The place of the checkpoint that a table or a plot is of: formats is 0, formats-2 is 1."""
    ending = name.rpartition("-")[2]
    return int(ending) - 1 if ending.isdecimal() else 0


def _engine(title: str) -> str:
    """The engine without the option that one sequence alone has."""
    return title.partition(" --")[0]


def models_of(collection: Collection) -> list[str]:
    """Every model that figures are of: the original first, then candidates in order of appearance."""
    names: dict[str, None] = {}
    for record in collection.evals:
        for context in record.contexts:
            names |= dict.fromkeys(model.name for model in context.models)
    names |= dict.fromkeys(one.name for one in collection.checkpoints)
    for bench in collection.benches:
        names |= dict.fromkeys(run.server.name for run in bench.runs)
    return list(names)


def _plot(plot: Plot) -> dict[str, Any]:
    """A plot for the page's script: lines with points [x, y, error or null], numbers finite."""
    lines = [line for line in (*plot.lines, *plot.floors) if line.points]
    return {
        "x_label": plot.x_label,
        "x": "layers" if plot.by_layer else "linear" if plot.linear else "log2",
        "linear": plot.linear,
        "by_layer": plot.by_layer,
        "from_zero": plot.y_label == KL or plot.linear,
        "lines": [_line(line, number) for number, line in enumerate(lines)],
    }


def _line(line: Line, number: int) -> dict[str, Any]:
    colour, style = line.style.get("color"), line.style.get("linestyle", "-")
    place = COLOURS.index(colour) if colour in COLOURS else 6  # the reference is black: the quiet colour here
    points = [
        [x, y, None if error is None or not math.isfinite(error) else error]
        for x, y, error in line.points
        if math.isfinite(x) and math.isfinite(y)
    ]
    return {
        "label": line.label.strip(),
        "colour": place,
        "dash": _DASHES.get(str(style), ""),
        "joined": style != "none",
        "marked": line.style.get("marker") != "",
        "points": points,
        "number": number,
    }


def _map(record: Any) -> list[list[Any]]:
    """[layer, projection, format, bits, relative error, largest input] of every linear."""
    return [
        [
            weight.layer,
            weight.projection,
            weight.format,
            finite(weight.bits),
            finite(weight.relative_error),
            finite(weight.input_amax),
        ]
        for weight in layers_of(record)
    ]


def _fits(fits: Sequence[ServedFit], cards: Sequence[str], max_positions: int | None) -> dict[str, Any]:
    """Tokens with either KV cache by "card|engine|GPUs|sequences"; where it is not served, the number of the reason."""
    problems = list(dict.fromkeys(fit.problem.rstrip(".") for fit in fits if fit.problem))
    rows: dict[str, list[int]] = {}
    for fit in fits:
        key = f"{fit.card}|{fit.engine}|{fit.tensor_parallel_size}|{fit.max_num_seqs}"
        rows[key] = [problems.index(fit.problem.rstrip("."))] if fit.problem else [fit.auto, fit.fp8]
    return {"rows": rows, "problems": problems, "cards": cards, "max_positions": max_positions}


def _table(table: Table, models: Sequence[str]) -> dict[str, Any]:
    """A table for the template: cells with the value by which they are sorted."""
    return {
        "title": table.title,
        "note": unescape(table.note),
        "columns": table.columns,
        "rows": [
            {"model": _model_of(row, models), "cells": [_cell(column, row) for column in table.columns]}
            for row in table.rows
        ],
    }


def _model_of(row: Mapping[str, Any], models: Sequence[str]) -> str | None:
    """The model that a row is of, None for a row of several or none."""
    for key in ("model", "server", "name"):
        name = str(row.get(key) or "").removesuffix(" (original)")
        if name in models:
            return name
    return None


def _cell(column: Column, row: Mapping[str, Any]) -> dict[str, Any]:
    value = row.get(column.key)
    text = show(column, row)
    sortable = finite(value)
    if isinstance(sortable, str):
        sortable = sortable.split(" ")[0].replace(",", "") if sortable[:1].isdigit() else sortable
    kind = "text" if column.is_text else "number"
    if column.is_text and len(text) >= _LONG:
        kind += " long" if column.form == "text" else " digest"
    return {"text": text, "value": "" if sortable is None else sortable, "kind": kind, "code": column.form == "code"}
