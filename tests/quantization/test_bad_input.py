"""Bad input: exit code 2, one clear message that names place and remedy, and nothing written.

Every case damages a copy of a tiny model or gives the command something impossible, and runs the command in-process.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import snugfit.quantization.quantize
import snugfit.quantization.run
from snugfit.cli.app import app
from snugfit.storage.checkpoint import INDEX_NAME, SINGLE_NAME
from snugfit.storage.staging import LOCK_NAME, units_done

MakeTiny = Callable[..., Path]
Spoil = Callable[[Path], None]
Q1 = "model.layers.1.self_attn.q_proj.weight"
UP1 = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def single(make_tiny: MakeTiny) -> Path:
    """A tiny llama in one weight file; tests copy it."""
    return make_tiny("llama")


@pytest.fixture(scope="module")
def sharded(make_tiny: MakeTiny) -> Path:
    """The same in several weight files with an index; tests copy it."""
    return make_tiny("llama", max_shard_size="60KB")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where the result would go."""
    return tmp_path / "out"


def copy(source: Path, out: Path, spoil: Spoil | None = None) -> Path:
    model = out.parent / "model"
    shutil.copytree(source, model)
    if spoil is not None:
        spoil(model)
    return model


def invoke(model: Path, out: Path, recipe: str = "fp8-dynamic", *options: object) -> Any:
    arguments = ["quantize", model, "-r", recipe, "-o", out, "--device", "cpu", *options]
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


ABOVE = ("quantizing layers", "this run will need")


def message_of(result: Any, code: int = 2) -> str:
    """The one message on stderr of a refused run; what it would need and the bar's last state may stand above it."""
    assert result.exit_code == code, (result.exit_code, result.stderr, repr(result.exception))
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.strip() and not line.startswith(ABOVE)]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("snugfit: ")
    return str(lines[0])


def refuse(model: Path, out: Path, recipe: str = "fp8-dynamic", *options: object) -> str:
    """The message of a run that must be refused and leave nothing behind."""
    before = {path: path.read_bytes() for path in model.rglob("*") if path.is_file()} if model.is_dir() else {}
    message = message_of(invoke(model, out, recipe, *options))
    assert not os.path.lexists(out)
    assert not os.path.lexists(partial_of(out))
    for path, content in before.items():
        assert path.read_bytes() == content, path
    return message


def partial_of(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def edit_config(**values: Any) -> Spoil:
    def spoil(model: Path) -> None:
        file = model / "config.json"
        config = json.loads(file.read_text(encoding="utf-8")) | values
        file.write_text(json.dumps(config), encoding="utf-8")

    return spoil


def edit_header(change: Callable[[dict[str, Any]], None]) -> Spoil:
    """Rewrites the header of the one weight file; the bytes behind it stay."""

    def spoil(model: Path) -> None:
        file = model / SINGLE_NAME
        raw = file.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])

    return spoil


def set_entry(name: str, **values: Any) -> Spoil:
    return edit_header(lambda header: header[name].update(values))


def edit_index(change: Callable[[dict[str, Any]], None]) -> Spoil:
    def spoil(model: Path) -> None:
        file = model / INDEX_NAME
        index = json.loads(file.read_text(encoding="utf-8"))
        change(index)
        file.write_text(json.dumps(index), encoding="utf-8")

    return spoil


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Spoil:
    def spoil(model: Path) -> None:
        tensors = load_file(model / SINGLE_NAME)
        change(tensors)
        save_file(tensors, model / SINGLE_NAME, metadata={"format": "pt"})

    return spoil


def put(name: str, values: Mapping[int, float]) -> Spoil:
    """Sets single values of a tensor, by their flat positions."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for position, value in values.items():
            tensors[name].view(-1)[position] = value

    return edit_tensors(change)


def fill(name: str, value: float) -> Spoil:
    """Sets all values of a tensor."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].fill_(value)

    return edit_tensors(change)


def write(name: str, content: bytes) -> Spoil:
    def spoil(model: Path) -> None:
        (model / name).write_bytes(content)

    return spoil


def weights_as(name: str) -> Spoil:
    def spoil(model: Path) -> None:
        (model / SINGLE_NAME).rename(model / name)

    return spoil


