"""What a recipe does to a model, from headers alone: neither samples nor transformers are needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from snugfit.model.layout import read_layout
from snugfit.quantization.plan import Plan, lay_out
from snugfit.recipes.recipe import LoadedRecipe, load_recipe


def plan_of(model: str | Path, recipe: str | LoadedRecipe, **options: Any) -> Plan:
    """The plan of a run that quantizes `model` by `recipe`; `options` are those of `lay_out`."""
    return lay_out(read_layout(model), load_recipe(recipe) if isinstance(recipe, str) else recipe, **options)
