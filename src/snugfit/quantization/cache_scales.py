"""Scales of an FP8 KV cache: which modules get them, as which tensors, and what of the source stays. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from snugfit.dialects import compressed_tensors
from snugfit.engines.kv_cache import attention_modules, has_scales, scale_names
from snugfit.errors import UserError
from snugfit.model.layout import ModelLayout
from snugfit.model.logical_weights import LogicalWeights
from snugfit.recipes.recipe import LoadedRecipe
from snugfit.storage.safetensors_header import TensorInfo


def kv_cache_modules(layout: ModelLayout, recipe: LoadedRecipe, units: Sequence[Sequence[str]]) -> dict[int, str]:
    """Layer -> the module whose keys and values get scales; empty where the recipe asks for none."""
    if recipe.recipe.kv_cache is None:
        return {}
    where = f"{recipe.where}: kv_cache"
    attention = attention_of(layout, units, where=where)
    if not attention:
        what = "this model has no layer that caches keys and values."
        raise UserError(what, code="recipe-not-quantizable", where=where, remedy="Remove `kv_cache` from the recipe.")
    return attention


def attention_of(layout: ModelLayout, units: Sequence[Sequence[str]], *, where: str) -> dict[int, str]:
    """Layer -> the module that caches keys and values."""
    inside = [[name for name in unit if name.startswith(f"{layout.decoder}.")] for unit in units[1:]]
    found = attention_modules(inside, layout.config, where=where)
    return {layer: module for layer, module in enumerate(found) if module is not None}


def kv_scale_outputs(weights: LogicalWeights, attention: Mapping[int, str]) -> dict[str, tuple[TensorInfo, ...]]:
    """Scales of an FP8 cache of these attention modules; UserError where the source has such scales already."""
    found: dict[str, tuple[TensorInfo, ...]] = {}
    for module in attention.values():
        dtype = next(t.dtype for t in weights.tensors.values() if t.name.startswith(f"{module}."))
        parts = compressed_tensors.kv_layout(module, dtype)
        layer = module.rpartition(".")[0]
        if any(name in weights.checkpoint.tensors for which in "kv" for name in scale_names(layer, which)):
            raise UserError(
                f"{module} has scales of an FP8 cache already, which the source's engine uses.",
                code="already-quantized",
                where=str(weights.checkpoint.path),
                remedy="Remove `kv_cache` from the recipe: they stay.",
            )
        found |= {name: (TensorInfo(name, *header),) for name, header in parts.items()}
    return found


def kept_cache(layout: ModelLayout) -> Literal["fp8"] | None:
    """The FP8 cache that the source asks for, under scales that it has."""
    tensors = layout.checkpoint.tensors
    if not any(has_scales(tensors, f"{layout.decoder}.{number}") for number in range(layout.num_layers)):
        return None
    return layout.dialect.kv_cache_format()
