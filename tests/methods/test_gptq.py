"""GPTQ and coordinate descent against slow definitions, and what they do with inputs that say little."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from snugfit.formats.spec import TensorFormat
from snugfit.methods import gptq
from snugfit.methods.calibrated import choose_scales
from snugfit.methods.columns import nearest
from snugfit.methods.gptq import (
    DAMPING,
    Feedback,
    Steps,
    descend,
    feedback_of,
    round_together,
    round_weight,
    round_with_feedback,
)

OUT, IN = 24, 64
FORMATS = (
    TensorFormat("nvfp4", 16),
    TensorFormat("mxfp4", 32),
    TensorFormat("int4", 32),
    TensorFormat("int4", 32, symmetric=False),
)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def correlated(tokens: int = 512, features: int = IN, *, seed: int = 0) -> Tensor:
    """Inputs [tokens, features] that share a few directions, of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(8, features, generator=generator)
    sizes = torch.rand(features, generator=generator) * 3 + 0.2
    noise = torch.randn(tokens, features, generator=generator) * 0.3
    return (torch.randn(tokens, 8, generator=generator) @ mixing + noise) * sizes


def gram_of(inputs: Tensor) -> Tensor:
    """E[x x^T]."""
    return inputs.t() @ inputs / len(inputs)


def weight_of(*, seed: int = 1, features: int = IN) -> Tensor:
    """A random weight [OUT, features]."""
    return torch.randn(OUT, features, generator=torch.Generator().manual_seed(seed)) * 0.1


def steps_of(weight: Tensor, fmt: TensorFormat, gram: Tensor) -> Steps:
    """Scales chosen under E[x^2]."""
    return choose_scales({"w": weight}, fmt, gram.diagonal().clone(), torch.float32)["w"].steps


def loss(weight: Tensor, values: Tensor, gram: Tensor) -> float:
    """tr((W - V) H (W - V)^T), in fp64."""
    error = (weight - values).double()
    return float(((error @ gram.double()) * error).sum())


def classic(weight: Tensor, steps: Steps, gram: Tensor, damping: float) -> np.ndarray[Any, Any]:
    """GPTQ as its paper has it: by the Cholesky factor of the inverse, column by column, in fp64."""
    hessian = gram.double().numpy().copy()
    hessian[np.diag_indices(len(hessian))] += damping * float(gram.diagonal().mean())
    order = np.argsort(-gram.diagonal().numpy(), kind="stable")
    upper = np.linalg.cholesky(np.linalg.inv(hessian[np.ix_(order, order)])).T
    left = weight.double().numpy()[:, order].copy()
    step = steps.step.double().numpy()[:, order]
    zero = np.zeros_like(step) if steps.zero is None else steps.zero.double().numpy()[:, order]
    values = np.empty_like(left)
    for i in range(left.shape[1]):
        if steps.grid == "e2m1":
            codes = E2M1[np.abs(np.abs(left[:, i] / step[:, i])[:, None] - E2M1).argmin(1)]
            values[:, i] = np.sign(left[:, i]) * codes * step[:, i]
        else:
            codes = np.clip(np.round(left[:, i] / step[:, i] + zero[:, i]), -8, 7)
            values[:, i] = (codes - zero[:, i]) * step[:, i]
        error = (left[:, i] - values[:, i]) / upper[i, i]
        left[:, i + 1 :] -= np.outer(error, upper[i, i + 1 :])
    result = np.empty_like(values)
    result[:, order] = values
    return result


def rounded(weight: Tensor, steps: Steps) -> Tensor:
    """Each value to the nearest one of its grid."""
    return nearest(weight, steps.step, steps.zero, steps.grid)


def feedback(gram: Tensor, damping: float = DAMPING) -> Feedback:
    """The feedback, which there is."""
    found = feedback_of(gram, damping)
    assert found is not None
    return found


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label())
def test_the_values_of_the_classic_algorithm(fmt: TensorFormat) -> None:
    """The same values as GPTQ by an inverse in fp64, but for ties."""
    weight, gram = weight_of(), gram_of(correlated())
    steps = steps_of(weight, fmt, gram)
    found = round_with_feedback(weight, steps, feedback(gram))
    expected = torch.from_numpy(classic(weight, steps, gram, DAMPING)).float()
    differing = ~torch.isclose(found, expected, rtol=1e-5, atol=1e-7)
    assert differing.any(1).float().mean() < 0.1  # of the rows: one tie changes all behind it
    assert loss(weight, found, gram) < 1.01 * loss(weight, expected, gram)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label())
