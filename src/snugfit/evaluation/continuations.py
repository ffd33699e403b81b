"""Where a candidate leaves its reference in a conversation, and what both would have said from there on.

Of all scored tokens those with the largest KL are taken; both models continue greedily from the words before them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from snugfit.evaluation.measure import Array
from snugfit.evaluation.subject import Outer, Subject, outer_weights, resident_layer
from snugfit.machine import free_bytes
from snugfit.model import emulate, forward_pass, layers
from snugfit.model.standins import Receive, StandIn

APART = 16  # tokens between two places in one row
TOKENS = 24


def worst_places(
    kl: Array, places: Sequence[NDArray[np.int64]], count: int, *, apart: int = APART
) -> list[tuple[int, int, float]]:
    """(row, position of the token, KL) of the `count` largest divergences, none within `apart` tokens of a larger one.

    `kl` holds all scored tokens of the rows in order, `places` their positions by row.
    """
    rows = np.repeat(np.arange(len(places)), [len(p) for p in places])
    positions = np.concatenate(list(places))
    chosen: list[tuple[int, int, float]] = []
    for index in np.argsort(np.where(np.isfinite(kl), -kl, np.inf), kind="stable"):
        row, position = int(rows[index]), int(positions[index])
        if len(chosen) == count or not np.isfinite(kl[index]):
            break
        if all(row != r or abs(position - p) > apart for r, p, _ in chosen):
            chosen.append((row, position, float(kl[index])))
    return chosen


@torch.no_grad()
def continue_greedily(
    subject: Subject, prompts: Sequence[Sequence[int]], device: torch.device, *, tokens: int = TOKENS
) -> list[list[int]]:
    """The most likely continuation of each prompt, `tokens` long unless the model ends it, under its engine profile.

    Layers stay in memory where all of them fit into half of what is free; else each is read anew for every token.
    """
    from transformers import GenerationConfig

    model = _whole_model(subject, device)
    config = subject.skeleton.config
    end = getattr(config, "eos_token_id", None)
    settings = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=end, pad_token_id=0)
    results = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)], device=device)
        output = model.generate(ids, generation_config=settings, attention_mask=torch.ones_like(ids))  # type: ignore[operator]
        results.append([int(token) for token in output[0, len(prompt) :]])
    return results


def _whole_model(subject: Subject, device: torch.device) -> nn.Module:
    """The model with layers that are read when they are called."""
    skeleton = subject.skeleton
    size = sum(p.numel() * p.element_size() for p in skeleton.layers.parameters())
    keep = 2 * size <= free_bytes(device)
    head: Outer = outer_weights(subject, device)
    weights = {**layers.outer_weights(skeleton, subject.checkpoint, head=False), **head.weights}
    called: list[nn.Module] = [
        StandIn(layer, _read_when_called(subject, index, device, keep=keep), in_tuple=skeleton.in_tuple)
        for index, layer in enumerate(skeleton.layers)
    ]
    model = forward_pass.on_device(layers.with_layers(skeleton, called, weights), device)
    emulate.quantize_inputs(model, head.quantizers)
    return model


def _read_when_called(subject: Subject, index: int, device: torch.device, *, keep: bool) -> Receive:
    held: list[tuple[nn.Module, Any]] = []

    def receive(hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        layer, rounding = held[0] if held else resident_layer(subject, index, device)
        if keep and not held:
            held.append((layer, rounding))
        if rounding is not None:
            kwargs = kwargs | {"past_key_values": _RoundedCache(kwargs["past_key_values"], rounding.update)}
        output = layer(hidden, *args, **kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    return receive


class _RoundedCache:
    """A cache of transformers whose keys and values are rounded before they are kept."""

    def __init__(self, inner: Any, rounded: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self._inner, self._rounded = inner, rounded

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens so far."""
        kept: tuple[Tensor, Tensor] = self._inner.update(*self._rounded(keys, values, layer), layer, *args, **kwargs)
        return kept
