"""The forward pass of a model layer by layer: all samples pass one layer before the next one is loaded.

transformers' own forward prepares everything that a layer receives (masks, rotary embeddings, scaled embeddings). It
runs with stubs in place of the layers; the arguments of their calls are kept, and passed to the real layers later.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from snugfit.errors import UserError
from snugfit.model.layer_stubs import LayerStub, order_problem, without_embeddings
from snugfit.model.layers import with_layers
from snugfit.model.skeleton import Skeleton

ROW_MULTIPLE = 64  # ragged rows are padded to a multiple of this or of an eighth of their length: few shapes occur


@dataclass
class Batch:
    """Samples under way: token ids [B, T] padded on the right, their true lengths, hidden states [B, T, H].

    `rows` are the samples' places in the dataset, `calls` what each layer is called with. `number` is the batch's place
    among all, `first` the number of its first real token among those of all.
    """

    rows: tuple[int, ...]
    tokens: Tensor
    lengths: tuple[int, ...]
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    number: int = 0
    first: int = 0

    @property
    def valid(self) -> Tensor | None:
        """Mask [B, T] of real tokens, None if all are real."""
        width = self.tokens.shape[1]
        if all(length == width for length in self.lengths):
            return None
        positions = torch.arange(width, device=self.tokens.device)
        return positions < torch.tensor(self.lengths, device=self.tokens.device)[:, None]


def real_tokens(values: Tensor, valid: Tensor | None) -> Tensor:
    """Values of a batch's real tokens, [n, K]; `valid` is its mask [B, T], None if all are real.

    Some models flatten values [B, T, K] to [B * T, K] before a linear: both are taken.
    """
    found = values if valid is None else values.reshape(*valid.shape, -1)[valid]
    return found.reshape(-1, found.shape[-1])


class _Reached(Exception):  # noqa: N818  # not an error
    """Ends a forward pass at the last layer's stub."""


def make_batches(
    rows: Sequence[Sequence[int]], tokens_per_batch: int, device: torch.device, *, pads: bool = True
) -> list[Batch]:
    """Samples grouped by length, padded on the right: a causal layer never sees a pad from a real token.

    Without `pads` only samples of one length are in a batch, for layers that are not causal.
    """
    batches: list[Batch] = []
    first = 0
    for members, padded_to in _members([len(row) for row in rows], tokens_per_batch, pads=pads):
        lengths = tuple(len(rows[r]) for r in members)
        width = lengths[0] if len(set(lengths)) == 1 else padded_to  # the first: nothing to pad
        padded = [[*rows[r], *([0] * (width - len(rows[r])))] for r in members]
        tokens = torch.tensor(padded, dtype=torch.int64, device=device)
        batches.append(Batch(tuple(members), tokens, lengths, number=len(batches), first=first))
        first += sum(lengths)
    return batches


def number_of_batches(lengths: Sequence[int], tokens_per_batch: int, *, pads: bool = True) -> int:
    """How many batches `make_batches` makes of samples of these lengths."""
    return sum(1 for _ in _members(lengths, tokens_per_batch, pads=pads))