def first_shard(model: Path) -> Path:
    return min(model.glob("model-00001-of-*.safetensors"))


def tail_cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


# --- the model directory


def test_no_such_directory(out: Path) -> None:
    """A model that is not there is refused by its path."""
    assert "missing: no such directory" in refuse(out.parent / "missing", out)


def test_truncated_file(single: Path, out: Path) -> None:
    """A weight file cut short is refused: the file, the tensor, both sizes."""
    model = copy(single, out, lambda model: tail_cut(model / SINGLE_NAME))
    message = refuse(model, out)
    assert f"{model / SINGLE_NAME}: truncated: tensor model." in message
    assert f"the file has {(model / SINGLE_NAME).stat().st_size}" in message
    assert "Download this file again." in message


def test_truncated_shard(sharded: Path, out: Path) -> None:
    """One shard of several cut short is refused by its own name."""
    model = copy(sharded, out, lambda model: tail_cut(first_shard(model)))
    assert f"{first_shard(model)}: truncated: tensor " in refuse(model, out)


@pytest.mark.parametrize("size", [0, 5, 100])
def test_file_that_ends_in_its_header(size: int, single: Path, out: Path) -> None:
    """A weight file that ends before its header does is refused by its name."""
    model = copy(single, out, lambda model: os.truncate(model / SINGLE_NAME, size))
    assert f"{model / SINGLE_NAME}: not a whole safetensors file. Download" in refuse(model, out)


def test_missing_shards(sharded: Path, out: Path) -> None:
    """Shards that the index names and the directory lacks are counted and named."""
    model = copy(sharded, out, lambda model: first_shard(model).unlink())
    total = int(first_shard(sharded).stem[-5:])
    message = refuse(model, out)
    assert f"{model}: 1 of {total} shards are missing: {first_shard(sharded).name}." in message
    assert INDEX_NAME in message


@pytest.mark.parametrize(
    "place",
    ["../outside.safetensors", "/outside.safetensors", "sub/model.safetensors", "..\\x.safetensors", "model.bin", ".."],
)
def test_index_that_points_outside(place: str, sharded: Path, out: Path) -> None:
    """An index entry that is no safetensors file of this very directory is refused, though such a file be there."""

    def spoil(model: Path) -> None:
        (model / "sub").mkdir()
        for file in (model / "sub" / "model.safetensors", model.parent / "outside.safetensors", model / "model.bin"):
            shutil.copyfile(first_shard(model), file)
        edit_index(lambda index: index["weight_map"].update({Q1: place}))(model)

    model = copy(sharded, out, spoil)
    message = refuse(model, out)
    assert f"{model / INDEX_NAME}: weight_map sends {Q1} to {place!r}" in message
    assert "its index points outside" in message


def test_index_and_shards_disagree(sharded: Path, out: Path) -> None:
    """An index that sends a tensor to another shard than the one that holds it is refused with both."""
    last = max(sharded.glob("model-*.safetensors")).name
    spoil = edit_index(lambda index: index["weight_map"].update({"model.embed_tokens.weight": last}))
    message = refuse(copy(sharded, out, spoil), out)
    assert INDEX_NAME in message
    assert f"weight_map sends model.embed_tokens.weight to {last}, which does not hold it" in message


def test_index_names_a_tensor_that_is_nowhere(sharded: Path, out: Path) -> None:
    """An index with a tensor that no shard holds is refused by the tensor's name."""
    shard = first_shard(sharded).name
    model = copy(sharded, out, edit_index(lambda index: index["weight_map"].update({"model.ghost": shard})))
    assert f"weight_map sends model.ghost to {shard}" in refuse(model, out)


def test_two_shards_with_one_tensor(sharded: Path, out: Path) -> None:
    """A tensor that two shards hold is refused with both files."""

    def spoil(model: Path) -> None:
        shutil.copyfile(first_shard(model), model / "more.safetensors")
        edit_index(lambda index: index["weight_map"].update({"x": "more.safetensors"}))(model)

    message = refuse(copy(sharded, out, spoil), out)
    assert "more.safetensors: tensor " in message
    assert f"is also in {first_shard(sharded).name}" in message


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b'{"weight_map": 3}', b"\xff\xff", b"[" * 100_000], ids=lambda c: repr(c[:20])
)
def test_index_that_is_none(content: bytes, sharded: Path, out: Path) -> None:
    """An index without a readable weight_map is refused by its name."""
    model = copy(sharded, out, write(INDEX_NAME, content))
    assert f"{model / INDEX_NAME}: no readable weight_map" in refuse(model, out)


