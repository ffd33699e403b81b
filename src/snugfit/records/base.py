"""What all result files share: each is a frozen dataclass that states its schema and what made it, written as JSON.

The text of a record ends with a digest of everything before it, so that a record that was edited later shows it. It is
no protection against forgery: who edits a record can compute it again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from snugfit.errors import UserError


class _NullIsNaN:
    """How pydantic reads a number that `without_nan` may have written as null; needs pydantic only when it reads."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        from pydantic_core import core_schema

        number = handler(source)
        return core_schema.no_info_before_validator_function(lambda value: math.nan if value is None else value, number)


Number = Annotated[float, _NullIsNaN()]  # a float that may be NaN or infinite: null in the file, NaN when read again


SCHEMA, DIGEST = "schema", "record_digest"  # keys of every record
OURS = "snugfit."  # every schema begins with it
MAKE_AGAIN = "Make the record again."


def is_record(document: Any) -> bool:
    """Whether a JSON document is a record of this package, of whatever version."""
    return isinstance(document, dict) and str(document.get(SCHEMA, "")).startswith(OURS)


def content_digest(document: Mapping[str, Any]) -> str:
    """SHA-256, hexadecimal, of all keys and values of a record but its digest; spaces and line ends do not count."""
    content = {key: value for key, value in document.items() if key != DIGEST}
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode("ascii")).hexdigest()


def check_digest(document: Mapping[str, Any], where: str) -> None:
    """UserError for a record without a digest, and for one whose digest is that of other content."""
    stated = document.get(DIGEST)
    try:
        found = content_digest(document)
    except (ValueError, RecursionError):
        found = ""
    if stated != found:
        what = "it has no digest." if stated is None else "it was changed after it was written: its digest differs."
        raise UserError(what, code="record-changed", where=where, remedy=MAKE_AGAIN)


def as_json(document: Any, *, allow_nan: bool = True) -> str:
    """The JSON text of a document, of a record with its digest.

    Half a surrogate pair, as in file names that are not UTF-8, is written escaped.
    """
    if is_record(document):
        document = {**document, DIGEST: content_digest(document)}
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=allow_nan) + "\n"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def without_nan(value: Any) -> Any:
    """`value` with None in the place of NaN and infinities, which JSON cannot express."""
    if isinstance(value, dict):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
