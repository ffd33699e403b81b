"""Which batches pass a layer where a few are enough."""

from __future__ import annotations

import pytest
import torch

from snugfit.model.forward_pass import make_batches, some_batches


@pytest.mark.parametrize(
    ("tokens", "spread", "places"),
    [
        (1, 1, [0]),
        (20, 1, [0, 1]),
        (10**6, 1, list(range(8))),
        (1, 4, [1, 3, 5, 7]),
        (60, 4, [0, 2, 3, 4, 6, 7]),
        (1, 9, list(range(8))),
    ],
)
def test_some_batches_are_the_first_or_spread_over_all(tokens: int, spread: int, places: list[int]) -> None:
    """The first batches that hold the tokens; with a spread at least so many, from the beginning to the end."""
    batches = make_batches([[1] * 10] * 8, 10, torch.device("cpu"))
    assert [one.rows[0] for one in some_batches(batches, tokens, spread)] == places
