"""Bytes of a sequence's cache: real models by hand, tensor parallelism, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from helpers import real_configs as real
from helpers.cache_sizes import bytes_at
from helpers.errors import raises
from helpers.sparse_models import DEEPSEEK_V3, MINIMAX_M2
from snugfit.vram.kv_cache import AttentionCache, CacheSize, StateCache
from snugfit.vram.kv_cache_config import read_cache

# by hand, 16 bits: layers x (key and value) x heads x head width x 2 bytes
GROWS = {
    "Mistral-Nemo": (real.NEMO, 40 * 2 * 8 * 128 * 2),
    "Llama-3.1-8B": (real.LLAMA_8B, 32 * 2 * 8 * 128 * 2),
    "Llama-3.1-70B": (real.LLAMA_70B, 80 * 2 * 8 * 128 * 2),
    "Qwen3-32B": (real.QWEN3_32B, 64 * 2 * 8 * 128 * 2),
    "MiniMax-M2.1": (MINIMAX_M2, 62 * 2 * 8 * 128 * 2),
    "DeepSeek-V3": (DEEPSEEK_V3, 61 * (512 + 64) * 2),
    "Falcon-7B": (real.FALCON_7B, 32 * 2 * 1 * 64 * 2),
    "GPT-2": (real.GPT2, 12 * 2 * 12 * 64 * 2),
    "Gemma-3-27B": (real.GEMMA3_27B, 10 * 2 * 16 * 128 * 2),
    "Gemma-3-4B": (real.GEMMA3_4B, 5 * 2 * 4 * 256 * 2),
    "Gemma-2-9B": (real.GEMMA2_9B, 21 * 2 * 8 * 256 * 2),
    "Gemma-3n-E4B": (real.GEMMA3N_E4B, 4 * 2 * 2 * 256 * 2),
    "gpt-oss-120b": (real.GPT_OSS_120B, 18 * 2 * 8 * 64 * 2),
    "Llama-4-Scout": (real.LLAMA4_SCOUT, 12 * 2 * 8 * 128 * 2),
    "Mistral-7B-v0.1": (real.MISTRAL_7B_V01, 0),
    "Phi-3-mini-4k": (real.PHI3_MINI, 0),
    "Qwen3-Next-80B": (real.QWEN3_NEXT_80B, 12 * 2 * 2 * 256 * 2),
    "Granite-4-H-Small": (real.GRANITE4_H_SMALL, 4 * 2 * 8 * 128 * 2),
    "Jamba-1.5-Mini": (real.JAMBA_MINI, 4 * 2 * 8 * 128 * 2),
}
WINDOWED = {
    "Gemma-3-27B": (real.GEMMA3_27B, (1024, 52 * 2 * 16 * 128 * 2)),
    "Gemma-3-4B": (real.GEMMA3_4B, (1024, 29 * 2 * 4 * 256 * 2)),
    "Gemma-2-9B": (real.GEMMA2_9B, (4096, 21 * 2 * 8 * 256 * 2)),
    "Gemma-3n-E4B": (real.GEMMA3N_E4B, (512, 16 * 2 * 2 * 256 * 2)),
    "gpt-oss-120b": (real.GPT_OSS_120B, (128, 18 * 2 * 8 * 64 * 2)),
    "Llama-4-Scout": (real.LLAMA4_SCOUT, (8192, 36 * 2 * 8 * 128 * 2)),
    "Mistral-7B-v0.1": (real.MISTRAL_7B_V01, (4096, 32 * 2 * 8 * 128 * 2)),
    "Phi-3-mini-4k": (real.PHI3_MINI, (2047, 32 * 2 * 32 * 96 * 2)),
}
STATES = {
    # convolution (16 + 16 + 32) heads x 128 x 3 tokens, and 32 matrices of 128 x 128, 16 bits
    "Qwen3-Next-80B": (real.QWEN3_NEXT_80B, 36 * 2 * (8192 * 3 + 32 * 128 * 128)),
    # (8192 + 2 groups' vectors of 128) x 3 tokens, and 128 heads x 64 x 128
    "Granite-4-H-Small": (real.GRANITE4_H_SMALL, 36 * 2 * ((8192 + 2 * 128) * 3 + 128 * 64 * 128)),
    "Jamba-1.5-Mini": (real.JAMBA_MINI, 28 * 2 * (8192 * 3 + 8192 * 16)),
}


@pytest.mark.parametrize("name", GROWS)
def test_bytes_a_token(name: str) -> None:
    """Layers that keep all tokens cost the keys and values of their KV heads, half of it in FP8."""
    config, expected = GROWS[name]
    cache = read_cache(config)
    assert cache.size().bytes_per_token == expected
    assert cache.size(fp8=True).bytes_per_token == expected // 2
    assert cache.notes == ()


@pytest.mark.parametrize("name", WINDOWED)
def test_windows(name: str) -> None:
    """Layers with a window or a chunk grow to its size and no further."""
    config, (window, expected) = WINDOWED[name]
    size = read_cache(config).size()
    assert size.windows == ((window, expected),)
    grows = size.bytes_per_token
    assert bytes_at(size, 100) == 100 * (grows + expected)
    assert bytes_at(size, window + 5000) == (window + 5000) * grows + window * expected


@pytest.mark.parametrize("name", STATES)
def test_states(name: str) -> None:
    """Recurrent layers cost the same at any length, in FP8 too."""
    config, expected = STATES[name]
    cache = read_cache(config)
    assert cache.size().state_bytes == cache.size(fp8=True).state_bytes == expected
    assert bytes_at(cache.size(), 1) == expected + cache.size().bytes_per_token


def test_states_in_fp32() -> None:
    """Qwen3.5's recurrent matrices are fp32 where its config says so; the convolution stays in 16 bits."""
    config = {**real.QWEN3_NEXT_80B, "model_type": "qwen3_5_text", "mamba_ssm_dtype": "float32"}
    assert read_cache(config).size().state_bytes == 36 * (8192 * 3 * 2 + 32 * 128 * 128 * 4)


