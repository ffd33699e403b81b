"""The skeleton and the forward pass against transformers' own loading and forward."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from conftest import MakeTiny
from helpers.errors import raises
from helpers.run_model import stream_logits
from helpers.tiny_families import FAMILIES, all_tensors, load, random_rows
from snugfit.data.dataset import Dataset, make_dataset
from snugfit.model import layers
from snugfit.model.layout import read_layout
from snugfit.model.skeleton import build_skeleton


def logits_of(path: Path, rows: Dataset) -> list[Tensor]:
    parts: dict[int, list[Tensor]] = {}
    lengths: dict[int, int] = {}
    for batch, _, logits in stream_logits(path, rows, activations="none"):
        for place, row in enumerate(batch.rows):
            parts.setdefault(row, []).append(logits[place].float())
            lengths[row] = batch.lengths[place]
    return [torch.cat(parts[row])[: lengths[row]] for row in range(len(rows.samples))]


@pytest.mark.parametrize("family", FAMILIES)
def test_buffers_equal_a_full_load(family: str, make_tiny: MakeTiny) -> None:
    """Every buffer of the skeleton, persistent or not, has the value that transformers' own loading gives it."""
    path = make_tiny(family, **FAMILIES[family])
    skeleton = build_skeleton(read_layout(path))
    expected = dict(load(path).named_buffers())
    found = dict(skeleton.model.named_buffers())
    assert found.keys() == expected.keys()
    for name, buffer in expected.items():
        if name in skeleton.stored:
            continue  # read from the file
        assert found[name].device.type == "cpu"
        assert torch.equal(found[name], buffer), name
    assert all(parameter.device.type == "meta" for parameter in skeleton.model.parameters())


def test_forward_pass_is_exact_for_equal_shapes(make_tiny: MakeTiny) -> None:
    """With rows of one length in one batch, logits are those of transformers' forward bit for bit."""
    path = make_tiny("llama")
    rows = make_dataset(random_rows([64, 64, 64]), "random")
    with torch.no_grad():
        expected = load(path)(input_ids=torch.tensor(rows.samples), use_cache=False).logits.float()
    assert torch.equal(expected, torch.stack(logits_of(path, rows)))


def test_missing_layer_tensor_is_named(make_tiny: MakeTiny) -> None:
    """A decoder layer that lacks a tensor is refused with the name of the tensor."""
    skeleton = build_skeleton(read_layout(make_tiny("llama")))
    state = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in skeleton.layers[1].state_dict().items()}
    state.pop("mlp.up_proj.weight")
    with raises("weights-missing", where="model.layers.1") as caught:
        layers.resident_layer(skeleton, 1, state, torch.device("cpu"))
    assert "mlp.up_proj.weight" in caught.value.what


def test_tensor_left_without_data_is_an_error() -> None:
    """A module with a buffer still on the meta device is refused, and not run with undefined values."""
    module = nn.Linear(4, 4, bias=False)
    module.register_buffer("table", torch.empty(3, device="meta"), persistent=False)
    with raises("config-mismatch", where="here") as caught:
        layers.fill(module, {"weight": torch.zeros(4, 4)}, where="here")
    assert "table" in caught.value.what


def test_tied_head_is_found_under_either_name(make_tiny: MakeTiny) -> None:
    """A tied checkpoint stores one matrix; both the embeddings and the head get it."""
    layout = read_layout(make_tiny("llama", tie_word_embeddings=True))
    checkpoint = layout.checkpoint
    assert "lm_head.weight" not in checkpoint.tensors
    skeleton = build_skeleton(layout)
    for head in (False, True):
        weights = layers.outer_weights(skeleton, checkpoint, head=head)
        assert weights["lm_head.weight"] is weights["model.embed_tokens.weight"]


@pytest.mark.parametrize("renamed", [{}, {".mlp.": ".feed.", "q_proj": "query"}], ids=["same", "renamed"])
def test_names_inside_layers_may_differ(
    renamed: dict[str, str], make_tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If transformers renames tensors inside a layer, weights have the file's names, and hooks the module's."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    source = make_tiny("llama", dtype=torch.float32)
    rows = make_dataset(random_rows([32, 32]), "random")
    with torch.no_grad():
        expected = load(source)(input_ids=torch.tensor(rows.samples), use_cache=False).logits
    rules = [WeightRenaming(file_name.replace(".", r"\."), module) for module, file_name in renamed.items()]
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda _: rules)
    tensors = all_tensors(source)
    for module, file_name in renamed.items():
        tensors = {name.replace(module, file_name): tensor for name, tensor in tensors.items()}
    shutil.copytree(source, tmp_path / "renamed")
    save_file(tensors, tmp_path / "renamed" / "model.safetensors", {"format": "pt"})
    skeleton = build_skeleton(read_layout(tmp_path / "renamed"))
    up_proj = "feed.up_proj" if renamed else "mlp.up_proj"
    assert f"{up_proj}.weight" in skeleton.names_of_layer(1).used
    assert skeleton.names_of_layer(1).modules[up_proj] == "mlp.up_proj"
    assert skeleton.linears()[f"model.layers.2.{up_proj}"] == "model.layers.2.mlp.up_proj"
    assert torch.equal(expected, torch.stack(logits_of(tmp_path / "renamed", rows)))


def test_two_names_of_one_tensor_are_refused(
    make_tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file with two tensors that transformers would load into one parameter is refused with both names."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    source = make_tiny("llama")
    shutil.copytree(source, tmp_path / "twice")
    rules = [WeightRenaming("^head", "lm_head")]
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda _: rules)
    tensors = all_tensors(source)
    save_file(
        tensors | {"head.weight": tensors["lm_head.weight"].clone()},
        tmp_path / "twice" / "model.safetensors",
        {"format": "pt"},
    )
    with raises("tensor-duplicate", where=tmp_path / "twice") as caught:
        build_skeleton(read_layout(tmp_path / "twice"))
    assert {"head.weight", "lm_head.weight"} <= set(caught.value.what.split())