@pytest.mark.parametrize(
    "header",
    [b"\x00" * 64, b"{" * 64, b"\xff" * 64, b"[]      ", b"7       ", b'{"a": 3}', b'{"a": {}}', b"[" * 100_000],
    ids=lambda header: repr(header[:20]),
)
def test_garbage_header(header: bytes, single: Path, out: Path) -> None:
    """A header that is no table of tensors is refused by its file."""
    content = struct.pack("<Q", len(header)) + header + b"\x00" * 64
    model = copy(single, out, write(SINGLE_NAME, content))
    assert f"{model / SINGLE_NAME}: the safetensors header cannot be read" in refuse(model, out)


def test_header_longer_than_any(single: Path, out: Path) -> None:
    """A file that is no safetensors file at all, so that its header's length is absurd, is refused."""
    model = copy(single, out, write(SINGLE_NAME, b"PK\x03\x04" + b"\xff" * 1000))
    assert f"{model / SINGLE_NAME}: not a whole safetensors file" in refuse(model, out)


@pytest.mark.parametrize(
    "values",
    [
        {"data_offsets": [-8, 16376]},
        {"data_offsets": [16384, 0]},
        {"data_offsets": [0, 8]},
        {"data_offsets": [0]},
        {"data_offsets": "ab"},
        {"data_offsets": None},
        {"shape": [128, -64]},
        {"shape": [128, 65]},
        {"shape": None},
        {"shape": [float("nan"), 64]},
        {"shape": [float("inf"), 64]},
        {"dtype": "BF17"},
        {"dtype": ["BF16"]},
        {"dtype": "F4"},
    ],
    ids=str,
)
def test_header_entry_that_cannot_be(values: dict[str, Any], single: Path, out: Path) -> None:
    """An entry whose offsets, shape and dtype do not go together is refused by its file."""
    model = copy(single, out, set_entry(UP1, **values))
    message = refuse(model, out)
    assert f"{model / SINGLE_NAME}: the safetensors header cannot be read" in message
    assert "Download this file again." in message


def test_offsets_beyond_the_file(single: Path, out: Path) -> None:
    """Offsets that agree with the shape but lie behind the file's end are refused with the tensor's name."""
    model = copy(single, out, set_entry(UP1, data_offsets=[10**12, 10**12 + 128 * 64 * 2]))
    message = refuse(model, out)
    assert str(model / SINGLE_NAME) in message
    assert f"tensor {UP1} ends at byte" in message


def test_overlapping_tensors(single: Path, out: Path) -> None:
    """Two tensors on the same bytes are refused, as safetensors itself does."""

    def overlap(header: dict[str, Any]) -> None:
        header[UP1]["data_offsets"] = header[UP1.replace("up_proj", "gate_proj")]["data_offsets"]

    model = copy(single, out, edit_header(overlap))
    assert str(model / SINGLE_NAME) in refuse(model, out)


def test_bytes_that_no_tensor_has(single: Path, out: Path) -> None:
    """Bytes behind the last tensor are refused, as safetensors itself does."""
    model = copy(single, out, lambda model: os.truncate(model / SINGLE_NAME, (model / SINGLE_NAME).stat().st_size + 8))
    assert str(model / SINGLE_NAME) in refuse(model, out)


def test_name_that_cannot_be_written(single: Path, out: Path) -> None:
    """A tensor name with half a surrogate pair, which no file can hold, is refused."""
    model = copy(single, out, edit_header(lambda header: header.update({"a\ud800": header.pop("lm_head.weight")})))
    assert str(model / SINGLE_NAME) in refuse(model, out)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_only(name: str, single: Path, out: Path) -> None:
    """A directory with pickled weights only is refused, with what to do instead."""
    model = copy(single, out, weights_as(name))
    message = refuse(model, out)
    assert f"{model}: the weights are pickles ({name})" in message
    assert "safetensors" in message


