"""Writes a checkpoint's shards into another directory with some tensors renamed or replaced, as bytes.

A shard in which nothing changes shares its bytes with the source by a hard link, or is copied where the disk cannot.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from snugfit.storage.checkpoint import Checkpoint, read_range
from snugfit.storage.files import PIECE_BYTES, check_inside, write_fully
from snugfit.storage.safetensors_header import StoredTensor, TensorInfo
from snugfit.storage.shards import lay_out


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What becomes of tensors, by their names in the source.

    `renamed` gives new names, `replaced` get another dtype, shape and content (from the bytes of the old one) under the
    name in it.
    """

    renamed: Mapping[str, str] = field(default_factory=dict)
    replaced: Mapping[str, tuple[TensorInfo, Callable[[bytes], bytes]]] = field(default_factory=dict)

    def target(self, tensor: StoredTensor) -> TensorInfo:
        """The tensor as it is written."""
        if tensor.name in self.replaced:
            return self.replaced[tensor.name][0]
        return TensorInfo(self.renamed.get(tensor.name, tensor.name), tensor.dtype, tensor.shape)

    def touches(self, name: str) -> bool:
        """Whether a tensor changes."""
        return name in self.renamed or name in self.replaced


def changed_tensors(checkpoint: Checkpoint, changes: Changes) -> dict[str, StoredTensor]:
    """The tensors as they will be, with the places of their bytes in the source."""
    found = {}
    for tensor in checkpoint.tensors.values():
        info = changes.target(tensor)
        found[info.name] = StoredTensor(info.name, info.dtype, info.shape, tensor.file, tensor.offset)
    return found


def rewrite_shards(checkpoint: Checkpoint, directory: Path, changes: Changes) -> tuple[list[str], list[str]]:
    """Write every shard into `directory`: names of those written anew, and of those linked."""
    inside: dict[str, list[StoredTensor]] = {shard: [] for shard in checkpoint.shards}
    for tensor in checkpoint.tensors.values():
        inside[tensor.file].append(tensor)
    rewritten, linked = [], []
    for shard, tensors in inside.items():
        if any(changes.touches(tensor.name) for tensor in tensors):
            _write(checkpoint, tensors, directory / shard, changes)
            rewritten.append(shard)
        else:
            link_or_copy(checkpoint.path, shard, directory)
            linked.append(shard)
    return rewritten, linked


def link_or_copy(source: Path, name: str, directory: Path) -> None:
    """Put a file of `source` into `directory` under its name: a hard link, or a copy on another disk."""
    check_inside(source, name)
    target = directory / name
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link((source / name).resolve(), target)
    except OSError:
        shutil.copyfile(source / name, target)


def _write(checkpoint: Checkpoint, inside: list[StoredTensor], file: Path, changes: Changes) -> None:
    targets = [changes.target(tensor) for tensor in inside]
    shard = lay_out(file.name, targets)
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        os.ftruncate(handle, shard.bytes)
        write_fully(handle, 0, shard.header)
        for tensor, target in zip(inside, targets, strict=True):
            offset = shard.offsets[target.name]
            if tensor.name in changes.replaced:
                whole = bytearray(tensor.bytes)
                read_range(checkpoint, tensor, 0, memoryview(whole))
                write_fully(handle, offset, changes.replaced[tensor.name][1](bytes(whole)))
                continue
            for start in range(0, tensor.bytes, PIECE_BYTES):
                piece = bytearray(min(PIECE_BYTES, tensor.bytes - start))
                read_range(checkpoint, tensor, start, memoryview(piece))
                write_fully(handle, offset + start, bytes(piece))
    finally:
        os.close(handle)
