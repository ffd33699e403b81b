"""Tiny random mixtures of experts, by transformers' own config classes, with the tensor names of the real releases."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from conftest import TINY
from helpers.tiny_families import VISION_LANGUAGE, all_tensors

Source = Callable[[str], Path]  # a family -> its model's directory

_SMALL: dict[str, Any] = {"num_hidden_layers": 2, "num_experts_per_tok": 2, "pad_token_id": 0}
_HEADS: dict[str, Any] = {"head_dim": 16}
_GRANITE: dict[str, Any] = {
    "num_local_experts": 6,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.25,
    "logits_scaling": 2.0,
    "tie_word_embeddings": True,
}
_MAMBA: dict[str, Any] = {"mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_n_heads": 8}
_LATENT: dict[str, Any] = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
# one layer of dense weights before those of experts; experts in two groups, of which one is asked
_GROUPED: dict[str, Any] = {
    "intermediate_size": 192,
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}

# family -> its tiny config; token ids are those of conftest's TINY
MIXTURES: Mapping[str, dict[str, Any]] = {
    # experts that transformers stacks and runs through its interface (use_experts_implementation)
    "mixtral": _HEADS | {"num_local_experts": 4},
    "qwen3_moe": _HEADS | {"moe_intermediate_size": 128, "num_experts": 8, "norm_topk_prob": True},
    "olmoe": {"num_experts": 6},
    "granitemoe": _GRANITE,
    "granitemoehybrid": _GRANITE
    | _MAMBA
    | {"shared_intermediate_size": 96, "num_hidden_layers": 3, "layer_types": ["mamba", "attention", "mamba"]},
    "qwen2_moe": {"moe_intermediate_size": 128, "shared_expert_intermediate_size": 96, "num_experts": 5},
    "glm4_moe": _HEADS | _GROUPED | {"attention_bias": True, "use_qk_norm": True, "num_nextn_predict_layers": 0},
    "minimax_m2": _HEADS | {"num_local_experts": 8, "rotary_dim": 8},
    "deepseek_v3": _GROUPED | _LATENT | {"num_nextn_predict_layers": 1},
    "gpt_oss": _HEADS
    | {"num_local_experts": 4, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "nemotron_h": _HEADS
    | {key: value for key, value in _GROUPED.items() if key != "first_k_dense_replace"}
    | {"layers_block_type": ["mamba", "moe", "attention", "moe"], "num_hidden_layers": 4}
    | {"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1, "chunk_size": 16}
    | {"moe_shared_expert_intermediate_size": 96, "num_nextn_predict_layers": 0},
    "qwen3_vl_moe": {
        **VISION_LANGUAGE["qwen3_vl"],
        "text_config": VISION_LANGUAGE["qwen3_vl"]["text_config"]
        | {"moe_intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 2},
    },
    # experts outside this interface: stacks of all weights, run by the family's own code
    "llama4_text": _HEADS | {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 192},
    "longcat_flash": _LATENT
    | {"num_layers": 2, "ffn_hidden_size": 192, "expert_ffn_hidden_size": 128, "routed_scaling_factor": 2.5}
    | {"head_dim": 16, "n_routed_experts": 6, "zero_expert_num": 0, "moe_topk": 2},
    "jetmoe": {"kv_channels": 16, "num_local_experts": 4},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2},
    },
}
# families of single tests: the sweeps above would take too long with all of them
_INDEXED: dict[str, Any] = _GROUPED | _LATENT | {"index_head_dim": 32, "index_n_heads": 2, "index_topk": 64}
OTHER_MIXTURES: Mapping[str, dict[str, Any]] = {
    "deepseek_v32": _INDEXED,
    "glm_moe_dsa": _INDEXED,
    "jamba": {"num_experts": 4, "mamba_d_state": 16, "attn_layer_period": 2, "attn_layer_offset": 1}
    | {"expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False, "num_hidden_layers": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1, "num_hidden_layers": 3}
    | {"moe_intermediate_size": 128, "num_experts": 4},
    "hunyuan_v1_moe": _HEADS | {"num_experts": 4, "moe_topk": 2, "intermediate_size": 128},
    # files that hold all experts of a layer in two tensors, by names that no family's row lists
    "qwen3_5_moe_text": _HEADS
    | {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    | {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "moe_intermediate_size": 96, "num_experts": 4}
    | {"shared_expert_intermediate_size": 96},
    "gemma4_text": _HEADS
    | {"global_head_dim": 32, "sliding_window": 16, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 16}
    | {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"], "enable_moe_block": True}
    | {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 96},
    "granitemoe_swa": _GRANITE | {"intermediate_size": 96, "sliding_window": 16},
}
# where a config keeps the width of one expert
_INNER: Mapping[str, str] = {
    "mixtral": "intermediate_size",
    "olmoe": "intermediate_size",
    "granitemoe": "intermediate_size",
    "granitemoehybrid": "intermediate_size",
    "minimax_m2": "intermediate_size",
    **dict.fromkeys(("jamba", "hunyuan_v1_moe", "granitemoe_swa"), "intermediate_size"),
    "gpt_oss": "intermediate_size",
    "llama4_text": "intermediate_size",
    "jetmoe": "intermediate_size",
    "longcat_flash": "expert_ffn_hidden_size",
}
_PREDICTED = "num_nextn_predict_layers"


def mixture_settings(family: str, *, wide: bool = False, inner: int | None = None, **settings: Any) -> dict[str, Any]:
    """The config of a tiny mixture: `wide` as for make_mixture, `inner` for the width of one expert."""
    given: dict[str, Any] = json.loads(json.dumps({**MIXTURES, **OTHER_MIXTURES}[family]))
    if "text_config" in given:
        text = given["text_config"]
    elif family == "dbrx":
        names = {"hidden_size": "d_model", "num_attention_heads": "n_heads", "max_position_embeddings": "max_seq_len"}
        given = {names.get(key, key): value for key, value in TINY.items()} | {"n_layers": 2, "pad_token_id": 0} | given
        text = given
    else:
        given = TINY | _SMALL | given
        text = given
    if family == "longcat_flash":
        for key in ("num_hidden_layers", "num_experts_per_tok", "intermediate_size"):
            del given[key]
    if wide:
        _widen(family, given, text)
    inner = inner or (256 if wide else None)
    if inner and family == "dbrx":
        text["ffn_config"]["ffn_hidden_size"] = inner
    elif inner:
        text[_INNER.get(family, "moe_intermediate_size")] = inner
    text |= settings
    return given


def _widen(family: str, given: dict[str, Any], text: dict[str, Any]) -> None:
    """Make each dimension of the decoder's linears a multiple of 128, except for those that no release has so."""
    text["d_model" if family == "dbrx" else "hidden_size"] = 128
    if family == "dbrx":
        text["attn_config"]["kv_n_heads"] = 4
    elif not text.keys() & {"head_dim", "kv_channels"}:
        text["num_key_value_heads"] = 4
    wider = {"head_dim": 64, "kv_channels": 64, "rotary_dim": 32, "q_lora_rank": 128, "kv_lora_rank": 128}
    wider |= {"qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64, "ffn_hidden_size": 384}
    wider |= {"shared_intermediate_size": 256, "shared_expert_intermediate_size": 256, "intermediate_size_mlp": 384}
    wider |= {"mamba_n_heads": 4, "mamba_d_head": 64, "mamba_num_heads": 4, "mamba_head_dim": 64}
    wider |= {"mamba_d_state": 64, "ssm_state_size": 64, "moe_shared_expert_intermediate_size": 256}
    text |= {key: value for key, value in wider.items() if key in text}
    if "first_k_dense_replace" in text:
        text["intermediate_size"] = 384
    if "vision_config" in given:
        given["vision_config"]["out_hidden_size"] = 128
        text["rope_parameters"]["mrope_section"] = [8, 12, 12]


def make_mixture(
    family: str,
    folder: Path,
    *,
    wide: bool = False,
    inner: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: str = "5GB",
    **settings: Any,
) -> Path:
    """Write a tiny random mixture of experts as its release is written, and give `folder`.

    Hidden size 64 and experts of width 128. `wide` makes the hidden size 128 and experts 256 wide, so that blocks of
    128 x 128 divide; `inner` sets the width of an expert (192 leaves partial blocks). `settings` override the config,
    the text model's if there is one. Layers of multi-token prediction, which transformers does not build, follow the
    others in the files if `num_nextn_predict_layers` says so.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    given = mixture_settings(family, wide=wide, inner=inner, **settings)
    tied = given.get("text_config", given).get("tie_word_embeddings", False)
    if "text_config" in given:
        given["tie_word_embeddings"] = tied
    layers, predicted = given.get("num_hidden_layers", 0), given.get(_PREDICTED, 0)
    config = AutoConfig.for_model(family, **given | ({"num_hidden_layers": layers + predicted} if predicted else {}))
    auto = AutoModelForImageTextToText if "text_config" in given else AutoModelForCausalLM
    torch.manual_seed(seed)
    model = auto.from_config(config, dtype=dtype)
    _randomize(model)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tensors = all_tensors(folder)
    if predicted:
        config = AutoConfig.for_model(family, **given)
        config.architectures, config.dtype = model.config.architectures, dtype
        config.save_pretrained(folder)
        tensors = _with_prediction(tensors, layers, predicted)
    if family == "qwen3_5_moe_text":
        tensors = _stacked(tensors)
    rewrite(folder, {name: _as_released(family, name, tensor) for name, tensor in tensors.items()}, max_shard_size)
    return folder


def rewrite(folder: Path, tensors: Mapping[str, Tensor], max_shard_size: str = "5GB") -> None:
    """Replace all tensors of a model directory by these."""
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]:
        file.unlink()
    held = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_torch_state_dict(held, folder, max_shard_size=max_shard_size, metadata={"format": "pt"})


@torch.no_grad()
def _randomize(model: Any) -> None:
    """Weights that keep activations near one, routers with a clear choice, and varied norms and biases."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        leaf = name.rpartition(".")[2]
        if leaf.endswith("e_score_correction_bias"):
            tensor.normal_(0.0, 0.1)
        elif tensor.dim() == 2 and ("router" in name or name.endswith("gate.weight")):
            tensor.normal_(0.0, 2.0 / tensor.shape[1] ** 0.5)
        elif tensor.dim() == 2 and leaf.endswith("_bias"):  # of stacked experts
            tensor.normal_(0.0, 0.05)
        elif tensor.dim() in {2, 3} and "conv" not in name and "visual" not in name:
            fan_in = getattr(model.config.get_text_config(), "hidden_size", 64)
            tensor.normal_(0.0, 0.64 / fan_in**0.5)
        elif "norm" in name and leaf == "weight":
            tensor.mul_(1.0 + 0.1 * torch.randn_like(tensor))
        elif leaf in {"bias", "sinks"} and "conv" not in name and "visual" not in name:
            tensor.normal_(0.0, 0.05)


def _as_released(family: str, name: str, tensor: Tensor) -> Tensor:
    """A tensor in the dtype and the order of axes of the family's releases, if transformers writes another.

    Values in fp32 have digits that 16 bits do not have.
    """
    if name.endswith("e_score_correction_bias") or (family == "minimax_m2" and name.endswith("gate.weight")):
        return tensor.float() * (1.0 + 1e-3 * torch.rand(tensor.shape))
    if family == "qwen3_vl_moe" and name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
        # transformers transposes what it reads only if the shape is not that of its parameter
        assert tensor.shape[1] != tensor.shape[2], "choose another width"
        return tensor.transpose(1, 2)
    return tensor


def _stacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Single experts as two tensors a layer, [E, 2 I, H] and [E, H, I], as Qwen3.5's releases hold them."""
    single = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
    made = {name: tensor for name, tensor in tensors.items() if not single.fullmatch(name)}
    parts: dict[str, dict[tuple[int, str], Tensor]] = {}
    for name, tensor in tensors.items():
        if found := single.fullmatch(name):
            parts.setdefault(found[1], {})[int(found[2]), found[3]] = tensor
    for module, of in parts.items():
        numbers = range(1 + max(number for number, _ in of))
        made[f"{module}.gate_up_proj"] = torch.stack([torch.cat([of[n, "gate"], of[n, "up"]]) for n in numbers])
        made[f"{module}.down_proj"] = torch.stack([of[n, "down"] for n in numbers])
    return made


def _with_prediction(tensors: dict[str, Tensor], layers: int, predicted: int) -> dict[str, Tensor]:
    """Turns layers from `layers` on into those of multi-token prediction, which repeat the embedding and the head."""
    embedding, head = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
    hidden = embedding.shape[1]
    made = dict(tensors)
    for layer in range(layers, layers + predicted):
        prefix = f"model.layers.{layer}"
        for leaf in ("enorm", "hnorm", "shared_head.norm"):
            made[f"{prefix}.{leaf}.weight"] = (1.0 + 0.1 * torch.randn(hidden)).to(embedding.dtype)
        made[f"{prefix}.eh_proj.weight"] = (torch.randn(hidden, 2 * hidden) * 0.45 / hidden**0.5).to(embedding.dtype)
        made[f"{prefix}.embed_tokens.weight"] = embedding
        made[f"{prefix}.shared_head.head.weight"] = head
    return made
