"""Stubs that replace modules, so that transformers' own forward pass runs without weights.

A stub of a decoder layer records what the layer is called with, or returns given states; one of embeddings returns
zeros; one of the inner part of a vision-language model runs its text decoder alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from snugfit.errors import UserError

_REPORT = "This family needs a reader of its own: please report it."
# what a stub gives the number of its layer and the arguments of a call
Receive = Callable[[int, Tensor, tuple[Any, ...], dict[str, Any]], Tensor]
# what a decoder takes of the arguments that its wrapper passes on
_DECODER_ARGUMENTS = ("attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache")


class LayerStub(nn.Module):
    """Replaces decoder layer `number`: returns `receive(number, hidden states, args, kwargs)`, has its attributes.

    With `returns_tuple` the result is the first of two in a tuple, as the real layer's.
    """

    def __init__(self, number: int, layer: nn.Module, receive: Receive, *, returns_tuple: bool = False) -> None:
        super().__init__()
        self.__dict__["_layer"] = layer  # not a submodule: its parameters do not belong to the stub
        self._number = number
        self._receive = receive
        self._returns_tuple = returns_tuple

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, None]:
        """What `receive` returns."""
        answer = self._receive(self._number, hidden_states, args, kwargs)
        return (answer, None) if self._returns_tuple else answer


class ZeroEmbedding(nn.Module):
    """Returns zeros [..., H] for ids [...]: shape and dtype of embeddings whose weights are not needed."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self._tokens, self._width = embedding.weight.shape
        self._dtype = embedding.weight.dtype

    @property
    def weight(self) -> Tensor:
        """Zeros, for families that take a row of it."""
        return torch.zeros((), dtype=self._dtype).expand(self._tokens, self._width)

    def forward(self, ids: Tensor) -> Tensor:
        """Zeros on the device of `ids`."""
        return torch.zeros((*ids.shape, self._width), dtype=self._dtype, device=ids.device)


def token_embeddings(model: nn.Module) -> dict[str, nn.Embedding]:
    """The token embeddings of `model` by name: the input embeddings, and any of the same class, such as a layer's."""
    first = model.get_input_embeddings()  # type: ignore[operator]
    if not isinstance(first, nn.Embedding):
        return {}
    return {name: module for name, module in model.named_modules() if type(module) is type(first)}


def without_embeddings(model: nn.Module) -> None:
    """Replace the token embeddings of `model` by stubs."""
    for name, module in token_embeddings(model).items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, ZeroEmbedding(module))


class TextOnly(nn.Module):
    """The inner part of a vision-language model without its towers: the text decoder, under the name it has there."""

    def __init__(self, name: str, decoder: nn.Module) -> None:
        super().__init__()
        self.add_module(name, decoder)
        self._name = name

    def forward(self, input_ids: Tensor | None = None, **given: Any) -> _Outputs:
        """What the decoder makes of text; arguments about pictures are ignored."""
        taken = {key: given[key] for key in _DECODER_ARGUMENTS if given.get(key) is not None}
        return _Outputs(self.get_decoder()(input_ids=input_ids, **taken))

    def get_decoder(self) -> nn.Module:
        """The text decoder."""
        return self.get_submodule(self._name)

    def get_input_embeddings(self) -> nn.Module:
        """The text decoder's embeddings."""
        found: nn.Module = self.get_decoder().get_input_embeddings()  # type: ignore[operator]
        return found


class _Outputs:
    """A decoder's outputs; None for what the whole model would have added, such as states of pictures."""

    def __init__(self, outputs: Any) -> None:
        self._outputs = outputs

    def __getitem__(self, index: Any) -> Any:
        return self._outputs[index]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._outputs, name, None)


