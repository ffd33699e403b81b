"""Shapes of caches against transformers: tiny random models run, and the numbers in each layer's cache are counted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from snugfit.model import config_defaults
from snugfit.vram import families
from snugfit.vram.kv_cache import AttentionCache, ModelCache, StateCache
from snugfit.vram.kv_cache_config import read_cache

TOKENS = 40
WINDOW = 16
TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
DELTA = {
    "head_dim": 32,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16}
PER_LAYER = {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "num_hidden_layers": 7}

# family -> what differs from TINY
CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "granite": {},
    "smollm3": {},
    "mistral": {"sliding_window": WINDOW},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "phi3": {"sliding_window": WINDOW, "num_key_value_heads": 4},
    "starcoder2": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "qwen3": {"head_dim": 32},
    "minimax_m2": {"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 16},
    "glm4_moe": {**ROUTED, "head_dim": 16},
    "falcon": {},
    "gemma2": {"head_dim": 32, "sliding_window": WINDOW},
    "gemma3_text": {"head_dim": 32, "sliding_window": WINDOW, "num_hidden_layers": 7},
    "gemma3n_text": {
        **PER_LAYER,
        "head_dim": 32,
        "sliding_window": WINDOW,
        "num_kv_shared_layers": 2,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
    },
    "gemma4_text": {**PER_LAYER, "head_dim": 32, "global_head_dim": 64, "sliding_window": WINDOW},
    "cohere2": {"sliding_window": WINDOW},
    "olmo3": {"sliding_window": WINDOW},
    "exaone4": {"sliding_window": WINDOW},
    "gpt_oss": {"head_dim": 32, "sliding_window": WINDOW, "num_local_experts": 4},
    "llama4_text": {
        "head_dim": 32,
        "attention_chunk_size": WINDOW,
        "num_local_experts": 4,
        "interleave_moe_layer_step": 1,
        "intermediate_size_mlp": 64,
    },
    "deepseek_v3": {
        **ROUTED,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "qwen3_next": {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_5_text": DELTA,
    "olmo_hybrid": {**DELTA, "linear_num_key_heads": 4},
    "granitemoehybrid": {
        **MAMBA2,
        "layer_types": ["mamba", "attention", "mamba", "mamba"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 32,
    },
    "bamba": {**MAMBA2, "attn_layer_indices": [1]},
    "falcon_h1": {**MAMBA2, "mamba_d_ssm": 128},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "mlp", "mamba"],
        "head_dim": 16,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "ssm_state_size": 16,
    },
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 16,
        "mamba_dt_rank": 8,
        "use_mamba_kernels": False,
        "num_experts": 1,
    },
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 16},
    "lfm2": {"full_attn_idxs": [1, 3]},
}


def run(kind: str, changes: Mapping[str, Any]) -> tuple[Any, ModelCache]:
    """transformers' cache of a tiny model after TOKENS tokens, and the one read from its config.json."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**TINY, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        output = model(torch.randint(3, 64, (1, TOKENS)), use_cache=True)
    kept = output.past_key_values if "past_key_values" in output else output.cache_params
    return kept, read_cache(json.loads(json.dumps(config.to_dict())))


def numbers(tensors: Any) -> int:
    """How many numbers are in a tensor, a dict of tensors, or nothing."""
    parts = tensors.values() if isinstance(tensors, dict) else [tensors]
    return sum(part.numel() for part in parts if part is not None)


def expected_keys(attention: AttentionCache | None, kind: str) -> int:
    """Numbers of keys and values: transformers keeps one token less than the window, which the next one completes."""
    if attention is None:
        return 0
    tokens = TOKENS if attention.window is None else min(TOKENS, attention.window - 1)
    assert attention.latent == (kind in families.LATENT_TYPES)
    return attention.bytes_per_token() // 2 * tokens


def expected_state(state: StateCache | None) -> tuple[int, int]:
    """Numbers of a convolution's window (transformers keeps the present token too) and of a recurrent state."""
    if state is None:
        return 0, 0
    channels = state.conv_channels + state.groups * state.group_width
    return channels * (state.conv_length + 1), state.recurrent


@pytest.mark.parametrize("kind", CASES)
def test_cache_is_what_transformers_keeps(kind: str) -> None:
    """Layer by layer, transformers' cache holds the numbers that we read, windows and states included."""
    kept, read = run(kind, CASES[kind])
    assert len(kept.layers) == len(read.layers)
    for layer, (attention, state) in zip(kept.layers, read.layers, strict=True):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        assert numbers(keys) + numbers(values) == expected_keys(attention, kind)
        held = getattr(layer, "conv_states", None), getattr(layer, "recurrent_states", None)
        assert (numbers(held[0]), numbers(held[1])) == expected_state(state)


def test_lightning_attention() -> None:
    """MiniMax-01's linear layers keep a square matrix a head; transformers has them beside its cache of keys."""
    kept, read = run("minimax", {"num_local_experts": 4})
    states = [state for _, state in read.layers]
    assert [numbers(held) if held != [] else 0 for held in kept.linear_cache] == [
        0 if state is None else state.recurrent for state in states
    ]
    keys = [attention for attention, _ in read.layers if attention is not None]
    held = [layer for layer in kept.layers if getattr(layer, "keys", None) is not None]
    assert [numbers(layer.keys) + numbers(layer.values) for layer in held] == [
        a.bytes_per_token() // 2 * TOKENS for a in keys
    ]


# what config.json may leave out


@pytest.mark.parametrize("kind", [kind for kind in config_defaults.DEFAULTS if kind != "kimi_k2"])
def test_defaults_are_those_of_transformers(kind: str) -> None:
    """Every default is the one of transformers' config class."""
    config = AutoConfig.for_model(kind)
    plain = config.to_dict()
    # given by transformers as a per-layer override, by a rule of its own, or dropped once layer_types are made
    hidden = {"global_head_dim", "full_attention_interval", "no_rope_layer_interval", "sliding_window_pattern"}
    for key, value in config_defaults.DEFAULTS[kind].items():
        if key in hidden or value is None:
            continue
        found = plain[key] if key in plain else getattr(config, key)
        if key == "sliding_window" and kind in families.SWITCHABLE_WINDOWS:
            assert found in (value, None, 0), key  # None while it is switched off
        elif isinstance(found, list) and not isinstance(value, list):
            assert set(found) == {value}, key
        else:
            assert found == value, key


@pytest.mark.parametrize(
    "kind",
    [
        *families.FULL_ATTENTION_PERIODS,
        *sorted(families.SWITCHABLE_WINDOWS),
        "llama4_text",
        "qwen3_next",
        "qwen3_5_text",
    ],
)
def test_layers_without_a_list_are_those_of_transformers(kind: str) -> None:
    """Without layer_types in config.json, windows, chunks and states are in the layers that transformers chooses."""
    given: dict[str, Any] = {"num_hidden_layers": 9, "num_kv_shared_layers": 0}
    if kind in families.SWITCHABLE_WINDOWS:
        given |= {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 4}
    config = AutoConfig.for_model(kind, **given)
    layer_types = getattr(config, "layer_types", None)
    layers = read_cache({"model_type": kind, "hidden_size": 512, "num_attention_heads": 8, **given}).layers
    if layer_types is None:
        pytest.skip("this class makes no list of its layers")
    kinds = {(True, False): "full_attention", (True, True): "window", (False, False): "linear_attention"}
    words = {"sliding_attention": "window", "chunked_attention": "window"}
    for (attention, _), word in zip(layers, layer_types, strict=True):
        windowed = attention is not None and attention.window is not None
        assert kinds[attention is not None, windowed] == words.get(word, word)
