"""Whether an answer looks sound: does it loop, does it hold characters that no text has."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Literal

MIN_LOOP = 24  # characters (or 12 tokens) that a repeated end has to cover
MIN_LOOP_TOKENS = 12
REPEATS = 3
MOST_BAD = 0.02  # share of characters
MOST_SCRIPTS = 3  # of letters in one answer
NGRAM = 4


def loops(sequence: Sequence[object] | str) -> bool:
    """Whether text, or token ids, end in a piece that stands there three times or more in a row.

    The repeated end covers at least 24 characters or 12 tokens, so that "..." or "ha ha ha" is no loop.
    """
    size = len(sequence)
    least = MIN_LOOP if isinstance(sequence, str) else MIN_LOOP_TOKENS
    for period in range(1, size // REPEATS + 1):
        repeats = max(REPEATS, -(-least // period))
        covered = period * repeats
        if covered > size:
            continue
        end = sequence[size - covered :]
        if all(end[place] == end[place - period] for place in range(period, covered)):
            return True
    return False


def repeated_share(tokens: Sequence[object]) -> float:
    """The share of the 4-token sequences of `tokens` that occurred before in it; 0 for fewer than five tokens."""
    grams = [tuple(tokens[start : start + NGRAM]) for start in range(len(tokens) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if len(grams) > 1 else 0.0


def broken(text: str) -> bool:
    """Whether text holds characters of no text (undecodable, control, unassigned), or letters of many scripts.

    The last character may be undecodable: an answer can be cut within it.
    """
    body = text.removesuffix("\ufffd")
    if not body:
        return False
    bad = sum(c == "\ufffd" or (unicodedata.category(c) in ("Cc", "Cn", "Co") and c not in "\n\r\t") for c in body)
    scripts = {unicodedata.name(c, "?").split()[0] for c in body if c.isalpha()}
    scripts -= {"HIRAGANA", "KATAKANA", "CJK"} if "HIRAGANA" in scripts or "KATAKANA" in scripts else set()
    return bad > MOST_BAD * len(body) or len(scripts) > MOST_SCRIPTS


def verdict(text: str) -> Literal["answers", "empty", "loops", "broken"]:
    """What an answer looks like."""
    if not text.strip():
        return "empty"
    if broken(text):
        return "broken"
    return "loops" if loops(text) else "answers"
