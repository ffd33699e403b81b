"""A row of a dataset, a JSON object in one of the usual forms, as tokens, a conversation, or a prompt with completion.

- `input_ids`: token ids; `text`: a text
- `messages`, with what else a chat template takes: `tools`, `documents`, `chat_template_kwargs`
- `conversations` or `conversation`: turns of ShareGPT (`from`, `value`) or messages; `system` and `tools` beside them
- `prompt` and `completion`: two texts, or two lists of messages
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from snugfit.errors import UserError

_KEYS = ("input_ids", "text", "messages", "conversations", "conversation", "prompt", "completion")
# what a chat template gets from us alone
RESERVED = frozenset(
    (
        *("self", "where", "messages", "conversation", "conversations", "chat_template", "add_generation_prompt"),
        *("continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens", "tools", "documents"),
    )
)
_ROLES: Mapping[str, str] = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bot", "bard", "bing"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "observation", "function_response", "ipython"), "tool"),
}
_CALL = "function_call"  # ShareGPT's name of an assistant's turn that calls a tool
_TEXT_PARTS = (None, "text", "input_text", "output_text")
_KEPT_PARTS = ("thinking", "reasoning", "refusal")  # text as well, under other keys


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages, and what else their row gives the chat template. Answers before message `first_scored` are a prompt."""

    messages: list[Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    others: Mapping[str, Any] = field(default_factory=dict)
    first_scored: int = 0


@dataclass(frozen=True)
class Completion:
    """A text and its continuation."""

    prompt: str
    completion: str


Row = list[int] | str | Conversation | Completion


def read_row(line: str, where: str) -> Row:
    """The row of a JSONL line: token ids, a text, a conversation or a completion; UserError at `where` for another."""
    return read_entry(read_line(line, where), where)


def read_line(line: str, where: str) -> dict[str, Any]:
    """The object of a JSONL line; UserError at `where` for a line that is none."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        what = f"not JSON ({error})."
        remedy = "JSONL has one JSON object a line."
        raise UserError(what, code="dataset-invalid", where=where, remedy=remedy) from None
    if not isinstance(entry, dict):
        raise _invalid(f"not a JSON object but {_kind(entry)}.", where)
    return entry


def read_entry(entry: Mapping[str, Any], where: str) -> Row:
    """The row that an object of one of the usual forms is; UserError at `where` for another form."""
    ids = entry.get("input_ids")
    if isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids):
        return ids
    if isinstance(entry.get("text"), str):
        return str(entry["text"])
    if isinstance(entry.get("messages"), list):
        return _conversation(entry["messages"], entry, where)
    for key in ("conversations", "conversation"):
        if isinstance(entry.get(key), list):
            return _share_gpt(entry[key], entry, where)
    prompt, completion = entry.get("prompt"), entry.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return Completion(prompt, completion)
    if isinstance(prompt, list) and isinstance(completion, list):
        return _conversation([*prompt, *completion], entry, where, first_scored=len(prompt))
    raise _unknown(entry, where)


def _unknown(entry: Mapping[str, Any], where: str) -> UserError:
    """The error for a row of no known form, which names what the row has."""
    if isinstance(entry.get("input_ids"), list):
        return _invalid("`input_ids` holds what is no token id.", where)
    wrong = [f"`{key}` is {_kind(entry[key])}" for key in _KEYS if key in entry]
    if wrong and not {"prompt", "completion"} & set(entry):
        return _invalid(f"{', '.join(wrong)}.", where)
    names = ", ".join(f"`{key[:60]}`" for key in list(entry)[:12]) + (", …" if len(entry) > 12 else "")
    return _invalid(f"a row of unknown form: it has {names or 'no keys'}.", where)


def _invalid(what: str, where: str, remedy: str = "") -> UserError:
    forms = (
        "Each line needs `text`, `messages`, `conversations`, `input_ids`, or `prompt` with `completion` (two texts or "
        "two lists of messages)."
    )
    return UserError(what, code="dataset-invalid", where=where, remedy=remedy or forms)


def _kind(value: object) -> str:
    names = {
        str: "a string",
        list: "a list",
        dict: "an object",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), "null")


def _conversation(
    messages: Sequence[Any], entry: Mapping[str, Any], where: str, *, first_scored: int = 0
) -> Conversation:
    kwargs = _decoded(entry.get("chat_template_kwargs"), dict, "chat_template_kwargs", where) or {}
    reserved = next((key for key in kwargs if key in RESERVED), None)
    if reserved is not None:
        remedy = "Leave it out: `tools` and `documents` belong beside `messages`, the rest is set by each run."
        raise _invalid(f"`chat_template_kwargs` sets {reserved}.", where, remedy)
    options = dict(kwargs)
    for key in ("tools", "documents"):
        given = _decoded(entry.get(key), list, key, where)
        if given:
            options[key] = given
    handled = {"chat_template_kwargs", "system", "prompt", "completion", "text", "input_ids", *RESERVED}
    others = {key: value for key, value in entry.items() if key not in handled and value is not None}
    return Conversation(
        messages=[_with_text_parts(message, where) for message in messages],
        options=options,
        others=others,
        first_scored=first_scored,
    )


def _decoded(value: Any, kind: type, key: str, where: str) -> Any:
    """A value of this type, or JSON of one in a string, as Parquet files keep it; None for null and an empty string."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError) as error:
            raise _invalid(f"`{key}` is a string that is not JSON ({error}).", where, f"Correct `{key}`.") from None
    if value is not None and not isinstance(value, kind):
        form = "a list" if kind is list else "an object"
        raise _invalid(f"`{key}` is {_kind(value)}, not {form}.", where, f"Correct `{key}`.")
    return value


def _with_text_parts(message: Any, where: str) -> Any:
    """A message whose content, if it is a list of parts, has them as {"type": "text", "text": ...}."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    parts: list[Any] = []
    for part in message["content"]:
        if isinstance(part, str):
            parts.append({"type": "text", "text": part})
        elif not isinstance(part, dict):
            raise _invalid(f"a part of `content` is {_kind(part)}.", where, "Give parts of text.")
        elif part.get("type") in _TEXT_PARTS and isinstance(part.get("text"), str):
            parts.append({**part, "type": "text"})
        elif part.get("type") in _KEPT_PARTS:
            parts.append(part)
        else:
            what = f"a part of `content` is of type {str(part.get('type'))[:60]!r}, and only text can be read."
            raise _invalid(what, where, "Leave out messages with images, audio or video.")
    return {**message, "content": parts}


def _share_gpt(turns: Sequence[Any], entry: Mapping[str, Any], where: str) -> Conversation:
    messages = []
    if isinstance(entry.get("system"), str) and entry["system"] and not _begins_with_system(turns):
        messages.append({"role": "system", "content": entry["system"]})
    for turn in turns:
        if not isinstance(turn, dict):
            raise _invalid(f"a turn is {_kind(turn)}, not an object.", where)
        messages.append(turn if "role" in turn else _message(turn, where))
    return _conversation(messages, entry, where)


def _begins_with_system(turns: Sequence[Any]) -> bool:
    first = turns[0] if turns and isinstance(turns[0], dict) else {}
    return "system" in (first.get("from"), first.get("role"))


def _message(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A turn of ShareGPT as a message."""
    sender, value = turn.get("from"), turn.get("value")
    if sender == _CALL and isinstance(value, str):
        return {"role": "assistant", "content": "", "tool_calls": _tool_calls(value, where)}
    if not isinstance(sender, str) or sender.lower() not in _ROLES:
        what = f"a turn is from {str(sender)[:60]!r}." if "from" in turn else "a turn has neither `from` nor `role`."
        remedy = f"Known are {', '.join(dict.fromkeys([*_ROLES, _CALL]))}; or give `messages`."
        raise _invalid(what, where, remedy)
    if not isinstance(value, str | list):
        raise _invalid(f"the `value` of a turn is {_kind(value)}.", where, "Give each turn its text as `value`.")
    return {"role": _ROLES[sender.lower()], "content": value}


def _tool_calls(value: str, where: str) -> list[dict[str, Any]]:
    """Calls of tools, one or a list, each JSON with `name` and `arguments`."""
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        found = None
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        remedy = "It must be JSON with `name` and `arguments`."
        raise _invalid(f"the `value` of a {_CALL} is no call of a tool.", where, remedy)
    return [
        {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
        for call in calls
    ]
