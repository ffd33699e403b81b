"""From figures of tokens to those that people read, by hand; tables and plots of a record whose numbers are known."""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from numpy.typing import NDArray

from snugfit.evaluation.figures import (
    CONFIDENCE_EDGES,
    Group,
    context_figures,
    floor_figures,
    model_figures,
    position_edges,
    with_holm,
)
from snugfit.evaluation.measure import TokenFigures
from snugfit.evaluation.significance import paired_bootstrap, tokens_to_settle
from snugfit.records.evaluation import (
    Bin,
    ContextFigures,
    EvalRecord,
    Floor,
    ModelFigures,
    PairFigures,
    Spread,
    TextRecord,
)
from snugfit.report.plots import write_plots
from snugfit.report.tables import Sheet, all_sheets, evaluation_sheets, to_csv, to_markdown

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
    )


def group_of(*counts: int, first: int = 0) -> Group:
    """Chunks of so many scored tokens, from position 1 on."""
    return Group(counts, np.concatenate([np.arange(1, count + 1) for count in counts]), first)


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
    found = tokens([1.5, 2, 8.25, 9.25, 10.5, 3.75], kl=kl, reverse=kl, same_top=kl, change=kl)
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
    """The reference has none; where a token was left out on either side, in this group, there is none either."""
    base, found = random_tokens(20), random_tokens(20, 1)
    if side != "neither":
        (base if side == "reference" else found).finite[12] = False
    there, elsewhere = group_of(10, first=10), group_of(5, 5)
    assert (model_figures("q", found, there, reference=base).loss_change is None) == (side != "neither")
    assert model_figures("q", found, elsewhere, reference=base).loss_change is not None
    alone = model_figures("p", base, elsewhere, reference=None)
    assert (alone.loss_change, alone.loss_change_error) == (None, None)


def test_the_reference_has_no_divergence() -> None:
    """What is compared with nothing has losses and bins by its own confidence, and nothing else."""
    found = model_figures("p", random_tokens(40), group_of(20, 20), reference=None)
    assert (found.kl, found.reverse_kl, found.same_top, found.same_top_error, found.rms_change) == (None,) * 5
    assert sum(b.tokens for b in found.by_confidence) == sum(b.tokens for b in found.by_position) == 40
    assert all(b.kl is None and b.kl_error is None and b.same_top is None for b in found.by_position)


@pytest.mark.parametrize(("kind", "expected"), [("exact", None), ("lower bound", None), ("estimate", math.sqrt(7) / 4)])
def test_an_estimate_tells_its_sampling_error(kind: str, expected: float | None) -> None:
    """Variances of tokens add up to one error of the mean where KL is an estimate, and only there."""
    found = tokens([1] * 4, kl=[1] * 4, reverse=[1] * 4, same_top=[1] * 4, change=[0] * 4, variance=[1, 2, 4, 0])
    result = model_figures("q", found, group_of(2, 2), reference=found, kl_kind=kind)
    assert result.kl_kind == kind
    assert result.kl_sampling_error == (None if expected is None else pytest.approx(expected))


def test_one_chunk_has_no_errors() -> None:
    """Nothing tells how much another chunk would differ: every error is None."""
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


