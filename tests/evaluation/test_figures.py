"""From figures of every token to those of a record, by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from snugfit.evaluation.figures import (
    CONFIDENCE_EDGES,
    GroupTokens,
    context_figures,
    floor_figures,
    model_figures,
    position_edges,
    with_holm,
)
from snugfit.evaluation.significance import paired_bootstrap, tokens_to_settle
from snugfit.evaluation.token_figures import TokenFigures
from snugfit.records.evaluation import ContextFigures, KLKind, ModelFigures, Spread

Values = Sequence[float] | NDArray[np.float64]
FIELDS = [field.name for field in fields(TokenFigures) if field.name != "finite"]


def tokens(loss: Values, finite: Sequence[bool] | None = None, **given: Values) -> TokenFigures:
    """Figures of as many tokens as `loss` has; NaN where nothing is given."""
    arrays: dict[str, Any] = {name: np.full(len(loss), np.nan, np.float32) for name in FIELDS}
    arrays |= {name: np.asarray(values, np.float32) for name, values in ({"loss": loss} | given).items()}
    chosen = np.ones(len(loss), bool) if finite is None else np.asarray(finite)
    return TokenFigures(finite=chosen, **arrays)


def random_tokens(count: int, seed: int = 0) -> TokenFigures:
    rng = np.random.default_rng(seed)
    return tokens(
        rng.gamma(2.0, 1.0, count),
        kl=rng.gamma(1.0, 0.1, count),
        reverse=rng.gamma(1.0, 0.1, count),
        variance=rng.gamma(1.0, 0.1, count),
        bound=rng.gamma(1.0, 0.05, count),
        confidence=rng.uniform(0, 1, count),
        same_top=rng.integers(0, 2, count).astype(float),
        change=rng.normal(0, 0.1, count),
        overlap=rng.uniform(0, 1, count),
    )


def part_of(whole: TokenFigures, tokens: slice) -> TokenFigures:
    return TokenFigures(**{name: getattr(whole, name)[tokens] for name in (*FIELDS, "finite")})


def group_of(*counts: int) -> GroupTokens:
    """Chunks with these numbers of scored tokens, from position 1 on."""
    return GroupTokens(counts, np.concatenate([np.arange(1, count + 1) for count in counts]))


def ratio_error(sums: Sequence[float], counts: Sequence[int]) -> float:
    """One standard error of sum(sums) / sum(counts), as textbooks have it."""
    mean = sum(sums) / sum(counts)
    squares = sum((s - mean * c) ** 2 for s, c in zip(sums, counts, strict=True))
    return math.sqrt(len(sums) / (len(sums) - 1) * squares) / sum(counts)


def spread(found: ModelFigures) -> Spread:
    assert found.kl is not None
    return found.kl


# Figures of one model.


def test_means_and_their_errors() -> None:
    """Means are over tokens, errors over chunks of unequal length; the error of perplexity is that of its logarithm."""
    group = group_of(2, 3, 1)
    loss, kl = [1, 2, 0.5, 0.5, 3.5, 2.5], [0.25, 0.75, 0, 0.125, 0.375, 1]
    found = model_figures(
        "q",
        tokens(
            loss,
            kl=kl,
            reverse=[2 * value for value in kl],
            same_top=[1, 0, 1, 1, 1, 0],
            change=[0.5, -0.5, 0, 0, 0.25, 0.25],
            overlap=[1, 0.5, 0.75, 0.25, 1, 0],
        ),
        group,
        reference=tokens([1] * 6, confidence=[0.5] * 6),
    )
    assert found.name == "q"
    assert found.nll_by_chunk == (3.0, 4.5, 2.5)
    assert found.tokens_by_chunk == (2, 3, 1)
    assert found.perplexity == pytest.approx(math.exp(10 / 6))
    assert found.perplexity_error == pytest.approx(math.exp(10 / 6) * ratio_error([3, 4.5, 2.5], [2, 3, 1]))
    # residuals by hand: 1 - 5/6, 0.5 - 7.5/6, 1 - 2.5/6 of sums (1, 0.5, 1) with mean 2.5/6
    by_hand = math.sqrt(1.5 * ((1 / 6) ** 2 + 0.75**2 + (3.5 / 6) ** 2)) / 6
    assert spread(found).by_chunk == (1.0, 0.5, 1.0)
    assert spread(found).mean == pytest.approx(2.5 / 6)
    assert spread(found).standard_error == pytest.approx(by_hand)
    assert found.reverse_kl is not None
    assert found.reverse_kl.mean == pytest.approx(5 / 6)
    assert found.reverse_kl.standard_error == pytest.approx(2 * by_hand)
    assert found.same_top == pytest.approx(4 / 6)
    assert found.same_top_error == pytest.approx(ratio_error([1, 3, 0], [2, 3, 1]))
    assert found.acceptance == pytest.approx(3.5 / 6)
    assert found.acceptance_error == pytest.approx(ratio_error([1.5, 2, 0], [2, 3, 1]))
    assert found.rms_change == pytest.approx(math.sqrt((0.25 + 0.25 + 0.0625 + 0.0625) / 6))
    assert (found.kl_kind, found.kl_sampling_error, found.nonfinite) == ("exact", None, 0)


def test_quantiles() -> None:
    """Quantiles and the largest value are numpy's, over tokens and not over chunks."""
    found, group = random_tokens(3000), group_of(*[300] * 10)
    result = spread(model_figures("q", found, group, reference=found))
    quantiles = [result.median, result.p90, result.p95, result.p99, result.p999]
    assert quantiles == pytest.approx(np.quantile(found.kl.astype(float), [0.5, 0.9, 0.95, 0.99, 0.999]).tolist())
    assert result.max == float(found.kl.max())


