"""Files of a dataset: texts, JSONL and Parquet, the first two also compressed by gzip. Of Parquet each row is a line.

A file is what its name says: .jsonl, .ndjson and .parquet hold rows, any other name a text.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from snugfit.errors import UserError

JSONL_ENDINGS = (".jsonl", ".ndjson")
ROW_ENDINGS = (*JSONL_ENDINGS, ".parquet")
GZIP = ".gz"
_ARCHIVES = (".tar", ".tgz", ".zip")
_PARQUET_ROWS = 64  # in memory at once


def ending_of(file: Path) -> str:
    """The ending that says what a file holds, in small letters: of a.jsonl.gz it is .jsonl."""
    ending = file.suffix.lower()
    return Path(file.stem).suffix.lower() if ending == GZIP else ending


def holds_rows(file: Path) -> bool:
    """Whether a file has a sample a row, as its name says."""
    return ending_of(file) in ROW_ENDINGS


def check_ending(file: Path) -> None:
    """UserError for a .json file, which would be read as raw text, and for archives of files."""
    ending, is_gzip = ending_of(file), file.suffix.lower() == GZIP
    if ending == ".json":
        raise UserError(
            "a .json file is neither text nor rows.",
            code="dataset-unreadable",
            where=str(file),
            remedy="Give text, or JSONL with a row a line.",
        )
    if ending in _ARCHIVES or (is_gzip and ending == ".parquet"):
        raise UserError(
            "an archive, or a file compressed twice.",
            code="dataset-unreadable",
            where=str(file),
            remedy="Unpack it, and give the files in it.",
        )


@contextmanager
def open_text(file: Path) -> Iterator[TextIO]:
    """A file of text or JSONL, uncompressed; UserError where it, or what is read of it, is not UTF-8 text."""
    check_ending(file)
    with open_file(file) as stream:
        yield stream


@contextmanager
def open_file(file: Path) -> Iterator[TextIO]:
    """As `open_text`, whatever the file's ending says."""
    with readable(file):
        if file.suffix.lower() == GZIP:
            with gzip.open(file, "rt", encoding="utf-8-sig", newline="\n") as stream:
                yield stream
        else:
            with file.open(encoding="utf-8-sig", newline="\n") as stream:
                yield stream


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """Inside, whatever shows that a file cannot be read becomes a UserError that names it."""
    try:
        yield
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise UserError(
            f"cannot be read as text ({error}).",
            code="dataset-unreadable",
            where=str(file),
            remedy="Give UTF-8 text or JSONL.",
        ) from None


def read_text(file: Path, data: bytes) -> str:
    """The text of a file of text or JSONL that holds these bytes; UserError where it is none."""
    with readable(file):
        raw = gzip.decompress(data) if file.suffix.lower() == GZIP else data
        return raw.decode("utf-8-sig")


def row_lines(file: Path) -> Iterator[str]:
    """The lines of a JSONL file, or the rows of a Parquet file as such lines; UserError where it cannot be read."""
    if ending_of(file) == ".parquet":
        check_ending(file)
        yield from _parquet_lines(file)
        return
    with open_text(file) as stream:
        yield from stream


def parquet_lines(file: Path, data: bytes) -> list[str]:
    """As `row_lines`, of a Parquet file that holds these bytes."""
    return list(_parquet_lines(file, io.BytesIO(data)))


def _parquet_lines(file: Path, source: Any = None) -> Iterator[str]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(
            "reading Parquet needs pyarrow.",
            code="dependency-missing",
            where=str(file),
            remedy='Install it: pip install "snugfit[parquet]". Or give JSONL.',
        ) from None
    try:
        with readable(file), parquet.ParquetFile(source or file) as table:
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS):
                for row in batch.to_pylist():
                    inner = {key: _without_nulls(value) for key, value in row.items()}
                    yield json.dumps(inner, ensure_ascii=False, default=str)
    except ArrowException as error:
        raise UserError(
            f"not a Parquet file that can be read ({str(error)[:300]}).",
            code="dataset-unreadable",
            where=str(file),
            remedy="Download it again, or give JSONL.",
        ) from None


def _without_nulls(value: Any) -> Any:
    """A column without what is null in it: Parquet gives all objects of a column the keys of all others."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
