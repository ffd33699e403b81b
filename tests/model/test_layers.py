"""The skeleton and the walk against transformers' own loading and forward."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from conftest import MakeTiny
from helpers.tiny_families import FAMILIES, all_tensors, load, random_rows
from snugfit.data.dataset import Dataset, make_dataset
from snugfit.errors import UserError
from snugfit.evaluation.fidelity import stream_logits
from snugfit.model import layers
from snugfit.storage.open import open_checkpoint


def walked_logits(path: Path, rows: Dataset) -> list[Tensor]:
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
    skeleton = layers.build_skeleton(open_checkpoint(path))
    expected = dict(load(path).named_buffers())
    found = dict(skeleton.model.named_buffers())
    assert found.keys() == expected.keys()
    for name, buffer in expected.items():
        if name in skeleton.stored:
            continue  # read from the file
        assert found[name].device.type == "cpu"
        assert torch.equal(found[name], buffer), name
    assert all(parameter.device.type == "meta" for parameter in skeleton.model.parameters())


def test_walk_is_exact_for_equal_shapes(make_tiny: MakeTiny) -> None:
    """With rows of one length in one batch the walk gives the plain forward's logits bit for bit."""
    path = make_tiny("llama")
    rows = make_dataset(random_rows([64, 64, 64]), "random")
    with torch.no_grad():
        expected = load(path)(input_ids=torch.tensor(rows.samples), use_cache=False).logits.float()
    assert torch.equal(expected, torch.stack(walked_logits(path, rows)))


def test_missing_layer_tensor_is_named(make_tiny: MakeTiny) -> None:
    """A decoder layer that lacks a tensor is refused with that tensor's name."""
    skeleton = layers.build_skeleton(open_checkpoint(make_tiny("llama")))
    state = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in skeleton.layers[1].state_dict().items()}
    state.pop("mlp.up_proj.weight")
    with pytest.raises(UserError, match=r"model\.layers\.1.*missing.*mlp\.up_proj\.weight"):
        layers.resident_layer(skeleton, 1, state, torch.device("cpu"))


def test_tensor_left_without_data_is_an_error() -> None:
    """A module with a buffer still on the meta device is refused, not used with garbage in it."""
    module = nn.Linear(4, 4, bias=False)
    module.register_buffer("table", torch.empty(3, device="meta"), persistent=False)
    with pytest.raises(UserError, match="table"):
        layers.fill(module, {"weight": torch.zeros(4, 4)}, where="here")


def test_tied_head_is_found_under_either_name(make_tiny: MakeTiny) -> None:
    """A tied checkpoint stores one matrix; both the embeddings and the head get it."""
    checkpoint = open_checkpoint(make_tiny("llama", tie_word_embeddings=True))
    assert "lm_head.weight" not in checkpoint.tensors
    skeleton = layers.build_skeleton(checkpoint)
    for head in (False, True):
        weights = layers.outer_weights(skeleton, checkpoint, head=head)
        assert weights["lm_head.weight"] is weights["model.embed_tokens.weight"]


@pytest.mark.parametrize("renamed", [{}, {".mlp.": ".feed.", "q_proj": "query"}], ids=["as-they-are", "renamed"])
def test_names_inside_layers_may_differ(
    renamed: dict[str, str], make_tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where transformers renames what is inside a layer, needs and linears go by the file's names, hooks by its own."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    source = make_tiny("llama", dtype=torch.float32)
    rows = make_dataset(random_rows([32, 32]), "random")
    with torch.no_grad():
        expected = load(source)(input_ids=torch.tensor(rows.samples), use_cache=False).logits
    rules = [WeightRenaming(theirs.replace(".", r"\."), ours) for ours, theirs in renamed.items()]
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda _: rules)
    tensors = all_tensors(source)
    for ours, theirs in renamed.items():
        tensors = {name.replace(ours, theirs): tensor for name, tensor in tensors.items()}
    shutil.copytree(source, tmp_path / "renamed")
    save_file(tensors, tmp_path / "renamed" / "model.safetensors", {"format": "pt"})
    skeleton = layers.build_skeleton(open_checkpoint(tmp_path / "renamed"))
    file_name = "feed.up_proj" if renamed else "mlp.up_proj"
    assert f"{file_name}.weight" in layers.used_names(skeleton, 1)
    assert layers.module_names(skeleton, 1)[file_name] == "mlp.up_proj"
    assert layers.linear_names(skeleton)[f"model.layers.2.{file_name}"] == "model.layers.2.mlp.up_proj"
    assert torch.equal(expected, torch.stack(walked_logits(tmp_path / "renamed", rows)))


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
    with pytest.raises(UserError, match=r"head\.weight and lm_head\.weight are one tensor to transformers"):
        layers.build_skeleton(open_checkpoint(tmp_path / "twice"))
