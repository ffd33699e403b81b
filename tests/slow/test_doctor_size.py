"""`doctor` on headers of true size: bounded work, under 1 GB, no torch, and no false alarm."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.sparse_models import BLOCK, DEEPSEEK_V3, FP8, Tensor, deepseek_v3, minimax_m2, write_sparse_model
from helpers.tiny_tokenizer import add_tokenizer
from inspection.test_inspect import MEASURED
from snugfit.records.doctor import DOCTOR_SCHEMA

pytestmark = pytest.mark.slow

KIMI_K2 = DEEPSEEK_V3 | {
    "model_type": "kimi_k2",
    "architectures": ["DeepseekV3ForCausalLM"],
    "first_k_dense_replace": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "n_group": 1,
    "topk_group": 1,
    "vocab_size": 163840,
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True},
                "input_activations": None,
                "output_activations": None,
            }
        },
    },
}
QWEN36: dict[str, Any] = {
    "architectures": ["Qwen3_5MoeForConditionalGeneration"],
    "model_type": "qwen3_5_moe",
    "tie_word_embeddings": False,
    "text_config": {
        "model_type": "qwen3_5_moe_text",
        "dtype": "bfloat16",
        "hidden_size": 2048,
        "num_hidden_layers": 40,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 10,
        "vocab_size": 248320,
    },
    "quantization_config": FP8
    | {"modules_to_not_convert": ["mlp.gate", "shared_expert_gate", "in_proj_a", "in_proj_b", "conv1d", "lm_head"]},
}


def kimi_k2(directory: Path) -> Path:
    """Kimi K2's experts in INT4 in groups of 32, everything else in BF16: 384 experts in 60 of 61 layers."""
    return write_sparse_model(directory, KIMI_K2, _kimi())


def _kimi() -> Iterator[Tensor]:
    c = KIMI_K2
    hidden, heads, inner = c["hidden_size"], c["num_attention_heads"], c["moe_intermediate_size"]
    yield "model.embed_tokens.weight", "BF16", (c["vocab_size"], hidden)
    for layer in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for leaf, shape in {
            "q_a_proj": (1536, hidden),
            "q_b_proj": (heads * 192, 1536),
            "kv_a_proj_with_mqa": (576, hidden),
            "kv_b_proj": (heads * 256, 512),
            "o_proj": (hidden, heads * 128),
        }.items():
            yield f"{prefix}.self_attn.{leaf}.weight", "BF16", shape
        yield f"{prefix}.input_layernorm.weight", "BF16", (hidden,)
        if layer == 0:
            yield from _plain_mlp(f"{prefix}.mlp", hidden, c["intermediate_size"])
            continue
        yield f"{prefix}.mlp.gate.weight", "BF16", (384, hidden)
        yield from _plain_mlp(f"{prefix}.mlp.shared_experts", hidden, inner)
        for expert in range(384):
            for leaf, (rows, columns) in _shapes(hidden, inner).items():
                module = f"{prefix}.mlp.experts.{expert}.{leaf}"
                yield f"{module}.weight_packed", "I32", (rows, columns // 8)
                yield f"{module}.weight_scale", "BF16", (rows, columns // 32)
                yield f"{module}.weight_shape", "I64", (2,)
    yield "model.norm.weight", "BF16", (hidden,)
    yield "lm_head.weight", "BF16", (c["vocab_size"], hidden)


def _shapes(hidden: int, inner: int) -> dict[str, tuple[int, int]]:
    return {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}


def _plain_mlp(module: str, hidden: int, inner: int) -> Iterator[Tensor]:
    for leaf, shape in _shapes(hidden, inner).items():
        yield f"{module}.{leaf}.weight", "BF16", shape


def qwen36(directory: Path) -> Path:
    """Qwen3.6-35B-A3B in FP8 blocks: linear attention in three of four layers, 256 experts, a picture tower."""
    return write_sparse_model(directory, QWEN36, _qwen())


def _qwen() -> Iterator[Tensor]:
    yield "model.language_model.embed_tokens.weight", "BF16", (248320, 2048)
    for layer in range(40):
        prefix = f"model.language_model.layers.{layer}"
        if layer % 4 == 3:
            for leaf, rows in (("q_proj", 8192), ("k_proj", 512), ("v_proj", 512)):
                yield from _fp8(f"{prefix}.self_attn.{leaf}", rows, 2048)
            yield from _fp8(f"{prefix}.self_attn.o_proj", 2048, 4096)
        else:
            for leaf, rows in (("in_proj_qkv", 8192), ("in_proj_z", 4096)):
                yield from _fp8(f"{prefix}.linear_attn.{leaf}", rows, 2048)
            for leaf in ("in_proj_a", "in_proj_b"):
                yield f"{prefix}.linear_attn.{leaf}.weight", "BF16", (32, 2048)
            yield f"{prefix}.linear_attn.conv1d.weight", "BF16", (8192, 1, 4)
            yield from _fp8(f"{prefix}.linear_attn.out_proj", 2048, 4096)
        yield f"{prefix}.input_layernorm.weight", "BF16", (2048,)
        yield f"{prefix}.mlp.gate.weight", "BF16", (256, 2048)
        yield f"{prefix}.mlp.shared_expert_gate.weight", "BF16", (1, 2048)
        for module in (f"{prefix}.mlp.shared_expert", *(f"{prefix}.mlp.experts.{n}" for n in range(256))):
            for leaf, (rows, columns) in _shapes(2048, 512).items():
                yield from _fp8(f"{module}.{leaf}", rows, columns)
    for block in range(27):
        yield f"model.visual.blocks.{block}.attn.qkv.weight", "BF16", (3456, 1152)
    yield "model.language_model.norm.weight", "BF16", (2048,)
    yield "lm_head.weight", "BF16", (248320, 2048)


def _fp8(module: str, rows: int, columns: int) -> Iterator[Tensor]:
    yield f"{module}.weight", "F8_E4M3", (rows, columns)
    yield f"{module}.weight_scale_inv", "BF16", (-(-rows // BLOCK), -(-columns // BLOCK))


LARGE: dict[str, Callable[[Path], Path]] = {
    "minimax": minimax_m2,
    "deepseek": deepseek_v3,
    "kimi": kimi_k2,
    "qwen": qwen36,
}


@pytest.mark.parametrize("name", LARGE)
def test_true_size_takes_bounded_work_and_memory(name: str, tmp_path: Path) -> None:
    """A model of 35 to 1,000 billion weights takes millions of calls, under 1 GB, and no torch; it is sound.

    MiniMax-M2 names three layers of prediction that its release has not: a note, and no fault.
    """
    directory = add_tokenizer(LARGE[name](tmp_path / "model"))
    command = [sys.executable, "-c", MEASURED, "doctor", str(directory), "--json", str(Path(__file__).parents[1])]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode in (0, 1), run.stderr[-2000:]
    record = json.loads(run.stdout)
    lost = [("prediction-lost", "config.json: num_mtp_modules")] if name == "minimax" else []
    assert [(f["fault"], f["where"]) for f in record["findings"]] == lost
    peak, calls, *heavy = run.stderr.split()
    print(name, len(record["formats"]), record["tensors"], peak, calls)  # noqa: T201  # shown by -rP
    assert heavy == []
    assert int(peak) < 1_000_000  # kB
    assert int(calls) < 150_000_000
    assert (record["schema"], record["verdict"]) == (DOCTOR_SCHEMA, "sound")
