"""Which values the keys of config.json may hold, of those that snugfit reads; any other value is an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from snugfit.errors import UserError

WHERE = "config.json"
MAX_LAYERS = 10_000
MAX_COUNT = 2**40  # no count of a model is larger
_COUNTS = frozenset(
    {
        *("hidden_size", "num_attention_heads", "num_key_value_heads", "num_global_key_value_heads", "head_dim"),
        *("global_head_dim", "vocab_size", "max_position_embeddings", "model_max_length", "sliding_window"),
        *("attention_chunk_size", "max_window_layers", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim"),
        *("v_head_dim", "index_head_dim", "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim"),
        *("linear_value_head_dim", "linear_conv_kernel_dim", "mamba_d_ssm", "mamba_d_state", "mamba_d_conv"),
        *("mamba_n_heads", "mamba_n_groups", "mamba_num_heads", "mamba_head_dim", "expand", "state_size"),
        *("index_skip_topk_offset", "num_attention_groups"),
        *("conv_kernel", "conv_dim", "conv_L_cache", "n_groups", "ssm_state_size", "num_heads", "attn_layer_offset"),
    }
)
# some families have a list with one count for each layer
_COUNT_LISTS = frozenset(
    {
        *("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"),
        *("n_shared_experts", "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
        *("num_routed_experts", "num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k"),
        *("attn_layer_indices", "full_attn_idxs", "no_rope_layers", "cross_attention_layers"),
    }
)
_POSITIVE_COUNTS = frozenset(
    {"full_attention_interval", "no_rope_layer_interval", "attn_layer_period", "original_max_position_embeddings"}
    | {"index_topk_freq"}
)
_LAYER_COUNTS = frozenset({"num_hidden_layers", "num_kv_shared_layers"})
_FACTORS = frozenset({"mamba_expand", "partial_rotary_factor", "factor"})
_TYPES: Mapping[str, tuple[type, ...]] = {
    "layer_types": (list,),
    "layers_block_type": (list,),
    "hybrid_override_pattern": (str, list),
    "sliding_window_pattern": (int, str),
    "_sliding_window_pattern": (int, str),
    "per_layer_config": (dict,),
    "indexer_types": (list,),
    "index_topk_pattern": (str, list),
    "attention_other_setting": (dict,),
}
# keys with a default, which null would replace
_NEVER_NULL = frozenset(
    {
        *("full_attention_interval", "no_rope_layer_interval", "attn_layer_period", "attn_layer_offset"),
        *("mamba_expand", "global_head_dim"),
    }
)


def check_values(text: Mapping[str, Any]) -> None:
    """UserError for a value with which no arithmetic can be done, or that no model has; null mostly means no value."""
    for key, value in text.items():
        if key in _NEVER_NULL if value is None else not _is_sound(key, value):
            raise _invalid(f"{key} has the value {value!r:.100}.")
    for name in ("rope_scaling", "rope_parameters"):
        scaling = text.get(name)
        numbers = ("factor", "original_max_position_embeddings")
        if isinstance(scaling, dict):
            for part in (scaling, *(value for value in scaling.values() if isinstance(value, dict))):
                check_values({key: part[key] for key in numbers if key in part})
    if other := text.get("attention_other_setting"):
        check_values({key: other[key] for key in ("num_attention_groups", "head_dim") if key in other})
    for overrides in (text.get("per_layer_config") or {}).values():
        if not isinstance(overrides, dict):
            raise _invalid("per_layer_config has an entry that is not an object.")
        check_values({key: overrides[key] or 0 for key in ("num_key_value_heads", "head_dim") if key in overrides})


def _invalid(what: str) -> UserError:
    return UserError(what, code="config-invalid", where=WHERE, remedy="Correct config.json.")


def _is_sound(key: str, value: Any) -> bool:
    if key in _COUNTS:
        return _is_count(value)
    if key in _COUNT_LISTS:
        return _is_count(value) or (isinstance(value, list) and all(map(_is_count, value)))
    if key in _POSITIVE_COUNTS:
        return _is_count(value) and value > 0
    if key in _LAYER_COUNTS:
        return _is_count(value) and value <= MAX_LAYERS
    if key in _FACTORS:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= MAX_COUNT
    return isinstance(value, _TYPES.get(key, object))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_COUNT