def test_groups_take_their_own_tokens() -> None:
    """A group that does not come first has the same figures as its tokens alone."""
    whole = random_tokens(50)
    alone = TokenFigures(**{name: getattr(whole, name)[20:] for name in (*FIELDS, "finite")})
    expected = model_figures("q", alone, group_of(10, 20), reference=alone)
    assert model_figures("q", whole, group_of(10, 20, first=20), reference=whole) == expected


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
    found = tokens(loss, kl=kl, reverse=kl, same_top=[1, 1, 0, 1, 0, 1, 1], change=[0] * 7)
    result = model_figures("q", found, Group([4, 3], positions, 0), reference=tokens(loss, confidence=[1] * 7))
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
    found = tokens([1] * 10, confidence=[0.3] * 10, kl=kl, reverse=kl, same_top=[1] * 10, change=[0] * 10)
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
    """Figures are those of the other tokens alone, chunk by chunk, and the number of those left out is told."""
    whole = random_tokens(60)
    finite = np.random.default_rng(1).uniform(size=60) > 0.3
    arrays = {name: np.where(finite, getattr(whole, name), np.nan).astype(np.float32) for name in FIELDS}
    found = TokenFigures(finite=finite, **arrays)
    group = group_of(20, 20, 20)
    result = model_figures("q", found, group, reference=whole, kl_kind="estimate")
    rest = TokenFigures(finite=np.ones(finite.sum(), bool), **{name: getattr(whole, name)[finite] for name in FIELDS})
    counts = [int(part.sum()) for part in np.split(finite, 3)]
    expected = model_figures("q", rest, Group(counts, group.positions[finite], 0), reference=rest, kl_kind="estimate")
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
    found = tokens([1] * 6, [True, True, True, True, True, False], kl=kl, same_top=[1, 0, 0, 0, 1, 0])
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


def several(count: int, *, reference: bool) -> tuple[Group, list[ModelFigures]]:
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
        told = paired_bootstrap(left, right, [10] * 12)
        assert pair.difference == pytest.approx((sum(left) - sum(right)) / 120)
        assert (pair.low, pair.high, pair.p, pair.chunks) == (told.low, told.high, told.p, 12)
        assert pair.more_tokens == tokens_to_settle(left, right, [10] * 12, p=told.p)
        assert pair.more_tokens is not None
        assert (pair.more_tokens == 0) == (told.p is not None and told.p < 0.05)


@pytest.mark.parametrize("kinds", [("exact", "lower bound"), ("estimate", "lower bound"), ("exact", "estimate")])
def test_kl_of_two_kinds_is_not_paired(kinds: tuple[str, str]) -> None:
    """A lower bound is smaller whoever is better: it is paired with its like alone, and losses are paired always."""
    group, found = several(3, reference=True)
    found[1:] = [replace(one, kl_kind=kind) for one, kind in zip(found[1:], kinds, strict=True)]
    assert [pair.figure for pair in context_figures(64, "", group, found).pairs] == ["loss"]
    found[1:] = [replace(one, kl_kind=kinds[1]) for one in found[1:]]
    assert [pair.figure for pair in context_figures(64, "", group, found).pairs] == ["loss", "kl"]


def test_p_values_know_how_many_pairs_there_are() -> None:
    """Holm's p is over the pairs of all contexts together; without a p there is none, and it does not count."""
    (few,) = context_figures(64, "", *several(2, reference=False)).pairs
    pairs = [replace(few, p=p) for p in (0.01, 0.02, None, 0.5)]
    empty = ContextFigures(64, 0, 0, "", (), (), ())
    found = with_holm([replace(empty, pairs=tuple(pairs[:1])), replace(empty, pairs=tuple(pairs[1:]))])
    assert [[pair.p_holm for pair in context.pairs] for context in found] == [[0.03], [0.04, None, 0.5]]
    assert [pair.p for context in found for pair in context.pairs] == [0.01, 0.02, None, 0.5]


def test_without_a_reference_losses_are_paired() -> None:
    """All models are candidates then, and KL there is none."""
    context = context_figures(64, "", *several(3, reference=False))
    assert [(pair.a, pair.b, pair.figure) for pair in context.pairs] == [(a, b, "loss") for a, b in ("ab", "ac", "bc")]


@pytest.mark.parametrize("reference", [True, False])
def test_one_candidate_has_no_pair(*, reference: bool) -> None:
    """One candidate is not paired, least of all with its reference."""
    assert context_figures(64, "", *several(2 if reference else 1, reference=reference)).pairs == ()


@pytest.mark.parametrize("reference", [True, False])
def test_models_with_tokens_left_out_are_not_paired(*, reference: bool) -> None:
    """What is left of them is not the same tokens: pairs are of the other models alone."""
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


# A record whose numbers are known.


