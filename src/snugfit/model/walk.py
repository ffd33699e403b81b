"""Rows of tokens through a model, layer by layer: all rows pass one layer before the next is loaded.

transformers' own forward prepares everything a layer receives (masks, rotary embeddings, scaled embeddings). It is run
with stand-ins in the place of the layers; what they were called with is kept, and given to the real layers later.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from snugfit.errors import UserError
from snugfit.model.layers import Skeleton, with_layers

ROW_MULTIPLE = 64  # ragged rows are padded to a multiple of this or of an eighth of their length: few shapes occur


@dataclass
class Batch:
    """Rows in flight: token ids [B, T] padded on the right, the rows' true lengths, hidden states [B, T, H]."""

    rows: tuple[int, ...]
    tokens: Tensor
    lengths: tuple[int, ...]
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    @property
    def valid(self) -> Tensor | None:
        """Mask [B, T] of real tokens, None where all are."""
        width = self.tokens.shape[1]
        if all(length == width for length in self.lengths):
            return None
        positions = torch.arange(width, device=self.tokens.device)
        return positions < torch.tensor(self.lengths, device=self.tokens.device)[:, None]


Receive = Callable[[Tensor, tuple[Any, ...], dict[str, Any]], Tensor]


class _Reached(Exception):  # noqa: N818  # not an error
    """Ends a forward pass once the last stand-in has what it came for."""


class StandIn(nn.Module):
    """Takes a decoder layer's place: answers `receive(hidden states, args, kwargs)`, and has the layer's attributes."""

    def __init__(self, layer: nn.Module, receive: Receive) -> None:
        super().__init__()
        self.__dict__["_layer"] = layer  # not a submodule: its parameters are none of ours
        self._receive = receive

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Whatever `receive` answers."""
        return self._receive(hidden_states, args, kwargs)


def make_batches(rows: Sequence[Sequence[int]], tokens_per_batch: int, device: torch.device) -> list[Batch]:
    """Rows grouped by length, padded on the right; causal layers never see the pads from a real token."""
    order = sorted(range(len(rows)), key=lambda r: (-_width(rows[r]), r))
    batches: list[Batch] = []
    start = 0
    while start < len(order):
        width = _width(rows[order[start]])
        size = max(1, tokens_per_batch // width)
        members = [r for r in order[start : start + size] if _width(rows[r]) == width]
        lengths = tuple(len(rows[r]) for r in members)
        if len(set(lengths)) == 1:
            width = lengths[0]  # nothing to pad
        padded = [[*rows[r], *([0] * (width - len(rows[r])))] for r in members]
        batches.append(Batch(tuple(members), torch.tensor(padded, dtype=torch.int64, device=device), lengths))
        start += len(members)
    return batches


def _width(row: Sequence[int]) -> int:
    """The length a row is padded to: each width costs masks of its own, and there are eight between doublings."""
    multiple = max(ROW_MULTIPLE, 1 << max(0, len(row).bit_length() - 4))
    return -(-len(row) // multiple) * multiple


@torch.no_grad()
def embed(
    skeleton: Skeleton,
    weights: Mapping[str, Tensor],
    batches: Sequence[Batch],
    device: torch.device,
    keep: Callable[[Batch, Tensor], None] | None = None,
) -> None:
    """Fill every batch with the first layer's hidden states and with what each layer is called with.

    `weights` are the embeddings and whatever else stands outside the layers, by full name; the head is not needed.
    With `keep` the hidden states are given to it, batch by batch, and not left in the batch.
    """
    calls: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []

    def note(hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        calls.append((hidden, args, kwargs))
        if len(calls) == len(skeleton.layers):
            raise _Reached
        return hidden

    model = on_device(with_layers(skeleton, [StandIn(layer, note) for layer in skeleton.layers], weights), device)
    previous: Batch | None = None
    for batch in batches:
        calls.clear()
        with contextlib.suppress(_Reached):
            model(input_ids=batch.tokens, use_cache=False)
        if keep is None:
            batch.hidden = calls[0][0]
        else:
            keep(batch, calls[0][0])
        batch.calls = [(args, kwargs) for _, args, kwargs in calls]
        if previous is not None and previous.tokens.shape == batch.tokens.shape:
            batch.calls = [_shared(old, new) for old, new in zip(previous.calls, batch.calls, strict=True)]
        previous = batch


def on_device(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` with everything that has data moved to `device`; meta parameters stay."""
    model._apply(lambda tensor: tensor if tensor.device.type == "meta" else tensor.to(device))  # noqa: SLF001
    return model


