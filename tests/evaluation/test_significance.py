"""Paired tests: against scipy, hand-made examples, and what they must keep by definition; coverage by simulation."""

from __future__ import annotations

import math
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from snugfit.evaluation import significance
from snugfit.evaluation.significance import (
    holm,
    mcnemar,
    paired_bootstrap,
    ratio_mean,
    tokens_to_settle,
    unpaired_z,
)

Table = tuple[NDArray[np.float64], NDArray[np.float64]]  # chunk sums of the difference, tokens
Draw = Callable[[np.random.Generator, int], Table]
SKEW = math.exp(0.125)  # mean of a lognormal of sigma 0.5
CHUNKS = st.lists(
    st.tuples(st.integers(-64, 64), st.integers(-64, 64), st.integers(1, 8)), min_size=5, max_size=12
)  # quarters of a nat, exact in floating point


def normal(rng: np.random.Generator, n: int) -> Table:
    return 512 * rng.normal(0.0, 1.0, n), np.full(n, 512.0)


def heavy_tails(rng: np.random.Generator, n: int) -> Table:
    return 512 * rng.standard_t(3, n), np.full(n, 512.0)


def skewed(rng: np.random.Generator, n: int) -> Table:
    return 512 * (rng.lognormal(0.0, 0.5, n) - SKEW), np.full(n, 512.0)


def very_skewed(rng: np.random.Generator, n: int) -> Table:
    return 512 * (rng.lognormal(0.0, 1.0, n) - math.exp(0.5)), np.full(n, 512.0)


def unequal(rng: np.random.Generator, n: int) -> Table:
    counts = rng.integers(32, 512, n).astype(np.float64)
    return np.sqrt(counts) * rng.normal(0.0, 1.0, n), counts


def paired_table(n: int, *, shift: float = 0.05) -> tuple[list[float], list[float], list[int]]:
    """Two models' losses on n chunks of 256 tokens: what they share varies much, their difference little."""
    rng = np.random.default_rng(5)
    shared = rng.normal(3.0, 0.5, n)
    a = 256 * (shared + shift + rng.normal(0.0, 0.4, n))
    return a.tolist(), (256 * shared).tolist(), [256] * n


def test_a_mean_is_the_ratio_of_the_totals_with_the_spread_of_its_chunks() -> None:
    """Sums 2, 9, 4 of 1, 3, 2 tokens: mean 2.5, residuals -0.5, 1.5, -1, so the error is sqrt(3.5 * 3/2) / 6."""
    mean, error = ratio_mean([2.0, 9.0, 4.0], [1, 3, 2])
    assert mean == 2.5
    assert error == pytest.approx(math.sqrt(3.5 * 3 / 2) / 6)


def test_equal_chunks_have_the_usual_standard_error() -> None:
    """With one count for all the ratio's error is that of a plain mean."""
    values = np.random.default_rng(0).normal(size=40)
    mean, error = ratio_mean(values.tolist(), [1] * 40)
    assert mean == pytest.approx(values.mean())
    assert error == pytest.approx(stats.sem(values))


def test_one_chunk_has_no_error() -> None:
    """A spread between chunks needs two of them."""
    assert ratio_mean([6.0], [3]) == (2.0, None)


@pytest.mark.parametrize(
    ("sums", "counts"), [([1.0], [1, 2]), ([], []), ([0.0], [0]), ([math.nan], [1]), ([1.0, 1.0], [1, -1])]
)
def test_sums_and_counts_that_do_not_belong_together_are_refused(sums: list[float], counts: list[int]) -> None:
    """Other lengths, nothing counted, NaN and negative counts raise ValueError instead of giving a figure."""
    with pytest.raises(ValueError, match="sums"):
        ratio_mean(sums, counts)
    with pytest.raises(ValueError, match="sums"):
        paired_bootstrap(sums, sums, counts)


