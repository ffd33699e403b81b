"""Bytes that a sequence takes in an engine's cache, layer by layer.

Attention keeps a key and a value of each token and KV head; a window or a chunk bounds how many tokens. Multi-head
latent attention keeps one latent and one rotary part a token for all heads together. Linear attention, state-space and
short-convolution layers keep states of fixed size. Shapes are vLLM's (0.24 to 0.32: v1/kv_cache_interface.py,
model_executor/layers/mamba/mamba_utils.py, each model's get_mamba_state_shape_from_config). A number takes 2 bytes in a
16-bit cache and 1 in an FP8 cache; states keep a dtype of their own. `tp` is the number of GPUs in tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from functools import cached_property

from snugfit.errors import UserError


@dataclass(frozen=True, kw_only=True)
class AttentionCache:
    """Keys and values of one layer: widths of a head, in numbers a token.

    `latent`: one vector of `key_dim` is both key and value (`value_dim` 0), and is not split over GPUs. `window` is how
    many tokens stay, None for all; `chunked` layers drop them in chunks of that size, others one by one. `index_bytes`
    are those of a sparse attention's index a token, in any cache; `fp8_bytes` those of a token in an FP8 cache with a
    layout of its own, 0 for one byte a number.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None
    chunked: bool = False
    latent: bool = False
    index_bytes: int = 0
    fp8_bytes: int = 0

    def bytes_per_token(self, *, fp8: bool = False, tp: int = 1) -> int:
        """Bytes a token on each of `tp` GPUs: heads are split, and copied where there are fewer heads than GPUs."""
        heads = self.kv_heads if self.latent else max(1, self.kv_heads // tp)
        numbers = heads * (self.key_dim + self.value_dim)
        return (self.fp8_bytes or numbers if fp8 else 2 * numbers) + self.index_bytes


@dataclass(frozen=True, kw_only=True)
class StateCache:
    """The state that a layer keeps of a sequence of any length.

    `conv_channels` of the last `conv_length` tokens (and two vectors of `group_width` for each of `groups`), and
    `recurrent` numbers. Channels, heads and groups are split over GPUs.
    """

    heads: int
    conv_channels: int
    conv_length: int
    recurrent: int
    groups: int = 0
    group_width: int = 0
    conv_bytes: int = 2
    recurrent_bytes: int = 2

    def bytes(self, tp: int = 1) -> int:
        """Bytes a sequence on each of `tp` GPUs; of fewer groups than GPUs each GPU keeps one."""
        groups = self.groups if self.groups % tp == 0 else self.groups + tp - self.groups
        conv = (self.conv_channels + groups * self.group_width) // tp * self.conv_length
        return conv * self.conv_bytes + self.recurrent // tp * self.recurrent_bytes


@dataclass(frozen=True)
class CacheSize:
    """A sequence's cache on one GPU: bytes for every token, bytes of windows, and bytes at any length.

    `windows` are pairs of a window's tokens and its bytes a token, one pair for each window size.
    """

    bytes_per_token: int
    windows: tuple[tuple[int, int], ...]
    state_bytes: int


@dataclass(frozen=True)
class ModelCache:
    """The caches of all decoder layers, in order; a layer has attention, a state, both, or (shared) neither.

    `notes` say which figure is an upper bound, and why.
    """

    layers: tuple[tuple[AttentionCache | None, StateCache | None], ...]
    query_heads: int
    notes: tuple[str, ...] = ()

    @cached_property
    def attention(self) -> tuple[AttentionCache, ...]:
        """The attention caches of the layers that have one."""
        return tuple(layer[0] for layer in self.layers if layer[0] is not None)

    @cached_property
    def states(self) -> tuple[StateCache, ...]:
        """The states of the layers that have one."""
        return tuple(layer[1] for layer in self.layers if layer[1] is not None)

    @property
    def kv_heads(self) -> int | None:
        """KV heads of the first layer whose heads are split over GPUs; None where no layer has such heads."""
        return next((attention.kv_heads for attention in self.attention if not attention.latent), None)

    def size(self, *, fp8: bool = False, tp: int = 1, kept_layers: Container[int] = ()) -> CacheSize:
        """A sequence's cache on each of `tp` GPUs, in 16 bits or in FP8, beside which `kept_layers` keep 16 bits.

        UserError where engines refuse the split.
        """
        check_split(self, tp)
        windows: dict[int, int] = {}
        bytes_per_token = 0
        for number, (attention, _) in enumerate(self.layers):
            if attention is None:
                continue
            size = attention.bytes_per_token(fp8=fp8 and number not in kept_layers, tp=tp)
            if attention.window is None:
                bytes_per_token += size
            else:
                windows[attention.window] = windows.get(attention.window, 0) + size
        state_bytes = sum(state.bytes(tp) for state in self.states)
        return CacheSize(bytes_per_token, tuple(sorted(windows.items())), state_bytes)


def check_split(cache: ModelCache, tp: int) -> None:
    """UserError where engines refuse to split this model's heads over `tp` GPUs."""
    what = head_split_error(cache, tp)
    if what is not None:
        possible = [str(n) for n in (1, 2, 4, 8, 16) if head_split_error(cache, n) is None]
        remedy = f"Set `tensor_parallel_size` to {' or '.join(possible)}."
        raise UserError(f"{what}.", code="option-invalid", where="tensor_parallel_size", remedy=remedy)


def head_split_error(cache: ModelCache, tp: int) -> str | None:
    """Which heads engines cannot split over `tp` GPUs; None where they can. Engines copy KV heads if necessary."""
    uneven = None
    if cache.query_heads % tp:
        uneven = f"{cache.query_heads} attention heads"
    for attention in cache.attention:
        if uneven is None and not attention.latent and attention.kv_heads % tp and tp % attention.kv_heads:
            uneven = f"{attention.kv_heads} KV heads"
    for state in cache.states:
        if uneven is None and state.heads % tp:
            uneven = f"{state.heads} heads of a recurrent state"
    return None if uneven is None else f"{uneven} cannot be split over {tp} GPUs"
