"""Pages of docs that are made from the code: they are what the code says now."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from make_reference import errors, faults, reference
from snugfit.data.builtin import SOURCES
from snugfit.data.formatters import FORMATTERS
from snugfit.data.sets import DatasetSet, Source, builtin_sets, parse_set
from snugfit.errors import CODES
from snugfit.recipes.recipe import load_recipe, parse_recipe

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src/snugfit"


PAGES = [("reference.md", reference), ("errors.md", errors), ("faults.md", faults)]


@pytest.mark.parametrize(("page", "made"), PAGES)
def test_a_page_is_what_the_code_says(page: str, made: object) -> None:
    """docs/reference.md is every `--help`, docs/errors.md and faults.md every code; `make reference` writes them."""
    assert callable(made)
    assert (ROOT / "docs" / page).read_text(encoding="utf-8") == made(), "run `make reference`"


@pytest.mark.parametrize(
    ("page", "names"), [("README.md", ["mine"]), ("docs/recipes.md", ["mine", "fp8-int4-awq-upgraded"])]
)
def test_recipes_of_the_pages_are_valid(page: str, names: list[str]) -> None:
    """Each YAML block is a recipe; one that upgrades layers ends with the built-in rules."""
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    recipes = [parse_recipe(block, where=page).recipe for block in blocks]
    assert [recipe.name for recipe in recipes] == names
    for recipe in recipes[1:]:
        assert recipe.rules[1:] == load_recipe("fp8-int4-awq").recipe.rules


def test_the_page_of_datasets() -> None:
    """Its set is valid; it names every key of a set and of a source, every formatter, set and built-in source."""
    page = (ROOT / "docs/datasets.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert len(parse_set(block, name="mine", where="docs/datasets.md").set.datasets) == 3
    names = {*DatasetSet.model_fields, *Source.model_fields, *FORMATTERS, *builtin_sets(), *SOURCES}
    names |= {name for kind in FORMATTERS.values() for name in kind.params}
    assert {name for name in names if f"`{name}`" not in page} == set()


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/usage.md",
        "docs/support.md",
        "docs/mixtures.md",
        "docs/python.md",
        "docs/datasets.md",
        "docs/doctor.md",
        "docs/report.md",
    ],
)
def test_pages_name_options_that_there_are(page: str) -> None:
    """Every option of a page is one of a verb's, of pip's or of a script's."""
    others = {"--no-deps", "--moe-backend", "--recipes"}
    known = set(re.findall(r"--[a-z-]+", reference()))
    assert set(re.findall(r"--[a-z][a-z-]+", (ROOT / page).read_text(encoding="utf-8"))) <= known | others


def test_links_of_the_pages_lead_somewhere() -> None:
    """Relative links of the README and of docs name files."""
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_is_short() -> None:
    """What does not fit goes to docs/."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_every_code_is_listed_and_used() -> None:
    """Each `code=` in the source is one of CODES; each of CODES stands somewhere in the source."""
    files = [file for file in sorted(SOURCE.rglob("*.py")) if file != SOURCE / "errors.py"]
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    given = {text for tree in trees for text in _codes(tree)}
    assert given <= set(CODES), given - set(CODES)
    strings = {node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert set(CODES) <= strings, set(CODES) - strings


def _codes(tree: ast.AST) -> Iterator[str]:
    """Every text that a `code=` can be."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "code":
            for part in ast.walk(node.value):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.value
