"""Pages of docs that are made from the code: they are what the code says now."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from make_reference import errors, reference
from snugfit.errors import CODES

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src/snugfit"


@pytest.mark.parametrize(("page", "made"), [("reference.md", reference), ("errors.md", errors)])
def test_a_page_is_what_the_code_says(page: str, made: object) -> None:
    """docs/reference.md is every `--help`, docs/errors.md every code; `make reference` writes both."""
    assert callable(made)
    assert (ROOT / "docs" / page).read_text(encoding="utf-8") == made(), "run `make reference`"


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
