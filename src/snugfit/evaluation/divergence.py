"""How much two models' predictions of the next token differ, for some tokens at a time, in nats.

A prediction is complete (logits over the vocabulary), or was stored (a reference's most likely tokens, and a sample of
the others), or was served (a server's most likely tokens). KL(P || Q) = sum p log(p/q). The largest logit is subtracted
first, so that fp32 resolves differences of 1e-7.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Softmax:
    """Complete predictions: `logits` fp32 [n, V], largest 0 in each row; `finite` [n] false where any logit was not."""

    logits: Tensor
    top: Tensor
    finite: Tensor

    @cached_property
    def weights(self) -> Tensor:
        """exp(logits) [n, V], not normalised."""
        return self.logits.exp()

    @cached_property
    def total(self) -> Tensor:
        """Sum of the weights [n], so that probability = weight / total."""
        return self.weights.sum(-1)

    def loss(self, targets: Tensor) -> Tensor:
        """Negative log-likelihood [n] of token ids [n]."""
        return self.total.log() - self.logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)

    @property
    def confidence(self) -> Tensor:
        """Probability [n] of the most likely token."""
        return self.total.reciprocal()


@dataclass(frozen=True)
class _Top:
    """The k most likely tokens, best first: `ids`, `logprobs` [n, k] fp32; `losses` [n] of the true tokens."""

    ids: Tensor
    logprobs: Tensor
    losses: Tensor

    @property
    def confidence(self) -> Tensor:
        """Probability [n] of the most likely token."""
        return self.logprobs[:, 0].exp()

    def loss(self, _: Tensor) -> Tensor:
        """Negative log-likelihood [n] of the true tokens, stored beside the others."""
        return self.losses


@dataclass(frozen=True)
class StoredTop(_Top):
    """Predictions from a stored reference.

    `tail` [n]: the probability of all tokens but the k; `sample_ids`, `sample_logprobs` [n, m]: drawn from those others
    with replacement, each by its probability.
    """

    tail: Tensor
    sample_ids: Tensor
    sample_logprobs: Tensor

    @property
    def finite(self) -> Tensor:
        """Whether [n] the numbers are usable."""
        return self.logprobs.isfinite().all(-1) & self.losses.isfinite()


@dataclass(frozen=True)
class ServedTop(_Top):
    """Predictions of a server; entries that it left empty have id -1 and log probability -inf."""

    @property
    def finite(self) -> Tensor:
        """Whether [n] the numbers are usable."""
        return self.logprobs[:, 0].isfinite() & self.losses.isfinite() & ~self.logprobs.isnan().any(-1)


@dataclass(frozen=True)
class Divergence:
    """KL(P || Q) and KL(Q || P) [n] in nats, whether [n] Q's most likely token is (one of) P's, and their overlap.

    `overlap` [n] is sum min(p, q): the probability with which speculative decoding accepts a token that Q drafts for P
    (Leviathan et al. 2023, arXiv 2211.17192); an upper bound where Q is served.
    Where KL is an unbiased estimate, `variance` [n] is that of its sampling and `bound` [n] a lower bound without
    sampling; both are None otherwise.
    """

    kl: Tensor
    reverse: Tensor
    same_top: Tensor
    overlap: Tensor
    variance: Tensor | None = None
    bound: Tensor | None = None


Prediction = Softmax | StoredTop | ServedTop


def softmax(logits: Tensor) -> Softmax:
    """Predictions of logits [n, V] in any float dtype."""
    exact = logits.to(torch.float32, copy=True)
    largest = exact.amax(-1, keepdim=True)
    finite = exact.amin(-1).isfinite() & largest.squeeze(-1).isfinite()  # NaN carries through both
    # numpy's argmax is ten times faster than torch's on a CPU
    top = torch.from_numpy(exact.numpy().argmax(-1)) if exact.device.type == "cpu" else exact.argmax(-1)
    return Softmax(exact.sub_(largest), top, finite)


def diverge(of: Prediction, other: Prediction) -> Divergence:
    """Divergence of `other` (Q) from `of` (P): exact where both are complete.

    Where P was stored, KL is an estimate and its reverse a lower bound; where Q is served, both are lower bounds, which
    are exact if the server gave all tokens. Values that rounding made negative become zero, except in the estimate.
    """
    if isinstance(of, Softmax) and isinstance(other, Softmax):
        return _exact(of, other)
    if isinstance(of, StoredTop) and isinstance(other, Softmax):
        return _estimated(of, other)
    if isinstance(of, Softmax) and isinstance(other, ServedTop):
        return _bounded(of, other)
    raise AssertionError(f"no divergence of {type(other).__name__} from {type(of).__name__}")


def exact_kl(of: Softmax, logits: Tensor) -> Tensor:
    """KL(P || Q) [n] in nats alone, with the bits that `diverge` gives it; NaN where a logit was not finite.

    Q is complete: `logits` [n, V] in any float dtype, of which the probabilities are not needed one by one.
    """
    other = logits.to(torch.float32, copy=True)
    largest = other.amax(-1, keepdim=True)
    finite = of.finite & other.amin(-1).isfinite() & largest.squeeze(-1).isfinite()
    total = other.sub_(largest).exp().sum(-1)
    gap = torch.sub(of.logits, other, out=other)
    kl = torch.linalg.vecdot(of.weights, gap).div_(of.total).sub_((of.total / total).log()).clamp_(min=0)
    return torch.where(finite, kl, torch.nan)


def _exact(of: Softmax, other: Softmax) -> Divergence:
    gap = of.logits - other.logits
    shift = (of.total / other.total).log()
    kl = torch.linalg.vecdot(of.weights, gap).div_(of.total).sub_(shift)
    reverse = torch.linalg.vecdot(other.weights, gap).div_(other.total).neg_().add_(shift)
    same = of.logits.gather(-1, other.top.unsqueeze(-1)).squeeze(-1) >= 0  # ties: any of the largest will do
    shared = torch.minimum(of.weights, other.weights * (of.total / other.total).unsqueeze(-1)).sum(-1).div_(of.total)
    return Divergence(kl.clamp_(min=0), reverse.clamp_(min=0), same, shared.clamp_(max=1))


def _estimated(of: StoredTop, other: Softmax) -> Divergence:
    """Exact over the stored tokens, and over the others the mean of their sample times their probability.

    The bounds, of KL and of its reverse, take all others as one token (the log-sum inequality).
    """
    normal = other.total.log().unsqueeze(-1)
    log_q = other.logits.gather(-1, of.ids) - normal
    gap, p, q = of.logprobs - log_q, of.logprobs.exp(), log_q.exp()
    sample_gap = of.sample_logprobs - (other.logits.gather(-1, of.sample_ids) - normal)
    sample_gap = torch.where(of.tail.unsqueeze(-1) > 0, sample_gap, 0.0)
    rest = (1 - q.sum(-1)).clamp(min=0)
    head = (p * gap).sum(-1)
    kl = head + of.tail * sample_gap.mean(-1)
    bound = (head + _one_term(of.tail, rest)).clamp(min=0)
    reverse = (_one_term(rest, of.tail) - (q * gap).sum(-1)).clamp(min=0)
    variance = of.tail.square() * sample_gap.var(-1) / sample_gap.shape[-1]
    best = torch.where(of.logprobs == of.logprobs[:, :1], of.ids, -1)
    same = (best == other.top.unsqueeze(-1)).any(-1)
    shared = torch.minimum(p, q).sum(-1) + of.tail * sample_gap.neg().exp().clamp(max=1).mean(-1)
    return Divergence(kl, reverse, same, shared.clamp(0, 1), variance, bound)


def _bounded(of: Softmax, other: ServedTop) -> Divergence:
    """By the log-sum inequality: all tokens that the server did not name count as one."""
    known = other.ids >= 0
    ids = other.ids.clamp(min=0)
    log_p = of.logits.gather(-1, ids) - of.total.log().unsqueeze(-1)
    p, q = log_p.exp() * known, other.logprobs.exp() * known
    gap = torch.where(known, log_p - other.logprobs, 0.0)
    rest_p, rest_q = (1 - p.sum(-1)).clamp(min=0), (1 - q.sum(-1)).clamp(min=0)
    kl = (p * gap).sum(-1) + _one_term(rest_p, rest_q)
    reverse = -(q * gap).sum(-1) + _one_term(rest_q, rest_p)
    same = of.logits.gather(-1, ids[:, :1]).squeeze(-1) >= 0
    shared = torch.minimum(p, q).sum(-1) + torch.minimum(rest_p, rest_q)
    return Divergence(kl.clamp(min=0), reverse.clamp(min=0), same, shared.clamp(0, 1))


def _one_term(p: Tensor, q: Tensor) -> Tensor:
    """p log(p / q), 0 where p is 0; q is at least fp32's epsilon, where rounding made it smaller."""
    return torch.where(p > 0, p * (p / q.clamp(min=torch.finfo(torch.float32).eps)).log(), 0.0)