def model(name: str, **given: Any) -> ModelFigures:
    bins = (Bin(1, 2, 3, 8.0, 0.5), Bin(2, 4, 5, 7.0, None))
    settings: dict[str, Any] = {
        "perplexity": 7.25,
        "perplexity_error": 0.5,
        "nll_by_chunk": (800.0, 1200.0),
        "tokens_by_chunk": (600, 634),
        "nonfinite": 0,
        "by_position": bins,
        "by_confidence": (Bin(0.0, 0.1, 3, 9.0, None), Bin(0.99, 1.0, 5, 6.0, None)),
    }
    return ModelFigures(name=name, **(settings | given))


def candidate(name: str, **given: Any) -> ModelFigures:
    bins = (Bin(1, 2, 3, 8.5, 0.5, 0.5, 0.25, 0.5), Bin(2, 4, 5, 7.5, None, 0.125, None, 1.0))
    settings: dict[str, Any] = {
        "kl": Spread(0.125, 0.0625, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, (60.0, 94.0)),
        "reverse_kl": Spread(0.25, None, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, (60.0, 94.0)),
        "same_top": 0.875,
        "same_top_error": 0.01,
        "rms_change": 0.0123,
        "loss_change": 0.03125,
        "loss_change_error": 0.0025,
        "by_position": bins,
        "by_confidence": (Bin(0.0, 0.1, 3, 9.0, None, 0.75, 0.5), Bin(0.99, 1.0, 5, 6.0, None, 0.25, None)),
    }
    return model(name, **(settings | given))


FLOOR = Floor(0.0012, 0.0001, 0.99, 2, 300, "float32")


def record_of(*contexts: tuple[int, Sequence[ModelFigures], Sequence[PairFigures]], **given: Any) -> EvalRecord:
    figures = tuple(
        ContextFigures(length, 2, 1234, "0123456789abcdef" * 4, (600, 634), tuple(models), tuple(pairs))
        for length, models, pairs in contexts
    )
    settings: dict[str, Any] = {
        "snugfit": "9.9",
        "arguments": {"activations": "vllm-blackwell"},
        "metrics_version": 1,
        "reference": {"name": "base", "arithmetic": "bfloat16"},
        "candidates": (
            {"name": "plain", "formats": {}, "kv_cache": None},
            {"name": "small", "formats": {"nvfp4": 14, "fp8-dynamic": 7}, "kv_cache": None},
        ),
        "texts": (TextRecord("a.txt", "f" * 64, "text"),),
        "contexts": figures,
        "chat": None,
        "seconds": {"total": 12.3},
        "peak_rss_bytes": 1,
        "peak_gpu_bytes": None,
        "hardware": {"processor": "abacus", "gpu": None},
        "versions": {"torch": "2", "transformers": "5"},
    }
    return EvalRecord(**(settings | given))


PAIRS = (
    PairFigures("plain", "small", "loss", -0.25, -0.5, -0.125, 0.0002, 12, 0, 0.0004),
    PairFigures("plain", "small", "kl", 0.03125, -0.25, 0.5, 0.04, 12, 123456, 0.08),
    PairFigures("plain", "c", "kl", 0.5, None, None, None, 4, None),
)


@pytest.fixture
def record() -> EvalRecord:
    """Two contexts of a reference and two candidates, and pairs of them at the first."""
    base = model("base", floor=FLOOR)
    small = candidate("small", kl_kind="estimate", kl_sampling_error=0.00045, floor=replace(FLOOR, kl=0.0034))
    served = candidate("m|n (served)", kl_kind="lower bound", perplexity_error=None)
    return record_of(
        (1024, [base, candidate("plain"), small], PAIRS),
        (4096, [base, served, candidate("bad", perplexity=math.nan, nonfinite=17, kl=None, reverse_kl=None)], ()),
    )


def rows_of(sheet: Sheet) -> list[dict[str, str]]:
    return [dict(zip(sheet.headings, row, strict=True)) for row in sheet.rows]


