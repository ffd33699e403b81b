"""A model's caches, read from config.json: which kind each layer is, and its shapes.

Facts are those of transformers' config classes and of vLLM's models (0.24 to 0.32); what is not known is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from snugfit.errors import UserError
from snugfit.model import config_defaults
from snugfit.model.config_values import WHERE
from snugfit.model.language_config import positive, with_defaults
from snugfit.vram import families
from snugfit.vram.kv_cache import Attention, ModelCache, State

Text = Mapping[str, Any]

# in the config of a family that is not known here, words for caches of another kind
_ODD = re.compile(r"(^|_)(ssm|mamba|conv|linear|recurrent|compress|index|swa|lightning|delta|kda|lora_rank|latent)")
# words of `layer_types`, today's and older ones
_KINDS: Mapping[str, str] = {
    "full_attention": "full",
    "attention": "full",
    "indexed_attention": "full",  # sparse attention keeps everything, and an index
    "deepseek_sparse_attention": "full",
    "sliding_attention": "window",
    "chunked_attention": "chunk",
    "linear_attention": "state",
    "mamba": "state",
    "conv": "state",
    "hybrid": "both",
    "mlp": "none",
    "moe": "none",
}
_BOUNDS = {"window": "sliding_window", "chunk": "attention_chunk_size"}
_NEMOTRON = {"M": "state", "*": "full", "-": "none", "E": "none"}


def read_cache(config: Text) -> ModelCache:
    """The caches of the language model that a config.json describes; UserError for a kind that is not known here."""
    text = with_defaults(config)
    kind = str(text.get("model_type"))
    layers = positive(text, "num_hidden_layers")
    notes: list[str] = []
    if kind not in families.PLAIN and kind not in config_defaults.DEFAULTS:
        odd = sorted(key for key, value in text.items() if _ODD.search(key) and value not in (None, False, 0, [], {}))
        if odd:
            raise _unknown(f"{kind!r} has {', '.join(odd[:3])}")
        notes.append(f"{kind} is not known here: every layer is taken to keep all keys and values, an upper bound")
    kinds = _layer_kinds(text, kind, layers)
    shared = text.get("num_kv_shared_layers") or 0
    found = [_layer(text, kind, kinds[number], number) for number in range(layers - shared)]
    heads = text.get("num_attention_heads")
    return ModelCache(
        (*found, *[(None, None)] * shared), heads if isinstance(heads, int) and heads > 0 else 0, tuple(notes)
    )


def _unknown(what: str) -> UserError:
    return UserError(
        f"no model of this cache: {what}.", where=WHERE, remedy="Start an engine: its log tells the size of its cache."
    )


# which kind each layer is


def _layer_kinds(text: Text, kind: str, layers: int) -> list[str]:
    """What each layer keeps: full, window, chunk, state, both or none."""
    given = text.get("layer_types") or text.get("layers_block_type")
    pattern = text.get("hybrid_override_pattern")
    words: list[str] = []
    if isinstance(given, list):
        words = [_KINDS.get(str(word), str(word)) for word in given]
    elif isinstance(pattern, str):
        words = [_NEMOTRON.get(letter, letter) for letter in pattern]
    elif kind in _RULES:
        words = [_RULES[kind](text, number) for number in range(layers)]
    else:
        words = ["window" if _in_window(text, kind, number, layers) else "full" for number in range(layers)]
    if len(words) < layers:
        raise UserError(
            f"layer_types has {len(words)} entries for {layers} layers.", where=WHERE, remedy="Mend the config."
        )
    odd = next((word for word in words[:layers] if word not in _KINDS.values()), None)
    if odd is not None:
        raise _unknown(f"a layer of type {odd!r}")
    # a window without a size is none
    return ["full" if word in _BOUNDS and not text.get(_BOUNDS[word]) else word for word in words[:layers]]


def _each(interval: str) -> Callable[[Text, int], str]:
    """Full attention in the last of each `interval` layers, a state in the others."""
    return lambda text, number: "full" if (number + 1) % text[interval] == 0 else "state"


def _among(key: str, otherwise: str) -> Callable[[Text, int], str]:
    """Full attention in the layers that a list names; without the list `otherwise`."""

    def kind(text: Text, number: int) -> str:
        listed = text.get(key)
        return otherwise if listed is None else "full" if number in listed else "state"

    return kind


def _llama4(text: Text, number: int) -> str:
    ropes = text.get("no_rope_layers") or []
    if ropes and number >= len(ropes):
        raise UserError(f"no_rope_layers has {len(ropes)} entries.", where=WHERE, remedy="Mend the config.")
    sees_all = not ropes[number] if ropes else (number + 1) % text["no_rope_layer_interval"] == 0
    return "full" if sees_all else "chunk"


def _jamba(text: Text, number: int) -> str:
    return "full" if number % text["attn_layer_period"] == text["attn_layer_offset"] else "state"


# families whose layers follow a rule of their own where config.json has no list
_RULES: Mapping[str, Callable[[Text, int], str]] = {
    "mamba": lambda _text, _number: "state",
    "falcon_mamba": lambda _text, _number: "state",
    "mamba2": lambda _text, _number: "state",
    "granitemoehybrid": lambda _text, _number: "state",
    "falcon_h1": lambda _text, _number: "both",
    "jamba": _jamba,
    "bamba": _among("attn_layer_indices", "state"),
    "lfm2": _among("full_attn_idxs", "full"),
    "lfm2_moe": _among("full_attn_idxs", "full"),
    "minimax": lambda _text, number: "full" if number % 2 == 0 else "state",
    "qwen3_next": _each("full_attention_interval"),
    "qwen3_5_text": _each("full_attention_interval"),
    "qwen3_5_moe_text": _each("full_attention_interval"),
    "olmo_hybrid": _each("full_attention_interval"),
    "llama4_text": _llama4,
}


def _in_window(text: Text, kind: str, number: int, layers: int) -> bool:
    if kind in families.ALL_WINDOWED:
        return True
    if kind in families.SWITCHED or kind in families.LATE_WINDOWED:
        on = kind in families.LATE_WINDOWED or bool(text.get("use_sliding_window"))
        border = text.get("max_window_layers") or 0
        return on and (number % 2 == 0 and number < border if kind in families.ALTERNATING else number >= border)
    if kind not in families.PERIODS or (kind in families.LAST_SEES_ALL and number == layers - 1):
        return False
    period = text.get("sliding_window_pattern") or text.get("_sliding_window_pattern") or families.PERIODS[kind]
    if isinstance(period, str):  # EXAONE's "LLLG"
        return period[number % len(period)] == "L"
    return bool((number + 1) % period)


def _layer(text: Text, kind: str, what: str, number: int) -> tuple[Attention | None, State | None]:
    attention = _attention(text, kind, what, number) if what in ("full", "window", "chunk", "both") else None
    return attention, _state(text, kind) if what in ("state", "both") else None


# shapes of attention


def _attention(text: Text, kind: str, what: str, number: int) -> Attention:
    if kind in families.LATENT_TYPES:
        return _latent(text, kind)
    if text.get("kv_lora_rank"):
        raise _unknown(f"{kind!r} has a latent (kv_lora_rank)")
    heads, width = _heads(text, kind), head_dim(text)
    if kind == "gemma4_text" and what == "full":
        width = text["global_head_dim"]
        heads = text.get("num_global_key_value_heads") or heads if text.get("attention_k_eq_v") else heads
    overrides = text.get("per_layer_config") or {}
    own = overrides.get(str(number), {})
    heads, width = own.get("num_key_value_heads") or heads, own.get("head_dim") or width
    window = text[_BOUNDS[what]] if what in _BOUNDS else None
    return Attention(heads, width, width, window=window, chunked=what == "chunk")


def _latent(text: Text, kind: str) -> Attention:
    numbers = positive(text, "kv_lora_rank") + positive(text, "qk_rope_head_dim")
    width = text.get("index_head_dim") if "index_head_dim" in config_defaults.DEFAULTS[kind] else None
    if width is None:
        return Attention(1, numbers, 0, latent=True)
    # the index of DeepSeek-V3.2: an FP8 key a token with an fp32 scale for 128 of its numbers; its FP8 cache has 512
    # codes, four scales and a rotary part of 128 bytes (vLLM: models/deepseek_v2.py, MLAAttentionSpec's fp8_ds_mla)
    return Attention(1, numbers, 0, latent=True, index=width + 4 * math.ceil(width / 128), fp8_bytes=656)


def _heads(text: Text, kind: str) -> int:
    """KV heads. Falcon and StarCoder say with a flag that all queries share one."""
    flagged = kind == "gpt_bigcode" or (kind == "falcon" and not text.get("new_decoder_architecture"))
    if flagged:
        return 1 if text.get("multi_query", True) else positive(text, "num_attention_heads")
    given = text.get("num_key_value_heads")
    return positive(text, "num_attention_heads" if given is None else "num_key_value_heads")


def head_dim(text: Text) -> int:
    """Width of an attention head: as given, else the hidden size shared among the heads."""
    if text.get("head_dim") is not None:
        return positive(text, "head_dim")
    return positive(text, "hidden_size") // positive(text, "num_attention_heads")


# shapes of states


def _state(text: Text, kind: str) -> State:
    if kind not in _STATES:
        raise _unknown(f"a layer of {kind!r} keeps a state")
    return _STATES[kind](text)


def _delta_net(text: Text) -> State:
    fallback = positive(text, "num_attention_heads")
    keys = text.get("linear_num_key_heads") or fallback
    values = text.get("linear_num_value_heads") or fallback
    # OLMo's hybrid: three quarters of a head for keys, twice that for values, where nothing is said
    key = text.get("linear_key_head_dim") or int(0.75 * positive(text, "hidden_size") / fallback)
    value = text.get("linear_value_head_dim") or 2 * key
    length = positive(text, "linear_conv_kernel_dim") - 1
    wide = 4 if text.get("mamba_ssm_dtype") == "float32" else 2  # vLLM: Qwen3_5ForConditionalGenerationConfig
    heads = math.gcd(keys, values)
    return State(heads, 2 * keys * key + values * value, length, values * key * value, recurrent_bytes=wide)


def _jamba_state(text: Text) -> State:
    width = positive(text, "mamba_expand") * positive(text, "hidden_size")
    return State(width, width, positive(text, "mamba_d_conv") - 1, width * positive(text, "mamba_d_state"))


def _mamba(text: Text) -> State:
    width = text.get("intermediate_size") or positive(text, "expand") * positive(text, "hidden_size")
    return State(width, width, positive(text, "conv_kernel") - 1, width * positive(text, "state_size"))


def _short_convolution(text: Text) -> State:
    width = text.get("conv_dim") or positive(text, "hidden_size")
    return State(width, width, positive(text, "conv_L_cache") - 1, 0)


def _lightning(text: Text) -> State:
    heads, width = positive(text, "num_attention_heads"), head_dim(text)
    return State(heads, 0, 0, heads * width * width)


def _hybrid_mamba2(text: Text) -> State:
    inner = int(text["mamba_expand"] * positive(text, "hidden_size"))
    if text.get("mamba_d_ssm") is not None:
        inner = positive(text, "mamba_d_ssm")
    if text.get("mamba_d_head") in (None, "auto"):
        text = {**text, "mamba_d_head": inner // positive(text, "mamba_n_heads")}
    names = ("mamba_n_heads", "mamba_d_head", "mamba_n_groups", "mamba_d_state", "mamba_d_conv")
    return _mamba2(text, inner, names)


def _nemotron(text: Text) -> State:
    wide = 4 if text["mamba_ssm_cache_dtype"] == "float32" else 2  # vLLM: NemotronHForCausalLMConfig
    inner = positive(text, "mamba_num_heads") * positive(text, "mamba_head_dim")
    names = ("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel")
    return _mamba2(text, inner, names, recurrent_bytes=wide)


def _plain_mamba2(text: Text) -> State:
    inner = positive(text, "expand") * positive(text, "hidden_size")
    return _mamba2(text, inner, ("num_heads", "head_dim", "n_groups", "state_size", "conv_kernel"))


def _mamba2(text: Text, inner: int, names: tuple[str, ...], *, recurrent_bytes: int = 2) -> State:
    """State of Mamba 2; `names` are the keys of heads, their width, groups, state size and convolution width."""
    heads, width, groups, size, kernel = (positive(text, name) for name in names)
    return State(heads, inner, kernel - 1, heads * width * size, groups, 2 * size, recurrent_bytes=recurrent_bytes)


_STATES: Mapping[str, Callable[[Text], State]] = {
    "qwen3_next": _delta_net,
    "qwen3_5_text": _delta_net,
    "qwen3_5_moe_text": _delta_net,
    "olmo_hybrid": _delta_net,
    "granitemoehybrid": _hybrid_mamba2,
    "bamba": _hybrid_mamba2,
    "falcon_h1": _hybrid_mamba2,
    "nemotron_h": _nemotron,
    "mamba2": _plain_mamba2,
    "jamba": _jamba_state,
    "mamba": _mamba,
    "falcon_mamba": _mamba,
    "lfm2": _short_convolution,
    "lfm2_moe": _short_convolution,
    "minimax": _lightning,
}
