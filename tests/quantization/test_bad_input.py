"""Bad input: exit code 2, one message with place, remedy and stable code, and nothing written.

Every case damages a copy of a tiny model, or asks the command for something impossible, and runs it in-process.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import snugfit.quantization.layer.write
import snugfit.quantization.quantize
from helpers.errors import failed_with
from helpers.refusals import add_codes
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


ABOVE = ("layers ", "this run will need")


def message_of(result: Any, exit_code: int = 2) -> str:
    """The one message on stderr of a refused run; the estimate and the progress bar may be printed before it."""
    assert result.exit_code == exit_code, (result.exit_code, result.stderr, repr(result.exception))
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.strip() and not line.startswith(ABOVE)]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("snugfit: ")
    return str(lines[0])


def refuse(
    model: Path, out: Path, code: str, *named: object, recipe: str = "fp8-dynamic", options: Sequence[object] = ()
) -> str:
    """The message of a run that must be refused with this code, name all of `named`, and leave nothing behind."""
    before = {path: path.read_bytes() for path in model.rglob("*") if path.is_file()} if model.is_dir() else {}
    result = invoke(model, out, recipe, *options)
    message = message_of(result)
    assert failed_with(result, code, *named)
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
    """A model that does not exist is refused with its path."""
    refuse(out.parent / "missing", out, "model-not-found", out.parent / "missing")


def test_truncated_file(single: Path, out: Path) -> None:
    """A weight file cut short is refused with the file, a tensor, and the size that the file has."""
    model = copy(single, out, lambda model: tail_cut(model / SINGLE_NAME))
    file = model / SINGLE_NAME
    refuse(model, out, "file-damaged", f"{file}: ", "tensor model.", file.stat().st_size)


def test_truncated_shard(sharded: Path, out: Path) -> None:
    """One shard of several that is cut short is refused with its own name."""
    model = copy(sharded, out, lambda model: tail_cut(first_shard(model)))
    refuse(model, out, "file-damaged", f"{first_shard(model)}: ", "tensor ")


@pytest.mark.parametrize("size", [0, 5, 100])
def test_file_that_ends_in_its_header(size: int, single: Path, out: Path) -> None:
    """A weight file that ends before its header does is refused with its name."""
    model = copy(single, out, lambda model: os.truncate(model / SINGLE_NAME, size))
    refuse(model, out, "header-invalid", f"{model / SINGLE_NAME}: ")


def test_missing_shards(sharded: Path, out: Path) -> None:
    """Shards that the index names and the directory lacks are counted and named."""
    model = copy(sharded, out, lambda model: first_shard(model).unlink())
    total = int(first_shard(sharded).stem[-5:])
    refuse(model, out, "weights-missing", f"{model}: ", f"1 of {total}", first_shard(sharded).name, INDEX_NAME)


@pytest.mark.parametrize(
    "place",
    ["../outside.safetensors", "/outside.safetensors", "sub/model.safetensors", "..\\x.safetensors", "model.bin", ".."],
)
def test_index_that_points_outside(place: str, sharded: Path, out: Path) -> None:
    """An index entry that is not a safetensors file of this directory is refused, even if such a file exists."""

    def spoil(model: Path) -> None:
        (model / "sub").mkdir()
        for file in (model / "sub" / "model.safetensors", model.parent / "outside.safetensors", model / "model.bin"):
            shutil.copyfile(first_shard(model), file)
        edit_index(lambda index: index["weight_map"].update({Q1: place}))(model)

    model = copy(sharded, out, spoil)
    refuse(model, out, "index-invalid", f"{model / INDEX_NAME}: ", Q1, repr(place))


def test_index_and_shards_disagree(sharded: Path, out: Path) -> None:
    """An index that sends a tensor to another shard than the one that holds it is refused with both."""
    last = max(sharded.glob("model-*.safetensors")).name
    spoil = edit_index(lambda index: index["weight_map"].update({"model.embed_tokens.weight": last}))
    model = copy(sharded, out, spoil)
    refuse(model, out, "index-invalid", f"{model / INDEX_NAME}: ", "model.embed_tokens.weight", last)


def test_index_names_a_tensor_that_no_shard_has(sharded: Path, out: Path) -> None:
    """An index with a tensor of a layer that no shard holds is refused with the tensor's name."""
    shard, name = first_shard(sharded).name, "model.layers.0.mlp.up_proj.bias"
    model = copy(sharded, out, edit_index(lambda index: index["weight_map"].update({name: shard})))
    refuse(model, out, "index-invalid", f"{model / INDEX_NAME}: ", name, shard)


