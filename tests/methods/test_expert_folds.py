"""Folds inside routed experts: each expert stays the same function, its outputs err less, others are skipped."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.tiny_mixtures import make_mixture
from snugfit.calibration.moments import SAMPLED_OF_EXPERT, ExpertMoments, Moments
from snugfit.formats.spec import EFFORT, TensorFormat
from snugfit.methods.calibrated import Calibrated, choose_scales
from snugfit.methods.columns import nearest
from snugfit.methods.expert_folds import FEWEST_ROWS, fold_experts
from snugfit.methods.folds import Fold
from snugfit.methods.method import ObservedLayer, Target
from snugfit.model import experts
from snugfit.model.layout import read_layout
from snugfit.model.skeleton import open_skeleton

WIDTH, HIDDEN, TOKENS = 128, 64, 400
FORMATS = [
    TensorFormat("int4", group_size=size, symmetric=symmetric) for size in (32, 64, 128) for symmetric in (True, False)
] + [TensorFormat("nvfp4a16"), TensorFormat("mxfp4"), TensorFormat("nvfp4")]


def uneven(tokens: int, features: int, seed: int = 0) -> Tensor:
    """Inputs [tokens, features] of which a few features are many times as large as the others."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.ones(features)
    scale[:: features // 8] = 30.0
    return torch.randn(tokens, features, generator=generator) * scale


@pytest.mark.parametrize("fmt", FORMATS, ids=TensorFormat.label)
@pytest.mark.parametrize("sampled", [True, False])
def test_the_search_takes_the_fold_with_the_least_error_of_outputs(fmt: TensorFormat, sampled: bool) -> None:
    """With uneven inputs a fold is found, and outputs on rows that the search did not see have less error under it."""
    method = Calibrated("vllm-blackwell", expert_folds=True)
    weight = torch.randn(HIDDEN, WIDTH, generator=torch.Generator().manual_seed(1))
    inputs, unseen = uneven(TOKENS, WIDTH), uneven(TOKENS, WIDTH, seed=2)
    squares = inputs.square().mean(0)
    moments = Moments(squares, None, TOKENS, inputs if sampled else None, float(inputs.abs().amax()))
    factors = method._search_in_expert(Fold("up", ("down",), is_norm=False), weight, fmt, moments)
    if not sampled and method._rounds_inputs(fmt):
        assert factors is None  # E[x^2] does not say what becomes of rounded inputs
        return
    assert factors is not None

    def error(scale: Tensor) -> float:
        found = choose_scales({"": weight * scale}, fmt, squares / scale.square())[""].steps
        rounded = nearest(weight * scale, found.step, found.zero, found.grid)
        quantizer = method._quantizer(fmt, float((inputs / scale).abs().amax()))
        scaled = unseen / scale
        return float(((scaled if quantizer is None else quantizer(scaled)) @ rounded.t() - unseen @ weight.t()).norm())

    assert error(factors) < 0.97 * error(torch.ones(WIDTH))


def test_even_inputs_and_weights_keep_no_fold() -> None:
    """Where every feature is as large as any other, factors are all one, and none is better than no fold."""
    method = Calibrated("vllm-blackwell", expert_folds=True)
    signs = torch.randint(0, 2, (HIDDEN, WIDTH), generator=torch.Generator().manual_seed(0)).float() * 2 - 1
    moments = Moments(torch.ones(WIDTH), None, TOKENS, None, 1.0)
    fold = Fold("up", ("down",), is_norm=False)
    assert method._search_in_expert(fold, signs, TensorFormat("int4", group_size=32), moments) is None


def layer_of(model: Path, rule: str = EFFORT) -> tuple[ObservedLayer, Any, int]:
    """The last layer of a tiny mixture with random weights, its experts' module, and its number."""
    skeleton = open_skeleton(read_layout(model))
    number = max(skeleton.experts)
    layer, mixture = skeleton.layers[number], skeleton.experts[number]
    module = layer.get_submodule(mixture.module)
    generator = torch.Generator().manual_seed(0)
    for name in experts.parameters(module):
        shape = module.get_parameter(name).shape
        setattr(module, name, torch.nn.Parameter(torch.randn(shape, generator=generator) / shape[-1] ** 0.5))
    target = Target(format=TensorFormat("int4", group_size=32), scale_rule=rule, objective="mse")
    targets = {f"p.{name}": target for (_, _, kind), name in mixture.names.items() if kind == "weight"}
    nothing: dict[str, Any] = {"linears": {}, "parameters": {}, "dtypes": {}, "run": None}
    return ObservedLayer(module=layer, prefix="p.", targets=targets, experts=mixture, **nothing), module, number


def observed(layer: ObservedLayer, module: Any, few: int = 0) -> tuple[dict[str, Tensor], dict[int, Tensor]]:
    """E[x^2] and samples of uneven inputs of down; every expert has FEWEST_ROWS of them, the first `few`."""
    assert layer.experts is not None
    width = experts.shapes(module)[experts.DOWN, "weight"][1]
    squares, samples = {}, {}
    for (expert, role, kind), name in layer.experts.names.items():
        if role == experts.DOWN and kind == "weight":
            inputs = uneven(FEWEST_ROWS, width, seed=expert)
            squares[f"p.{name}".removesuffix(".weight")] = inputs.square().mean(0)
            samples[expert] = inputs[:few] if not expert and few else inputs
    return squares, samples


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "granitemoe", "minimax_m2", "deepseek_v3"])
def test_folded_experts_are_the_same_function(family: str, tmp_path: Path) -> None:
    """With folds in up and down, each expert alone gives what it gave, and the others' weights are not asked."""
    layer, module, _ = layer_of(make_mixture(family, tmp_path / "model"))
    assert layer.experts is not None
    assert experts.why_not_linear_in_up(module) == ""
    method = Calibrated("vllm-blackwell", expert_folds=True)
    found = fold_experts(layer, *observed(layer, module), method._search_in_expert)
    folded = {
        expert
        for (expert, role, kind), name in layer.experts.names.items()
        if role == experts.DOWN and f"p.{name}".removesuffix(f".{kind}") in found.scaling.inputs
    }
    assert len(folded) == len(found.scaling.outputs) > experts.count(module) / 2
    hidden = torch.randn(9, experts.shapes(module)[experts.UP, "weight"][1], generator=torch.Generator().manual_seed(5))
    for expert in range(experts.count(module)):
        before = experts._linear(module, "down_proj", expert, experts._middle(module, expert, hidden))
        for role in (experts.UP, experts.DOWN):
            name = f"p.{layer.experts.names[expert, role, 'weight']}".removesuffix(".weight")
            weight = experts.weight_of(module, expert, role)
            scaled = found.scaling.weight(name, weight)
            assert torch.equal(scaled, weight) == (expert not in folded)
            weight.copy_(scaled)
        after = experts._linear(module, "down_proj", expert, experts._middle(module, expert, hidden))
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_an_expert_of_few_rows_is_decided_by_squares(tmp_path: Path) -> None:
    """An expert that fewer rows reach than count has its strength chosen under E[x^2] alone."""
    layer, module, _ = layer_of(make_mixture("qwen3_moe", tmp_path / "model"))
    seen: list[bool] = []

    def search(_fold: Fold, _weight: Tensor, _fmt: TensorFormat, moments: Moments) -> None:
        seen.append(moments.sample is not None)

    fold_experts(layer, *observed(layer, module, few=FEWEST_ROWS - 1), search)
    assert seen == [False] + [True] * (experts.count(module) - 1)


