"""What all result files share: each is a frozen dataclass that states its schema and what made it, written as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Annotated, Any


class _NullIsNaN:
    """How pydantic reads a number that `without_nan` may have written as null; needs pydantic only when it reads."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        from pydantic_core import core_schema

        number = handler(source)
        return core_schema.no_info_before_validator_function(lambda value: math.nan if value is None else value, number)


Number = Annotated[float, _NullIsNaN()]  # a float that may be NaN or infinite: null in the file, NaN when read again


def as_json(document: Any, *, allow_nan: bool = True) -> str:
    """The JSON text of a document; half a surrogate pair, as in file names that are not UTF-8, is written escaped."""
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=allow_nan) + "\n"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def without_nan(value: Any) -> Any:
    """`value` with None in the place of NaN and infinities, which JSON cannot express."""
    if isinstance(value, dict):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
