"""Tables on stdout. It is imported by what prints alone: rich takes its time."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from snugfit.errors import plain
from snugfit.records.quantize import totals_by_format

if TYPE_CHECKING:
    from snugfit.records.fit import FitRecord
    from snugfit.records.quantize import TensorRecord
    from snugfit.report.tables import Sheet


def print_sheet(sheet: Sheet) -> None:
    """A table of `snugfit eval`: its title, cells, and what they mean."""
    table = _table(*sheet.headings, right=sheet.headings[sheet.left :])
    for row in sheet.rows:
        table.add_row(*(_bold(_cell(cell)) for cell in row))
    _say(sheet.title)
    _show(table)
    typer.echo(f"{sheet.note}\n")


def _bold(cell: str) -> str:
    return f"[bold]{cell[2:-2]}[/bold]" if cell.startswith("**") and cell.endswith("**") else cell


def print_recipes(pairs: list[tuple[str, str]]) -> None:
    """Recipes by name and description."""
    table = _table("recipe", "what it does")
    for name, description in pairs:
        table.add_row(name, description)
    _show(table)


def print_plan(records: tuple[TensorRecord, ...], as_json: bool) -> None:
    """What every tensor becomes, and the bytes of all."""
    total = sum(record.bytes for record in records)
    if as_json:
        tensors = [{k: v for k, v in asdict(r).items() if v is not None} for r in records]
        typer.echo(json.dumps({"tensors": tensors, "bytes": total}, indent=2))
        return
    table = _table("tensor", "format", "shape", "bytes", right=("bytes",))
    experts: dict[tuple[str, str, str], list[int]] = {}
    for record in records:
        if not record.bytes and record.source_bytes:
            continue  # the old scales of a weight that gets another format
        name = re.sub(r"\bexperts\.\d+\.", "experts.*.", record.name)
        experts.setdefault((name, record.format, "x".join(map(str, record.shape))), []).append(record.bytes)
    for (name, label, shape), sizes in experts.items():
        shapes = shape if len(sizes) == 1 else f"{len(sizes)} of {shape}"
        table.add_row(_cell(name), label, shapes, f"{sum(sizes):,}")
    _show(table)
    print_totals(records)


def print_totals(records: tuple[TensorRecord, ...]) -> None:
    """Tensors, bytes and errors by format."""
    columns = ("tensors", "bytes before", "bytes after", "bits a weight", "relative error")
    table = _table("format", *columns, right=columns)
    for total in totals_by_format(records):
        error = "" if total.relative_error is None else f"{total.relative_error:.5f}"
        sizes = f"{total.source_bytes:,}", f"{total.bytes:,}"
        table.add_row(total.format, str(total.tensors), *sizes, f"{total.bits_per_weight:.3f}", error)
    before, after = sum(r.source_bytes for r in records), sum(r.bytes for r in records)
    table.add_row("all", str(len(records)), f"{before:,}", f"{after:,}", "", "")
    _show(table)


def print_fit(record: FitRecord) -> None:
    """What fits, the answer first; under it the cache, what is assumed, the kernels, and the commands of the answer."""
    from snugfit.report.fit import fit_headings, fit_notes, fit_rows, fit_title

    headings = fit_headings(record)
    table = _table(*headings, right=headings[1:])
    for cells in fit_rows(record):
        table.add_row(*map(_cell, cells))
    _say(fit_title(record))
    _show(table)
    _say(*fit_notes(record))


def _table(*headings: str, right: tuple[str, ...] = ()) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="right" if heading in right else "left", overflow="fold")
    return table


def _cell(text: str) -> str:
    """Text of a model's files as a table may show it."""
    return escape(plain(text))


def _say(*lines: str) -> None:
    typer.echo("\n".join(map(plain, lines)))


def _show(table: object) -> None:
    # a pipe has no width: give every column what it needs
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(table)
