"""Numbers of tokens as people write them: 4096, 32,768, 4k, 32k, 1m; k is 1,024 and m 1,024 x 1,024."""

from __future__ import annotations

import re

from snugfit.errors import UserError

MAX_TOKENS = 2**40
_UNITS = {"": 1, "k": 1024, "m": 1024 * 1024}
_NUMBER = re.compile(r"\s*(\d{1,3}(?:,\d{3})+|\d+(?:\.\d+)?)\s*([km]?)\s*", re.ASCII | re.IGNORECASE)


def parse_tokens(text: str, *, where: str = "context") -> int:
    """32k -> 32768, 1m -> 1048576, 32,768 -> 32768; UserError for anything but a whole number above 0."""
    match = _NUMBER.fullmatch(text)
    number = float(match[1].replace(",", "")) * _UNITS[match[2].lower()] if match else 0.0
    if not 1 <= number <= MAX_TOKENS or number != int(number):
        raise UserError(
            f"{text!r} is not a number of tokens.", code="option-invalid", where=where, remedy="Write 32768 or 32k."
        )
    return int(number)


def parse_token_list(text: str, *, where: str = "context") -> tuple[int, ...]:
    """4096,8k -> (4096, 8192): commas separate the numbers; UserError as in `parse_tokens`."""
    return tuple(parse_tokens(part, where=where) for part in text.split(","))