Call = tuple[Tensor, tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class LayerCalls:
    """How a decoder calls its layers: `returns_tuple` if it takes the first part of what each returns.

    `calls` are the arguments of each layer that text runs, by its number, for a few tokens, with embeddings and weights
    of zero.
    """

    returns_tuple: bool
    calls: Mapping[int, Call]


@torch.no_grad()
def trace_layer_calls(
    model: nn.Module, layers: nn.ModuleList, tokens: Tensor, *, where: str, skipped: Collection[int] = ()
) -> LayerCalls:
    """How `model` calls `layers`, found by a forward pass on `tokens` [1, T] without weights up to the output head.

    UserError if hidden states are not one tensor [1, T, H], or change between one layer and the next, and if the pass
    does not call every layer but the `skipped` ones once, in order.
    """
    wanted = [number for number in range(len(layers)) if number not in skipped]
    failure = ""
    for returns_tuple in (False, True):
        try:
            numbers, calls = _calls(model, layers, tokens, wanted, returns_tuple=returns_tuple)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            failure = failure or f" ({type(error).__name__}: {error})"
            continue
        problem = order_problem(numbers, wanted)
        if problem:
            raise UserError(f"{problem}.", code="architecture-unsupported", where=where, remedy=_REPORT)
        first = calls[0][0]
        if first.shape[:-1] != tokens.shape:
            what = f"its layers pass hidden states {list(first.shape)} for {len(tokens[0])} tokens."
            raise UserError(what, code="architecture-unsupported", where=where, remedy=_REPORT)
        if all(_one(hidden, first) for hidden, _, _ in calls):
            return LayerCalls(returns_tuple, dict(zip(numbers, calls, strict=True)))
    what = f"its decoder calls the layers in an unknown way{failure}."
    raise UserError(what, code="architecture-unsupported", where=where, remedy=_REPORT)


@torch.no_grad()
def why_not_passed_on(layer: nn.Module, call: Call, dtype: torch.dtype, *, returns_tuple: bool) -> str:
    """Why the hidden states that a layer gets and returns are not all of one kind, in `dtype`; empty if they are.

    Only shapes and dtypes are computed. A layer that needs values to run, as a router's choice, is left to the run.
    """
    hidden, args, kwargs = _on_meta(call)
    try:
        given = copy.deepcopy(layer).to("meta")(hidden, *args, **kwargs)
        found = given[0] if returns_tuple else given
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        found = hidden
    for states, does in ((hidden, "get"), (found, "return")):
        if isinstance(states, Tensor) and (states.shape != hidden.shape or states.dtype != dtype):
            return f"its layers {does} {list(states.shape)} in {states.dtype}, not {list(hidden.shape)} in {dtype}"
    return ""


def _on_meta(value: Any) -> Any:
    """Arguments of a call with tensors that have no values in place of all others."""
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, tuple | list):
        return type(value)(map(_on_meta, value))
    return {key: _on_meta(one) for key, one in value.items()} if isinstance(value, dict) else value


def order_problem(numbers: Sequence[int], wanted: Sequence[int]) -> str:
    """Why calls of the layers `numbers` are not one call of each of `wanted`, in order; "" if they are."""
    if list(numbers) == list(wanted):
        return ""
    twice = next((number for place, number in enumerate(numbers) if number in numbers[:place]), None)
    if twice is not None:
        return f"its decoder runs layer {twice} more than once"
    extra = next((number for number in numbers if number not in wanted), None)
    if extra is not None:
        return f"its decoder runs layer {extra} on text, which config.json says it does not"
    missing = next((number for number in wanted if number not in numbers), None)
    if missing is not None:
        return f"its decoder does not run layer {missing} on text"
    before, after = next(pair for pair in pairwise(numbers) if pair[0] > pair[1])
    return f"its decoder runs layer {after} after layer {before}"


def _one(a: Any, b: Tensor) -> bool:
    return isinstance(a, Tensor) and a.shape == b.shape and a.data_ptr() == b.data_ptr()


class _Reached(Exception):  # noqa: N818  # not an error
    """Ends a forward pass at the output head, or where a decoder calls more layers than it has."""


def _calls(
    model: nn.Module, layers: nn.ModuleList, tokens: Tensor, wanted: Sequence[int], *, returns_tuple: bool
) -> tuple[list[int], list[Call]]:
    """The layers that are called, and with what, if all of them return what the first one gets.

    What follows the layers is run for nothing but to see that it calls none of them again.
    """
    numbers: list[int] = []
    calls: list[Call] = []

    def record(number: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        numbers.append(number)
        calls.append((hidden, args, kwargs))
        if len(calls) > len(layers):
            raise _Reached
        return calls[0][0]

    def stop(*_: Any) -> None:
        raise _Reached

    layer_stubs = nn.ModuleList(
        LayerStub(number, layer, record, returns_tuple=returns_tuple) for number, layer in enumerate(layers)
    )
    stage = copy.deepcopy(model, {id(layers): layer_stubs})
    without_embeddings(stage)
    find_head: Any = getattr(stage, "get_output_embeddings", None)
    head = None if find_head is None else find_head()
    if isinstance(head, nn.Module):
        head.register_forward_pre_hook(stop)
    for name, tensor in [*stage.named_parameters(), *stage.named_buffers()]:
        if tensor.device.type == "meta":
            put(stage, name, torch.zeros((), dtype=tensor.dtype).expand(tensor.shape))
    try:
        stage(input_ids=tokens, use_cache=False)
    except _Reached:
        pass
    except Exception:
        if numbers != wanted:
            raise
    return numbers, calls


def alike(a: Any, b: Any) -> bool:
    """Whether two calls pass a layer the same tensors, by position and by name."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return all(alike(a.get(key), b.get(key)) for key in {*a, *b} - {"position_ids"})
    return True


def put(model: nn.Module, name: str, value: Tensor) -> None:
    """Make `value` the parameter or buffer `name` of `model`."""
    owner = model.get_submodule(name.rpartition(".")[0])
    leaf = name.rpartition(".")[2]
    is_parameter = isinstance(getattr(owner, leaf), nn.Parameter)
    setattr(owner, leaf, nn.Parameter(value, requires_grad=False) if is_parameter else value)
