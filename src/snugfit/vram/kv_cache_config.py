"""A model's caches, read from config.json: which kind each layer has, and its shapes.

Facts are from transformers' config classes and vLLM's models (0.24 to 0.32). An unknown kind is a UserError.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from snugfit.errors import UserError
from snugfit.model import config_defaults
from snugfit.model.config_values import WHERE
from snugfit.model.language_config import layers_without_text, positive, shares_keys_and_values, with_defaults
from snugfit.vram import families
from snugfit.vram.kv_cache import AttentionCache, ModelCache, StateCache

TextConfig = Mapping[str, Any]

# words in the keys of an unknown family's config that suggest caches of another kind
_OTHER_CACHE = re.compile(
    r"(^|_)(ssm|mamba|conv|linear|recurrent|compress|index|swa|lightning|delta|kda|lora_rank|latent)"
)
# entries of `layer_types`, today's and older ones
_KINDS: Mapping[str, str] = {
    "full_attention": "full",
    "attention": "full",
    "indexed_attention": "full",  # sparse attention keeps all tokens, and an index
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


def read_cache(config: TextConfig) -> ModelCache:
    """The caches of the language model that a config.json describes; UserError for a cache of an unknown kind."""
    text = with_defaults(config)
    kind = str(text.get("model_type"))
    layers = positive(text, "num_hidden_layers")
    notes: list[str] = []
    # Hunyuan-Large: the first of every N layers has keys and values, which the next ones use (vLLM: hunyuan_v1.py)
    factor = positive(text, "cla_share_factor") if shares_keys_and_values(text) else 1
    if factor > 1:
        notes.append(
            f"one of {factor} layers keeps keys and values, the others use those (use_cla); vLLM 0.32 runs this family "
            "through transformers' model, which cannot"
        )
    if kind not in families.FULL_ATTENTION and kind not in config_defaults.DEFAULTS:
        odd = sorted(
            key for key, value in text.items() if _OTHER_CACHE.search(key) and value not in (None, False, 0, [], {})
        )
        if odd:
            raise _unknown_cache(f"{kind!r} has {', '.join(odd[:3])}")
        notes.append(f"the family {kind} is unknown: its KV cache is an upper bound, as if every layer kept all tokens")
    if layers_without_text(text):
        notes.append(
            "keys and values of pictures (cross attention) are not counted; vLLM served this family until 0.10.2"
        )
    kinds = _layer_kinds(text, kind, layers)
    shared = text.get("num_kv_shared_layers") or 0
    found = [
        _layer(text, kind, kinds[number], number) if number % factor == 0 else (None, None)
        for number in range(layers - shared)
    ]
    heads = text.get("num_attention_heads")
    query_heads = heads if isinstance(heads, int) and heads > 0 else 0
    return ModelCache((*found, *[(None, None)] * shared), query_heads, tuple(notes))


def _unknown_cache(what: str) -> UserError:
    return UserError(
        f"the size of this model's KV cache is unknown: {what}.",
        code="cache-unknown",
        where=WHERE,
        remedy="Start an engine: its log states the size.",
    )


def _too_short(key: str, entries: int, layers: int) -> UserError:
    return UserError(
        f"{key} has {entries} entries for {layers} layers.",
        code="config-invalid",
        where=WHERE,
        remedy="Correct config.json.",
    )


# the kind of each layer's cache


def _layer_kinds(text: TextConfig, kind: str, layers: int) -> list[str]:
    """What each layer keeps: "full", "window", "chunk", "state", "both" or "none"."""
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
        raise _too_short("layer_types", len(words), layers)
    odd = next((word for word in words[:layers] if word not in _KINDS.values()), None)
    if odd is not None:
        raise _unknown_cache(f"a layer of type {odd!r}")
    # a window without a size keeps all tokens
    return ["full" if word in _BOUNDS and not text.get(_BOUNDS[word]) else word for word in words[:layers]]


def _each(interval: str) -> Callable[[TextConfig, int], str]:
    """Full attention in the last of every `text[interval]` layers, a state in the others."""
    return lambda text, number: "full" if (number + 1) % text[interval] == 0 else "state"


def _among(key: str, otherwise: str) -> Callable[[TextConfig, int], str]:
    """Full attention in the layers that the list `text[key]` names; without the list, `otherwise` in all."""

    def kind(text: TextConfig, number: int) -> str:
        listed = text.get(key)
        return otherwise if listed is None else "full" if number in listed else "state"

    return kind


def _llama4(text: TextConfig, number: int) -> str:
    ropes = text.get("no_rope_layers") or []
    if ropes and number >= len(ropes):
        raise _too_short("no_rope_layers", len(ropes), text["num_hidden_layers"])
    full = not ropes[number] if ropes else (number + 1) % text["no_rope_layer_interval"] == 0
    return "full" if full else "chunk"


def _jamba(text: TextConfig, number: int) -> str:
    return "full" if number % text["attn_layer_period"] == text["attn_layer_offset"] else "state"


# families with a rule of their own where config.json has no list of layers
_RULES: Mapping[str, Callable[[TextConfig, int], str]] = {
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
    "mllama_text_model": lambda text, number: "none" if number in text["cross_attention_layers"] else "full",
}


def _in_window(text: TextConfig, kind: str, number: int, layers: int) -> bool:
    if kind in families.WINDOW_IN_EVERY_LAYER:
        return True
    if kind in families.SWITCHABLE_WINDOWS or kind in families.LATE_WINDOWS:
        on = kind in families.LATE_WINDOWS or bool(text.get("use_sliding_window"))
        border = text.get("max_window_layers") or 0
        return on and (
            number % 2 == 0 and number < border if kind in families.ALTERNATING_WINDOWS else number >= border
        )
    if kind not in families.FULL_ATTENTION_PERIODS or (kind in families.FULL_LAST_LAYER and number == layers - 1):
        return False
    period = (
        text.get("sliding_window_pattern")
        or text.get("_sliding_window_pattern")
        or families.FULL_ATTENTION_PERIODS[kind]
    )
    if isinstance(period, str):  # EXAONE's "LLLG"
        return period[number % len(period)] == "L"
    return bool((number + 1) % period)


def _layer(text: TextConfig, kind: str, what: str, number: int) -> tuple[AttentionCache | None, StateCache | None]:
    attention = _attention(text, kind, what, number) if what in ("full", "window", "chunk", "both") else None
    return attention, _state(text, kind) if what in ("state", "both") else None


# shapes of attention


def _attention(text: TextConfig, kind: str, what: str, number: int) -> AttentionCache:
    if kind in families.LATENT_TYPES:
        return _latent(text, kind, number)
    if text.get("kv_lora_rank"):
        raise _unknown_cache(f"{kind!r} has a latent (kv_lora_rank)")
    heads, width = _heads(text, kind), head_dim(text)
    if kind == "gemma4_text" and what == "full":
        width = text["global_head_dim"]
        heads = text.get("num_global_key_value_heads") or heads if text.get("attention_k_eq_v") else heads
    other = text.get("attention_other_setting")  # Step-3.5: heads of the layers of one type
    if isinstance(other, dict) and other.get("attention_type") == _stated_type(text, number):
        heads, width = other.get("num_attention_groups") or heads, other.get("head_dim") or width
    overrides = text.get("per_layer_config") or {}
    own = overrides.get(str(number), {})
    heads, width = own.get("num_key_value_heads") or heads, own.get("head_dim") or width
    window = text[_BOUNDS[what]] if what in _BOUNDS else None
    return AttentionCache(kv_heads=heads, key_dim=width, value_dim=width, window=window, chunked=what == "chunk")


def _stated_type(text: TextConfig, number: int) -> str | None:
    """What `layer_types` calls a layer."""
    types = text.get("layer_types")
    return types[number] if isinstance(types, list) and number < len(types) else None


def _has_index(text: TextConfig, number: int) -> bool:
    """Whether a layer of sparse attention has an index of its own, or uses that of a layer before it.

    transformers: GlmMoeDsaConfig.__post_init__; vLLM: DeepseekV2MLAAttention.
    """
    listed = text.get("indexer_types") or text.get("index_topk_pattern")
    if listed:
        return number >= len(listed) or listed[number] not in ("shared", "S")
    period, offset = text.get("index_topk_freq") or 1, text.get("index_skip_topk_offset")
    return max(number - (2 if offset is None else offset) + 1, 0) % period == 0


def _latent(text: TextConfig, kind: str, number: int) -> AttentionCache:
    numbers = positive(text, "kv_lora_rank") + positive(text, "qk_rope_head_dim")
    width = text.get("index_head_dim") if "index_head_dim" in config_defaults.DEFAULTS[kind] else None
    latent = AttentionCache(kv_heads=1, key_dim=numbers, value_dim=0, latent=True)
    if width is None:
        return latent
    # the index of DeepSeek-V3.2: an FP8 key a token with an fp32 scale for 128 of its numbers; its FP8 cache has 512
    # codes, four scales and a rotary part of 128 bytes (vLLM: models/deepseek_v2.py, MLAAttentionSpec's fp8_ds_mla)
    index_bytes = width + 4 * math.ceil(width / 128) if _has_index(text, number) else 0
    return replace(latent, index_bytes=index_bytes, fp8_bytes=656)


def _heads(text: TextConfig, kind: str) -> int:
    """KV heads. Falcon and StarCoder have a flag by which all queries share one."""
    flagged = kind == "gpt_bigcode" or (kind == "falcon" and not text.get("new_decoder_architecture"))
    if flagged:
        return 1 if text.get("multi_query", True) else positive(text, "num_attention_heads")
    given = text.get("num_key_value_heads")
    return positive(text, "num_attention_heads" if given is None else "num_key_value_heads")


def head_dim(text: TextConfig) -> int:
    """Width of an attention head: as config.json states, else the hidden size divided by the heads.

    Hunyuan's releases state it under a name of their own (vLLM: hunyuan_v1.py).
    """
    if text.get("head_dim") is not None:
        return positive(text, "head_dim")
    if str(text.get("model_type")).startswith("hunyuan") and text.get("attention_head_dim") is not None:
        return positive(text, "attention_head_dim")
    return positive(text, "hidden_size") // positive(text, "num_attention_heads")


# shapes of states


def _state(text: TextConfig, kind: str) -> StateCache:
    if kind not in _STATES:
        raise _unknown_cache(f"a layer of {kind!r} keeps a state")
    return _STATES[kind](text)


def _delta_net(text: TextConfig) -> StateCache:
    fallback = positive(text, "num_attention_heads")
    keys = text.get("linear_num_key_heads") or fallback
    values = text.get("linear_num_value_heads") or fallback
    # OLMo's hybrid, where config.json has no widths: three quarters of a head for keys, twice that for values
    key = text.get("linear_key_head_dim") or int(0.75 * positive(text, "hidden_size") / fallback)
    value = text.get("linear_value_head_dim") or 2 * key
    length = positive(text, "linear_conv_kernel_dim") - 1
    return StateCache(
        heads=math.gcd(keys, values),
        conv_channels=2 * keys * key + values * value,
        conv_length=length,
        recurrent=values * key * value,
        # vLLM: Qwen3_5ForConditionalGenerationConfig
        recurrent_bytes=4 if text.get("mamba_ssm_dtype") == "float32" else 2,
    )


def _jamba_state(text: TextConfig) -> StateCache:
    width = positive(text, "mamba_expand") * positive(text, "hidden_size")
    return _channel_state(width, positive(text, "mamba_d_conv"), positive(text, "mamba_d_state"))


def _mamba(text: TextConfig) -> StateCache:
    width = text.get("intermediate_size") or positive(text, "expand") * positive(text, "hidden_size")
    return _channel_state(width, positive(text, "conv_kernel"), positive(text, "state_size"))


def _channel_state(width: int, kernel: int, size: int) -> StateCache:
    """A convolution over `kernel` tokens and `size` recurrent numbers, each for `width` channels."""
    return StateCache(heads=width, conv_channels=width, conv_length=kernel - 1, recurrent=width * size)


def _short_convolution(text: TextConfig) -> StateCache:
    width = text.get("conv_dim") or positive(text, "hidden_size")
    return _channel_state(width, positive(text, "conv_L_cache"), 0)


def _lightning(text: TextConfig) -> StateCache:
    heads, width = positive(text, "num_attention_heads"), head_dim(text)
    return StateCache(heads=heads, conv_channels=0, conv_length=0, recurrent=heads * width * width)


def _hybrid_mamba2(text: TextConfig) -> StateCache:
    inner = int(text["mamba_expand"] * positive(text, "hidden_size"))
    if text.get("mamba_d_ssm") is not None:
        inner = positive(text, "mamba_d_ssm")
    if text.get("mamba_d_head") in (None, "auto"):
        text = {**text, "mamba_d_head": inner // positive(text, "mamba_n_heads")}
    names = ("mamba_n_heads", "mamba_d_head", "mamba_n_groups", "mamba_d_state", "mamba_d_conv")
    return _mamba2(text, inner, names)


def _nemotron(text: TextConfig) -> StateCache:
    recurrent_bytes = 4 if text["mamba_ssm_cache_dtype"] == "float32" else 2  # vLLM: NemotronHForCausalLMConfig
    inner = positive(text, "mamba_num_heads") * positive(text, "mamba_head_dim")
    names = ("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel")
    return _mamba2(text, inner, names, recurrent_bytes=recurrent_bytes)


def _plain_mamba2(text: TextConfig) -> StateCache:
    inner = positive(text, "expand") * positive(text, "hidden_size")
    return _mamba2(text, inner, ("num_heads", "head_dim", "n_groups", "state_size", "conv_kernel"))


def _mamba2(text: TextConfig, inner: int, names: tuple[str, ...], *, recurrent_bytes: int = 2) -> StateCache:
    """State of Mamba 2; `names` are the keys of heads, their width, groups, state size and convolution width."""
    heads, width, groups, size, kernel = (positive(text, name) for name in names)
    return StateCache(
        heads=heads,
        conv_channels=inner,
        conv_length=kernel - 1,
        recurrent=heads * width * size,
        groups=groups,
        group_width=2 * size,
        recurrent_bytes=recurrent_bytes,
    )


_STATES: Mapping[str, Callable[[TextConfig], StateCache]] = {
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
