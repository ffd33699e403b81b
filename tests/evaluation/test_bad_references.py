"""Stored references and caches that cannot be used: exit code 2, a message with code and place, nothing written."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.refusals import copy, evaluate, refuse, rows_file
from quantization.test_bad_input import tail_cut

# --- stored references


@pytest.fixture
def stored(bare: Path, token_rows: Path, tmp_path: Path) -> Path:
    """A stored reference of the tiny llama on the rows."""
    result = evaluate(bare, "--reference", bare, "--dataset", token_rows, "--reference-cache", tmp_path / "cache")
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
    message = refuse(out, "reference-invalid", bare, "--reference", stored, "--dataset", token_rows)
    assert f"{stored}: " in message
    assert "`--reference`" in message


def test_stored_reference_of_another_version(bare: Path, stored: Path, token_rows: Path, out: Path) -> None:
    """A stored reference of a later version is refused with both versions."""
    edit_metadata(stored, key='{"schema": "snugfit.reference/7"}')
    message = refuse(out, "reference-invalid", bare, "--reference", stored, "--dataset", token_rows)
    assert f"{stored}: " in message
    assert "snugfit.reference/7" in message
    assert "snugfit.reference/1" in message
    assert "--reference-cache" in message


def test_stored_reference_for_other_texts(bare: Path, stored: Path, out: Path) -> None:
    """A stored reference for other rows is refused by its path."""
    rows = rows_file(out.parent / "rows.jsonl", {"input_ids": [3, 4, 5]})
    message = refuse(out, "reference-mismatch", bare, "--reference", stored, "--dataset", rows)
    assert f"{stored}: " in message
    assert "`--dataset`" in message


def test_stored_reference_of_a_larger_vocabulary(wide: Path, bare: Path, token_rows: Path, out: Path) -> None:
    """A candidate of a smaller vocabulary than the stored reference's is refused, as beside the model itself."""
    cache = out.parent / "cache"
    result = evaluate(wide, "--reference", wide, "--dataset", token_rows, "--reference-cache", cache)
    assert result.exit_code == 0, result.stderr
    refuse(out, "models-mismatch", bare, "--reference", next(cache.iterdir()), "--dataset", token_rows)


def test_a_stored_reference_needs_a_checkpoint(stored: Path, token_rows: Path, out: Path) -> None:
    """A stored reference alone is nothing to evaluate."""
    assert "MODELS: " in refuse(out, "option-missing", "--reference", stored, "--dataset", token_rows)


def test_names_stay_distinct(llama: Path, text: Path, out: Path) -> None:
    """A candidate named like the model of a stored reference gets another name, so that compare can choose."""
    first, second = out.parent / "first", out.parent / "second" / llama.name
    copy(llama, first)
    copy(llama, second)
    options = ["--reference", llama, "--dataset", text, "--context", 64, "--reference-cache", out.parent / "cache"]
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
    """A cache that is not a folder and cannot become one is refused by its path before any model is run."""
    cache = out.parent / "cache" if make is cache_is_a_file else out.parent / "home" / "cache"
    make(cache)
    arguments = [good, "--reference", llama, "--dataset", text, "--context", 64, "--reference-cache", cache]
    message = refuse(out, "output-not-writable", *arguments)
    assert str(cache) in message
    assert "`--reference-cache`" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_cache_without_permission(llama: Path, good: Path, text: Path, out: Path) -> None:
    """A cache in which nothing may be written is refused by its path before any model is run."""
    cache = out.parent / "cache"
    cache.mkdir(mode=0o555)
    arguments = [good, "--reference", llama, "--dataset", text, "--context", 64, "--reference-cache", cache]
    assert str(cache) in refuse(out, "output-not-writable", *arguments)


def test_cache_with_a_broken_file(bare: Path, stored: Path, token_rows: Path, out: Path) -> None:
    """A broken file of the cache is refused by its path, and the remedy is to remove it."""
    tail_cut(stored)
    arguments = [bare, "--reference", bare, "--dataset", token_rows, "--reference-cache", stored.parent]
    message = refuse(out, "reference-invalid", *arguments)
    assert f"{stored}: " in message
    assert "Remove" in message


def test_cache_without_a_reference(good: Path, text: Path, out: Path) -> None:
    """A cache without a reference is refused by the option's name."""
    arguments = [good, "--dataset", text, "--context", 64, "--reference-cache", out.parent / "cache"]
    assert "--reference-cache: " in refuse(out, "option-missing", *arguments)


def test_cache_of_a_stored_reference(bare: Path, stored: Path, token_rows: Path, out: Path) -> None:
    """A stored reference and a cache together are refused."""
    arguments = [bare, "--reference", stored, "--dataset", token_rows, "--reference-cache", out.parent / "other"]
    assert "--reference-cache: " in refuse(out, "option-conflict", *arguments)
