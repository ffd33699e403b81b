"""Mutations of bytes and of JSON and YAML documents; all they do is decided by the random.Random they are given."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

# patterns that backtrack for longer than anyone waits, on any name of a tensor
SLOW_PATTERNS = (
    r"re:(?:(\w)|(\w\w)|(\w\w\w)|\.)*[!?]",
    r"re:(.*?)(.*?)(.*?)(.*?)(.*?)(.*?)(.*?)(.*?)\1[!?]",
    "re:(([a-z_.0-9])+)+!",
    r"re:(\w+\.?)+!",
    "re:(.+)+!",
    "re:(a|.)*(.|b)*(.|c)*(.|d)*(.|e)*(.|f)*!",
)
TEXTS = (
    *("", " ", "x", "0", "128", "-1", "1e9", "true", "null", "nan", "fp8", "float", "int", "group", "block", "static"),
    *("\x00", "\x1b[2J\x1b[31m", "\u202e", "\ud800", "\n", "é\u0301", "[red]", "[/]", "{0}", "%s", "re:(", "re:[", "*"),
    *("../../x", "/etc/passwd", "C:\\x", "..", "a" * 5000, "1" * 5000, "re:" + "(" * 500, "Linear", "lm_head", "."),
    *SLOW_PATTERNS,
)
NUMBERS = (
    *(0, 1, -1, 2, 3, 5, 7, 16, 17, 32, 63, 64, 100, 128, 256, 1000, 4096, 10**5, 10**6, 10**9, 10**12),
    *(2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63), 0.0, 0.5, -0.5, 1e-300, 1e308, 64.0),
)


class Raw(str):
    """JSON text that stands in a document as it is."""

    __slots__ = ()


RAWS = tuple(
    map(
        Raw,
        ("9" * 5000, "-" + "9" * 400, "1e999", "NaN", "-Infinity", "[" * 3000 + "]" * 3000, "[0" + ",0" * 20_000 + "]"),
    )
)
_STRUCTURES: tuple[Any, ...] = (
    *([], [None], [0], [1, 2], [128, 128], [16], [[]], ["x"], [""], [{}], [True], [-1], list(range(300))),
    *({}, {"x": None}, {"": 0}, {"a": {"b": {"c": []}}}, {"0": 1}, [[[[[[]]]]]]),
)
Parent = dict[str, Any] | list[Any]


def nasty(rng: random.Random, words: Sequence[str] = ()) -> Any:
    """A value that few expect."""
    kind = rng.randrange(8)
    if kind == 0:
        return rng.choice((None, True, False))
    if kind in (1, 2):
        return rng.choice(NUMBERS)
    if kind == 3:
        return rng.choice(RAWS)
    if kind in (4, 5):
        return copy.deepcopy(rng.choice(_STRUCTURES))
    return rng.choice(words) if words and rng.random() < 0.4 else rng.choice(TEXTS)


def spoil_json(rng: random.Random, document: Any, words: Sequence[str] = ()) -> bytes:
    """The document with one to three changes of its structure, as JSON; seldom with a few bytes changed besides."""
    changed = {"": copy.deepcopy(document)}
    twice: list[str] = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _change(rng, changed, words, twice)
    raw = dump(changed[""], twice).encode("utf-8", "surrogatepass")
    return spoil_bytes(rng, raw) if rng.random() < 0.05 else raw


def _change(rng: random.Random, document: dict[str, Any], words: Sequence[str], twice: list[str]) -> None:
    parent, key = _place(rng, document)
    value: Any = parent[key]  # type: ignore[index]
    kind = rng.randrange(12)
    if kind == 5 and key != "":
        del parent[key]  # type: ignore[arg-type]
    elif kind == 6 and isinstance(value, dict):
        _add_key(rng, value, words, twice)
    elif kind == 7:
        other, place = _place(rng, document)
        parent[key] = copy.deepcopy(other[place])  # type: ignore[index]
    elif kind == 8:
        parent[key] = rng.choice(([value], {"x": value}, [value, value], str(value), {"": value}))  # type: ignore[index]
    else:
        near = kind > 8 and not isinstance(value, dict)
        parent[key] = _near(rng, value, words) if near else nasty(rng, words)  # type: ignore[index]


def _add_key(rng: random.Random, value: dict[str, Any], words: Sequence[str], twice: list[str]) -> None:
    if value and rng.random() < 0.5:
        twice.append(rng.choice(list(value)))
        value[f"@@twice{len(twice) - 1}@@"] = nasty(rng, words)
    else:
        value[rng.choice(words) if words and rng.random() < 0.8 else rng.choice(TEXTS)] = nasty(rng, words)


def _near(rng: random.Random, value: Any, words: Sequence[str]) -> Any:
    """A value of the same kind, or nearly."""
    if isinstance(value, bool) or value is None:
        return rng.choice((True, False, None, 0, 1, "true"))
    if isinstance(value, (int, float)):
        return rng.choice(
            (value + 1, value - 1, -value, value * 2, value * 1000, str(value), value + 0.5, float(value))
        )
    if isinstance(value, str):
        return _spoil_text(rng, value)
    changed = list(value)
    if rng.random() < 0.3 and changed:
        del changed[rng.randrange(len(changed))]
    else:
        changed.insert(rng.randint(0, len(changed)), nasty(rng, words))
    return changed


def _place(rng: random.Random, document: dict[str, Any]) -> tuple[Parent, str | int]:
    """Somewhere in the document, each level as likely as the next."""
    parent: Parent = document
    key: str | int = ""
    while True:
        value: Any = parent[key]  # type: ignore[index]
        if not isinstance(value, (dict, list)) or not value or rng.random() < 0.12:
            return parent, key
        parent, key = value, rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))


def _spoil_text(rng: random.Random, text: str) -> str:
    at = rng.randint(0, len(text))
    piece = rng.choice(("", "\x00", "\n", "\x1b[1m", "..", "/", ".", " ", "\u202e", "9" * 30, "é", "[", "*"))
    return text[:at] + piece + text[at + rng.randrange(3) :]


def dump(document: Any, twice: Sequence[str] = ()) -> str:
    """JSON text; `twice` are keys for the places @@twiceN@@, and Raw strings stand as they are."""
    raws: list[str] = []

    def prepared(value: Any) -> Any:
        if isinstance(value, Raw):
            raws.append(str(value))
            return f"@@raw{len(raws) - 1}@@"
        if isinstance(value, dict):
            return {key: prepared(entry) for key, entry in value.items()}
        return [prepared(entry) for entry in value] if isinstance(value, list) else value

    text = json.dumps(prepared(document))
    text = re.sub(r'"@@twice(\d+)@@"', lambda found: json.dumps(twice[int(found[1])]), text)
    return re.sub(r'"@@raw(\d+)@@"', lambda found: raws[int(found[1])], text)


def spoil_bytes(rng: random.Random, raw: bytes) -> bytes:
    """Bytes changed, cut out, put in, doubled, or the end cut off."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        if not data:
            return bytes(data)
        at = rng.randrange(len(data))
        kind = rng.randrange(7)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.randrange(256)
        elif kind == 2:
            del data[at : at + rng.choice((1, 1, 2, 8, 64))]
        elif kind == 3:
            data[at:at] = rng.choice(
                (b"\x00", b"\xff\xfe", b'"', b"{", b"[", b"]", b"}", b",", b"\\u", b"\xed\xa0\x80", b":")
            )
        elif kind == 4:
            end = at + rng.choice((1, 4, 32))
            data[at:at] = data[at:end]
        elif kind == 5:
            data[at : at + 4] = bytes(rng.randrange(256) for _ in range(4))
        elif rng.random() < 0.3:
            del data[at:]
    return bytes(data)