def test_two_shards_with_one_tensor(sharded: Path, out: Path) -> None:
    """A tensor that two shards hold is refused with both files."""

    def spoil(model: Path) -> None:
        shutil.copyfile(first_shard(model), model / "more.safetensors")
        edit_index(lambda index: index["weight_map"].update({"x": "more.safetensors"}))(model)

    refuse(copy(sharded, out, spoil), out, "tensor-duplicate", "more.safetensors: ", first_shard(sharded).name)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b'{"weight_map": 3}', b"\xff\xff", b"[" * 100_000], ids=lambda c: repr(c[:20])
)
def test_index_without_a_weight_map(content: bytes, sharded: Path, out: Path) -> None:
    """An index without a readable weight_map is refused with its name."""
    model = copy(sharded, out, write(INDEX_NAME, content))
    refuse(model, out, "index-invalid", f"{model / INDEX_NAME}: ")


@pytest.mark.parametrize(
    "header",
    [b"\x00" * 64, b"{" * 64, b"\xff" * 64, b"[]      ", b"7       ", b'{"a": 3}', b'{"a": {}}', b"[" * 100_000],
    ids=lambda header: repr(header[:20]),
)
def test_garbage_header(header: bytes, single: Path, out: Path) -> None:
    """A header that is not a table of tensors is refused with its file."""
    content = struct.pack("<Q", len(header)) + header + b"\x00" * 64
    model = copy(single, out, write(SINGLE_NAME, content))
    refuse(model, out, "header-invalid", f"{model / SINGLE_NAME}: ")


def test_header_longer_than_any(single: Path, out: Path) -> None:
    """A file of another kind, in which the header's length would be absurd, is refused."""
    model = copy(single, out, write(SINGLE_NAME, b"PK\x03\x04" + b"\xff" * 1000))
    refuse(model, out, "header-invalid", f"{model / SINGLE_NAME}: ")


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
    """An entry whose offsets, shape and dtype contradict each other is refused with its file."""
    model = copy(single, out, set_entry(UP1, **values))
    refuse(model, out, "header-invalid", f"{model / SINGLE_NAME}: ")


def test_offsets_beyond_the_file(single: Path, out: Path) -> None:
    """Offsets that agree with the shape but are behind the file's end are refused with the tensor's name."""
    model = copy(single, out, set_entry(UP1, data_offsets=[10**12, 10**12 + 128 * 64 * 2]))
    refuse(model, out, "file-damaged", f"{model / SINGLE_NAME}: ", UP1)


def test_overlapping_tensors(single: Path, out: Path) -> None:
    """Two tensors on the same bytes are refused, as safetensors itself does."""

    def overlap(header: dict[str, Any]) -> None:
        header[UP1]["data_offsets"] = header[UP1.replace("up_proj", "gate_proj")]["data_offsets"]

    model = copy(single, out, edit_header(overlap))
    refuse(model, out, "header-invalid", f"{model / SINGLE_NAME}: ")


def test_bytes_of_no_tensor(single: Path, out: Path) -> None:
    """Bytes behind the last tensor are refused, as safetensors itself does."""
    model = copy(single, out, lambda model: os.truncate(model / SINGLE_NAME, (model / SINGLE_NAME).stat().st_size + 8))
    refuse(model, out, "header-invalid", f"{model / SINGLE_NAME}: ")


def test_name_that_cannot_be_written(single: Path, out: Path) -> None:
    """A tensor name with half a surrogate pair, which no file can hold, is refused."""
    model = copy(single, out, edit_header(lambda header: header.update({"a\ud800": header.pop("lm_head.weight")})))
    refuse(model, out, "header-invalid", f"{model / SINGLE_NAME}: ")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_only(name: str, single: Path, out: Path) -> None:
    """A directory with pickled weights only is refused; the error says what to do instead."""
    model = copy(single, out, weights_as(name))
    refuse(model, out, "weights-unsafe", f"{model}: ", name, "safetensors")


