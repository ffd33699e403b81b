"""Samples of a dataset: where they come from, how long they are, how they begin, and their digest."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from helpers.errors import raises
from snugfit.data.dataset import Dataset, load_dataset, make_dataset
from snugfit.data.python_docs import python_topics
from snugfit.data.tokenizer import load_tokenizer

BOS = 1  # <|im_start|> of the packaged model's tokenizer
PROSE = "The quick brown fox jumps over the lazy dog. " * 60
Altered = Callable[..., Path]


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    """The packaged model's tokenizer, which adds nothing to a text."""
    return load_tokenizer(smollm2)


@pytest.fixture
def altered(smollm2: Path, tmp_path: Path) -> Altered:
    """Returns a function that copies the tokenizer: with tokens before and behind every text, or another template."""

    def make(before: Sequence[str] = (), after: Sequence[str] = (), template: str | None = None) -> Path:
        directory = tmp_path / "tokenizer"
        directory.mkdir()
        for file in [*smollm2.glob("tokenizer*"), smollm2 / "chat_template.jinja", smollm2 / "config.json"]:
            shutil.copy(file, directory)
        file = directory / "tokenizer.json"
        content = json.loads(file.read_text(encoding="utf-8"))
        ids = {entry["content"]: entry["id"] for entry in content["added_tokens"]}
        text = [{"Sequence": {"id": "A", "type_id": 0}}]
        head, tail = ([{"SpecialToken": {"id": token, "type_id": 0}} for token in part] for part in (before, after))
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [*head, *text, *tail],
            "pair": [*head, *text, *text, *tail],
            "special_tokens": {t: {"id": t, "ids": [ids[t]], "tokens": [t]} for t in (*before, *after)},
        }
        if before or after:
            file.write_text(json.dumps(content), encoding="utf-8")
        if template is not None:
            (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
        return directory

    return make


def text_file(directory: Path, content: str, name: str = "text.txt") -> Path:
    file = directory / name
    file.write_text(content, encoding="utf-8")
    return file


def jsonl(directory: Path, *entries: object, name: str = "rows.jsonl") -> Path:
    return text_file(directory, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries), name)


