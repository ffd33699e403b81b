"""One way to store the weights on one GPU (or on each of several): how long a context fits, and what it would take."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace

from snugfit.engines.fused import group_modules
from snugfit.engines.gpus import COMMON, GENERATIONS, Generation
from snugfit.engines.kernels import Kernel, Linear, linear_kernel
from snugfit.engines.loading import Loading, worst_loading
from snugfit.engines.memory import EngineMemory
from snugfit.formats.spec import WHOLE_ROW, TensorFormat
from snugfit.storage.safetensors_header import TensorInfo
from snugfit.vram.blocks import BlockPool, make_pool
from snugfit.vram.budget import ActivationWidths, Budget, Gpu, make_budget, max_num_batched_tokens
from snugfit.vram.kv_cache import ModelCache, head_split_error
from snugfit.vram.weights import bytes_on_gpu, is_expert, kernel_format, shape_on_gpu, split_error

# a context that makes serving worthwhile, where none is asked for
MIN_CONTEXT = 2048
_MORE_GPUS = (2, 4, 8, 16)
_NUMBER = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the source as it would be stored: in `infos` of the result, in `format` (None: it stays as it is).

    It stands for `count` tensors that are alike, such as those of a layer's experts.
    """

    name: str
    shape: tuple[int, ...]
    infos: tuple[TensorInfo, ...]
    format: TensorFormat | None
    count: int = 1


@dataclass(frozen=True)
class ServedModel:
    """What does not depend on how the weights are stored: caches, widths, and the longest context it was made for."""

    cache: ModelCache
    widths: ActivationWidths
    max_positions: int


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Where and how a model is served: `context` tokens in each of `max_num_seqs` sequences, None for the longest."""

    gpu: Gpu
    engine: EngineMemory
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float | None = None
    context: int | None = None
    max_num_seqs: int = 1


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What fits beside the weights. Bytes are those of one GPU.

    `max_context` is the longest context of every sequence, 0 for none. `headroom_bytes` is what the wanted context (at
    least `MIN_CONTEXT` where none is asked for) leaves over; negative for what is missing, and then `gpus_needed` is
    the number of GPUs on which it fits, None where it does not fit 16.
    """

    weight_bytes: int
    budget: Budget
    pool: BlockPool
    max_context: int
    headroom_bytes: int
    gpus_needed: int | None = None

    @property
    def fits(self) -> bool:
        """Whether the wanted context fits."""
        return self.headroom_bytes >= 0


def merge_layers(tensors: Sequence[PlannedTensor]) -> tuple[PlannedTensor, ...]:
    """One tensor for all that differ in their layer's number alone: what a GPU holds does not depend on it."""
    groups: dict[object, tuple[PlannedTensor, int]] = {}
    for tensor in tensors:
        kind = _NUMBER.sub(".0.", tensor.name), tensor.shape, tensor.format
        key = *kind, tuple((info.name.rpartition(".")[2], info.dtype, info.shape) for info in tensor.infos)
        first, count = groups.get(key, (tensor, 0))
        groups[key] = first, count + tensor.count
    return tuple(replace(first, count=count) for first, count in groups.values())


def fit_weights(
    model: ServedModel,
    tensors: Sequence[PlannedTensor],
    settings: ServeSettings,
    *,
    fp8: bool,
    kept_layers: Container[int] = (),
) -> FitResult:
    """What fits beside these weights with a KV cache in 16 bits or FP8, beside which `kept_layers` keep 16 bits."""
    found = _fit_on(model, tensors, settings, settings.tensor_parallel_size, fp8, kept_layers)
    if found.fits:
        return found
    for tp in _MORE_GPUS:
        possible = tp > settings.tensor_parallel_size and serving_error(model, tensors, settings, tp) is None
        if possible and _fit_on(model, tensors, settings, tp, fp8, kept_layers).fits:
            return replace(found, gpus_needed=tp)
    return found


