"""Tiny random models of many families, made with transformers' own config classes, and loaded by transformers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from conftest import TINY

_GEMMA: dict[str, Any] = {"head_dim": 16, "sliding_window": 16, "tie_word_embeddings": True, "pad_token_id": 0}
_DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
_MAMBA: dict[str, Any] = {"mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "pad_token_id": 0}

# text family -> what its tiny config needs beside the common settings
FAMILIES: Mapping[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 16, "head_dim": 16},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": {"pad_token_id": 0},
    "smollm3": {"pad_token_id": 0},
    "olmo2": {},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "glm4": {"head_dim": 16, "pad_token_id": 0},
    "qwen3_next": _DELTA | {"num_experts": 0},
    "qwen3_5_text": _DELTA,
    "granitemoehybrid": _MAMBA
    | {"num_local_experts": 0, "shared_intermediate_size": 128, "mamba_n_heads": 8, "logits_scaling": 2.0}
    | {"layer_types": ["mamba", "attention", "mamba"]},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_expand": 1, "head_dim": 16},
    "gemma4_text": {
        "head_dim": 16,
        "global_head_dim": 32,
        "sliding_window": 16,
        "pad_token_id": 0,
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 16,
        "num_kv_shared_layers": 1,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "gpt_neox": {},
    "cohere2": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2, "pad_token_id": 0}
    | {"num_hidden_layers": 4},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "bamba": _MAMBA | {"mamba_n_heads": 8, "attn_layer_indices": [1]},
}

_TEXT: dict[str, Any] = {
    **{key: value for key, value in TINY.items() if key != "tie_word_embeddings"},
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "head_dim": 16,
}
_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}
_QWEN_TOWER: dict[str, Any] = {
    "depth": 2,
    "embed_dim": 32,
    "hidden_size": 32,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "mlp_ratio": 2,
    "out_hidden_size": 64,
    "intermediate_size": 64,
    "num_position_embeddings": 16,
    "fullatt_block_indexes": [1],
    "window_size": 16,
}
_QWEN_IDS = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}


def _rope(sections: Sequence[int], part: float = 1.0) -> dict[str, Any]:
    given = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}
    return {"rope_parameters": given | ({"partial_rotary_factor": part} if part < 1 else {})}


# vision-language family -> its tiny config; token ids from 60 on are placeholders of images
VISION_LANGUAGE: Mapping[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": _TEXT | {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
        "vision_config": _TOWER | {"model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
        "image_token_index": 60,
        "boi_token_index": 61,
        "eoi_token_index": 62,
    },
    "mistral3": {
        "text_config": _TEXT | {"model_type": "mistral"},
        "vision_config": _TOWER | {"model_type": "pixtral", "head_dim": 16},
        "image_token_index": 60,
        "spatial_merge_size": 2,
    },
    "llava": {
        "text_config": _TEXT | {"model_type": "llama"},
        "vision_config": _TOWER | {"model_type": "clip_vision_model", "projection_dim": 32},
        "image_token_index": 60,
    },
    "qwen2_vl": {
        "text_config": _TEXT | _rope([2, 3, 3]),
        "vision_config": _QWEN_TOWER | {"hidden_size": 64},
        **_QWEN_IDS,
    },
    "qwen2_5_vl": {"text_config": _TEXT | _rope([2, 3, 3]), "vision_config": _QWEN_TOWER, **_QWEN_IDS},
    "qwen3_vl": {
        "text_config": _TEXT | _rope([2, 3, 3]),
        "vision_config": _QWEN_TOWER | {"deepstack_visual_indexes": [0]},
        **_QWEN_IDS,
    },
    "qwen3_5": {
        "text_config": _TEXT
        | _DELTA
        | {"layer_types": ["linear_attention", "full_attention"]}
        | _rope([1, 1, 0], 0.25),
        "vision_config": _QWEN_TOWER | {"deepstack_visual_indexes": []},
        **_QWEN_IDS,
    },
    "smolvlm": {"text_config": _TEXT | {"model_type": "llama"}, "vision_config": _TOWER, "image_token_id": 60},
    "idefics3": {"text_config": _TEXT | {"model_type": "llama"}, "vision_config": _TOWER, "image_token_id": 60},
    "internvl": {
        "text_config": _TEXT | {"model_type": "qwen2"},
        "vision_config": _TOWER | {"image_size": [32, 32], "patch_size": [16, 16]},
        "image_token_id": 60,
        "image_seq_length": 1,
    },
    "gemma4": {
        "text_config": _TEXT
        | {"global_head_dim": 32, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
        | {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0},
        "vision_config": _TOWER | {"head_dim": 16, "num_key_value_heads": 2},
        "audio_config": None,
        "image_token_id": 60,
    },
    "mllama": {  # text does not run layer 1, cross attention to pictures
        "text_config": {key: value for key, value in _TEXT.items() if key != "head_dim"}
        | {"num_hidden_layers": 3, "cross_attention_layers": [1]}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        "vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "attention_heads": 2}
        | {"num_global_layers": 1, "image_size": 32, "patch_size": 16, "max_num_tiles": 1, "vision_output_dim": 64}
        | {"intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]},
        "image_token_index": 60,
    },
}


def make_vision_language(
    directory: Path, kind: str, *, dtype: torch.dtype = torch.float32, tied: bool = False, **more: Any
) -> Path:
    """Write a tiny random vision-language model as transformers does, and give its directory."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    given = json.loads(json.dumps(VISION_LANGUAGE[kind] | more))
    config = AutoConfig.for_model(kind, **given, tie_word_embeddings=tied)
    config.text_config.tie_word_embeddings = tied
    model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 0.08)
    model.save_pretrained(directory)
    return directory


def load(path: Path) -> Any:
    """A model directory as transformers loads it."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(path)
    auto = AutoModelForCausalLM if config.get_text_config() is config else AutoModelForImageTextToText
    return auto.from_pretrained(path, dtype="auto").eval()


def all_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a model directory by its name in the files."""
    found: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= load_file(file)
    return found


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same bytes."""
    return a.dtype == b.dtype and a.shape == b.shape and a.flatten().tolist() == b.flatten().tolist()


def random_rows(lengths: Sequence[int], *, seed: int = 0, stop: int = 60) -> list[list[int]]:
    """Rows of random token ids from 3 to `stop`."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, stop, (length,), generator=generator).tolist() for length in lengths]


def write_rows(file: Path, rows: Sequence[Sequence[int]]) -> Path:
    """The rows as a JSONL file of token ids."""
    file.write_text("".join(json.dumps({"input_ids": list(row)}) + "\n" for row in rows), encoding="utf-8")
    return file


def perplexity_of(logits: Tensor, rows: Sequence[Sequence[int]]) -> float:
    """Of rows of one length, from logits [B, T, V]."""
    ids = torch.tensor([list(row) for row in rows])
    return math.exp(float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())))


def unpack_nvfp4_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let compressed-tensors unpack NVFP4 to fp32, not to bf16 whatever the model's dtype is."""
    from compressed_tensors.compressors.nvfp4 import base

    unpack = base.unpack_fp4_from_uint8
    monkeypatch.setattr(base, "unpack_fp4_from_uint8", lambda p, m, n: unpack(p, m, n, dtype=torch.float32))
