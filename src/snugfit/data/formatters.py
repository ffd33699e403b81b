"""Formatters of a set: a row of a dataset becomes a conversation, a text or token ids.

Those with the names of the quantizers project (github.com/mratsim/quantizers) read rows as it does; what a row lacks
is an error of that row here, which is then skipped and counted. `auto` reads the forms of `data/rows.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from snugfit.data.rows import RESERVED, Conversation, Row, read_entry
from snugfit.data.templates import RowTemplate, TemplateError, is_template
from snugfit.errors import UserError

AUTO = "auto"
_ROLES = ("system", "user", "assistant", "tool")
_SHARE_GPT: Mapping[str, str] = {"system": "system", "human": "user", "gpt": "assistant"}
_SOLUTION = "solution"


@dataclass(frozen=True)
class Params:
    """Columns and parameters of a formatter as a set gives them."""

    columns: tuple[str, ...] = ()
    given: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Formatter:
    """A formatter bound to its columns and parameters: `read` gives what it makes of a row.

    `conversations` says whether its rows need a chat template; None if that depends on the row.
    """

    name: str
    columns: tuple[str, ...]
    conversations: bool | None
    read: Callable[[Mapping[str, Any], str], Row]


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """What a formatter takes: how many columns, which parameters."""

    columns: int
    params: frozenset[str]
    read: Callable[[_Bound, Mapping[str, Any], str], Row]
    conversations: bool | None = True


@dataclass(frozen=True)
class _Bound:
    """Columns, and parameters with their templates compiled."""

    columns: tuple[str, ...]
    params: Mapping[str, Any]
    templates: Mapping[str, RowTemplate]

    def value(self, row: Mapping[str, Any], place: int, where: str) -> Any:
        """A row's value in a column; UserError if the row has no such column."""
        return _column(row, self.columns[place], where)

    def text(self, name: str, row: Mapping[str, Any], where: str) -> str:
        """A parameter's text for a row, "" where it is not given; UserError where its template fails."""
        if name in self.templates:
            try:
                return self.templates[name].render(row)
            except TemplateError as error:
                raise _bad(f"`{name}`: {error}.", where) from None
        return str(self.params.get(name) or "")

    def named(self, name: str, row: Mapping[str, Any], where: str) -> Any:
        """The value in the column that a parameter names, None where the parameter is not given."""
        return _column(row, self.params[name], where) if self.params.get(name) else None


def bind(name: str, params: Params) -> Formatter:
    """The formatter of this name for these columns and parameters.

    UserError, with the key as its place, for an unknown name or parameter, another number of columns, or a template
    that is not allowed.
    """
    if name not in FORMATTERS:
        near = get_close_matches(name, FORMATTERS, n=1, cutoff=0.4)
        remedy = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(FORMATTERS)}."
        raise _invalid(f"unknown formatter {name!r}.", "formatter", remedy)
    kind = FORMATTERS[name]
    if len(params.columns) != kind.columns:
        need = {0: "no columns", 1: "exactly 1 column"}.get(kind.columns, f"exactly {kind.columns} columns")
        raise _invalid(f"{name} needs {need}, got {len(params.columns)}.", "columns", f"Name {need}.")
    templates = {}
    for key, value in params.given.items():
        where = f"formatter_params.{key}"
        if key not in kind.params:
            near = get_close_matches(key, sorted(kind.params), n=1)
            remedy = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(sorted(kind.params))}."
            raise _invalid(f"{name} has no parameter {key!r}.", where, remedy)
        _check_param(key, value, where)
        if key in _TEXTS and is_template(value):
            templates[key] = RowTemplate(value, where=where)
    bound = _Bound(params.columns, dict(params.given), templates)

    def read(row: Mapping[str, Any], where: str) -> Row:
        return kind.read(bound, row, where)

    return Formatter(name=name, columns=params.columns, conversations=kind.conversations, read=read)


_TEXTS = ("prefix", "sys_prompt")
_COLUMNS = ("tools", "reasoning")


def _check_param(key: str, value: Any, where: str) -> None:
    if key in (*_TEXTS, *_COLUMNS):
        if not isinstance(value, str):
            raise _invalid(f"must be a text, got {type(value).__name__}.", where, "Quote it.")
    elif not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise _invalid("must be a mapping.", where, "Write it as KEY: VALUE.")
    elif key == "roles":
        wrong = next((role for role in value.values() if role not in _ROLES), None)
        if wrong is not None:
            raise _invalid(f"unknown role {wrong!r}.", where, f"Known: {', '.join(_ROLES)}.")
    elif (reserved := next((name for name in value if name in RESERVED), None)) is not None:
        raise _invalid(f"sets {reserved}.", where, "Leave it out: each run sets it.")