def plain(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


# --- the default


def test_default_needs_nothing_and_is_deterministic(smollm2: Path) -> None:
    """Without files, rows of exactly the asked length come from Python's documentation, the same ones every time."""
    first, second = (load_dataset(smollm2, [], num_samples=5, max_seq_length=100) for _ in range(2))
    assert first == second
    assert [len(row) for row in first.samples] == [100] * 5
    assert first.tokens == 500
    assert len(set(first.samples)) == 5
    assert "Python's documentation topics" in first.source


def test_default_has_rows_enough(smollm2: Path) -> None:
    """The default text yields the 32 samples of 1024 tokens that a run takes by default."""
    rows = load_dataset(smollm2, [])
    assert [len(row) for row in rows.samples] == [1024] * 32


def test_default_rows_are_the_topics_text(smollm2: Path, tokenizer: Any) -> None:
    """The default rows are the calibration topics from their beginning, without gaps."""
    rows = load_dataset(smollm2, [], num_samples=3, max_seq_length=50)
    joined = tokenizer.decode([token for row in rows.samples for token in row])
    assert python_topics("calibration").startswith(joined)


# --- text files


def test_text_is_cut_into_rows_of_exact_length(smollm2: Path, tokenizer: Any, tmp_path: Path) -> None:
    """A text gives consecutive samples of exactly `max_seq_length` tokens, as many as are asked for."""
    rows = load_dataset(smollm2, [text_file(tmp_path, PROSE)], num_samples=4, max_seq_length=30)
    assert [list(row) for row in rows.samples] == [plain(tokenizer, PROSE)[30 * n : 30 * (n + 1)] for n in range(4)]
    assert rows.source == "text.txt"


def test_text_gives_whole_rows_only(smollm2: Path, tokenizer: Any, tmp_path: Path) -> None:
    """A text that ends amid a row gives the rows before it and not the rest."""
    tokens = plain(tokenizer, PROSE)
    rows = load_dataset(smollm2, [text_file(tmp_path, PROSE)], num_samples=10**6, max_seq_length=100)
    assert len(rows.samples) == len(tokens) // 100
    assert all(len(row) == 100 for row in rows.samples)


def test_text_shorter_than_a_row_is_one_row(smollm2: Path, tokenizer: Any, tmp_path: Path) -> None:
    """A text of two tokens or more that does not fill one row is a shorter row."""
    rows = load_dataset(smollm2, [text_file(tmp_path, "hello there")], num_samples=4, max_seq_length=100)
    assert rows.samples == (tuple(plain(tokenizer, "hello there")),)


@pytest.mark.parametrize("content", ["", "a"])
def test_text_without_two_tokens(content: str, smollm2: Path, tmp_path: Path) -> None:
    """An empty text or a single token is refused by the file's name."""
    with raises("dataset-too-small", "text.txt"):
        load_dataset(smollm2, [text_file(tmp_path, content)])


def test_several_files_give_rows_in_order(smollm2: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Rows of several files, text and JSONL, follow each other until there are enough."""
    files = [text_file(tmp_path, "hello there"), jsonl(tmp_path, {"input_ids": [5, 6]}, {"text": "good day"})]
    rows = load_dataset(smollm2, files, num_samples=3, max_seq_length=20)
    assert [list(row) for row in rows.samples] == [
        plain(tokenizer, "hello there"),
        [5, 6],
        plain(tokenizer, "good day"),
    ]
    assert rows.source == "text.txt, rows.jsonl"
    assert load_dataset(smollm2, files, num_samples=2, max_seq_length=20).samples == rows.samples[:2]


@pytest.mark.parametrize("name", ["second.txt", "second.jsonl", "second.NDJSON"])
def test_files_share_the_rows(name: str, smollm2: Path, tmp_path: Path) -> None:
    """Every file gives an equal share of the rows, the first ones taking the odd row."""
    line = '{"input_ids": [5, 6, 7]}\n' if name != "second.txt" else "one more text, and some more words " * 20
    more = text_file(tmp_path, line * 9, name)
    rows = load_dataset(smollm2, [text_file(tmp_path, PROSE * 9), more], num_samples=5, max_seq_length=20)
    assert len(rows.samples) == 5
    alone = load_dataset(smollm2, [more], num_samples=2, max_seq_length=20)
    assert rows.samples[3:] == alone.samples


def test_json_that_is_no_jsonl_is_refused(smollm2: Path, tmp_path: Path) -> None:
    """A .json file would be calibrated on as raw text: it is refused."""
    with raises("dataset-unreadable", "rows.json"):
        load_dataset(smollm2, [text_file(tmp_path, "[]", "rows.json")], num_samples=2, max_seq_length=20)


# --- how a row begins


def test_every_row_of_a_text_begins_as_the_tokenizer_begins(altered: Altered, tokenizer: Any, tmp_path: Path) -> None:
    """Where the tokenizer puts a token before a text, every row has it, and the rows are no longer for it."""
    model = altered(before=["<|im_start|>"])
    rows = load_dataset(model, [text_file(tmp_path, PROSE)], num_samples=3, max_seq_length=30)
    tokens = plain(tokenizer, PROSE)
    assert [list(row) for row in rows.samples] == [[BOS, *tokens[29 * n : 29 * (n + 1)]] for n in range(3)]
    short = load_dataset(model, [text_file(tmp_path, "hello there")], num_samples=3, max_seq_length=30)
    assert list(short.samples[0]) == [BOS, *plain(tokenizer, "hello there")]


def test_a_tokenizer_that_also_ends_texts(altered: Altered, tokenizer: Any, tmp_path: Path) -> None:
    """Where the tokenizer puts tokens before and behind a text, rows have the former and not the latter."""
    model = altered(before=["<|im_start|>"], after=["<|im_end|>"])
    rows = load_dataset(model, [text_file(tmp_path, PROSE)], num_samples=2, max_seq_length=30)
    tokens = plain(tokenizer, PROSE)
    assert [list(row) for row in rows.samples] == [[BOS, *tokens[:29]], [BOS, *tokens[29:58]]]


def test_rows_of_one_word(altered: Altered, tokenizer: Any, tmp_path: Path) -> None:
    """Samples of one token behind the beginning are made of any text with two tokens."""
    model = altered(before=["<|im_start|>"])
    rows = load_dataset(model, [text_file(tmp_path, "business plans and more")], num_samples=1, max_seq_length=2)
    assert [list(row) for row in rows.samples] == [[BOS, *plain(tokenizer, "business")]]


@pytest.mark.parametrize("before", [["<|im_start|>", "<|im_end|>"], ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]])
def test_rows_too_short_for_text(before: list[str], altered: Altered, tmp_path: Path) -> None:
    """A length that the tokenizer's own beginning uses up is refused."""
    with raises("option-invalid", "max_seq_length"):
        load_dataset(altered(before=before), [text_file(tmp_path, PROSE)], num_samples=1, max_seq_length=2)


# --- JSONL


def test_jsonl_of_text(altered: Altered, tokenizer: Any, tmp_path: Path) -> None:
    """A `text` line is tokenized as the tokenizer does by itself, beginning included, and cut at the length."""
    model = altered(before=["<|im_start|>"])
    rows = load_dataset(model, [jsonl(tmp_path, {"text": "hello there"}, {"text": PROSE})], max_seq_length=40)
    assert list(rows.samples[0]) == [BOS, *plain(tokenizer, "hello there")]
    assert list(rows.samples[1]) == [BOS, *plain(tokenizer, PROSE)[:39]]


def test_jsonl_of_messages(smollm2: Path, tokenizer: Any, tmp_path: Path) -> None:
    """A `messages` line goes through the model's chat template."""
    messages = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello, how are you?"}]
    rows = load_dataset(smollm2, [jsonl(tmp_path, {"messages": messages})], max_seq_length=500)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert "how are you" in text
    assert list(rows.samples[0]) == plain(tokenizer, text)


def test_jsonl_of_token_ids_needs_no_tokenizer(tmp_path: Path) -> None:
    """An `input_ids` line is a row as it is, cut at the length, for a model without a tokenizer too."""
    file = jsonl(tmp_path, {"input_ids": [7, 8, 9]}, {"input_ids": list(range(20)), "text": "not this"})
    rows = load_dataset(tmp_path, [file], max_seq_length=5, vocabulary=20)
    assert rows.samples == ((7, 8, 9), (0, 1, 2, 3, 4))


def test_jsonl_lines_too_short_or_empty_are_passed_over(tmp_path: Path) -> None:
    """Empty lines and rows of less than two tokens are no rows, and do not count as such."""
    file = text_file(tmp_path, '\n{"input_ids": [1]}\r\n{"input_ids": []}\n\n{"input_ids": [1, 2]}', "rows.jsonl")
    assert load_dataset(tmp_path, [file], num_samples=1).samples == ((1, 2),)


def test_jsonl_stops_at_the_count(tmp_path: Path) -> None:
    """Lines behind the last row that is needed are not looked at."""
    file = text_file(tmp_path, '{"input_ids": [1, 2]}\n{"input_ids": [3, 4]}\nbroken\n', "rows.jsonl")
    assert load_dataset(tmp_path, [file], num_samples=2).samples == ((1, 2), (3, 4))


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"], ids=ascii)
def test_jsonl_lines_end_at_line_feeds_only(separator: str, smollm2: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Unicode's other line separators, which JSON allows in a string, end no line."""
    text = f"one two{separator}three"
    rows = load_dataset(smollm2, [jsonl(tmp_path, {"text": text})])
    assert list(rows.samples[0]) == plain(tokenizer, text)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ('{"input_ids": [1, 2', "dataset-invalid"),
        ("[" * 100_000, "dataset-invalid"),
        ('"text"', "dataset-invalid"),
        ('{"input_ids": [1, -2]}', "dataset-invalid"),
        ('{"input_ids": [1, 2.5]}', "dataset-invalid"),
        ('{"input_ids": [true, false]}', "dataset-invalid"),
        ('{"text": "half a pair \\ud800"}', "dataset-invalid"),
        ('{"messages": []}', "chat-template-failed"),
        ('{"messages": [3]}', "chat-template-failed"),
        ('{"messages": [{"rolle": "user"}]}', "chat-template-failed"),
    ],
    ids=["broken", "deep", "string", "negative", "fraction", "truth", "surrogate", "no message", "number", "no role"],
)
def test_jsonl_line_that_is_no_row(line: str, code: str, smollm2: Path, tmp_path: Path) -> None:
    """A line that cannot become a row is refused with file and line number."""
    file = text_file(tmp_path, '{"input_ids": [1, 2]}\n' + line + "\n", "rows.jsonl")
    with raises(code, f"{file}:2"):
        load_dataset(smollm2, [file])


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('roles must alternate') }}", "{{ messages[0].foo.bar }}", "{% if %}"],
    ids=["refuses", "undefined", "broken"],
)
def test_chat_template_that_refuses(template: str, altered: Altered, tmp_path: Path) -> None:
    """Messages that a chat template refuses, or a template that is broken, are refused with file and line."""
    file = jsonl(tmp_path, {"messages": [{"role": "user", "content": "Hi."}]})
    with raises("chat-template-failed", f"{file}:1"):
        load_dataset(altered(template=template), [file])