def test_quantiles_of_an_estimate_are_of_its_bound() -> None:
    """Single tokens of an estimate are mostly sampling noise: quantiles are those of the bound, the mean is not."""
    found, group = random_tokens(3000), group_of(*[300] * 10)
    result = spread(model_figures("q", found, group, reference=found, kl_kind="estimate"))
    exact = spread(model_figures("q", found, group, reference=found))
    quantiles = [result.median, result.p90, result.p95, result.p99, result.p999]
    assert quantiles == pytest.approx(np.quantile(found.bound.astype(float), [0.5, 0.9, 0.95, 0.99, 0.999]).tolist())
    assert result.max == float(found.bound.max())
    assert (result.mean, result.standard_error, result.by_chunk) == (exact.mean, exact.standard_error, exact.by_chunk)


def test_the_change_of_loss_is_paired() -> None:
    """Its error is of the chunks' differences: what all models find hard in a chunk does not count."""
    base, group = tokens([1, 2, 8, 9, 10, 3], confidence=[0.5] * 6), group_of(2, 3, 1)
    kl = [0.0] * 6
    found = tokens([1.5, 2, 8.25, 9.25, 10.5, 3.75], kl=kl, reverse=kl, same_top=kl, change=kl, overlap=kl)
    result = model_figures("q", found, group, reference=base)
    assert result.loss_change == pytest.approx(2.25 / 6)
    assert result.loss_change_error == pytest.approx(ratio_error([0.5, 1, 0.75], [2, 3, 1]))
    same = model_figures("q", replace(found, loss=base.loss), group, reference=base)
    assert (same.loss_change, same.loss_change_error) == (0, 0)
    one = model_figures("q", found, group_of(6), reference=base)
    assert one.loss_change == pytest.approx(2.25 / 6)
    assert one.loss_change_error is None


@pytest.mark.parametrize("side", ["candidate", "reference", "neither"])
def test_a_change_of_loss_is_of_the_same_tokens(side: str) -> None:
    """The reference has no change; where a token was left out on either side of a group, it has none either."""
    base, found = random_tokens(20), random_tokens(20, 1)
    if side != "neither":
        (base if side == "reference" else found).finite[12] = False
    first, second = slice(10), slice(10, 20)
    changed = model_figures("q", part_of(found, second), group_of(10), reference=part_of(base, second))
    assert (changed.loss_change is None) == (side != "neither")
    whole = model_figures("q", part_of(found, first), group_of(5, 5), reference=part_of(base, first))
    assert whole.loss_change is not None
    alone = model_figures("p", part_of(base, first), group_of(5, 5), reference=None)
    assert (alone.loss_change, alone.loss_change_error) == (None, None)


def test_the_reference_has_no_divergence() -> None:
    """What is compared with nothing has losses and bins by its own confidence, and nothing else."""
    found = model_figures("p", random_tokens(40), group_of(20, 20), reference=None)
    assert (found.kl, found.reverse_kl, found.same_top, found.same_top_error, found.rms_change) == (None,) * 5
    assert sum(b.tokens for b in found.by_confidence) == sum(b.tokens for b in found.by_position) == 40
    assert all(b.kl is None and b.kl_error is None and b.same_top is None for b in found.by_position)


