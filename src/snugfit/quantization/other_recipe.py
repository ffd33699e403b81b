"""A run that resumes with another recipe: finished units stay where the new recipe gives them the same formats.

Another format of a later tensor moves the finished ones, too: shards have whole headers before the first tensor is
written. So the finished tensors are copied into new shards inside the work folder. The new identity appears among them
last; from then on the new files count, and a start that finds them puts them in place.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from snugfit.errors import UserError
from snugfit.quantization.resume import IDENTITY, FinishedUnits, read_json, replace_json
from snugfit.storage.checkpoint import read_header
from snugfit.storage.files import PIECE_BYTES, write_fully
from snugfit.storage.safetensors_header import StoredTensor
from snugfit.storage.shards import Shard

MOVED = "moved"
_DIFFERS = frozenset({"recipe", "units", "weight_files", "input_headroom"})  # what a recipe changes of a run's identity


def can_adopt(work: Path, identity: Mapping[str, Any]) -> bool:
    """Whether the unfinished run of `work` differs from `identity` in its recipe alone, and keeps its finished units.

    That is so, too, where the move to that recipe was killed. Nothing is written; shards are not looked at.
    """
    ready, before = _moved(work), read_json(work / IDENTITY)
    identity = json.loads(json.dumps(identity))
    if not isinstance(before, dict):
        return False
    return ready == identity or _keeps_units(FinishedUnits(work, before), before if ready is None else ready, identity)


def adopt_recipe(directory: Path, work: Path, identity: Mapping[str, Any], shards: Sequence[Shard]) -> bool:
    """Give the unfinished run in `directory` the recipe of `identity`, if nothing else differs and all units fit.

    `shards` are those of the new recipe. True if it was given, False if the run stays as it is.
    """
    folder = work / MOVED
    ready = _moved(work)
    if ready is not None:
        _put_in_place(directory, work, ready)
    shutil.rmtree(folder, ignore_errors=True)
    before = read_json(work / IDENTITY)
    identity = json.loads(json.dumps(identity))
    if not isinstance(before, dict):
        return False
    finished = FinishedUnits(work, before)
    if not _keeps_units(finished, before, identity):
        return False
    places = _places(directory, before.get("weight_files"))
    names = [name for entry in finished.entries for name in entry["written"]]
    if any(name not in places for name in names):
        return False
    folder.mkdir()
    for shard in shards:
        _copy(directory, folder / shard.name, shard, places, set(names))
    replace_json(folder / IDENTITY, identity)
    _put_in_place(directory, work, identity)
    return True


def _moved(work: Path) -> dict[str, Any] | None:
    """The identity to which all tensors were moved by a start that was then killed, None without."""
    ready = read_json(work / MOVED / IDENTITY)
    return ready if isinstance(ready, dict) and isinstance(ready.get("weight_files"), dict) else None


def _keeps_units(finished: FinishedUnits, before: Mapping[str, Any], identity: Mapping[str, Any]) -> bool:
    """Whether the recipe alone differs, and has the same formats for what is finished, which is something."""
    differences = {key for key in identity if before.get(key) != identity[key]}
    if "recipe" not in differences or not differences <= _DIFFERS:
        return False
    units = before.get("units")
    return (
        finished.done > 0 and isinstance(units, list) and units[: finished.done] == identity["units"][: finished.done]
    )


def _places(directory: Path, files: Any) -> dict[str, StoredTensor]:
    """Where the tensors of an unfinished run are, by name; nothing if a file of it is damaged."""
    names: Sequence[str] = list(files) if isinstance(files, dict) else ()
    try:
        inside = [directory / name for name in names if Path(name).name == name]
        return {tensor.name: tensor for file in inside for tensor in read_header(file)}
    except UserError:
        return {}


def _copy(
    directory: Path, target: Path, shard: Shard, places: Mapping[str, StoredTensor], names: Collection[str]
) -> None:
    """Create a shard at its full size, with its header and the tensors `names` that belong to it."""
    handle = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        os.ftruncate(handle, shard.bytes)
        write_fully(handle, 0, shard.header)
        for tensor in shard.tensors:
            if tensor.name not in names:
                continue
            old = places[tensor.name]
            source = os.open(directory / old.file, os.O_RDONLY)
            try:
                for start in range(0, min(old.bytes, tensor.bytes), PIECE_BYTES):
                    piece = os.pread(source, min(PIECE_BYTES, tensor.bytes - start), old.offset + start)
                    write_fully(handle, shard.offsets[tensor.name] + start, piece)
            finally:
                os.close(source)
    finally:
        os.close(handle)


def _put_in_place(directory: Path, work: Path, identity: Mapping[str, Any]) -> None:
    """Replace the run's shards and identity by the moved ones; a kill in between leaves what another start ends."""
    folder = work / MOVED
    for file in sorted(folder.iterdir()):
        if file.suffix == ".safetensors":
            file.replace(directory / file.name)
    for file in directory.glob("*.safetensors"):
        if file.name not in identity["weight_files"]:
            file.unlink()
    replace_json(work / IDENTITY, identity)
    shutil.rmtree(folder)