# --- what else may be wrong


def test_token_beyond_the_vocabulary(tmp_path: Path) -> None:
    """A token id beyond the vocabulary is refused with line and both numbers; the largest of the vocabulary is not."""
    file = jsonl(tmp_path, {"input_ids": [1, 63]}, {"input_ids": [64, 1]})
    assert load_dataset(tmp_path, [file], num_samples=1, vocabulary=64).samples == ((1, 63),)
    with raises("token-out-of-range", f"{file}:2") as caught:
        load_dataset(tmp_path, [file], vocabulary=64)
    assert caught.value.what.count("64") == 2


@pytest.mark.parametrize(("count", "length"), [(0, 10), (-1, 10), (1, 1), (1, 0)])
def test_no_rows_or_no_tokens(count: int, length: int, tmp_path: Path) -> None:
    """Less than one sample of two tokens is refused before anything is read."""
    with raises("option-invalid", "num_samples" if count < 1 else "max_seq_length"):
        load_dataset(tmp_path, [tmp_path / "nowhere"], num_samples=count, max_seq_length=length)


def test_file_that_is_not_there(tmp_path: Path) -> None:
    """A missing file is refused by its path."""
    with raises("dataset-unreadable", "nowhere.txt"):
        load_dataset(tmp_path, [tmp_path / "nowhere.txt"])