def test_no_weights(single: Path, out: Path) -> None:
    """A directory without any weights is refused, with the names that were looked for."""
    model = copy(single, out, lambda model: (model / SINGLE_NAME).unlink())
    assert f"{model}: no weights: neither {SINGLE_NAME} nor {INDEX_NAME}" in refuse(model, out)


def test_missing_config(single: Path, out: Path) -> None:
    """A directory without config.json is refused."""
    model = copy(single, out, lambda model: (model / "config.json").unlink())
    assert f"{model}: config.json is missing." in refuse(model, out)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not valid JSON"),
        (b"{'a': 1}", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b"[" * 100_000, "not valid JSON"),
    ],
    ids=["empty", "python", "bytes", "list", "deep"],
)
def test_config_that_is_no_json(content: bytes, says: str, single: Path, out: Path) -> None:
    """A config.json that holds no JSON object is refused by its name."""
    model = copy(single, out, write("config.json", content))
    assert f"{model / 'config.json'}: {says}" in refuse(model, out)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"num_local_experts": 8}, "the config has 8 experts, and no tensor is one's"),
        (
            {"text_config": {"num_hidden_layers": 3, "n_routed_experts": 64}},
            "the config has 64 experts, and no tensor is one's",
        ),
    ],
    ids=["experts", "nested"],
)
def test_experts_that_are_not_there(values: dict[str, Any], says: str, single: Path, out: Path) -> None:
    """A config that speaks of experts which the file has not is refused, and the file not taken for a dense model."""
    assert says in refuse(copy(single, out, edit_config(**values)), out)


@pytest.mark.parametrize("kind", ["llama99", None, 7, [], {}], ids=str)
def test_unknown_architecture(kind: object, single: Path, out: Path) -> None:
    """A model_type that transformers does not know is refused with config.json and the value."""
    model = copy(single, out, edit_config(model_type=kind))
    message = refuse(model, out)
    assert f"{model / 'config.json'}: unknown architecture {kind!r}" in message
    assert "update transformers" in message


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers is '3'"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"num_attention_heads": 3}, "heads"),
        ({"hidden_size": 32}, "Config and weights do not belong together"),
        ({"intermediate_size": 64}, "Config and weights do not belong together"),
        ({"num_hidden_layers": 5}, "Config and weights do not belong together"),
    ],
    ids=str,
)
def test_config_of_another_model(values: dict[str, Any], says: str, single: Path, token_rows: Path, out: Path) -> None:
    """A config with impossible numbers, or ones of another model than the weights', is refused."""
    model = copy(single, out, edit_config(**values))
    assert says in refuse(model, out, "nvfp4", "--text", token_rows)


def test_layers_without_weights(single: Path, out: Path) -> None:
    """A checkpoint that lacks whole layers is refused by a recipe that runs no model, too."""
    model = copy(single, out, edit_config(num_hidden_layers=5))
    assert "layers.3" in refuse(model, out, "fp8-dynamic")


# --- the weights' values


@pytest.mark.parametrize("recipe", ["fp8-dynamic", "int4-w4a16", "nvfp4a16", "nvfp4"])
@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({7: float("nan")}, "1 NaN and 0 infinite values among 4096"),
        ({0: float("inf"), 9: float("-inf"), 4095: float("nan")}, "1 NaN and 2 infinite values among 4096"),
    ],
    ids=["nan", "inf"],
)
def test_nan_and_inf_weights(
    recipe: str, values: dict[int, float], says: str, *, single: Path, token_rows: Path, out: Path
) -> None:
    """NaN and infinite weights are refused by every format, with file, tensor and their numbers."""
    model = copy(single, out, put(Q1, values))
    message = refuse(model, out, recipe, "--text", token_rows)
    assert f"{model / SINGLE_NAME}: {Q1}: {says}" in message
    assert "download this file again" in message


@pytest.mark.parametrize("recipe", ["fp8-dynamic", "nvfp4"])
@pytest.mark.parametrize(
    "name",
    ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight", "model.layers.1.input_layernorm.weight"],
)
def test_nan_in_tensors_that_stay(recipe: str, name: str, single: Path, token_rows: Path, out: Path) -> None:
    """A NaN in a tensor that is copied as it was is refused as well, by the tensor's name."""
    model = copy(single, out, put(name, {3: float("nan")}))
    assert name.removesuffix(".weight") in refuse(model, out, recipe, "--text", token_rows)


