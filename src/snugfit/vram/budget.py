"""How one GPU's memory is divided under one engine: weights, KV cache and the rest, from shapes and engine rules.

`tp` is the number of GPUs in tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from snugfit.engines.gpus import Generation
from snugfit.engines.memory import (
    COMMUNICATION_BYTES,
    CUDA_CONTEXT_BYTES,
    GIB,
    NON_TORCH_BYTES,
    EngineMemory,
    batch_defaults,
    graph_count,
    sglang_reserve,
)
from snugfit.model.config_defaults import EXPERT_COUNTS
from snugfit.model.language_config import positive, with_defaults
from snugfit.model.positions import max_positions, rotary_tables
from snugfit.vram.kv_cache import ModelCache

_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k")
_MAX_UNPACKED_TOKENS = 65_536


@dataclass(frozen=True)
class Gpu:
    """A GPU: the memory that CUDA reports, and its name and generation where they are known.

    `multiprocessors` of an unknown card are an H100's. `note` is a remark for the user on how the GPU was given.
    """

    reported_bytes: int
    name: str | None = None
    multiprocessors: int = 132
    generation: Generation | None = None
    note: str | None = None

    @property
    def title(self) -> str:
        """The name, or the size."""
        return self.name or f"a GPU of {self.reported_bytes / GIB:g} GiB"


@dataclass(frozen=True, kw_only=True)
class ActivationWidths:
    """The shapes of a language model that decide on its temporaries: numbers a token, at the widest point of each part.

    Tensor parallelism splits `attention` and `mlp` (dense, or of shared experts), and the `expert` width of each of
    `experts_per_token`, but not an expert's output. `unpacked_latent` are the numbers that latent attention unpacks for
    a token of context. `positions` and `rotary` are the sides of each of `tables` tables of rotary embeddings.
    """

    hidden: int
    vocabulary: int
    positions: int
    rotary: int
    tables: int
    attention: int
    mlp: int
    experts_per_token: int
    expert: int
    unpacked_latent: int

    def layer(self, tp: int) -> int:
        """Numbers a token at the widest point of a layer on each of `tp` GPUs.

        Of experts one buffer holds gate and up of all that a token visits, or their outputs, whichever is larger, and
        another holds the product of gate and up (vLLM: fused_moe.py, intermediate_cache1 to 3).
        """
        inner = self.expert // tp
        experts = self.experts_per_token * (max(2 * inner, self.hidden) + inner)
        return max(self.attention // tp, self.mlp // tp + experts)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """One GPU's memory, in bytes.

    The engine may use `share_bytes`. Weights, activations and `other_bytes` (CUDA graphs, kernels, communication) count
    against this share, `outside_budget_bytes` do not; the cache gets what remains.
    """

    share_bytes: int
    weight_bytes: int
    activation_bytes: int
    other_bytes: int
    outside_budget_bytes: int

    @property
    def cache_bytes(self) -> int:
        """Bytes that remain for the KV cache; negative where not even the weights fit."""
        return self.share_bytes - self.weight_bytes - self.activation_bytes - self.other_bytes


def read_widths(config: Mapping[str, Any], cache: ModelCache) -> ActivationWidths:
    """Shapes from config.json; UserError where one is missing."""
    text = with_defaults(config)
    hidden = positive(text, "hidden_size")
    split_heads = [a for a in cache.attention if not a.latent]
    queries = cache.query_heads * max((a.key_dim for a in split_heads), default=0)
    unpacked_latent = 0
    if len(split_heads) < len(cache.attention):
        nope, value = positive(text, "qk_nope_head_dim"), positive(text, "v_head_dim")
        unpacked_latent = cache.query_heads * (nope + value)
        queries = cache.query_heads * (nope + positive(text, "qk_rope_head_dim"))
    keys_and_values = max((a.kv_heads * (a.key_dim + a.value_dim) for a in split_heads), default=0)
    state_channels = max((state.conv_channels for state in cache.states), default=0)
    rotary = int(text.get("qk_rope_head_dim") or max((a.key_dim for a in cache.attention), default=0))
    factor = text.get("partial_rotary_factor")
    mlp, experts_per_token, expert = _feed_forward(text, hidden)
    return ActivationWidths(
        hidden=hidden,
        vocabulary=positive(text, "vocab_size"),
        positions=max_positions(config) or 0,
        rotary=int(rotary * factor) if isinstance(factor, float) and not unpacked_latent else rotary,
        tables=rotary_tables(config),
        # queries, rotated queries and attention's output, keys and values; of a state its projections and their mix
        attention=max(3 * queries + keys_and_values, 3 * state_channels),
        mlp=mlp,
        experts_per_token=experts_per_token,
        expert=expert,
        unpacked_latent=unpacked_latent,
    )


def _feed_forward(text: Mapping[str, Any], hidden: int) -> tuple[int, int, int]:
    """Numbers a token of a dense or shared MLP (gate, up, their product), experts a token visits, and their width."""
    inner = _largest(text, "intermediate_size") or 4 * hidden
    counts = [text.get(key) for key in EXPERT_COUNTS]
    if not any(isinstance(count, int) and count > 1 for count in counts):
        return 3 * inner, 0, 0
    expert = _largest(text, "moe_intermediate_size") or inner
    shared = _largest(text, "shared_expert_intermediate_size") or _largest(text, "shared_intermediate_size")
    shared = shared or _largest(text, "n_shared_experts") * expert
    experts_per_token = next((text[key] for key in _EXPERTS_PER_TOKEN if isinstance(text.get(key), int)), 1)
    return 3 * shared, experts_per_token, expert


def _largest(text: Mapping[str, Any], key: str) -> int:
    """A width or a count, the largest where there is a list with one for each layer; 0 where there is none."""
    given = text.get(key) or 0
    return max(given) if isinstance(given, list) else int(given)


def activation_bytes(
    widths: ActivationWidths, engine: EngineMemory, batch: tuple[int, int], multiprocessors: int, tp: int = 1
) -> int:
    """Peak of torch's temporaries in the profiling run: the widest layer, or the sampler that runs after it.

    `batch` are its tokens and sequences. Layer: the batch in 16 bits, with hidden states and residual, and for latent
    attention the context that prefill unpacks, up to 65,536 tokens (mla_attention.py:
    determine_chunked_prefill_workspace_size). Sampler: the batch's hidden states, and `sampler_bytes_per_logit` of
    every sequence; Triton's top-k adds a row of fp32 for each multiprocessor.
    """
    tokens, sequences = batch
    unpacked_tokens = min(max(8 * widths.positions, 64 * sequences), _MAX_UNPACKED_TOKENS)
    unpacked = 2 * (unpacked_tokens * widths.unpacked_latent // tp)
    layer = 2 * tokens * (2 * widths.hidden + widths.layer(tp)) + unpacked
    rows = min(sequences, tokens)
    logits = rows * (widths.vocabulary * engine.sampler_bytes_per_logit + 4 * widths.hidden)
    scratch = 4 * min(multiprocessors, rows) * widths.vocabulary if rows >= 8 else 0
    return max(layer, 2 * tokens * widths.hidden + logits + scratch)


def rotary_bytes(widths: ActivationWidths) -> int:
    """The tables of cosines and sines in 16 bits, which engines load with the weights."""
    return 2 * widths.positions * widths.rotary * widths.tables


def make_budget(
    weight_bytes: int,
    widths: ActivationWidths,
    engine: EngineMemory,
    gpu: Gpu,
    *,
    gpu_memory_utilization: float | None = None,
    tp: int = 1,
) -> Budget:
    """How the engine divides one of `tp` GPUs that hold `weight_bytes` each."""
    tokens, sequences = batch_defaults(gpu.reported_bytes, gpu.name)
    tokens, sequences = engine.max_num_batched_tokens or tokens, engine.max_num_seqs or sequences
    activations = activation_bytes(widths, engine, (tokens, sequences), gpu.multiprocessors, tp)
    graphs = graph_count(sequences, tokens)
    graph_bytes = graphs * engine.graph_bytes
    other = NON_TORCH_BYTES + (COMMUNICATION_BYTES if tp > 1 else 0)
    outside = CUDA_CONTEXT_BYTES
    if engine.sharing == "whole card":
        share = gpu.reported_bytes - CUDA_CONTEXT_BYTES
        other += graph_bytes
    elif engine.sharing == "static fraction":
        fraction = gpu_memory_utilization or 1 - sglang_reserve(gpu.reported_bytes, tp) / gpu.reported_bytes
        share = int((gpu.reported_bytes - CUDA_CONTEXT_BYTES) * fraction)
        outside += activations + graph_bytes
        activations = 0
    else:
        share = int(gpu.reported_bytes * (gpu_memory_utilization or engine.gpu_memory_utilization or 0.9))
        if engine.graph_estimate_bytes:
            other += graphs * engine.graph_estimate_bytes
        else:
            outside += graph_bytes
    return Budget(
        share_bytes=share,
        weight_bytes=weight_bytes + rotary_bytes(widths),
        activation_bytes=activations,
        other_bytes=other,
        outside_budget_bytes=outside,
    )


def max_num_batched_tokens(engine: EngineMemory, gpu: Gpu) -> int:
    """Tokens of a batch, which layers with a window hold in addition to it."""
    return engine.max_num_batched_tokens or batch_defaults(gpu.reported_bytes, gpu.name)[0]