def test_weights_that_name_their_rule_are_not_folded(tmp_path: Path) -> None:
    """Experts whose rule names a scale rule get no folds."""
    layer, module, _ = layer_of(make_mixture("qwen3_moe", tmp_path / "model"), rule="absmax")
    method = Calibrated("vllm-blackwell", expert_folds=True)
    assert not fold_experts(layer, *observed(layer, module), method._search_in_expert).scaling.inputs


@pytest.mark.parametrize(("family", "word"), [("gpt_oss", "bias"), ("nemotron_h", "gate")])
def test_families_without_a_product_are_skipped(family: str, word: str, tmp_path: Path) -> None:
    """Experts with biases, or without a gate, are not folded, and the reason says so."""
    layer, module, _ = layer_of(make_mixture(family, tmp_path / "model"))
    assert word in experts.why_not_linear_in_up(module)
    method = Calibrated("vllm-blackwell", expert_folds=True)
    assert not fold_experts(layer, *observed(layer, module), method._search_in_expert).scaling.inputs


@pytest.mark.parametrize("arithmetic", ["clamp", "wide clamp", "offset"])
def test_a_clamp_or_an_offset_of_up_is_seen(arithmetic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arithmetic between up and down that is no product is found by running it, however wide the clamp."""
    _, module, _ = layer_of(make_mixture("qwen3_moe", tmp_path / "model"))

    def gate(outputs: Tensor) -> Tensor:
        gate, up = outputs.chunk(2, dim=-1)
        limit = {"clamp": 7.0, "wide clamp": 4096.0}.get(arithmetic)
        up = up + 1 if limit is None else up.clamp(-limit, limit)
        return torch.nn.functional.silu(gate) * up

    monkeypatch.setattr(module, "_apply_gate", gate, raising=False)
    assert "more than a product" in experts.why_not_linear_in_up(module)


def test_samples_are_spread_over_all_routed_tokens() -> None:
    """Of each expert's real, routed inputs some are kept, as evenly from the last batch as from the first."""
    moments = ExpertMoments(sampled=True)
    count, batches, length = 2, 40, 12
    for number in range(batches):
        valid = torch.ones(1, length, dtype=torch.bool)
        valid[0, -2:] = False
        moments.before(SimpleNamespace(valid=valid, number=0))  # type: ignore[arg-type]
        moments.begin(torch.zeros(length, 4), count)
        tokens = torch.arange(length)
        inputs = (number * length + tokens).float().unsqueeze(1).expand(-1, 3)
        moments.second(0, inputs, tokens, forced=False)
        moments.second(1, inputs, tokens, forced=True)
    found = moments.samples()
    assert set(found) == {0}
    rows = found[0][:, 0]
    assert SAMPLED_OF_EXPERT < len(rows) <= 2 * SAMPLED_OF_EXPERT
    assert not (rows % length >= length - 2).any()
    steps = rows.diff()
    assert (steps > 0).all()
    assert float(steps.max()) <= 2 * float(steps.median()) + 2
    assert rows[-1] > (batches - 2) * length