def test_the_interval_is_scipys() -> None:
    """On 400 paired chunks both ends are within 3 % of the width of scipy's BCa interval for the same ratio."""
    a, b, _ = paired_table(400)
    counts = np.random.default_rng(2).integers(128, 512, 400)

    def ratio(x: NDArray[np.float64], y: NDArray[np.float64], c: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        return np.asarray((x.sum(axis) - y.sum(axis)) / c.sum(axis))

    rng = np.random.default_rng(0)
    of_scipy = stats.bootstrap((a, b, counts), ratio, paired=True, n_resamples=4999, method="BCa", rng=rng, batch=500)
    found = paired_bootstrap(a, b, counts.tolist())
    assert found.difference == pytest.approx((sum(a) - sum(b)) / counts.sum())
    assert found.low is not None
    assert found.high is not None
    low, high = of_scipy.confidence_interval
    assert abs(found.low - low) < 0.03 * (high - low)
    assert abs(found.high - high) < 0.03 * (high - low)


@pytest.mark.parametrize("shift", [0.02, 0.04, 0.05])
def test_p_is_the_paired_t_tests_where_chunks_are_many(shift: float) -> None:
    """On 500 chunks with normal differences p agrees with Student's within the resamples' own scatter."""
    a, b, counts = paired_table(500, shift=shift)
    expected = stats.ttest_rel(a, b).pvalue
    found = paired_bootstrap(a, b, counts).p
    assert found is not None
    assert abs(found - expected) < 0.004 + 4 * math.sqrt(expected * (1 - expected) / 9999)


def test_pairing_finds_what_the_spread_of_the_texts_hides() -> None:
    """A shift far below the chunks' own spread is significant, though Welch's unpaired test sees nothing."""
    a, b, counts = paired_table(500)
    p = paired_bootstrap(a, b, counts).p
    assert p is not None
    assert p < 0.05 < stats.ttest_ind(a, b, equal_var=False).pvalue


@pytest.mark.parametrize(
    ("draw", "chunks", "least", "most"),
    [
        (normal, 5, 0.95, 0.995),
        (normal, 8, 0.94, 0.985),
        (normal, 20, 0.93, 0.975),
        (normal, 100, 0.93, 0.97),
        (heavy_tails, 8, 0.94, 0.99),
        (heavy_tails, 20, 0.935, 0.985),
        (skewed, 8, 0.91, 0.96),
        (skewed, 20, 0.92, 0.97),
        (skewed, 100, 0.925, 0.97),
        (unequal, 8, 0.93, 0.98),
        (unequal, 20, 0.93, 0.97),
        (unequal, 100, 0.925, 0.97),
        # no interval corrects that with so few draws from so long a tail: Student's t is at 0.83 and 0.88
        (very_skewed, 8, 0.85, 0.91),
        (very_skewed, 20, 0.88, 0.93),
    ],
)
def test_intervals_cover_the_truth_as_often_as_they_claim(draw: Draw, chunks: int, least: float, most: float) -> None:
    """Of 1000 intervals for a true difference of 0, a share within the bounds holds it (one error is 0.007)."""
    rng = np.random.default_rng(11)
    covered = 0
    for trial in range(1000):
        sums, counts = draw(rng, chunks)
        found = paired_bootstrap(sums.tolist(), [0.0] * chunks, counts.tolist(), resamples=199, seed=trial)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 0 <= found.high
    assert least <= covered / 1000 <= most


def test_items_of_few_kinds_are_drawn_like_all_others() -> None:
    """Accuracies, drawn by three kinds, have the interval and p of scores a millionth away; exchanged, they mirror."""
    rng = np.random.default_rng(3)
    a, b = (rng.random((2, 300)) < 0.6).astype(np.float64)
    nearly = a + 1e-6 * rng.random(300)
    few = paired_bootstrap(a.tolist(), b.tolist(), [1] * 300)
    many = paired_bootstrap(nearly.tolist(), b.tolist(), [1] * 300)
    assert few.low == pytest.approx(many.low, abs=0.004)
    assert few.high == pytest.approx(many.high, abs=0.004)
    assert few.p == pytest.approx(many.p, abs=0.03)
    turned = paired_bootstrap(b.tolist(), a.tolist(), [1] * 300)
    assert (turned.low, turned.high, turned.p) == (-(few.high or 0), -(few.low or 0), few.p)


def test_every_resample_of_five_chunks_by_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all 3125 resamples in the place of drawn ones, t*, p and interval are what their definitions give."""
    sums, counts = np.array([3.0, -1.0, 7.0, 2.5, 4.0]), np.array([4.0, 2.0, 8.0, 3.0, 7.0])
    places = list(product(range(5), repeat=5))

    def studentized(chosen: tuple[int, ...]) -> float:
        drawn = list(chosen)
        mean, error = ratio_mean(sums[drawn].tolist(), counts[drawn].astype(int).tolist())
        assert error is not None
        return math.inf if len(set(chosen)) == 1 else abs(mean - difference) / error

    difference, error = ratio_mean(sums.tolist(), counts.astype(int).tolist())
    assert error is not None
    expected = sorted((studentized(chosen) for chosen in places), reverse=True)
    p = (1 + sum(value >= abs(difference) / error for value in expected)) / 3126
    last = next(at for at in range(1, 3126) if (1 + at) / 3126 >= 0.05)  # this many resamples make p 0.05
    weights = np.array([np.bincount(chosen, minlength=5) for chosen in places], dtype=np.float64)
    monkeypatch.setattr(significance, "_weights", lambda *_: iter([(weights, np.arange(5))]))
    found = paired_bootstrap(sums.tolist(), [0.0] * 5, counts.astype(int).tolist(), resamples=3125)
    assert found.p == pytest.approx(p, abs=1e-12)
    assert found.high == pytest.approx(difference + expected[last - 1] * error)
    assert found.low == pytest.approx(difference - expected[last - 1] * error)
    drawn = np.concatenate(list(significance._draw(sums - difference * counts, counts, 3125, 0)))
    np.testing.assert_allclose(np.sort(np.abs(drawn))[::-1], expected, rtol=1e-6, atol=1e-12)


def test_a_seed_makes_the_result() -> None:
    """The same seed gives the same figures to the last bit, another seed slightly other ones."""
    a, b, counts = paired_table(30)
    assert paired_bootstrap(a, b, counts, seed=4) == paired_bootstrap(a, b, counts, seed=4)
    assert paired_bootstrap(a, b, counts, seed=4) != paired_bootstrap(a, b, counts, seed=5)


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing the resamples in many small blocks gives the same figures."""
    a, b, counts = paired_table(30)
    whole = paired_bootstrap(a, b, counts)
    monkeypatch.setattr(significance, "BLOCK", 1000)
    assert paired_bootstrap(a, b, counts) == whole


def test_many_items_need_little_memory() -> None:
    """20,000 items and 500 resamples, 10 million draws, stay below 80 MB."""
    a, b, counts = paired_table(20_000)
    tracemalloc.start()
    paired_bootstrap(a, b, counts, resamples=499)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80e6


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_few_chunks_have_a_difference_and_no_more(chunks: int) -> None:
    """Below five chunks there is neither interval nor p."""
    a, b, counts = paired_table(chunks)
    found = paired_bootstrap(a, b, counts)
    assert found.difference == pytest.approx((sum(a) - sum(b)) / sum(counts))
    assert (found.low, found.high, found.p, found.chunks) == (None, None, None, chunks)


def test_equal_models_are_equal() -> None:
    """Without any difference the interval is [0, 0] and p is 1, also where sums were added in another order."""
    _, b, counts = paired_table(8)
    again = [value * (1 + 2**-52) for value in b]
    for other in (b, again):
        found = paired_bootstrap(other, b, counts)
        assert (found.difference, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)


def test_one_and_the_same_difference_everywhere_has_no_error() -> None:
    """A constant shift a token leaves nothing to judge by: the difference stands alone."""
    _, b, counts = paired_table(8)
    found = paired_bootstrap([value + 0.1 * n for value, n in zip(b, counts, strict=True)], b, counts)
    assert found.difference == pytest.approx(0.1)
    assert (found.low, found.high, found.p) == (None, None, None)


def test_a_single_item_that_differs_proves_nothing() -> None:
    """Where a third of the resamples miss the only differing item, no finite interval agrees with p, which is large."""
    found = paired_bootstrap([1.0] + [0.0] * 99, [0.0] * 100, [1] * 100)
    assert found.difference == 0.01
    assert (found.low, found.high) == (None, None)
    assert found.p is not None
    assert found.p > 0.3


def test_resamples_that_show_the_same_difference_without_spread_are_no_outliers() -> None:
    """Of 20 items two differ, one each way: resamples of the other 18 alone have t* 0, and the interval is finite."""
    found = paired_bootstrap([1.0] + [0.0] * 19, [0.0] * 19 + [1.0], [1] * 20)
    assert (found.difference, found.p) == (0.0, 1.0)
    assert found.low is not None
    assert found.high == -found.low
    assert 0.1 < found.high < 0.3


def test_chunks_without_tokens_do_not_count() -> None:
    """A chunk in which nothing was scored changes no figure."""
    a, b, counts = paired_table(10)
    assert paired_bootstrap([*a, 0.0], [*b, 0.0], [*counts, 0]) == paired_bootstrap(a, b, counts)


def test_a_confidence_beyond_the_resamples_is_refused() -> None:
    """19 resamples know no p below 0.05, so a 95 % interval cannot come from them."""
    a, b, counts = paired_table(10)
    with pytest.raises(ValueError, match="19 resamples"):
        paired_bootstrap(a, b, counts, resamples=19)


@settings(max_examples=60, deadline=None)
@given(chunks=CHUNKS)
def test_exchanging_the_models_mirrors_everything(chunks: list[tuple[int, int, int]]) -> None:
    """b minus a is the negative of a minus b, with the interval turned around and the same p."""
    a, b = [x / 4 for x, _, _ in chunks], [y / 4 for _, y, _ in chunks]
    counts = [n for _, _, n in chunks]
    one, other = (paired_bootstrap(x, y, counts, resamples=199) for x, y in ((a, b), (b, a)))
    assert other.difference == -one.difference
    assert other.low == (None if one.high is None else -one.high)
    assert other.high == (None if one.low is None else -one.low)
    assert other.p == one.p


@settings(max_examples=60, deadline=None)
@given(chunks=CHUNKS, constant=st.integers(-100, 100))
def test_what_both_pay_for_every_token_changes_nothing(chunks: list[tuple[int, int, int]], constant: int) -> None:
    """A constant a token, added to both models, leaves difference, interval and p as they are."""
    a, b = [x / 4 for x, _, _ in chunks], [y / 4 for _, y, _ in chunks]
    counts = [n for _, _, n in chunks]
    more_a, more_b = ([x + constant * n for x, n in zip(side, counts, strict=True)] for side in (a, b))
    assert paired_bootstrap(more_a, more_b, counts, resamples=199) == paired_bootstrap(a, b, counts, resamples=199)


@settings(max_examples=100, deadline=None)
@given(chunks=CHUNKS, confidence=st.sampled_from([0.8, 0.9, 0.95]))
def test_interval_and_p_agree(chunks: list[tuple[int, int, int]], confidence: float) -> None:
    """The interval leaves out 0 exactly where p is below 1 - confidence."""
    a, b = [x / 4 for x, _, _ in chunks], [y / 4 for _, y, _ in chunks]
    found = paired_bootstrap(a, b, [n for _, _, n in chunks], resamples=199, confidence=confidence)
    assume(found.low is not None)
    assert found.low is not None
    assert found.high is not None
    assert found.p is not None
    assert (found.p < round(1 - confidence, 6)) == (not found.low <= 0 <= found.high)


def test_tokens_to_settle_follow_the_normal_approximation() -> None:
    """A difference of one standard error on 100 chunks needs (1.960 + 0.842)^2 times as many: 685 chunks more."""
    spread = np.tile([-1.0, 1.0], 50) * math.sqrt(99 / 100)  # sample deviation 1, so the error is 0.1
    a = (10 * (spread + 0.1)).tolist()
    more = tokens_to_settle(a, [0.0] * 100, [10] * 100)
    needed = 100 * (stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) ** 2
    assert more == math.ceil((needed - 100) * 10)
    assert more == pytest.approx(6849, abs=1)


def test_that_many_tokens_settle_it_four_times_in_five() -> None:
    """Drawing the advised number of new chunks gives p < 0.05 in 80 % of 400 trials, within five points."""
    rng = np.random.default_rng(1)
    seen = rng.normal(0.0, 1.0, 60)
    seen = (seen - seen.mean()) / seen.std(ddof=1) + 0.2
    more = tokens_to_settle(seen.tolist(), [0.0] * 60, [1] * 60)
    assert more is not None
    trials = rng.normal(0.2, 1.0, (400, 60 + more))
    settled = stats.ttest_1samp(trials, 0.0, axis=1).pvalue < 0.05
    assert 0.75 < settled.mean() < 0.85


def test_what_is_settled_needs_no_more_tokens() -> None:
    """Where p is below 0.05 already the answer is 0, whether p is given or not."""
    a, b, counts = paired_table(100, shift=0.5)
    found = paired_bootstrap(a, b, counts)
    assert tokens_to_settle(a, b, counts) == 0
    assert tokens_to_settle(a, b, counts, p=found.p) == 0


def test_what_is_not_settled_needs_a_chunk_at_least() -> None:
    """A p that is not below 0.05 never goes with 0 more tokens, however large difference over error is."""
    a, b, counts = paired_table(6, shift=3.0)
    assert tokens_to_settle(a, b, counts, p=0.06) == 256
    assert tokens_to_settle(a[:3], b[:3], counts[:3]) == 512  # five chunks are the least that have a p


@pytest.mark.parametrize(
    "a", [[1.0, -1.0, 1.0, -1.0, 1.0, -1.0], [2.0] * 6, [0.0] * 6], ids=["no difference", "no spread", "neither"]
)
def test_tokens_to_settle_are_unknown_without_difference_or_spread(a: list[float]) -> None:
    """Nothing can be foretold from a difference of 0, or where all chunks differ alike."""
    assert tokens_to_settle(a, [0.0] * 6, [4] * 6) is None


def test_tokens_to_settle_are_unknown_from_one_chunk() -> None:
    """One chunk shows no spread."""
    assert tokens_to_settle([2.0], [1.0], [8]) is None


@pytest.mark.parametrize(
    ("only_a", "only_b"), [(0, 0), (1, 0), (0, 5), (3, 3), (10, 2), (7, 8), (120, 90), (1500, 1300), (0, 400)]
)
def test_mcnemar_is_the_exact_binomial_test(only_a: int, only_b: int) -> None:
    """p is scipy's two-sided binomial p of the items that differ; those that agree do not matter."""
    a = [1] * only_a + [0] * only_b + [1, 0, 1]
    b = [0] * only_a + [1] * only_b + [1, 0, 1]
    found = mcnemar(a, b)
    assert (found.only_a, found.only_b) == (only_a, only_b)
    expected = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert found.p == pytest.approx(expected, rel=1e-9)


def test_mcnemar_survives_probabilities_below_all_floats() -> None:
    """Thousands of items that all go one way have p 0, not an error."""
    assert mcnemar([1] * 5000, [0] * 5000).p == 0.0


@pytest.mark.parametrize(("a", "b"), [([0.5], [1]), ([1], [1, 0]), ([math.nan], [0])])
def test_mcnemar_wants_scores_of_0_or_1(a: list[float], b: list[float]) -> None:
    """Other scores and unequal lengths raise ValueError."""
    with pytest.raises(ValueError, match="McNemar"):
        mcnemar(a, b)


def test_holm_by_hand() -> None:
    """0.005 * 4, 0.01 * 3, 0.03 * 2, then 0.04 * 1, which may not fall below the one before it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_passes_over_what_was_not_tested() -> None:
    """None stays in its place and does not count; no adjusted p exceeds 1; nothing gives nothing."""
    assert holm([None, 0.02, None, 0.9]) == [None, 0.04, None, 0.9]
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []
    assert holm([None]) == [None]


@given(ps=st.lists(st.floats(0, 1), max_size=8))
def test_holm_keeps_the_order_and_lies_between_raw_and_bonferroni(ps: list[float]) -> None:
    """Adjusted p values sort like the raw ones, none below it and none above the number of tests times it."""
    adjusted = [value for value in holm(ps) if value is not None]
    assert len(adjusted) == len(ps)
    pairs = sorted(zip(ps, adjusted, strict=True))
    assert all(x <= y for (_, x), (_, y) in pairwise(pairs))
    bonferroni = max((min(1.0, len(ps) * p) for p in ps), default=0.0)
    assert all(p <= q <= bonferroni for p, q in pairs)


def test_the_unpaired_z_is_the_first_seeds() -> None:
    """Difference over sqrt(s1^2 + s2^2), with the normal two-sided p."""
    z, p = unpaired_z(0.5733, 0.02, 0.5392, 0.015)
    assert z == pytest.approx(0.0341 / 0.025)
    assert z is not None
    assert p == pytest.approx(2 * stats.norm.sf(abs(z)))


@pytest.mark.parametrize(("first", "second"), [(None, 0.1), (0.1, None), (0.0, 0.0), (math.nan, 0.1)])
def test_there_is_no_z_without_errors(first: float | None, second: float | None) -> None:
    """Where an error is missing, or both are 0, z and p are None."""
    assert unpaired_z(0.5, first, 0.4, second) == (None, None)


def test_no_torch_is_loaded() -> None:
    """Statistics need neither torch nor scipy at run time."""
    code = "import sys, snugfit.evaluation.significance; assert not {'torch', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
