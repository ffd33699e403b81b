"""The rows of a set's source, in the order in which they are drawn: files, what comes with Python, the Hub.

Nothing is read before it is asked for, and rows are read one after another: a source may be larger than memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from snugfit.data import builtin
from snugfit.data.files import ROW_ENDINGS, ending_of, holds_rows, open_file, open_text, row_lines
from snugfit.data.formatters import AUTO
from snugfit.data.reader import shuffled
from snugfit.data.sets import LoadedSet, Source
from snugfit.errors import UserError

BUILTIN = "builtin:"
TEXT_ENDINGS = (".txt", ".md")
_READ_AT_ONCE = 512  # rows of a random order that are in memory
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

RawRow = tuple[str, str | dict[str, Any]]  # its place for errors; a line of JSON, or the row itself


@dataclass(frozen=True)
class SourceRows:
    """Rows in the order they are drawn, or whole texts (`texts`, files) that are cut into samples.

    `revision` is the commit of a set on the Hub.
    """

    rows: Iterator[RawRow] | None = None
    texts: tuple[Path, ...] = ()
    revision: str | None = None


def open_source(loaded: LoadedSet, number: int, *, draw: str, seed: int) -> SourceRows:
    """The rows of source `number` of a set.

    UserError for a source that does not exist or cannot be reached; a row that is damaged is an error when it is read.
    """
    source = loaded.set.datasets[number]
    place = loaded.place_of(number, "dataset")
    if source.dataset.startswith(BUILTIN):
        name = source.dataset.removeprefix(BUILTIN)
        if name not in builtin.SOURCES:
            near = get_close_matches(name, builtin.SOURCES, n=1)
            remedy = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(builtin.SOURCES)}."
            raise UserError(f"no built-in source {name!r}.", code="dataset-not-found", where=place, remedy=remedy)
        _refuse_keys_of_the_hub(source, loaded, number)
        return SourceRows(_listed(builtin.SOURCES[name](), name, draw, seed))
    path = local_path(source.dataset, loaded.folder)
    if path is None:
        return _on_hub(source, place, draw, seed)
    if not path.exists():
        near = get_close_matches(path.name, [file.name for file in path.parent.glob("*")], n=1)
        remedy = f"Did you mean {near[0]}?" if near else "Paths begin at the folder of the set."
        raise UserError(f"no such file: {path}.", code="file-missing", where=place, remedy=remedy)
    _refuse_keys_of_the_hub(source, loaded, number)
    files = _files(path, source.split, place)
    texts = tuple(file for file in files if not _has_rows(file))
    if texts and len(texts) < len(files):
        what = "a folder of texts and of rows."
        raise UserError(what, code="dataset-unreadable", where=place, remedy="Name them as two sources.")
    if texts and source.formatter == AUTO:
        return SourceRows(
            texts=tuple(texts[n] for n in shuffled(range(len(texts)), seed)) if draw == "random" else texts
        )

    def numbered() -> Iterator[RawRow]:
        for file in files:
            yield from _rows_of(file)

    return SourceRows(_in_random_order(numbered, seed) if draw == "random" else numbered())


def local_path(name: str, folder: Path | None) -> Path | None:
    """The file or folder that a source names; None for an id on the Hub.

    A file beside the set comes before a set of the same name on the Hub.
    """
    path = Path(name).expanduser()
    found = path if path.is_absolute() or folder is None else folder / path
    looks_local = name.startswith((".", "/", "~")) or ending_of(path) in (*ROW_ENDINGS, *TEXT_ENDINGS, ".json")
    if looks_local or path.is_absolute() or (folder is not None and found.exists()) or not _HUB_ID.fullmatch(name):
        return found
    return None


def _on_hub(source: Source, place: str, draw: str, seed: int) -> SourceRows:
    from snugfit.data.hub_rows import HubSource, open_hub_rows

    wanted = HubSource(
        name=source.dataset,
        subset=source.subset,
        split=source.split,
        revision=source.revision,
        streaming=source.streaming,
        seed=seed if draw == "random" else None,
    )
    try:
        rows, revision = open_hub_rows(wanted, where=place)
    except UserError as error:
        if "/" in source.dataset:
            raise
        what = f"{error.what} There is no such file beside the set either."
        raise UserError(what, code=error.code, where=error.where, remedy=error.remedy) from None
    return SourceRows(rows, revision=revision)


def _refuse_keys_of_the_hub(source: Source, loaded: LoadedSet, number: int) -> None:
    for key in ("revision", "subset"):
        if getattr(source, key) is not None:
            what = f"has no effect on {source.dataset}, which is not on the Hub."
            where = loaded.place_of(number, key)
            raise UserError(what, code="dataset-set-invalid", where=where, remedy=f"Remove `{key}`.")


def _files(path: Path, split: str, place: str) -> list[Path]:
    """The files of a source; of a folder those of the split, if any name begins with it, else all."""
    if not path.is_dir():
        return [path]
    endings = (*TEXT_ENDINGS, *ROW_ENDINGS, ".json")
    found = sorted((file for file in path.iterdir() if ending_of(file) in endings), key=lambda file: file.name)
    if not found:
        what = f"no file of text, JSON, JSONL or Parquet in {path}."
        raise UserError(what, code="dataset-unreadable", where=place, remedy="Name the files.")
    of_split = [file for file in found if re.match(rf"{re.escape(split)}(?![A-Za-z0-9])", file.name)]
    return of_split or found


def _has_rows(file: Path) -> bool:
    return holds_rows(file) or ending_of(file) == ".json"


def _rows_of(file: Path) -> Iterator[RawRow]:
    """The rows of a file; of a text the one row that holds it whole."""
    if not _has_rows(file):
        yield str(file), {"name": file.name, "text": read_whole(file)}
        return
    lines: Iterator[str] = _json_lines(file) if ending_of(file) == ".json" else row_lines(file)
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield f"{file}:{number}", line


def _json_lines(file: Path) -> Iterator[str]:
    """The rows of a .json file, which is a list of them, or has one a line."""
    with open_file(file) as stream:
        if stream.read(4096).lstrip()[:1] != "[":
            stream.seek(0)
            yield from stream
            return
        stream.seek(0)
        try:
            found = json.loads(stream.read())
        except (ValueError, RecursionError) as error:
            what = f"not JSON ({error})."
            remedy = "Give a list of rows, or a row a line."
            raise UserError(what, code="dataset-unreadable", where=str(file), remedy=remedy) from None
    yield from (json.dumps(row, ensure_ascii=False) for row in found)


def read_whole(file: Path) -> str:
    """A file of text with line feeds alone, whatever machine wrote it."""
    with open_text(file) as stream:
        return stream.read().replace("\r\n", "\n").replace("\r", "\n")


def _listed(rows: Sequence[dict[str, Any]], name: str, draw: str, seed: int) -> Iterator[RawRow]:
    places = range(len(rows))
    for place in shuffled(places, seed) if draw == "random" else places:
        yield f"{name}[{place}]", rows[place]


def _in_random_order(numbered: Callable[[], Iterator[RawRow]], seed: int) -> Iterator[RawRow]:
    """All rows in random order; the files are read again for every few hundred rows."""
    order = shuffled(range(sum(1 for _ in numbered())), seed)
    for first in range(0, len(order), _READ_AT_ONCE):
        asked = order[first : first + _READ_AT_ONCE]
        wanted, last = set(asked), max(asked)
        found: dict[int, RawRow] = {}
        for place, row in enumerate(numbered()):
            if place in wanted:
                found[place] = row
            if place == last:
                break
        yield from (found[place] for place in asked if place in found)
