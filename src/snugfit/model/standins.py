"""Modules that take the place of others, so that transformers' own forward runs where weights are missing.

Stand-ins for decoder layers note what layers are called with, or answer with states that are given; one for embeddings
answers zeros; one for the inner part of a vision-language model runs its text decoder alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from snugfit.errors import UserError

Receive = Callable[[Tensor, tuple[Any, ...], dict[str, Any]], Tensor]
# what a decoder takes of the arguments that its wrapper passes on
_DECODER_ARGUMENTS = ("attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache")


class StandIn(nn.Module):
    """Takes a decoder layer's place: answers `receive(hidden states, args, kwargs)`, and has the layer's attributes.

    With `in_tuple` the answer is the first of a tuple, as the real layer's.
    """

    def __init__(self, layer: nn.Module, receive: Receive, *, in_tuple: bool = False) -> None:
        super().__init__()
        self.__dict__["_layer"] = layer  # not a submodule: its parameters are none of ours
        self._receive = receive
        self._in_tuple = in_tuple

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        """Whatever `receive` answers."""
        answer = self._receive(hidden_states, args, kwargs)
        return (answer,) if self._in_tuple else answer


class NoEmbedding(nn.Module):
    """Zeros [..., H] for ids [...]: shape and dtype of embeddings whose weights are not needed."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self._width, self._dtype = embedding.embedding_dim, embedding.weight.dtype

    def forward(self, ids: Tensor) -> Tensor:
        """Zeros on the device of `ids`."""
        return torch.zeros((*ids.shape, self._width), dtype=self._dtype, device=ids.device)


def token_embeddings(model: nn.Module) -> dict[str, nn.Embedding]:
    """The embeddings of tokens in `model` by name: those at its begin, and any of the same class, as each layer's."""
    first = model.get_input_embeddings()  # type: ignore[operator]
    if not isinstance(first, nn.Embedding):
        return {}
    return {name: module for name, module in model.named_modules() if type(module) is type(first)}


def without_embeddings(model: nn.Module) -> None:
    """Replace the embeddings of tokens in `model` by stand-ins."""
    for name, module in token_embeddings(model).items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, NoEmbedding(module))


class TextOnly(nn.Module):
    """The inner part of a vision-language model without its towers: the text decoder, under the name it has there."""

    def __init__(self, name: str, decoder: nn.Module) -> None:
        super().__init__()
        self.add_module(name, decoder)
        self._name = name

    def forward(self, input_ids: Tensor | None = None, **given: Any) -> _Outputs:
        """What the decoder makes of text; whatever belongs to pictures is passed over."""
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


@dataclass(frozen=True)
class Loop:
    """How a decoder runs its layers: `in_tuple` if it takes the first part of what each returns.

    `mappings`: layers are called with one in which they can leave things for later ones.
    """

    in_tuple: bool
    mappings: bool


@torch.no_grad()
def rehearse(decoder: nn.Module, layers: nn.ModuleList, *, where: str) -> Loop:
    """How `decoder` runs `layers`, found by a run without weights.

    UserError where hidden states are no single tensor [B, T, H], or change on their way from one layer to the next.
    """
    for in_tuple in (False, True):
        calls, end = _rehearse(decoder, layers, in_tuple=in_tuple)
        first = calls[0][0]
        if first.dim() != 3:
            what = f"its layers pass hidden states {list(first.shape)} for 2 tokens, not [1, 2, H]: not handled yet."
            raise UserError(what, where=where)
        after = [hidden for hidden, _ in calls[1:]]
        shapes = {hidden.shape for hidden in (*after, end)}
        if shapes == {first.shape} and all(hidden.data_ptr() == first.data_ptr() for hidden in after):
            given = [value for _, kwargs in calls for value in kwargs.values()]
            return Loop(in_tuple, any(isinstance(value, MutableMapping) for value in given))
        if shapes != {first.shape[1:]}:
            break
    raise UserError("its forward changes hidden states between layers, which is not handled yet.", where=where)


def _rehearse(
    decoder: nn.Module, layers: nn.ModuleList, *, in_tuple: bool
) -> tuple[list[tuple[Tensor, dict[str, Any]]], Tensor]:
    """What each layer is called with, and what the decoder gives at the end; every layer answers the first's input."""
    calls: list[tuple[Tensor, dict[str, Any]]] = []

    def note(hidden: Tensor, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        calls.append((hidden, kwargs))
        return calls[0][0]

    standins = nn.ModuleList(StandIn(layer, note, in_tuple=in_tuple) for layer in layers)
    model = copy.deepcopy(decoder, {id(layers): standins})
    without_embeddings(model)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.device.type == "meta":
            put(model, name, torch.zeros((), dtype=tensor.dtype).expand(tensor.shape))
    output = model(input_ids=torch.zeros((1, 2), dtype=torch.int64), use_cache=False)
    return calls, output[0]


def put(model: nn.Module, name: str, value: Tensor) -> None:
    """Let `value` be the parameter or buffer `name` of `model`."""
    owner = model.get_submodule(name.rpartition(".")[0])
    leaf = name.rpartition(".")[2]
    is_parameter = isinstance(getattr(owner, leaf), nn.Parameter)
    setattr(owner, leaf, nn.Parameter(value, requires_grad=False) if is_parameter else value)
