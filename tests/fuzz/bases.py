"""What is mutated: small models of every dialect and family, recipes, results. Weights are holes, headers are whole."""

from __future__ import annotations

import ast
import json
import math
import os
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import snugfit
from helpers.real_configs import (
    FALCON_7B,
    GEMMA3_4B,
    GEMMA3N_E4B,
    GPT2,
    GPT_OSS_120B,
    GRANITE4_H_SMALL,
    JAMBA_MINI,
    LLAMA4_SCOUT,
    MISTRAL_7B_V01,
    QWEN3_8B,
    QWEN3_NEXT_80B,
)
from helpers.sparse_models import DEEPSEEK_V3, FP8, MINIMAX_M2, SIZES, Tensor
from inspection.test_inspect import LLAMA, STORED, llama

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class Base:
    """A model: config.json, the tensors of each weight file, and other files."""

    config: Mapping[str, Any]
    shards: Sequence[Sequence[Tensor]]
    files: Mapping[str, bytes] = field(default_factory=dict)

    def write(self, directory: Path, **raw: bytes) -> Path:
        """The model in a new directory; `raw` replaces config or index."""
        directory.mkdir(parents=True)
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(self.shards, 1):
            name = SINGLE if len(self.shards) == 1 else f"model-{number:05d}-of-{len(self.shards):05d}.safetensors"
            write_shard(directory / name, dump_header(header_of(shard)), size_of(shard))
            weight_map |= dict.fromkeys((tensor[0] for tensor in shard), name)
        if len(self.shards) > 1:
            index = json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}).encode()
            (directory / INDEX).write_bytes(raw.get("index", index))
        (directory / "config.json").write_bytes(raw.get("config", json.dumps(self.config).encode()))
        for name, content in self.files.items():
            (directory / name).write_bytes(content)
        return directory


def header_of(tensors: Sequence[Tensor]) -> dict[str, Any]:
    """A safetensors header."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + SIZES.get(dtype, 2) * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    return header


def size_of(tensors: Sequence[Tensor]) -> int:
    """Bytes of all tensors."""
    return sum(SIZES.get(dtype, 2) * math.prod(shape) for _, dtype, shape in tensors)


def dump_header(header: Mapping[str, Any]) -> bytes:
    """Length and JSON text."""
    return framed(json.dumps(header).encode())


def framed(text: bytes) -> bytes:
    """A header's text behind its length."""
    return struct.pack("<Q", len(text)) + text


def write_shard(file: Path, front: bytes, size: int) -> None:
    """A weight file: its header, then a hole of `size` bytes."""
    file.write_bytes(front)
    os.truncate(file, len(front) + min(size, 2**40))