@pytest.mark.parametrize(("tp", "heads"), [(1, 8), (2, 4), (8, 1), (16, 1)])
def test_heads_over_gpus(tp: int, heads: int) -> None:
    """KV heads are split over GPUs, and kept by several of them once there are fewer heads than GPUs."""
    assert read_cache(real.LLAMA_70B).size(tp=tp).bytes_per_token == 80 * 2 * heads * 128 * 2


@pytest.mark.parametrize("tp", [1, 2, 8])
def test_latent_is_on_every_gpu(tp: int) -> None:
    """The latent of MLA has no heads: every GPU keeps all of it."""
    assert read_cache(DEEPSEEK_V3).size(tp=tp).bytes_per_token == 61 * 576 * 2


def test_states_over_gpus() -> None:
    """States are split over GPUs, but a group of Mamba 2 is on each of them."""
    size = read_cache(real.GRANITE4_H_SMALL).size(tp=4)
    assert size.state_bytes == 36 * 2 * ((8192 + 4 * 2 * 128) // 4 * 3 + 128 * 64 * 128 // 4)


def test_sparse_attention_keeps_an_index() -> None:
    """DeepSeek-V3.2 adds 132 bytes of index a token and layer, and keeps 656 bytes in FP8."""
    config = {**DEEPSEEK_V3, "model_type": "deepseek_v32", "index_head_dim": 128, "index_topk": 2048}
    cache = read_cache(config)
    assert cache.size().bytes_per_token == 61 * (576 * 2 + 132)
    assert cache.size(fp8=True).bytes_per_token == 61 * (656 + 132)


@pytest.mark.parametrize(("tp", "says"), [(3, "32 attention heads"), (64, "32 attention heads")])
def test_uneven_heads_are_refused(tp: int, says: str) -> None:
    """Heads that do not divide are an error that names them and the numbers of GPUs that are possible."""
    with raises("option-invalid", where="tensor_parallel_size") as caught:
        read_cache(real.LLAMA_8B).size(tp=tp)
    assert says in caught.value.what
    assert "1 or 2 or 4 or 8 or 16" in caught.value.remedy


def test_uneven_kv_heads_are_refused() -> None:
    """KV heads must divide the GPUs, or the GPUs the KV heads."""
    config = {**real.LLAMA_8B, "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128}
    with raises("option-invalid", where="tensor_parallel_size") as caught:
        read_cache(config).size(tp=3)
    assert "8 KV heads" in caught.value.what


def test_unknown_family_is_an_upper_bound_and_says_so() -> None:
    """Of an unknown family with the keys of plain attention every layer counts as keeping all tokens, with a note."""
    cache = read_cache({**real.LLAMA_8B, "model_type": "novel"})
    assert cache.size().bytes_per_token == 32 * 2 * 8 * 128 * 2
    assert len(cache.notes) == 1
    assert "novel" in cache.notes[0]


ODD: list[tuple[dict[str, Any], str, str]] = [
    ({"model_type": "novel", "ssm_state_size": 16}, "cache-unknown", "ssm_state_size"),
    ({"model_type": "novel", "kv_lora_rank": 512}, "cache-unknown", "kv_lora_rank"),
    (
        {"layer_types": ["full_attention"] * 31 + ["compressed_sparse_attention"]},
        "cache-unknown",
        "compressed_sparse_attention",
    ),
    ({"layer_types": ["full_attention"] * 3}, "config-invalid", "layer_types"),
    ({"layer_types": ["linear_attention"] * 32}, "cache-unknown", "llama"),
    ({"model_type": "llama4_text", "no_rope_layers": [1, 0]}, "config-invalid", "no_rope_layers"),
    ({"num_hidden_layers": 0}, "config-invalid", "num_hidden_layers"),
    ({"num_attention_heads": "32"}, "config-invalid", "num_attention_heads"),
    ({"num_key_value_heads": -1}, "config-invalid", "num_key_value_heads"),
    ({"head_dim": True}, "config-invalid", "head_dim"),
]


@pytest.mark.parametrize(("change", "code", "key"), ODD, ids=[key for _, _, key in ODD])
def test_unknown_kinds_are_refused(change: dict[str, Any], code: str, key: str) -> None:
    """A cache of an unknown kind, and a broken config, are errors that name the key; nothing is guessed."""
    with raises(code, where="config.json") as caught:
        read_cache({**real.LLAMA_8B, **change})
    assert key in caught.value.what


def test_minicpm_latent_is_refused() -> None:
    """A latent that engines unpack (MiniCPM3) is no MLA cache: refused, not counted as one."""
    config = {**real.LLAMA_8B, "model_type": "minicpm3", "kv_lora_rank": 256}
    with raises("cache-unknown", where="config.json") as caught:
        read_cache(config)
    assert "kv_lora_rank" in caught.value.what


def test_qwen2_windows_are_off_unless_switched_on() -> None:
    """Qwen2's sliding_window counts only with use_sliding_window, and from max_window_layers on."""
    config = {**real.LLAMA_8B, "model_type": "qwen2", "sliding_window": 4096, "max_window_layers": 20}
    assert read_cache(config).size().windows == ()
    assert read_cache({**config, "use_sliding_window": True}).size() == CacheSize(20 * 4096, ((4096, 12 * 4096),), 0)


def test_pieces() -> None:
    """A layer's bytes follow from its own fields."""
    assert AttentionCache(kv_heads=8, key_dim=128, value_dim=128).bytes_per_token() == 4096
    assert AttentionCache(kv_heads=8, key_dim=192, value_dim=128).bytes_per_token(fp8=True, tp=16) == 320
    state = StateCache(heads=4, conv_channels=64, conv_length=3, recurrent=256, recurrent_bytes=4)
    assert state.bytes(2) == (64 // 2 * 3) * 2 + 256 // 2 * 4
