"""Tables on stdout. It is imported by what prints alone: rich takes its time."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from snugfit.records import totals_by_format

if TYPE_CHECKING:
    from snugfit.records import TensorRecord
    from snugfit.report.tables import Sheet


def print_sheet(sheet: Sheet) -> None:
    """A table of `snugfit eval`: its title, cells, and what they mean."""
    table = _table(*sheet.headings, right=sheet.headings[sheet.left :])
    for row in sheet.rows:
        table.add_row(*(_bold(escape(cell)) for cell in row))
    typer.echo(sheet.title)
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
    for record in records:
        table.add_row(escape(record.name), record.format, "x".join(map(str, record.shape)), f"{record.bytes:,}")
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


def _table(*headings: str, right: tuple[str, ...] = ()) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="right" if heading in right else "left", overflow="fold")
    return table


def _show(table: object) -> None:
    # a pipe has no width: give every column what it needs
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(table)
