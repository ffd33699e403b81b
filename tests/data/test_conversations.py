"""Conversations in every usual form, and the form of them that a chat template reads."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.errors import raises
from helpers.tiny_tokenizer import add_tokenizer
from snugfit.data.conversations import settle
from snugfit.data.dataset import load_dataset
from snugfit.data.rows import Completion, Conversation, read_row
from snugfit.data.texts import read_chunks
from snugfit.data.tokenizer import Tokenizer

WithTemplate = Callable[[str], Tokenizer]
TALK = [{"role": "user", "content": "Name a river."}, {"role": "assistant", "content": "The Loire."}]
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": {}}}]
PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
ASK = "{% if add_generation_prompt %}[assistant]%s{% endif %}"
WITH_TOOLS = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}" + PLAIN
CALL = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}%s{% endfor %}{% endfor %}"


@pytest.fixture
def with_template(tmp_path: Path) -> WithTemplate:
    """Returns a function that gives a tokenizer of single characters with a chat template."""

    def make(template: str) -> Tokenizer:
        (tmp_path / "model").mkdir()
        return Tokenizer(add_tokenizer(tmp_path / "model", template=template))

    return make


def rendered(tokenizer: Tokenizer, row: object) -> str:
    """What the template makes of a row, as text."""
    read = read_row(json.dumps(row), "a:1")
    assert isinstance(read, Conversation)
    found = settle(tokenizer, read, "a:1")
    return tokenizer.render(found.messages, where="a:1", **found.options)


def conversation(row: object) -> Conversation:
    found = read_row(json.dumps(row), "a:1")
    assert isinstance(found, Conversation)
    return found


def calling(arguments: object) -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    return [{"role": "user", "content": "Paris?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]


# --- what stands beside the messages


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)], ids=["list", "JSON"])
def test_tools_reach_the_template(tools: object, with_template: WithTemplate, tmp_path: Path) -> None:
    """`tools` beside `messages` give the tokens that transformers gives with them, in calibration and evaluation."""
    tokenizer = with_template(WITH_TOOLS)
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": TALK, "tools": tools}) + "\n", encoding="utf-8")
    expected = tuple(tokenizer.raw.apply_chat_template(TALK, tools=TOOLS, tokenize=True)["input_ids"])
    assert expected != tuple(tokenizer.raw.apply_chat_template(TALK, tokenize=True)["input_ids"])
    assert load_dataset(tokenizer.path, [file]).samples == (expected,)
    assert read_chunks(tokenizer, [file], [])[0][0].rows == (expected,)


def test_documents_and_settings_reach_the_template(with_template: WithTemplate) -> None:
    """`documents`, `chat_template_kwargs`, and any other key that the template itself asks for reach it."""
    template = (
        "{{ documents[0].text }}|{{ enable_thinking }}|{{ reasoning_effort }}|{{ source is defined }}"
        "{% generation %}" + PLAIN + "{% endgeneration %}"
    )
    row = {
        "messages": TALK,
        "documents": [{"title": "a", "text": "rivers"}],
        "chat_template_kwargs": {"enable_thinking": False},
        "reasoning_effort": "low",
        "id": 7,
    }
    assert rendered(with_template(template), row).startswith("rivers|False|low|False[user]Name")


@pytest.mark.parametrize(
    ("beside", "word"),
    [
        ({"tools": 3}, "tools"),
        ({"tools": "not JSON"}, "tools"),
        ({"documents": {"text": "a"}}, "documents"),
        ({"chat_template_kwargs": ["enable_thinking"]}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template"),
        ({"chat_template_kwargs": {"add_generation_prompt": True}}, "add_generation_prompt"),
        ({"chat_template_kwargs": {"tokenize": False}}, "tokenize"),
    ],
)
def test_what_cannot_be_given_to_a_template(beside: dict[str, Any], word: str) -> None:
    """A value of the wrong kind, and a setting that a run sets itself, are refused with line and name."""
    with raises("dataset-invalid", "a:1") as caught:
        read_row(json.dumps({"messages": TALK, **beside}), "a:1")
    assert word in caught.value.what


# --- arguments of tool calls


@pytest.mark.parametrize("arguments", ['{"city": "Paris"}', {"city": "Paris"}], ids=["string", "object"])
@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("{% for k, v in c.function.arguments|items %}<{{ k }}={{ v }}>{% endfor %}", "<city=Paris>"),
        ("{{ c.function.arguments | tojson }}", '{"city": "Paris"}'),
        ("{% if c.function.arguments is mapping %}<{{ c.function.arguments.city }}>{% endif %}", "<Paris>"),
        ("{{ '(' + c.function.arguments + ')' }}", '({"city": "Paris"})'),
        ("{{ c.function.arguments }}", '{"city": "Paris"}'),
    ],
    ids=["items", "tojson", "if mapping", "concatenated", "printed"],
)
def test_arguments_take_the_form_that_the_template_reads(
    arguments: object, call: str, expected: str, with_template: WithTemplate
) -> None:
    """Arguments of a call become objects where the template wants a mapping, strings where it wants a string."""
    tokenizer = with_template(CALL.replace("%s", call))
    assert rendered(tokenizer, {"messages": calling(arguments)}) == f"Paris?{expected}"


@pytest.mark.parametrize("arguments", ["", None])
def test_no_arguments_are_an_empty_object(arguments: object, with_template: WithTemplate) -> None:
    """A call without arguments has an empty object, as in vLLM."""
    tokenizer = with_template(CALL.replace("%s", "{{ c.function.arguments | tojson }}"))
    assert rendered(tokenizer, {"messages": calling(arguments)}) == "Paris?{}"


def test_arguments_that_are_no_json(with_template: WithTemplate, tmp_path: Path) -> None:
    """Arguments that are no JSON, under a template that wants a mapping, are refused with the line."""
    tokenizer = with_template(CALL.replace("%s", "{{ c.function.arguments | items | list }}"))
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": calling("Paris")}) + "\n", encoding="utf-8")
    with raises("chat-template-failed", f"{file}:1"):
        load_dataset(tokenizer.path, [file])


# --- parts of content

PARTS = [{"role": "user", "content": [{"type": "text", "text": "Name"}, {"text": "a"}, "river."]}, TALK[1]]
OF_PARTS = (
    "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text }};{% endfor %}{% endif %}</s>{% endfor %}"
)
OF_PARTS_ALONE = (
    "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}{{ p['text'] }}{% endfor %}</s>{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (PLAIN, PARTS, "[user]Name\na\nriver.</s>[assistant]The Loire.</s>"),
        (PLAIN.replace("{{ m.content }}", "{{ ':' + m.content }}"), PARTS, "[user]:Name\na\nriver.</s>"),
        (OF_PARTS, PARTS, "[user]Name;a;river.;</s>[assistant]The Loire.</s>"),
        (OF_PARTS, TALK, "[user]Name a river.</s>[assistant]The Loire.</s>"),
        (OF_PARTS_ALONE, TALK, "[user]Name a river.</s>[assistant]The Loire.</s>"),
    ],
    ids=["printed", "concatenated", "parts", "texts", "parts alone"],
)
def test_content_takes_the_form_that_the_template_reads(
    template: str, messages: list[Any], expected: str, with_template: WithTemplate
) -> None:
    """Parts are joined by line ends, as in vLLM, for templates of texts; texts become parts where only these count."""
    assert rendered(with_template(template), {"messages": messages}).startswith(expected)


@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "image"}, 3])
def test_parts_that_are_no_text(part: object) -> None:
    """Images, and what is no part at all, are refused with the line."""
    with raises("dataset-invalid", "a:1"):
        read_row(json.dumps({"messages": [{"role": "user", "content": [part]}]}), "a:1")


# --- other forms of rows


@pytest.mark.parametrize("key", ["conversations", "conversation"])
def test_share_gpt(key: str) -> None:
    """Turns of ShareGPT are messages, with the row's system prompt and tools."""
    turns = [
        {"from": "human", "value": "Paris?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Paris"}}'},
        {"from": "observation", "value": "sunny"},
        {"from": "gpt", "value": "It is sunny."},
    ]
    found = conversation({key: turns, "system": "Be brief.", "tools": json.dumps(TOOLS)})
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
    assert found.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Paris?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "It is sunny."},
    ]
    assert found.options == {"tools": TOOLS}


