"""An engine's paged cache: blocks of tokens, groups of layers that draw on one pool, and how many tokens fit.

What vLLM 0.24 to 0.32 do (v1/core/kv_cache_utils.py: get_kv_cache_groups and below; platforms/interface.py:
update_block_size_for_backend). A block has 16 tokens. Layers of one kind (all see everything, or all have the same
window) form one group. Layers of several kinds are cut into groups of as many layers as the rarest kind has (as the
commonest, where that is less than half more), every group's page is as large as the largest, by longer blocks where
it divides, else by padding. All groups draw blocks of one size from one pool:

- everything is kept: ceil(tokens / block)
- a window: ceil(min(window - 1 + tokens in flight, tokens) / block) + 1, tokens in flight being a batch's
- a chunk: ceil(min(chunk + tokens in flight, tokens) / block)
- a state: 1, or 2 where prefixes are cached; attention's blocks are made so long that a page holds a state

One block of the pool is never given out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from snugfit.vram.kv_cache import Attention, ModelCache, check_split

BLOCK = 16


@dataclass(frozen=True)
class Group:
    """Layers that take a block each at the same time. `fixed` blocks whatever the length, 0 where tokens count."""

    block: int
    window: int | None = None
    chunked: bool = False
    fixed: int = 0

    def blocks(self, tokens: int, in_flight: int) -> int:
        """Blocks of a sequence of so many tokens while a batch of `in_flight` is on its way."""
        if self.fixed:
            return self.fixed
        if self.window is None:
            return math.ceil(tokens / self.block)
        kept = self.window + in_flight - (0 if self.chunked else 1)
        return math.ceil(min(kept, tokens) / self.block) + (0 if self.chunked else 1)


@dataclass(frozen=True)
class Pool:
    """The cache of one GPU: groups that draw blocks of `block_bytes`, with a batch of `in_flight` tokens at a time."""

    block_bytes: int
    groups: tuple[Group, ...]
    in_flight: int

    def blocks(self, tokens: int) -> int:
        """Blocks of one sequence of so many tokens."""
        return sum(group.blocks(tokens, self.in_flight) for group in self.groups)

    def bytes_needed(self, tokens: int, sequences: int = 1) -> int:
        """Bytes for so many sequences of so many tokens each, the block that is never given out with them."""
        return (self.blocks(tokens) * sequences + 1) * self.block_bytes if self.groups else 0

    def longest(self, available: int, limit: int, sequences: int = 1) -> int:
        """Tokens of the longest context that fits, at most `limit`; 0 where not even one token does."""
        if self.bytes_needed(1, sequences) > available:
            return 0
        low, high = 1, limit
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.bytes_needed(middle, sequences) <= available else (low, middle - 1)
        return low

    def reported_tokens(self, available: int, context: int) -> int:
        """What the engine's log calls "GPU KV cache size" where the longest context is `context`."""
        blocks = self.blocks(context)
        return int(available // self.block_bytes / blocks * context) if blocks else 0


@dataclass(frozen=True)
class _Kind:
    """Layers that are alike: a page's bytes, the group they would form, and how many there are."""

    page: int
    group: Group
    count: int


def make_pool(cache: ModelCache, *, in_flight: int, fp8: bool = False, tp: int = 1, state_blocks: int = 1) -> Pool:
    """The pool of one of `tp` GPUs for a model's caches, in 16 bits or FP8; UserError where heads cannot be split."""
    check_split(cache, tp)
    block = _block_for_states(cache, fp8, tp)
    kinds = _attention_kinds(cache.attention, block, fp8, tp)
    if len({kind.group for kind in kinds}) == 1 and not cache.states:
        # one kind, whatever the sizes of its pages: all layers take a block together
        return Pool(sum(kind.page * kind.count for kind in kinds), (kinds[0].group,), in_flight)
    if cache.states:
        page = max([kind.page for kind in kinds] or [state.bytes(tp) for state in cache.states])
        page = max(page, *(state.bytes(tp) for state in cache.states))
        kinds.append(_Kind(page, Group(0, fixed=state_blocks), len(cache.states)))
    return _shared_pool(kinds, in_flight)


def _block_for_states(cache: ModelCache, fp8: bool, tp: int) -> int:
    """Tokens of a block: 16, or as many 16s as make a page of attention hold a state."""
    if not cache.states or not cache.attention:
        return BLOCK
    token = cache.attention[0].bytes_per_token(fp8=fp8, tp=tp)
    largest = max(state.bytes(tp) for state in cache.states)
    return BLOCK * max(1, math.ceil(largest / (BLOCK * token)))


def _attention_kinds(layers: tuple[Attention, ...], block: int, fp8: bool, tp: int) -> list[_Kind]:
    counts: dict[tuple[int, Group], int] = {}
    for layer in layers:
        page = block * layer.bytes_per_token(fp8=fp8, tp=tp)
        key = page, Group(block, layer.window, layer.chunked)
        counts[key] = counts.get(key, 0) + 1
    return [_Kind(page, group, count) for (page, group), count in counts.items()]


def _shared_pool(kinds: list[_Kind], in_flight: int) -> Pool:
    if not kinds:
        return Pool(0, (), in_flight)
    page = max(kind.page for kind in kinds)
    fewest, most = min(kind.count for kind in kinds), max(kind.count for kind in kinds)
    layers = most if most < 1.5 * fewest else fewest
    groups: list[Group] = []
    for kind in kinds:
        group = kind.group
        if not group.fixed and page % kind.page == 0:
            group = Group(group.block * (page // kind.page), group.window, group.chunked)
        groups += [group] * math.ceil(kind.count / layers)
    return Pool(layers * page, tuple(groups), in_flight)
