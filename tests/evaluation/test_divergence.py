"""KL and its relatives for a piece of tokens, against plain fp64 formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from snugfit.evaluation.divergence import ServedTop, Softmax, diverge, exact_kl, softmax
from snugfit.evaluation.reference import condense


def pair(tokens: int = 40, vocabulary: int = 500, gap: float = 0.3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    first = torch.randn(tokens, vocabulary, generator=generator) * 3
    return first, first + gap * torch.randn(tokens, vocabulary, generator=generator)


def plain_kl(p: Tensor, q: Tensor) -> Tensor:
    log_p, log_q = torch.log_softmax(p.double(), -1), torch.log_softmax(q.double(), -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@pytest.mark.parametrize("gap", [1e-3, 0.3, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_divergence(gap: float, dtype: torch.dtype) -> None:
    """KL both ways is the fp64 formula's to 1e-6 nats, however small."""
    p, q = (logits.to(dtype) for logits in pair(gap=gap))
    found = diverge(softmax(p), softmax(q))
    assert torch.allclose(found.kl.double(), plain_kl(p, q), atol=1e-6, rtol=1e-5)
    assert torch.allclose(found.reverse.double(), plain_kl(q, p), atol=1e-6, rtol=1e-5)


def test_large_logits_keep_small_differences() -> None:
    """An offset of a thousand, which no probability sees, costs no accuracy beyond that of the logits themselves."""
    p, q = (logits.double() for logits in pair(gap=1e-2))
    found = diverge(softmax((p + 1024).float()), softmax((q - 512).float()))
    assert torch.allclose(found.kl.double(), plain_kl((p + 1024).float(), (q - 512).float()), atol=3e-7, rtol=1e-4)


def test_loss_confidence_and_top() -> None:
    """Loss is the cross entropy of the true token, confidence the largest probability, top its place."""
    p, _ = pair()
    targets = torch.arange(40)
    found = softmax(p)
    assert torch.allclose(found.loss(targets), torch.nn.functional.cross_entropy(p, targets, reduction="none"))
    best, place = torch.softmax(p, -1).max(-1)
    assert torch.allclose(found.confidence, best)
    assert torch.equal(found.top, place)


def test_ties_agree() -> None:
    """Where the reference has two equally likely tokens, either of them is the same top token."""
    reference = softmax(torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 0.0]]))
    other = softmax(torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 2.0]]))
    assert diverge(reference, other).same_top.tolist() == [True, True, False]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_logits_are_marked(bad: float) -> None:
    """One NaN or infinite logit among thousands marks its token, and only that."""
    logits = torch.zeros(4, 3000)
    logits[2, 1234] = bad
    assert softmax(logits).finite.tolist() == [True, True, False, True]


def test_softmax_leaves_its_argument_alone() -> None:
    """fp32 logits are not overwritten."""
    logits, _ = pair()
    before = logits.clone()
    softmax(logits)
    assert torch.equal(logits, before)


def test_stored_reference_is_unbiased() -> None:
    """Estimates from 64 stored tokens and a sample of 32 scatter around the exact KL as their own variance predicts."""
    p, q = pair(tokens=30, vocabulary=5000, gap=0.5)
    reference, other, targets = softmax(p), softmax(q), torch.arange(30)
    exact = diverge(reference, other)
    runs = [diverge(condense(reference, targets, seed=seed), other) for seed in range(200)]
    means = torch.stack([run.kl.double() for run in runs]).mean(1)
    error = float(means.std()) / math.sqrt(len(runs))
    assert abs(float(means.mean()) - float(exact.kl.double().mean())) < 4 * error
    assert runs[0].bound is not None
    assert runs[1].bound is not None
    assert torch.equal(runs[0].bound, runs[1].bound)  # no sampling in it
    assert (runs[0].bound <= exact.kl + 1e-5).all()
    assert (runs[0].reverse <= exact.reverse + 1e-5).all()
    variances = torch.stack([run.variance for run in runs if run.variance is not None]).double()
    predicted = math.sqrt(float(variances.mean(0).sum())) / 30
    assert float(means.std()) == pytest.approx(predicted, rel=0.25)
    assert torch.equal(runs[0].same_top, exact.same_top)


def test_far_tokens_of_a_stored_reference_stay_finite() -> None:
    """Tokens that the reference all but rules out and the candidate does not give finite figures."""
    p = torch.zeros(1, 400)
    p[0, 1:] = -150.0
    found = diverge(condense(softmax(p), torch.zeros(1, dtype=torch.int64), seed=0), softmax(torch.zeros(1, 400)))
    assert found.kl.isfinite().all()
    assert found.reverse.isfinite().all()


def test_stored_reference_without_a_tail_is_exact() -> None:
    """Where all tokens were stored nothing is sampled, and KL is exact."""
    p, q = pair(vocabulary=50)
    stored = condense(softmax(p), torch.arange(40), seed=1)
    found = diverge(stored, softmax(q))
    assert torch.allclose(found.kl, diverge(softmax(p), softmax(q)).kl, atol=1e-5)
    assert found.variance is not None
    assert float(found.variance.max()) < 1e-10


