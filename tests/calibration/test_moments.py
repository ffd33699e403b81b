"""Second moments of inputs against numpy, over several batches with padding."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from snugfit.calibration import moments
from snugfit.calibration.moments import PRIOR_TOKENS, SAMPLED_TOKENS, ExpertMoments, Moments, MomentsObserver
from snugfit.model.forward_pass import Enough

FEATURES = 24


def batch(lengths: tuple[int, ...] | None) -> Any:
    """What an observer asks of a batch of these lengths, padded to 10 tokens; None: nothing is padded."""
    if lengths is None:
        return SimpleNamespace(valid=None, number=0)
    return SimpleNamespace(valid=torch.arange(10) < torch.tensor(lengths)[:, None], number=0)


def observe(parts: list[tuple[Tensor, tuple[int, ...] | None]], **modules: bool) -> dict[str, Moments]:
    """What is found of the linears `modules` of a layer, all called with the same inputs."""
    layer = nn.ModuleDict({name: nn.Linear(FEATURES, 2) for name in ("a", "b", "never")})
    observer = MomentsObserver(layer, modules, sampled=True)
    for inputs, lengths in parts:
        observer.before(batch(lengths))
        layer["a"](inputs)
        layer["b"](inputs)
    found = observer.result()
    assert not any(module._forward_pre_hooks for module in layer.values())
    return found


@pytest.mark.parametrize("columns", [512, 8, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_over_batches_with_padding(columns: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Means over the real tokens alone, in whatever pieces of columns the Gram matrix is made."""
    monkeypatch.setattr(moments, "_COLUMNS", {"cpu": columns})
    torch.manual_seed(0)
    parts: list[tuple[Tensor, tuple[int, ...] | None]] = [
        (torch.randn(2, 10, FEATURES).to(dtype), lengths) for lengths in ((10, 3), (7, 10), None, (1, 1))
    ]
    parts[0][0][1, 5] = torch.nan  # padding may hold anything
    parts[3][0][0, 9] = 1e6
    real = np.concatenate(
        [x.double().numpy()[np.ones((2, 10), bool) if n is None else batch(n).valid.numpy()] for x, n in parts]
    )
    layer_inputs = [(x if dtype == torch.float32 else x.float().to(dtype).float(), n) for x, n in parts]
    found = observe(layer_inputs, a=True, b=False, never=True)
    assert set(found) == {"a", "b"}
    for one in found.values():
        assert one.tokens == len(real) == 13 + 17 + 20 + 2
        np.testing.assert_allclose(one.squares, (real**2).mean(0), rtol=1e-5)
        assert one.amax == np.float32(np.abs(real).max())
        assert one.sample is not None
        rows = {row.tobytes() for row in real.astype(np.float32)}
        assert {row.tobytes() for row in one.sample.numpy()} <= rows
    assert found["b"].gram is None
    gram = found["a"].gram
    assert gram is not None
    np.testing.assert_allclose(gram, real.T @ real / len(real), atol=1e-5)
    assert torch.equal(gram, gram.t())
    assert torch.equal(gram.diagonal(), found["a"].squares)


@pytest.mark.parametrize("multiplies", [True, False])
def test_gram_matrices_of_bfloat16_inputs(monkeypatch: pytest.MonkeyPatch, *, multiplies: bool) -> None:
    """A CPU that multiplies bfloat16 rounds the sum over some tokens once, any other adds in fp32."""
    monkeypatch.setattr(moments, "multiplies_bfloat16", lambda: multiplies)
    inputs = torch.randn(1200, 200, generator=torch.Generator().manual_seed(0)).add_(0.5).bfloat16()
    gram = torch.ones(200, 200)
    moments.add_gram(gram, inputs)
    sums = torch.stack([part.t() @ part for part in inputs.double().split(512)])
    rounding = torch.finfo(torch.bfloat16).eps / 2 * sums.abs().sum(0) if multiplies else torch.zeros(200, 200)
    found, exact = gram.double().tril(), (sums.sum(0) + 1).tril()
    assert ((found - exact).abs() <= rounding + 1e-5 * exact.abs() + 1e-3).all()
    assert ((found - exact).abs().amax() > 0.1) == multiplies


