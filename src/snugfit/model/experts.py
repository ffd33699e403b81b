"""Routed experts, run one by one through transformers' experts interface, so that every input of each can be seen.

transformers keeps a layer's experts as 3-D parameters of one module, which has no linears to hook. It lets a function
take the place of that module's forward (`ALL_EXPERTS_FUNCTIONS`): it gets the module, the hidden states of all tokens,
and for each token the indices and weights of its experts. The function here does the arithmetic of the module's own
eager code, bit for bit (a model's first layer of each kind is checked on its first tokens), and passes all inputs to
`ExpertHooks`: they may round inputs as an engine would, and send tokens through experts that the router did not
choose, whose output is dropped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType
from typing import Protocol

import torch
from torch import Tensor, nn

from snugfit.errors import UserError
from snugfit.model import transformers_api
from snugfit.model.logical_weights import LogicalWeights
from snugfit.model.names import ROLES
from snugfit.storage.checkpoint import Checkpoint

IMPLEMENTATION = "snugfit"
GATE, UP, DOWN = "gate", "up", "down"
CHECKED_TOKENS = 16
CHUNK_TOKENS = {"cpu": 2048, "cuda": 16384}  # forced through an expert at once
_HOOKS = "_snugfit_hooks"
_SUM_DTYPES = "_snugfit_sum_dtypes"
_READ, _INSTEAD, _FACTORS = "_snugfit_read", "_snugfit_instead", "_snugfit_factors"

ReadExpert = Callable[[int, str], Tensor]  # number and role -> weight [N, K]
# takes the place of an experts module's forward: module, hidden states [tokens, K], indices and weights [tokens, k]
Instead = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


class ExpertHooks(Protocol):
    """What is done with the inputs of a layer's experts while rows pass it."""

    def first(self, hidden: Tensor) -> Tensor:
        """Inputs of all gate and up projections [tokens, K], as they go in."""

    def second(self, expert: int, hidden: Tensor, tokens: Tensor, *, forced: bool) -> Tensor:
        """Inputs of an expert's down projection [n, K], as they go in; `tokens` [n] says whose they are."""

    def begin(self, hidden: Tensor, count: int) -> None:
        """A pass of hidden states [tokens, K] through `count` experts begins."""

    def expect(self, index: Tensor) -> None:
        """Experts of each token [tokens, k] of the pass that has begun, where they will run some at a time."""

    def again(self, inputs: Tensor, count: int) -> None:
        """What `begin` and `first` had as the hidden states of a batch comes to the next of its experts."""

    def forced(self, expert: int, routed: Tensor) -> Tensor | None:
        """Tokens [n] to send through an expert in addition to those `routed` [m] to it, if any."""


class NoHooks:
    """Hooks that change nothing and force nothing."""

    def first(self, hidden: Tensor) -> Tensor:
        """Inputs of all gate and up projections [tokens, K]."""
        return hidden

    def second(self, expert: int, hidden: Tensor, tokens: Tensor, *, forced: bool) -> Tensor:  # noqa: ARG002
        """Inputs of an expert's down projection [n, K]."""
        return hidden

    def begin(self, hidden: Tensor, count: int) -> None:
        """Nothing to prepare."""

    def expect(self, index: Tensor) -> None:
        """Nothing to note."""

    def again(self, inputs: Tensor, count: int) -> None:
        """As `begin`."""
        self.begin(inputs, count)

    def forced(self, expert: int, routed: Tensor) -> Tensor | None:  # noqa: ARG002
        """None."""
        return None


