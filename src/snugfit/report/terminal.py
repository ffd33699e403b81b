"""Tables on stdout, and how every verb prints them. Imported when a verb prints: importing rich takes time."""

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
from snugfit.records.saturation import worst

if TYPE_CHECKING:
    from snugfit.records.fit import FitRecord
    from snugfit.records.quantize import TensorRecord
    from snugfit.records.saturation import InputSaturation
    from snugfit.records.trials import Trial
    from snugfit.report.tables import Sheet


def print_sheet(sheet: Sheet) -> None:
    """Print a sheet: its title, cells, and what they mean."""
    table = make_table(*sheet.headings, right=sheet.headings[sheet.left :])
    for row in sheet.rows:
        table.add_row(*(_bold(safe_cell(cell)) for cell in row))
    print_lines(sheet.title)
    print_table(table)
    typer.echo(f"{sheet.note}\n")


def _bold(cell: str) -> str:
    return f"[bold]{cell[2:-2]}[/bold]" if cell.startswith("**") and cell.endswith("**") else cell


def print_recipes(pairs: list[tuple[str, str]]) -> None:
    """Print the names and descriptions of recipes."""
    table = make_table("recipe", "what it does")
    for name, description in pairs:
        table.add_row(name, description)
    print_table(table)


def print_plan(records: tuple[TensorRecord, ...], as_json: bool) -> None:
    """Print the planned format and bytes of every tensor, and totals."""
    total = sum(record.bytes for record in records)
    if as_json:
        tensors = [{k: v for k, v in asdict(r).items() if v is not None} for r in records]
        typer.echo(json.dumps({"tensors": tensors, "bytes": total}, indent=2))
        return
    table = make_table("tensor", "format", "shape", "bytes", right=("bytes",))
    experts: dict[tuple[str, str, str], list[int]] = {}
    for record in records:
        if not record.bytes and record.source_bytes:
            continue  # an old scale of a weight that gets another format
        name = re.sub(r"\bexperts\.\d+\.", "experts.*.", record.name)
        experts.setdefault((name, record.format, "x".join(map(str, record.shape))), []).append(record.bytes)
    for (name, label, shape), sizes in experts.items():
        shapes = shape if len(sizes) == 1 else f"{len(sizes)} of {shape}"
        table.add_row(safe_cell(name), label, shapes, f"{sum(sizes):,}")
    print_table(table)
    print_totals(records)


def print_totals(records: tuple[TensorRecord, ...]) -> None:
    """Print tensors, bytes and errors by format."""
    columns = ("tensors", "bytes before", "bytes after", "bits a weight", "relative error")
    table = make_table("format", *columns, right=columns)
    for total in totals_by_format(records):
        error = "" if total.relative_error is None else f"{total.relative_error:.5f}"
        sizes = f"{total.source_bytes:,}", f"{total.bytes:,}"
        table.add_row(total.format, str(total.tensors), *sizes, f"{total.bits_per_weight:.3f}", error)
    before, after = sum(r.source_bytes for r in records), sum(r.bytes for r in records)
    table.add_row("all", str(len(records)), f"{before:,}", f"{after:,}", "", "")
    print_table(table)


def print_trials(trials: tuple[Trial, ...]) -> None:
    """Print what each way that was tried is worth on held-out samples, nothing if none was."""
    if not trials:
        return
    columns = ("KL, nats a token", "gain over the last one kept", "kept", "seconds")
    table = make_table("way", *columns, right=columns)
    for trial in trials:
        gain = "" if trial.gain is None else f"{trial.gain:+.4f} +- {trial.gain_error:.4f}"
        kl = f"{trial.kl:.4f} +- {trial.error:.4f}"
        table.add_row(trial.name, kl, gain, "yes" if trial.kept else "no", f"{trial.seconds:.0f}")
    print_table(table)


def print_saturation(sites: tuple[InputSaturation, ...]) -> None:
    """Print how many input scales are too small for held-out samples, nothing where none was compared with these."""
    if not sites:
        return
    columns = ("saturated", "tokens beyond", "worst", "held-out over calibrated")
    table = make_table("input scales, held-out samples", *columns, right=columns)
    beyond = [site for site in sites if site.saturated_tokens]
    most = worst(sites)
    tokens = f"{sum(site.saturated_tokens for site in sites):,} of {sum(site.tokens for site in sites):,}"
    table.add_row(str(len(sites)), str(len(beyond)), tokens, safe_cell(most.module), f"{most.ratio:.2f}x")
    print_table(table)


def print_fit(record: FitRecord) -> None:
    """Print what fits, the best row first; below it the cache, the assumptions, the kernels, and the next commands."""
    from snugfit.report.fit import fit_headings, fit_notes, fit_rows, fit_title

    headings = fit_headings(record)
    table = make_table(*headings, right=headings[1:])
    for cells in fit_rows(record):
        table.add_row(*map(safe_cell, cells))
    print_lines(fit_title(record))
    print_table(table)
    print_lines(*fit_notes(record))


def make_table(*headings: str, right: tuple[str, ...] = ()) -> Table:
    """An empty table; columns named in `right` are aligned to the right."""
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="right" if heading in right else "left", overflow="fold")
    return table


def safe_cell(text: str) -> str:
    """Text from a model's files as a cell of a table: control characters and rich's markup escaped."""
    return escape(plain(text))


def print_lines(*lines: str) -> None:
    """Print lines, their control characters escaped."""
    typer.echo("\n".join(map(plain, lines)))


def print_table(table: Table) -> None:
    """Print a table as wide as the terminal; through a pipe, which has no width, as wide as the columns need."""
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(table)
