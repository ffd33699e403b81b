"""Templates in a dataset's YAML: Jinja expressions over `row`, with a hash that is the same everywhere and forever.

A template comes from a file that somebody else may have written, and its values from rows of public sets. It is
therefore checked before it is compiled: expressions, `if` and `for`, with functions, filters and methods of short
lists, and nothing else. jinja2's sandbox is beneath. What a template may do for one row is counted, so it ends.

`hash` of a text is the first 8 bytes of BLAKE2b (digest_size=8) over its UTF-8 form, as a number, most significant byte
first. The text of anything else is its JSON: keys sorted, without keys whose value is null, no spaces.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from difflib import get_close_matches
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from snugfit.data.template_numbers import MAX_BITS, add_up, bits, bits_after, rounded, small
from snugfit.errors import UserError

Filter = Callable[..., Any]

MAX_WORK = 20_000_000  # characters and list entries that a template may handle for one row
MAX_OUTPUT = 1_000_000  # characters
_MAX_NODES = 20_000  # of a template
_MAX_DEPTH = 60
_METHODS = frozenset(
    (
        *("strip", "lstrip", "rstrip", "lower", "upper", "title", "capitalize", "split", "splitlines", "startswith"),
        *("endswith", "count", "find", "get", "keys", "values", "items", "isdigit", "isalpha", "removeprefix"),
        *("removesuffix", "partition", "rpartition"),
    )
)
_BUILT_IN_FILTERS = frozenset(
    (
        *("abs", "capitalize", "count", "d", "default", "first", "float", "items", "last", "length", "list"),
        *("lower", "reverse", "sort", "title", "trim", "truncate", "unique", "upper", "wordcount"),
    )
)
_ALLOWED_NODES = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.If, nodes.For, nodes.Const, nodes.Name, nodes.List),
    *(nodes.Tuple, nodes.Dict, nodes.Pair, nodes.Keyword, nodes.CondExpr, nodes.Filter, nodes.Test, nodes.Call),
    *(nodes.Getattr, nodes.Getitem, nodes.Slice, nodes.Compare, nodes.Operand, nodes.Concat, nodes.Add, nodes.Sub),
    *(nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Mod, nodes.Pow, nodes.Not, nodes.Neg, nodes.Pos, nodes.And, nodes.Or),
)


class TemplateError(Exception):
    """A template that cannot be rendered for one row, with the reason."""


def canonical_text(value: Any) -> str:
    """A text as it is; of any other value its JSON, which no order of keys and no file format changes.

    TypeError for what JSON has no form of.
    """
    if isinstance(value, str):
        return str(value)
    return json.dumps(_without_nulls(value), ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=_refuse)


def stable_hash(value: Any) -> int:
    """`hash` of templates: a number in 0 .. 2^64 - 1 that depends on the value's canonical text alone."""
    data = canonical_text(value).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def is_template(value: Any) -> bool:
    """Whether a parameter is rendered for every row: a text with `{{` and `}}`, or `{%` and `%}`."""
    return isinstance(value, str) and any(
        begin in value and end in value for begin, end in (("{{", "}}"), ("{%", "%}"))
    )


class RowTemplate:
    """A checked template; `render` gives its text for a row."""

    def __init__(self, text: str, *, where: str) -> None:
        """Compile `text`; UserError at `where` for a template that is invalid or uses more than it may."""
        self._environment = _Environment()
        try:
            tree = self._environment.parse(text)
            _check(tree, where)
            self._template = self._environment.from_string(_bounded(tree))
        except UserError:
            raise
        except (jinja2.TemplateError, SyntaxError, RecursionError, MemoryError, ValueError) as error:
            raise _invalid(f"not a valid template ({_line(error)}).", where) from None

    def render(self, row: Mapping[str, Any]) -> str:
        """The text for a row; TemplateError where it fails, or does too much."""
        self._environment.work = 0
        try:
            return "".join(_limited(self._template.generate(row=row)))
        except TemplateError:
            raise
        except Exception as error:  # noqa: BLE001  # jinja2's filters raise what they stumble on
            raise TemplateError(f"the template fails ({_line(error)})") from None