def _members(lengths: Sequence[int], tokens_per_batch: int, *, pads: bool) -> Iterator[tuple[list[int], int]]:
    """The samples of each batch, and the length that they are padded to."""
    widths = [_width(length) if pads else length for length in lengths]
    order = sorted(range(len(lengths)), key=lambda r: (-widths[r], r))
    start = 0
    while start < len(order):
        width = widths[order[start]]
        size = max(1, tokens_per_batch // width)
        members = [r for r in order[start : start + size] if widths[r] == width]
        yield members, width
        start += len(members)


def some_batches(batches: Sequence[Batch], tokens: int, spread: int = 1) -> list[Batch]:
    """The fewest batches that hold so many tokens: the first ones, with a `spread` at least so many, evenly spread."""
    held = [sum(batch.lengths) for batch in batches]
    if spread > 1:
        return [batches[place] for place in spread_places(held, tokens, spread)]
    count = 1
    while count < len(batches) and sum(held[:count]) < tokens:
        count += 1
    return list(batches[:count])


def spread_places(lengths: Sequence[int], tokens: int, least: int) -> list[int]:
    """Places of the fewest of so many tokens each, evenly spread, that hold `tokens` and are `least` at least."""
    count = min(least, len(lengths))
    while True:
        places = [(2 * n + 1) * len(lengths) // (2 * count) for n in range(count)]
        if count == len(lengths) or sum(lengths[place] for place in places) >= tokens:
            return places
        count += 1


def spread_batches(
    rows: Sequence[Sequence[int]],
    tokens: int,
    least: int,
    tokens_per_batch: int,
    device: torch.device,
    *,
    pads: bool = True,
) -> list[Batch]:
    """Batches of the samples at `spread_places`."""
    places = spread_places([len(row) for row in rows], tokens, least)
    batches = make_batches([rows[place] for place in places], tokens_per_batch, device, pads=pads)
    for batch in batches:
        batch.rows = tuple(places[row] for row in batch.rows)
    return batches


def _width(length: int) -> int:
    """The length that a sample is padded to: each width costs masks of its own, eight lie between doublings."""
    multiple = max(ROW_MULTIPLE, 1 << max(0, length.bit_length() - 4))
    return -(-length // multiple) * multiple


@torch.no_grad()
def embed(
    skeleton: Skeleton,
    weights: Mapping[str, Tensor],
    batches: Sequence[Batch],
    device: torch.device,
    keep: Callable[[Batch, Tensor], None] | None = None,
) -> None:
    """Fill every batch with the first layer's hidden states and with what each layer is called with.

    `weights` are the embeddings and everything else outside the layers, by full name; the head is not needed. `keep`
    receives the hidden states batch by batch; without it they stay in the batch.
    """
    wanted = skeleton.ran
    numbers: list[int] = []
    calls: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []

    def record(number: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        numbers.append(number)
        calls.append((hidden, args, kwargs))
        if len(calls) == len(wanted):
            raise _Reached
        return hidden

    layer_stubs: list[nn.Module] = [
        LayerStub(number, layer, record, returns_tuple=skeleton.returns_tuple)
        for number, layer in enumerate(skeleton.layers)
    ]
    model = on_device(with_layers(skeleton, layer_stubs, weights), device)
    previous: Batch | None = None
    for batch in batches:
        numbers.clear()
        calls.clear()
        with contextlib.suppress(_Reached):
            model(input_ids=batch.tokens, use_cache=False)
        problem = order_problem(numbers, wanted)
        if problem:
            raise UserError(
                f"{problem}.",
                code="architecture-unsupported",
                where=skeleton.stored_layers_name,
                remedy="This family needs a reader of its own: please report it.",
            )
        if keep is None:
            batch.hidden = calls[0][0]
        else:
            keep(batch, calls[0][0])
        given = dict(zip(numbers, calls, strict=True))
        batch.calls = [given[number][1:] if number in given else ((), {}) for number in range(len(skeleton.layers))]
        alike = previous is not None and previous.tokens.shape[1] == batch.tokens.shape[1]
        before = previous.calls if alike and previous is not None else [None] * len(batch.calls)
        known: dict[tuple[int, int], Tensor] = {}
        batch.calls = [_shared(old, new, known) for old, new in zip(before, batch.calls, strict=True)]
        previous = batch


def on_device(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` with everything that has data on `device`; meta parameters stay on meta."""
    model._apply(lambda tensor: tensor if tensor.device.type == "meta" else tensor.to(device))  # noqa: SLF001
    return model


def _shared(old: Any, new: Any, known: dict[tuple[int, int], Tensor]) -> Any:
    """`new`, with every tensor that equals its counterpart in `old` replaced by it: samples of one length share masks.

    `known` are the pairs compared before. Mappings are changed in place: some carry state from layer to layer.
    """
    if isinstance(new, Tensor):
        if (id(old), id(new)) not in known:
            known[id(old), id(new)] = _held_once(old, new)
        return known[id(old), id(new)]
    if isinstance(new, tuple):
        return tuple(_shared(a, b, known) for a, b in zip(old or [None] * len(new), new, strict=True))
    if isinstance(new, dict):
        for key, value in new.items():
            new[key] = _shared((old or {}).get(key), value, known)
    return new


def _held_once(old: Any, new: Tensor) -> Tensor:
    """`old` if it equals `new`; of a mask [B, heads, T, T] that is the same for all B, one mask expanded B times."""
    known = isinstance(old, Tensor) and old.dtype == new.dtype and old.shape[1:] == new.shape[1:]
    if new.dim() != 4:
        return old if known and old.shape == new.shape and torch.equal(old, new) else new
    row = new[:1]
    if new.stride(0) and len(new) > 1:
        if not torch.equal(new, row.expand_as(new)):
            return new
        row = row.clone()
    same = known and (len(old) == 1 or not old.stride(0)) and torch.equal(old[:1], row)
    return (old[:1] if same else row).expand_as(new)


class States(Protocol):
    """Storage of the batches' hidden states [B, T, H] between layers."""

    def read(self, batch: Batch) -> Tensor:
        """The states of a batch."""

    def write(self, batch: Batch, hidden: Tensor) -> None:
        """Store the states of a batch."""


@torch.no_grad()
def run_layer(
    layer: nn.Module,
    index: int,
    batches: Sequence[Batch],
    before: Callable[[Batch], None] | None = None,
    *,
    cache: object = None,
    states: tuple[States, States | None] | None = None,
) -> int:
    """Pass every batch through a resident layer, in place; `before` is called ahead of each batch.

    Returns the number of tokens whose hidden states are NaN or infinite behind the layer.
    A `cache` receives keys and values in place of transformers' own; UserError if this family's layers take none.
    With `states` = (from, to) the batches' hidden states are read from one place and written to the other, or dropped
    if `to` is None.
    """
    return int(queue_layer(layer, index, batches, before, cache=cache, states=states))


@torch.no_grad()
def queue_layer(
    layer: nn.Module,
    index: int,
    batches: Sequence[Batch],
    before: Callable[[Batch], None] | None = None,
    *,
    cache: object = None,
    states: tuple[States, States | None] | None = None,
) -> Tensor:
    """As `run_layer`, without waiting for a GPU: the number of tokens is a scalar on the device."""
    bad: list[Tensor] = []
    for batch in batches:
        if states is not None:
            batch.hidden = states[0].read(batch)
        if before is not None:
            before(batch)
        batch.hidden = call_layer(layer, index, batch, batch.hidden, cache)
        bad.append(_nonfinite_tokens(batch))
        if states is not None:
            if states[1] is not None:
                states[1].write(batch, batch.hidden)
            batch.hidden = torch.empty(0)
    return torch.stack(bad).sum() if bad else torch.zeros((), dtype=torch.int64)


class Enough(Exception):  # noqa: N818  # not an error
    """Raised by a hook that has seen what it was to see of a batch: the rest of the layer need not run."""


@torch.no_grad()
def show_layer(
    layer: nn.Module, index: int, batches: Sequence[Batch], before: Callable[[Batch], None], states: States
) -> None:
    """Pass every batch through a resident layer for its hooks to see, as far as these want; its output is dropped."""
    for batch in batches:
        hidden = states.read(batch)
        before(batch)
        with contextlib.suppress(Enough):
            call_layer(layer, index, batch, hidden)


def call_layer(layer: Callable[..., Any], index: int, batch: Batch, hidden: Tensor, cache: object = None) -> Tensor:
    """What decoder layer `index` makes of a batch's `hidden` states; a `cache` as in `run_layer`."""
    args, kwargs = batch.calls[index]
    if cache is not None:
        if "past_key_values" not in kwargs:
            raise UserError(
                f"{type(layer).__name__} takes no cache, so its keys and values cannot be observed.",
                code="architecture-unsupported",
                where=f"layer {index}",
                remedy="Remove `kv_cache` from the recipe.",
            )
        kwargs = kwargs | {"past_key_values": cache}
    output = layer(hidden, *args, **kwargs)
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


def nonfinite_tokens(batches: Sequence[Batch]) -> int:
    """The number of tokens of batches whose hidden states are NaN or infinite."""
    return sum(int(_nonfinite_tokens(batch)) for batch in batches)


def _nonfinite_tokens(batch: Batch) -> Tensor:
    """The number of real tokens with hidden states that are not finite, a scalar on the device."""
    finite = batch.hidden.abs().amax(-1).isfinite()  # NaN carries through; aminmax is ten times slower on a CPU
    valid = batch.valid
    return (~finite if valid is None else ~finite & valid).sum()


Head = Callable[[Tensor], Tensor]


def output_head(
    skeleton: Skeleton, weights: Mapping[str, Tensor], device: torch.device, *, gradients: bool = False
) -> tuple[Head, nn.Module]:
    """Final norm and head as a function from hidden states [B, t, H] to logits [B, t, V], and the model it runs in.

    `weights` are those outside the layers, by full name; the embeddings are not needed. With `gradients` they flow to
    the hidden states.
    """
    part = torch.empty(0)
    layer_stubs: list[nn.Module] = [
        LayerStub(number, layer, lambda _number, _hidden, _args, _kwargs: part, returns_tuple=skeleton.returns_tuple)
        for number, layer in enumerate(skeleton.layers)
    ]
    model = on_device(with_layers(skeleton, layer_stubs, weights), device)
    without_embeddings(model)
    model.requires_grad_(False)

    def run(hidden: Tensor) -> Tensor:
        nonlocal part
        part = hidden
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=device)  # some families ask for them
        with torch.set_grad_enabled(gradients):
            result: Tensor = model(input_ids=ids, use_cache=False).logits
        return result

    return run, model


def logits(head: Head, batches: Sequence[Batch], *, tokens_at_once: int = 1024) -> Iterator[tuple[Batch, int, Tensor]]:
    """`head` over the batches' hidden states: yields (batch, first position, logits [B, t, V])."""
    for batch in batches:
        step = max(1, tokens_at_once // batch.tokens.shape[0])
        for start in range(0, batch.tokens.shape[1], step):
            yield batch, start, head(batch.hidden[:, start : start + step])