def test_the_table_of_figures(record: EvalRecord) -> None:
    """Estimates have a ~, bounds a >=, floors are the reference's and the candidate's own, NaN is a dash."""
    sheet = all_sheets(record)[0]
    base, plain, small, again, served, bad = rows_of(sheet)
    assert base == dict.fromkeys(sheet.headings, "") | {
        "context": "1,024 tokens",
        "model": "base (reference)",
        "tokens": "1,234",
        "perplexity": "7.250 +- 0.500",
    }
    assert plain == base | {
        "model": "plain",
        "KL": "0.1250 +- 0.0625",
        "floor": "0.0012",
        "loss - reference": "+0.0312 +- 0.0025",
        "median": "0.0300",
        "p99": "0.3000",
        "p99.9": "0.4000",
        "max": "0.5000",
        "reverse KL": "0.2500",
        "same top": "87.50%",
        "RMS dp": "0.0123",
    }
    marked = {name: f">= {plain[name]}" for name in ("median", "p99", "p99.9", "max", "reverse KL")}
    assert small == plain | marked | {"model": "small", "KL": "~0.1250 +- 0.0625", "floor": "0.0012 / 0.0034"}
    assert again == base | {"context": "4,096 tokens"}
    assert (served["model"], served["KL"], served["perplexity"]) == ("m|n (served)", ">= 0.1250 +- 0.0625", "7.250")
    assert (bad["perplexity"], bad["KL"], bad["floor"], bad["not finite"]) == ("-", "", "", "17")


def test_a_terminal_shows_the_main_figures(record: EvalRecord) -> None:
    """Few columns, with the cells of the report; no column that is empty throughout."""
    sheet, pairs = evaluation_sheets(record)
    assert sheet.headings == ("context", "model", "perplexity", "KL", "floor", "same top", "not finite")
    wide = rows_of(all_sheets(record)[0])
    for narrow, full in zip(rows_of(sheet), wide, strict=True):
        assert narrow == {name: full[name] for name in sheet.headings} | {"context": full["context"].split()[0]}
    assert pairs.headings == ("context", "A", "B", "figure", "A - B", "p (Holm)")
    assert [row["p (Holm)"] for row in rows_of(pairs)] == ["< 0.001", "0.080", "too few chunks"]
    (bare,) = evaluation_sheets(record_of((0, [model("base"), candidate("plain")], ())))
    assert bare.headings == ("context", "model", "perplexity", "KL", "same top")
    assert bare.rows[0][0] == "chat and rows"
    assert "RMS dp" not in bare.note


def test_without_a_reference_there_is_perplexity() -> None:
    """No empty columns, nobody is marked, and the note says what is missing."""
    alone = record_of((1024, [model("a"), model("b")], ()), reference=None)
    for sheet in (evaluation_sheets(alone)[0], all_sheets(alone)[0]):
        assert sheet.title == "Perplexity"
        assert set(sheet.headings) <= {"context", "model", "tokens", "perplexity", "not finite"}
        assert [row["model"] for row in rows_of(sheet)] == ["a", "b"]
        assert "Name the original with --reference to see KL." in sheet.note
        assert "RMS dp" not in sheet.note


def test_one_in_a_thousand_wants_a_thousand() -> None:
    """Of fewer tokens p99.9 is drawn towards the largest: no table shows it."""
    small = record_of((64, [model("base"), candidate("few", tokens_by_chunk=(600, 399)), candidate("many")], ()))
    _, few, many = rows_of(all_sheets(small)[0])
    assert (few["p99.9"], few["p99"], many["p99.9"]) == ("", "0.3000", "0.4000")
    _, in_csv, _ = csv.DictReader(io.StringIO(to_csv(small)))
    assert (in_csv["kl_p999"], in_csv["kl_p99"]) == ("", "0.3")


@pytest.mark.parametrize(
    ("limit", "lengths", "told"), [(6, (64, 128), True), (6, (64, 0), False), (None, (64, 128), False)]
)
def test_lengths_of_other_text_say_so(limit: int | None, lengths: tuple[int, ...], *, told: bool) -> None:
    """--max-chunks gives each length its own text, which matters from two lengths on."""
    cut = record_of(
        *((length, [model("base"), candidate("a")], ()) for length in lengths),
        arguments={"activations": "none", "max_chunks": limit},
    )
    for sheets in (evaluation_sheets(cut), all_sheets(cut)):
        assert ("Each length has other text: --max-tokens compares" in sheets[0].note) == told


