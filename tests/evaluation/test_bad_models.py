"""Bad models of `eval`: exit code 2, a message with code and place, no work, nothing written."""

from __future__ import annotations

import json
import os
import shutil
import string
from pathlib import Path
from typing import Any

import pytest

import snugfit.storage.hub
from helpers.refusals import add_codes, copy, evaluate, refuse, run
from helpers.tiny_tokenizer import add_tokenizer
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
from snugfit.quantization.quantize import quantize
from snugfit.storage.checkpoint import INDEX_NAME, SINGLE_NAME

# --- the checkpoints


def make_empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def quantized_by(method: str) -> Spoil:
    def spoil(model: Path) -> None:
        edit_config(quantization_config={"quant_method": method, "bits": 4})(model)
        add_codes(model)

    return spoil


# what is done to a model -> the code, and what the message names besides the model
NO_MODELS: list[Any] = [
    pytest.param(shutil.rmtree, "model-not-found", "", id="missing"),
    pytest.param(make_empty, "config-missing", "", id="empty"),
    pytest.param(lambda m: (m / "config.json").unlink(), "config-missing", "", id="no config"),
    pytest.param(lambda m: (m / SINGLE_NAME).unlink(), "weights-missing", SINGLE_NAME, id="no weights"),
    pytest.param(weights_as("pytorch_model.bin"), "weights-unsafe", "safetensors", id="pickles"),
    pytest.param(lambda m: tail_cut(m / SINGLE_NAME), "file-damaged", f"/{SINGLE_NAME}: ", id="cut"),
    pytest.param(lambda m: os.truncate(m / SINGLE_NAME, 5), "header-invalid", f"/{SINGLE_NAME}: ", id="header cut"),
    pytest.param(write("config.json", b"{"), "json-invalid", "/config.json: ", id="broken config"),
    pytest.param(edit_config(model_type="llama99"), "architecture-unknown", "/config.json: ", id="unknown"),
    pytest.param(edit_config(hidden_size=32), "config-mismatch", "", id="other config"),
    pytest.param(edit_config(num_hidden_layers=5), "config-mismatch", "", id="few layers"),
    pytest.param(quantized_by("gptq"), "quantization-unknown", "'gptq'", id="gptq"),
    pytest.param(quantized_by("awq"), "quantization-unknown", "'awq'", id="awq"),
    pytest.param(quantized_by("bitsandbytes"), "quantization-unknown", "'bitsandbytes'", id="bitsandbytes"),
    pytest.param(edit_config(quantization_config=[4]), "quantization-invalid", "/config.json: ", id="no mapping"),
    pytest.param(write("hf_quant_config.json", b"{"), "json-invalid", "/hf_quant_config.json: ", id="hf_quant"),
]


@pytest.mark.parametrize("role", ["candidate", "reference"])
@pytest.mark.parametrize(("spoil", "code", "names"), NO_MODELS)
def test_models_that_cannot_be_read(
    spoil: Spoil, code: str, names: str, *, role: str, llama: Path, good: Path, text: Path, out: Path
) -> None:
    """What is not a model, is broken or has no reader is refused by its path, as candidate and as reference."""
    model = copy(llama, out.parent / "model", spoil)
    pair = (model, good) if role == "reference" else (good, model)
    message = refuse(out, code, pair[1], "--reference", pair[0], "--dataset", text, "--context", 64)
    assert names in message
    assert str(model) in message


