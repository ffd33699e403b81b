"""The scripts of demo/ that prepare real models and texts, on tiny stand-ins."""

from __future__ import annotations

import importlib
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import MakeTiny

Script = Callable[[str], Any]
ASCII, ATTRIBUTES = 0x40000, 0x200


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Returns a function that imports a script of demo/ by its name."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "demo"))
    return importlib.import_module


def test_rotation_keeps_the_function(script: Script, make_tiny: MakeTiny, tmp_path: Path) -> None:
    """A turned tied Llama has norms of 1, an output head of its own, other weights and the same fp32 logits."""
    from transformers import AutoModelForCausalLM

    rotation = script("rotate_smollm2")
    plain = AutoModelForCausalLM.from_pretrained(make_tiny("llama", tie_word_embeddings=True, dtype=torch.float32))
    torch.manual_seed(0)
    for name, parameter in plain.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 2.0)
    plain.save_pretrained(tmp_path / "plain")
    (tmp_path / "turned").mkdir()
    rotation.write_rotated(tmp_path / "plain", tmp_path / "turned")
    turned = AutoModelForCausalLM.from_pretrained(tmp_path / "turned")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "turned"))
    assert not turned.config.tie_word_embeddings
    assert set(after) - set(before) == {"lm_head.weight"}
    assert all(bool((after[name] == 1).all()) for name in after if "norm" in name)
    assert all(float((after[name] - before[name]).abs().max()) > 1e-3 for name in before)
    ids = torch.randint(3, 64, (2, 24))
    with torch.no_grad():
        assert float((plain(ids).logits - turned(ids).logits).abs().max()) < 1e-4


def test_rotation_refuses_what_is_no_plain_llama(script: Script) -> None:
    """A bias stops the rotation with its name."""
    names = ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.bias")
    weights = {name: torch.ones(8, 8) for name in names}
    with pytest.raises(SystemExit, match=r"model\.layers\.0\.mlp\.up_proj\.bias"):
        script("rotate_smollm2").rotate(weights)


def test_failed_directory_leaves_the_old_one(script: Script, tmp_path: Path) -> None:
    """A directory that cannot be filled leaves no part behind, and what was there before stays."""
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").touch()
    whole_directory = script("unpack_smollm2").whole_directory
    with pytest.raises(OSError, match="full"), whole_directory(target):
        raise OSError("full")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "old"]
    with whole_directory(target) as partial:
        (partial / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "new"]


def words(*numbers: int) -> bytes:
    return struct.pack(f">{len(numbers)}i", *numbers)


def strings(*texts: str) -> bytes:
    return words(16, len(texts)) + b"".join(words(9 | ASCII, len(text)) + text.encode() for text in texts)


def test_r_strings(script: Script) -> None:
    """A vector of strings of R's version 3, packed as a lazy-load record, is read back."""
    header = b"X\n" + words(3, 0, 0, 5) + b"UTF-8"
    record = header + strings("It is a truth", "", "universally acknowledged")
    texts = script("texts")
    packed = words(len(record)) + zlib.compress(record)
    assert texts.read_r(texts.expand(packed)) == ["It is a truth", "", "universally acknowledged"]


def test_r_named_list(script: Script) -> None:
    """A list with names of R's version 2 becomes a dict; a symbol's second mention is a reference to the first."""
    names = words(2 | 0x400, 1, 9 | ASCII, 5) + b"names"
    again = words(2 | 0x400, 255 | 1 << 8)
    inner = words(19 | ATTRIBUTES, 1, 13, 2, 7, 4000) + names + strings("emma") + words(254)
    outer = (
        words(19 | ATTRIBUTES, 2) + inner + words(10, 1, 1) + again + strings("variables", "compressed") + words(254)
    )
    read_r = script("texts").read_r
    assert read_r(b"X\n" + words(2, 0, 0) + outer) == {"variables": {"emma": [7, 4000]}, "compressed": [1]}


def test_unwrap(script: Script) -> None:
    """Lines of a paragraph are joined, spaces and blank lines kept to one, the ends trimmed."""
    assert script("texts").unwrap(["", "One", "two.  Three", "", "  ", " four", ""]) == "One two. Three\n\nfour"


def test_texts_that_cannot_be_had(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without apt-get the novels fail by name and the other texts are written nevertheless."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"emma\.txt was not written: .*apt-get"):
        script("texts").prepare(tmp_path / "texts", ["emma", "python-docs"])
    assert [path.name for path in (tmp_path / "texts").iterdir()] == ["python-docs.txt"]
