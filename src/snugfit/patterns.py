"""Regular expressions out of recipes and configs, which nobody has to trust: bounded in size and in time.

Python's `re` backtracks without end on patterns such as (a+)+b; `regex` takes the same syntax and a time limit.
"""

from __future__ import annotations

import math
import re
import time
import warnings
from functools import lru_cache
from typing import Any

from snugfit.errors import UserError

SECONDS = 3.0  # for all names together
_LONG = 0.01  # what a sound pattern never takes for one name
_LONGEST = 20_000  # characters
_MOST_COUNTED = 10_000  # a{100}b{100} is written out when it is compiled
_SIMPLER = "Write a simpler one, without repetitions inside repetitions."


class Pattern:
    """A regular expression that gives up with a UserError when it has taken too long."""

    def __init__(self, text: str) -> None:
        """ValueError for what is none, or is too large."""
        counts = [max(int(number or 0) for number in pair) for pair in re.findall(r"\{(\d{0,9}),?(\d{0,9})\}", text)]
        if len(text) > _LONGEST or math.prod(count for count in counts if count) > _MOST_COUNTED:
            raise ValueError("too large")
        self._text, self._left = text, SECONDS
        self._compiled: Any = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                re.compile(text)
                import regex

                self._compiled = regex.compile(text)
            except Exception as error:  # noqa: BLE001 (both raise more kinds than they tell)
                raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None

    def begins(self, name: str) -> bool:
        """Whether a beginning of `name` matches."""
        return self._timed(self._compiled.match, name)

    def is_all_of(self, name: str) -> bool:
        """Whether all of `name` matches."""
        return self._timed(self._compiled.fullmatch, name)

    def _timed(self, match: Any, name: str) -> bool:
        begin = time.thread_time()
        try:
            found = match(name, timeout=max(self._left, 0.001)) is not None
        except (TimeoutError, MemoryError):
            found, self._left = False, 0.0
        seconds = time.thread_time() - begin
        self._left -= seconds if seconds > _LONG else 0.0
        if self._left <= 0:
            raise UserError("this pattern takes too long.", where=f"re:{self._text}", remedy=_SIMPLER)
        return found


@lru_cache(maxsize=256)
def compiled(text: str) -> Pattern:
    """The pattern `text`; ValueError for what is none."""
    return Pattern(text)