def test_no_weights(single: Path, out: Path) -> None:
    """A directory without any weights is refused; the error lists the names that a model could have."""
    model = copy(single, out, lambda model: (model / SINGLE_NAME).unlink())
    refuse(model, out, "weights-missing", f"{model}: ", SINGLE_NAME, INDEX_NAME)


def test_missing_config(single: Path, out: Path) -> None:
    """A directory without config.json is refused."""
    model = copy(single, out, lambda model: (model / "config.json").unlink())
    refuse(model, out, "config-missing", f"{model}: ", "config.json")


@pytest.mark.parametrize(
    "content",
    [b"", b"{'a': 1}", b"\xff\xfe{}", b"[]", b"[" * 100_000],
    ids=["empty", "python", "bytes", "list", "deep"],
)
def test_config_without_a_json_object(content: bytes, single: Path, out: Path) -> None:
    """A config.json that does not hold a JSON object is refused with its name."""
    model = copy(single, out, write("config.json", content))
    refuse(model, out, "json-invalid", f"{model / 'config.json'}: ")


@pytest.mark.parametrize(
    ("values", "count"),
    [
        ({"num_local_experts": 8}, 8),
        ({"text_config": {"num_hidden_layers": 3, "n_routed_experts": 64}}, 64),
    ],
    ids=["experts", "nested"],
)
def test_experts_that_the_files_lack(values: dict[str, Any], count: int, single: Path, out: Path) -> None:
    """A config that states experts which the files do not have is refused, and not quantized as a dense model."""
    model = copy(single, out, edit_config(**values))
    refuse(model, out, "config-mismatch", f"{model}: ", f"{count} experts")


@pytest.mark.parametrize("kind", ["llama99", None, 7, [], {}], ids=str)
def test_unknown_architecture(kind: object, single: Path, out: Path) -> None:
    """A model_type that transformers does not know is refused with config.json and the value."""
    model = copy(single, out, edit_config(model_type=kind))
    refuse(model, out, "architecture-unknown", f"{model / 'config.json'}: ", repr(kind))


