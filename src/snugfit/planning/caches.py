"""Kinds of KV cache that a plan may choose: 16 bits, FP8, and FP8 in all layers but some. No torch.

Which layers keep 16 bits no checkpoint can say: vLLM is told when it starts (engines/launch.py: skip_layers).
"""

from __future__ import annotations

from collections.abc import Sequence

from snugfit.records.scores import KEEP, KV_CACHE, Scores, cache_of_layer

FP8 = "fp8"
_EXCEPT = f"{FP8} except layers "


def fp8_except(layers: Sequence[int]) -> str:
    """The kind in which these layers keep 16 bits, FP8 without any."""
    return _EXCEPT + ", ".join(map(str, sorted(layers))) if layers else FP8


def kept_layers(cache: str) -> tuple[int, ...]:
    """The layers that keep 16 bits in a kind of FP8 cache."""
    return tuple(int(part) for part in cache.removeprefix(_EXCEPT).split(", ")) if cache.startswith(_EXCEPT) else ()


def scored_layers(scores: Scores) -> tuple[int, ...]:
    """The layers whose FP8 cache has a cost of its own."""
    prefix = cache_of_layer("")
    return tuple(int(g.name.removeprefix(prefix)) for g in scores.groups if g.name.startswith(prefix))


def scored_cache(scores: Scores, cache: str) -> dict[str, str]:
    """The formats by group of scores that make up a kind of cache; nothing for what was not scored."""
    kept = kept_layers(cache)
    if kept:
        return {cache_of_layer(layer): FP8 for layer in scored_layers(scores) if layer not in kept}
    return {KV_CACHE: FP8} if cache != KEEP and scores.has(KV_CACHE, FP8) else {}


def costliest_layers(scores: Scores, context: int) -> list[list[int]]:
    """The layers whose FP8 cache costs most at a context: one, two, four and so on, up to half of them."""
    layers = scored_layers(scores)
    order = sorted(layers, key=lambda layer: (-scores.cost(cache_of_layer(layer), FP8, context), layer))
    return [order[: 1 << power] for power in range(len(order).bit_length()) if 2 << power <= len(order)]
