"""Keys that a config.json may omit: their older names, and the defaults of transformers' config classes.

Most releases write every key, but not all (Gemma 3 4B omits its heads). A test compares these tables with
transformers' classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# key -> its older names
ALIASES: Mapping[str, tuple[str, ...]] = {
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads", "attention_heads"),
    "num_key_value_heads": ("num_kv_heads", "n_head_kv", "multi_query_group_num", "num_attention_groups"),
    "hidden_size": ("n_embd", "n_embed", "d_model", "dim"),
    "max_position_embeddings": ("n_positions", "max_sequence_length", "seq_length", "max_seq_len", "n_ctx"),
    "intermediate_size": ("ffn_dim", "n_inner", "ffn_hidden_size"),
}

# keys under which configs state the number of routed experts of a layer
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
# keys under which configs state the number of layers of multi-token prediction
PREDICTION_KEYS = ("num_nextn_predict_layers", "num_mtp_modules", "mtp_num_hidden_layers")

_QWEN2 = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
_LLAMA = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}
_MIXTRAL = _LLAMA | {"num_key_value_heads": 8, "intermediate_size": 14336, "max_position_embeddings": 131072}
_GEMMA = {"head_dim": 256, "tie_word_embeddings": True}
_DELTA = {
    "head_dim": 256,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
_MAMBA2 = {
    "mamba_expand": 2,
    "mamba_n_heads": 128,
    "mamba_d_head": 64,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_conv": 4,
}
_LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}

# model_type -> key -> the value that transformers uses where config.json has none; None means that another key decides.
# Only families whose releases omit keys, or whose layers need them, are listed
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _MIXTRAL | {"sliding_window": 4096},
    "ministral": _MIXTRAL | {"sliding_window": 4096},
    "mixtral": _MIXTRAL,
    "phi3": {"hidden_size": 3072, "num_attention_heads": 32},
    "phimoe": {"num_key_value_heads": 8},
    "starcoder2": {"num_key_value_heads": 2},
    "qwen2": _QWEN2,
    "qwen2_moe": _QWEN2,
    "qwen2_vl_text": _QWEN2 | {"max_window_layers": 80},
    "qwen2_5_vl_text": _QWEN2 | {"max_window_layers": 80},
    "qwen2_5_omni_text": _QWEN2 | {"sliding_window": 32768},
    "qwen3": _QWEN2 | {"head_dim": 128},
    "qwen3_moe": {"use_sliding_window": False, "sliding_window": 4096, "num_key_value_heads": 4},
    "qwen3_vl_text": {"head_dim": 128},
    "qwen3_vl_moe_text": {"head_dim": 128},
    "gemma": _GEMMA | {"num_attention_heads": 16, "num_key_value_heads": 16},
    "gemma2": _GEMMA
    | {
        "hidden_size": 2304,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "vocab_size": 256000,
        "intermediate_size": 9216,
        "max_position_embeddings": 8192,
    },
    "gemma3_text": _GEMMA
    | {
        "hidden_size": 2304,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "vocab_size": 262208,
        "intermediate_size": 9216,
        "max_position_embeddings": 131072,
    },
    "gemma3n_text": _GEMMA
    | {
        "hidden_size": 2048,
        "num_hidden_layers": 35,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_kv_shared_layers": 15,
        "sliding_window": 512,
        "vocab_size": 262400,
        "max_position_embeddings": 32768,
    },
    "gemma4_text": _GEMMA
    | {
        "hidden_size": 2304,
        "num_hidden_layers": 30,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "global_head_dim": 512,
        "num_kv_shared_layers": 0,
        "sliding_window": 512,
        "vocab_size": 262144,
        "max_position_embeddings": 131072,
    },
    "vaultgemma": _GEMMA | {"num_attention_heads": 8, "num_key_value_heads": 4, "sliding_window": 4096},
    "cohere2": {"sliding_window": 4096, "tie_word_embeddings": True},
    "olmo3": {"sliding_window": 4096},
    "exaone4": {"sliding_window": 4096, "sliding_window_pattern": 4},
    "gpt_oss": {"head_dim": 64, "num_attention_heads": 64, "num_key_value_heads": 8, "sliding_window": 128},
    "dots1": {"sliding_window": 4096, "max_window_layers": 62},
    "llama4_text": {
        "head_dim": 128,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "attention_chunk_size": 8192,
        "no_rope_layer_interval": 4,
    },
    "mllama_text_model": {
        "hidden_size": 4096,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
    },
    "minimax_m2": {"head_dim": 128, "num_key_value_heads": 8},
    "step3p5": {"num_key_value_heads": 8},
    "qwen3_next": _DELTA | {"num_attention_heads": 16, "num_key_value_heads": 2},
    "qwen3_5_text": _DELTA | {"num_attention_heads": 16, "num_key_value_heads": 4},
    "qwen3_5_moe_text": _DELTA | {"num_attention_heads": 16, "num_key_value_heads": 2},
    "olmo_hybrid": {
        "full_attention_interval": 4,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": None,
        "linear_value_head_dim": None,
        "linear_num_key_heads": None,
        "linear_num_value_heads": None,
    },
    "granitemoehybrid": _MAMBA2,
    "bamba": _MAMBA2 | {"num_key_value_heads": 8},
    "falcon_h1": _MAMBA2 | {"mamba_d_head": 8, "mamba_d_ssm": 1024, "num_key_value_heads": 8},
    "nemotron_h": {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "mamba_num_heads": 128,
        "mamba_head_dim": 64,
        "n_groups": 8,
        "ssm_state_size": 128,
        "conv_kernel": 4,
        "mamba_ssm_cache_dtype": "float32",
    },
    "jamba": {
        "num_key_value_heads": 8,
        "attn_layer_period": 8,
        "attn_layer_offset": 4,
        "mamba_expand": 2,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
    },
    "mamba": {"expand": 2, "state_size": 16, "conv_kernel": 4},
    "falcon_mamba": {"expand": 2, "state_size": 16, "conv_kernel": 4},
    "mamba2": {"expand": 2, "state_size": 128, "conv_kernel": 4, "num_heads": 128, "head_dim": 64, "n_groups": 8},
    "lfm2": {"num_key_value_heads": 8, "conv_L_cache": 3},
    "lfm2_moe": {"num_key_value_heads": 8, "conv_L_cache": 3},
    "minimax": {"num_key_value_heads": 8, "sliding_window": None},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT | {"index_head_dim": 128},
    "kimi_k2": _LATENT,
    "glm4_moe_lite": _LATENT | {"qk_nope_head_dim": 192, "v_head_dim": 256},
    "glm_moe_dsa": _LATENT | {"qk_nope_head_dim": 192, "v_head_dim": 256, "index_head_dim": 128},
}
