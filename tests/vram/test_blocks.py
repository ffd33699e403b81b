"""An engine's blocks: what a sequence takes, how long a context fits. tests/engine compares with vLLM's own code."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import real_configs as real
from helpers.cache_sizes import bytes_at, reported_tokens
from helpers.errors import raises
from helpers.sparse_models import DEEPSEEK_V3
from snugfit.vram.blocks import BlockGroup, BlockPool, make_pool, why_not_mixed
from snugfit.vram.kv_cache_config import read_cache

BATCH = 2048


def pool_of(config: dict[str, Any], **options: Any) -> BlockPool:
    return make_pool(read_cache(config), max_num_batched_tokens=BATCH, **options)


def test_plain_model_is_one_group() -> None:
    """All layers of Mistral-Nemo take a block of 16 tokens together: 2.5 MiB."""
    pool = pool_of(real.NEMO)
    assert pool == BlockPool(16 * 163840, (BlockGroup(16),), BATCH)
    assert pool.blocks(32768) == 2048
    assert pool.blocks(32769) == 2049
    assert pool.bytes_needed(32768) == 2049 * 16 * 163840  # the engine keeps one block


def test_latent_is_one_group() -> None:
    """MLA takes blocks of 16 tokens, all layers together."""
    assert pool_of(DEEPSEEK_V3) == BlockPool(16 * 61 * 576 * 2, (BlockGroup(16),), BATCH)


def test_windows_share_a_pool() -> None:
    """Gemma 3 27B, 10 full layers and 52 windows: groups of ten, six of them with a window, the last padded."""
    pool = pool_of(real.GEMMA3_27B)
    page = 16 * 2 * 16 * 128 * 2
    assert pool.block_bytes == 10 * page
    assert pool.groups == (*[BlockGroup(16, 1024)] * 6, BlockGroup(16))
    windowed = -(-(1024 - 1 + BATCH) // 16) + 1
    assert pool.blocks(131072) == 6 * windowed + 131072 // 16
    assert pool.blocks(64) == 6 * (4 + 1) + 4  # a window may begin inside a block


def test_near_equal_kinds_are_padded() -> None:
    """18 layers each (gpt-oss) are two groups; 13 and 12 are one each, of 13, not thirteen groups of one."""
    assert pool_of(real.GPT_OSS_120B).groups == (BlockGroup(16, 128), BlockGroup(16))
    config = {**real.GPT_OSS_120B, "num_hidden_layers": 25}
    config["layer_types"] = ["sliding_attention"] * 12 + ["full_attention"] * 13
    pool = pool_of(config)
    assert (len(pool.groups), pool.block_bytes) == (2, 13 * 16 * 2 * 8 * 64 * 2)


def test_windows_alone_are_bounded() -> None:
    """Mistral 7B v0.1 with a window in every layer needs no more at 32k than window and batch."""
    pool = pool_of(real.MISTRAL_7B_V01)
    assert pool.blocks(32768) == -(-(4096 - 1 + BATCH) // 16) + 1 == pool.blocks(10**6)


def test_pages_of_other_sizes_have_longer_blocks() -> None:
    """Gemma 4's global layers have twice the width: windows take blocks of 32 tokens, so that pages are equal."""
    config = {"model_type": "gemma4_text", "num_hidden_layers": 12, "hidden_size": 2304}
    pool = pool_of(config)
    assert pool.block_bytes == 2 * 16 * 2 * 4 * 512 * 2
    assert set(pool.groups) == {BlockGroup(32, 512), BlockGroup(16)}


