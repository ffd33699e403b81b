"""Experts one by one: snugfit's function gives what transformers' eager code gives, with any hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.moe import use_experts_implementation

from helpers.errors import raises
from helpers.tiny_families import load, random_rows
from helpers.tiny_mixtures import MIXTURES, make_mixture
from snugfit.calibration.observers import ExpertObserver
from snugfit.engines.mixtures import UNSUPPORTED_FAMILIES
from snugfit.evaluation.evaluated_model import open_head, open_model, pass_layers, resident_layer
from snugfit.model import experts, forward_pass, layers, transformers_api
from snugfit.model.experts import NoHooks

CPU = torch.device("cpu")
INSIDE = [family for family in MIXTURES if family not in UNSUPPORTED_FAMILIES]
DTYPES = [torch.float32, torch.bfloat16]
every_family = pytest.mark.parametrize("family", INSIDE)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
ROWS = random_rows([24, 24, 24])
Mixture = Callable[..., Path]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    """Gives a tiny mixture of a family and dtype, made once."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def make(family: str, dtype: torch.dtype) -> Path:
        if (family, dtype) not in made:
            made[family, dtype] = make_mixture(family, tmp_path_factory.mktemp(family) / "model", dtype=dtype)
        return made[family, dtype]

    return make


@dataclass
class Forcing(NoHooks):
    """Sends all tokens through every expert, and counts them."""

    tokens: int = 0
    routed: int = 0
    forced_tokens: int = 0
    passes: list[int] = field(default_factory=list)

    def begin(self, hidden: Tensor, count: int) -> None:
        """Note the pass."""
        self.tokens = len(hidden)
        self.passes.append(count)

    def second(self, expert: int, hidden: Tensor, tokens: Tensor, *, forced: bool) -> Tensor:  # noqa: ARG002
        """Count the tokens."""
        assert len(hidden) == len(tokens)
        if forced:
            self.forced_tokens += len(tokens)
        else:
            self.routed += len(tokens)
        return hidden

    def forced(self, expert: int, routed: Tensor) -> Tensor | None:  # noqa: ARG002
        """All tokens that are not routed to this expert."""
        rest = torch.ones(self.tokens, dtype=torch.bool)
        rest[routed] = False
        return rest.nonzero().squeeze(1)


def mixtures_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if experts.is_experts(module)]


@torch.no_grad()
def passed(model: Any, rows: list[list[int]]) -> list[Tensor]:
    """Outputs of each mixture of the model for these rows, and the logits."""
    given: list[Tensor] = []
    handles = [m.register_forward_hook(lambda _m, _i, out: given.append(out.clone())) for m in mixtures_of(model)]
    given.append(model(input_ids=torch.tensor(rows), use_cache=False).logits)
    for handle in handles:
        handle.remove()
    return given


@every_dtype
@every_family
def test_experts_give_what_eager_code_gives(family: str, dtype: torch.dtype, mixture: Mixture) -> None:
    """Every mixture's output and the logits are transformers' bit for bit, also with all tokens forced."""
    model, chosen = load(mixture(family, dtype)), 3  # with three experts the order of additions matters
    modules = mixtures_of(model)
    assert modules
    for module in model.modules():
        for key in ("top_k", "num_experts_per_tok"):
            if isinstance(getattr(module, key, None), int):
                setattr(module, key, chosen)
    for module in modules:
        module.config._experts_implementation = "eager"  # type: ignore[union-attr]
    eager = passed(model, ROWS)
    experts.use(model)
    assert all(map(torch.equal, passed(model, ROWS), eager))
    hooks = [Forcing() for _ in modules]
    for module, one in zip(modules, hooks, strict=True):
        experts.hook(module, one)
    assert all(map(torch.equal, passed(model, ROWS), eager))
    tokens = sum(map(len, ROWS))
    for module, one in zip(modules, hooks, strict=True):
        count = experts.count(module)
        assert one.passes == [count]
        assert one.routed == chosen * tokens
        assert one.routed + one.forced_tokens == count * tokens


