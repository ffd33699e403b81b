"""An engine's paged cache: blocks of tokens, groups of layers that share one pool, and how many tokens fit.

What vLLM 0.24 to 0.32 do (v1/core/kv_cache_utils.py: get_kv_cache_groups and below; platforms/interface.py:
update_block_size_for_backend). A block has 16 tokens. Layers of one kind (all keep every token, or all have the same
window) form one group. Layers of several kinds are divided into groups of as many layers as the rarest kind has (as the
commonest kind has, where that is less than half more). Every group's page is as large as the largest: by longer blocks
where that divides, else by padding. All groups take blocks of one size from one pool. Blocks of one sequence:

- all tokens are kept: ceil(tokens / block)
- a window: ceil(min(window - 1 + batched tokens, tokens) / block) + 1
- a chunk: ceil(min(chunk + batched tokens, tokens) / block)
- a state: 1, or 2 where prefixes are cached; attention's blocks are so long that a page holds a state

`max_num_batched_tokens` are the tokens of a batch. The engine keeps one block of the pool for itself.
"""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass

from snugfit.vram.kv_cache import AttentionCache, ModelCache, check_split

BLOCK_TOKENS = 16


@dataclass(frozen=True)
class BlockGroup:
    """Layers that take one block each at the same time: of `block_tokens`, or `state_blocks` for any length."""

    block_tokens: int
    window: int | None = None
    chunked: bool = False
    state_blocks: int = 0

    def blocks(self, tokens: int, max_num_batched_tokens: int) -> int:
        """Blocks of a sequence of `tokens` while the engine processes a batch."""
        if self.state_blocks:
            return self.state_blocks
        if self.window is None:
            return math.ceil(tokens / self.block_tokens)
        kept = self.window + max_num_batched_tokens - (0 if self.chunked else 1)
        return math.ceil(min(kept, tokens) / self.block_tokens) + (0 if self.chunked else 1)


@dataclass(frozen=True)
class BlockPool:
    """The paged cache of one GPU: groups that take blocks of `block_bytes`."""

    block_bytes: int
    groups: tuple[BlockGroup, ...]
    max_num_batched_tokens: int

    def blocks(self, tokens: int) -> int:
        """Blocks of one sequence of `tokens`."""
        return sum(group.blocks(tokens, self.max_num_batched_tokens) for group in self.groups)

    def bytes_needed(self, tokens: int, sequences: int = 1) -> int:
        """Bytes for `sequences` of `tokens` each, with the block that the engine keeps for itself."""
        return (self.blocks(tokens) * sequences + 1) * self.block_bytes if self.groups else 0

    def max_context(self, available_bytes: int, limit: int, sequences: int = 1) -> int:
        """Tokens of the longest context that fits in `sequences`, at most `limit`; 0 where not one token fits."""
        if self.bytes_needed(1, sequences) > available_bytes:
            return 0
        low, high = 1, limit
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.bytes_needed(middle, sequences) <= available_bytes else (low, middle - 1)
        return low


@dataclass(frozen=True)
class _LayerKind:
    """Layers that are alike: the bytes of a page, the group that they would form, and their number."""

    page_bytes: int
    group: BlockGroup
    layers: int


def why_not_mixed(cache: ModelCache) -> str:
    """Why layers of a model cannot keep 16 bits beside an FP8 cache, or what they would take is not known; "" if known.

    vLLM 0.32 pads pages of windows and states to the size of an FP8 page then (platforms/interface.py:
    _align_heterogeneous_kv_block_size), which was not compared with its own figures; a latent's layout changes.
    """
    if cache.states or any(one.window is not None for one in cache.attention):
        return "layers keep windows or states, whose pages an engine pads then in a way that was not measured"
    if any(one.latent or one.index_bytes for one in cache.attention):
        return "layers keep a latent or an index"
    if len(set(cache.attention)) > 1:
        return "layers differ in their heads"
    return "" if len(cache.attention) > 1 else "there is one layer"


