"""Which of a model's files are copied with a quantized model, by their names."""

from __future__ import annotations

import pytest

from snugfit.storage.other_files import is_weights, not_copied, notes_on_loss

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


@pytest.mark.parametrize(
    "name",
    [
        *("__0_0.distcp", "rust_model.ot", "model.onnx_data", "model.onnx.data", "model.onnx_data_1", "model.nemo"),
        *("flax_model.msgpack", "w.npz", "w.pkl", "W.PKL", "tf_model.h5", "model.ckpt.data-00000-of-00001", "a.gguf"),
        *("pytorch_model.bin.index.json", "consolidated.00.pth", "model.safetensors"),
    ],
)
def test_weights_by_name(name: str) -> None:
    """Weights in every common container are not copied, wherever they are."""
    assert is_weights(name)
    assert not_copied([name, f"original/{name}", "tokenizer.json"]) == tuple(sorted([name, f"original/{name}"]))


@pytest.mark.parametrize(
    "name",
    [
        *("tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "modeling_x.py", "vocab.bpe"),
        *("original/params.json", "assets/data-1.png", "1_Pooling/config.json", "steps/a.txt", "optimization.md"),
    ],
)
def test_other_files_are_copied(name: str) -> None:
    """Files without weights are copied."""
    assert not_copied([name]) == ()


@pytest.mark.parametrize(
    "folder",
    ["checkpoint-500", "checkpoint-last", "global_step1000", "iter_0000100", "optimizer", "optim", "optimizer_0"],
)
def test_folders_of_trainers(folder: str) -> None:
    """Folders that trainers write are left out whole, at any depth, and named once."""
    names = [
        f"{folder}/trainer_state.json",
        f"{folder}/x/{ADAPTER[0]}",
        f"{folder}/x/{ADAPTER[1]}",
        f"a/{folder}/b.txt",
    ]
    assert not_copied([*names, "config.txt"]) == tuple(sorted([f"a/{folder}/", f"{folder}/"]))


def test_adapters_in_folders_stay_whole() -> None:
    """An adapter in a folder is copied with its weights; one whose weights are a pickle is left out with its config."""
    names = [f"{folder}/{name}" for folder in ("vision-lora", "a/b") for name in ADAPTER]
    assert not_copied(names) == ()
    assert notes_on_loss(names) == []
    pickled = ["c/adapter_config.json", "c/adapter_model.bin", "c/README.md"]
    assert not_copied([*names, *pickled]) == ("c/adapter_config.json", "c/adapter_model.bin")
    assert "c/adapter_model.bin" in notes_on_loss(pickled)[0]


def test_an_adapter_beside_the_weights_is_left_out_whole() -> None:
    """An adapter at the top is left out with its config, and a note says so."""
    assert not_copied([*ADAPTER, "tokenizer.json"]) == ADAPTER
    (note,) = notes_on_loss([*ADAPTER, "tokenizer.json"])
    assert all(name in note for name in (*ADAPTER, "merge"))


def test_modules_of_sentence_transformers_stay() -> None:
    """Dense layers that modules.json names are copied; without modules.json they are weights like others."""
    names = ["2_Dense/config.json", "2_Dense/model.safetensors"]
    assert not_copied([*names, "modules.json"]) == ()
    assert not_copied(names) == ("2_Dense/model.safetensors",)


@pytest.mark.parametrize(
    "name", ["mtp.safetensors", "model-mtp.safetensors", "MTP_layers.safetensors", "nextn.safetensors"]
)
def test_loose_prediction_layers_are_named_as_lost(name: str) -> None:
    """A file of prediction layers that the index does not name is left out, and a note says what is lost."""
    assert not_copied([name]) == (name,)
    (note,) = notes_on_loss([name, "README.md"])
    assert name in note
    assert "prediction" in note


def test_other_loose_weights_are_named() -> None:
    """Safetensors at the top that the index does not name are named; those in folders are not."""
    (note,) = notes_on_loss(["consolidated.safetensors", "original/a.safetensors", "model.gguf"])
    assert "consolidated.safetensors" in note
    assert "original" not in note