@pytest.mark.parametrize("role", ["candidate", "reference"])
def test_hub_ids(role: str, *, good: Path, text: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The id of a model on the Hub is refused before anything is downloaded."""

    def download(*_: Any, **__: Any) -> Any:
        pytest.fail("something was downloaded")

    monkeypatch.setattr(snugfit.storage.hub, "open_hub", download)
    pair = ("org/model", good) if role == "reference" else (good, "org/model@main")
    message = refuse(out, "option-invalid", pair[1], "--reference", pair[0], "--dataset", text, "--context", 64)
    assert message.startswith("snugfit: org/model")


def test_candidate_that_is_a_file(llama: Path, good: Path, text: Path, out: Path) -> None:
    """A weight file in the place of its directory is refused by its path."""
    arguments = [good / SINGLE_NAME, "--reference", llama, "--dataset", text, "--context", 64]
    assert f"{good / SINGLE_NAME}: " in refuse(out, "model-not-found", *arguments)


def test_reference_that_is_a_weight_file(llama: Path, good: Path, text: Path, out: Path) -> None:
    """As reference it is not a stored reference, and the remedy is the option's."""
    arguments = [good, "--reference", llama / SINGLE_NAME, "--dataset", text, "--context", 64]
    message = refuse(out, "reference-invalid", *arguments)
    assert f"{llama / SINGLE_NAME}: " in message
    assert "`--reference`" in message


@pytest.mark.parametrize(
    ("spoil", "code", "names"),
    [
        (lambda model: tail_cut(first_shard(model)), "file-damaged", "model-00001-of-"),
        (lambda model: first_shard(model).unlink(), "weights-missing", "model-00001-of-"),
        (edit_index(lambda index: index.pop("weight_map")), "index-invalid", "weight_map"),
    ],
    ids=["cut", "missing", "index"],
)
def test_one_bad_shard(
    spoil: Spoil, code: str, names: str, *, llama: Path, sharded: Path, text: Path, out: Path
) -> None:
    """One bad file of several is refused by its own name before any model is run."""
    model = copy(sharded, out.parent / "model", spoil)
    message = refuse(out, code, model, "--reference", llama, "--dataset", text, "--context", 64)
    assert str(model) in message
    assert names in message
    assert (model / INDEX_NAME).is_file()


def test_quantized_weights_that_the_config_hides(llama: Path, token_rows: Path, text: Path, out: Path) -> None:
    """A quantized checkpoint that lost its quantization_config is refused by a module's name."""
    quantize(llama, "nvfp4-four-over-six", output_dir=out.parent / "model", dataset=[token_rows], device="cpu")
    edit_config(quantization_config=None)(out.parent / "model")
    arguments = [out.parent / "model", "--reference", llama, "--dataset", text, "--context", 64]
    message = refuse(out, "quantization-invalid", *arguments)
    assert "model.layers." in message
    assert str(out.parent / "model") in message


def test_quantized_with_a_broken_scale(llama: Path, token_rows: Path, text: Path, out: Path) -> None:
    """A scale that is not finite is refused with its name and value, though late, and leaves nothing."""
    name = "model.layers.1.self_attn.q_proj.weight_global_scale"
    quantize(llama, "nvfp4-four-over-six", output_dir=out.parent / "model", dataset=[token_rows], device="cpu")
    put(name, {0: float("nan")})(out.parent / "model")
    arguments = [out.parent / "model", "--reference", llama, "--dataset", text, "--context", 64, "--max-chunks", 1]
    message = refuse(out, "scale-invalid", *arguments, worked=True)
    assert name in message
    assert " nan" in message


def test_one_checkpoint_twice(good: Path, text: Path, out: Path) -> None:
    """A checkpoint named twice, once through a link, is refused."""
    (out.parent / "link").symlink_to(good)
    message = refuse(out, "option-invalid", good, out.parent / "link", "--dataset", text, "--context", 64)
    assert str(out.parent / "link") in message


def test_no_checkpoint(text: Path, out: Path) -> None:
    """Nothing to evaluate is refused."""
    assert "MODELS: " in refuse(out, "option-missing", "--dataset", text, "--context", 64)


# --- models that do not belong together


def test_vocabularies_differ(bare: Path, wide: Path, token_rows: Path, out: Path) -> None:
    """Models of different vocabularies are refused with both numbers."""
    message = refuse(out, "models-mismatch", wide, "--reference", bare, "--dataset", token_rows)
    assert f"{bare.name} 64" in message
    assert f"{wide.name} 80" in message


def test_tokenizers_differ(llama: Path, text: Path, out: Path) -> None:
    """A candidate whose tokenizer makes other tokens is refused by its path."""
    model = add_tokenizer(copy(llama, out.parent / "model"), string.ascii_letters[::-1])
    arguments = [model, "--reference", llama, "--dataset", text, "--context", 64]
    assert f"{model}: " in refuse(out, "models-mismatch", *arguments)


def test_only_the_candidate_has_a_tokenizer(bare: Path, good: Path, text: Path, out: Path) -> None:
    """The reference cuts the texts: without a tokenizer of its own it is refused by its path."""
    arguments = [good, "--reference", bare, "--dataset", text, "--context", 64]
    assert f"{bare}: " in refuse(out, "tokenizer-unusable", *arguments)


def test_rows_of_ids_need_no_tokenizer(bare: Path, good: Path, token_rows: Path) -> None:
    """Token ids are evaluated, though the candidate alone has a tokenizer, with which nothing is done."""
    result = evaluate(good, "--reference", bare, "--dataset", token_rows, "--json")
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b"\xff\xfe", b'{"version": "9", "model": 3}'], ids=repr)
@pytest.mark.parametrize("role", ["candidate", "reference"])
def test_tokenizer_that_is_broken(content: bytes, role: str, *, llama: Path, good: Path, text: Path, out: Path) -> None:
    """A tokenizer.json that cannot be read is refused by the model's path."""
    model = copy(llama, out.parent / "model", write("tokenizer.json", content))
    pair = (model, good) if role == "reference" else (good, model)
    arguments = [pair[1], "--reference", pair[0], "--dataset", text, "--context", 64]
    assert f"{model}: " in refuse(out, "tokenizer-unusable", *arguments)


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
    """NaN and overflow are not bad input: every token they reach is counted, and tables and plots are made."""
    model = copy(llama, out.parent / "model", spoil)
    pair = (model, good) if role == "reference" else (good, model)
    options = ["--dataset", text, "--context", "64,128", "--max-chunks", 2, "-o", out]
    result = evaluate(pair[1], "--reference", pair[0], *options, "--noise-floor", "all")
    assert result.exit_code == 0, (result.stderr, repr(result.exception))
    assert "NaN or infinite" in result.stdout
    record = json.loads((out / "eval.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    for measured in record["contexts"]:
        counts = {found["name"]: found["nonfinite"] for found in measured["models"]}
        assert counts[model.name] == measured["tokens"]
    assert "NaN or infinite" in (out / "eval.md").read_text(encoding="utf-8")
    assert run("compare", out, out, "--model-a", "model", "--model-b", "good").exit_code == 0
