"""Which batches and samples pass a layer where a few are enough, and where their hidden states come from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from snugfit.model.forward_pass import make_batches, some_batches, spread_batches, spread_places
from snugfit.model.hidden_states import StateFile
from snugfit.storage.transfer import Transfer

CPU = torch.device("cpu")


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
    batches = make_batches([[1] * 10] * 8, 10, CPU)
    assert [one.rows[0] for one in some_batches(batches, tokens, spread)] == places


@pytest.mark.parametrize(
    ("tokens", "least", "places"),
    [
        (1, 1, [4]),
        (1, 4, [1, 3, 5, 7]),
        (60, 4, [0, 2, 3, 4, 6, 7]),
        (10**6, 1, list(range(8))),
        (1, 9, list(range(8))),
    ],
)
def test_few_samples_are_spread_over_all(tokens: int, least: int, places: list[int]) -> None:
    """As few as hold the tokens, at least so many, from the beginning to the end."""
    assert spread_places([10] * 8, tokens, least) == places


@torch.no_grad()
def test_states_of_any_samples(tmp_path: Path) -> None:
    """Batches of samples from several batches get what these wrote, also while it is on its way."""
    rows = [[1] * length for length in (70, 40, 70, 100, 40, 33)]
    batches, few = make_batches(rows, 130, CPU), spread_batches(rows, 150, 3, 200, CPU)
    assert sorted(row for batch in few for row in batch.rows) == [1, 3, 5]
    found = {}
    with Transfer(CPU) as transfer, StateFile(tmp_path / "states", batches, 8, torch.float32, transfer) as states:
        for number in range(2):  # a layer's states, then the next one's
            for batch in batches:
                hidden = torch.randn(*batch.tokens.shape, 8) + number
                for place, (row, length) in enumerate(zip(batch.rows, batch.lengths, strict=True)):
                    found[row] = hidden[place, :length]
                states.write(batch, hidden)
            for batch in (*few, *batches):
                hidden = states.read(batch)
                for place, (row, length) in enumerate(zip(batch.rows, batch.lengths, strict=True)):
                    assert torch.equal(hidden[place, :length], found[row])
                    assert not hidden[place, length:].any()
            states.wait()
            states.start_again()
