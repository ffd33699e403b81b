"""E[x^2] of many features as text: fp32, little-endian, in base64, so that files of statistics stay JSON."""

from __future__ import annotations

import binascii
from base64 import b64decode, b64encode
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_BYTES = 4


def encode_squares(squares: Any) -> str:
    """The text for numbers of any shape, in C order."""
    import numpy as np

    return b64encode(np.ascontiguousarray(squares, dtype="<f4").tobytes()).decode("ascii")


def decode_squares(text: str) -> NDArray[np.float32]:
    """The numbers, fp32 [n]; ValueError for a text that is none of `encode_squares`, or numbers < 0 or not finite."""
    import numpy as np

    try:
        raw = b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("squares must be in base64") from None
    if not raw or len(raw) % _BYTES:
        raise ValueError("squares must be fp32 numbers")
    numbers = np.frombuffer(raw, dtype="<f4").astype(np.float32)
    if not (np.isfinite(numbers).all() and (numbers >= 0).all()):
        raise ValueError("squares must be >= 0 and finite")
    return numbers


def count_squares(text: str) -> int:
    """How many numbers a text of `encode_squares` holds."""
    return (len(text) * 3 // 4 - text[-2:].count("=")) // _BYTES


def mean_squares(parts: list[tuple[str, Any]]) -> str:
    """The means over the tokens of all parts: texts, each with its numbers of tokens, one or [rows].

    With several numbers a text has as many rows, each with a mean of its own. ValueError for texts of other lengths.
    """
    import numpy as np

    if len({len(text) for text, _ in parts}) > 1:
        raise ValueError("they measured inputs of other widths")
    weights = [np.atleast_1d(np.asarray(tokens, dtype=np.float64)) for _, tokens in parts]
    sums = [
        decode_squares(text).astype(np.float64).reshape(len(tokens), -1) * tokens[:, None]
        for (text, _), tokens in zip(parts, weights, strict=True)
    ]
    total = np.maximum(np.sum(weights, axis=0), 1)[:, None]
    return encode_squares(np.sum(sums, axis=0) / total)