@pytest.mark.parametrize(("kind", "expected"), [("exact", None), ("lower bound", None), ("estimate", math.sqrt(7) / 4)])
def test_an_estimate_has_a_sampling_error(kind: KLKind, expected: float | None) -> None:
    """Variances of tokens add up to one error of the mean where KL is an estimate, and only there."""
    found = tokens(
        [1] * 4, kl=[1] * 4, reverse=[1] * 4, same_top=[1] * 4, change=[0] * 4, overlap=[1] * 4, variance=[1, 2, 4, 0]
    )
    result = model_figures("q", found, group_of(2, 2), reference=found, kl_kind=kind)
    assert result.kl_kind == kind
    assert result.kl_sampling_error == (None if expected is None else pytest.approx(expected))


def test_one_chunk_has_no_errors() -> None:
    """How much another chunk would differ is unknown: every error is None."""
    found = random_tokens(30)
    result = model_figures("q", found, group_of(30), reference=found)
    assert result.perplexity_error is None
    assert spread(result).standard_error is None
    assert result.same_top_error is None
    assert {b.perplexity_error for b in (*result.by_position, *result.by_confidence)} == {None}
    assert {b.kl_error for b in (*result.by_position, *result.by_confidence)} == {None}


def test_a_loss_beyond_all_bounds() -> None:
    """A mean loss whose exponential no float holds is an infinite perplexity, not an error."""
    found = model_figures("q", tokens([2000.0, 2000.0]), group_of(1, 1), reference=None)
    assert found.perplexity == math.inf
    assert found.by_position[0].perplexity == math.inf


# Bins.


@pytest.mark.parametrize(
    ("last", "edges"),
    [(1, (1, 2)), (2, (1, 2, 4)), (3, (1, 2, 4)), (4, (1, 2, 4, 8)), (7, (1, 2, 4, 8)), (8, (1, 2, 4, 8, 16))],
)
def test_edges_are_powers_of_two(last: int, edges: tuple[int, ...]) -> None:
    """The last position is always below the last edge, which is the next power of two."""
    assert position_edges(np.arange(1, last + 1)) == edges


def test_bins_by_position() -> None:
    """Each bin has the tokens of its positions in all chunks, with means and errors of its own; empty ones are out."""
    positions = np.array([1, 2, 3, 9, 1, 3, 8])
    loss, kl = [1, 2, 3, 4, 5, 6, 7], [0.5, 1, 0, 0.25, 1.5, 2, 0.75]
    found = tokens(loss, kl=kl, reverse=kl, same_top=[1, 1, 0, 1, 0, 1, 1], change=[0] * 7, overlap=[1] * 7)
    result = model_figures("q", found, GroupTokens([4, 3], positions), reference=tokens(loss, confidence=[1] * 7))
    assert [(b.low, b.high, b.tokens) for b in result.by_position] == [(1, 2, 2), (2, 4, 3), (8, 16, 2)]
    middle = result.by_position[1]  # losses 2 and 3 of the first chunk, 6 of the second
    assert middle.perplexity == pytest.approx(math.exp(11 / 3))
    assert middle.perplexity_error == pytest.approx(math.exp(11 / 3) * ratio_error([5, 6], [2, 1]))
    assert middle.kl == pytest.approx(1.0)
    assert middle.kl_error == pytest.approx(ratio_error([1, 2], [2, 1]))
    assert middle.same_top == pytest.approx(2 / 3)


def test_a_bin_of_one_chunk_has_no_error() -> None:
    """Chunks without a token in a bin do not count in its error."""
    result = model_figures("q", random_tokens(6), group_of(4, 2), reference=None)
    assert [(b.tokens, b.perplexity_error is None) for b in result.by_position] == [(2, False), (3, False), (1, True)]