@pytest.mark.parametrize("calls", [0, 3])
def test_nothing_runs_behind_the_last_watched_call(calls: int) -> None:
    """A batch's pass ends there, where the number of calls is known: from the second batch on, or at once."""
    layer = nn.ModuleDict({name: nn.Linear(FEATURES, FEATURES) for name in ("a", "b")})
    observer = MomentsObserver(layer, {"a": False, "b": False}, ends=True, calls=calls)
    ended = 0
    for _ in range(3):
        observer.before(batch(None))
        try:
            for name in ("a", "b", "a"):
                layer[name](torch.ones(1, 10, FEATURES))
        except Enough:
            ended += 1
    assert ended == (3 if calls else 2)
    assert {name: one.tokens for name, one in observer.result().items()} == {"a": 60, "b": 30}
    assert observer.calls == 3


def test_no_token_no_moments() -> None:
    """A linear that only padding reached is missing from what was found."""
    assert observe([(torch.randn(1, 10, FEATURES), (0,))], a=True) == {}


def test_the_sample_is_bounded_and_spread() -> None:
    """Of many inputs about so many are kept, from every batch."""
    parts: list[tuple[Tensor, tuple[int, ...] | None]] = [
        (torch.full((1, 900, FEATURES), float(number)), None) for number in range(5)
    ]
    sample = observe(parts, a=False)["a"].sample
    assert sample is not None
    assert SAMPLED_TOKENS <= len(sample) < 2 * SAMPLED_TOKENS
    assert sample[:, 0].unique().tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_experts_with_few_tokens() -> None:
    """An expert's moments are those of its own tokens, drawn to all experts' as by PRIOR_TOKENS more of them."""
    torch.manual_seed(0)
    observer = ExpertMoments()
    assert observer.result() is None
    seen: dict[int, list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]] = {0: [], 1: [], 2: []}
    for lengths in ((10, 4), (6, 10)):
        one = batch(lengths)
        hidden = torch.randn(20, FEATURES)
        observer.before(one)
        observer.begin(hidden, 3)
        real = one.valid.reshape(-1)
        for expert, tokens in ((0, torch.arange(20)), (1, torch.tensor([2, 11, 19]))):  # none come to the third
            inner = torch.randn(len(tokens), 8) * (expert + 1)
            assert observer.second(expert, inner, tokens, forced=False) is inner
            keep = real[tokens]
            seen[expert].append((hidden[tokens][keep].double().numpy(), inner[keep].double().numpy()))
        observer.second(2, torch.full((4, 8), 1e9), torch.arange(4), forced=True)
    found = observer.result()
    assert found is not None
    for which, moment in enumerate(found):
        sums = [sum((part[which] ** 2).sum(0) for part in seen[expert]) for expert in range(3)]
        counts = [sum(len(part[which]) for part in seen[expert]) for expert in range(3)]
        overall = sum(sums) / sum(counts)
        for expert in range(3):
            expected = (sums[expert] + PRIOR_TOKENS * overall) / (counts[expert] + PRIOR_TOKENS)
            np.testing.assert_allclose(moment[expert], expected, rtol=1e-5)
    np.testing.assert_allclose(found[0][2], found[0][2].numpy())
    assert counts == [30, 5, 0]


def test_a_batch_without_padding_counts_every_token() -> None:
    """Where nothing is padded, all tokens that the router sends count."""
    observer = ExpertMoments()
    observer.before(batch(None))
    hidden = torch.full((4, FEATURES), 2.0)
    observer.begin(hidden, 1)
    observer.second(0, torch.full((4, 8), 3.0), torch.arange(4), forced=False)
    found = observer.result()
    assert found is not None
    assert found[0].unique().tolist() == [4.0]
    assert found[1].unique().tolist() == [9.0]