class _Environment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox with short lists of functions and filters; `work` counts what one rendering handles."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self) -> None:
        super().__init__(undefined=jinja2.StrictUndefined, autoescape=False, optimized=False, finalize=self._shown)
        self.work = 0
        self.globals = dict(_functions(self))
        known: Mapping[str, Any] = self.filters
        built_in = {name: _counted(self, name, known[name]) for name in _BUILT_IN_FILTERS}
        own: dict[str, Any] = {
            "hash": stable_hash,
            "string": _shown_text,
            "tojson": canonical_text,
            "sum": add_up,
            "min": min,
            "max": max,
            "round": rounded,
            "int": small(known["int"]),
        }
        self.filters = built_in | {name: _counted(self, name, function) for name, function in own.items()}
        self.filters |= {"join": self._join, "replace": self._replace, _CONCAT: self._concat, _STEPS: self._steps}
        self.filters |= {_COMPARED: self._compared, _SLICED: self._sliced}

    def handle_exception(self, source: str | None = None) -> NoReturn:  # noqa: ARG002  # jinja2's signature
        """Raise the error at hand as it is; jinja2 would compile code that shows the template's lines."""
        error = sys.exc_info()[1]
        assert error is not None
        raise error

    def charge(self, amount: int) -> None:
        """Count work; TemplateError where it is too much for one row."""
        self.work += amount
        if self.work > MAX_WORK:
            raise TemplateError(f"the template handles more than {MAX_WORK:,} characters and list entries")

    def charge_value(self, value: Any) -> None:
        """Count all that is in a value."""
        left = [value]
        while left:
            one = left.pop()
            if isinstance(one, jinja2.Undefined):
                continue
            size = one.bit_length() // 4 if isinstance(one, int) else len(one) if hasattr(one, "__len__") else 0
            self.charge(8 + size)
            if isinstance(one, Mapping):
                left += one.values()
            elif isinstance(one, list | tuple | KeysView | ValuesView | ItemsView):
                left += one

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function or method of the lists, and count what goes in and out."""
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str | Mapping | list | tuple):
            self.charge_value(owner)
        self.charge_value(args)
        found = super().call(context, function, *args, **kwargs)
        self.charge_value(found)
        return found

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Arithmetic on numbers; `+` joins two texts or two lists, `*` repeats a text."""
        self.charge_value((left, right))
        numbers = all(isinstance(side, int | float) for side in (left, right))
        if not numbers:
            text = next((side for side in (left, right) if isinstance(side, str)), None)
            times = next((side for side in (left, right) if isinstance(side, int)), None)
            if operator == "*" and text is not None and times is not None:
                self.charge(len(text) * max(times, 0))
            elif operator != "+" or type(left) is not type(right):
                kinds = f"{type(left).__name__} {operator} {type(right).__name__}"
                raise TemplateError(f"the template fails (no such operation: {kinds})")
        elif max(bits_after(operator, left, right), *(bits(n) for n in (left, right) if isinstance(n, int))) > MAX_BITS:
            raise TemplateError("the template fails (a number becomes too large)")
        return super().call_binop(context, operator, left, right)

    def _join(self, values: Iterable[Any], separator: str = "", attribute: str | None = None) -> str:
        found = list(values)
        if attribute is not None:
            found = [self.getitem(one, attribute) for one in found]
        texts = []
        for one in found:
            texts.append(self._text(one))
            self.charge(len(texts[-1]) + len(separator))
        return separator.join(texts)

    def _text(self, value: Any) -> str:
        """The text of a value, which is counted where it must be made."""
        if not isinstance(value, str):
            self.charge_value(value)
        return _shown_text(value)

    def _shown(self, value: Any) -> Any:
        """What an expression prints; TypeError for what has no text that is the same everywhere."""
        return value if isinstance(value, jinja2.Undefined) else self._text(value)

    def _replace(self, text: str, old: str, new: str) -> str:
        text = self._text(text)
        self.charge(len(text) + text.count(old) * len(new))
        return text.replace(old, new)

    def _concat(self, values: Iterable[Any]) -> str:
        return self._join(values)

    def _steps(self, values: Any) -> Iterator[Any]:
        for value in values:
            self.charge_value(value)
            self.charge(100)
            yield value

    def _compared(self, value: Any) -> Any:
        self.charge_value(value)
        return value

    def _sliced(self, value: Any) -> Any:
        self.charge(8 + (len(value) if hasattr(value, "__len__") else 0))
        return value