def _shared(old: Any, new: Any) -> Any:
    """`new`, with every tensor that equals its counterpart in `old` replaced by it: rows of one shape share masks."""
    if isinstance(new, Tensor):
        same = isinstance(old, Tensor) and old.shape == new.shape and old.dtype == new.dtype and torch.equal(old, new)
        return old if same else new
    if isinstance(new, tuple):
        return tuple(_shared(a, b) for a, b in zip(old, new, strict=True))
    if isinstance(new, dict):
        return {key: _shared(old.get(key), value) for key, value in new.items()}
    return new


class States(Protocol):
    """Where hidden states [B, T, H] of batches are kept between layers."""

    def prefetch(self, batch: Batch) -> None:
        """Begin to read a batch."""

    def read(self, batch: Batch) -> Tensor:
        """A batch's states."""

    def write(self, batch: Batch, hidden: Tensor) -> None:
        """Keep a batch's states."""


@torch.no_grad()
def run_layer(
    layer: nn.Module,
    index: int,
    batches: Sequence[Batch],
    before: Callable[[Batch], None] | None = None,
    *,
    cache: object = None,
    states: tuple[States, States] | None = None,
) -> None:
    """Pass every batch through a resident layer, in place; `before` is called ahead of each batch.

    A `cache` sees keys and values in the place of transformers' own; UserError where this family's layers take none.
    With `states` = (from, to) the batches' hidden states are read from one place and written to the other.
    """
    for number, batch in enumerate(batches):
        if states is not None:
            batch.hidden = states[0].read(batch)
            for coming in batches[number + 1 : number + 2]:
                states[0].prefetch(coming)
        if before is not None:
            before(batch)
        args, kwargs = batch.calls[index]
        if cache is not None:
            if "past_key_values" not in kwargs:
                raise UserError(f"the KV cache of {type(layer).__name__} cannot be imitated.", where=f"layer {index}")
            kwargs = kwargs | {"past_key_values": cache}
        output = layer(batch.hidden, *args, **kwargs)
        batch.hidden = output[0] if isinstance(output, tuple) else output
        if states is not None:
            states[1].write(batch, batch.hidden)
            batch.hidden = torch.empty(0)


Head = Callable[[Tensor], Tensor]


def output_head(skeleton: Skeleton, weights: Mapping[str, Tensor], device: torch.device) -> tuple[Head, nn.Module]:
    """Final norm and head as a function from hidden states [B, t, H] to logits [B, t, V], and the model it runs in.

    `weights` are those outside the layers, by full name; the embeddings are not needed.
    """
    part = torch.empty(0)
    first = StandIn(skeleton.layers[0], lambda _hidden, _args, _kwargs: part)
    rest = [StandIn(layer, lambda hidden, _args, _kwargs: hidden) for layer in list(skeleton.layers)[1:]]
    model = on_device(with_layers(skeleton, [first, *rest], weights), device)

    @torch.no_grad()
    def run(hidden: Tensor) -> Tensor:
        nonlocal part
        part = hidden
        result: Tensor = model(inputs_embeds=hidden, use_cache=False).logits
        return result

    return run, model


def logits(head: Head, batches: Sequence[Batch], *, tokens_at_once: int = 1024) -> Iterator[tuple[Batch, int, Tensor]]:
    """`head` over the batches' hidden states: yields (batch, first position, logits [B, t, V])."""
    for batch in batches:
        step = max(1, tokens_at_once // batch.tokens.shape[0])
        for start in range(0, batch.tokens.shape[1], step):
            yield batch, start, head(batch.hidden[:, start : start + step])
