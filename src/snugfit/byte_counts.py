"""Numbers of bytes as people write them: 9740000000, 9.74GB (10^9), 9.07GiB (2^30), 120MB, 500 KiB."""

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
