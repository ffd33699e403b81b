"""Weights over several GPUs: what is split and how, what is on every GPU, and what then no longer divides."""

from __future__ import annotations

import pytest

from snugfit.formats.spec import TensorFormat
from snugfit.storage.safetensors_header import TensorInfo
from snugfit.vram.weights import bytes_on_gpu, is_served, kernel_format, split_error

LAYER = "model.layers.0"


def bytes_on(name: str, shape: tuple[int, ...], tp: int, *, kv_heads: int | None = 8, dtype: str = "BF16") -> int:
    return bytes_on_gpu(name, [TensorInfo(name, dtype, shape)], tp, kv_heads)


SPLIT: list[tuple[str, tuple[int, ...], int, int]] = [
    (f"{LAYER}.self_attn.q_proj.weight", (4096, 5120), 2, 2048 * 5120 * 2),  # out_features
    (f"{LAYER}.self_attn.o_proj.weight", (5120, 4096), 2, 5120 * 2048 * 2),  # in_features
    (f"{LAYER}.mlp.down_proj.weight", (5120, 14336), 4, 5120 * 3584 * 2),
    (f"{LAYER}.self_attn.k_proj.weight", (1024, 5120), 16, 128 * 5120 * 2),  # one of 8 heads on each of 16 GPUs
    (f"{LAYER}.self_attn.k_proj.weight", (1024, 5120), 4, 256 * 5120 * 2),
    (f"{LAYER}.self_attn.kv_a_proj_with_mqa.weight", (576, 7168), 8, 576 * 7168 * 2),
    (f"{LAYER}.mlp.gate.weight", (256, 7168), 8, 256 * 7168 * 2),
    (f"{LAYER}.input_layernorm.weight", (5120,), 8, 5120 * 2),
    (f"{LAYER}.self_attn.q_proj.bias", (4096,), 4, 1024 * 2),
    (f"{LAYER}.self_attn.o_proj.bias", (5120,), 4, 5120 * 2),
    (f"{LAYER}.mlp.experts.0.w2.weight", (3072, 1536), 4, 3072 * 384 * 2),
    (f"{LAYER}.mlp.experts.down_proj", (128, 2880, 2880), 4, 128 * 2880 * 720 * 2),
    ("model.embed_tokens.weight", (100_001, 64), 2, 100_032 // 2 * 64 * 2),  # padded to 64
    ("lm_head.weight", (131072, 5120), 4, 131072 // 4 * 5120 * 2),
    ("vision_tower.encoder.layers.0.mlp.fc1.weight", (4304, 1152), 4, 4304 * 1152 * 2),
]


@pytest.mark.parametrize(("name", "shape", "tp", "expected"), SPLIT, ids=[f"{row[0]}-{row[2]}" for row in SPLIT])
def test_share_of_a_gpu(name: str, shape: tuple[int, ...], tp: int, expected: int) -> None:
    """Each kind of weight is split as vLLM's layers split it; one GPU has all of it."""
    assert bytes_on(name, shape, tp) == expected
    assert bytes_on(name, shape, 1) == TensorInfo(name, "BF16", shape).bytes


def test_scales_follow_their_weight() -> None:
    """Scales of outputs are split with out_features alone, scales of blocks with both sides."""
    gate, down = f"{LAYER}.mlp.gate_proj.weight", f"{LAYER}.mlp.down_proj.weight"
    assert bytes_on_gpu(gate, [TensorInfo("s", "BF16", (14336, 1))], 2, 8) == 14336
    assert bytes_on_gpu(down, [TensorInfo("s", "BF16", (5120, 1))], 2, 8) == 5120 * 2
    assert bytes_on_gpu(down, [TensorInfo("s", "F8_E4M3", (5120, 896))], 2, 8) == 5120 * 448
    assert bytes_on_gpu(down, [TensorInfo("s", "F32", (1,))], 2, 8) == 4


SPLIT_ERRORS: list[tuple[str, tuple[int, int], TensorFormat | None, int, tuple[object, ...] | None]] = [
    ("down_proj", (3584, 18944), TensorFormat("nvfp4"), 2, None),
    ("down_proj", (3584, 18944), TensorFormat("nvfp4"), 3, (18944, "in_features", "down_proj", 3)),
    ("down_proj", (3584, 18944), TensorFormat("int4", 128), 8, (2368, "in_features", "down_proj", 128)),
    ("down_proj", (3584, 18944), TensorFormat("int4", 32), 8, None),
    ("gate_proj", (18944, 3584), TensorFormat("int4", 128), 8, None),
    ("gate_proj", (18944, 3584), TensorFormat("fp8-block"), 8, (2368, "out_features", "gate_proj", 128)),
    ("gate_proj", (18944, 3584), TensorFormat("fp8", block=(128, 128)), 8, (2368, "out_features", "gate_proj", 128)),
    ("gate_proj", (18944, 3584), TensorFormat("fp8-dynamic"), 8, None),
    ("down_proj", (2880, 2880), TensorFormat("mxfp4"), 4, (720, "in_features", "down_proj", 32)),
    ("o_proj", (2048, 24), None, 16, (24, "in_features", "o_proj", 16)),
    ("q_a_proj", (1536, 7168), TensorFormat("nvfp4"), 7, None),
    ("down_proj", (3584, 17), TensorFormat("nvfp4"), 1, None),
]


@pytest.mark.parametrize(("leaf", "shape", "fmt", "tp", "named"), SPLIT_ERRORS)
def test_what_no_longer_divides(
    leaf: str, shape: tuple[int, int], fmt: TensorFormat | None, tp: int, named: tuple[object, ...] | None
) -> None:
    """A split weight must still hold whole blocks and groups of its format; the reason names side, leaf and numbers."""
    found = split_error(f"{LAYER}.mlp.{leaf}.weight", shape, fmt, tp)
    if named is None:
        assert found is None
    else:
        assert found is not None
        assert [word for word in named if str(word) not in found] == []


@pytest.mark.parametrize(
    ("name", "served"),
    [
        ("model.layers.60.mlp.up_proj.weight", True),
        ("model.layers.61.eh_proj.weight", False),
        ("mtp.layers.0.fc.weight", False),
        ("lm_head.weight", True),
    ],
)
def test_heads_of_prediction_stay_on_disk(name: str, served: bool) -> None:
    """Engines do not load multi-token prediction unless asked: behind the layers, or in a list of its own."""
    assert is_served(name, "model.layers", 61) == served


@pytest.mark.parametrize(
    ("fmt", "name"),
    [
        (None, "bf16"),
        (TensorFormat("fp8-dynamic"), "fp8-channel"),
        (TensorFormat("fp8"), "fp8-channel"),
        (TensorFormat("fp8-block"), "fp8-block"),
        (TensorFormat("fp8", block=(128, 128)), "fp8-block"),
        (TensorFormat("nvfp4a16"), "nvfp4a16"),
        (TensorFormat("int4", 64), "int4"),
    ],
)
def test_names_of_kernels(fmt: TensorFormat | None, name: str) -> None:
    """Formats that one kernel runs have one name in the table of kernels."""
    assert kernel_format(fmt) == name
