"""Bad texts, rows and options of `eval`: exit code 2, a message with code and place, no work, nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from helpers.refusals import copy, evaluate, message_of, put_file, refuse, rows_file
from helpers.tiny_tokenizer import PROSE, add_tokenizer
from quantization.test_bad_input import edit_config

TALK = [{"role": "user", "content": "Name a river."}, {"role": "assistant", "content": "The Loire."}]
LONG = 10**12


# --- the texts


@pytest.mark.parametrize("content", ["Too short.", "", " \n\n", "\ufeff"], ids=repr)
def test_text_shorter_than_a_chunk(content: str, good: Path, llama: Path, text: Path, out: Path) -> None:
    """A text that does not fill one chunk is refused by its own name, beside another that does."""
    short = put_file(out.parent / "short.txt", content)
    arguments = [good, "--reference", llama, "--dataset", text, "--dataset", short, "--context", 64]
    assert f"{short}: " in refuse(out, "dataset-too-small", *arguments)


def test_text_shorter_than_the_longest_context(good: Path, text: Path, out: Path) -> None:
    """Of several contexts the longest decides, and the message names it."""
    message = refuse(out, "dataset-too-small", good, "--dataset", text, "--context", "64,500,16k")
    assert f"{text}: " in message
    assert "16384" in message


def test_missing_text(good: Path, out: Path) -> None:
    """A text file that is not there is refused by its name."""
    file = out.parent / "nowhere.txt"
    assert f"{file}: " in refuse(out, "dataset-unreadable", good, "--dataset", file, "--context", 64)


@pytest.mark.parametrize("name", ["a.bin", "a.txt", "a.jsonl", "no_ending"])
def test_text_that_is_not_utf_8(name: str, good: Path, out: Path) -> None:
    """Bytes that are not UTF-8 are refused by the file's name, whatever it is called."""
    file = put_file(out.parent / name, bytes(range(256)) * 8)
    assert f"{file}: " in refuse(out, "dataset-unreadable", good, "--dataset", file, "--context", 64)


def test_json_is_not_text(good: Path, out: Path) -> None:
    """A .json file is refused by its name."""
    file = put_file(out.parent / "a.json", json.dumps([{"text": PROSE}]))
    assert f"{file}: " in refuse(out, "dataset-unreadable", good, "--dataset", file, "--context", 64)


def test_folder_without_texts(good: Path, out: Path) -> None:
    """A folder in which nothing is a text is refused by its name."""
    folder = out.parent / "folder"
    (folder / "deeper").mkdir(parents=True)
    put_file(folder / "deeper" / "a.txt", PROSE)
    put_file(folder / "a.json", "{}")
    assert f"{folder}: " in refuse(out, "dataset-unreadable", good, "--dataset", folder, "--context", 64)


def test_folder_named_like_a_text(good: Path, out: Path) -> None:
    """A folder in a folder of texts that is called like one is refused by its name."""
    (out.parent / "folder" / "b.txt").mkdir(parents=True)
    message = refuse(out, "dataset-unreadable", good, "--dataset", out.parent / "folder", "--context", 64)
    assert f"{out.parent / 'folder' / 'b.txt'}: " in message


def test_text_without_a_tokenizer(bare: Path, text: Path, out: Path) -> None:
    """Text for a model without a tokenizer is refused with the model's path."""
    assert f"{bare}: " in refuse(out, "tokenizer-unusable", bare, "--dataset", text, "--context", 64)


def test_fewer_chunks_than_texts(good: Path, text: Path, out: Path) -> None:
    """A limit that leaves a text out is refused, or that text is not said to have been measured."""
    other = put_file(out.parent / "b.txt", PROSE)
    result = evaluate("-o", out, good, "--dataset", text, "--dataset", other, "--context", 64, "--max-chunks", 1)
    if result.exit_code == 0:
        record = json.loads((out / "eval.json").read_text(encoding="utf-8"))
        assert [entry["name"] for entry in record["texts"]] == ["a.txt"]
    else:
        assert "--max-chunks: " in message_of(result, "option-invalid")


