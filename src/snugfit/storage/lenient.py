"""Opens a directory of weights although its index or shards are damaged: what can be read, and what is wrong."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from snugfit.errors import UserError
from snugfit.storage.checkpoint import (
    CONFIG_NAME,
    INDEX_NAME,
    SINGLE_NAME,
    Checkpoint,
    open_directory,
    parse_index,
    read_config,
    read_header,
)
from snugfit.storage.files import list_files, read_file
from snugfit.storage.safetensors_header import StoredTensor

# shards as every tool numbers them
_SHARD = re.compile(r"model(-\d+-of-\d+)?\.safetensors")


@dataclass(frozen=True, kw_only=True)
class OpenedLeniently:
    """`checkpoint` holds what could be read; `damage` is (kind of damage, error) of what could not."""

    checkpoint: Checkpoint
    damage: tuple[tuple[str, UserError], ...]
    weight_map: dict[str, str] | None


def open_leniently(root: Path) -> OpenedLeniently:
    """The tensors of all readable shards of a directory; UserError where it has no config, or is no directory.

    Kinds of damage: "index" (not readable, or sends tensors elsewhere), "missing" (a shard), "shard", "twice" (a
    tensor).
    """
    if not root.is_dir():
        open_directory(root)  # says what it is
    config = read_config(root)
    damage: list[tuple[str, UserError]] = []
    weight_map: dict[str, str] | None = None
    try:
        weight_map = parse_index(read_file(root, INDEX_NAME), where=str(root / INDEX_NAME))
    except FileNotFoundError:
        pass
    except UserError as error:
        damage.append(("index", error.at(error.where)))
    present = [path.name for path in sorted(root.iterdir()) if path.is_file() and _SHARD.fullmatch(path.name)]
    named = sorted(set((weight_map or {}).values()))
    shards = [name for name in named if (root / name).exists()] if weight_map else present
    damage += [("missing", _missing(root, name)) for name in named if not (root / name).exists()]
    if weight_map is None and SINGLE_NAME in shards and len(shards) > 1:
        shards = [SINGLE_NAME]
    if not shards and not damage:
        open_directory(root)
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        try:
            found = read_header(root / shard)
        except UserError as error:
            damage.append(("shard", error.at(error.where)))  # without its traceback, which holds the header's bytes
            continue
        for tensor in found:
            if tensor.name in tensors:
                damage.append(("twice", _twice(root, tensor, tensors[tensor.name])))
            tensors.setdefault(tensor.name, tensor)
    others = tuple(name for name in list_files(root) if name not in {*shards, INDEX_NAME, CONFIG_NAME})
    missing = {name: file for name, file in (weight_map or {}).items() if name not in tensors}
    checkpoint = Checkpoint(
        path=root, config=config, tensors=tensors, shards=tuple(shards), other_files=others, missing=missing
    )
    return OpenedLeniently(checkpoint=checkpoint, damage=tuple(damage), weight_map=weight_map)


def misplaced(checkpoint: Checkpoint, weight_map: dict[str, str]) -> list[str]:
    """Tensors that the index sends to another file than the one that holds them, or does not name."""
    return [name for name, tensor in checkpoint.tensors.items() if weight_map.get(name) != tensor.file]


def _missing(root: Path, name: str) -> UserError:
    what = "the index names this shard, and it does not exist."
    return UserError(what, code="weights-missing", where=str(root / name), remedy="Download it.")


def _twice(root: Path, tensor: StoredTensor, first: StoredTensor) -> UserError:
    return UserError(
        f"tensor {tensor.name} is also in {first.file}.",
        code="tensor-duplicate",
        where=str(root / tensor.file),
        remedy="Download the checkpoint again: two shards disagree.",
    )
