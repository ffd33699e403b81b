"""One way to store a model on one kind of GPU: how long a context fits, how much is left, what it would take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from snugfit.engines.gpus import COMMON, GENERATIONS, Generation
from snugfit.engines.kernels import linear_kernel
from snugfit.engines.memory import EngineMemory
from snugfit.errors import UserError
from snugfit.formats.spec import TensorFormat
from snugfit.storage.safetensors_header import TensorInfo
from snugfit.vram.blocks import Pool, make_pool
from snugfit.vram.budget import Budget, Widths, in_flight, share_out
from snugfit.vram.kv_cache import ModelCache, check_split
from snugfit.vram.request import Gpu
from snugfit.vram.weights import gpu_bytes, is_expert, kernel_format, misfit

# a context that is worth a start, where none is asked for
LEAST_CONTEXT = 2048
_MORE_GPUS = (2, 4, 8, 16)


@dataclass(frozen=True)
class Stored:
    """A tensor of the source as it would be stored: `count` alike (a layer's experts), `format` None for kept."""

    name: str
    shape: tuple[int, ...]
    infos: tuple[TensorInfo, ...]
    format: TensorFormat | None
    count: int = 1


@dataclass(frozen=True)
class Model:
    """What does not depend on how the weights are stored: caches, widths, and the tokens the model was made for."""

    cache: ModelCache
    widths: Widths
    limit: int


@dataclass(frozen=True)
class Setting:
    """Where and how it shall be served: `context` tokens in each of `sequences`, None for the longest."""

    gpu: Gpu
    engine: EngineMemory
    tp: int = 1
    utilization: float | None = None
    context: int | None = None
    sequences: int = 1


@dataclass(frozen=True)
class Answer:
    """Whether it fits on `setting`. Bytes are one GPU's.

    `longest` is the longest context of every sequence, 0 for none. `spare` is what is left beside the asked context
    (the least one that is worth a start, where none is asked for), negative where so much is missing; `gpus` how many
    would do then, None where it fits or 16 do not.
    """

    weights: int
    budget: Budget
    pool: Pool
    longest: int
    spare: int
    gpus: int | None

    @property
    def fits(self) -> bool:
        """Whether the asked context has room."""
        return self.spare >= 0


def answer(model: Model, stored: Sequence[Stored], setting: Setting, *, fp8: bool) -> Answer:
    """What `setting` makes of the weights with a KV cache in 16 bits or FP8."""
    found = _answer(model, stored, setting, setting.tp, fp8)
    if found.fits:
        return found
    for tp in _MORE_GPUS:
        if tp > setting.tp and problem(model, stored, setting, tp) is None:
            more = _answer(model, stored, setting, tp, fp8)
            if more.fits:
                return Answer(found.weights, found.budget, found.pool, found.longest, found.spare, tp)
    return found


def problem(model: Model, stored: Sequence[Stored], setting: Setting, tp: int) -> str | None:
    """Why the engine would not serve these weights on so many GPUs, whatever their memory; None where it would."""
    try:
        check_split(model.cache, tp)
    except UserError as error:
        return error.what
    uneven = (misfit(weight.name, weight.shape, weight.format, tp) for weight in stored)
    found = next((what for what in uneven if what is not None), None)
    if found is not None:
        return found
    generation = setting.gpu.generation
    if generation is None:
        return None
    engine = setting.engine.engine
    for weight in stored:
        name = kernel_format(weight.format)
        if weight.format is not None and linear_kernel(engine, name, generation) is None:
            return f"no kernel of {setting.engine.title} is known for {name} on {GENERATIONS[generation]}"
    return None


def kernels(stored: Sequence[Stored], setting: Setting) -> dict[Generation, tuple[str, ...]]:
    """Generation -> what runs the weights there, such as "nvfp4: Marlin (W4A16)", experts apart where they differ."""
    generations: Sequence[Generation] = (setting.gpu.generation,) if setting.gpu.generation else COMMON
    pairs = dict.fromkeys((kernel_format(w.format), is_expert(w.name)) for w in stored if w.format is not None)
    found: dict[Generation, tuple[str, ...]] = {}
    for generation in generations:
        words: dict[str, None] = {}
        for fmt, experts in pairs:
            kernel = linear_kernel(setting.engine.engine, fmt, generation, experts=experts)
            same = kernel == linear_kernel(setting.engine.engine, fmt, generation)
            label = f"{fmt} experts" if experts and not same else fmt
            words[f"{label}: {kernel.name} ({kernel.arithmetic})" if kernel else f"{label}: no kernel"] = None
        found[generation] = tuple(words)
    return found


def per_gpu(stored: Sequence[Stored], tp: int, kv_heads: int | None) -> int:
    """Bytes of all weights on each of `tp` GPUs."""
    return sum(weight.count * gpu_bytes(weight.name, weight.infos, tp, kv_heads) for weight in stored)


def total(stored: Sequence[Stored]) -> int:
    """Bytes of all weights."""
    return per_gpu(stored, 1, None)


def bits_per_weight(stored: Sequence[Stored], elements: Mapping[str, int]) -> float:
    """Bits a number of the source, everything counted; `elements` by name."""
    return 8 * total(stored) / max(1, sum(weight.count * elements.get(weight.name, 0) for weight in stored))


def _answer(model: Model, stored: Sequence[Stored], setting: Setting, tp: int, fp8: bool) -> Answer:
    device, engine = setting.gpu.device, setting.engine
    heads = next((a.heads for a in model.cache.attention if not a.latent), None)
    weights = per_gpu(stored, tp, heads)
    budget = share_out(weights, model.widths, engine, device, utilization=setting.utilization, tp=tp)
    pool = make_pool(model.cache, in_flight=in_flight(engine, device), fp8=fp8, tp=tp, state_blocks=engine.state_blocks)
    longest = pool.longest(budget.for_cache, model.limit, setting.sequences) if budget.for_cache > 0 else 0
    asked = setting.context or min(LEAST_CONTEXT, model.limit)
    return Answer(weights, budget, pool, longest, budget.for_cache - pool.bytes_needed(asked, setting.sequences), None)
