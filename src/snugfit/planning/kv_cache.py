"""What a sequence costs in an engine's cache, layer by layer, from config.json alone.

A layer with attention keeps a key and a value of each token and KV head; a window or a chunk bounds how many tokens;
multi-head latent attention keeps one latent and one rotary part a token for all heads together; linear attention,
state-space and short-convolution layers keep states of fixed size. Shapes are vLLM's (0.24 to 0.32:
v1/kv_cache_interface.py, model_executor/layers/mamba/mamba_utils.py and each model's get_mamba_state_shape_from_config,
model_executor/layers/attention). In 16 bits a number has 2 bytes, in an FP8 cache 1; states keep their own dtype.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from snugfit.errors import UserError
from snugfit.model.anatomy import language_config
from snugfit.planning import families

WHERE = "config.json"
# in the config of a family that nobody here knows, words for caches of another kind
_ODD = re.compile(r"(^|_)(ssm|mamba|conv|linear|recurrent|compress|index|swa|lightning|delta|kda|lora_rank|latent)")
_PLAIN_TYPES = frozenset({"full_attention", "attention", "full"})
_WINDOW_TYPES = frozenset({"sliding_attention", "sliding", "local_attention"})
_STATE_TYPES = frozenset({"linear_attention", "mamba", "mamba2", "conv", "recurrent", "hybrid"})
_NOTHING_TYPES = frozenset({"mlp", "moe"})


@dataclass(frozen=True)
class Attention:
    """Keys and values of one layer. `value` is 0 where one vector stands for both (`latent`, not split over GPUs).

    `window`: how many tokens stay, None for all; `chunked`: they go in chunks of that size, not one by one. `index`
    are bytes a token beside them, whatever the cache's dtype (a sparse attention's index).
    """

    heads: int
    key: int
    value: int
    window: int | None = None
    chunked: bool = False
    latent: bool = False
    index: int = 0

    def bytes_per_token(self, number_bytes: int, tp: int = 1) -> int:
        """Bytes a token on each of `tp` GPUs: heads are split, and kept by several GPUs where there are too few."""
        heads = self.heads if self.latent else max(1, self.heads // tp)
        return heads * (self.key + self.value) * number_bytes + self.index


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
        number_bytes = 1 if fp8 else 2
        windows: dict[int, int] = {}
        grows = 0
        for attention in self.attention:
            size = attention.bytes_per_token(number_bytes, tp)
            if attention.window is None:
                grows += size
            else:
                windows[attention.window] = windows.get(attention.window, 0) + size
        return CacheSize(grows, tuple(sorted(windows.items())), sum(state.bytes(tp) for state in self.states))


def check_split(cache: ModelCache, tp: int) -> None:
    """UserError where engines refuse to split this model's heads over so many GPUs."""
    problem = None
    if cache.query_heads % tp:
        problem = f"{cache.query_heads} attention heads"
    for attention in cache.attention:
        if not attention.latent and attention.heads % tp and tp % attention.heads:
            problem = f"{attention.heads} KV heads"
    for state in cache.states:
        if state.heads % tp:
            problem = f"{state.heads} heads of a recurrent state"
    if problem:
        fits = [str(n) for n in (1, 2, 4, 8, 16) if not _splits(cache, n)]
        raise UserError(
            f"{problem} cannot be split over {tp} GPUs.", where="--tp", remedy=f"Use --tp {' or '.join(fits)}."
        )


def _splits(cache: ModelCache, tp: int) -> bool:
    """Whether splitting so FAILS."""
    uneven = cache.query_heads % tp or any(state.heads % tp for state in cache.states)
    return bool(uneven) or any(not a.latent and a.heads % tp and tp % a.heads for a in cache.attention)


