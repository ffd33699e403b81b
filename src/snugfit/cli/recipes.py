"""`snugfit recipes`."""

from __future__ import annotations

from typing import Annotated

import typer

from snugfit.cli.errors import reporting
from snugfit.errors import UserError


def recipes(
    recipe: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A built-in recipe, whose YAML is printed.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """List the built-in recipes, or print one."""
    import json

    from snugfit.recipes.recipe import list_recipes, load_recipe
    from snugfit.report.terminal import print_recipes

    loaded = list_recipes()
    if recipe is not None:
        loaded = [one for one in loaded if one.recipe.name == recipe]
        if not loaded:
            load_recipe(recipe)  # suggests similar names, unless it is a file
            what = f"{recipe} is a file, not a built-in recipe."
            raise UserError(what, code="recipe-not-found", where="recipe", remedy="`list_recipes` shows the names.")
    with reporting():
        if as_json:
            documents = [one.recipe.model_dump(mode="json", exclude_none=True) for one in loaded]
            typer.echo(json.dumps(documents, indent=2))
        elif recipe:
            typer.echo(loaded[0].text, nl=False)
        else:
            print_recipes([(one.recipe.name, one.recipe.description) for one in loaded])