@pytest.mark.parametrize("texts", [1, 2])
@pytest.mark.parametrize("most", [16, 64, 300])
def test_fewer_tokens_than_a_chunk(most: int, texts: int, good: Path, out: Path) -> None:
    """A --max-tokens below one chunk of each text is refused as such: no text is called short, no limit exceeded."""
    files = [put_file(out.parent / f"{number}.txt", PROSE) for number in range(texts)]
    options = [part for file in files for part in ("--dataset", file)]
    result = evaluate(good, *options, "--context", "32,256", "--max-tokens", most, "--json")
    if result.exit_code == 0:
        assert all(found["tokens"] <= most for found in json.loads(result.stdout)["contexts"])
    else:
        assert "--max-tokens: " in message_of(result, "option-invalid")


# --- rows and chat logs

GOOD_LINE = b'{"input_ids": [3, 4, 5]}\n'


def bad_rows(model: Path, out: Path, code: str, content: bytes) -> str:
    """The message about a file of rows, which must name it."""
    file = put_file(out.parent / "rows.jsonl", content)
    message = refuse(out, code, model, "--dataset", file)
    assert f"{file}" in message
    return message


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b'{"input_ids": [3, 4\n', "dataset-invalid"),
        (b"[" * 100_000 + b"\n", "dataset-invalid"),
        (b"[3, 4]\n", "dataset-invalid"),
        (b'{"texts": "a"}\n', "dataset-invalid"),
        (b'{"input_ids": [3, -4]}\n', "dataset-invalid"),
        (b'{"input_ids": [3, true]}\n', "dataset-invalid"),
        (b'{"input_ids": [3, 4.0]}\n', "dataset-invalid"),
        (b'{"input_ids": "3 4"}\n', "dataset-invalid"),
        (b'{"text": ["a", "b"]}\n', "dataset-invalid"),
        (b'{"messages": "hello"}\n', "dataset-invalid"),
        (b'{"messages": ["hello"]}\n', "chat-template-failed"),
        (b'{"messages": [{"role": "tool", "content": "a"}]}\n', "chat-template-failed"),
        (b'{"messages": [{"role": "assistant", "content": "\\ud800"}]}\n', "chat-template-failed"),
        (b'{"text": "a\\ud800b"}\n', "dataset-invalid"),
    ],
    ids=[
        *("broken", "deep", "list", "other key", "negative", "true", "float", "string"),
        *("texts", "no messages", "no mapping", "tool", "surrogate in messages", "surrogate in text"),
    ],
)
def test_broken_line_of_rows(line: bytes, code: str, llama: Path, out: Path) -> None:
    """A line that is not JSON, or lacks what a row needs, is refused with its number."""
    model = copy(llama, out.parent / "model", edit_config(max_position_embeddings=512))
    message = bad_rows(model, out, code, GOOD_LINE + b"\n" + line + GOOD_LINE)
    assert f"{out.parent / 'rows.jsonl'}:3: " in message


@pytest.mark.parametrize(
    "content",
    [b"", b"\n \n", b'{"input_ids": [3]}\n', b'{"messages": [{"role": "user", "content": "Hi."}]}\n'],
    ids=["empty", "blank", "one token", "no answer"],
)
def test_rows_without_a_scored_token(content: bytes, llama: Path, out: Path) -> None:
    """A JSONL file in which no token can be scored is refused by its name."""
    bad_rows(llama, out, "dataset-too-small", content)


@pytest.mark.parametrize("token", [64, LONG, 2**63])
def test_token_beyond_the_vocabulary(token: int, bare: Path, out: Path) -> None:
    """A token id that the vocabulary lacks is refused with the line and both numbers."""
    message = bad_rows(bare, out, "token-out-of-range", GOOD_LINE + b'{"input_ids": [3, %d]}\n' % token)
    assert "rows.jsonl:2: " in message
    assert f" {token} " in message
    assert " 64." in message


@pytest.mark.parametrize("line", [b'{"text": "some words"}\n', json.dumps({"messages": TALK}).encode()])
def test_words_without_a_tokenizer(line: bytes, bare: Path, out: Path) -> None:
    """Words in JSONL for a model without a tokenizer are refused with the model's path."""
    file = put_file(out.parent / "rows.jsonl", line)
    assert f"{bare}: " in refuse(out, "tokenizer-unusable", bare, "--dataset", file)


