"""Numbers in templates, none of which may become so large that arithmetic on it takes long."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

MAX_BITS = 4096  # of a number
_MAX_PLACES = 15  # of a rounded number


def add_up(values: Iterable[Any], start: float = 0) -> Any:
    """jinja's `sum`, of numbers alone; TypeError for anything else."""
    found = start
    for value in values:
        if not isinstance(value, int | float):
            raise TypeError("sum adds numbers")
        found += value
    return found


def rounded(value: float, precision: int = 0, method: str = "common") -> float:
    """jinja's `round`, of numbers alone and to few places: its powers of ten have no limit."""
    if not isinstance(value, int | float) or not isinstance(precision, int) or abs(precision) > _MAX_PLACES:
        raise TypeError(f"round takes a number, and at most {_MAX_PLACES} places")
    if method == "common":
        return round(value, precision)
    if method not in ("ceil", "floor"):
        raise TypeError("the method of round is common, ceil or floor")
    power: float = 10**precision
    return (math.ceil if method == "ceil" else math.floor)(value * power) / power


def small(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that gives numbers, with an error for one that is too large."""

    def filtered(*args: Any, **kwargs: Any) -> Any:
        found = function(*args, **kwargs)
        if isinstance(found, int) and bits(found) > MAX_BITS:
            raise TypeError("a number becomes too large")
        return found

    return filtered


def bits_after(operator: str, left: float, right: float) -> float:
    """Bits at most of a number that `*` or `**` gives; 0 for operators that make no large numbers."""
    if operator == "**":
        return bits(left) * max(1, abs(right))
    return bits(left) + bits(right) if operator == "*" else 0


def bits(number: float) -> int:
    """Bits of a number without its sign; of a float that is not finite more than any number may have."""
    return abs(number).bit_length() if isinstance(number, int) else 64 + (0 if math.isfinite(number) else MAX_BITS)