class Watching(NoHooks):
    """What `hooks` do, while `watcher` sees the same and changes nothing."""

    def __init__(self, hooks: ExpertHooks, watcher: ExpertHooks) -> None:
        self._hooks, self._watcher = hooks, watcher

    def first(self, hidden: Tensor) -> Tensor:
        """What the hooks give."""
        self._watcher.first(hidden)
        return self._hooks.first(hidden)

    def second(self, expert: int, hidden: Tensor, tokens: Tensor, *, forced: bool) -> Tensor:
        """What the hooks give."""
        self._watcher.second(expert, hidden, tokens, forced=forced)
        return self._hooks.second(expert, hidden, tokens, forced=forced)

    def begin(self, hidden: Tensor, count: int) -> None:
        """Both begin."""
        self._watcher.begin(hidden, count)
        self._hooks.begin(hidden, count)

    def expect(self, index: Tensor) -> None:
        """Both note it."""
        self._watcher.expect(index)
        self._hooks.expect(index)

    def again(self, inputs: Tensor, count: int) -> None:
        """Both resume."""
        self._watcher.again(inputs, count)
        self._hooks.again(inputs, count)

    def forced(self, expert: int, routed: Tensor) -> Tensor | None:
        """What the hooks force."""
        return self._hooks.forced(expert, routed)


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds a layer's experts in 3-D parameters, under transformers' experts interface."""
    down = getattr(module, "down_proj", None)
    stacked = isinstance(down, nn.Parameter) and down.dim() == 3
    return stacked and transformers_api.has_experts_interface(module)


def find_experts(layer: nn.Module, *, where: str) -> str | None:
    """The name of the experts' module in a decoder layer, None for a layer without experts.

    UserError if experts are held in another way than the interface's.
    """
    found = [name for name, module in layer.named_modules() if is_experts(module)]
    if len(found) > 1:
        what = f"a layer has several mixtures of experts: {', '.join(found)}."
        remedy = "This family needs an adapter in model/experts.py."
        raise UserError(what, code="experts-unsupported", where=where, remedy=remedy)
    for name, module in layer.named_modules():
        stacked = [n for n, p in module.named_parameters(recurse=False) if p.dim() == 3]
        if (
            stacked
            and "expert" in name.rpartition(".")[2].lower() + type(module).__name__.lower()
            and name not in found
        ):
            raise UserError(
                f"{type(module).__name__} holds its experts in {stacked[0]} outside transformers' experts interface.",
                code="experts-unsupported",
                where=where,
                remedy="Its forward needs an adapter in model/experts.py that shows each expert's inputs.",
            )
        if isinstance(module, nn.ModuleList | nn.ModuleDict) and name.rpartition(".")[2] == "experts" and len(module):
            raise UserError(
                f"its experts are in a {type(module).__name__}; transformers 5 holds them in 3-D parameters.",
                code="experts-unsupported",
                where=where,
                remedy="They need an adapter in model/experts.py that shows each expert's inputs.",
            )
    return found[0] if found else None


def use(model: nn.Module) -> None:
    """Let every mixture of `model` run through this module."""
    transformers_api.register_experts(IMPLEMENTATION, _forward)
    checked = _SumDtypes()
    for module in model.modules():
        if is_experts(module):
            transformers_api.use_experts(module, IMPLEMENTATION)
            module.__dict__[_SUM_DTYPES] = checked


def hook(module: nn.Module, hooks: ExpertHooks) -> None:
    """Let `hooks` receive what passes through the experts `module`."""
    module.__dict__[_HOOKS] = hooks


def count(module: nn.Module) -> int:
    """Number of experts."""
    return len(module.get_parameter("down_proj"))


def shapes(module: nn.Module) -> dict[tuple[str, str], tuple[int, ...]]:
    """(role, parameter) -> shape of one expert's weight [N, K] or bias [N]."""
    found: dict[tuple[str, str], tuple[int, ...]] = {}
    for (role, parameter), (name, rows) in _places(module).items():
        whole = getattr(module, name).shape[1:]
        if parameter == "bias":
            found[role, parameter] = (len(range(*rows.indices(whole[0]))),)
            continue
        outputs, inputs = reversed(whole) if module.is_transposed else whole
        found[role, parameter] = len(range(*rows.indices(outputs))), inputs
    return found


def in_groups(total: int, size: int) -> Iterator[range]:
    """The numbers of `total` experts, `size` at a time."""
    return (range(start, min(total, start + size)) for start in range(0, total, size))


def buffers(
    module: nn.Module, device: torch.device, size: int | None = None
) -> tuple[dict[str, Tensor], dict[tuple[int, str, str], Tensor]]:
    """Empty memory for the module's parameters, which hold all experts or `size` of them, and views of it.

    Views, by (place of an expert, role, parameter), are weights [N, K], biases [N].
    """
    whole = {}
    for name in sorted(parameters(module)):
        empty = module.get_parameter(name)
        shape = (size or len(empty), *empty.shape[1:])
        whole[name] = torch.empty(shape, dtype=empty.dtype, device=device)
    parts: dict[tuple[int, str, str], Tensor] = {}
    for expert in range(size or count(module)):
        for (role, parameter), (name, rows) in _places(module).items():
            mine = whole[name][expert]
            parts[expert, role, parameter] = (mine.t() if module.is_transposed and parameter == "weight" else mine)[
                rows
            ]
    return whole, parts


def hold_some(module: nn.Module, size: int, read: ReadExpert | None = None) -> None:
    """Let the module's parameters hold `size` experts, without data; `read` gives weights of others."""
    for name in parameters(module):
        whole = module.get_parameter(name)
        some = torch.empty(size, *whole.shape[1:], dtype=whole.dtype, device="meta")
        setattr(module, name, nn.Parameter(some, requires_grad=False))
    if read is not None:
        module.__dict__[_READ] = read