# --- how each formatter reads a row


def _auto(bound: _Bound, row: Mapping[str, Any], where: str) -> Row:
    found = read_entry(row, where)
    if isinstance(found, Conversation):
        return _conversation(bound, found.messages, row, where, found)
    for name in ("sys_prompt", "tools", "chat_template_kwargs"):
        if bound.params.get(name):
            raise _bad(f"`{name}` needs a conversation.", where)
    prefix = bound.text("prefix", row, where)
    if prefix and not isinstance(found, str):
        raise _bad("`prefix` needs a text or a conversation.", where)
    return prefix + found if isinstance(found, str) else found


def _text(bound: _Bound, row: Mapping[str, Any], where: str) -> Row:
    return bound.text("prefix", row, where) + _as_text(bound.value(row, 0, where), bound.columns[0], where)


def _raw_text(bound: _Bound, row: Mapping[str, Any], where: str) -> Row:
    """The text as an assistant's turn, behind `prefix` as a user's."""
    text = _as_text(bound.value(row, 0, where), bound.columns[0], where)
    prefix = bound.text("prefix", row, where)
    messages = [{"role": "user", "content": prefix}] if prefix else []
    return _conversation(bound, [*messages, {"role": "assistant", "content": text}], row, where, prefixed=True)


def _prompt_answer(bound: _Bound, row: Mapping[str, Any], where: str) -> Row:
    texts = [bound.value(row, place, where) for place in (0, 1)]
    reasoning = bound.named("reasoning", row, where)
    messages: list[dict[str, Any]] = []
    for role, name, text in zip(("user", "assistant"), bound.columns, texts, strict=True):
        if text:
            messages.append({"role": role, "content": _as_text(text, name, where)})
    if reasoning and texts[1]:
        messages[-1]["reasoning_content"] = _as_text(reasoning, bound.params["reasoning"], where)
    return _conversation(bound, messages, row, where)


def _chat_completion(bound: _Bound, row: Mapping[str, Any], where: str) -> Row:
    """Messages as they are. `reasoning_content` stays: who tokenizes writes it where the template does not read it."""
    messages = []
    for message in _turns(bound.value(row, 0, where), bound.columns[0], where):
        if not message.get("reasoning_content"):
            messages.append({key: value for key, value in message.items() if key != "reasoning_content"})
        elif message.get("role") == "assistant":
            messages.append(message)
        else:
            raise _bad("`reasoning_content` of a message that is not an assistant's.", where)
    return _conversation(bound, messages, row, where)


def _chat_completion_with_sysprompt(bound: _Bound, row: Mapping[str, Any], where: str) -> Row:
    """A system prompt, and turns of either form; turns of other roles are left out."""
    system, turns = (bound.value(row, place, where) for place in (0, 1))
    roles = {role: role for role in _ROLES} | dict(bound.params.get("roles") or {})
    messages: list[dict[str, Any]] = []
    if system:
        messages.append({"role": "system", "content": _as_text(system, bound.columns[0], where)})
    for turn in _turns(turns or [], bound.columns[1], where):
        sender, content = (turn["from"], turn["value"]) if "from" in turn and "value" in turn else (None, None)
        if sender is None and "role" in turn and "content" in turn:
            sender, content = turn["role"], turn["content"]
        if sender in roles:
            rest = {key: value for key, value in turn.items() if key not in ("from", "value", "role", "content")}
            messages.append({"role": roles[sender], "content": content, **rest})
    return _conversation(bound, messages, row, where)


def _sharegpt(bound: _Bound, row: Mapping[str, Any], where: str) -> Row:
    """Turns with `from` and `value`: human, gpt and system; any other sender is the user, unless `roles` names it."""
    roles = dict(_SHARE_GPT) | dict(bound.params.get("roles") or {})
    turns = _turns(bound.value(row, 0, where), bound.columns[0], where)
    messages: list[Any] = [
        {"role": roles.get(str(turn["from"]), "user"), "content": turn["value"]}
        for turn in turns
        if "from" in turn and "value" in turn
    ]
    return _conversation(bound, messages, row, where)