@pytest.mark.parametrize("value", [float("nan"), 3e38], ids=["nan", "overflow"])
@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4-fp8-hybrid"])
def test_activations_that_are_no_numbers(recipe: str, value: float, single: Path, token_rows: Path, out: Path) -> None:
    """A norm whose NaN, or whose overflow, reaches calibrated inputs is refused; it never becomes a scale."""
    model = copy(single, out, put("model.layers.1.post_attention_layernorm.weight", {3: value}))
    message = refuse(model, out, recipe, "--text", token_rows)
    assert "model.layers.1." in message
    assert "source" in message


@pytest.mark.parametrize(
    ("recipe", "norm", "module"),
    [
        ("nvfp4", "input_layernorm", "self_attn."),
        ("nvfp4-fp8-hybrid", "post_attention_layernorm", "mlp."),
    ],
)
def test_inputs_that_are_all_zero(
    recipe: str, norm: str, module: str, *, single: Path, token_rows: Path, out: Path
) -> None:
    """Calibrated inputs that are all zero give no scale and are refused with the module's name."""
    model = copy(single, out, fill(f"model.layers.1.{norm}.weight", 0.0))
    message = refuse(model, out, recipe, "--text", token_rows)
    assert f"model.layers.1.{module}" in message
    assert "keep this tensor in the recipe" in message


def test_all_zero_inputs_do_not_matter_without_activation_scales(single: Path, out: Path) -> None:
    """The same model is no problem for a recipe that measures no activations."""
    model = copy(single, out, fill("model.layers.1.input_layernorm.weight", 0.0))
    assert invoke(model, out, "nvfp4a16").exit_code == 0
    assert (out / SINGLE_NAME).is_file()


# --- the recipe


def test_unknown_recipe(single: Path, out: Path) -> None:
    """A recipe that is neither built in nor a file is refused with the nearest name."""
    message = refuse(single, out, "nvfp4-fp8-hybird")
    assert "'nvfp4-fp8-hybird'" in message
    assert "Did you mean nvfp4-fp8-hybrid?" in message
    assert "`snugfit recipes`" in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: x\nrules:\n  - {role: q, format: nvfp4}\n  - {role: linear, format: fp8-dynamic}\n", "splits a fused"),
        ("name: x\nrules:\n  - {role: mlp, format: nvfp4}\n", "no rule names model.layers.0.self_attn."),
        ("name: x\nrules:\n  - {role: linear, formatt: nvfp4, format: keep}\n", "rules[0].formatt: unknown key"),
        ("name: x\nrules:\n  - {role: [linear, lm_head], format: nvfp4}\n", "lm_head stands outside"),
        ("name: [\n", "not valid YAML"),
        ("", "mapping with `name` and `rules`"),
        ("a\0b", "not valid YAML"),
    ],
)
def test_recipe_that_does_not_do(text: str, says: str, single: Path, token_rows: Path, out: Path) -> None:
    """A recipe file that is none, or does not fit the model, is refused with the file's name."""
    file = out.parent / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    message = refuse(single, out, str(file), "--text", token_rows)
    assert str(file) in message
    assert says in message


def test_columns_that_blocks_do_not_divide(make_tiny: MakeTiny, token_rows: Path, out: Path) -> None:
    """A weight whose columns 16 does not divide is refused by NVFP4 with recipe, rule, tensor and shape."""
    model = make_tiny("llama", intermediate_size=72, num_hidden_layers=1)
    message = refuse(model, out, "nvfp4", "--text", token_rows)
    assert "recipe nvfp4: rules[0]: model.layers.0.mlp.down_proj.weight:" in message
    assert "divisible by 16, this weight is 64 x 72" in message
    assert "fp8-dynamic" in message


# --- the text to calibrate on


def bad_text(single: Path, out: Path, name: str, content: bytes) -> str:
    file = out.parent / name
    file.write_bytes(content)
    message = refuse(single, out, "nvfp4", "--text", file)
    assert name in message
    return message


