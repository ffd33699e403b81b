"""Regular expressions from recipes and configs, which may come from strangers: bounded in size and in time.

Python's `re` backtracks without end on patterns such as (a+)+b; `regex` takes the same syntax and a time limit.
"""

from __future__ import annotations

import math
import re
import time
import warnings
from functools import lru_cache
from typing import Any

import regex

from snugfit.errors import UserError

BUDGET_SECONDS = 1.0  # of one Pattern, for all names together
_SLOW_SECONDS = 0.01  # a sound pattern never takes this long for one name; shorter matches are not counted
_MAX_LENGTH = 20_000  # characters
_MAX_REPETITIONS = 10_000  # a{100}b{100} is written out when it is compiled


class Pattern:
    """A regular expression that raises a UserError once its matches have taken BUDGET_SECONDS of processor time.

    Make one for each use, such as one resolution of a recipe: the budget belongs to the object. Texts that were
    compiled before are not compiled again.
    """

    def __init__(self, text: str) -> None:
        """Compile `text`; ValueError where it is not a regular expression, or too large."""
        self._text, self._compiled = text, _compile(text)
        self._seconds_left = BUDGET_SECONDS

    def begins(self, name: str) -> bool:
        """Whether a beginning of `name` matches."""
        return self._timed(self._compiled.match, name)

    def is_all_of(self, name: str) -> bool:
        """Whether all of `name` matches."""
        return self._timed(self._compiled.fullmatch, name)

    def _timed(self, match: Any, name: str) -> bool:
        start = time.thread_time()
        try:
            found = match(name, timeout=max(self._seconds_left, 0.001)) is not None
        except (TimeoutError, MemoryError):
            found, self._seconds_left = False, 0.0
        seconds = time.thread_time() - start
        self._seconds_left -= seconds if seconds > _SLOW_SECONDS else 0.0
        if self._seconds_left <= 0:
            raise UserError(
                "this pattern takes too long.",
                code="pattern-invalid",
                where=f"re:{self._text}",
                remedy="Write a simpler pattern, without repetitions inside repetitions.",
            )
        return found


@lru_cache(maxsize=256)
def _compile(text: str) -> Any:
    """The compiled expression, valid for both `re` and `regex`; ValueError where it is not one, or too large."""
    counts = [max(int(number or 0) for number in pair) for pair in re.findall(r"\{(\d{0,9}),?(\d{0,9})\}", text)]
    if len(text) > _MAX_LENGTH or math.prod(count for count in counts if count) > _MAX_REPETITIONS:
        raise ValueError("too large")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            re.compile(text)
            return regex.compile(text)
        except Exception as error:  # noqa: BLE001  # on hostile texts both raise more kinds than they document
            raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
