"""Where a candidate diverges most from its reference in conversations, and how both continue from there.

The scored tokens with the largest KL are chosen; both models continue greedily from the text before them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from snugfit.evaluation.chunks import Chunk, ChunkGroup
from snugfit.evaluation.evaluated_model import EvaluatedModel, Outer, embedding_weights, open_layer, outer_weights
from snugfit.evaluation.token_figures import Array
from snugfit.machine import free_bytes
from snugfit.model import emulate, forward_pass, layers, pieces
from snugfit.model.layer_stubs import LayerStub, Receive
from snugfit.records.evaluation import Continuation

MIN_TOKEN_GAP = 16  # between two divergences in one chunk
CONTINUATION_TOKENS = 24
TOKENS_BEFORE = 24  # shown before a continuation


@dataclass(frozen=True)
class Divergence:
    """A scored token of a conversation, by its chunk and its position there, and KL at it."""

    chunk: Chunk
    position: int
    kl: float

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens before it."""
        return self.chunk.ids[: self.position]


def compare_continuations(
    reference: EvaluatedModel,
    candidates: Sequence[tuple[EvaluatedModel, Array]],
    group: ChunkGroup,
    count: int,
    decode: Callable[[Sequence[int]], str],
    device: torch.device,
) -> tuple[Continuation, ...]:
    """Both continuations from each candidate's `count` largest divergences in the conversations of the group.

    `candidates` come with KL of all the group's scored tokens; `decode` turns token ids into text.
    """
    in_conversations = np.repeat([chunk.conversation for chunk in group.chunks], group.target_counts)
    if count < 1 or not candidates or not in_conversations.any():
        return ()
    chosen = [
        (model, largest_divergences(np.where(in_conversations, kl, np.nan), group.chunks, count))
        for model, kl in candidates
    ]
    prompts = list(dict.fromkeys(one.prompt for _, divergences in chosen for one in divergences))
    of_reference = dict(zip(prompts, continue_greedily(reference, prompts, device), strict=True))
    result = []
    for model, divergences in chosen:
        of_model = continue_greedily(model, [one.prompt for one in divergences], device)
        for one, ids in zip(divergences, of_model, strict=True):
            result.append(
                Continuation(
                    model=model.name,
                    source=one.chunk.source,
                    position=one.position,
                    kl=one.kl,
                    before=decode(one.prompt[-TOKENS_BEFORE:]),
                    text=decode([one.chunk.ids[one.position]]),
                    reference_continuation=decode(of_reference[one.prompt]),
                    model_continuation=decode(ids),
                    same_tokens=shared_beginning(of_reference[one.prompt], ids),
                )
            )
    return tuple(result)


def largest_divergences(
    kl: Array, chunks: Sequence[Chunk], count: int, *, min_gap: int = MIN_TOKEN_GAP
) -> list[Divergence]:
    """The `count` largest divergences, none within `min_gap` tokens of a larger one; `kl` of all scored tokens."""
    places = [(chunk, int(position)) for chunk in chunks for position in chunk.target_positions]
    chosen: list[Divergence] = []
    for index in np.argsort(np.where(np.isfinite(kl), -kl, np.inf), kind="stable"):
        chunk, position = places[index]
        if len(chosen) == count or not np.isfinite(kl[index]):
            break
        if all(one.chunk is not chunk or abs(position - one.position) > min_gap for one in chosen):
            chosen.append(Divergence(chunk, position, float(kl[index])))
    return chosen


def shared_beginning(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of tokens that two continuations share from their beginning."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@torch.no_grad()
def continue_greedily(
    model: EvaluatedModel,
    prompts: Sequence[Sequence[int]],
    device: torch.device,
    *,
    tokens: int = CONTINUATION_TOKENS,
    advance: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """The most likely continuation of each prompt, `tokens` long unless the model ends it, under its engine profile.

    Layers stay in memory where all of them fit into half of the free memory; otherwise, and of layers whose experts are
    in memory some at a time, each is read again for every token. `advance` is called after each prompt.
    """
    from transformers import GenerationConfig

    module = _whole_model(model, device)
    config = model.skeleton.config
    end = getattr(config, "eos_token_id", None)
    settings = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=end, pad_token_id=0)
    results = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)], device=device)
        output = module.generate(ids, generation_config=settings, attention_mask=torch.ones_like(ids))  # type: ignore[operator]
        results.append([int(token) for token in output[0, len(prompt) :]])
        advance()
    return results


def _whole_model(model: EvaluatedModel, device: torch.device) -> nn.Module:
    """transformers' model with layers that are read when they are called."""
    skeleton = model.skeleton
    size = sum(p.numel() * p.element_size() for p in skeleton.layers.parameters())
    keep = 2 * size <= free_bytes(device)
    head: Outer = outer_weights(model, device)
    weights = {**embedding_weights(model), **head.weights}
    called: list[nn.Module] = [
        LayerStub(index, layer, _read_when_called(model, device, keep=keep), returns_tuple=skeleton.returns_tuple)
        for index, layer in enumerate(skeleton.layers)
    ]
    module = forward_pass.on_device(layers.with_layers(skeleton, called, weights), device)
    emulate.quantize_inputs(module, head.quantizers)
    return module


def _read_when_called(model: EvaluatedModel, device: torch.device, *, keep: bool) -> Receive:
    held: list[tuple[nn.Module, Any, None]] = []

    def receive(index: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        layer, rounding, in_pieces = held[0] if held else open_layer(model, index, device)
        if keep and in_pieces is None and not held:
            held.append((layer, rounding, None))
        if rounding is not None:
            kwargs = kwargs | {"past_key_values": _RoundedCache(kwargs["past_key_values"], rounding.update)}
        with pieces.filled_when_called(layer, in_pieces):
            output = layer(hidden, *args, **kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    return receive


class _RoundedCache:
    """A cache of transformers whose keys and values are rounded before they are stored."""

    def __init__(self, inner: Any, rounded: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self._inner, self._rounded = inner, rounded

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens so far."""
        kept: tuple[Tensor, Tensor] = self._inner.update(*self._rounded(keys, values, layer), layer, *args, **kwargs)
        return kept
