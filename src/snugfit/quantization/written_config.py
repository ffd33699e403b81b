"""The config.json of the result: that of the source, with the quantization of what is written. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from snugfit.dialects import compressed_tensors
from snugfit.formats.spec import TensorFormat
from snugfit.model.language_config import nested_language_keys
from snugfit.model.layout import ModelLayout
from snugfit.model.tied import untied
from snugfit.quantization.cache_scales import kept_cache
from snugfit.quantization.decide import Decisions
from snugfit.recipes.recipe import LoadedRecipe


def config_to_write(layout: ModelLayout, recipe: LoadedRecipe, decisions: Decisions) -> dict[str, Any]:
    """The source's config.json with the quantization config of what is written in place of its own."""
    names = decisions.names
    formats = {names[name].module: a.format for name, a in decisions.assignments.items() if a.format is not None}
    cache = recipe.recipe.kv_cache or kept_cache(layout)
    ignore = _ignored_modules(decisions, formats)
    config = _without_quantization(layout.checkpoint.config)
    if layout.tied.own_head:
        config = untied(config)
    return config | {"quantization_config": compressed_tensors.quantization_config(formats, ignore, cache)}


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without the quantization that it states, at any level that describes the language model."""
    removed = {"quantization_config", "compression_config"}
    if isinstance(config.get("quantization"), dict):  # MLX's
        removed.add("quantization")
    kept = {key: value for key, value in config.items() if key not in removed}
    return kept | {key: _without_quantization(kept[key]) for key in nested_language_keys(kept)}


def _ignored_modules(decisions: Decisions, formats: Mapping[str, TensorFormat]) -> list[str]:
    """Modules for `ignore`: every linear without a format, and a tied lm_head, which the file does not have."""
    linears = [
        parsed.module
        for name, parsed in decisions.names.items()
        if parsed.parameter == "weight"
        and parsed.role not in ("embed", "norm")
        and len(decisions.weights.tensors[name].shape) == 2
    ]
    head = [] if any(parsed.role == "lm_head" for parsed in decisions.names.values()) else ["lm_head"]
    return [module for module in dict.fromkeys([*linears, *head]) if module not in formats]