# filters of ours: no template can name them
_CONCAT, _STEPS, _COMPARED, _SLICED = " concat", " steps", " compared", " sliced"


def _limited(parts: Iterable[str]) -> Iterator[str]:
    """The parts of an output; TemplateError where they become too long."""
    length = 0
    for part in parts:
        length += len(part)
        if length > MAX_OUTPUT:
            raise TemplateError(f"the template gives more than {MAX_OUTPUT:,} characters")
        yield part


def _functions(environment: _Environment) -> Iterator[tuple[str, Callable[..., Any]]]:
    def listed(function: Callable[..., Iterable[Any]]) -> Callable[..., list[Any]]:
        def call(*args: Any, **kwargs: Any) -> list[Any]:
            values = function(*args, **kwargs)
            environment.charge(len(values) if isinstance(values, range | list) else 0)
            return list(values)

        return call

    plain: dict[str, Callable[..., Any]] = {"hash": stable_hash, "len": len, "abs": abs, "max": max, "min": min}
    yield from (plain | {"sum": add_up}).items()
    yield from ((function.__name__, listed(function)) for function in (range, sorted, enumerate, zip))


def _counted(environment: _Environment, name: str, function: Filter) -> Filter:
    """A filter that counts what goes in and out, with what jinja2 hands it first as it was."""
    mark = getattr(function, "jinja_pass_arg", None)
    place = 0 if mark is None else 1

    def filtered(*args: Any, **kwargs: Any) -> Any:
        environment.charge_value((args[place:], list(kwargs.values())))
        found = function(*args, **kwargs)
        if isinstance(found, Iterator):
            found = list(found)
        environment.charge_value(found)
        return found

    filtered.__name__ = name
    if mark is not None:
        filtered.jinja_pass_arg = mark  # type: ignore[attr-defined]
    return filtered


def _check(tree: nodes.Template, where: str) -> None:
    """UserError for a part of a template that is not allowed, and for a list that its index exceeds."""
    functions = dict(_functions(_Environment()))
    loop_names = {name.name for loop in tree.find_all(nodes.For) for name in loop.target.find_all(nodes.Name)}
    loop_names |= {loop.target.name for loop in tree.find_all(nodes.For) if isinstance(loop.target, nodes.Name)}
    known = {"row", *functions, *loop_names, *(("loop",) if loop_names else ())}
    left: list[tuple[nodes.Node, int]] = [(tree, 0)]
    count = 0
    while left:
        node, depth = left.pop()
        count += 1
        if count > _MAX_NODES or depth > _MAX_DEPTH:
            raise _invalid("the template is too long, or nested too deeply.", where)
        if not isinstance(node, _ALLOWED_NODES):
            raise _invalid(f"`{type(node).__name__.lower()}` is not allowed in a template.", where)
        if isinstance(node, nodes.Name) and node.name not in known:
            near = get_close_matches(node.name, known, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(sorted(known))}."
            raise _invalid(f"unknown name {node.name!r}.", where, hint)
        if isinstance(node, nodes.Filter) and node.name not in (filters := _Environment().filters):
            near = get_close_matches(node.name, filters, n=1)
            names = ", ".join(sorted(name for name in filters if name.isidentifier()))
            raise _invalid(
                f"unknown filter {node.name!r}.", where, f"Did you mean {near[0]}?" if near else f"Known: {names}."
            )
        _check_access(node, functions, where)
        left += [(child, depth + 1) for child in node.iter_child_nodes()]