def test_correlated_inputs_lose_less(fmt: TensorFormat) -> None:
    """The output error is well below that of rounding to the nearest, and descent lowers it more, at every sweep."""
    weight, gram = weight_of(), gram_of(correlated())
    steps = steps_of(weight, fmt, gram)
    plain = rounded(weight, steps)
    found = round_with_feedback(weight, steps, feedback(gram))
    assert loss(weight, found, gram) < 0.6 * loss(weight, plain, gram)
    damped = gram + DAMPING * gram.diagonal().mean() * torch.eye(IN)
    for start in (plain, found):
        losses = [loss(weight, descend(weight, start, steps, gram, sweeps), damped) for sweeps in range(4)]
        assert losses[0] == loss(weight, start, damped)
        assert losses[1] < losses[0]
        assert all(after <= before * (1 + 1e-5) for before, after in pairwise(losses))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label())
def test_values_stand_on_the_grid(fmt: TensorFormat) -> None:
    """What GPTQ and descent give is what its own codes decode to: rounding it again changes nothing."""
    weight, gram = weight_of(), gram_of(correlated())
    steps = steps_of(weight, fmt, gram)
    found = round_with_feedback(weight, steps, feedback(gram))
    assert torch.equal(rounded(found, steps), found)
    lower = descend(weight, found, steps, gram, 2)
    assert torch.equal(rounded(lower, steps), lower)


def test_independent_inputs_are_rounded_to_the_nearest() -> None:
    """Without correlations there is no feedback, and neither GPTQ nor descent does anything."""
    weight, gram = weight_of(), torch.diag(torch.rand(IN) + 0.1)
    steps = steps_of(weight, FORMATS[0], gram)
    plain = rounded(weight, steps)
    assert torch.equal(round_with_feedback(weight, steps, feedback(gram)), plain)
    assert torch.equal(descend(weight, plain, steps, gram, 2), plain)


