"""What a recipe does to a model, from headers alone: neither samples nor transformers are needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers.sparse_models import write_sparse_model
from snugfit.model.layout import read_layout
from snugfit.quantization.plan import Plan, lay_out
from snugfit.recipes.recipe import LoadedRecipe, load_recipe, parse_recipe


def plan_of(model: str | Path, recipe: str | LoadedRecipe, **options: Any) -> Plan:
    """The plan of a run that quantizes `model` by `recipe`; `options` are those of `lay_out`."""
    return lay_out(read_layout(model), load_recipe(recipe) if isinstance(recipe, str) else recipe, **options)


def write_headers(model: Path, recipe: str, folder: Path) -> Path:
    """A directory with headers and config of what a recipe, by name or as YAML, would write; its weights are holes."""
    loaded = parse_recipe(recipe, where="x") if "\n" in recipe else load_recipe(recipe)
    plan = lay_out(read_layout(model), loaded)
    tensors = [(info.name, info.dtype, info.shape) for infos in plan.outputs.values() for info in infos]
    return write_sparse_model(folder, dict(plan.config), tensors)