def test_notes_explain_what_is_there_and_nothing_else(record: EvalRecord) -> None:
    """Floors, ~, >= and tokens left out are each explained where they occur, and only there."""
    marks = ("Floor:", "~:", ">=:", "NaN or infinite")
    note = all_sheets(record)[0].note
    assert "root mean square change of the true token's probability" in note
    assert all(mark in note for mark in marks)
    assert "4.5e-04" in note
    plainly = evaluation_sheets(record_of((1024, [model("base"), candidate("plain")], ())))[0].note
    assert not any(mark in plainly for mark in marks)
    assert "one standard error over chunks" in plainly


def test_the_table_of_pairs(record: EvalRecord) -> None:
    """Bold is what is significant after Holm, what is settled says so, and too few chunks have no interval and p."""
    figures, _, pairs, *_ = all_sheets(record)
    assert figures.title == "Loss against the reference"
    loss, kl, few = rows_of(pairs)
    assert loss == {
        "context": "1,024 tokens",
        "A": "plain",
        "B": "small",
        "figure": "loss",
        "A - B": "**-0.2500**",
        "95 % interval": "-0.5000 .. -0.1250",
        "p": "< 0.001",
        "p (Holm)": "< 0.001",
        "chunks": "12",
        "more tokens to settle": "settled",
    }
    assert (kl["A - B"], kl["p"], kl["p (Holm)"], kl["more tokens to settle"]) == (
        "+0.0312",
        "0.040",
        "0.080",
        "123,456",
    )
    assert kl["figure"] == "KL"
    assert (few["95 % interval"], few["p"], few["p (Holm)"], few["more tokens to settle"]) == (
        "",
        "too few chunks",
        "",
        "",
    )
    assert len(evaluation_sheets(record_of((1024, [model("base"), candidate("plain")], ())))) == 1


def test_pairs_that_cannot_be_told_apart() -> None:
    """Without a p no tokens are asked for; where nothing differs that is said instead of an interval of no width."""
    pairs = (
        PairFigures("a", "b", "loss", 0.0, 0.0, 0.0, 1.0, 12, None, 1.0),
        PairFigures("a", "b", "kl", 0.5, None, None, None, 4, 777),
        PairFigures("a", "c", "kl", 0.5, None, None, None, 12, None),
    )
    found = record_of((64, [model("base"), candidate("a"), candidate("b")], pairs))
    same, few, equal = rows_of(all_sheets(found)[1])
    assert (same["A - B"], same["95 % interval"], same["more tokens to settle"]) == ("+0.0000", "no difference", "")
    assert (few["p"], few["more tokens to settle"]) == ("too few chunks", "")
    assert equal["p"] == "no spread"


def markdown_tables(text: str) -> dict[str, list[list[str]]]:
    """Tables by title, a list of cells a line, the headings first."""
    found: dict[str, list[list[str]]] = {}
    title = ""
    for line in text.splitlines():
        if line.startswith("## "):
            title = line.removeprefix("## ")
        elif line.startswith("| "):
            cells = line.replace("\\|", "\0").strip("| ").split(" | ")
            found.setdefault(title, []).append([cell.strip("| ").replace("\0", "|") for cell in cells])
    return found


def test_the_report(record: EvalRecord) -> None:
    """Markdown has every sheet, each line as wide as its headings, and what was measured on what."""
    text = to_markdown(record)
    tables = markdown_tables(text)
    assert (
        list(tables)
        == [sheet.title for sheet in all_sheets(record)]
        == [
            "Loss against the reference",
            "Perplexity by context length",
            "Candidates against each other",
            "By position, 1,024 tokens",
            "By the reference's largest probability, 1,024 tokens",
            "By position, 4,096 tokens",
            "By the reference's largest probability, 4,096 tokens",
        ]
    )
    assert "m\\|n (served)" in text
    assert "m|n" not in text
    assert tables["By position, 1,024 tokens"][1:] == [
        ["1 .. 1", "3", "8.000", "8.500", "0.5000 +- 0.2500", "8.500", "0.5000 +- 0.2500"],
        ["2 .. 3", "5", "7.000", "7.500", "0.1250", "7.500", "0.1250"],
    ]
    assert tables["By the reference's largest probability, 1,024 tokens"][2][:2] == ["0.99 .. 1", "5"]
    for line in (
        "- reference: base, bfloat16",
        "- plain: 16-bit",
        "- small: nvfp4 x 14, fp8-dynamic x 7",
        f"- a.txt: SHA-256 {'f' * 64}",
        "- 1,024 tokens: 2 chunks, 1,234 tokens scored, digest 0123456789abcdef",
        "- abacus, torch 2",
    ):
        assert line in text


