"""What a cache holds and what an engine reports of it, from sizes that the package computes."""

from __future__ import annotations

from snugfit.vram.blocks import BlockPool
from snugfit.vram.budget import Budget
from snugfit.vram.kv_cache import CacheSize


def bytes_at(size: CacheSize, tokens: int) -> int:
    """Bytes of a sequence of `tokens`, without an engine's rounding to blocks."""
    windows = sum(min(tokens, window) * token_bytes for window, token_bytes in size.windows)
    return size.bytes_per_token * tokens + windows + size.state_bytes


def reported_tokens(pool: BlockPool, available_bytes: int, max_model_len: int) -> int:
    """What vLLM's log calls "GPU KV cache size": the pool in contexts of the greatest length."""
    return int(available_bytes // pool.block_bytes / pool.blocks(max_model_len) * max_model_len)


def used_bytes(budget: Budget, cache_bytes: int) -> int:
    """Bytes of the card in use with a cache of `cache_bytes`."""
    engine = budget.weight_bytes + budget.activation_bytes + budget.other_bytes
    return engine + cache_bytes + budget.outside_budget_bytes
