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
from snugfit.quantization.prepare import PreparedRun
from snugfit.quantization.resume import IDENTITY, FinishedUnits, read_json, replace_json
from snugfit.storage.checkpoint import read_header
from snugfit.storage.files import PIECE_BYTES, write_fully
from snugfit.storage.safetensors_header import StoredTensor
from snugfit.storage.shards import Shard

MOVED = "moved"
_DIFFERS = frozenset({"recipe", "units", "weight_files"})  # what a recipe changes of a run's identity


def adopt_recipe(directory: Path, work: Path, prepared: PreparedRun) -> bool:
    """Give the unfinished run in `directory` the recipe of `prepared`, if nothing else differs and all units fit.

    True if it was given; False leaves the run as it is, for the caller to compare.
    """
    folder = work / MOVED
    ready = read_json(folder / IDENTITY)
    if isinstance(ready, dict) and isinstance(ready.get("weight_files"), dict):
        _put_in_place(directory, work, ready)
    shutil.rmtree(folder, ignore_errors=True)
    before = read_json(work / IDENTITY)
    identity = json.loads(json.dumps(prepared.identity()))
    if not isinstance(before, dict):
        return False
    differences = {key for key in identity if before.get(key) != identity[key]}
    if "recipe" not in differences or not differences <= _DIFFERS:
        return False
    finished = FinishedUnits(work, before)
    units = before.get("units")
    if not finished.done or not isinstance(units, list) or units[: finished.done] != identity["units"][: finished.done]:
        return False
    places = _places(directory, before.get("weight_files"))
    names = [name for entry in finished.entries for name in entry["written"]]
    if any(name not in places for name in names):
        return False
    folder.mkdir()
    for shard in prepared.plan.shards:
        _copy(directory, folder / shard.name, shard, places, set(names))
    replace_json(folder / IDENTITY, identity)
    _put_in_place(directory, work, identity)
    return True


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