@pytest.mark.parametrize("fmt", FORMATS[:1] + FORMATS[3:], ids=lambda fmt: fmt.label())
def test_blocks_of_columns_do_not_matter(fmt: TensorFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products over blocks of 16 columns or of 128 give the same values, but for ties; so does descent."""
    weight, gram = weight_of(), gram_of(correlated())
    steps = steps_of(weight, fmt, gram)
    found = []
    for block in (16, 24, 128):
        monkeypatch.setattr(gptq, "BLOCK", block)
        values = round_with_feedback(weight, steps, feedback(gram))
        found.append((values, descend(weight, rounded(weight, steps), steps, gram, 2)))
    for other in found[:-1]:
        for one, whole in zip(other, found[-1], strict=True):
            same = torch.isclose(one, whole, rtol=1e-6, atol=1e-8)
            assert same.all(1).float().mean() > 0.9


def test_output_features_are_independent() -> None:
    """Rows alone give the values that they have among others, so that they may be handled in pieces."""
    weight, gram = weight_of(), gram_of(correlated())
    steps, passed = steps_of(weight, FORMATS[0], gram), feedback(gram)
    whole = round_with_feedback(weight, steps, passed)
    parts = [round_with_feedback(weight[n : n + 8], steps.rows(n, n + 8), passed) for n in range(0, OUT, 8)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label())
def test_a_fused_group_at_once(fmt: TensorFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of the same inputs get the values that each gets alone; too large ones, and one alone, are not joined."""
    gram = gram_of(correlated())
    weights = {"a": weight_of(), "b": weight_of(seed=2)[:8], "c": weight_of(seed=3)}
    steps = {name: steps_of(weight, fmt, gram) for name, weight in weights.items()}
    assert round_together(weights, steps, feedback(gram)) == {}
    monkeypatch.setitem(gptq.TOGETHER, "cpu", 1 << 20)
    assert round_together({"a": weights["a"]}, steps, feedback(gram)) == {}
    found = round_together(weights, steps, feedback(gram), gram, sweeps=1)
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        alone = round_weight(weight, steps[name], feedback(gram), gram, sweeps=1)
        assert torch.isclose(found[name], alone, rtol=1e-6, atol=1e-8).all(1).float().mean() > 0.9


def test_kernels_give_the_same_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machine code and the plain definition agree bit for bit through all blocks."""
    monkeypatch.setattr("snugfit.methods.kernels.SMALL", 1)
    weight, gram = weight_of(features=160), gram_of(correlated(features=160))
    steps = steps_of(weight, FORMATS[0], gram)
    fast = round_with_feedback(weight, steps, feedback(gram))
    lower = descend(weight, fast, steps, gram, 2)
    monkeypatch.setattr("snugfit.methods.kernels.SMALL", 1 << 30)
    assert torch.equal(round_with_feedback(weight, steps, feedback(gram)), fast)
    assert torch.equal(descend(weight, fast, steps, gram, 2), lower)


def test_fewer_tokens_than_features() -> None:
    """A Gram matrix of low rank is damped: values are finite, on the grid, and better than the nearest."""
    weight, gram = weight_of(), gram_of(correlated(6))
    steps = steps_of(weight, FORMATS[0], gram)
    passed = feedback(gram)
    assert passed.damping == DAMPING
    found = round_with_feedback(weight, steps, passed)
    assert found.isfinite().all()
    assert loss(weight, found, gram) < loss(weight, rounded(weight, steps), gram)


@pytest.mark.parametrize(
    "gram", [torch.zeros(IN, IN), torch.full((IN, IN), torch.nan), torch.full((IN, IN), torch.inf)]
)
def test_inputs_that_say_nothing(gram: Tensor) -> None:
    """All-zero or non-finite inputs give no feedback."""
    assert feedback_of(gram) is None


def test_one_bad_number_gives_no_feedback() -> None:
    """NaN in one place, on the diagonal or off it, never reaches the factors."""
    for place in ((3, 3), (9, 2)):
        gram = gram_of(correlated())
        gram[place] = gram[place[::-1]] = torch.nan
        assert feedback_of(gram) is None


def test_damping_is_raised_where_it_must_be() -> None:
    """A matrix that is not positive definite gets ten times the damping; one that never is gives no feedback."""
    gram = gram_of(correlated())
    mean = float(gram.diagonal().mean())
    lowest = float(torch.linalg.eigvalsh(gram)[0])
    worse = gram.clone()
    worse.diagonal().sub_(lowest + 0.2 * mean)  # its least eigenvalue is -0.2 of the mean of the diagonal before
    found = feedback(worse)
    assert found.damping == pytest.approx(10 * DAMPING)
    assert found.factor.isfinite().all()
    hopeless = torch.ones(IN, IN) * 100 - torch.eye(IN) * 99
    hopeless[0, 1] = hopeless[1, 0] = -100.0
    assert feedback_of(hopeless) is None


def test_singular_without_damping() -> None:
    """Two input features that are equal make a singular matrix, which the damping cures."""
    inputs = correlated()
    inputs[:, 1] = inputs[:, 0]
    found = feedback(gram_of(inputs))
    assert found.damping == DAMPING
    assert found.factor.isfinite().all()


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label())
def test_dead_channels_are_rounded_to_the_nearest(fmt: TensorFormat) -> None:
    """Weights of input features that are always zero neither give nor take errors, in GPTQ and in descent."""
    inputs = correlated()
    dead = torch.tensor([0, 5, 17, 18, 19, 63])
    inputs[:, dead] = 0
    weight, gram = weight_of(), gram_of(inputs)
    steps = steps_of(weight, fmt, gram)
    plain = rounded(weight, steps)
    found = round_with_feedback(weight, steps, feedback(gram))
    assert torch.equal(found[:, dead], plain[:, dead])
    assert torch.equal(descend(weight, found, steps, gram, 2)[:, dead], plain[:, dead])
    assert not torch.equal(found, plain)


def test_the_order_is_that_of_the_largest_inputs() -> None:
    """Columns go in descending order of E[x^2], equal ones as they stand; nothing flows back."""
    gram = torch.diag(torch.tensor([1.0, 4.0, 1.0, 9.0, 4.0, 0.0]))
    gram[0, 3] = gram[3, 0] = 1.0
    found = feedback(gram)
    assert found.order.tolist() == [3, 1, 4, 0, 2, 5]
    assert torch.equal(found.factor, found.factor.triu(1))
    assert found.factor[0, 3] > 0  # of column 3 to column 0
    assert int((found.factor != 0).sum()) == 1
