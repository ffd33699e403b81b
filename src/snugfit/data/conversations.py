"""Conversations under a model's chat template: which form of their contents and tool calls the template reads.

A template is written for one form and often ignores or misprints the other: texts or lists of parts as content, objects
or JSON strings as arguments of a tool call. Engines hand templates objects, and the form of content that they iterate
over (vLLM, entrypoints/chat_utils.py); here each form is rendered, and the first that loses nothing is taken.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from snugfit.data.rows import RESERVED, Conversation
from snugfit.data.tokenizer import Tokenizer
from snugfit.errors import UserError

_Change = Callable[[Mapping[str, Any]], Mapping[str, Any]]
_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")  # a tag that transformers adds to jinja


def settle(tokenizer: Tokenizer, conversation: Conversation, where: str) -> Conversation:
    """The conversation in the form that the model's template reads, with all of its row that the template asks for.

    UserError at `where` if the template refuses every form.
    """
    names = _variables(tokenizer, conversation.options.get("tools")) if conversation.others else frozenset()
    others = {key: value for key, value in conversation.others.items() if key in names}
    options = others | dict(conversation.options)
    rendered: list[Any] = []
    refusal: UserError | None = None
    for form in _forms(conversation.messages):
        try:
            text = tokenizer.render(form, where=where, **options)
        except UserError as error:
            refusal = refusal or error
            continue
        rendered.append(form)
        if not _loses(text, form):
            return replace(conversation, messages=form, options=options)
    if not rendered:
        assert refusal is not None
        raise refusal
    return replace(conversation, messages=rendered[0], options=options)


def chat(tokenizer: Tokenizer, conversation: Conversation, where: str) -> list[int]:
    """Token ids of a conversation; UserError at `where` if the template fails."""
    settled = settle(tokenizer, conversation, where)
    return tokenizer.chat(settled.messages, where=where, **settled.options)


def as_plain_text(row: Conversation) -> str:
    """A conversation as plain text, for a tokenizer without a chat template."""
    texts = []
    for message in row.messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        parts = content if isinstance(content, list) else [content]
        found = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
        reasoning = message.get("reasoning_content") if isinstance(message, Mapping) else None
        texts += [text for text in (reasoning, *found) if isinstance(text, str) and text]
    return "\n\n".join(texts)


def with_reasoning_inside(row: Conversation) -> Conversation:
    """Reasoning as <think> before the answer, where the chat template does not read `reasoning_content`."""
    messages = []
    for message in row.messages:
        if isinstance(message, Mapping) and message.get("reasoning_content"):
            rest = {key: value for key, value in message.items() if key != "reasoning_content"}
            content = rest.get("content") or ""
            inside = (
                f"<think>{message['reasoning_content']}</think>\n{content}" if isinstance(content, str) else content
            )
            messages.append({**rest, "content": inside})
        else:
            messages.append(message)
    return replace(row, messages=messages)


def _variables(tokenizer: Tokenizer, tools: Any) -> frozenset[str]:
    """Names that the template looks up and that a row may give: none that transformers itself sets."""
    try:
        template = tokenizer.raw.get_chat_template(None, tools)
    except ValueError:  # no template, which rendering reports
        return frozenset()
    return _looked_up(str(template)) - frozenset(tokenizer.raw.special_tokens_map) - RESERVED


@lru_cache(maxsize=8)
def _looked_up(template: str) -> frozenset[str]:
    """Names that a template looks up outside of it, without jinja's and transformers' functions."""
    import jinja2
    import jinja2.meta

    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=False)  # noqa: S701  # parsed only
    try:
        found = jinja2.meta.find_undeclared_variables(environment.parse(_GENERATION.sub("", template)))
    except (jinja2.TemplateError, ValueError, RecursionError):  # rendering reports it
        return frozenset()
    return frozenset(found - {"raise_exception", "strftime_now", *environment.globals})


def _forms(messages: Sequence[Any]) -> Iterator[list[Any]]:
    """The messages in each form that a template may read, the likeliest first."""
    known = [message for message in messages if isinstance(message, dict)]
    if any(isinstance(message.get("content"), list) for message in known):
        contents: list[_Change] = [_as_it_is, _joined]
    else:
        contents = [_as_it_is, _parted]
    calls: list[_Change] = [_as_it_is]
    if any(_calls(message) for message in known):
        calls = [_with_objects, _with_strings]
    for content, call in itertools.product(contents, calls):
        yield [call(content(message)) if isinstance(message, dict) else message for message in messages]


def _loses(text: str, messages: Sequence[Any]) -> bool:
    """Whether a rendered conversation shows Python's own form of a value, or no text of any message."""
    texts: list[str] = []
    for message in messages:
        if not isinstance(message, dict):
            continue
        content = message.get("content")
        if isinstance(content, list):
            if content and str(content) in text:
                return True
            inside = (part.get("text") for part in content if isinstance(part, dict))
            texts += [part.strip() for part in inside if isinstance(part, str)]
        elif isinstance(content, str):
            texts.append(content.strip())
        if any(isinstance(a, dict) and a and str(a) in text for a in map(_arguments, _calls(message))):
            return True
    texts = [part for part in texts if part]
    return bool(texts) and not any(part in text for part in texts)


def _as_it_is(message: Mapping[str, Any]) -> Mapping[str, Any]:
    return message


def _joined(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """With its parts of text as one text, on a line each, as vLLM joins them."""
    content = message.get("content")
    if not isinstance(content, list) or not all(isinstance(part.get("text"), str) for part in content):
        return message
    return {**message, "content": "\n".join(part["text"] for part in content)}


def _parted(message: Mapping[str, Any]) -> Mapping[str, Any]:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _with_objects(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """With the arguments of its tool calls as objects, where they are JSON of objects."""

    def parsed(arguments: Any) -> Any:
        if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
            return {}
        try:
            found = json.loads(arguments) if isinstance(arguments, str) else arguments
        except (ValueError, RecursionError):
            return arguments
        return found if isinstance(found, dict) else arguments

    return _with_arguments(message, parsed)


def _with_strings(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """With the arguments of its tool calls as JSON in strings."""

    def dumped(arguments: Any) -> Any:
        return arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)

    return _with_arguments(message, dumped)


def _calls(message: Mapping[str, Any]) -> list[Any]:
    """The tool calls of a message, the one of OpenAI's older form included."""
    calls = message.get("tool_calls")
    found = [call for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    return found + [call for call in [message.get("function_call")] if isinstance(call, dict)]


def _arguments(call: Mapping[str, Any]) -> Any:
    function = call.get("function")
    return (function if isinstance(function, dict) else call).get("arguments")


def _with_arguments(message: Mapping[str, Any], change: Callable[[Any], Any]) -> Mapping[str, Any]:
    def changed(call: Any) -> Any:
        if not isinstance(call, dict):
            return call
        if isinstance(call.get("function"), dict):
            return {**call, "function": changed(call["function"])}
        return {**call, "arguments": change(call.get("arguments"))} if "name" in call else call

    found = dict(message)
    if isinstance(message.get("tool_calls"), list):
        found["tool_calls"] = [changed(call) for call in message["tool_calls"]]
    if isinstance(message.get("function_call"), dict):
        found["function_call"] = changed(message["function_call"])
    return found