def holds_some(module: nn.Module) -> bool:
    """Whether the module's parameters hold some experts at a time."""
    return _READ in module.__dict__


def weight_of(module: nn.Module, expert: int, role: str) -> Tensor:
    """The weight [N, K] of one expert's projection: a view of the module's parameter, or read if it holds few."""
    read: ReadExpert | None = module.__dict__.get(_READ)
    if read is None:
        return _held_weight(module, expert, role)
    name, _ = _places(module)[role, "weight"]
    weight = read(expert, role).to(module.get_parameter(name).dtype)
    factors = module.__dict__.get(_FACTORS) if role != DOWN else None
    return weight if factors is None else (weight.float() * factors).to(weight.dtype)


def _held_weight(module: nn.Module, place: int, role: str) -> Tensor:
    """A view of the weight [N, K] of the expert that has this place in the module's parameters."""
    name, rows = _places(module)[role, "weight"]
    whole = module.get_parameter(name).data[place]
    return (whole.t() if module.is_transposed else whole)[rows]


def multiply_inputs(module: nn.Module, factors: Tensor) -> None:
    """Multiply the input features of all experts' gates and ups by `factors` [K].

    Where the module's parameters hold some experts at a time, `filled` does it to those that come to be in memory.
    """
    if holds_some(module):
        before = module.__dict__.get(_FACTORS)
        module.__dict__[_FACTORS] = factors if before is None else before * factors
        return
    _multiply(module, range(count(module)), factors)


def filled(module: nn.Module, number: int) -> None:
    """The module's parameters, which hold some experts at a time, now have the exact weights of `number` of them."""
    factors = module.__dict__.get(_FACTORS)
    if factors is not None:
        _multiply(module, range(number), factors)


def _multiply(module: nn.Module, held: Iterable[int], factors: Tensor) -> None:
    for place in held:
        for role in input_roles(module):
            weight = _held_weight(module, place, role)
            weight.copy_(weight.float() * factors)


def input_roles(module: nn.Module) -> list[str]:
    """The roles of the experts' projections that read what comes to the experts."""
    return sorted({role for role, parameter in shapes(module) if parameter == "weight" and role != DOWN})


def why_not_linear_in_up(module: nn.Module) -> str:
    """Why the inputs of an expert's down projection do not grow with the outputs of up alone; empty if they do.

    Tried with powers of two, which commute with rounding, on numbers as small and as large as outputs get: a clamp
    shows, however wide it is. Only the arithmetic between the projections runs.
    """
    if not module.has_gate:
        return "without a gate the activation takes the outputs of up"
    if module.has_bias:
        return "a bias is added to the outputs of up"
    width = shapes(module)[UP, "weight"][0]
    generator = torch.Generator().manual_seed(0)
    halves = torch.randn(2, CHECKED_TOKENS, width, generator=generator)
    halves[1] *= torch.linspace(-10, 20, CHECKED_TOKENS).exp2().unsqueeze(1)
    powers = torch.randint(-3, 4, (width,), generator=generator).float().exp2()
    places = _places(module)
    outputs = []
    for up in (halves[1], halves[1] / powers):
        whole = torch.empty(CHECKED_TOKENS, 2 * width)
        whole[:, places[GATE, "weight"][1]], whole[:, places[UP, "weight"][1]] = halves[0], up
        outputs.append(module._apply_gate(whole))  # type: ignore[operator]  # noqa: SLF001
    alike = torch.allclose(outputs[0], outputs[1] * powers, rtol=1e-3, atol=0)
    return "" if alike else "the outputs of up pass more than a product (a clamp, or an offset)"


def parameters(module: nn.Module) -> frozenset[str]:
    """Names of the parameters that hold all experts."""
    return frozenset(name for name, _ in _places(module).values())


def _places(module: nn.Module) -> dict[tuple[str, str], tuple[str, slice]]:
    """(role, parameter of one expert) -> the module's parameter, and which of its outputs."""
    found: dict[tuple[str, str], tuple[str, slice]] = {}
    kinds = [("weight", "")] + ([("bias", "_bias")] if module.has_bias else [])
    for parameter, suffix in kinds:
        if module.has_gate:
            name = f"gate_up_proj{suffix}"
            whole = getattr(module, name)
            outputs = whole.shape[2] if module.is_transposed and parameter == "weight" else whole.shape[1]
            half = outputs // 2
            gate, up = (
                (slice(0, half), slice(half, outputs))
                if module.is_concatenated
                else (slice(0, None, 2), slice(1, None, 2))
            )
            found |= {(GATE, parameter): (name, gate), (UP, parameter): (name, up)}
        else:
            found[UP, parameter] = f"up_proj{suffix}", slice(None)
        found[DOWN, parameter] = f"down_proj{suffix}", slice(None)
    return found


