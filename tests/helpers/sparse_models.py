"""Checkpoints of true size that take no disk space: real configs and headers, with sparse files for the weights.

Names, dtypes and shapes follow the releases of MiniMax-M2.1 (230B) and DeepSeek-V3 (671B).
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

Storage = Literal["fp8", "bf16"]
Tensor = tuple[str, str, tuple[int, ...]]  # name, safetensors dtype, shape

BLOCK = 128
SIZES = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "U8": 1, "I8": 1, "U32": 4, "I32": 4, "I64": 8}
FP8: dict[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}

MINIMAX_M2: dict[str, Any] = {
    "architectures": ["MiniMaxM2ForCausalLM"],
    "model_type": "minimax_m2",
    "dtype": "bfloat16",
    "hidden_size": 3072,
    "intermediate_size": 1536,
    "num_hidden_layers": 62,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rotary_dim": 64,
    "use_qk_norm": True,
    "qk_norm_type": "per_layer",
    "num_local_experts": 256,
    "num_experts_per_tok": 8,
    "scoring_func": "sigmoid",
    "use_routing_bias": True,
    "shared_intermediate_size": 0,
    "use_mtp": True,
    "num_mtp_modules": 3,
    "max_position_embeddings": 196608,
    "rope_theta": 5000000,
    "rms_norm_eps": 1e-06,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "vocab_size": 200064,
}

DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "torch_dtype": "bfloat16",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "rms_norm_eps": 1e-06,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "vocab_size": 129280,
}


def minimax_m2(directory: Path, storage: Storage = "fp8") -> Path:
    """MiniMax-M2.1: 228.7 billion weights, 62 layers of 256 experts, FP8 in blocks of 128 x 128 as released."""
    config = dict(MINIMAX_M2)
    if storage == "fp8":
        config["quantization_config"] = FP8 | {
            "fmt": "float8_e4m3fn",
            "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
        }
    return write_sparse_model(directory, config, list(_minimax_tensors(storage)))


def deepseek_v3(directory: Path, storage: Storage = "fp8") -> Path:
    """DeepSeek-V3: 671.0 billion weights in 61 layers, and a head of multi-token prediction as layer 61."""
    config = dict(DEEPSEEK_V3)
    if storage == "fp8":
        config["quantization_config"] = dict(FP8)
    return write_sparse_model(directory, config, list(_deepseek_tensors(storage)))


def write_sparse_model(
    directory: Path, config: dict[str, Any], tensors: Iterable[Tensor], shard_bytes: int = 4_300_000_000
) -> Path:
    """Write config.json, an index, and shards with whole headers and holes in place of weights; returns `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + _bytes(tensor) > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += _bytes(tensor)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):06d}.safetensors"
        _write_shard(directory / name, shard)
        weight_map |= dict.fromkeys((tensor[0] for tensor in shard), name)
    total = sum(_bytes(tensor) for shard in shards for tensor in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (directory / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return directory


def _write_shard(file: Path, tensors: Iterable[Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + _bytes((name, dtype, shape))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(file, 8 + len(text) + end)


def _bytes(tensor: Tensor) -> int:
    return SIZES[tensor[1]] * math.prod(tensor[2])


def _linear(module: str, out_features: int, in_features: int, storage: Storage) -> Iterator[Tensor]:
    if storage == "bf16":
        yield f"{module}.weight", "BF16", (out_features, in_features)
        return
    yield f"{module}.weight", "F8_E4M3", (out_features, in_features)
    yield f"{module}.weight_scale_inv", "F32", (-(-out_features // BLOCK), -(-in_features // BLOCK))


def _minimax_tensors(storage: Storage, c: dict[str, Any] = MINIMAX_M2) -> Iterator[Tensor]:
    hidden, inner = c["hidden_size"], c["intermediate_size"]
    queries, keys = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
    yield "model.embed_tokens.weight", "BF16", (c["vocab_size"], hidden)
    for layer in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", "BF16", (hidden,)
        for leaf, out_features, in_features in (
            ("q_proj", queries, hidden),
            ("k_proj", keys, hidden),
            ("v_proj", keys, hidden),
            ("o_proj", hidden, queries),
        ):
            yield from _linear(f"{prefix}.self_attn.{leaf}", out_features, in_features, storage)
        yield f"{prefix}.self_attn.q_norm.weight", "BF16", (queries,)
        yield f"{prefix}.self_attn.k_norm.weight", "BF16", (keys,)
        yield f"{prefix}.post_attention_layernorm.weight", "BF16", (hidden,)
        yield f"{prefix}.block_sparse_moe.gate.weight", "F32", (c["num_local_experts"], hidden)
        yield f"{prefix}.block_sparse_moe.e_score_correction_bias", "F32", (c["num_local_experts"],)
        for expert in range(c["num_local_experts"]):
            for leaf, out_features, in_features in (
                ("w1", inner, hidden),
                ("w2", hidden, inner),
                ("w3", inner, hidden),
            ):
                yield from _linear(
                    f"{prefix}.block_sparse_moe.experts.{expert}.{leaf}", out_features, in_features, storage
                )
    yield "model.norm.weight", "BF16", (hidden,)
    yield "lm_head.weight", "BF16", (c["vocab_size"], hidden)


def deepseek_v3_layers(
    directory: Path, *, experts: int = 256, vocabulary: int = 4096, values_of_experts: int = 2, dense: int = 1
) -> Path:
    """DeepSeek-V3's shape with two layers in FP8, of which `dense` have no experts; with 256 a layer of 12 GB.

    All weights outside the experts have values, of the experts the first `values_of_experts`; the others are zeros that
    take no space on the disk.
    """
    changed = {"num_hidden_layers": 2, "first_k_dense_replace": dense, "num_nextn_predict_layers": 0}
    changed |= {"vocab_size": vocabulary, "n_routed_experts": experts}
    config = DEEPSEEK_V3 | changed | {"quantization_config": dict(FP8)}
    found = write_sparse_model(directory, config, list(_deepseek_tensors("fp8", config)))
    return _with_values(found, values_of_experts)


def minimax_m2_layers(
    directory: Path, *, experts: int = 256, vocabulary: int = 4096, values_of_experts: int = 2
) -> Path:
    """The same of two layers of MiniMax-M2's shape: 3.7 GB a layer with 256 experts."""
    changed = {"num_hidden_layers": 2, "num_local_experts": experts, "vocab_size": vocabulary, "num_mtp_modules": 0}
    kept = ["gate", "e_score_correction_bias", "lm_head"]
    quantization = FP8 | {"fmt": "float8_e4m3fn", "modules_to_not_convert": kept}
    config = MINIMAX_M2 | changed | {"quantization_config": quantization}
    found = write_sparse_model(directory, config, list(_minimax_tensors("fp8", config)))
    return _with_values(found, values_of_experts)


def _with_values(model: Path, values_of_experts: int) -> Path:
    """The model with values in all weights outside the experts, and in the first `values_of_experts` of each layer."""
    number = re.compile(r"\.experts\.(\d+)\.")
    generator = np.random.default_rng(0)
    for file in sorted(model.glob("*.safetensors")):
        with file.open("r+b") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
            for name, info in header.items():
                expert = number.search(name)
                if name == "__metadata__" or (expert and int(expert[1]) >= values_of_experts):
                    continue
                stream.seek(8 + length + info["data_offsets"][0])
                stream.write(_values(generator, info["dtype"], math.prod(info["shape"]), norm="norm" in name))
    return model


def _values(generator: np.random.Generator, dtype: str, count: int, *, norm: bool) -> bytes:
    """Random codes and numbers that weights have; ones for norms."""
    if dtype == "F8_E4M3":
        codes = generator.integers(0, 256, count, dtype=np.uint8)
        codes[codes & 0x7F == 0x7F] = 0
        return codes.tobytes()
    if dtype == "F32":
        return generator.uniform(1e-4, 3e-4, count).astype(np.float32).tobytes()
    numbers = np.ones(count, np.float32) if norm else generator.normal(0, 0.02, count).astype(np.float32)
    return (numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes()  # bfloat16


def _deepseek_tensors(storage: Storage, c: dict[str, Any] = DEEPSEEK_V3) -> Iterator[Tensor]:
    hidden, layers = c["hidden_size"], c["num_hidden_layers"]
    yield "model.embed_tokens.weight", "BF16", (c["vocab_size"], hidden)
    for layer in range(layers + c["num_nextn_predict_layers"]):
        prefix = f"model.layers.{layer}"
        if layer >= layers:
            yield f"{prefix}.embed_tokens.weight", "BF16", (c["vocab_size"], hidden)
            yield f"{prefix}.enorm.weight", "BF16", (hidden,)
            yield f"{prefix}.hnorm.weight", "BF16", (hidden,)
            yield f"{prefix}.eh_proj.weight", "BF16", (hidden, 2 * hidden)
            yield f"{prefix}.shared_head.norm.weight", "BF16", (hidden,)
            yield f"{prefix}.shared_head.head.weight", "BF16", (c["vocab_size"], hidden)
        yield from _deepseek_layer(prefix, storage, c, dense=layer < c["first_k_dense_replace"])
    yield "model.norm.weight", "BF16", (hidden,)
    yield "lm_head.weight", "BF16", (c["vocab_size"], hidden)


def _deepseek_layer(prefix: str, storage: Storage, c: dict[str, Any], *, dense: bool) -> Iterator[Tensor]:
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    wide = c["qk_nope_head_dim"] + c["qk_rope_head_dim"]
    yield f"{prefix}.input_layernorm.weight", "BF16", (hidden,)
    yield f"{prefix}.post_attention_layernorm.weight", "BF16", (hidden,)
    yield f"{prefix}.self_attn.q_a_layernorm.weight", "BF16", (c["q_lora_rank"],)
    yield f"{prefix}.self_attn.kv_a_layernorm.weight", "BF16", (c["kv_lora_rank"],)
    for leaf, out_features, in_features in (
        ("q_a_proj", c["q_lora_rank"], hidden),
        ("q_b_proj", heads * wide, c["q_lora_rank"]),
        ("kv_a_proj_with_mqa", c["kv_lora_rank"] + c["qk_rope_head_dim"], hidden),
        ("kv_b_proj", heads * (c["qk_nope_head_dim"] + c["v_head_dim"]), c["kv_lora_rank"]),
        ("o_proj", hidden, heads * c["v_head_dim"]),
    ):
        yield from _linear(f"{prefix}.self_attn.{leaf}", out_features, in_features, storage)
    if dense:
        yield from _mlp(f"{prefix}.mlp", c["intermediate_size"], storage)
        return
    yield f"{prefix}.mlp.gate.weight", "BF16", (c["n_routed_experts"], hidden)
    yield f"{prefix}.mlp.gate.e_score_correction_bias", "F32", (c["n_routed_experts"],)
    for expert in range(c["n_routed_experts"]):
        yield from _mlp(f"{prefix}.mlp.experts.{expert}", c["moe_intermediate_size"], storage)
    yield from _mlp(f"{prefix}.mlp.shared_experts", c["moe_intermediate_size"] * c["n_shared_experts"], storage)


def _mlp(module: str, inner: int, storage: Storage) -> Iterator[Tensor]:
    hidden = DEEPSEEK_V3["hidden_size"]
    yield from _linear(f"{module}.gate_proj", inner, hidden, storage)
    yield from _linear(f"{module}.up_proj", inner, hidden, storage)
    yield from _linear(f"{module}.down_proj", hidden, inner, storage)