def test_no_figure_is_a_dash_in_every_table(record: EvalRecord) -> None:
    """A model without a finite token has no perplexity: no table writes nan or inf."""
    for sheet in all_sheets(record):
        words = {word for row in sheet.rows for cell in row for word in cell.split()}
        assert not words & {"nan", "inf"}, sheet.title


def test_a_model_without_figures_does_not_hide_the_others() -> None:
    """Where the first candidate has no finite token, tables by the reference's confidence still show the second."""
    bad = candidate(
        "bad", perplexity=math.nan, nonfinite=1234, kl=None, reverse_kl=None, by_position=(), by_confidence=()
    )
    titles = [sheet.title for sheet in all_sheets(record_of((1024, [model("base"), bad, candidate("plain")], ())))]
    assert "By the reference's largest probability, 1,024 tokens" in titles


def test_a_served_model_is_not_called_16_bit() -> None:
    """What a server's weights are stored in is not known here, so the report does not say that they are in 16 bits."""
    server = {"url": "http://localhost:8000", "engine": "vllm", "version": "0.32.0", "model": "org/m", "root": "org/m"}
    served = {"name": "m (served)", "max_model_len": 4096, "top": 20, "kernels": {"linear": ()}} | server
    found = [model("base"), candidate("m (served)", kl_kind="lower bound")]
    lines = to_markdown(record_of((1024, found, ()), candidates=(served,))).splitlines()
    (line,) = (line for line in lines if line.startswith("- m (served)"))
    assert "16-bit" not in line


def test_the_csv(record: EvalRecord) -> None:
    """One line for each context and model, numbers in full, nothing where there is nothing."""
    base, plain, small, _, served, bad = csv.DictReader(io.StringIO(to_csv(record)))
    assert {key for key, value in base.items() if not value} == {
        *("kl", "kl_error", "kl_kind", "kl_median", "kl_p90", "kl_p95", "kl_p99", "kl_p999", "kl_max"),
        *("reverse_kl", "same_top", "rms_change", "loss_change", "loss_change_error"),
    }
    assert (base["context"], base["model"], base["tokens"], base["floor_kl"]) == ("1024", "base", "1234", "0.0012")
    assert (plain["kl"], plain["kl_error"], plain["kl_p999"], plain["kl_max"]) == ("0.125", "0.0625", "0.4", "0.5")
    assert (plain["loss_change"], plain["loss_change_error"]) == ("0.03125", "0.0025")
    assert (plain["reverse_kl"], plain["same_top"], plain["floor_kl"]) == ("0.25", "0.875", "")
    assert (small["kl_kind"], small["floor_kl"], small["floor_tokens"]) == ("estimate", "0.0034", "300")
    assert (served["model"], served["kl_kind"], served["perplexity_error"]) == ("m|n (served)", "lower bound", "")
    assert (bad["kl"], bad["kl_kind"], bad["nonfinite"]) == ("", "", "17")


# Plots.