def test_bins_by_confidence() -> None:
    """Bins hold their lower edge, the last one its upper edge too; whose confidence it is, is the reference's."""
    reference = tokens([1] * 10, confidence=[0.0, 0.05, 0.125, 0.25, 0.5, 0.75, 0.95, 0.995, 1.0, 1.0])
    kl = [0.5, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    found = tokens(
        [1] * 10, confidence=[0.3] * 10, kl=kl, reverse=kl, same_top=[1] * 10, change=[0] * 10, overlap=[1] * 10
    )
    result = model_figures("q", found, group_of(5, 5), reference=reference)
    assert [(b.low, b.high) for b in result.by_confidence] == list(itertools.pairwise(CONFIDENCE_EDGES))
    assert [(b.tokens, b.kl) for b in result.by_confidence] == [
        (2, 0.75),
        (1, 2),
        (1, 3),
        (1, 4),
        (1, 5),
        (1, 6),
        (3, 8),
    ]
    own = model_figures("q", found, group_of(5, 5), reference=None)
    assert [(b.low, b.high, b.tokens) for b in own.by_confidence] == [(0.25, 0.5, 10)]


# Tokens that are not finite.


def test_tokens_that_are_not_finite_are_left_out() -> None:
    """Figures are those of the other tokens alone, chunk by chunk, and the omitted tokens are counted."""
    whole = random_tokens(60)
    finite = np.random.default_rng(1).uniform(size=60) > 0.3
    arrays = {name: np.where(finite, getattr(whole, name), np.nan).astype(np.float32) for name in FIELDS}
    found = TokenFigures(finite=finite, **arrays)
    group = group_of(20, 20, 20)
    result = model_figures("q", found, group, reference=whole, kl_kind="estimate")
    rest = TokenFigures(finite=np.ones(finite.sum(), bool), **{name: getattr(whole, name)[finite] for name in FIELDS})
    counts = [int(part.sum()) for part in np.split(finite, 3)]
    expected = model_figures(
        "q", rest, GroupTokens(counts, group.positions[finite]), reference=rest, kl_kind="estimate"
    )
    assert result == replace(expected, nonfinite=int((~finite).sum()), loss_change=None, loss_change_error=None)
    assert result.tokens_by_chunk == tuple(counts)


def test_a_chunk_without_a_finite_token() -> None:
    """It counts nothing, and errors are over the chunks that are left."""
    found = tokens([1, 2, np.nan, np.nan, 3, 5], [True, True, False, False, True, True])
    result = model_figures("q", found, group_of(2, 2, 2), reference=None)
    assert result.nll_by_chunk == (3, 0, 8)
    assert result.tokens_by_chunk == (2, 0, 2)
    assert result.nonfinite == 2
    assert result.perplexity_error == pytest.approx(math.exp(11 / 4) * ratio_error([3, 8], [2, 2]))


def test_nothing_finite_at_all() -> None:
    """There is no figure then, only the number of tokens."""
    nothing = tokens([np.nan] * 4, [False] * 4)
    result = model_figures("q", nothing, group_of(2, 2), reference=nothing)
    assert math.isnan(result.perplexity)
    assert (result.perplexity_error, result.kl, result.reverse_kl) == (None, None, None)
    assert (result.by_position, result.by_confidence) == ((), ())
    assert (result.nonfinite, result.tokens_by_chunk) == (4, (0, 0))
    assert floor_figures(nothing, group_of(2, 2), [0, 1], "float32") is None


# Floors.


def test_a_floor_is_of_some_chunks() -> None:
    """Chunks that were not run again, and tokens that are not finite, do not count."""
    kl = [0.5, 0.25, 9, 9, 1, np.nan]
    found = tokens(
        [1] * 6, [True, True, True, True, True, False], kl=kl, same_top=[1, 0, 0, 0, 1, 0], overlap=[1, 0, 0, 0, 1, 0]
    )
    floor = floor_figures(found, group_of(2, 2, 2), [0, 2], "float32")
    assert floor is not None
    assert floor.kl == pytest.approx(1.75 / 3)
    assert floor.standard_error == pytest.approx(ratio_error([0.75, 1], [2, 1]))
    assert floor.same_top == pytest.approx(2 / 3)
    assert (floor.chunks, floor.tokens, floor.arithmetic) == (2, 3, "float32")
    of_one = floor_figures(found, group_of(2, 2, 2), [0], "float32")
    assert of_one is not None
    assert (of_one.kl, of_one.standard_error) == (0.375, None)


# Pairs.


def several(count: int, *, reference: bool) -> tuple[GroupTokens, list[ModelFigures]]:
    """Models of 12 chunks of 10 tokens, the first of them the reference if there is one."""
    group = group_of(*[10] * 12)
    base = random_tokens(120)
    found = [model_figures("reference", base, group, reference=None)] if reference else []
    for number in range(count - len(found)):
        other = random_tokens(120, number + 1)
        found.append(model_figures("abcd"[number], other, group, reference=base if reference else None))
    return group, found


def test_candidates_are_paired_by_loss_and_kl() -> None:
    """With a reference every two candidates are paired, never the reference; the numbers are the bootstrap's."""
    group, found = several(4, reference=True)
    context = context_figures(64, "digest", group, found)
    assert (context.context, context.digest, context.chunks, context.tokens) == (64, "digest", 12, 120)
    assert context.chunk_tokens == (10,) * 12
    assert context.models == tuple(found)
    named = [(pair.a, pair.b, pair.figure) for pair in context.pairs]
    assert named == [(a, b, figure) for a, b in ("ab", "ac", "bc") for figure in ("loss", "kl")]
    _, a, b, _ = found
    for pair, left, right in (
        (context.pairs[0], a.nll_by_chunk, b.nll_by_chunk),
        (context.pairs[1], spread(a).by_chunk, spread(b).by_chunk),
    ):
        expected = paired_bootstrap(left, right, [10] * 12)
        assert pair.difference == pytest.approx((sum(left) - sum(right)) / 120)
        assert (pair.low, pair.high, pair.p, pair.chunks) == (expected.low, expected.high, expected.p, 12)
        assert pair.more_tokens == tokens_to_settle(left, right, [10] * 12, p=expected.p)
        assert pair.more_tokens is not None
        assert (pair.more_tokens == 0) == (expected.p is not None and expected.p < 0.05)


@pytest.mark.parametrize("kinds", [("exact", "lower bound"), ("estimate", "lower bound"), ("exact", "estimate")])
def test_kl_of_two_kinds_is_not_paired(kinds: tuple[KLKind, KLKind]) -> None:
    """A lower bound is smaller whoever is better: it is paired with its like alone, and losses are paired always."""
    group, found = several(3, reference=True)
    found[1:] = [replace(one, kl_kind=kind) for one, kind in zip(found[1:], kinds, strict=True)]
    assert [pair.figure for pair in context_figures(64, "", group, found).pairs] == ["loss"]
    found[1:] = [replace(one, kl_kind=kinds[1]) for one in found[1:]]
    assert [pair.figure for pair in context_figures(64, "", group, found).pairs] == ["loss", "kl"]


def test_p_values_know_how_many_pairs_there_are() -> None:
    """Holm's p is over the pairs of all contexts together; a pair without a p has no adjusted p and does not count."""
    (few,) = context_figures(64, "", *several(2, reference=False)).pairs
    pairs = [replace(few, p=p) for p in (0.01, 0.02, None, 0.5)]
    empty = ContextFigures(context=64, chunks=0, tokens=0, digest="", chunk_tokens=(), models=(), pairs=())
    found = with_holm([replace(empty, pairs=tuple(pairs[:1])), replace(empty, pairs=tuple(pairs[1:]))])
    assert [[pair.p_holm for pair in context.pairs] for context in found] == [[0.03], [0.04, None, 0.5]]
    assert [pair.p for context in found for pair in context.pairs] == [0.01, 0.02, None, 0.5]


def test_without_a_reference_losses_are_paired() -> None:
    """All models are candidates then, and there is no KL."""
    context = context_figures(64, "", *several(3, reference=False))
    assert [(pair.a, pair.b, pair.figure) for pair in context.pairs] == [(a, b, "loss") for a, b in ("ab", "ac", "bc")]


@pytest.mark.parametrize("reference", [True, False])
def test_one_candidate_has_no_pair(*, reference: bool) -> None:
    """One candidate is not paired, not even with its reference."""
    assert context_figures(64, "", *several(2 if reference else 1, reference=reference)).pairs == ()


@pytest.mark.parametrize("reference", [True, False])
def test_models_with_tokens_left_out_are_not_paired(*, reference: bool) -> None:
    """Their remaining tokens differ from the others': only the other models are paired."""
    group, found = several(3 + reference, reference=reference)
    broken = random_tokens(120, 9)
    broken.finite[17] = False
    found[-1] = model_figures("c", broken, group, reference=random_tokens(120) if reference else None)
    assert {(pair.a, pair.b) for pair in context_figures(64, "", group, found).pairs} == {("a", "b")}


def test_a_reference_beside_candidates_without_a_finite_token() -> None:
    """No candidate has a KL, but the first model is still their reference, which nothing is paired with."""
    group, found = several(2, reference=True)
    nothing = tokens([np.nan] * 120, [False] * 120)
    found[1] = model_figures("a", nothing, group, reference=random_tokens(120))
    assert context_figures(64, "", group, found).pairs == ()


def test_few_chunks_settle_nothing() -> None:
    """Four chunks have a difference, no interval and no p, and more tokens are asked for."""
    group = group_of(*[10] * 4)
    found = [model_figures(name, random_tokens(40, n), group, reference=None) for n, name in enumerate("ab")]
    (pair,) = context_figures(64, "", group, found).pairs
    assert (pair.low, pair.high, pair.p, pair.chunks) == (None, None, None, 4)
    assert pair.more_tokens is not None
    assert pair.more_tokens > 0
