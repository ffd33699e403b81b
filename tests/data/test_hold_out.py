"""Which samples are held out: some of every file, the same ones every time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from snugfit.data.dataset import Dataset, hold_out, make_dataset, samples_digest


def dataset(*shares: int) -> Dataset:
    """A dataset of files with so many samples each: sample n of file f is (f, n)."""
    return make_dataset([(file, n) for file, count in enumerate(shares) for n in range(count)], "source", shares)


def files_of(samples: Sequence[Sequence[int]]) -> set[int]:
    """The files that samples are of."""
    return {sample[0] for sample in samples}


@pytest.mark.parametrize("shares", [(32,), (16, 16), (8, 3, 2, 21), (2, 2, 2, 2), (9, 0, 7), (5, 4, 3)])
def test_every_file_is_covered(shares: tuple[int, ...]) -> None:
    """Each sample is in one of the parts, in its order; every file has some in both."""
    whole = dataset(*shares)
    used, out = hold_out(whole, 8)
    assert sorted([*used.samples, *out.samples]) == list(whole.samples)
    assert list(used.samples) == sorted(used.samples)
    assert list(out.samples) == sorted(out.samples)
    assert files_of(used.samples) == files_of(out.samples) == files_of(whole.samples)
    for part in (used, out):
        assert part.digest == samples_digest(part.samples)
        assert part.source == whole.source
        assert part.shares == tuple(sum(sample[0] == file for sample in part.samples) for file in range(len(shares)))
    assert out.shares == tuple(max(1, count // 8) if count else 0 for count in shares)


def test_they_are_evenly_spread() -> None:
    """Of a long file the middle of every stretch is held out, neither beginning nor end."""
    _, out = hold_out(dataset(32), 8)
    assert [sample[1] for sample in out.samples] == [4, 12, 20, 28]


def test_the_same_ones_every_time() -> None:
    """Nothing is drawn at random; samples of one file alone are of one share."""
    assert hold_out(dataset(7, 12), 8) == hold_out(dataset(7, 12), 8)
    plain = make_dataset([(0, n) for n in range(16)], "source")
    assert [part.samples for part in hold_out(plain, 8)] == [part.samples for part in hold_out(dataset(16), 8)]


def test_files_with_one_sample() -> None:
    """They count as one file together: some are held out, and none where there is only one of them."""
    used, out = hold_out(dataset(*(1,) * 8), 8)
    assert (len(used.samples), len(out.samples)) == (7, 1)
    used, out = hold_out(dataset(1, 7), 8)
    assert files_of(used.samples) == {0, 1}
    assert files_of(out.samples) == {1}
    used, out = hold_out(dataset(1, 8, 1, 1), 8)
    assert len(files_of(out.samples)) == 2
    assert files_of(out.samples) > {1}


@pytest.mark.parametrize("count", range(8, 20))
def test_something_is_always_held_out(count: int) -> None:
    """However many samples stand in however many files, both parts have some."""
    for files in range(1, count + 1):
        shares = [count // files + (number < count % files) for number in range(files)]
        used, out = hold_out(dataset(*shares), 8)
        assert used.samples
        assert 1 <= len(out.samples) <= count / 2
    for first, second in itertools.pairwise(range(count)):
        assert hold_out(dataset(first, count - second), 8)[1].samples
