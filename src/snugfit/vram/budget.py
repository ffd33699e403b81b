"""One GPU's memory under one engine: what goes to weights, cache and the rest, from shapes and an engine's rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from snugfit.engines.memory import (
    COMMUNICATION,
    CONTEXT,
    NON_TORCH,
    EngineMemory,
    batch_defaults,
    graph_count,
    sglang_reserve,
)
from snugfit.model.language_config import positive, with_defaults
from snugfit.vram.kv_cache import ModelCache

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k")


@dataclass(frozen=True)
class Device:
    """A GPU: the memory that CUDA reports, in bytes, and what is known of it."""

    reported: int
    card: str | None = None
    multiprocessors: int = 132


@dataclass(frozen=True)
class Widths:
    """A language model's shapes that make its temporaries: numbers a token, at the widest point of each part.

    Several GPUs share `attention` and `mlp` (dense, or of shared experts); of each of `chosen` experts they share what
    is `expert` wide, not its output. `latent_context` are numbers a token of context that latent attention unpacks.
    """

    hidden: int
    vocabulary: int
    positions: int
    rotary: int
    attention: int
    mlp: int
    chosen: int
    expert: int
    latent_context: int

    def layer(self, tp: int) -> int:
        """Numbers a token at the widest point of a layer on each of `tp` GPUs.

        Experts: gate and up of every chosen one, or its output, whichever is larger, lie in one place, their product
        beside (vLLM: fused_moe.py, intermediate_cache1 to 3).
        """
        inner = self.expert // tp
        experts = self.chosen * (max(2 * inner, self.hidden) + inner)
        return max(self.attention // tp, self.mlp // tp + experts)


@dataclass(frozen=True)
class Budget:
    """One GPU shared out, in bytes: what is there beside weights and cache, and what that leaves the cache.

    `share` is what the engine may use of the card; `activations` and `besides` (graphs, kernels, other GPUs) count
    against it with the weights, `on_top` does not.
    """

    share: int
    weights: int
    activations: int
    besides: int
    on_top: int

    @property
    def for_cache(self) -> int:
        """Bytes left for the KV cache; negative where not even the weights fit."""
        return self.share - self.weights - self.activations - self.besides

    def in_all(self, cache: int) -> int:
        """Bytes of the card in use when the cache has so many."""
        return self.weights + self.activations + self.besides + cache + self.on_top


def read_widths(config: Mapping[str, Any], cache: ModelCache) -> Widths:
    """Shapes from config.json; UserError where one is missing."""
    text = with_defaults(config)
    hidden = positive(text, "hidden_size")
    plain = [a for a in cache.attention if not a.latent]
    queries = cache.query_heads * max((a.key for a in plain), default=0)
    latent = 0
    if len(plain) < len(cache.attention):
        nope, value = positive(text, "qk_nope_head_dim"), positive(text, "v_head_dim")
        latent = cache.query_heads * (nope + value)
        queries = cache.query_heads * (nope + positive(text, "qk_rope_head_dim"))
    states = max((state.conv_channels for state in cache.states), default=0)
    # queries, keys and values, the queries rotated, attention's output; of a state its projections and their mix
    attention = max(3 * queries + max((a.heads * (a.key + a.value) for a in plain), default=0), 3 * states)
    mlp, chosen, expert = _feed_forward(text, hidden)
    rotary = int(text.get("qk_rope_head_dim") or max((a.key for a in cache.attention), default=0))
    factor = text.get("partial_rotary_factor")
    rotary = int(rotary * factor) if isinstance(factor, float) and not latent else rotary
    positions = int(text.get("max_position_embeddings") or 0)
    vocabulary = positive(text, "vocab_size")
    return Widths(hidden, vocabulary, positions, rotary, attention, mlp, chosen, expert, latent)


def _feed_forward(text: Mapping[str, Any], hidden: int) -> tuple[int, int, int]:
    """Numbers a token of a dense or shared MLP (gate, up, their product), experts chosen a token, and their width."""
    inner = _largest(text, "intermediate_size") or 4 * hidden
    counts = [text.get(key) for key in _EXPERTS]
    if not any(isinstance(count, int) and count > 1 for count in counts):
        return 3 * inner, 0, 0
    expert = _largest(text, "moe_intermediate_size") or inner
    shared = _largest(text, "shared_expert_intermediate_size") or _largest(text, "shared_intermediate_size")
    shared = shared or _largest(text, "n_shared_experts") * expert
    return 3 * shared, next((text[key] for key in _CHOSEN if isinstance(text.get(key), int)), 1), expert


def _largest(text: Mapping[str, Any], key: str) -> int:
    """A width or a count, the largest where each layer has its own; 0 for none."""
    given = text.get(key) or 0
    return max(given) if isinstance(given, list) else int(given)


def activation_bytes(widths: Widths, engine: EngineMemory, batch: tuple[int, int], device: Device, tp: int = 1) -> int:
    """Peak of torch's temporaries in the profiling run: the widest layer, or the sampler after it.

    Layer: a batch in 16 bits, hidden states and residual with it, and for latent attention the context that prefill
    unpacks, up to 65,536 tokens (mla_attention.py: determine_chunked_prefill_workspace_size). Sampler: the batch's
    hidden states, and `sampler_bytes` a logit of every sequence; Triton's top-k has a row of fp32 for each SM besides.
    """
    tokens, sequences = batch
    context = min(max(8 * widths.positions, 64 * sequences), 65536) * widths.latent_context // tp
    forward = 2 * tokens * (2 * widths.hidden + widths.layer(tp)) + 2 * context
    rows = min(sequences, tokens)
    scratch = 4 * min(device.multiprocessors, rows) * widths.vocabulary if rows >= 8 else 0
    sampler = 2 * tokens * widths.hidden + rows * (widths.vocabulary * engine.sampler_bytes + 4 * widths.hidden)
    return max(forward, sampler + scratch)


def rotary_bytes(widths: Widths) -> int:
    """The table of cosines and sines in 16 bits, which engines load with the weights."""
    return 2 * widths.positions * widths.rotary


def share_out(
    weights: int,
    widths: Widths,
    engine: EngineMemory,
    device: Device,
    *,
    utilization: float | None = None,
    tp: int = 1,
) -> Budget:
    """What one of `tp` GPUs has for its cache when its weights are so many bytes."""
    tokens, sequences = batch_defaults(device.reported, device.card)
    tokens, sequences = engine.max_tokens or tokens, engine.max_sequences or sequences
    activations = activation_bytes(widths, engine, (tokens, sequences), device, tp)
    graphs = graph_count(sequences, tokens)
    loaded = weights + rotary_bytes(widths)
    besides = NON_TORCH + (COMMUNICATION if tp > 1 else 0)
    taken = graphs * engine.graph_taken
    if engine.sharing == "whole card":
        return Budget(device.reported - CONTEXT, loaded, activations, besides + taken, CONTEXT)
    if engine.sharing == "static fraction":
        free = device.reported - CONTEXT
        fraction = utilization or 1 - sglang_reserve(device.reported, tp) / device.reported
        return Budget(int(free * fraction), loaded, 0, besides, CONTEXT + activations + taken)
    share = int(device.reported * (utilization or engine.utilization or 0.9))
    if engine.graph_estimate:
        return Budget(share, loaded, activations, besides + graphs * engine.graph_estimate, CONTEXT)
    return Budget(share, loaded, activations, besides, CONTEXT + taken)


def in_flight(engine: EngineMemory, device: Device) -> int:
    """Tokens of a batch, which windows must hold besides."""
    return engine.max_tokens or batch_defaults(device.reported, device.card)[0]


def longest_position(config: Mapping[str, Any]) -> int | None:
    """Tokens that the model was made for; None where its config does not say.

    YaRN's are its original positions times its factor, where both are given (vLLM: _get_and_verify_max_len).
    """
    text = with_defaults(config)
    given = text.get("max_position_embeddings") or text.get("model_max_length")
    found = text.get("rope_scaling") or text.get("rope_parameters")
    scaling = found if isinstance(found, dict) else {}
    kind = scaling.get("rope_type") or scaling.get("type")
    original, factor = scaling.get("original_max_position_embeddings"), scaling.get("factor")
    if kind == "yarn" and original and factor:
        return int(original * factor)
    return int(given) if isinstance(given, int) and given > 0 else None
