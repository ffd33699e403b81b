"""Numbers of bytes as people write and read them: 9740000000, 9.74GB (10^9), 9.07GiB (2^30), 120MB, 500 KiB."""

from __future__ import annotations

import re

from snugfit.errors import UserError

MAX_BYTES = 2**60
_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}{end}": 1000**n for n, letter in enumerate("kmgt", 1) for end in ("", "b")}
_UNITS |= {f"{letter}ib": 1024**n for n, letter in enumerate("kmgt", 1)}
_NUMBER = re.compile(r"\s*(\d{1,3}(?:,\d{3})+|\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.ASCII | re.IGNORECASE)


def parse_bytes(text: str, *, where: str) -> int:
    """9.74GB -> 9740000000, 9GiB -> 9663676416; UserError, at the place `where`, for anything but a size above 0."""
    match = _NUMBER.fullmatch(text)
    unit = match[2].lower() if match else "?"
    number = float(match[1].replace(",", "")) * _UNITS[unit] if match and unit in _UNITS else 0.0
    if not 1 <= number <= MAX_BYTES:
        what = f"{text!r} is not a size."
        raise UserError(what, code="option-invalid", where=where, remedy="Write 9.74GB (10^9 bytes) or 9.07GiB (2^30).")
    return int(number)


def size(value: float) -> str:
    """Bytes in decimal units: 269.0 MB, 14.80 GB."""
    for unit, factor, digits in (("TB", 1e12, 2), ("GB", 1e9, 2), ("MB", 1e6, 1), ("kB", 1e3, 1)):
        if abs(value) >= factor:
            return f"{value / factor:,.{digits}f} {unit}"
    return f"{value:,.0f} bytes"