def _forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What the module's own forward gives for hidden states [tokens, K], indices and weights [tokens, k] of experts."""
    instead: Instead | None = self.__dict__.get(_INSTEAD)
    if instead is not None:
        return instead(self, hidden_states, top_k_index, top_k_weights)
    dtype = _sum_dtype(self, hidden_states, top_k_index, top_k_weights)
    return _run(self, hidden_states, top_k_index, top_k_weights, hooks_of(self), dtype)


def hooks_of(module: nn.Module) -> ExpertHooks | None:
    """What receives what passes through the experts `module`."""
    found: ExpertHooks | None = module.__dict__.get(_HOOKS)
    return found


@contextmanager
def instead_of(module: nn.Module, function: Instead) -> Iterator[None]:
    """Let `function` take the place of the experts' forward."""
    module.__dict__[_INSTEAD] = function
    try:
        yield
    finally:
        del module.__dict__[_INSTEAD]


def sum_dtype_of_some(module: nn.Module, hidden: Tensor, weights: Tensor) -> torch.dtype:
    """The dtype in which a module adds up what experts give, checked on those few that its parameters hold.

    `hidden` [tokens, K] and `weights` [tokens, k] are those of a pass; each token gets other experts of the few.
    """
    size = count(module)
    choices = min(weights.shape[1], max(2, size))  # of one expert two terms, else nothing is added up
    tokens = torch.arange(len(hidden[:CHECKED_TOKENS]), device=hidden.device)
    index = (tokens[:, None] + torch.arange(choices, device=hidden.device)) % size
    return _sum_dtype(module, hidden[:CHECKED_TOKENS], index, weights[:CHECKED_TOKENS, :choices])


