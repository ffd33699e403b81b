"""Result files as frozen dataclasses. Each names its schema, and what made it."""

from __future__ import annotations

import json
import math
from typing import Any


def as_json(document: Any, *, allow_nan: bool = True) -> str:
    """A JSON document as it is stored; half a surrogate pair, as in names that are no UTF-8, stands there escaped."""
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=allow_nan) + "\n"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _plain(value: Any) -> Any:
    """`value` with None for numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
