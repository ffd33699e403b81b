"""Which layers of a family keep how many tokens, where config.json has no list of them: rules of transformers' code.

A test compares these tables with transformers' classes.
"""

from __future__ import annotations

from collections.abc import Mapping

# every layer has the window, if config.json has one
WINDOW_IN_EVERY_LAYER = frozenset({"mistral", "mixtral", "ministral", "phi3", "phimoe", "starcoder2"})
# `use_sliding_window` turns windows on, from layer `max_window_layers` on where config.json has that key
SWITCHABLE_WINDOWS = frozenset(
    {"qwen2", "qwen2_moe", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3", "qwen3_moe", "qwen2_5_omni_text"}
)
# every other layer below `max_window_layers`, where windows are on
ALTERNATING_WINDOWS = frozenset({"qwen2_moe"})
# from layer `max_window_layers` on, always
LATE_WINDOWS = frozenset({"dots1"})
# the last of every N layers keeps all tokens; `sliding_window_pattern` in config.json overrides the number
FULL_ATTENTION_PERIODS: Mapping[str, int] = {
    "gemma2": 2,
    "vaultgemma": 2,
    "gpt_oss": 2,
    "gemma3_text": 6,
    "gemma3n_text": 5,
    "gemma4_text": 6,
    "cohere2": 4,
    "olmo3": 4,
    "exaone4": 4,
}
FULL_LAST_LAYER = frozenset({"gemma4_text"})
# keys and values as one latent for all heads, where engines know the family (vLLM: is_deepseek_mla in
# transformers_utils/model_arch_config_convertor.py); minicpm3 and mistral4 are not among them
LATENT_TYPES = frozenset({"deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "glm4_moe_lite", "glm_moe_dsa"})
# every layer keeps all keys and values of all its heads (checked in transformers' code)
FULL_ATTENTION = frozenset(
    {
        *("llama", "qwen3_vl_text", "qwen3_vl_moe_text", "gemma", "granite", "granitemoe", "granitemoeshared"),
        *("olmo", "olmo2", "olmoe", "flex_olmo", "smollm3", "stablelm", "cohere", "gpt_neox", "falcon", "opt", "gpt2"),
        *("gpt_bigcode", "bloom", "mpt", "gptj", "nemotron", "glm", "glm4", "glm4_moe", "ernie4_5", "ernie4_5_moe"),
        *("hunyuan_v1_dense", "hunyuan_v1_moe", "minimax_m2", "seed_oss", "apertus", "arcee", "ministral3"),
        *("helium", "internlm3", "bitnet", "solar_open", "hy_v3", "phi", "persimmon", "nanochat", "codegen"),
        "diffllama",
    }
)
