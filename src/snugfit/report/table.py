"""Tables with their numbers in full: one table is Markdown and HTML for people, CSV and JSON for programs."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from snugfit.byte_counts import size
from snugfit.engines.memory import GIB
from snugfit.report.markdown import escape

Cell = str | int | float | bool | None
# how a number is shown: as text, a count, bytes in MB or GB (10^9), GiB (2^30), a share of 1 in percent, or with digits
Form = Literal["text", "code", "count", "bytes", "gib", "percent"] | int


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column: its key in rows, its heading, how its cells are shown; `error` is the key of their standard error.

    `signed` shows the sign of positive numbers too.
    """

    key: str
    heading: str
    form: Form = "text"
    error: str | None = None
    signed: bool = False

    @property
    def is_text(self) -> bool:
        """Whether cells are words, aligned left."""
        return self.form in ("text", "code")


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table: `name` is its files' name, `rows` map keys of columns to values; missing keys are empty cells."""

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Mapping[str, Cell], ...]
    note: str = ""

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of all columns, each with its error behind it: the columns of the CSV file."""
        found: dict[str, None] = {}
        for column in self.columns:
            found[column.key] = None
            if column.error is not None:
                found[column.error] = None
        return tuple(found)

    def shown(self) -> Table:
        """The table without columns in which every cell is empty."""
        columns = tuple(c for c in self.columns if any(row.get(c.key) is not None for row in self.rows))
        return replace(self, columns=columns)

    def cells(self) -> list[list[str]]:
        """Every cell as plain text."""
        return [[show(column, row) for column in self.columns] for row in self.rows]

    def to_markdown(self) -> str:
        """The table alone, without its title."""
        headings = [escape(column.heading) for column in self.columns]
        marks = ["---" if column.is_text else "---:" for column in self.columns]
        rows = [
            [markdown_cell(column, cell) for column, cell in zip(self.columns, cells, strict=True)]
            for cells in self.cells()
        ]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, marks, *rows))

    def to_csv(self) -> str:
        """A heading and one line a row, numbers in full; those that are not finite are empty."""
        out = io.StringIO()
        writer = csv.DictWriter(out, self.keys, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: finite(value) for key, value in row.items()} for row in self.rows)
        return out.getvalue()

    def to_document(self) -> dict[str, Any]:
        """The table for JSON; numbers that are not finite become null."""
        rows = [{key: finite(row.get(key)) for key in self.keys} for row in self.rows]
        return {"name": self.name, "title": self.title, "note": self.note, "rows": rows}


def finite(value: Cell) -> Cell:
    """The value, None for NaN and infinities."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def markdown_cell(column: Column, cell: str) -> str:
    """A cell of plain text as Markdown; code in backticks, which needs no escapes but of bars."""
    if column.form == "code" and cell and "`" not in cell:
        return "`" + " ".join(cell.split()).replace("|", "\\|") + "`"
    return escape(cell)


def show(column: Column, row: Mapping[str, Cell]) -> str:
    """A row's cell of a column as plain text, with its error where there is one; "" for none, "-" for NaN."""
    value = row.get(column.key)
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if not math.isfinite(value):
        return "-"
    error = None if column.error is None else row.get(column.error)
    shown = number(value, column.form, signed=column.signed)
    if not isinstance(error, int | float) or not math.isfinite(error):
        return shown
    return f"{shown} ± {number(error, column.form)}"


def number(value: float, form: Form, *, signed: bool = False) -> str:
    """A finite number in one of the forms."""
    sign = "+" if signed else ""
    if isinstance(form, int):
        return f"{value:{sign},.{form}f}"
    if form == "percent":
        return f"{100 * value:{sign}.2f} %"
    if form == "bytes":
        return size(value)
    if form == "gib":
        return f"{value / GIB:{sign},.2f} GiB"
    if form == "count":
        return f"{value:{sign},.0f}"
    return f"{value:{sign}g}"


def size_unit(largest: float) -> tuple[str, float]:
    """The unit of an axis of bytes up to `largest`, and its bytes."""
    return ("GB", 1e9) if largest >= 1e9 else ("MB", 1e6)


def numbered(name: str, place: int) -> str:
    """The name of the table or plot of the record at `place` among those of its kind: NAME, NAME-2, NAME-3, ..."""
    return f"{name}-{place + 1}" if place else name


def without_empty(tables: Sequence[Table]) -> list[Table]:
    """The tables that have rows, each without its empty columns."""
    return [table.shown() for table in tables if table.rows]