@pytest.mark.parametrize("content", [b"", b"a"], ids=["empty", "one token"])
def test_text_too_short(content: bytes, smollm2: Path, single: Path, out: Path) -> None:
    """An empty text, or one of a single token, is refused by the file's name."""

    def spoil(model: Path) -> None:
        for file in smollm2.glob("tokenizer*"):
            shutil.copy(file, model)

    model = copy(single, out, spoil)
    assert f"{out.parent / 'a.txt'}: empty or too short" in bad_text(model, out, "a.txt", content)


@pytest.mark.parametrize("name", ["rows.jsonl", "text.txt"])
def test_binary_text(name: str, single: Path, out: Path) -> None:
    """A file that is not UTF-8 is refused by its name, as text and as JSONL."""
    assert "cannot be read as text" in bad_text(single, out, name, bytes(range(256)))


def test_missing_text(single: Path, out: Path) -> None:
    """A text file that is not there is refused by its name."""
    message = refuse(single, out, "nvfp4", "--text", out.parent / "nowhere.txt")
    assert f"{out.parent / 'nowhere.txt'}: cannot be read" in message


GOOD_LINE = b'{"input_ids": [3, 4, 5]}\n'


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"input_ids": [3, 4\n', "not JSON"),
        (b"[" * 100_000 + b"\n", "not JSON"),
        (b"[3, 4]\n", "no `text`, `messages` or `input_ids`"),
        (b'{"texts": "a"}\n', "no `text`, `messages` or `input_ids`"),
        (b'{"input_ids": [3, -4]}\n', "no `text`, `messages` or `input_ids`"),
        (b'{"input_ids": "3 4"}\n', "no `text`, `messages` or `input_ids`"),
    ],
    ids=["broken", "deep", "list", "other key", "negative", "string"],
)
def test_broken_line_of_jsonl(line: bytes, says: str, single: Path, out: Path) -> None:
    """A line of JSONL that is none, or lacks what a row needs, is refused with its number."""
    message = bad_text(single, out, "rows.jsonl", GOOD_LINE + b"\n" + line + GOOD_LINE)
    assert f"{out.parent / 'rows.jsonl'}:3: {says}" in message


@pytest.mark.parametrize("content", [b"", b"\n \n", b'{"input_ids": [3]}\n{"input_ids": []}\n'])
def test_jsonl_without_rows(content: bytes, single: Path, out: Path) -> None:
    """A JSONL file without one row of two tokens is refused by its name."""
    assert "no row of two tokens" in bad_text(single, out, "rows.jsonl", content)


@pytest.mark.parametrize("token", [64, 10**12])
def test_token_beyond_the_vocabulary(token: int, single: Path, out: Path) -> None:
    """A token id that the model's vocabulary lacks is refused with both numbers."""
    message = bad_text(single, out, "rows.jsonl", GOOD_LINE + b'{"input_ids": [3, %d]}\n' % token)
    assert f"token id {token} is beyond the model's vocabulary of 64" in message


def test_token_beyond_the_vocabulary_that_the_config_omits(single: Path, out: Path) -> None:
    """A config that leaves the vocabulary's size to transformers' default does not let a wild token id through."""

    def spoil(model: Path) -> None:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        del config["vocab_size"]
        (model / "config.json").write_text(json.dumps(config), encoding="utf-8")

    model = copy(single, out, spoil)
    bad_text(model, out, "rows.jsonl", b'{"input_ids": [3, 1000000000000]}\n')


def test_text_without_a_tokenizer(single: Path, out: Path) -> None:
    """Text for a model without a tokenizer is refused with the model's path and both ways out."""
    file = out.parent / "a.txt"
    file.write_text("some text " * 50, encoding="utf-8")
    message = refuse(single, out, "nvfp4", "--text", file)
    assert f"{single}: no usable tokenizer" in message
    assert "`input_ids`" in message


@pytest.mark.parametrize("options", [("--rows", 0), ("--rows", -1), ("--length", 1), ("--length", 0)], ids=str)
def test_rows_that_are_none(options: tuple[str, int], single: Path, token_rows: Path, out: Path) -> None:
    """No rows, or rows of less than two tokens, are refused."""
    assert "are no data" in refuse(single, out, "nvfp4", "--text", token_rows, *options)


