"""What is measured of every scored token, before it is averaged; numpy alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class TokenFigures:
    """Figures of a group's scored tokens, in order, nats; NaN where a chunk was not measured.

    `change`: of the true token's probability. `overlap`: sum min(p, q) with the reference's prediction. Where KL is an
    estimate, `variance` is that of its sampling and `bound` a lower bound without sampling. `finite` is false where
    logits of this model, or of the one it is compared with, or their divergence, were NaN or infinite.
    """

    loss: Array
    confidence: Array
    finite: NDArray[np.bool_]
    kl: Array
    reverse: Array
    same_top: Array
    change: Array
    overlap: Array
    variance: Array
    bound: Array


def blank_figures(tokens: int) -> TokenFigures:
    """Arrays for `tokens` tokens of which nothing is measured yet."""

    def nothing() -> Array:
        return np.full(tokens, np.nan, dtype=np.float32)

    return TokenFigures(
        loss=nothing(),
        confidence=nothing(),
        finite=np.zeros(tokens, dtype=bool),
        kl=nothing(),
        reverse=nothing(),
        same_top=nothing(),
        change=nothing(),
        overlap=nothing(),
        variance=nothing(),
        bound=nothing(),
    )
