"""Tables and text as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from snugfit.errors import plain


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, left: int) -> str:
    """A table of cells that are Markdown already: `left` columns are aligned left, the others, of numbers, right."""
    marks = ["---"] * left + ["---:"] * (len(headings) - left)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [headings, marks, *rows])


def markdown_report(title: str, tables: Iterable[str], lines: Iterable[str]) -> str:
    """A whole document: its title, tables that are Markdown already, and below them a list of lines of plain text."""
    return "\n".join([f"# {title}", "", *tables, *(f"- {escape(line)}" for line in lines)]).rstrip() + "\n"


def escape_bars(cell: str) -> str:
    """A cell that may be bold, with its bars escaped."""
    return cell.replace("|", "\\|")


def escape(text: str) -> str:
    """`text` as Markdown shows it unchanged, in one line; underscores within a word need no escape."""
    line = plain(re.sub(r"\s+", " ", text))
    return re.sub(r"[\\|*`<>\[\]~&]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", line)


def unescape(text: str) -> str:
    """Markdown of `escape`, with code in backticks, as plain text."""
    return re.sub(r"\\([\\|*`<>\[\]~&_])|`", lambda match: match[1] or "", text)
