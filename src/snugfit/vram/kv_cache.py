"""What a sequence costs in an engine's cache, layer by layer.

A layer with attention keeps a key and a value of each token and KV head; a window or a chunk bounds how many tokens;
multi-head latent attention keeps one latent and one rotary part a token for all heads together; linear attention,
state-space and short-convolution layers keep states of fixed size. Shapes are vLLM's (0.24 to 0.32:
v1/kv_cache_interface.py, model_executor/layers/mamba/mamba_utils.py, each model's get_mamba_state_shape_from_config).
In 16 bits a number has 2 bytes, in an FP8 cache 1; states keep a dtype of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

from snugfit.errors import UserError


@dataclass(frozen=True)
class Attention:
    """Keys and values of one layer. `value` is 0 where one vector stands for both (`latent`, not split over GPUs).

    `window`: how many tokens stay, None for all; `chunked`: they go in chunks of that size, not one by one. `index`
    are bytes a token besides, whatever the cache's dtype (a sparse attention's index); `fp8_bytes` what a token has in
    an FP8 cache of a layout of its own, 0 for one byte a number.
    """

    heads: int
    key: int
    value: int
    window: int | None = None
    chunked: bool = False
    latent: bool = False
    index: int = 0
    fp8_bytes: int = 0

    def bytes_per_token(self, *, fp8: bool = False, tp: int = 1) -> int:
        """Bytes a token on each of `tp` GPUs: heads are split, and kept by several GPUs where there are too few."""
        heads = self.heads if self.latent else max(1, self.heads // tp)
        numbers = heads * (self.key + self.value)
        return (self.fp8_bytes or numbers if fp8 else 2 * numbers) + self.index


@dataclass(frozen=True)
class State:
    """What a layer without keys and values keeps of a sequence, whatever its length.

    `conv_channels` of the last `conv_length` tokens (and two vectors of `group_width` a group, of `groups` groups), and
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
        """Bytes a sequence on each of `tp` GPUs; fewer groups than GPUs are kept once on each."""
        groups = self.groups if self.groups % tp == 0 else self.groups + tp - self.groups
        conv = (self.conv_channels + groups * self.group_width) // tp * self.conv_length
        return conv * self.conv_bytes + self.recurrent // tp * self.recurrent_bytes


@dataclass(frozen=True)
class CacheSize:
    """A sequence's cache on one GPU in bytes: what grows with every token, what stops growing, what is there at once.

    `windows` are pairs of tokens that stay and bytes a token, one for each window size.
    """

    bytes_per_token: int
    windows: tuple[tuple[int, int], ...]
    state_bytes: int

    def bytes_at(self, tokens: int) -> int:
        """Bytes of a sequence of so many tokens, without an engine's rounding to blocks."""
        windowed = sum(min(tokens, window) * size for window, size in self.windows)
        return self.bytes_per_token * tokens + windowed + self.state_bytes


@dataclass(frozen=True)
class ModelCache:
    """The caches of all decoder layers, in order; a layer may have attention, a state, both or (shared) neither.

    `notes` say what is an upper bound, and why.
    """

    layers: tuple[tuple[Attention | None, State | None], ...]
    query_heads: int
    notes: tuple[str, ...] = ()

    @property
    def attention(self) -> tuple[Attention, ...]:
        """Of every layer that has it."""
        return tuple(layer[0] for layer in self.layers if layer[0] is not None)

    @property
    def states(self) -> tuple[State, ...]:
        """Of every layer that has one."""
        return tuple(layer[1] for layer in self.layers if layer[1] is not None)

    def size(self, *, fp8: bool = False, tp: int = 1) -> CacheSize:
        """A sequence's cache on each of `tp` GPUs, in 16 bits or in FP8; UserError where heads cannot be split so."""
        check_split(self, tp)
        windows: dict[int, int] = {}
        grows = 0
        for attention in self.attention:
            size = attention.bytes_per_token(fp8=fp8, tp=tp)
            if attention.window is None:
                grows += size
            else:
                windows[attention.window] = windows.get(attention.window, 0) + size
        return CacheSize(grows, tuple(sorted(windows.items())), sum(state.bytes(tp) for state in self.states))


def check_split(cache: ModelCache, tp: int) -> None:
    """UserError where engines refuse to split this model's heads over so many GPUs."""
    problem = _uneven(cache, tp)
    if problem:
        fits = [str(n) for n in (1, 2, 4, 8, 16) if _uneven(cache, n) is None]
        remedy = f"Use --tp {' or '.join(fits)}."
        raise UserError(f"{problem} cannot be split over {tp} GPUs.", where="--tp", remedy=remedy)


def _uneven(cache: ModelCache, tp: int) -> str | None:
    """What cannot be split so; None where all can. KV heads may be kept several times."""
    if cache.query_heads % tp:
        return f"{cache.query_heads} attention heads"
    for attention in cache.attention:
        if not attention.latent and attention.heads % tp and tp % attention.heads:
            return f"{attention.heads} KV heads"
    uneven = next((state.heads for state in cache.states if state.heads % tp), None)
    return None if uneven is None else f"{uneven} heads of a recurrent state"