def read_cache(config: Mapping[str, Any]) -> ModelCache:
    """The caches of the language model that a config.json describes; UserError for a kind that is not known here."""
    text = with_defaults(config)
    kind = str(text.get("model_type"))
    layers = _positive(text, "num_hidden_layers")
    notes: list[str] = []
    if kind not in families.PLAIN and kind not in families.DEFAULTS:
        odd = sorted(key for key, value in text.items() if _ODD.search(key) and value not in (None, False, 0, [], {}))
        if odd:
            raise UserError(
                f"no model of this cache: {kind!r} has {', '.join(odd[:3])}.",
                where=WHERE,
                remedy="Start an engine: its log tells the size of its cache.",
            )
        notes.append(f"{kind} is not known here: every layer is taken to keep all keys and values, an upper bound")
    kinds = _layer_kinds(text, kind, layers)
    shared = text.get("num_kv_shared_layers") or 0
    found = [_layer(text, kind, kinds[number], number) for number in range(layers)]
    found[layers - shared :] = [(None, None)] * shared
    heads = text.get("num_attention_heads")
    return ModelCache(tuple(found), heads if isinstance(heads, int) and heads > 0 else 1, tuple(notes))


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's part of a config, older names under today's too, with what transformers would fill in."""
    text = dict(language_config(config))
    for key, names in families.ALIASES.items():
        older = next((text[name] for name in names if text.get(name) is not None), None)
        if key not in text and older is not None:
            text[key] = older
    kind = text.get("model_type")
    return {**families.DEFAULTS.get(str(kind), {}), **text}


def _layer_kinds(text: Mapping[str, Any], kind: str, layers: int) -> list[str]:
    """What each layer is: full, window, chunk, state, both or none."""
    given = text.get("layer_types") or text.get("layers_block_type")
    if isinstance(given, list):
        if len(given) < layers:
            raise UserError(
                f"layer_types has {len(given)} entries for {layers} layers.", where=WHERE, remedy="Mend the config."
            )
        return [_known_kind(str(word), text) for word in given[:layers]]
    pattern = text.get("hybrid_override_pattern")
    if isinstance(pattern, str):  # Nemotron-H
        words = {"M": "state", "*": "full", "-": "none", "E": "none"}
        return [words[letter] for letter in pattern[:layers]]
    return [_kind_by_rule(text, kind, number, layers) for number in range(layers)]


def _known_kind(word: str, text: Mapping[str, Any]) -> str:
    if word in _PLAIN_TYPES or word in ("indexed_attention", "deepseek_sparse_attention"):
        return "full"
    if word in _WINDOW_TYPES:
        return "window" if text.get("sliding_window") else "full"
    if word == "chunked_attention":
        return "chunk" if text.get("attention_chunk_size") else "full"
    if word in _STATE_TYPES:
        return "both" if word == "hybrid" else "state"
    if word in _NOTHING_TYPES:
        return "none"
    raise UserError(
        f"no model of this cache: a layer of type {word!r}.",
        where=f"{WHERE}: layer_types",
        remedy="Start an engine: its log tells the size of its cache.",
    )


def _kind_by_rule(text: Mapping[str, Any], kind: str, number: int, layers: int) -> str:
    window = text.get("sliding_window")
    if kind in ("mamba", "falcon_mamba", "mamba2"):
        return "state"
    if kind == "falcon_h1":
        return "both"
    if kind == "granitemoehybrid":
        return "state"
    if kind == "jamba":
        return "full" if number % text["attn_layer_period"] == text["attn_layer_offset"] else "state"
    if kind == "bamba":
        return "full" if number in (text.get("attn_layer_indices") or ()) else "state"
    if kind in ("lfm2", "lfm2_moe"):
        attention = text.get("full_attn_idxs")
        return "full" if attention is None or number in attention else "state"
    if kind == "minimax":
        return "state" if (number + 1) % 2 == 0 else "full"
    if "full_attention_interval" in families.DEFAULTS.get(kind, {}):
        return "full" if (number + 1) % text["full_attention_interval"] == 0 else "state"
    if kind == "llama4_text":
        ropes = text.get("no_rope_layers") or []
        sees_all = not ropes[number] if ropes else (number + 1) % text["no_rope_layer_interval"] == 0
        return "full" if sees_all or not text.get("attention_chunk_size") else "chunk"
    return "window" if window and _in_window(text, kind, number, layers) else "full"


def _in_window(text: Mapping[str, Any], kind: str, number: int, layers: int) -> bool:
    if kind in families.ALL_WINDOWED:
        return True
    if kind in families.SWITCHED or kind in families.LATE_WINDOWED:
        on = kind in families.LATE_WINDOWED or bool(text.get("use_sliding_window"))
        return on and number >= (text.get("max_window_layers") or 0)
    if kind in families.PERIODS:
        period = text.get("sliding_window_pattern") or text.get("_sliding_window_pattern") or families.PERIODS[kind]
        if isinstance(period, str):  # "LLLG"
            return period[number % len(period)] == "L"
        last = kind in families.LAST_SEES_ALL and number == layers - 1
        return bool((number + 1) % period) and not last
    return False


def _layer(text: Mapping[str, Any], kind: str, what: str, number: int) -> tuple[Attention | None, State | None]:
    attention = _attention(text, kind, what, number) if what in ("full", "window", "chunk", "both") else None
    state = _state(text, kind) if what in ("state", "both") else None
    return attention, state


def _attention(text: Mapping[str, Any], kind: str, what: str, number: int) -> Attention:
    if kind in families.LATENT_TYPES:
        rank, rotary = _positive(text, "kv_lora_rank"), _positive(text, "qk_rope_head_dim")
        # DeepSeek-V3.2's index: one FP8 key a token and an fp32 scale a block of 128 of it
        # (vLLM: DeepseekV32IndexerCache in models/deepseek_v2.py)
        width = text.get("index_head_dim") if "index_head_dim" in families.DEFAULTS[kind] else None
        return Attention(1, rank + rotary, 0, latent=True, index=width + 4 * math.ceil(width / 128) if width else 0)
    if text.get("kv_lora_rank"):
        raise UserError(
            f"no model of this cache: {kind!r} has a latent (kv_lora_rank).",
            where=WHERE,
            remedy="Start an engine: its log tells the size of its cache.",
        )
    heads, width = _heads(text, kind), _head_dim(text)
    if kind == "gemma4_text" and what == "full":
        width = text["global_head_dim"]
        heads = text.get("num_global_key_value_heads") or heads if text.get("attention_k_eq_v") else heads
    overrides = text.get("per_layer_config") or {}
    own = overrides.get(str(number), overrides.get(number, {}))
    heads, width = own.get("num_key_value_heads", heads), own.get("head_dim", width)
    window = {"window": text.get("sliding_window"), "chunk": text.get("attention_chunk_size")}.get(what)
    return Attention(heads, width, width, window=window, chunked=what == "chunk")


def _heads(text: Mapping[str, Any], kind: str) -> int:
    """KV heads. Falcon and StarCoder say with a flag that all queries share one."""
    if kind == "gpt_bigcode":
        return 1 if text.get("multi_query", True) else _positive(text, "num_attention_heads")
    if kind == "falcon" and not text.get("new_decoder_architecture"):
        return 1 if text.get("multi_query", True) else _positive(text, "num_attention_heads")
    given = text.get("num_key_value_heads")
    return _positive(text, "num_attention_heads" if given is None else "num_key_value_heads")


def _head_dim(text: Mapping[str, Any]) -> int:
    if text.get("head_dim") is not None:
        return _positive(text, "head_dim")
    return _positive(text, "hidden_size") // _positive(text, "num_attention_heads")


def _state(text: Mapping[str, Any], kind: str) -> State:
    if "linear_num_value_heads" in families.DEFAULTS.get(kind, {}):  # gated delta net
        fallback = _positive(text, "num_attention_heads")
        keys = text.get("linear_num_key_heads") or fallback
        values = text.get("linear_num_value_heads") or fallback
        # OLMo hybrid's own defaults: three quarters of a head for keys, twice that for values
        key = text.get("linear_key_head_dim") or int(0.75 * _positive(text, "hidden_size") / fallback)
        value = text.get("linear_value_head_dim") or 2 * key
        recurrent_bytes = 4 if text.get("mamba_ssm_dtype") == "float32" else 2
        length = _positive(text, "linear_conv_kernel_dim") - 1
        channels = 2 * keys * key + values * value
        return State(values, channels, length, values * key * value, recurrent_bytes=recurrent_bytes)
    if kind in ("granitemoehybrid", "bamba", "falcon_h1", "nemotron_h", "mamba2"):
        return _mamba2(text, kind)
    if kind in ("jamba", "mamba", "falcon_mamba"):
        jamba = kind == "jamba"
        expanded = _positive(text, "mamba_expand" if jamba else "expand") * _positive(text, "hidden_size")
        width = expanded if jamba else text.get("intermediate_size") or expanded
        size = _positive(text, "mamba_d_state" if jamba else "state_size")
        length = _positive(text, "mamba_d_conv" if jamba else "conv_kernel") - 1
        return State(width, width, length, width * size)
    if kind in ("lfm2", "lfm2_moe"):
        width = text.get("conv_dim") or _positive(text, "hidden_size")
        return State(width, width, _positive(text, "conv_L_cache") - 1, 0)
    if kind == "minimax":  # lightning attention
        heads, width = _positive(text, "num_attention_heads"), _head_dim(text)
        return State(heads, 0, 0, heads * width * width)
    raise UserError(
        f"no model of this cache: a layer of {kind!r} keeps a state.",
        where=WHERE,
        remedy="Start an engine: its log tells the size of its cache.",
    )


def _mamba2(text: Mapping[str, Any], kind: str) -> State:
    if kind == "nemotron_h":
        heads, width = _positive(text, "mamba_num_heads"), _positive(text, "mamba_head_dim")
        inner, groups = heads * width, _positive(text, "n_groups")
        size, kernel = _positive(text, "ssm_state_size"), _positive(text, "conv_kernel")
        recurrent_bytes = 4 if text["mamba_ssm_cache_dtype"] == "float32" else 2
        return State(heads, inner, kernel - 1, heads * width * size, groups, 2 * size, recurrent_bytes=recurrent_bytes)
    if kind == "mamba2":
        heads, width = _positive(text, "num_heads"), _positive(text, "head_dim")
        inner, groups = _positive(text, "expand") * _positive(text, "hidden_size"), _positive(text, "n_groups")
        size, kernel = _positive(text, "state_size"), _positive(text, "conv_kernel")
        return State(heads, inner, kernel - 1, heads * width * size, groups, 2 * size)
    inner = int(text["mamba_expand"] * _positive(text, "hidden_size"))
    if kind == "falcon_h1" and text.get("mamba_d_ssm") is not None:
        inner = _positive(text, "mamba_d_ssm")
    heads, groups = _positive(text, "mamba_n_heads"), _positive(text, "mamba_n_groups")
    given = text.get("mamba_d_head")
    width = inner // heads if given in (None, "auto") else _positive(text, "mamba_d_head")
    size, kernel = _positive(text, "mamba_d_state"), _positive(text, "mamba_d_conv")
    return State(heads, inner, kernel - 1, heads * width * size, groups, 2 * size)


def _positive(text: Mapping[str, Any], key: str) -> int:
    value = text.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{key} is {value!r}.", where=WHERE, remedy="Mend the config.")
    return value