def serving_error(model: ServedModel, tensors: Sequence[PlannedTensor], settings: ServeSettings, tp: int) -> str | None:
    """Why the engine would not serve these weights on `tp` GPUs of any memory; None where it would."""
    uneven = head_split_error(model.cache, tp)
    if uneven is not None:
        return uneven
    for tensor in tensors:
        uneven = split_error(tensor.name, tensor.shape, tensor.format, tp, model.cache.kv_heads)
        if uneven is not None:
            return uneven
    generation = settings.gpu.generation
    if generation is None:
        return None
    engine = settings.engine
    for tensor in tensors:
        name = kernel_format(tensor.format)
        if tensor.format is not None and linear_kernel(engine.engine, name, generation) is None:
            return f"no kernel of {engine.title} is known for {name} on {GENERATIONS[generation]}"
    return None


def kernel_labels(
    tensors: Sequence[PlannedTensor], settings: ServeSettings, kv_heads: int | None
) -> dict[Generation, tuple[str, ...]]:
    """Generation -> the kernels of the weights, such as "nvfp4: Marlin (W4A16)"; of experts where theirs differ."""
    generations: Sequence[Generation] = (settings.gpu.generation,) if settings.gpu.generation else COMMON
    linears = linears_on_gpu(tensors, settings.tensor_parallel_size, kv_heads)
    engine = settings.engine.engine
    found: dict[Generation, tuple[str, ...]] = {}
    for generation in generations:
        labels: dict[str, None] = {}
        for (fmt, experts), some in linears.items():
            same = linear_kernel(engine, fmt, generation, experts=experts) == linear_kernel(engine, fmt, generation)
            label = f"{fmt} experts" if experts and not same else fmt
            kernels = kernels_of(engine, fmt, generation, some, experts=experts)
            words = [f"{kernel.name} ({kernel.arithmetic})" for kernel in kernels] or ["no kernel"]
            labels |= dict.fromkeys(f"{label}: {one}" for one in words)
        found[generation] = tuple(labels)
    return found


def linears_on_gpu(
    tensors: Sequence[PlannedTensor], tp: int, kv_heads: int | None
) -> dict[tuple[str, bool], tuple[Linear, ...]]:
    """What each of `tp` GPUs has of quantized linears, by the format's name for kernels and whether they are experts.

    Fused partners are one.
    """
    weights = {t.name.removesuffix(".weight"): t for t in tensors if t.format is not None}
    found: dict[tuple[str, bool], dict[Linear, None]] = {}
    for group in group_modules(weights):
        members = [weights[module] for module in group]
        shapes = [shape_on_gpu(member.name, member.shape, tp, kv_heads)[-2:] for member in members]
        fmt = members[0].format
        size = fmt.group_size if fmt and fmt.group_size else WHOLE_ROW
        linear = Linear(sum(out for out, _ in shapes), shapes[0][1], size)
        found.setdefault((kernel_format(fmt), is_expert(members[0].name)), {})[linear] = None
    return {key: tuple(linears) for key, linears in found.items()}


def kernels_of(
    engine: str, fmt: str, generation: Generation, linears: Sequence[Linear], *, experts: bool
) -> tuple[Kernel, ...]:
    """The kernels that run these linears of one format, in the order of the engine's preference."""
    first = linear_kernel(engine, fmt, generation, experts=experts)
    used = {linear_kernel(engine, fmt, generation, experts=experts, linear=linear) for linear in linears}
    found = [kernel for kernel in used if kernel is not None]
    return tuple(sorted(found, key=lambda kernel: (kernel != first, kernel.name)))


def most_weight_bytes(
    model: ServedModel, settings: ServeSettings, *, fp8: bool, kept_layers: Container[int] = ()
) -> int:
    """Bytes of weights on each GPU beside which the wanted context fits, in a KV cache of 16 bits or FP8; may be < 0.

    Without a wanted context it is at least `MIN_CONTEXT`, as in `fit_weights`. Beside an FP8 cache `kept_layers`
    keep 16 bits.
    """
    budget, pool = _memory(model, 0, settings, settings.tensor_parallel_size, fp8, kept_layers)
    return _headroom(model, budget, pool, settings)


