"""YAML with lines: what is read, which line a key has, and which texts are refused."""

from __future__ import annotations

import pytest

from helpers.errors import raises
from snugfit.strict_yaml import load_yaml

TEXT = """\
name: mine
rules:
  - role: mlp
    format: keep
  - {role: linear,
     format: nvfp4}
"""


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ((), "1: "),
        (("name",), "1: name"),
        (("rules", 0), "3: rules[0]"),
        (("rules", 0, "format"), "4: rules[0].format"),
        (("rules", 1, "format"), "6: rules[1].format"),
        (("rules", 1, "missing"), "5: rules[1].missing"),
        (("rules", 2, "role"), "2: rules[2].role"),
        (("missing", "key"), "1: missing.key"),
    ],
)
def test_every_key_has_a_line(path: tuple[str | int, ...], place: str) -> None:
    """A key has its own line, a missing one the line of what it is missing from."""
    assert load_yaml(TEXT, where="here.yaml").place_of(*path) == f"here.yaml:{place}"


def test_anchors_are_expanded() -> None:
    """Aliases and merged mappings stand for what their anchors name; a key of a template has the template's line."""
    text = "_templates: &all {a: 1, b: [2]}\nfirst: *all\nsecond:\n  <<: *all\n  a: 3\n"
    document = load_yaml(text, where="here.yaml")
    template = {"a": 1, "b": [2]}
    assert document.value == {"_templates": template, "first": template, "second": template | {"a": 3}}
    assert document.line_of("first", "b") == 1
    assert document.line_of("second", "a") == 5


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\na: 2\n", 2),
        ("a: {b: 1, b: 2}\n", 1),
        ("a: {b: 1}\nc:\n  <<: {d: 1}\n  <<: {e: 1}\n", 4),
        ("a: &a [*a]\n", 1),
        ("a: &a\n  b: {c: *a}\n", 2),
        ("a: 1\n---\nb: 2\n", 2),
    ],
)
def test_what_could_hide_a_mistake_is_refused(text: str, line: int) -> None:
    """Keys given twice, an alias inside its own anchor and a second document are refused with the line."""
    with raises("yaml-invalid") as caught:
        load_yaml(text, where="here.yaml")
    assert caught.value.where == f"here.yaml:{line}"


def test_aliases_of_aliases_are_bounded() -> None:
    """Nine levels of ten aliases, a billion values when they are expanded, are refused where they become too many."""
    levels = ["l0: &l0 [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]"]
    levels += [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 9)]
    with raises("yaml-invalid", "here.yaml:5"):
        load_yaml("\n".join(levels), where="here.yaml")
    assert len(load_yaml("\n".join(levels[:4]), where="here.yaml").value["l3"]) == 10