def tensors_of(config: Mapping[str, Any], prefix: str = "model") -> list[Tensor]:
    """Tensors of two layers in the shapes of a config, by the names that most families have."""
    hidden, inner = config.get("hidden_size", 64), config.get("intermediate_size", 128)
    heads = config.get("num_attention_heads", 4)
    width = config.get("head_dim", max(1, hidden // heads))
    keys = config.get("num_key_value_heads", heads) * width
    experts = max(config.get(key, 0) for key in EXPERT_COUNTS)
    found: list[Tensor] = [(f"{prefix}.embed_tokens.weight", "BF16", (config.get("vocab_size", 100), hidden))]
    for layer in range(config["num_hidden_layers"]):
        base = f"{prefix}.layers.{layer}"
        attention = {"q_proj": (heads * width, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}
        found += [(f"{base}.self_attn.{leaf}.weight", "BF16", shape) for leaf, shape in attention.items()]
        found.append((f"{base}.self_attn.o_proj.weight", "BF16", (hidden, heads * width)))
        for expert in ("", *(f"experts.{n}." for n in range(experts))):
            for leaf, shape in {
                "gate_proj": (inner, hidden),
                "up_proj": (inner, hidden),
                "down_proj": (hidden, inner),
            }.items():
                found.append((f"{base}.mlp.{expert}{leaf}.weight", "BF16", shape))
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found.append((f"{base}.{norm}.weight", "BF16", (hidden,)))
    return [*found, (f"{prefix}.norm.weight", "BF16", (hidden,))]


def _family(config: Mapping[str, Any], prefix: str = "model") -> Base:
    """Two layers, of two experts in a mixture, under the config of a real release."""
    text = config.get("text_config", config)
    cut = dict(text) | {"num_hidden_layers": 2} | {key: 2 for key in EXPERT_COUNTS if key in text}
    for key in ("layer_types", "no_rope_layers"):
        if key in cut:
            cut[key] = cut[key][:2]
    whole = dict(config) | {"text_config": cut} if "text_config" in config else cut
    return Base(whole, [tensors_of(cut, prefix)])


def _dialects() -> dict[str, Base]:
    found = {}
    for name, (pack, quantization, *_) in STORED.items():
        key = "quantization" if name == "mlx" else "quantization_config"
        config = LLAMA | {"num_hidden_layers": 2} | ({key: quantization} if quantization else {})
        found[name] = Base(config, [list(llama(pack, layers=2))])
    nested = {"producer": {"name": "modelopt"}, "quantization": dict(STORED["modelopt"][1])}
    text = LLAMA | {"num_hidden_layers": 2}
    pack = STORED["modelopt"][0]
    file = {"hf_quant_config.json": json.dumps(nested).encode()}
    found["modelopt, own file"] = Base(text, [list(llama(pack, layers=2))], file)
    towers: list[Tensor] = [("model.visual.blocks.0.attn.qkv.weight", "BF16", (96, 32))]
    tensors = [
        (n.replace("model.", "model.language_model.", 1), *rest) for n, *rest in llama(STORED["fp8"][0], layers=2)
    ]
    config = {
        "model_type": "mistral3",
        "text_config": text | {"quantization_config": FP8},
        "vision_config": {"hidden_size": 32, "num_hidden_layers": 1, "model_type": "pixtral"},
    }
    found["fp8, nested"] = Base(config, [[*towers, *tensors]])  # type: ignore[list-item]
    return found


def _sharded() -> Base:
    tensors = list(llama(STORED["16-bit"][0], layers=2))
    return Base(LLAMA | {"num_hidden_layers": 2}, [tensors[:5], tensors[5:12], tensors[12:]])


SHARDED = _sharded()
DIALECTS = _dialects()
FAMILIES: dict[str, Base] = {
    "mistral": _family(MISTRAL_7B_V01),
    "qwen3": _family(QWEN3_8B),
    "gemma3": _family(GEMMA3_4B, "language_model.model"),
    "gemma3n": _family(GEMMA3N_E4B | {"text_config": GEMMA3N_E4B["text_config"] | {"num_kv_shared_layers": 1}}),
    "gpt_oss": _family(GPT_OSS_120B),
    "llama4": _family(LLAMA4_SCOUT, "language_model.model"),
    "qwen3_next": _family(QWEN3_NEXT_80B),
    "granite": _family(GRANITE4_H_SMALL | {"layer_types": ["mamba", "attention"]}),
    "jamba": _family(JAMBA_MINI),
    "falcon": _family(FALCON_7B, "transformer"),
    "gpt2": _family(GPT2 | {"num_hidden_layers": 12}, "transformer"),
    "deepseek": _family(DEEPSEEK_V3),
    "minimax": _family({**MINIMAX_M2, "quantization_config": dict(FP8)}),
    "nemotron_h": _family(
        {
            "model_type": "nemotron_h",
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "hybrid_override_pattern": "M*",
            "vocab_size": 100,
        }
    ),
    "no type": _family({"num_hidden_layers": 2}),
}
BASES = DIALECTS | FAMILIES


# modules that read configs
_READERS = (
    *("dialects", "engines", "inspection", "planning", "vram", "recipes/resolve.py", "quantization/cache_scales.py"),
    *("quantization/decide.py", "quantization/plan.py", "quantization/plan_notes.py", "quantization/written_config.py"),
    *("model/anatomy.py", "model/config_defaults.py", "model/config_values.py", "model/language_config.py"),
    *("model/layout.py", "model/logical_weights.py", "model/support.py"),
)


def _words() -> tuple[str, ...]:
    """Every string that looks like a key in the modules that read configs: the keys that verbs read are among them."""
    places = [Path(snugfit.__file__).parent / name for name in _READERS]
    files = [file for place in places for file in ([place] if place.suffix else sorted(place.rglob("*.py")))]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return tuple(sorted(text for text in texts if re.fullmatch(r"[a-z][a-zA-Z0-9_]{2,40}", text)))


WORDS = _words()