def test_layers_that_keep_16_bits_beside_an_fp8_cache() -> None:
    """Blocks have 32 tokens then, and each layer's page its own size; windows, states and latents are not computed."""
    pool = pool_of(real.NEMO, fp8=True, kept_layers=(0, 5))
    page = 32 * 2 * 8 * 128
    assert pool.groups == (BlockGroup(32),)
    assert pool.block_bytes == 38 * page + 2 * 2 * page
    assert pool_of(real.NEMO, kept_layers=(0, 5)) == pool_of(real.NEMO)
    assert why_not_mixed(read_cache(real.NEMO)) == ""
    for config in (real.MISTRAL_7B_V01, real.QWEN3_NEXT_80B, DEEPSEEK_V3):
        assert why_not_mixed(read_cache(config))


def test_states_make_long_blocks() -> None:
    """Qwen3-Next's states need 1,097,728 bytes: attention's blocks become 544 tokens, three groups hold states."""
    pool = pool_of(real.QWEN3_NEXT_80B)
    assert pool.groups[0] == BlockGroup(544)
    assert [group.state_blocks for group in pool.groups] == [0, 1, 1, 1]
    assert pool.block_bytes == 12 * 544 * 2048
    assert pool_of(real.QWEN3_NEXT_80B, fp8=True).groups[0] == BlockGroup(1072)
    assert pool.blocks(544) == 1 + 3
    assert pool_of(real.QWEN3_NEXT_80B, state_blocks=2).blocks(544) == 1 + 6


def test_states_alone() -> None:
    """A model without attention takes a block a sequence, at any length."""
    config = {"model_type": "mamba", "hidden_size": 768, "num_hidden_layers": 24, "state_size": 16, "conv_kernel": 4}
    pool = pool_of(config)
    assert pool.blocks(1) == pool.blocks(10**6) == 1
    assert pool.max_context(10 * pool.block_bytes, 4096) == 4096


@pytest.mark.parametrize("tp", [2, 8, 16])
def test_heads_over_gpus(tp: int) -> None:
    """A GPU's block has its share of the heads, one at least."""
    assert pool_of(real.LLAMA_70B, tp=tp).block_bytes == 16 * 80 * 2 * max(1, 8 // tp) * 128 * 2


def test_uneven_heads_are_refused() -> None:
    """A pool of three GPUs for eight KV heads is an error."""
    with raises("option-invalid", where="tensor_parallel_size"):
        pool_of(real.LLAMA_8B, tp=3)


def test_reported_tokens() -> None:
    """The size in vLLM's log, the pool in contexts of the greatest length, follows from a pool's blocks."""
    pool = pool_of(real.NEMO)
    assert reported_tokens(pool, 1894 * pool.block_bytes, 30304) == 30304
    gemma = pool_of(real.GEMMA3_27B)
    blocks = gemma.blocks(8192)
    assert reported_tokens(gemma, 10 * blocks * gemma.block_bytes, 8192) == 81920


CONFIGS = (real.NEMO, real.GEMMA3_27B, real.MISTRAL_7B_V01, real.LLAMA4_SCOUT, real.QWEN3_NEXT_80B, DEEPSEEK_V3)


@given(st.sampled_from(CONFIGS), st.integers(0, 2**36), st.integers(1, 2**20), st.integers(1, 40), st.booleans())
def test_max_context_is_the_longest(
    config: dict[str, Any], available: int, limit: int, sequences: int, fp8: bool
) -> None:
    """The longest context fits, one token more does not (or is beyond the limit), and no memory gives none."""
    pool = pool_of(config, fp8=fp8)
    longest = pool.max_context(available, limit, sequences)
    assert 0 <= longest <= limit
    if longest:
        assert pool.bytes_needed(longest, sequences) <= available
    if longest < limit:
        assert pool.bytes_needed(longest + 1, sequences) > available


@given(st.sampled_from(CONFIGS), st.integers(1, 2**20))
def test_blocks_hold_the_cache(config: dict[str, Any], tokens: int) -> None:
    """An engine's blocks never hold less than the cache itself, whatever they add."""
    cache = read_cache(config)
    pool = make_pool(cache, max_num_batched_tokens=BATCH)
    assert pool.blocks(tokens) * pool.block_bytes >= bytes_at(cache.size(), tokens)