def make_pool(
    cache: ModelCache,
    *,
    max_num_batched_tokens: int,
    fp8: bool = False,
    tp: int = 1,
    state_blocks: int = 1,
    kept_layers: Container[int] = (),
) -> BlockPool:
    """The pool of one of `tp` GPUs for a model's caches, in 16 bits or FP8; UserError where heads cannot be split.

    Beside an FP8 cache `kept_layers` keep 16 bits, where `why_not_mixed` has no reason against it.
    """
    check_split(cache, tp)
    if fp8 and kept_layers:
        return _mixed_pool(cache, max_num_batched_tokens, tp, kept_layers)
    block_tokens = _block_tokens(cache, fp8, tp)
    kinds = _attention_kinds(cache.attention, block_tokens, fp8, tp)
    if len({kind.group for kind in kinds}) == 1 and not cache.states:
        # one kind: all layers take a block together, whatever the sizes of their pages
        block_bytes = sum(kind.page_bytes * kind.layers for kind in kinds)
        return BlockPool(block_bytes, (kinds[0].group,), max_num_batched_tokens)
    if cache.states:
        page_bytes = max(*(kind.page_bytes for kind in kinds), *(state.bytes(tp) for state in cache.states), 0)
        kinds.append(_LayerKind(page_bytes, BlockGroup(0, state_blocks=state_blocks), len(cache.states)))
    return _shared_pool(kinds, max_num_batched_tokens)


def _mixed_pool(cache: ModelCache, max_num_batched_tokens: int, tp: int, kept_layers: Container[int]) -> BlockPool:
    """All layers take a block together; it is so long that an FP8 page holds the 16-bit page of 16 tokens."""
    wide, narrow = (cache.attention[0].bytes_per_token(fp8=fp8, tp=tp) for fp8 in (False, True))
    block_tokens = BLOCK_TOKENS * math.ceil(wide / narrow)
    block_bytes = block_tokens * cache.size(fp8=True, tp=tp, kept_layers=kept_layers).bytes_per_token
    return BlockPool(block_bytes, (BlockGroup(block_tokens),), max_num_batched_tokens)


def _block_tokens(cache: ModelCache, fp8: bool, tp: int) -> int:
    """Tokens of a block: 16, or the multiple of 16 with which a page of attention holds a state."""
    if not cache.states or not cache.attention:
        return BLOCK_TOKENS
    token_bytes = cache.attention[0].bytes_per_token(fp8=fp8, tp=tp)
    largest_state = max(state.bytes(tp) for state in cache.states)
    return BLOCK_TOKENS * max(1, math.ceil(largest_state / (BLOCK_TOKENS * token_bytes)))


def _attention_kinds(layers: tuple[AttentionCache, ...], block_tokens: int, fp8: bool, tp: int) -> list[_LayerKind]:
    counts: dict[tuple[int, BlockGroup], int] = {}
    for layer in layers:
        page_bytes = block_tokens * layer.bytes_per_token(fp8=fp8, tp=tp)
        key = page_bytes, BlockGroup(block_tokens, layer.window, layer.chunked)
        counts[key] = counts.get(key, 0) + 1
    return [_LayerKind(page_bytes, group, count) for (page_bytes, group), count in counts.items()]


def _shared_pool(kinds: list[_LayerKind], max_num_batched_tokens: int) -> BlockPool:
    if not kinds:
        return BlockPool(0, (), max_num_batched_tokens)
    page_bytes = max(kind.page_bytes for kind in kinds)
    fewest, most = min(kind.layers for kind in kinds), max(kind.layers for kind in kinds)
    group_layers = most if most < 1.5 * fewest else fewest
    groups: list[BlockGroup] = []
    for kind in kinds:
        group = kind.group
        if not group.state_blocks and page_bytes % kind.page_bytes == 0:
            group = BlockGroup(group.block_tokens * (page_bytes // kind.page_bytes), group.window, group.chunked)
        groups += [group] * math.ceil(kind.layers / group_layers)
    return BlockPool(group_layers * page_bytes, tuple(groups), max_num_batched_tokens)
