"""Formats without a kernel on a GPU, and shapes that cannot be split over several."""

from __future__ import annotations

from collections.abc import Iterator

from snugfit.engines.gpus import GENERATIONS
from snugfit.engines.kernels import linear_kernel
from snugfit.errors import UserError
from snugfit.inspection.evidence import Evidence, finding
from snugfit.model.anatomy import is_prediction_head, is_tower
from snugfit.records.doctor import Finding
from snugfit.vram.kv_cache import head_split_error
from snugfit.vram.kv_cache_config import read_cache
from snugfit.vram.weights import kernel_format, split_error


def kernels(evidence: Evidence) -> Iterator[Finding]:
    """Formats of the file that an engine cannot run on the GPU."""
    generation = None if evidence.gpu is None else evidence.gpu.generation
    if generation is None:
        return
    names: dict[str, list[str]] = {}
    for name, module in evidence.quantized.items():
        names.setdefault(kernel_format(module.asked), []).append(name)
    for fmt, places in names.items():
        without = [r for r in evidence.engines if r.kernels and linear_kernel(r.kernels, fmt, generation) is None]
        what = f"no kernel is known for {fmt} on {GENERATIONS[generation]}."
        titles = [f"{title} on {GENERATIONS[generation]}" for title in evidence.affected(without)]
        yield from finding("kernel-missing", places, what, titles)


def shapes(evidence: Evidence) -> Iterator[Finding]:
    """Weights whose blocks or groups engines cannot join or split over the GPUs."""
    tp = evidence.tensor_parallel_size
    servers = [release for release in evidence.engines if release.kernels]
    try:
        cache = read_cache(evidence.layout.config)
    except UserError:
        cache = None
    uneven = head_split_error(cache, tp) if cache is not None else None
    if uneven is not None:
        yield from finding("shape-refused", ["config.json"], f"{uneven}.", evidence.affected(servers))
    found, what = [], ""
    heads = cache.kv_heads if cache is not None else None
    for name, module in evidence.quantized.items():
        if is_tower(name) or is_prediction_head(name):
            continue
        error = split_error(f"{name}.weight", module.packed.shape, module.asked, tp, heads)
        if error is not None:
            found.append(name)
            what = what or f"{error}."
    remedy = "Quantize these weights in another format: one GPU is the least." if tp == 1 else ""
    yield from finding("shape-refused", found, what, evidence.affected(servers), remedy=remedy)