def test_conversations_of_messages() -> None:
    """`conversations` whose turns have roles are messages as they are."""
    assert conversation({"conversations": TALK}).messages == TALK


@pytest.mark.parametrize(
    ("turn", "word"),
    [
        ({"from": "narrator", "value": "a"}, "narrator"),
        ({"value": "a"}, "from"),
        ({"from": "human"}, "value"),
        ("a", "string"),
        ({"from": "function_call", "value": "weather()"}, "function_call"),
    ],
)
def test_share_gpt_that_is_not_understood(turn: object, word: str) -> None:
    """A turn of an unknown sender, without text, or with a call that is no JSON, is refused with its line."""
    with raises("dataset-invalid", "a:1") as caught:
        read_row(json.dumps({"conversations": [turn]}), "a:1")
    assert word in caught.value.what


def test_prompt_and_completion(with_template: WithTemplate, tmp_path: Path) -> None:
    """Two texts are one, and an evaluation scores the completion's tokens alone."""
    tokenizer = with_template(PLAIN)
    assert read_row('{"prompt": "One two", "completion": " three"}', "a:1") == Completion("One two", " three")
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "One two", "completion": " three"}\n', encoding="utf-8")
    (row,) = load_dataset(tokenizer.path, [file]).samples
    assert list(row) == tokenizer.encode("One two three")
    chunks = read_chunks(tokenizer, [file], [])[0][0]
    assert chunks.rows == (row,)
    assert chunks.scored[0] is not None
    assert tokenizer.raw.decode([row[place] for place in chunks.scored[0]]) == " three"


