"""What fits on a GPU: the result of `fit`. Sizes are in bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from snugfit.records.base import as_json

FIT_SCHEMA = "snugfit.fit/1"


@dataclass(frozen=True, kw_only=True)
class FitArguments:
    """What `fit` was called with."""

    model: str
    gpu: str
    context: int | None
    tensor_parallel_size: int
    engine: str
    gpu_memory_utilization: float | None
    max_num_seqs: int
    recipes: tuple[str, ...]


@dataclass(frozen=True)
class FitGpu:
    """The GPU: its name or size, the memory that CUDA reports, and its generation where the name says it."""

    name: str
    reported_bytes: int
    generation: str | None


@dataclass(frozen=True)
class FitEngine:
    """The engine: its name in `fit`, its title, and how it divides a GPU (`sharing` of engines/memory.py)."""

    name: str
    title: str
    sharing: str


@dataclass(frozen=True, kw_only=True)
class FitMemory:
    """How the engine divides one GPU, except for weights and KV cache.

    Of `share_bytes` the engine takes activations, the table of positions and `other_bytes` (CUDA graphs, kernels,
    communication); `outside_budget_bytes` come in addition to the share.
    """

    share_bytes: int
    activation_bytes: int
    position_table_bytes: int
    other_bytes: int
    outside_budget_bytes: int


@dataclass(frozen=True)
class AttentionKernels:
    """The kernels that read a KV cache in 16 bits ("auto") and in FP8."""

    auto: str
    fp8: str


@dataclass(frozen=True, kw_only=True)
class FitCache:
    """What fits beside the weights of a `FitRow` with one kind of KV cache. Bytes are those of one GPU.

    `kv_cache` is "auto" (16 bits) or "fp8"; `recipe` is the one that writes it (with calibrated scales of an FP8 cache,
    where a recipe has them). `max_context` is the longest context of each sequence, 0 for none, at most what the model
    was made for. `headroom_bytes` remain after the wanted context, negative for what is missing; then `gpus_needed` is
    the number of GPUs on which it fits, None where it does not fit 16.
    """

    kv_cache: str
    recipe: str | None
    bytes_per_token: int
    max_context: int
    fits: bool
    headroom_bytes: int
    gpus_needed: int | None


@dataclass(frozen=True, kw_only=True)
class FitRow:
    """One way to store the weights: the recipes that write it (none: the model as it is), with either KV cache.

    `kernels` names what runs the weights, by GPU generation, `loads` how it is known that the engine loads them there:
    "seen" running by this project, "read" in its source, or "no". Where `problem` says why this way is impossible,
    nothing else is known.
    """

    name: str
    recipes: tuple[str, ...]
    formats: tuple[str, ...]
    bytes: int | None = None
    bytes_per_gpu: int | None = None
    bits_per_weight: float | None = None
    caches: tuple[FitCache, ...] = ()
    kernels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    loads: Mapping[str, str] = field(default_factory=dict)
    problem: str | None = None

    @property
    def fits(self) -> bool:
        """Whether it fits with some KV cache."""
        return any(cache.fits for cache in self.caches)


@dataclass(frozen=True, kw_only=True)
class FitRecord:
    """What fits on a GPU, the best row first.

    `attention` are the kernels that read the KV cache, by GPU generation. `max_positions` is the longest context that
    the model was made for; `windows` are the tokens that layers with a sliding window keep, `state_bytes` a sequence's
    states.
    """

    snugfit: str
    model: str
    arguments: FitArguments
    gpu: FitGpu
    engine: FitEngine
    memory: FitMemory
    attention: Mapping[str, AttentionKernels]
    context: int | None
    max_positions: int
    windows: tuple[int, ...]
    state_bytes: int
    rows: tuple[FitRow, ...]
    notes: tuple[str, ...]
    schema: str = FIT_SCHEMA

    def to_json(self) -> str:
        """The record as one JSON document."""
        return as_json(asdict(self))