@torch.no_grad()
def run_layers(path: Path, hooks: Callable[[], Any]) -> list[list[Tensor]]:
    """Hidden states behind each layer, run one by one with these hooks on mixtures, and the logits."""
    evaluated = open_model(path, activations="none")
    batches = forward_pass.make_batches(ROWS, 4096, CPU)
    forward_pass.embed(
        evaluated.skeleton, layers.outer_weights(evaluated.skeleton, evaluated.checkpoint, head=False), batches, CPU
    )
    found = []
    for index in range(len(evaluated.skeleton.layers)):
        layer, _ = resident_layer(evaluated, index, CPU)
        inside, before = mixtures_of(layer), None
        if inside and (one := hooks()) is not None:
            experts.hook(inside[0], one)
            before = one.before
        forward_pass.run_layer(layer, index, batches, before)
        found.append([batch.hidden.clone() for batch in batches])
    head = open_head(evaluated, CPU)
    found.append([logits for _, _, logits in forward_pass.logits(head, batches)])
    return found


def flat(states: list[list[Tensor]]) -> list[Tensor]:
    return [tensor for layer in states for tensor in layer]


@every_dtype
@every_family
def test_forward_pass_is_exact_with_and_without_forced_tokens(
    family: str, dtype: torch.dtype, mixture: Mixture
) -> None:
    """Logits are transformers' bit for bit, and hidden states do not depend on forced tokens."""
    path = mixture(family, dtype)
    model = load(path)
    for module in mixtures_of(model):
        module.config._experts_implementation = "eager"  # type: ignore[union-attr]
    eager = passed(model, ROWS)[-1]
    plain = run_layers(path, lambda: None)
    assert torch.equal(plain[-1][0], eager)
    tokens = sum(map(len, ROWS))
    for cap in (None, 32_768):
        states = run_layers(path, lambda cap=cap: ExpertObserver(NoHooks(), cap=cap, tokens=tokens))  # type: ignore[misc]
        assert all(map(torch.equal, flat(states), flat(plain)))


class Toy(nn.Module):
    """Four experts of width 24 on hidden states of 16, in any layout of the interface."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.act_fn = nn.functional.silu
        self.layout = config.layout
        outputs = 48 if self.layout.get("has_gate", True) else 24
        first = "gate_up_proj" if self.layout.get("has_gate", True) else "up_proj"
        for name, shape in ((first, (4, outputs, 16)), ("down_proj", (4, 16, 24))):
            turned = (shape[0], shape[2], shape[1]) if self.layout.get("is_transposed") else shape
            setattr(self, name, nn.Parameter(torch.randn(turned) / 4, requires_grad=False))
            if self.layout.get("has_bias"):
                setattr(self, f"{name}_bias", nn.Parameter(torch.randn(shape[:2]), requires_grad=False))
        if self.layout.get("has_post_expert_norm"):
            self.post_expert_norm = nn.RMSNorm(16)

    def _apply_gate(self, both: Tensor) -> Tensor:
        """Activation of the outputs of gate and up."""
        gate, up = both.chunk(2, -1) if self.layout.get("is_concatenated", True) else (both[..., ::2], both[..., 1::2])
        return self.act_fn(gate) * up

    def linear(self, name: str, expert: int, inputs: Tensor) -> Tensor:
        """One of an expert's projections."""
        weight = getattr(self, name)[expert]
        out = inputs @ weight if self.layout.get("is_transposed") else nn.functional.linear(inputs, weight)
        return out + getattr(self, f"{name}_bias")[expert] if self.layout.get("has_bias") else out

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As in transformers' models."""
        result = torch.zeros_like(hidden_states)
        for expert in range(4):
            places, tokens = torch.where((top_k_index == expert).t())
            inputs = hidden_states[tokens]
            if self.layout.get("has_gate", True):
                middle = self._apply_gate(self.linear("gate_up_proj", expert, inputs))
            else:
                middle = self.act_fn(self.linear("up_proj", expert, inputs))
            out = self.linear("down_proj", expert, middle)
            if self.layout.get("has_post_expert_norm"):
                out = self.post_expert_norm(out)
            result.index_add_(0, tokens, self.last(out * top_k_weights[tokens, places, None]))
        return result

    def last(self, out: Tensor) -> Tensor:
        """What is added to the result."""
        return out


