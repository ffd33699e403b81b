"""Files of one JSON document that later runs read again: read strictly, written whole or not at all. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from snugfit.errors import UserError
from snugfit.records.base import check_digest

Content = TypeVar("Content")


@dataclass(frozen=True, kw_only=True)
class FileKind:
    """What a file holds (`content`, as messages call it), under which name and schemas, and at most how large.

    `code` is that of the error for any other document, `remedy` what to give instead.
    """

    content: str
    file_name: str
    schemas: tuple[str, ...]
    max_bytes: int
    code: str
    remedy: str


def load_file(path: Path, kind: FileKind, parse: Callable[[Mapping[str, Any]], Content]) -> Content:
    """What `parse` makes of a file's document, or of the one in a directory; it raises ValueError for a broken one.

    UserError for a file that is anything else, and for a document that was changed after it was written.
    """
    file = path

    def refusal(what: str) -> UserError:
        return UserError(what, code=kind.code, where=str(file), remedy=kind.remedy)

    try:
        file = path / kind.file_name if path.is_dir() else path
        if not file.is_file():
            raise UserError("no such file.", code="file-missing", where=str(file), remedy=kind.remedy)
        size = file.stat().st_size
        if size > kind.max_bytes:
            raise refusal(f"a file of {kind.content} has at most {kind.max_bytes:,} bytes, this one {size:,}.")
        document = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        what = f"cannot be read ({error.strerror or error})."
        raise UserError(what, code="file-unreadable", where=str(file), remedy="Check its permissions.") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise refusal(f"not valid JSON ({_one_line(error)}).") from None
    if not isinstance(document, dict) or document.get("schema") not in kind.schemas:
        found = document.get("schema") if isinstance(document, dict) else type(document).__name__
        known = "not " if len(kind.schemas) == 1 else "neither "
        raise refusal(f"schema {found!r} is {known}{' nor '.join(kind.schemas)}.")
    check_digest(document, str(file))
    try:
        return parse(document)
    except ValueError as error:
        raise refusal(f"broken {kind.content} ({_one_line(error)}).") from None


def save_file(text: str, file: Path) -> None:
    """Write a new file, whole or not at all; UserError where it exists or cannot be written."""
    if os.path.lexists(file):
        remedy = "Remove it, or choose another file."
        raise UserError("the output exists already.", code="output-exists", where=str(file), remedy=remedy)
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.rename(file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        what = f"cannot be written ({error.strerror or error})."
        raise UserError(what, code="output-not-writable", where=str(file), remedy="Choose another file.") from None


def validated(kind: type[Content], document: Mapping[str, Any]) -> Content:
    """A document as a dataclass, each field of its type; ValueError, with the first key that is not."""
    from pydantic import ValidationError

    reader: Any = _reader(kind)  # type: ignore[arg-type]  # mypy holds type[Content] for unhashable
    try:
        found: Content = reader.validate_python(document)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return found


@lru_cache(maxsize=16)
def _reader(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