def _check_access(node: nodes.Node, functions: Mapping[str, Any], where: str) -> None:
    name = node.attr if isinstance(node, nodes.Getattr) else None
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
        name = node.arg.value
    if name is not None and name.startswith("__"):
        raise _invalid(f"access to {name!r} is not allowed.", where)
    if isinstance(node, nodes.For) and node.recursive:
        raise _invalid("a loop may not be recursive.", where)
    if isinstance(node, nodes.Call):
        called = node.node
        allowed = (isinstance(called, nodes.Name) and called.name in functions) or (
            isinstance(called, nodes.Getattr) and called.attr in _METHODS
        )
        if not allowed or node.dyn_args is not None or node.dyn_kwargs is not None:
            names = ", ".join([*functions, *sorted(_METHODS)])
            raise _invalid("this call is not allowed.", where, f"Functions and methods of templates: {names}.")
    if isinstance(node, nodes.Test) and (node.kwargs or node.dyn_args is not None or node.dyn_kwargs is not None):
        raise _invalid("a test takes plain values.", where)
    if isinstance(node, nodes.Getitem) and isinstance(node.node, nodes.List) and isinstance(node.arg, nodes.Mod):
        divisor, entries = node.arg.right, len(node.node.items)
        if isinstance(divisor, nodes.Const) and isinstance(divisor.value, int) and divisor.value > entries:
            what = f"a list of {entries} entries is indexed by a number modulo {divisor.value}."
            raise _invalid(what, where, f"Write % {entries}, or add entries.")


def _bounded(tree: nodes.Template) -> nodes.Template:
    """The tree with loops, comparisons, tests, slices and computed keys counted, and `~` as a filter that counts."""

    def changed(node: nodes.Node) -> nodes.Node:
        for field, value in node.iter_fields():
            if isinstance(value, list):
                setattr(node, field, [changed(one) if isinstance(one, nodes.Node) else one for one in value])
            elif isinstance(value, nodes.Node):
                setattr(node, field, changed(value))
        return _counting(node)

    found = changed(tree)
    assert isinstance(found, nodes.Template)
    return found


def _counting(node: nodes.Node) -> nodes.Node:
    """A node whose operands pass a filter that counts them."""

    def through(name: str, value: nodes.Node) -> nodes.Filter:
        assert isinstance(value, nodes.Expr)
        return nodes.Filter(value, name, [], [], None, None, lineno=node.lineno)

    if isinstance(node, nodes.For):
        node.iter = through(_STEPS, node.iter)
    if isinstance(node, nodes.Concat):
        return through(_CONCAT, nodes.List(node.nodes, lineno=node.lineno))
    if isinstance(node, nodes.Compare | nodes.Operand):
        node.expr = through(_COMPARED, node.expr)
    if isinstance(node, nodes.Test):
        node.node = through(_COMPARED, node.node)
        node.args = [through(_COMPARED, one) for one in node.args]
    if isinstance(node, nodes.Getitem):
        if isinstance(node.arg, nodes.Slice):
            node.node = through(_SLICED, node.node)
        elif not isinstance(node.arg, nodes.Const):
            node.arg = through(_COMPARED, node.arg)
    return node


def _shown_text(value: Any) -> str:
    if isinstance(value, jinja2.Undefined):
        return str(value)  # raises what is wrong
    if value is None or isinstance(value, bool | int | float):
        return str(value)
    return canonical_text(value)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list | tuple) else value


def _refuse(value: Any) -> Any:
    raise TypeError(f"a {type(value).__name__} has no text")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _invalid(what: str, where: str, remedy: str = "Correct the template.") -> UserError:
    return UserError(what, code="dataset-set-invalid", where=where, remedy=remedy)