# 9^9 words once it is written out, and what it may stand for
_BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
_BOMBED = (
    "name: x\nrules: *i\n",
    "name: x\nkv_cache: *i\nrules:\n  - {role: linear, format: fp8-dynamic}\n",
    *(
        f"name: x\nrules:\n  - {{format: keep, {key}: *i}}\n"
        for key in ("role", "layers", "name", "group_size", "scale_rule", "x")
    ),
    "name: x\nrules:\n  - {<<: [*i, *i], format: keep}\n",
    "m: &m {k: v}\nn: &n {<<: [*m, *m, *m]}\no: &o {<<: [*n, *n, *n]}\nname: x\nrules: []\n",
)
_HUGE = "0x" + "f" * 8000
# ways to make YAML of a recipe that is none, or more than one bargained for
_YAML = (
    *(f"{_BOMB}{rest}" for rest in _BOMBED),
    *(
        f"name: x\nrules:\n  - {{format: keep, {key}: {_HUGE}}}\n"
        for key in ("role", "layers", "name", "group_size", "scale_rule")
    ),
    f"name: {_HUGE}\nkv_cache: {_HUGE}\nrules:\n  - {{role: linear, format: fp8-dynamic}}\n",
    "name: x\nrules: &r\n  - *r\n",
    "name: &n x\nrules:\n  - &r {role: linear, format: *n}\n  - *r\n",
    "name: x\nrules:\n  - <<: {role: linear}\n    format: fp8-dynamic\n",
    "name: !!python/object/apply:os.system ['touch pwned']\nrules: []\n",
    "!!python/object/new:os.system ['touch pwned']\n",
    "name: !!python/name:os.system\nrules:\n  - {role: linear, format: fp8-dynamic}\n",
    "name: x\nrules:\n  - {role: linear, format: fp8-dynamic, layers: 0..99999999999999999}\n",
    "name: x\nrules:\n  - {role: linear, format: fp8-dynamic, layers: '" + "0, " * 50_000 + "1'}\n",
    "name: x\nrules:\n" + "  - {role: linear, format: fp8-dynamic}\n" * 2000,
    "name: x\nrules: " + "[" * 3000 + "]" * 3000 + "\n",
    "name: x\nrules: " + "{a: " * 3000 + "\n",
    "name: " + "9" * 5000 + "\nrules:\n  - {role: linear, format: fp8-dynamic}\n",
    "name: 1" + ":1" * 3000 + "\nrules:\n  - {role: linear, format: fp8-dynamic}\n",
    "name: 2024-13-45\nrules:\n  - {role: linear, format: fp8-dynamic}\n",
    "name: !!binary '@@@'\nrules:\n  - {role: linear, format: fp8-dynamic}\n",
    "name: !!timestamp x\nrules: !!set {a, b}\n",
    "? {a: b}\n: c\n",
    "? [a]\n: c\nname: x\n",
    "--- a\n--- b\n",
    "name: x\nrules:\n  - {role: linear, format: fp8-dynamic}\n---\nname: y\n",
    "%YAML 9.9\n---\nname: x\n",
    "\ufeffname: x\nrules:\n  - {role: linear, format: fp8-dynamic}\n",
    "name: x\nrules:\n  - {role: linear, format: fp8-dynamic, name: 're:(?P<a>(?P<a>x))'}\n",
    "name: x\nrules:\n  - {role: linear, format: fp8-dynamic, name: 're:" + "(?:" * 400 + "x" + ")" * 400 + "'}\n",
    "name: x\nrules:\n  - {role: linear, format: fp8-dynamic, name: '" + "*a" * 300 + "'}\n",
    "name: x\nrules:\n  - {role: linear, format: fp8-dynamic, name: '" + "[" * 300 + "'}\n",
    *(
        f"name: x\nrules:\n  - {{name: '{slow}', format: keep}}\n  - {{role: linear, format: fp8-dynamic}}\n"
        for slow in SLOW_PATTERNS
    ),
)
_YAML_PIECES = (
    *(
        "&a",
        "*a",
        "!!str ",
        "!!int ",
        "!!float x",
        "!!null ",
        "<<: *a",
        "? ",
        "- ",
        "  ",
        "\t",
        "#",
        "|",
        ">",
        "'",
        '"',
    ),
    *(
        "~",
        ".inf",
        ".nan",
        "0x1F",
        "0b1",
        "1_000",
        "yes",
        "No",
        "2001-01-01",
        "1e3",
        "\n",
        "\r",
        "\x00",
        "\x85",
        "\ud7ff",
    ),
    *(
        "---\n",
        "...\n",
        ": ",
        "[",
        "]",
        "{",
        "}",
        "re:(",
        "-1",
        "0..3",
        "..",
        "0..-9",
        "é",
        "!<tag:yaml.org,2002:python/none>",
    ),
)