def test_messages_without_a_template(bare: Path, out: Path) -> None:
    """Messages for a tokenizer without a chat template are refused with the line."""
    model = add_tokenizer(copy(bare, out.parent / "model"), template=None)
    message = bad_rows(model, out, "chat-template-failed", json.dumps({"messages": TALK}).encode())
    assert "rows.jsonl:1: " in message


def test_row_beyond_the_positions(bare: Path, out: Path) -> None:
    """A row longer than the model's positions is refused with its line, since --context does not cut rows."""
    file = rows_file(out.parent / "rows.jsonl", {"input_ids": [3, 4]}, {"input_ids": [3] * 600})
    message = refuse(out, "sequence-too-long", bare, "--dataset", file)
    assert f"{file}:2: 600 " in message
    assert " 512 " in message


@pytest.mark.parametrize("separator", ["\u2028", "\u0085", "\x0b", "\x1c"], ids=ascii)
def test_lines_end_where_jsonl_says(separator: str, good: Path, out: Path) -> None:
    """Only a line feed ends a line of JSONL: other separators of Unicode stand in strings as they are."""
    line = json.dumps({"text": f"one{separator}two three four"}, ensure_ascii=False).replace("\\u000b", separator)
    file = put_file(out.parent / "rows.jsonl", line.replace("\\u001c", separator) + "\n")
    result = evaluate(good, "--dataset", file, "--json")
    if ord(separator) < 32:  # a control character is not JSON: one line, refused as such
        assert f"{file}:1: " in message_of(result, "dataset-invalid")
        return
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["contexts"][0]["chunks"] == 1


# --- contexts and other numbers


@pytest.mark.parametrize(
    "given", ["", " ", ",", "abc", "1e3", "64.5", "-64", "0", "1", "0k", "64,64", "1k,1024", "64;9"]
)
def test_contexts_that_are_not_lengths(given: str, good: Path, text: Path, out: Path) -> None:
    """A context that is not a length, is too short, or is given twice, is refused by the option's name."""
    message = refuse(out, "option-invalid", good, "--dataset", text, "--context", given)
    assert message.startswith("snugfit: --context: ")


def test_context_beyond_the_positions(llama: Path, out: Path) -> None:
    """A context beyond the positions in a model's config is refused by that file, unless it is asked for."""
    model = copy(llama, out.parent / "model", edit_config(max_position_embeddings=128))
    file = put_file(out.parent / "a.txt", PROSE)
    arguments = [model, "--reference", llama, "--dataset", file, "--context", "64,129"]
    message = refuse(out, "sequence-too-long", *arguments)
    assert f"{model / 'config.json'}: 129 " in message
    assert " 128 " in message
    assert "--allow-long-context" in message
    options = ["--context", 129, "--max-chunks", 1, "--allow-long-context", "--json"]
    result = evaluate(model, "--reference", llama, "--dataset", file, *options)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["contexts"][0]["tokens"] == 128


@pytest.mark.parametrize("option", ["--max-chunks", "--max-tokens", "--tokens-per-batch"])
@pytest.mark.parametrize("value", [0, -1])
def test_limits_that_leave_nothing(option: str, value: int, good: Path, text: Path, out: Path) -> None:
    """A limit that leaves nothing to evaluate is refused by its name."""
    assert f"{option}: " in refuse(out, "option-invalid", good, "--dataset", text, "--context", 64, option, value)


@pytest.mark.parametrize(
    ("option", "value", "known"),
    [
        ("--activations", "vllm-hopper", "marlin"),
        ("--activations", "", "marlin"),
        ("--noise-floor", "some", "all"),
        ("--device", "gpu", "cuda"),
        ("--device", "cpu:x", "cuda"),
    ],
)
def test_unknown_names(option: str, value: str, known: str, good: Path, text: Path, out: Path) -> None:
    """A profile, floor or device that does not exist is refused with those that do."""
    message = refuse(out, "option-invalid", good, "--dataset", text, "--context", 64, option, value)
    assert f"{option}: " in message
    assert f"{value!r}" in message
    assert known in message


def test_cuda_where_there_is_none(good: Path, text: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--device cuda` on a machine without CUDA is refused."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = [good, "--dataset", text, "--context", 64, "--device", "cuda"]
    assert "--device: " in refuse(out, "device-unavailable", *arguments)