def _sum_dtype(self: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> torch.dtype:
    known: _SumDtypes = self.__dict__.setdefault(_SUM_DTYPES, _SumDtypes())
    kind = _kind(self, hidden, weights)
    dtype = known.get(kind) or _checked(self, hidden, index, weights)
    if dtype is not None:
        known[kind] = dtype
    return dtype or hidden.dtype


class _SumDtypes(dict[tuple[object, ...], torch.dtype]):
    """The dtype in which experts of each kind add up, as checked; copies of a model's layers share it."""

    def __deepcopy__(self, _: object) -> _SumDtypes:
        return self


def _kind(self: nn.Module, hidden: Tensor, weights: Tensor) -> tuple[object, ...]:
    """What decides which arithmetic experts do: their code, their settings, and the dtypes and device they run on."""
    plain = int | float | str | FunctionType | BuiltinFunctionType
    settings = [(name, value) for name, value in self.__dict__.items() if isinstance(value, plain)]
    parts = [(name, type(module)) for name, module in self.named_children()]
    return type(self), *sorted(settings), *parts, hidden.dtype, weights.dtype, hidden.device


def _run(
    self: nn.Module,
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    hooks: ExpertHooks | None,
    dtype: torch.dtype,
) -> Tensor:
    inputs = hidden
    if hooks is not None:
        hooks.begin(hidden, count(self))
        inputs = hooks.first(hidden)
    result = torch.zeros_like(hidden, dtype=dtype)
    add_up(self, inputs, index, weights, hooks, result, range(count(self)))
    return result.to(hidden.dtype)


def add_up(
    self: nn.Module,
    inputs: Tensor,
    index: Tensor,
    weights: Tensor,
    hooks: ExpertHooks | None,
    result: Tensor,
    some: range,
) -> None:
    """Add to `result` [tokens, K] what `some` experts, which the module's parameters hold, make of `inputs`.

    All experts one after another, or in several such calls, give the same bits.
    """
    tokens = len(inputs)
    # by expert, within it in the order in which eager code finds them: by place among the k, then by token
    chosen = index.t().reshape(-1)
    order = torch.argsort(chosen, stable=True)
    ends = [0, *torch.bincount(chosen, minlength=some.stop)[: some.stop].cumsum(0).tolist()]
    places_of_all, tokens_of_all = order // tokens, order % tokens
    for expert in some:
        held = expert - some.start
        places, routed = (found[ends[expert] : ends[expert + 1]] for found in (places_of_all, tokens_of_all))
        if len(routed):
            middle = _middle(self, held, inputs[routed])
            if hooks is not None:
                middle = hooks.second(expert, middle, routed, forced=False)
            out = _linear(self, "down_proj", held, middle)
            if getattr(self, "has_post_expert_norm", False):
                out = self.post_expert_norm(out)  # type: ignore[operator]
            out = out * weights[routed, places, None]
            result.index_add_(0, routed, out.to(result.dtype))
        more = None if hooks is None else hooks.forced(expert, routed)
        if hooks is not None and more is not None:
            for part in more.split(CHUNK_TOKENS[inputs.device.type]):
                hooks.second(expert, _middle(self, held, inputs[part]), part, forced=True)


def _middle(self: nn.Module, expert: int, inputs: Tensor) -> Tensor:
    """Inputs of an expert's down projection."""
    if self.has_gate:
        found: Tensor = self._apply_gate(_linear(self, "gate_up_proj", expert, inputs))  # type: ignore[operator]
        return found
    return self.act_fn(_linear(self, "up_proj", expert, inputs))  # type: ignore[operator,no-any-return]


def _linear(self: nn.Module, name: str, expert: int, inputs: Tensor) -> Tensor:
    weight = getattr(self, name)[expert]
    out = inputs @ weight if self.is_transposed else nn.functional.linear(inputs, weight)
    return out + getattr(self, f"{name}_bias")[expert] if self.has_bias else out


def _checked(self: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> torch.dtype | None:
    """The dtype in which the module's own code adds up what experts give; UserError where it does anything else.

    None where numbers that are not finite leave it open.
    """
    few = hidden[:CHECKED_TOKENS], index[:CHECKED_TOKENS], weights[:CHECKED_TOKENS]
    eager = transformers_api.eager_experts(self, few)
    for dtype in dict.fromkeys((hidden.dtype, weights.dtype, torch.float32)):
        if _equal(_run(self, *few, None, dtype), eager):
            return dtype
    if not eager.isfinite().all():  # sums of infinite numbers depend on their order; what runs the layer reports them
        return None
    raise UserError(
        f"{type(self).__name__} does not compute what transformers' experts interface describes.",
        code="experts-unsupported",
        where=type(self).__name__,
        remedy="Its forward needs an adapter in model/experts.py.",
    )


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same values, NaN in the same places."""
    return torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


@dataclass(frozen=True)
class ExpertNames:
    """A decoder layer's routed experts: their `module`, and single experts' tensors by (expert, role, parameter).

    All names are relative to the layer; those of tensors are the file's.
    """

    module: str
    names: Mapping[tuple[int, str, str], str]

    @property
    def count(self) -> int:
        """Number of experts, however many of them are in memory."""
        return 1 + max(expert for expert, _, _ in self.names)

    @property
    def file_module(self) -> str:
        """What the file calls the list of the experts, relative to the layer; statistics have it."""
        first = next(iter(self.names.values()))
        return first[: first.index("experts.") + len("experts")]


_EXPERT = re.compile(r"(\d+)\.(?:.+\.)?experts\.(\d+)\.(\w+)\.(weight|bias)")


def single_experts(
    checkpoint: Checkpoint, stacks: LogicalWeights, decoder: str
) -> dict[int, dict[tuple[int, str, str], str]]:
    """Single experts' tensors of each layer, (expert, role, parameter) -> name relative to the layer, as in 16 bits."""
    names = dict.fromkeys(stacks.tensors)
    names |= dict.fromkeys(name for name in checkpoint.tensors if name.endswith((".weight", ".bias")))
    names |= dict.fromkeys(f"{name.rpartition('.')[0]}.weight" for name in checkpoint.tensors if ".experts." in name)
    found: dict[int, dict[tuple[int, str, str], str]] = {}
    for name in names:
        match = _EXPERT.fullmatch(name, len(decoder) + 1) if name.startswith(f"{decoder}.") else None
        if match and match[3] in ROLES:
            layer, key = int(match[1]), (int(match[2]), ROLES[match[3]], match[4])
            found.setdefault(layer, {})[key] = name.removeprefix(f"{decoder}.{layer}.")
    return found


def expert_names(layer: nn.Module, module: str, singles: Mapping[tuple[int, str, str], str]) -> ExpertNames:
    """What the file calls each tensor of a layer's experts; what it has not gets the name that it would have."""
    holder = layer.get_submodule(module)
    keys = [(e, *key) for e in range(count(holder)) for key in shapes(holder)]
    return ExpertNames(module, {key: singles.get(key, f"{module}.{key[0]}.{key[1]}_proj.{key[2]}") for key in keys})
