"""What an engine needs of a GPU beside weights and KV cache, and how it shares the card out, as data.

vLLM (v1/worker/gpu_worker.py: determine_available_memory; utils/mem_utils.py: memory_profiling): it may use
`utilization` times the memory that CUDA reports. From that go the weights, the peak of a profiling run (a full batch,
then its sampler) and what was taken beside torch while starting; the rest is KV cache. The CUDA context was there
before it began to count, so the card holds it on top. CUDA graphs come on top as well until 0.20; since 0.21 an
estimate of them is taken from the share.

Aphrodite 0.10 with --single-user-mode (gpu_worker.py and config/scheduler.py of its release commit f5f651f): one
sequence, whose KV cache is exactly max_model_len rounded up to blocks, whatever the utilization; graphs of one and two
tokens; its sampler works on one row. So the card has to hold the sum.

SGLang 0.5 (server_args.py): weights and cache may have `mem_fraction_static` of the card, by default what is left after
a reserve in MiB: 512 + 1.5 a token of a prefill chunk + 2 a sequence in CUDA graphs + 128 a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
CONTEXT = 300 * MIB
# Taken beside torch while starting (kernels that are loaded, workspaces): 0.02 to 0.26 GiB in logs; a round figure
NON_TORCH = 100 * MIB
# A captured graph: what an estimate adds for each (vLLM 0.19 to 0.24's logs: 86 graphs 0.64, 0.73, 0.78 GiB; 54 graphs
# 0.37 GiB), and what it takes: FITTED to the first seed's 15,415 MiB under vLLM 0.19, context as above
GRAPH_ESTIMATE = 8 * MIB
GRAPH_TAKEN = 5 * MIB
# NCCL and custom all-reduce on each of several GPUs: assumed, no source
COMMUNICATION = 600 * MIB

Sharing = Literal["share", "whole card", "static fraction"]


@dataclass(frozen=True)
class EngineMemory:
    """How one engine, in the versions named, spends a GPU's memory. Bytes; see the module for what is meant.

    `sharing`: the KV cache is what is left of a share of the card ("share"), exactly what one sequence needs ("whole
    card"), or what is left of a fraction for weights and cache alone ("static fraction"). `utilization` is the share's
    default, None where a formula makes it. `graph_estimate` of each CUDA graph is inside the share.
    """

    name: str
    title: str
    engine: str
    sharing: Sharing
    utilization: float | None
    sampler_bytes: int
    graph_estimate: int
    graph_taken: int
    state_blocks: int = 1
    max_sequences: int | None = None
    max_tokens: int | None = None


_VLLM = EngineMemory("vllm", "vLLM 0.32", "vllm", "share", 0.92, TRITON_SAMPLER, GRAPH_ESTIMATE, GRAPH_TAKEN, 2)
ENGINES: Mapping[str, EngineMemory] = {
    memory.name: memory
    for memory in (
        # since prefixes of hybrid models are cached by default a sequence has two blocks a state
        _VLLM,
        EngineMemory("vllm-0.24", "vLLM 0.24", "vllm", "share", 0.92, TRITON_SAMPLER, GRAPH_ESTIMATE, GRAPH_TAKEN),
        EngineMemory("vllm-0.19", "vLLM 0.19", "vllm", "share", 0.9, TRITON_SAMPLER, 0, GRAPH_TAKEN),
        EngineMemory(
            *("aphrodite", "Aphrodite 0.10 --single-user-mode", "aphrodite", "whole card", None),
            *(SORTING_SAMPLER, 0, GRAPH_TAKEN),
            max_sequences=1,
            max_tokens=2048,
        ),
        EngineMemory("aphrodite-many", "Aphrodite 0.10", "aphrodite", "share", 0.9, SORTING_SAMPLER, 0, GRAPH_TAKEN),
        EngineMemory("sglang", "SGLang 0.5", "sglang", "static fraction", None, TRITON_SAMPLER, 0, GRAPH_TAKEN),
    )
}
OFFERED = ("vllm", "vllm-0.24", "vllm-0.19", "aphrodite", "sglang")


def batch_defaults(reported_bytes: int, card: str | None) -> tuple[int, int]:
    """Tokens of a batch and sequences at once of `vllm serve`, by the card's memory (engine/arg_utils.py).

    From 70 GiB on 8,192 and 1,024, but not on an A100; else 2,048 and 256. Aphrodite has the same.
    """
    large = reported_bytes >= 70 * GIB and not (card or "").startswith("A100")
    return (8192, 1024) if large else (2048, 256)


def graph_count(max_sequences: int, max_tokens: int) -> int:
    """CUDA graphs of a start: sizes up to twice the sequences and 512, once in pieces, and whole up to the sequences.

    vllm/config/vllm.py: _set_cudagraph_sizes; 1, 2, 4, then every 8th to 256 and every 16th to 512.
    """
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]
    largest = min(2 * max_sequences, 512, max_tokens)
    in_pieces = len([size for size in sizes if size <= largest])
    return in_pieces + len([size for size in sizes if size <= min(max_sequences, largest)])


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
