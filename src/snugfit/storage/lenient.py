"""Opens a model although its index or shards are damaged, here or on the Hub: what can be read, and what is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from snugfit.errors import UserError
from snugfit.storage.checkpoint import (
    CONFIG_NAME,
    INDEX_NAME,
    SINGLE_NAME,
    Checkpoint,
    no_weights,
    open_directory,
    parse_index,
    read_config,
    read_header,
    stored_twice,
)
from snugfit.storage.files import list_files, read_file
from snugfit.storage.safetensors_header import StoredTensor

# shards as every tool numbers them
_SHARD = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
# errors of one shard's header; on the Hub others may pass
_OF_HEADERS = frozenset({"header-invalid", "file-damaged"})

Headers = Mapping[str, "list[StoredTensor] | UserError"]


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
    weight_map, damage = _index(root, str(root))
    present = [path.name for path in sorted(root.iterdir()) if path.is_file() and _SHARD.fullmatch(path.name)]
    shards, missing = _shards(weight_map, present, lambda name: (root / name).exists(), str(root))
    damage += missing
    if not shards and not damage:
        open_directory(root)
    tensors, more = _merge({shard: _try_header(root / shard) for shard in shards}, str(root))
    others = tuple(name for name in list_files(root) if name not in {*shards, INDEX_NAME, CONFIG_NAME})
    absent = {name: file for name, file in (weight_map or {}).items() if name not in tensors}
    checkpoint = Checkpoint(
        path=root, config=config, tensors=tensors, shards=tuple(shards), other_files=others, missing=absent
    )
    return OpenedLeniently(checkpoint=checkpoint, damage=(*damage, *more), weight_map=weight_map)


def open_hub_leniently(model: str) -> OpenedLeniently:
    """As `open_leniently`, of org/name[@revision] on the Hub, its headers read by range; or in the cache if offline."""
    from snugfit.storage.hub import cached_snapshot, list_hub, try_headers, with_cache

    name, _, given = model.partition("@")
    snapshot = cached_snapshot(name, given or None)
    if snapshot is not None:
        return open_leniently(snapshot)
    files = list_hub(name, given or None)
    config = read_config(files.snapshot)
    weight_map, damage = _index(files.snapshot, model) if INDEX_NAME in files.sizes else (None, [])
    present = sorted(file for file in files.sizes if _SHARD.fullmatch(file))
    shards, missing = _shards(weight_map, present, files.sizes.__contains__, model)
    damage += missing
    if not shards and not damage:
        raise no_weights(files.sizes, where=model)
    files = with_cache(files, shards)
    tensors, more = _merge(try_headers(files, shards, weight_map or {}, _OF_HEADERS), model)
    others = tuple(sorted(file for file in files.sizes if file not in {*shards, INDEX_NAME, CONFIG_NAME}))
    checkpoint = Checkpoint(
        path=files.snapshot,
        config=config,
        tensors=tensors,
        shards=tuple(shards),
        other_files=others,
        missing={name: file for name, file in (weight_map or {}).items() if name not in tensors},
        remote=files,
    )
    return OpenedLeniently(checkpoint=checkpoint, damage=(*damage, *more), weight_map=weight_map)


def _index(root: Path, place: str) -> tuple[dict[str, str] | None, list[tuple[str, UserError]]]:
    """The index below `root`, None without a readable one, and what is wrong with it."""
    try:
        return parse_index(read_file(root, INDEX_NAME), where=f"{place}/{INDEX_NAME}"), []
    except FileNotFoundError:
        return None, []
    except UserError as error:
        return None, [("index", error.at(error.where))]


def _shards(
    weight_map: Mapping[str, str] | None, present: Sequence[str], exists: Callable[[str], bool], place: str
) -> tuple[list[str], list[tuple[str, UserError]]]:
    """The shards to read: those of the index that exist, or all that are numbered as shards; and which are missing."""
    named = sorted(set((weight_map or {}).values()))
    shards = [name for name in named if exists(name)] if weight_map else list(present)
    if weight_map is None and SINGLE_NAME in shards and len(shards) > 1:
        shards = [SINGLE_NAME]
    return shards, [("missing", _missing(place, name)) for name in named if not exists(name)]


def _try_header(file: Path) -> list[StoredTensor] | UserError:
    try:
        return read_header(file)
    except UserError as error:
        return error.at(error.where)  # without its traceback, which holds the header's bytes


def _merge(headers: Headers, place: str) -> tuple[dict[str, StoredTensor], list[tuple[str, UserError]]]:
    """The tensors of all shards by name, and the shards and tensors that are at fault."""
    tensors: dict[str, StoredTensor] = {}
    damage: list[tuple[str, UserError]] = []
    for found in headers.values():
        if isinstance(found, UserError):
            damage.append(("shard", found))
            continue
        for tensor in found:
            if tensor.name in tensors:
                error = stored_twice(tensor, tensors[tensor.name], where=f"{place}/{tensor.file}")
                damage.append(("twice", error))
            tensors.setdefault(tensor.name, tensor)
    return tensors, damage


def _missing(place: str, name: str) -> UserError:
    what = "the index names this shard, and it does not exist."
    return UserError(what, code="weights-missing", where=f"{place}/{name}", remedy="Download it.")