@pytest.mark.parametrize("content", [None, "garbage", "{}"], ids=["none", "garbage", "empty"])
def test_no_usable_tokenizer(content: str | None, altered: Altered, tmp_path: Path) -> None:
    """A missing or broken tokenizer is refused with the directory's path and what to do."""
    model = altered()
    (model / "tokenizer.json").unlink()
    if content is not None:
        (model / "tokenizer.json").write_text(content, encoding="utf-8")
    with raises("tokenizer-unusable", model) as caught:
        load_dataset(model, [text_file(tmp_path, PROSE)])
    assert "`input_ids`" in caught.value.remedy


# --- the digest


def digest_of(rows: Sequence[Sequence[int]]) -> str:
    """The documented digest, spelled out: little-endian int32, each row behind its length."""
    data = b"".join(struct.pack(f"<{len(row) + 1}i", len(row), *row) for row in rows)
    return hashlib.sha256(data).hexdigest()


def test_digest_is_the_documented_one(tmp_path: Path) -> None:
    """The digest is SHA-256 over the rows' ids as little-endian int32, each row behind its length."""
    ids = [[7, 8, 9], [1, 2], [70_000, 3]]
    rows = load_dataset(tmp_path, [jsonl(tmp_path, *({"input_ids": row} for row in ids))])
    assert rows.digest == digest_of(ids)
    assert rows == Dataset(((7, 8, 9), (1, 2), (70_000, 3)), "rows.jsonl", digest_of(ids))


@pytest.mark.parametrize("other", [[[1, 2, 3, 5]], [[1, 2], [3, 4]], [[2, 1, 3, 4]], [[1, 2, 3, 4, 0]], [[1, 2, 3]]])
def test_digest_changes_with_the_content(other: list[list[int]]) -> None:
    """Another id, another order, another cut or another length is another digest; another source's name is not."""
    rows = make_dataset([[1, 2, 3, 4]], "a")
    assert make_dataset(other, "a").digest != rows.digest
    assert make_dataset([[1, 2, 3, 4]], "b").digest == rows.digest