def longest_context(
    model: ServedModel, weight_bytes: int, settings: ServeSettings, *, fp8: bool, kept_layers: Container[int] = ()
) -> int:
    """Tokens of the longest context beside `weight_bytes` on each GPU; 0 where not one token fits."""
    budget, pool = _memory(model, weight_bytes, settings, settings.tensor_parallel_size, fp8, kept_layers)
    return _longest(model, budget, pool, settings)


def loading_status(tensors: Sequence[PlannedTensor], settings: ServeSettings) -> dict[Generation, Loading]:
    """Generation -> how it is known that the engine loads these weights there."""
    generations: Sequence[Generation] = (settings.gpu.generation,) if settings.gpu.generation else COMMON
    formats = dict.fromkeys(kernel_format(tensor.format) for tensor in tensors if tensor.format is not None)
    return {generation: worst_loading(settings.engine.engine, formats, generation) for generation in generations}


def weight_bytes_per_gpu(tensors: Sequence[PlannedTensor], tp: int, kv_heads: int | None) -> int:
    """Bytes of all weights on each of `tp` GPUs."""
    return sum(tensor.count * bytes_on_gpu(tensor.name, tensor.infos, tp, kv_heads) for tensor in tensors)


def total_weight_bytes(tensors: Sequence[PlannedTensor]) -> int:
    """Bytes of all weights."""
    return weight_bytes_per_gpu(tensors, 1, None)


def bits_per_weight(tensors: Sequence[PlannedTensor], elements: Mapping[str, int]) -> float:
    """Stored bits, scales included, per weight of the source, whose `elements` are given by tensor name."""
    return 8 * total_weight_bytes(tensors) / max(1, sum(t.count * elements.get(t.name, 0) for t in tensors))


def _fit_on(
    model: ServedModel,
    tensors: Sequence[PlannedTensor],
    settings: ServeSettings,
    tp: int,
    fp8: bool,
    kept_layers: Container[int],
) -> FitResult:
    weight_bytes = weight_bytes_per_gpu(tensors, tp, model.cache.kv_heads)
    budget, pool = _memory(model, weight_bytes, settings, tp, fp8, kept_layers)
    return FitResult(
        weight_bytes=weight_bytes,
        budget=budget,
        pool=pool,
        max_context=_longest(model, budget, pool, settings),
        headroom_bytes=_headroom(model, budget, pool, settings),
    )


def _longest(model: ServedModel, budget: Budget, pool: BlockPool, settings: ServeSettings) -> int:
    """Tokens of the longest context; 0 where not one token fits."""
    available = budget.cache_bytes
    return pool.max_context(available, model.max_positions, settings.max_num_seqs) if available > 0 else 0


def _headroom(model: ServedModel, budget: Budget, pool: BlockPool, settings: ServeSettings) -> int:
    """Bytes that the context which has to fit leaves; negative where it does not fit."""
    wanted = settings.context or min(MIN_CONTEXT, model.max_positions)
    return budget.cache_bytes - pool.bytes_needed(wanted, settings.max_num_seqs)


def _memory(
    model: ServedModel,
    weight_bytes: int,
    settings: ServeSettings,
    tp: int,
    fp8: bool,
    kept_layers: Container[int] = (),
) -> tuple[Budget, BlockPool]:
    """How one of `tp` GPUs is divided that holds `weight_bytes`, and its pool of cache blocks."""
    gpu, engine = settings.gpu, settings.engine
    budget = make_budget(
        weight_bytes, model.widths, engine, gpu, gpu_memory_utilization=settings.gpu_memory_utilization, tp=tp
    )
    batch = max_num_batched_tokens(engine, gpu)
    return budget, make_pool(
        model.cache,
        max_num_batched_tokens=batch,
        fp8=fp8,
        tp=tp,
        state_blocks=engine.state_blocks,
        kept_layers=kept_layers,
    )