def served(logits: Tensor, top: int) -> ServedTop:
    best, ids = torch.log_softmax(logits, -1).topk(top, -1)
    return ServedTop(ids, best, torch.zeros(len(logits)))


def test_served_tokens_give_a_lower_bound() -> None:
    """What a server names bounds KL from below, more closely the more it names, exactly where it names all."""
    p, q = pair(vocabulary=200, gap=1.0)
    exact = diverge(softmax(p), softmax(q))
    bounds = [diverge(softmax(p), served(q, top)) for top in (1, 5, 50, 200)]
    for bound in bounds:
        assert (bound.kl <= exact.kl + 1e-4).all()
        assert (bound.reverse <= exact.reverse + 1e-4).all()
        assert torch.equal(bound.same_top, exact.same_top)
    means = [float(bound.kl.mean()) for bound in bounds]
    assert means == sorted(means)
    assert torch.allclose(bounds[-1].kl, exact.kl, atol=1e-4)


def test_served_blanks_are_left_out() -> None:
    """Places that a server left empty change nothing."""
    p, q = pair(vocabulary=200)
    full = served(q, 10)
    padded = ServedTop(
        torch.cat([full.ids, torch.full((40, 2), -1)], 1),
        torch.cat([full.logprobs, torch.full((40, 2), -math.inf)], 1),
        full.losses,
    )
    assert torch.allclose(diverge(softmax(p), full).kl, diverge(softmax(p), padded).kl)


def test_a_pair_without_a_formula_is_a_defect() -> None:
    """Two served predictions cannot be compared: asking for it is a defect."""
    top = served(pair()[0], 3)
    with pytest.raises(AssertionError, match="ServedTop"):
        diverge(top, top)
    assert isinstance(softmax(torch.zeros(1, 2)), Softmax)


# The expected acceptance rate: the overlap of two predictions.


def plain_overlap(p: Tensor, q: Tensor) -> Tensor:
    return torch.minimum(torch.softmax(p.double(), -1), torch.softmax(q.double(), -1)).sum(-1)


@pytest.mark.parametrize("gap", [0.0, 1e-3, 0.3, 3.0])
def test_overlap_of_complete_predictions(gap: float) -> None:
    """It is sum min(p, q) in fp64 to 1e-6, the same both ways, 1 for equal predictions, and 1 - total variation."""
    p, q = pair(gap=gap)
    found = diverge(softmax(p), softmax(q)).overlap.double()
    assert torch.allclose(found, plain_overlap(p, q), atol=1e-6)
    assert torch.allclose(found, diverge(softmax(q), softmax(p)).overlap.double(), atol=1e-6)
    assert bool((found <= 1).all())
    if gap == 0:
        assert torch.allclose(found, torch.ones_like(found), atol=1e-6)


def test_overlap_by_hand() -> None:
    """Two tokens with 0.9 and 0.1 against 0.6 and 0.4 overlap by 0.7."""
    p, q = (torch.tensor([[share, 1 - share]]).log() for share in (0.9, 0.6))
    assert diverge(softmax(p), softmax(q)).overlap.item() == pytest.approx(0.7, abs=1e-6)


def test_overlap_with_a_stored_reference_is_unbiased() -> None:
    """Its mean over many samples of the tail is the exact overlap."""
    p, q = pair(tokens=6, vocabulary=5000, gap=0.5)
    reference, other, targets = softmax(p), softmax(q), torch.arange(6)
    found = torch.stack([diverge(condense(reference, targets, seed=seed), other).overlap for seed in range(200)])
    error = found.double().std(0) / math.sqrt(200)
    assert bool(((found.double().mean(0) - plain_overlap(p, q)).abs() < 4 * error + 1e-6).all())


def test_overlap_with_a_server_is_an_upper_bound() -> None:
    """Tokens that a server does not name count as one: never less than the exact overlap, equal if all are named."""
    p, q = pair(tokens=20, vocabulary=300, gap=1.0)
    exact = plain_overlap(p, q)
    for k in (1, 8, 300):
        best = torch.log_softmax(q, -1).topk(k)
        served = ServedTop(best.indices, best.values, torch.zeros(20))
        found = diverge(softmax(p), served).overlap.double()
        assert bool((found >= exact - 1e-6).all())
        if k == 300:
            assert torch.allclose(found, exact, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kl_alone_has_the_bits_of_the_whole_divergence(dtype: torch.dtype) -> None:
    """KL alone is bit for bit that of all figures, leaves the logits alone, and is NaN where one was not finite."""
    p, q = (logits.to(dtype) for logits in pair())
    q[3, 7] = math.inf
    before = q.clone()
    found, whole = exact_kl(softmax(p), q), diverge(softmax(p), softmax(q)).kl
    assert found.isnan().nonzero().tolist() == [[3]]
    assert torch.equal(found[torch.arange(40) != 3], whole[torch.arange(40) != 3])
    assert torch.equal(q, before)