def test_plots_are_images_and_always_the_same(record: EvalRecord, tmp_path: Path) -> None:
    """Each plot is a PNG and an SVG that readers open, with every model's name, and comes out the same twice."""
    names = ["perplexity-by-context", "kl-by-context", "kl-by-position"]
    once, twice = tmp_path / "once", tmp_path / "twice"
    for folder in (once, twice):
        folder.mkdir()
        assert write_plots(record, folder) == [f"{name}.{ending}" for name in names for ending in ("png", "svg")]
    for file in once.iterdir():
        content = file.read_bytes()
        assert content == (twice / file.name).read_bytes(), file.name
        if file.suffix == ".png":
            assert content.startswith(b"\x89PNG\r\n\x1a\n")
            assert content.endswith(b"IEND\xaeB`\x82")
        else:
            assert ET.fromstring(content).tag == "{http://www.w3.org/2000/svg}svg"  # noqa: S314 - our own file
    comments = (once / "kl-by-context.svg").read_text()
    assert "<!-- plain -->" in comments
    assert "<!-- noise floor of the reference -->" in comments
    assert "<!-- noise floor of small -->" in comments
    losses = (once / "perplexity-by-context.svg").read_text()
    assert "<!-- base (reference) -->" in losses
    assert "<!-- 2 chunks, 1,234 tokens a length" in losses
    assert "bands: one standard error over chunks" in losses


@pytest.mark.parametrize(
    ("contexts", "expected"),
    [
        ([(1024, [model("a"), model("b")], ())], ["perplexity-by-position"]),
        (
            [(1024, [model("a")], ()), (2048, [model("a")], ())],
            ["perplexity-by-context", "perplexity-by-position"],
        ),
        ([(0, [model("a")], ())], ["perplexity-by-position-chat"]),
        ([(1024, [model("a", by_position=())], ())], []),
        ([(1024, [model("base"), candidate("a")], ())], ["kl-by-position"]),
        (
            [(1024, [model("base"), candidate("a")], ()), (0, [model("base"), candidate("a")], ())],
            ["kl-by-position", "kl-by-position-chat"],
        ),
    ],
)
def test_what_there_is_to_plot(
    tmp_path: Path, contexts: list[tuple[int, list[ModelFigures], tuple[PairFigures, ...]]], expected: list[str]
) -> None:
    """By context from two lengths of text on, KL only with a reference; by position the longest text, and chat."""
    written = write_plots(record_of(*contexts), tmp_path)
    assert written == [f"{name}.{ending}" for name in expected for ending in ("png", "svg")]
    assert {file.name for file in tmp_path.iterdir()} == set(written)


def test_without_a_reference_nobody_is_black(tmp_path: Path) -> None:
    """Black is the reference's colour; without one the first candidate has a candidate's."""
    models = [model("a"), model("b")]
    drawn = {}
    for name, reference in (("with", {"name": "a", "arithmetic": "float32"}), ("without", None)):
        (tmp_path / name).mkdir()
        write_plots(record_of((1024, models, ()), (2048, models, ()), reference=reference), tmp_path / name)
        drawn[name] = (tmp_path / name / "perplexity-by-context.svg").read_text()
    assert "#0072b2" in drawn["without"]
    assert "#d55e00" in drawn["without"]
    assert "#d55e00" not in drawn["with"]
    assert "<!-- a (reference) -->" in drawn["with"]
    assert "(reference)" not in drawn["without"]


@pytest.mark.parametrize("height", [0.0005, 0.1, -0.1])
def test_floors_are_drawn_wherever_they_are(tmp_path: Path, height: float) -> None:
    """Far below the lines, among them, or (of an estimate) below zero, where there is no logarithm."""
    base = model("base", floor=replace(FLOOR, kl=height))
    write_plots(record_of((1024, [base, candidate("a")], ()), (2048, [base, candidate("a")], ())), tmp_path)
    assert "<!-- noise floor of the reference -->" in (tmp_path / "kl-by-context.svg").read_text()


def test_figures_of_any_size_are_drawn(tmp_path: Path) -> None:
    """Infinite, enormous and negative values, and names that matplotlib would read otherwise, stop no plot."""
    estimate = candidate("$x_1$ {", kl=replace(spread(candidate("")), mean=-0.01), kl_kind="estimate")
    models = [model("_base"), estimate, candidate("b", perplexity=math.inf), candidate("c", perplexity=1e12)]
    written = write_plots(record_of((1024, models, ()), (2048, models, ())), tmp_path)
    assert len(written) == 6