def spoil_yaml(rng: random.Random, text: str, document: Callable[[], Any]) -> bytes:
    """YAML text damaged as text, as a document (`document` gives it), as bytes, or replaced by a known trap."""
    kind = rng.randrange(10)
    if kind == 0:
        return rng.choice(_YAML).encode("utf-8", "surrogatepass")
    if kind < 5:
        return spoil_json(rng, document(), WORDS_OF_RECIPES)  # JSON is YAML
    if kind < 7:
        return spoil_bytes(rng, text.encode())
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice(_YAML_PIECES) + text[at + rng.choice((0, 0, 1, 3)) :]
    return text.encode("utf-8", "surrogatepass")


WORDS_OF_RECIPES = (
    *(
        "name",
        "description",
        "kv_cache",
        "rules",
        "role",
        "layers",
        "format",
        "scale_rule",
        "objective",
        "group_size",
        "symmetric",
        "requantize",
    ),
    *("linear", "mlp", "attention", "q", "k", "v", "o", "gate", "up", "down", "router", "embed", "norm", "lm_head"),
    *("nvfp4", "nvfp4a16", "fp8-dynamic", "fp8-block", "fp8", "int4", "int8", "mxfp4", "keep", "absmax", "sweep"),
    *("four-over-six", "mse", "mae", "0..1", "-1", "0, 1", "-9..9", "*.q_proj", "re:.*mlp.*", "*"),
)