def test_prompt_and_completion_of_messages(with_template: WithTemplate, tmp_path: Path) -> None:
    """Two lists of messages are one conversation; answers in the prompt are not scored."""
    tokenizer = with_template(PLAIN + ASK.replace("%s", ""))
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": [*TALK, TALK[0]], "completion": [TALK[1]]}) + "\n", encoding="utf-8")
    chunks = read_chunks(tokenizer, [file], [])[0][0]
    places = chunks.scored[0]
    assert places is not None
    assert tokenizer.raw.decode([chunks.rows[0][place] for place in places]) == "The Loire.</s>"
    assert places[-1] == len(chunks.rows[0]) - 1


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"instruction": "a", "output": "b"}, ["`instruction`", "`output`"]),
        ({"prompt": "a", "chosen": "b"}, ["`prompt`", "`chosen`"]),
        ({"prompt": "a", "completion": ["b"]}, ["`prompt`", "`completion`"]),
        ({"messages": "hello"}, ["`messages` is a string"]),
        ({"text": None}, ["`text` is null"]),
        ({"input_ids": [1, 2.5]}, ["`input_ids`"]),
        ({}, ["no keys"]),
        ([1, 2], ["a list"]),
    ],
)
def test_rows_of_unknown_form(row: object, words: list[str]) -> None:
    """A row of unknown form is refused with its line and with the keys that it has."""
    with raises("dataset-invalid", "a:1") as caught:
        read_row(json.dumps(row), "a:1")
    assert all(word in caught.value.what for word in words), caught.value.what


# --- templates whose generation prompt opens what the answer does not have

R1 = "{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1] }}</s>{% endfor %}"
M2 = (
    "{% for m in messages %}[{{ m.role }}]{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>"
    "{% endif %}{{ m.content }}</s>{% endfor %}"
)
GLM = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% if m.reasoning_content %}<think>"
    "{{ m.reasoning_content }}{% endif %}</think>{% endif %}{{ m.content }}{% endfor %}"
)
GLM_ASK = "{{ '</think>' if (enable_thinking is defined and not enable_thinking) else '<think>' }}"


@pytest.mark.parametrize(
    ("template", "settings", "reasoning", "expected"),
    [
        (R1 + ASK.replace("%s", "<think>\n"), {}, None, "The Loire.</s>"),
        (M2 + ASK.replace("%s", "<think>"), {}, None, "The Loire.</s>"),
        (M2 + ASK.replace("%s", "<think>"), {}, "Hm.", "Hm.</think>The Loire.</s>"),
        (GLM + ASK.replace("%s", GLM_ASK), {"enable_thinking": False}, None, "The Loire."),
        (GLM + ASK.replace("%s", GLM_ASK), {}, None, "/think>The Loire."),
        (GLM + ASK.replace("%s", GLM_ASK), {}, "Hm.", "Hm.</think>The Loire."),
    ],
    ids=["R1", "M2", "M2 reasoning", "GLM off", "GLM", "GLM reasoning"],
)
def test_a_generation_prompt_that_opens_think(
    template: str, settings: dict[str, Any], reasoning: str | None, expected: str, tmp_path: Path
) -> None:
    """Both answers are scored from where they and the generation prompt part, to their ends."""
    answer = TALK[1] if reasoning is None else {**TALK[1], "reasoning_content": reasoning}
    row = {"messages": [TALK[0], answer, TALK[0], answer], "chat_template_kwargs": settings}
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n", encoding="utf-8")
    tokenizer = Tokenizer(add_tokenizer(tmp_path, string.ascii_letters + "[]<>/", template))
    chunks = read_chunks(tokenizer, [file], [])[0][0]
    assert chunks.scored[0] is not None
    assert tokenizer.raw.decode([chunks.rows[0][place] for place in chunks.scored[0]]) == expected * 2


def test_a_rewritten_question_is_never_scored(with_template: WithTemplate, tmp_path: Path) -> None:
    """Where the template writes the question anew once it is answered, no token of the question is scored."""
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content if loop.last else m.content | upper }}</s>{% endfor %}"
        + ASK.replace("%s", "")
    )
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": TALK}) + "\n", encoding="utf-8")
    with raises("chat-template-failed", f"{file}:1"):
        read_chunks(with_template(template), [file], [])
