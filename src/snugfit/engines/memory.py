"""What an engine needs of a GPU in addition to weights and KV cache, and how it divides the card, as data.

vLLM (v1/worker/gpu_worker.py: determine_available_memory; utils/mem_utils.py: memory_profiling) may use
`gpu_memory_utilization` times the memory that CUDA reports. It subtracts the weights, the peak of a profiling run (a
full batch, then its sampler) and what was allocated outside torch while starting; the rest is KV cache. The CUDA
context existed before vLLM began to count, so the card holds it outside this budget. CUDA graphs are outside it as well
until 0.20; since 0.21 an estimate of them is subtracted from the budget.

Aphrodite 0.10 with --single-user-mode (gpu_worker.py and config/scheduler.py of its release commit f5f651f) serves one
sequence, whose KV cache is exactly max_model_len rounded up to blocks, whatever the utilization. It captures graphs of
one and two tokens, and its sampler works on one row. So the card has to hold the sum.

SGLang 0.5 (server_args.py): weights and cache may have `mem_fraction_static` of the card, by default what remains after
a reserve in MiB: 512 + 1.5 a token of a prefill chunk + 2 a sequence in CUDA graphs + 128 a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

MIB = 1024**2
GIB = 1024**3

# Bytes a logit (sequence x vocabulary) at the sampler's peak. Since Triton does top-k and top-p in place: the logits in
# 16 bits, in fp32, their softmax and the random draws (v1/sample/sampler.py, ops/topk_topp_sampler.py: forward_native)
TRITON_SAMPLER = 2 + 4 + 4 + 4
# before, they were sorted: 1.40 GiB of peak in a log of Qwen3-8B, 256 x 151,936 logits (vLLM 0.10, September 2025)
SORTING_SAMPLER = 38
# What CUDA keeps for a process before an engine starts to count: 0.23 GiB (L4) and 0.45 GiB (RTX 4090) in logs of
# "Free memory on device (21.83/22.06 GiB) on startup"; a round figure between
CUDA_CONTEXT_BYTES = 300 * MIB
# Allocated outside torch while starting (loaded kernels, workspaces): 0.02 to 0.26 GiB in logs; a round figure
NON_TORCH_BYTES = 100 * MIB
# A captured graph: what an estimate adds for each (vLLM 0.19 to 0.24's logs: 86 graphs 0.64, 0.73, 0.78 GiB; 54 graphs
# 0.37 GiB), and what it takes: FITTED to the first seed's 15,415 MiB under vLLM 0.19, context as above
GRAPH_ESTIMATE_BYTES = 8 * MIB
GRAPH_BYTES = 5 * MIB
# NCCL and custom all-reduce on each of several GPUs: assumed, no source
COMMUNICATION_BYTES = 600 * MIB

Sharing = Literal["share", "whole card", "static fraction"]


@dataclass(frozen=True, kw_only=True)
class EngineMemory:
    """How one engine, in the versions of its title, spends a GPU's memory in bytes; the module docstring explains.

    `sharing`: the KV cache gets what remains of a share of the card ("share"), exactly what one sequence needs ("whole
    card"), or what remains of a fraction for weights and cache alone ("static fraction"). `gpu_memory_utilization` is
    the default share, None where a formula makes it. `graph_estimate_bytes` of each CUDA graph are inside the share, 0
    where `graph_bytes` of each are outside. `engine` is its name in engines/kernels.py, `state_blocks` the blocks that
    a sequence takes for each state.
    """

    name: str
    title: str
    engine: str
    sharing: Sharing
    gpu_memory_utilization: float | None
    sampler_bytes_per_logit: int
    graph_estimate_bytes: int = 0
    graph_bytes: int = GRAPH_BYTES
    state_blocks: int = 1
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None


_VLLM = EngineMemory(
    name="vllm",
    title="vLLM 0.32",
    engine="vllm",
    sharing="share",
    gpu_memory_utilization=0.92,
    sampler_bytes_per_logit=TRITON_SAMPLER,
    graph_estimate_bytes=GRAPH_ESTIMATE_BYTES,
    # since vLLM caches prefixes of hybrid models by default, a sequence has two blocks a state
    state_blocks=2,
)
_VLLM_024 = replace(_VLLM, name="vllm-0.24", title="vLLM 0.24", state_blocks=1)
_VLLM_019 = replace(_VLLM_024, name="vllm-0.19", title="vLLM 0.19", gpu_memory_utilization=0.9, graph_estimate_bytes=0)
_APHRODITE_MANY = EngineMemory(
    name="aphrodite-many",
    title="Aphrodite 0.10",
    engine="aphrodite",
    sharing="share",
    gpu_memory_utilization=0.9,
    sampler_bytes_per_logit=SORTING_SAMPLER,
)
_APHRODITE = replace(
    _APHRODITE_MANY,
    name="aphrodite",
    title="Aphrodite 0.10 --single-user-mode",
    sharing="whole card",
    gpu_memory_utilization=None,
    max_num_seqs=1,
    max_num_batched_tokens=2048,
)
_SGLANG = EngineMemory(
    name="sglang",
    title="SGLang 0.5",
    engine="sglang",
    sharing="static fraction",
    gpu_memory_utilization=None,
    sampler_bytes_per_logit=TRITON_SAMPLER,
)
ENGINES: Mapping[str, EngineMemory] = {
    memory.name: memory for memory in (_VLLM, _VLLM_024, _VLLM_019, _APHRODITE, _APHRODITE_MANY, _SGLANG)
}
# what `fit` lets a user choose; "aphrodite" becomes "aphrodite-many" for more than one sequence
ENGINE_NAMES = ("vllm", "vllm-0.24", "vllm-0.19", "aphrodite", "sglang")


def batch_defaults(reported_bytes: int, card: str | None) -> tuple[int, int]:
    """`vllm serve`'s defaults of max_num_batched_tokens and max_num_seqs, by the card's memory (engine/arg_utils.py).

    8,192 and 1,024 from 70 GiB on, but not on an A100; else 2,048 and 256. Aphrodite has the same.
    """
    large = reported_bytes >= 70 * GIB and not (card or "").startswith("A100")
    return (8192, 1024) if large else (2048, 256)


def graph_count(max_num_seqs: int, max_num_batched_tokens: int) -> int:
    """CUDA graphs that a start captures: piecewise up to twice the sequences, full ones up to the sequences.

    Sizes are 1, 2, 4, then every 8th to 256 and every 16th to 512 (vllm/config/vllm.py: _set_cudagraph_sizes).
    """
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]
    largest = min(2 * max_num_seqs, 512, max_num_batched_tokens)
    piecewise = [size for size in sizes if size <= largest]
    full = [size for size in piecewise if size <= max_num_seqs]
    return len(piecewise) + len(full)


def sglang_reserve(reported_bytes: int, tp: int) -> int:
    """Bytes that SGLang keeps free of weights and cache by default, by the card's memory (server_args.py)."""
    gib, few = reported_bytes / GIB, tp < 4
    chunk, graphs = 16384, 512
    if gib < 20:
        chunk, graphs = 2048, 8
    elif gib < 35:
        chunk, graphs = 2048, 24 if few else 80
    elif gib < 60:
        chunk, graphs = 4096, 32 if few else 160
    elif gib < 160:
        chunk, graphs = 8192, 256 if few else 512
    return int((512 + 1.5 * chunk + 2 * graphs + 128 * tp) * MIB)