# --- already quantized


@pytest.mark.parametrize("recipe", ["fp8-dynamic", "nvfp4a16", "int4-w4a16"])
@pytest.mark.parametrize("marked", [True, False], ids=["with config", "config stripped"])
def test_quantizing_twice(recipe: str, marked: bool, single: Path, out: Path) -> None:
    """The result of a run is no source for another, though someone strips its config."""
    model = out.parent / "once"
    assert invoke(single, model, recipe).exit_code == 0
    if not marked:
        edit_config(quantization_config=None)(model)
    message = refuse(model, out, recipe)
    assert f"{model}: already quantized (" in message
    assert ("quant_method 'compressed-tensors'" in message) is marked
    assert "Start from the original" in message


@pytest.mark.parametrize(
    "values",
    [
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"text_config": {"num_hidden_layers": 3, "quantization_config": {"quant_method": "gptq"}}},
    ],
    ids=["plain", "text_config"],
)
def test_config_says_quantized(values: dict[str, Any], single: Path, out: Path) -> None:
    """A quantization_config alone is enough to refuse, wherever the config has it."""
    message = refuse(copy(single, out, edit_config(**values)), out)
    assert "already quantized (quant_method 'gptq' in config.json)" in message


@pytest.mark.parametrize(
    ("old", "new", "dtype"),
    [
        (UP1, UP1.replace(".weight", ".qweight"), torch.int32),
        (UP1, UP1.replace(".weight", ".weight_packed"), torch.uint8),
        (UP1, UP1, torch.float8_e4m3fn),
        (UP1, UP1, torch.int8),
    ],
    ids=["gptq", "packed", "fp8", "int8"],
)
def test_tensors_say_quantized(old: str, new: str, dtype: torch.dtype, single: Path, out: Path) -> None:
    """Packed or narrow weights are refused by the tensor's name, though the config says nothing of them."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[new] = tensors.pop(old).to(dtype)

    message = refuse(copy(single, out, edit_tensors(change)), out)
    assert f"already quantized (tensor {new})" in message


# --- options


@pytest.mark.parametrize(
    ("device", "says"),
    [("gpu", "unknown device 'gpu'"), ("cpu:x", "unknown device 'cpu:x'"), ("mps", "unknown")],
)
def test_unknown_device(device: str, says: str, single: Path, out: Path) -> None:
    """A device that is neither cpu nor cuda is refused with the two that are."""
    message = refuse(single, out, "fp8-dynamic", "--device", device)
    assert says in message
    assert "--device cpu" in message


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:99"])
def test_cuda_where_there_is_none(device: str, single: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--device cuda` on a machine without CUDA is refused with `--device cpu` as the remedy."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = refuse(single, out, "fp8-dynamic", "--device", device)
    assert "no CUDA device" in message
    assert "--device cpu" in message


@pytest.mark.parametrize("size", ["nan", "inf", "0", "-1"])
def test_shard_size_that_is_none(size: str, single: Path, out: Path) -> None:
    """A shard size that is no positive number is refused."""
    assert "shard" in refuse(single, out, "fp8-dynamic", "--max-shard-size", size)


@pytest.mark.parametrize("count", [0, -1])
def test_batch_of_no_tokens(count: int, single: Path, token_rows: Path, out: Path) -> None:
    """A forward pass of no tokens is refused."""
    message = refuse(single, out, "nvfp4", "--text", token_rows, "--tokens-per-batch", count)
    assert "tokens" in message


# --- the output


def make_file(out: Path) -> None:
    out.write_text("mine", encoding="utf-8")


def make_directory(out: Path) -> None:
    out.mkdir()
    (out / "mine.txt").write_text("mine", encoding="utf-8")


def make_dangling(out: Path) -> None:
    out.symlink_to(out.parent / "nowhere")


@pytest.mark.parametrize("make", [make_file, make_directory, Path.mkdir, make_dangling])
def test_output_exists(make: Callable[[Path], None], single: Path, out: Path) -> None:
    """An output that exists, as a file, a directory or a dangling link, is refused and left alone."""
    make(out)
    before = (out.is_symlink(), out.is_file() and out.read_bytes(), out.is_dir() and sorted(out.iterdir()))
    message = message_of(invoke(single, out))
    assert f"{out}: the output exists already." in message
    assert "Remove it or choose another -o." in message
    assert before == (out.is_symlink(), out.is_file() and out.read_bytes(), out.is_dir() and sorted(out.iterdir()))
    assert not os.path.lexists(partial_of(out))
    assert not (out.parent / "nowhere").exists()


def test_output_below_a_file(single: Path, out: Path) -> None:
    """An output whose parent is a file cannot be written, and the message says where."""
    make_file(out)
    message = message_of(invoke(single, out / "below"))
    assert str(out) in message
    assert out.read_text(encoding="utf-8") == "mine"


def test_leftovers_of_a_killed_run(single: Path, out: Path) -> None:
    """What a killed run left in OUT.partial is removed, and the run succeeds without a trace of it."""
    stale = partial_of(out)
    (stale / "deep" / "er").mkdir(parents=True)
    (stale / "deep" / "er" / "old.txt").write_text("old", encoding="utf-8")
    (stale / LOCK_NAME).touch()
    (stale / "model-00001-of-00009.safetensors").write_bytes(b"half")
    (stale / "link").symlink_to(single)
    assert invoke(single, out).exit_code == 0
    assert not stale.exists()
    assert (single / "config.json").is_file()
    assert {path.name for path in out.iterdir()} == {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "snugfit-recipe.yaml",
        "snugfit-record.json",
    }


@pytest.mark.parametrize("link", [False, True], ids=["directory", "link"])
def test_a_partial_that_is_not_ours(link: bool, single: Path, out: Path) -> None:
    """A directory OUT.partial that no run of ours made, or a link of that name, is refused and keeps its files."""
    home = out.parent / "home" if link else partial_of(out)
    home.mkdir()
    (home / "precious.txt").write_text("mine", encoding="utf-8")
    if link:
        partial_of(out).symlink_to(home)
    result = invoke(single, out)
    assert (home / "precious.txt").is_file()
    assert str(partial_of(out)) in message_of(result)
    assert not out.exists()


@pytest.fixture
def held(out: Path) -> Iterator[Path]:
    """OUT.partial as another run that is busy with it holds it."""
    partial = partial_of(out)
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    handle = os.open(partial / LOCK_NAME, os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)
    yield partial
    os.close(handle)


def test_two_runs_at_once(held: Path, single: Path, out: Path) -> None:
    """While another run writes the same output, a second is refused and touches nothing of the first."""
    message = message_of(invoke(single, out))
    assert f"{held}: another run is writing this. Wait for it." in message
    assert not out.exists()
    assert (held / "model.safetensors").read_bytes() == b"half"


@pytest.mark.parametrize("recipe", ["fp8-dynamic", "nvfp4"])
def test_interrupted(recipe: str, single: Path, token_rows: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C before the first layer is done leaves nothing, says so, and is exit code 130."""
    real, seen = snugfit.quantization.run._write, []

    def write_some(*arguments: Any) -> Any:
        seen.append(partial_of(out).is_dir())
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(snugfit.quantization.run, "_write", write_some)
    message = message_of(invoke(single, out, recipe, "--text", token_rows), code=130)
    assert "nothing was written" in message
    assert all(seen)
    assert list(out.parent.iterdir()) == []


def test_full_disk(single: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up ends the run with the system's words and leaves nothing."""

    def fail(*arguments: Any) -> Any:
        assert arguments
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(snugfit.quantization.run, "_write", fail)
    assert os.strerror(errno.ENOSPC) in refuse(single, out)


def test_our_own_defects_lose_nothing(single: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception that is not the user's fault passes through with its traceback, and what was done stays."""

    def fail(*arguments: Any) -> Any:
        raise ZeroDivisionError(len(arguments))

    monkeypatch.setattr(snugfit.quantization.quantize, "_write_other_files", fail)
    result = invoke(single, out)
    assert isinstance(result.exception, ZeroDivisionError)
    assert list(out.parent.iterdir()) == [partial_of(out)]
    assert units_done(partial_of(out)) == 4