class Scaled(Toy):
    """Scales one of the outputs, which the interface does not describe."""

    def last(self, out: Tensor) -> Tensor:
        """The output with its first value scaled."""
        return torch.cat((out[:, :1] * 1.001, out[:, 1:]), 1)


class Clamped(Toy):
    """Clamps the outputs of its projections."""

    def linear(self, name: str, expert: int, inputs: Tensor) -> Tensor:
        """The clamped output of a projection."""
        return super().linear(name, expert, inputs).clamp(-0.5, 0.5)


class Averaged(Toy):
    """Adds the hidden states, which come from no expert."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The experts' output plus the hidden states."""
        return super().forward(hidden_states, top_k_index, top_k_weights) + hidden_states


def toy(kind: type[Toy] = Toy, layout: Mapping[str, bool] = MappingProxyType({})) -> Any:
    """A mixture of this class and layout."""
    torch.manual_seed(0)
    given = type(kind.__name__, (kind,), {"forward": kind.forward, "_apply_gate": kind._apply_gate})
    module: Any = use_experts_implementation(**layout)(given)(
        SimpleNamespace(layout=layout, _experts_implementation="eager")
    )
    return module


def routing(tokens: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, the experts chosen for each token, their weights."""
    generator = torch.Generator().manual_seed(1)
    index = torch.stack([torch.randperm(4, generator=generator)[:3] for _ in range(tokens)])
    return torch.randn(tokens, 16, generator=generator), index, torch.rand(tokens, 3, generator=generator)


LAYOUTS: list[dict[str, bool]] = [
    {},
    {"is_transposed": True},
    {"is_transposed": True, "is_concatenated": False, "has_bias": True},
    {"is_concatenated": False},
    {"has_bias": True},
    {"has_gate": False},
    {"has_gate": False, "has_bias": True},
    {"has_post_expert_norm": True},
]
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: ",".join(layout) or "plain")


@every_layout
@pytest.mark.parametrize("tokens", [1, 15, 16, 40, 5000])
def test_every_layout_of_the_interface(layout: dict[str, bool], tokens: int) -> None:
    """For every layout that a family may declare, the output is that of its own code, for few tokens and many."""
    module, given = toy(layout=layout), routing(tokens)
    expected = module(*given)
    experts.use(module)
    assert torch.equal(module(*given), expected)
    experts.hook(module, Forcing())
    assert torch.equal(module(*given), expected)


@every_layout
def test_single_experts_fill_the_buffers(layout: dict[str, bool]) -> None:
    """Single experts' tensors, copied into the buffers, give the stacked parameters and compute the same."""
    module = toy(layout=layout)
    shapes = experts.shapes(module)
    roles = {"gate", "up", "down"} if layout.get("has_gate", True) else {"up", "down"}
    kinds = {"weight", "bias"} if layout.get("has_bias") else {"weight"}
    assert shapes.keys() == {(role, kind) for role in roles for kind in kinds}
    for (role, kind), shape in shapes.items():
        assert shape == (
            (16 if role == "down" else 24,) + ((24 if role == "down" else 16,) if kind == "weight" else ())
        )
    parts: dict[tuple[int, str, str], Tensor] = {}
    inputs = torch.randn(3, 16)
    for expert in range(4):
        for kind in kinds:
            suffix = "" if kind == "weight" else "_bias"
            first, second = (
                getattr(module, name + suffix)[expert]
                for name in ("gate_up_proj" if "gate" in roles else "up_proj", "down_proj")
            )
            if kind == "weight" and layout.get("is_transposed"):
                first, second = first.t(), second.t()
            parts[expert, "down", kind] = second
            if "gate" not in roles:
                parts[expert, "up", kind] = first
            elif layout.get("is_concatenated", True):
                parts[expert, "gate", kind], parts[expert, "up", kind] = first[:24], first[24:]
            else:
                parts[expert, "gate", kind], parts[expert, "up", kind] = first[::2], first[1::2]
        zero = torch.zeros(())
        up, gate = (
            inputs @ parts[expert, role, "weight"].t() + parts.get((expert, role, "bias"), zero)
            for role in ("up", "gate" if "gate" in roles else "up")
        )
        meant = module.act_fn(gate) * up if "gate" in roles else module.act_fn(up)
        assert torch.allclose(experts._middle(module, expert, inputs), meant, atol=1e-6)
    stacked, per_expert = experts.buffers(module, torch.device("cpu"))
    assert per_expert.keys() == parts.keys()
    for key, part in per_expert.items():
        part.copy_(parts[key])
    assert (
        stacked.keys()
        == experts.parameters(module)
        == dict(module.named_parameters()).keys() - {"post_expert_norm.weight"}
    )
    assert all(torch.equal(tensor, getattr(module, name)) for name, tensor in stacked.items())


def test_an_expert_without_tokens() -> None:
    """Experts that no token is routed to change nothing, and tokens can be forced through them."""
    module, (hidden, _, weights) = toy(), routing()
    given = hidden, torch.tensor([[1, 2, 1]]).expand(len(hidden), 3).contiguous(), weights
    expected = module(*given)
    experts.use(module)
    hooks = Forcing()
    experts.hook(module, hooks)
    assert torch.equal(module(*given), expected)
    assert hooks.forced_tokens == 2 * len(hidden)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The modules whose own code was run for a check."""
    found: list[nn.Module] = []
    eager = transformers_api.eager_experts

    def counted(module: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
        found.append(module)
        return eager(module, inputs)

    monkeypatch.setattr(transformers_api, "eager_experts", counted)
    return found


def test_each_kind_of_a_models_layers_is_checked_once(checks: list[nn.Module]) -> None:
    """Layers of one kind are checked once together, one with other settings by itself, infinite numbers every time."""
    layers_of_toys = [toy(Toy), toy(Toy), toy(Toy)]
    layers_of_toys[2].__dict__["limit"] = 3.0
    experts.use(nn.ModuleList(layers_of_toys))
    hidden, index, weights = routing()
    layers_of_toys[0](hidden * float("inf"), index, weights)
    for layer in (*layers_of_toys, *layers_of_toys):
        layer(hidden, index, weights)
    assert len(checks) == 3


def test_copies_of_a_models_layers_share_their_check(checks: list[nn.Module], mixture: Mixture) -> None:
    """A model of several layers, each a copy of the skeleton's, is checked once in two passes."""
    model = open_model(mixture("qwen3_moe", torch.float32))
    for _ in range(2):
        pass_layers(model, ROWS, CPU, tokens_per_batch=48)
    assert len(model.skeleton.experts) > 1
    assert len(checks) == 1


@pytest.mark.parametrize("kind", [Scaled, Clamped, Averaged])
def test_experts_that_compute_something_else_are_refused(kind: type[Toy]) -> None:
    """A module that declares the interface but computes something else is refused before it gives any output."""
    module = toy(kind)
    module(*routing())
    experts.use(module)
    with raises("experts-unsupported") as caught:
        module(*routing())
    assert kind.__name__ in caught.value.what
    assert "model/experts.py" in caught.value.remedy


def test_experts_are_found_or_refused() -> None:
    """One mixture is found by name; two of them, and stacked experts outside the interface, are refused."""
    alone = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": toy()}), "attn": nn.Linear(4, 4)})
    assert experts.find_experts(alone, where="here") == "mlp.experts"
    assert experts.find_experts(nn.ModuleDict({"mlp": nn.Linear(4, 4)}), where="here") is None
    with raises("experts-unsupported", where="here") as caught:
        experts.find_experts(nn.ModuleDict({"a": toy(), "b": toy()}), where="here")
    assert "a, b" in caught.value.what
    outside = nn.Module()
    outside.weight = nn.Parameter(torch.zeros(4, 8, 8))
    with raises("experts-unsupported", where="model x") as caught:
        experts.find_experts(nn.ModuleDict({"experts": outside}), where="model x")
    assert "weight" in caught.value.what


def test_a_list_of_expert_modules_is_refused() -> None:
    """Experts that are modules in a list, as in no family of transformers 5, are refused."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    with raises("experts-unsupported", where="config.json") as caught:
        experts.find_experts(Block(), where="config.json")
    assert "ModuleList" in caught.value.what