@pytest.mark.parametrize(
    ("values", "code", "named"),
    [
        ({"num_hidden_layers": 0}, "config-invalid", "num_hidden_layers"),
        ({"num_hidden_layers": "3"}, "config-invalid", "num_hidden_layers"),
        ({"vocab_size": "many"}, "config-invalid", "vocab_size"),
        ({"num_attention_heads": 3}, "architecture-unsupported", "heads"),
        ({"hidden_size": 32}, "config-mismatch", "model.embed_tokens.weight"),
        ({"intermediate_size": 64}, "config-mismatch", "model.layers.0.mlp."),
        ({"num_hidden_layers": 5}, "config-mismatch", "model.layers.3"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("recipe", ["nvfp4-four-over-six", "fp8-dynamic"])
def test_config_of_another_model(
    recipe: str, values: dict[str, Any], code: str, named: str, *, single: Path, token_rows: Path, out: Path
) -> None:
    """A config with impossible numbers, or with those of another model, is refused, whether or not samples are run."""
    model = copy(single, out, edit_config(**values))
    refuse(model, out, code, f"{model}", named, recipe=recipe, options=("--dataset", token_rows))


# --- the weights' values


@pytest.mark.parametrize(
    "recipe", ["fp8-dynamic", "int4-w4a16-absmax", "nvfp4a16-four-over-six", "nvfp4-four-over-six"]
)
@pytest.mark.parametrize(
    ("values", "counts"),
    [
        ({7: float("nan")}, ("1 NaN", "0 infinite", "4096")),
        ({0: float("inf"), 9: float("-inf"), 4095: float("nan")}, ("1 NaN", "2 infinite", "4096")),
    ],
    ids=["nan", "inf"],
)
def test_nan_and_inf_weights(
    recipe: str, values: dict[int, float], counts: tuple[str, ...], *, single: Path, token_rows: Path, out: Path
) -> None:
    """NaN and infinite weights are refused by every format, with file, tensor and their numbers."""
    model, data = copy(single, out, put(Q1, values)), ("--dataset", token_rows)
    refuse(model, out, "tensor-not-finite", f"{model / SINGLE_NAME}: ", Q1, *counts, recipe=recipe, options=data)


@pytest.mark.parametrize("recipe", ["fp8-dynamic", "nvfp4-four-over-six"])
@pytest.mark.parametrize(
    "name",
    ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight", "model.layers.1.input_layernorm.weight"],
)
def test_nan_in_tensors_that_stay(recipe: str, name: str, single: Path, token_rows: Path, out: Path) -> None:
    """A NaN in a tensor that is copied is refused as well, with the tensor's name."""
    model, data = copy(single, out, put(name, {3: float("nan")})), ("--dataset", token_rows)
    refuse(model, out, "tensor-not-finite", name, recipe=recipe, options=data)


@pytest.mark.parametrize(
    ("value", "code"), [(float("nan"), "tensor-not-finite"), (3e38, "activations-not-finite")], ids=["nan", "overflow"]
)
@pytest.mark.parametrize("recipe", ["nvfp4-four-over-six", "nvfp4-fp8-hybrid-four-over-six"])
def test_activations_that_are_not_finite(
    recipe: str, value: float, code: str, *, single: Path, token_rows: Path, out: Path
) -> None:
    """A norm whose NaN, or whose overflow, reaches calibrated inputs is refused; it never becomes a scale."""
    model = copy(single, out, put("model.layers.0.post_attention_layernorm.weight", {3: value}))
    refuse(model, out, code, "model.layers.0", recipe=recipe, options=("--dataset", token_rows))


@pytest.mark.parametrize(
    ("recipe", "norm", "module"),
    [
        ("nvfp4-four-over-six", "input_layernorm", "self_attn."),
        ("nvfp4-fp8-hybrid-four-over-six", "post_attention_layernorm", "mlp."),
    ],
)
def test_inputs_that_are_all_zero(
    recipe: str, norm: str, module: str, *, single: Path, token_rows: Path, out: Path
) -> None:
    """Calibrated inputs that are all zero give no scale and are refused with the module's name."""
    model = copy(single, out, fill(f"model.layers.0.{norm}.weight", 0.0))
    refuse(model, out, "amax-invalid", f"model.layers.0.{module}", recipe=recipe, options=("--dataset", token_rows))


def test_inputs_that_are_all_zero_without_activation_scales(single: Path, out: Path) -> None:
    """The same model is quantized by a recipe that measures no activations."""
    model = copy(single, out, fill("model.layers.1.input_layernorm.weight", 0.0))
    assert invoke(model, out, "nvfp4a16-four-over-six").exit_code == 0
    assert (out / SINGLE_NAME).is_file()


# --- the recipe


def test_unknown_recipe(single: Path, out: Path) -> None:
    """A recipe that is neither built in nor a file is refused with the nearest name."""
    named = "nvfp4-fp8-hybird", "nvfp4-fp8-hybrid", "`snugfit recipes`"
    refuse(single, out, "recipe-not-found", *named, recipe="nvfp4-fp8-hybird")


RULES = "name: x\nrules:\n"
BAD_RECIPES = {
    "split group": (
        RULES + "  - {role: q, format: nvfp4, scale_rule: four-over-six}\n  - {role: linear, format: fp8-dynamic}\n",
        ("recipe-splits-group", "model.layers.0.self_attn."),
    ),
    "a weight without a rule": (
        RULES + "  - {role: mlp, format: nvfp4, scale_rule: four-over-six}\n",
        ("recipe-rule-missing", "model.layers.0.self_attn."),
    ),
    "unknown key": (
        RULES + "  - {role: linear, formatt: nvfp4, format: keep}\n",
        ("recipe-invalid", "rules[0].formatt"),
    ),
    "output head": (
        RULES + "  - {role: [linear, lm_head], format: nvfp4, scale_rule: four-over-six}\n",
        ("recipe-not-quantizable", "lm_head"),
    ),
    "no YAML": ("name: [\n", ("yaml-invalid",)),
    "empty": ("", ("recipe-invalid",)),
    "control character": ("a\0b", ("yaml-invalid",)),
}


@pytest.mark.parametrize("case", BAD_RECIPES)
def test_bad_recipe(case: str, single: Path, token_rows: Path, out: Path) -> None:
    """A recipe file that is invalid, or does not fit the model, is refused with the file's name."""
    text, (code, *named) = BAD_RECIPES[case]
    file = out.parent / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    refuse(single, out, code, file, *named, recipe=str(file), options=("--dataset", token_rows))


def test_in_features_that_blocks_do_not_divide(make_tiny: MakeTiny, token_rows: Path, out: Path) -> None:
    """A weight whose in_features 16 does not divide is refused by NVFP4 with recipe, rule, tensor and shape."""
    model = make_tiny("llama", intermediate_size=72, num_hidden_layers=1)
    named = "recipe nvfp4", "rules[0]", "model.layers.0.mlp.down_proj.weight", "64", "72", "16"
    refuse(model, out, "recipe-shape", *named, recipe="nvfp4-four-over-six", options=("--dataset", token_rows))


# --- the dataset to calibrate on


def refuse_dataset(single: Path, out: Path, name: str, content: bytes, code: str, *named: object) -> None:
    """A run with a file of this content must be refused with this code and the file's name."""
    file = out.parent / name
    file.write_bytes(content)
    refuse(single, out, code, file, *named, recipe="nvfp4-four-over-six", options=("--dataset", file))


@pytest.mark.parametrize("content", [b"", b"a"], ids=["empty", "one token"])
def test_text_too_short(content: bytes, smollm2: Path, single: Path, out: Path) -> None:
    """An empty text, or one of a single token, is refused with the file's name."""

    def spoil(model: Path) -> None:
        for file in smollm2.glob("tokenizer*"):
            shutil.copy(file, model)

    refuse_dataset(copy(single, out, spoil), out, "a.txt", content, "dataset-too-small")


@pytest.mark.parametrize("name", ["rows.jsonl", "text.txt"])
def test_binary_text(name: str, single: Path, out: Path) -> None:
    """A file that is not UTF-8 is refused with its name, as text and as JSONL."""
    refuse_dataset(single, out, name, bytes(range(256)), "dataset-unreadable")


@pytest.mark.parametrize("recipe", ["nvfp4-four-over-six", "fp8-dynamic"])
def test_missing_dataset(recipe: str, single: Path, out: Path) -> None:
    """A file of samples that does not exist is refused with its name, also if the recipe needs no samples."""
    missing = out.parent / "nowhere.txt"
    refuse(single, out, "file-missing", f"{missing}: ", recipe=recipe, options=("--dataset", missing))


GOOD_LINE = b'{"input_ids": [3, 4, 5]}\n'


@pytest.mark.parametrize(
    "line",
    [
        b'{"input_ids": [3, 4\n',
        b"[" * 100_000 + b"\n",
        b"[3, 4]\n",
        b'{"texts": "a"}\n',
        b'{"input_ids": [3, -4]}\n',
        b'{"input_ids": "3 4"}\n',
    ],
    ids=["broken", "deep", "list", "other key", "negative", "string"],
)
def test_broken_line_of_jsonl(line: bytes, single: Path, out: Path) -> None:
    """A line that is not JSON, or has no sample, is refused with its number."""
    content = GOOD_LINE + b"\n" + line + GOOD_LINE
    refuse_dataset(single, out, "rows.jsonl", content, "dataset-invalid", f"{out.parent / 'rows.jsonl'}:3: ")


@pytest.mark.parametrize("content", [b"", b"\n \n", b'{"input_ids": [3]}\n{"input_ids": []}\n'])
def test_jsonl_without_rows(content: bytes, single: Path, out: Path) -> None:
    """A JSONL file without a row of two tokens is refused with its name."""
    refuse_dataset(single, out, "rows.jsonl", content, "dataset-too-small")


@pytest.mark.parametrize("token", [64, 10**12])
def test_token_beyond_the_vocabulary(token: int, single: Path, out: Path) -> None:
    """A token id that the model's vocabulary lacks is refused with both numbers."""
    content = GOOD_LINE + b'{"input_ids": [3, %d]}\n' % token
    refuse_dataset(single, out, "rows.jsonl", content, "token-out-of-range", token, "64")


def test_token_beyond_the_vocabulary_that_the_config_omits(single: Path, out: Path) -> None:
    """A token id beyond transformers' default vocabulary is refused if the config states no size."""

    def spoil(model: Path) -> None:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        del config["vocab_size"]
        (model / "config.json").write_text(json.dumps(config), encoding="utf-8")

    content = b'{"input_ids": [3, 1000000000000]}\n'
    refuse_dataset(copy(single, out, spoil), out, "rows.jsonl", content, "token-out-of-range", 10**12)


def test_text_without_a_tokenizer(single: Path, out: Path) -> None:
    """Text for a model without a tokenizer is refused with the model's path and both remedies."""
    file = out.parent / "a.txt"
    file.write_text("some text " * 50, encoding="utf-8")
    options = ("--dataset", file)
    refuse(
        single, out, "tokenizer-unusable", f"{single}: ", "`input_ids`", recipe="nvfp4-four-over-six", options=options
    )


@pytest.mark.parametrize("recipe", ["nvfp4-four-over-six", "fp8-dynamic"])
@pytest.mark.parametrize(
    ("option", "value"),
    [("--num-samples", 0), ("--num-samples", -1), ("--max-seq-length", 1), ("--max-seq-length", 0)],
)
def test_too_few_samples(option: str, value: int, recipe: str, *, single: Path, token_rows: Path, out: Path) -> None:
    """Fewer than one sample, or samples of less than two tokens, are refused with the option's name."""
    options = ("--dataset", token_rows, option, value)
    refuse(single, out, "option-invalid", f"snugfit: {option}: ", recipe=recipe, options=options)


# --- already quantized


@pytest.mark.parametrize("recipe", ["fp8-dynamic", "nvfp4a16-four-over-six", "int4-w4a16-absmax"])
@pytest.mark.parametrize("marked", [True, False], ids=["with config", "config stripped"])
def test_quantizing_twice(recipe: str, marked: bool, single: Path, out: Path) -> None:
    """The result of a run cannot be quantized again, even if someone removes its quantization_config."""
    model = out.parent / "once"
    assert invoke(single, model, recipe).exit_code == 0
    if not marked:
        edit_config(quantization_config=None)(model)
    message = refuse(model, out, "already-quantized", f"{model}: ", recipe=recipe)
    assert ("compressed-tensors" in message) is marked


@pytest.mark.parametrize(
    "values",
    [
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"text_config": {"num_hidden_layers": 3, "quantization_config": {"quant_method": "gptq"}}},
    ],
    ids=["plain", "text_config"],
)
def test_config_says_quantized(values: dict[str, Any], single: Path, out: Path) -> None:
    """A quantization_config without a reader is enough to refuse what holds any codes, wherever the config has it."""
    model = copy(single, out, edit_config(**values))
    add_codes(model)
    refuse(model, out, "quantization-unknown", "gptq", "config.json")


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
    """Packed or narrow weights are refused with the tensor's name, even if the config does not mention them."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[new] = tensors.pop(old).to(dtype)

    refuse(copy(single, out, edit_tensors(change)), out, "already-quantized", new)


# --- options


@pytest.mark.parametrize("device", ["gpu", "cpu:x", "mps"])
def test_unknown_device(device: str, single: Path, out: Path) -> None:
    """A device that is neither cpu nor cuda is refused with the option's name."""
    refuse(single, out, "option-invalid", "snugfit: --device: ", repr(device), options=("--device", device))


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:99"])
def test_cuda_on_a_machine_without_it(device: str, single: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--device cuda` on a machine without CUDA is refused, and `--device` is the remedy."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refuse(single, out, "device-unavailable", "snugfit: --device: ", "cpu", options=("--device", device))


@pytest.mark.parametrize("size", ["nan", "inf", "0", "-1"])
def test_shard_size_that_is_not_positive(size: str, single: Path, out: Path) -> None:
    """A shard size that is not a positive number is refused with the option's name."""
    refuse(single, out, "option-invalid", "snugfit: --max-shard-size: ", options=("--max-shard-size", size))


@pytest.mark.parametrize("recipe", ["nvfp4-four-over-six", "fp8-dynamic"])
@pytest.mark.parametrize("count", [0, -1])
def test_batch_of_no_tokens(count: int, recipe: str, single: Path, token_rows: Path, out: Path) -> None:
    """Batches of no tokens are refused with the option's name, whether or not the recipe runs samples."""
    options = ("--dataset", token_rows, "--tokens-per-batch", count)
    refuse(single, out, "option-invalid", "snugfit: --tokens-per-batch: ", recipe=recipe, options=options)


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
    """An output that exists, as a file, a directory or a dangling link, is refused and not changed."""
    make(out)
    before = (out.is_symlink(), out.is_file() and out.read_bytes(), out.is_dir() and sorted(out.iterdir()))
    result = invoke(single, out)
    assert message_of(result).startswith(f"snugfit: {out}: ")
    assert failed_with(result, "output-exists", "`--output-dir`")
    assert before == (out.is_symlink(), out.is_file() and out.read_bytes(), out.is_dir() and sorted(out.iterdir()))
    assert not os.path.lexists(partial_of(out))
    assert not (out.parent / "nowhere").exists()


def test_output_below_a_file(single: Path, out: Path) -> None:
    """An output whose parent is a file cannot be written; the error names the file."""
    make_file(out)
    result = invoke(single, out / "below")
    message_of(result)
    assert failed_with(result, "output-not-writable", out)
    assert out.read_text(encoding="utf-8") == "mine"


def test_leftovers_of_a_killed_run(single: Path, out: Path) -> None:
    """Files that a killed run left in OUT.partial are removed, and the run succeeds without them."""
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
def test_a_partial_directory_of_someone_else(link: bool, single: Path, out: Path) -> None:
    """A directory OUT.partial that snugfit did not make, or a link of that name, is refused and keeps its files."""
    home = out.parent / "home" if link else partial_of(out)
    home.mkdir()
    (home / "precious.txt").write_text("mine", encoding="utf-8")
    if link:
        partial_of(out).symlink_to(home)
    result = invoke(single, out)
    assert (home / "precious.txt").is_file()
    assert message_of(result).startswith(f"snugfit: {partial_of(out)}: ")
    assert failed_with(result, "output-exists")
    assert not out.exists()


@pytest.fixture
def held(out: Path) -> Iterator[Path]:
    """OUT.partial while another run writes it and holds its lock."""
    partial = partial_of(out)
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    handle = os.open(partial / LOCK_NAME, os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)
    yield partial
    os.close(handle)


def test_two_runs_at_once(held: Path, single: Path, out: Path) -> None:
    """While another run writes the same output, a second is refused and changes nothing of the first."""
    result = invoke(single, out)
    assert message_of(result).startswith(f"snugfit: {held}: ")
    assert failed_with(result, "output-busy")
    assert not out.exists()
    assert (held / "model.safetensors").read_bytes() == b"half"


@pytest.mark.parametrize("recipe", ["fp8-dynamic", "nvfp4-four-over-six"])
def test_interrupted(recipe: str, single: Path, token_rows: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C before the first layer is done leaves nothing, says so, and is exit code 130."""
    real, seen = snugfit.quantization.layer.write._write, []

    def write_some(*arguments: Any) -> Any:
        seen.append(partial_of(out).is_dir())
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(snugfit.quantization.layer.write, "_write", write_some)
    message = message_of(invoke(single, out, recipe, "--dataset", token_rows), exit_code=130)
    assert "nothing was written" in message
    assert all(seen)
    assert list(out.parent.iterdir()) == []


def test_full_disk(single: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up ends the run with the system's message and leaves nothing."""

    def fail(*arguments: Any) -> Any:
        assert arguments
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(snugfit.quantization.layer.write, "_write", fail)
    refuse(single, out, "system-error", os.strerror(errno.ENOSPC))


def test_a_defect_of_snugfit_loses_nothing(single: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception that is not the user's fault keeps its traceback, and finished units stay."""

    def fail(*arguments: Any) -> Any:
        raise ZeroDivisionError(len(arguments))

    monkeypatch.setattr(snugfit.quantization.quantize, "_write_other_files", fail)
    result = invoke(single, out)
    assert isinstance(result.exception, ZeroDivisionError)
    assert list(out.parent.iterdir()) == [partial_of(out)]
    assert units_done(partial_of(out)) == 4