def _code_contests(bound: _Bound, row: Mapping[str, Any], where: str) -> Row:
    """The problem, and its first solution; of the whole row if the column holds a text."""
    found = bound.value(row, 0, where)
    entry = row if isinstance(found, str) else found
    if not isinstance(entry, Mapping):
        raise _bad(f"`{bound.columns[0]}` is neither a text nor an object.", where)
    solutions = entry.get("solutions") or {}
    listed = solutions.get(_SOLUTION) if isinstance(solutions, Mapping) else None
    messages = []
    for role, text in (("user", entry.get("description")), ("assistant", listed[0] if listed else None)):
        if text:
            messages.append({"role": role, "content": _as_text(text, role, where)})
    return _conversation(bound, messages, row, where)


def _conversation(
    bound: _Bound,
    messages: list[Any],
    row: Mapping[str, Any],
    where: str,
    read: Conversation | None = None,
    *,
    prefixed: bool = False,
) -> Conversation:
    """A conversation with `sys_prompt`, `prefix` before its first user's text, and tools; UserError if it is empty."""
    if not messages:
        raise _bad("a conversation without messages.", where)
    prefix = "" if prefixed else bound.text("prefix", row, where)
    if prefix:
        messages = _with_prefix(messages, prefix, where)
    system = bound.text("sys_prompt", row, where)
    if system and not (isinstance(messages[0], Mapping) and messages[0].get("role") == "system"):
        messages = [{"role": "system", "content": system}, *messages]
    entry: dict[str, Any] = {"messages": messages}
    tools = bound.named("tools", row, where)
    if tools:
        entry["tools"] = tools
    if bound.params.get("chat_template_kwargs"):
        entry["chat_template_kwargs"] = bound.params["chat_template_kwargs"]
    found = read_entry(entry, where)  # checks parts of contents, and decodes tools
    assert isinstance(found, Conversation)
    if read is None:
        return found
    options = {**read.options, **found.options}
    first_scored = read.first_scored + len(found.messages) - len(read.messages)  # what was added stands before
    return Conversation(messages=found.messages, options=options, others=read.others, first_scored=first_scored)


def _with_prefix(messages: list[Any], prefix: str, where: str) -> list[Any]:
    for number, message in enumerate(messages):
        if isinstance(message, Mapping) and message.get("role") == "user":
            content = message.get("content")
            if not isinstance(content, str):
                raise _bad("`prefix` needs a user's message that is a text.", where)
            return [*messages[:number], {**message, "content": prefix + content}, *messages[number + 1 :]]
    return [{"role": "user", "content": prefix}, *messages]


def _column(row: Mapping[str, Any], name: str, where: str) -> Any:
    if name in row:
        return row[name]
    near = get_close_matches(name, map(str, row), n=1)
    has = ", ".join(f"`{str(key)[:60]}`" for key in list(row)[:12])
    hint = f"did you mean `{near[0]}`?" if near else f"it has {has or 'none'}"
    raise _bad(f"no column `{name}`; {hint}", where)


def _turns(value: Any, name: str, where: str) -> list[dict[str, Any]]:
    """A conversation's messages; also JSON of such a list, as some files keep it."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise _bad(f"`{name}` is a text, not a list of messages.", where) from None
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise _bad(f"`{name}` is not a list of messages.", where)
    return value


def _as_text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise _bad(f"`{name}` is {'empty' if value is None else 'not a text'}.", where)
    return value


def _bad(what: str, where: str) -> UserError:
    return UserError(what, code="dataset-invalid", where=where, remedy="Correct the row, or the set.")


def _invalid(what: str, where: str, remedy: str) -> UserError:
    return UserError(what, code="dataset-set-invalid", where=where, remedy=remedy)


_CHAT = frozenset(("prefix", "sys_prompt", "tools", "chat_template_kwargs"))

FORMATTERS: Mapping[str, _Kind] = {
    AUTO: _Kind(columns=0, params=_CHAT, read=_auto, conversations=None),
    "text": _Kind(columns=1, params=frozenset(("prefix",)), read=_text, conversations=False),
    "raw_text": _Kind(columns=1, params=_CHAT, read=_raw_text),
    "prompt_answer": _Kind(columns=2, params=_CHAT | {"reasoning"}, read=_prompt_answer),
    "chat_completion": _Kind(columns=1, params=_CHAT, read=_chat_completion),
    "chat_completion_with_sysprompt": _Kind(columns=2, params=_CHAT | {"roles"}, read=_chat_completion_with_sysprompt),
    "sharegpt": _Kind(columns=1, params=_CHAT | {"roles"}, read=_sharegpt),
    "deepmind_code_contests": _Kind(columns=1, params=_CHAT, read=_code_contests),
}
