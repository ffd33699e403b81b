"""Prediction layers in a file that no index names: taken in where they belong to the model, else their loss is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor

from conftest import MakeTiny
from helpers.fp8_sources import as_fp8, dequantized
from helpers.hub_server import files_of, serve
from helpers.tiny_families import all_tensors, random_rows, write_rows
from helpers.tiny_mixtures import make_mixture, rewrite
from snugfit.inspection.inspect import inspect
from snugfit.model.layout import read_layout
from snugfit.quantization.quantize import plan_quantization, quantize
from snugfit.storage.checkpoint import INDEX_NAME, open_directory

HEAD = {"mtp.fc.weight": (64, 128), "mtp.norm.weight": (64,), "mtp.layers.0.mlp.gate_proj.weight": (96, 64)}
STATED: dict[str, object] = {"num_nextn_predict_layers": 1}


def numbers(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def add(model: Path, tensors: dict[str, Tensor], config: dict[str, object], name: str = "mtp.safetensors") -> Path:
    """Put a loose file into a model, and keys into its config."""
    save_file(tensors, model / name, {"format": "pt"})
    file = model / "config.json"
    found = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(found | config), encoding="utf-8")
    return model


def head() -> dict[str, Tensor]:
    return {name: numbers(shape) for name, shape in HEAD.items()}


@pytest.mark.parametrize("shard", ["60KB", "5GB"], ids=["index", "one file"])
@pytest.mark.parametrize("name", ["mtp.safetensors", "model-extra.safetensors", "nextn_layer.safetensors"])
def test_a_loose_head_is_part_of_the_result(name: str, shard: str, make_tiny: MakeTiny, tmp_path: Path) -> None:
    """A file beside the weights with nothing but mtp.* is copied into the result's shards, and its index names it."""
    source = add(make_tiny("llama", max_shard_size=shard), head(), STATED, name)
    record = quantize(source, "fp8-dynamic", output_dir=tmp_path / "out", max_shard_size=60_000)
    index = json.loads((tmp_path / "out" / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"]
    written = all_tensors(tmp_path / "out")
    for tensor, values in head().items():
        assert torch.equal(written[tensor], values)
        assert (tmp_path / "out" / index[tensor]).is_file()
    assert not (tmp_path / "out" / name).exists()
    assert name not in record.left_out
    ignored = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert {"mtp.fc", "mtp.layers.0.mlp.gate_proj"} <= set(ignored["ignore"])
    shown = inspect(source)
    assert shown.prediction_parameters == sum(values.numel() for values in head().values())
    for remarks in (shown.remarks, plan_quantization(source, "fp8-dynamic").notes):
        assert any(name in remark and "taken in" in remark for remark in remarks)
        assert not any("lost" in remark for remark in remarks)
    assert read_layout(read_layout(source).checkpoint).checkpoint.shards == read_layout(source).checkpoint.shards


def collide(model: Path) -> dict[str, Tensor]:
    name = next(iter(all_tensors(model)))
    return head() | {name: numbers((4, 4))}


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (lambda _model: head(), {}),
        (lambda _model: head(), {"num_nextn_predict_layers": 0}),
        (collide, STATED),
        (lambda _model: head() | {"model.layers.0.self_attn.new.weight": numbers((4, 4))}, STATED),
        (lambda _model: head() | {"adapter.weight": numbers((4, 4))}, STATED),
    ],
    ids=["not stated", "none stated", "collides", "of another layer", "of something else"],
)
def test_other_loose_files_are_lost_and_said(
    make: Callable[[Path], dict[str, Tensor]], config: dict[str, object], make_tiny: MakeTiny
) -> None:
    """A file whose tensors collide, or are not all of prediction layers that config.json states, is said to be lost."""
    source = make_tiny("llama")
    before = open_directory(source).tensors
    add(source, make(source), config)
    layout = read_layout(source)
    assert layout.checkpoint.tensors == before
    assert not layout.taken_in
    for remarks in (inspect(source).remarks, plan_quantization(source, "fp8-dynamic").notes):
        assert any("mtp.safetensors" in remark and "lost" in remark for remark in remarks)


@pytest.mark.parametrize("damage", [b"", b"x", b"\xff" * 64])
def test_a_damaged_loose_file_is_no_error(damage: bytes, make_tiny: MakeTiny) -> None:
    """A loose file that cannot be read stops nothing, as no index names it; its loss is said."""
    source = add(make_tiny("llama"), head(), STATED)
    (source / "mtp.safetensors").write_bytes(damage)
    notes = plan_quantization(source, "fp8-dynamic").notes
    assert any("mtp.safetensors" in note and "lost" in note for note in notes)


def test_an_fp8_layer_behind_the_last_one_is_taken_in(tmp_path: Path) -> None:
    """DeepSeek's prediction layer, in FP8 and in a file of its own, gives the result that it gives as a shard."""
    source = as_fp8(make_mixture("deepseek_v3", tmp_path / "bf16", wide=True), tmp_path / "fp8", "hf-block")
    rows = write_rows(tmp_path / "rows.jsonl", random_rows([16] * 2))
    quantize(source, "nvfp4-moe", output_dir=tmp_path / "whole", dataset=[rows], min_tokens_per_expert=0)
    tensors = all_tensors(source)
    predicted = {name: tensor for name, tensor in tensors.items() if ".layers.2." in name}
    rewrite(source, {name: tensor for name, tensor in tensors.items() if name not in predicted})
    add(source, predicted, {})
    assert ".layers.2.mlp.experts.0.up_proj.weight" in "".join(dequantized(source))
    quantize(source, "nvfp4-moe", output_dir=tmp_path / "loose", dataset=[rows], min_tokens_per_expert=0)
    whole, loose = all_tensors(tmp_path / "whole"), all_tensors(tmp_path / "loose")
    assert whole.keys() == loose.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor.view(torch.uint8), loose[name].view(torch.uint8)), name
    config = (tmp_path / "whole" / "config.json").read_bytes()
    assert (tmp_path / "loose" / "config.json").read_bytes() == config


def test_a_part_of_a_layer_is_not_taken_in(tmp_path: Path) -> None:
    """A loose file that lacks experts of its layer would make a model that works a broken one: it is lost instead."""
    source = make_mixture("deepseek_v3", tmp_path / "model", wide=True)
    tensors = all_tensors(source)
    predicted = {name: tensor for name, tensor in tensors.items() if ".layers.2." in name}
    rewrite(source, {name: tensor for name, tensor in tensors.items() if name not in predicted})
    add(source, {name: tensor for name, tensor in predicted.items() if ".experts.3." not in name}, {})
    layout = read_layout(source)
    assert not layout.blockers
    assert not layout.taken_in


def test_a_loose_file_on_the_hub(make_tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The header of a loose file on the Hub is read over the network, and its tensors by range."""
    source = add(make_tiny("llama", max_shard_size="60KB"), head(), STATED)
    with serve(files_of(source)) as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        url = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        quantize("org/name", "fp8-dynamic", output_dir=tmp_path / "out")
        huggingface_hub.close_session()
    written = all_tensors(tmp_path / "out")
    assert all(torch.equal(written[tensor], values) for tensor, values in head().items())
