"""Templates of a set: a hash that never changes, and a sandbox that ends."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from helpers.errors import raises
from snugfit.data.templates import MAX_OUTPUT, RowTemplate, TemplateError, canonical_text, stable_hash

ROW: dict[str, Any] = {"text": "hello", "n": 3, "none": None, "turns": [{"from": "human", "value": "a é"}]}
LANGUAGES = ["Arabic", "Chinese", "French", "German"]


def render(text: str, row: dict[str, Any] | None = None) -> str:
    return RowTemplate(text, where="set.yaml:1").render(ROW if row is None else row)


@pytest.mark.parametrize(
    ("value", "number"),
    [
        ("", 0xE4A6A0577479B2B4),
        ("a", 4681665781835383343),
        ({"n": 3, "text": "hello"}, 1370697129190794784),
    ],
)
def test_the_hash_is_the_same_forever(value: Any, number: int) -> None:
    """BLAKE2b of 8 bytes over the canonical text, most significant byte first: numbers that no release may change."""
    assert stable_hash(value) == number
    assert render("{{ hash(row) }}", {"n": 3, "text": "hello"}) == "1370697129190794784"


def test_the_hash_is_independent_of_the_process() -> None:
    """Two processes with other seeds for Python's own hash choose the same entries."""
    script = (
        "from snugfit.data.templates import RowTemplate\n"
        f"t = RowTemplate(\"{{{{ {LANGUAGES}[hash(row|string) % 4] }}}}\", where='x')\n"
        "print([t.render({'text': str(n), 'id': n}) for n in range(40)])\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert all(language in outputs.copy().pop() for language in LANGUAGES)


def test_canonical_text_ignores_what_file_formats_change() -> None:
    """Neither the order of keys nor nulls, which Parquet adds, change the text of a row; a text is itself."""
    assert canonical_text({"b": 1, "a": [{"y": None, "x": "é"}]}) == '{"a":[{"x":"é"}],"b":1}'
    assert canonical_text({"a": [{"x": "é"}], "b": 1, "c": None}) == '{"a":[{"x":"é"}],"b":1}'
    assert canonical_text("as it is") == "as it is"


@settings(max_examples=50, deadline=None)
@given(
    st.recursive(
        st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_a_row_through_json_has_the_same_text(value: Any) -> None:
    """A row that went through a JSON file is the same row."""
    assert canonical_text(json.loads(json.dumps(value))) == canonical_text(value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Use {{ ['C++', 'F#'][hash(row.text) % 2] }}\n***\n", "Use F#\n***"),
        ("{{ row.text|upper }} {{ row['n'] + 1 }} {{ row.text ~ '<' ~ row.n }}", "HELLO 4 hello<3"),
        ("{% if row.n > 2 %}big{% else %}small{% endif %}{{ '' }}", "big"),
        ("{% for t in row.turns %}{{ t['from'] }}: {{ t.value }}{% endfor %}", "human: a é"),
        ("{{ row.turns }}", '[{"from":"human","value":"a é"}]'),
        ("{{ row.text.strip('h').title() }}", "Ello"),
        ("{{ row.missing|default('none') }} {{ row.none }}", "none None"),
        ("{{ [1, 2, 3]|join('-') }} {{ 'a' * 3 }} {{ 7 // 2 }} {{ row.text[1:3] }}", "1-2-3 aaa 3 el"),
        ("{% for k, v in row.items() %}{{ k }},{% endfor %}{{ '' }}", "text,n,none,turns,"),
        ("{{ row.text|replace('l', 'L') }} {{ (row|tojson)|length }}", "heLLo 63"),
    ],
)
def test_what_templates_can_do(text: str, expected: str) -> None:
    """Expressions, `if` and `for` over the row; as in Jinja one line feed at the very end is dropped."""
    assert render(text) == expected


ESCAPES = [
    "{{ row.__class__ }}",
    "{{ row['__class__'] }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ row|attr('__class__') }}",
    "{{ '{0.__class__}'.format(row) }}",
    "{{ row.get.__globals__ }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ lipsum() }}",
    "{{ self._TemplateReference__context }}",
    "{{ namespace() }}",
    "{{ [].append(1) }}",
    "{{ ''.join(['a']) }}",
    "{{ row.update({'a': 1}) }}",
    "{{ hash(*row) }}",
    "{{ [row]|map('upper')|list }}",
    "{{ [row]|sum(attribute='__class__') }}",
    "{% set a = 1 %}{{ row }}",
    "{% include 'x' %}{{ row }}",
    "{% import 'x' as y %}{{ row }}",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "{% for x in row.turns recursive %}{{ loop(x) }}{% endfor %}",
    "{{ ['a', 'b'][hash(row|string) % 3] }}",
    "{{ row.text",
    "{{ nothing }}",
    "{{ row|shout }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ row" + "|upper" * 3000 + " }}",
]


@pytest.mark.parametrize("text", [text for text in ESCAPES if "attribute=" not in text])
def test_what_is_refused_before_any_row(text: str) -> None:
    """Underscored attributes, other functions, filters and statements, a list shorter than its modulus, no template."""
    with raises("dataset-set-invalid", where="set.yaml:1"):
        RowTemplate(text, where="set.yaml:1")


@pytest.mark.parametrize(
    "text",
    [
        "{{ row.missing }}",
        "{{ row.items }}",
        "{{ 1 / 0 }}",
        "{{ row.text + 1 }}",
        "{{ row.text % 3 }}",
        "{{ [row]|sum(attribute='__class__') }}",
        "{{ row[('__cla' ~ 'ss__')] }}",
        "{{ row.turns[7].value }}",
        "{{ row.turns|join('-', attribute='__class__') }}",
    ],
)
def test_what_fails_for_a_row(text: str) -> None:
    """A missing column, a value of another kind, an attribute behind a computed name: an error of this row."""
    with pytest.raises(TemplateError):
        render(text)


@pytest.mark.parametrize(
    "text",
    [
        "{% for a in range(10 ** 9) %}x{% endfor %}",
        "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
        "{% for a in row.text * 1000 %}{% for b in row.text * 1000 %}{{ a }}{% endfor %}{% endfor %}",
        "{{ 'a' * 10 ** 9 }}",
        "{{ 10 ** 10 ** 10 ** 10 ** 10 }}",
        "{{ 7 ** (7 ** 7) }}",
        "{{ ('a' * 100000)|replace('', 'b' * 1000) }}",
        "{{ (['a' * 1000] + ['b'])|join('c' * 100000000) }}",
        "{{ ['a' * 9000000, 'b' * 9000000]|join }}",
        "{{ '%1000000000d' % 1 }}",
        "{% for a in range(9000) %}" + "x" * 9000 + "{% endfor %}",
        "{{ 1|round(3000000, 'floor') }}",
        "{{ 1|round(-3000000, 'ceil') }}",
        "{{ ('a' * 1000)|round(15, 'floor') }}",
        "{{ ('f' * 100000)|int(0, 16) % 7 }}",
        "{{ ('f' * 100000)|int(0, 16) // 7 }}",
        *(
            "{% for t in ['a' * 1000000] %}{% for n in range(200) %}{% if "
            + condition
            + " %}{% endif %}{% endfor %}{% endfor %}"
            for condition in (
                "'zb' in t",
                "'zb' not in t",
                "t == t[1:] ~ 'a'",
                "n < 0 or t != 'a' * 1000000",
                "'zb' is in t",
                "t is lower",
                "t is eq('a' * 1000000)",
                "t[1:]",
                "row[t]|default(0)",
                "{'t': t}.values() == 1",
            )
        ),
        "{{ [" + ", ".join(["[" + ", ".join(["row.many"] * 90) + "]"] * 90) + "] }}",
        "{{ row.text" + "".join(f" ~ ('a' * {10**6})" for _ in range(25)) + " }}",
        "".join(
            f"{{% for {b} in [[{a}, {a}, {a}, {a}]] %}}" for a, b in zip("rabcdefghij", "abcdefghijk", strict=True)
        ).replace("[[r, r, r, r]]", "[[row, row, row, row]]")
        + "{{ k|string|length }}"
        + "{% endfor %}" * 11,
    ],
)
def test_no_template_runs_without_end(text: str) -> None:
    """Loops, powers, repetition and nested copies stop at a count of work, not at a clock."""
    with pytest.raises(TemplateError):
        render(text, {**ROW, "many": {str(n): None for n in range(10_000)}})


def test_rounding_and_numbers_are_jinjas() -> None:
    """`round` with each method and sign of its places, and `int` of texts, give what jinja2's own give."""
    own = ImmutableSandboxedEnvironment()
    for value, places, method in itertools.product((7, -2.675, 1234.5, True), (-2, 0, 2), ("common", "ceil", "floor")):
        text = f"{{{{ {value}|round({places}, '{method}') }}}}"
        assert render(text) == own.from_string(text).render()
    for text in ("{{ '12'|int }}", "{{ 'ff'|int(0, 16) }}", "{{ 'x'|int(5) }}", "{{ 3.9|int }}"):
        assert render(text) == own.from_string(text).render()


def test_a_long_output_is_an_error_of_the_row() -> None:
    """The output of one row is limited, whatever its parts are."""
    assert len(render("{{ 'a' * 1000000 }}")) == MAX_OUTPUT
    with pytest.raises(TemplateError):
        render("{{ 'a' * 600000 }}{{ 'a' * 600000 }}")


def test_the_row_stays_as_it_is() -> None:
    """No template can change the row that the formatter reads."""
    row = {"a": [1, 2]}
    for text in ("{{ row.a.clear() }}", "{{ row.a.append(3) }}", "{{ row.pop('a') }}"):
        with raises("dataset-set-invalid"):
            RowTemplate(text, where="x")
    render("{{ row.a|sort|reverse|list }}", row)
    assert row == {"a": [1, 2]}
