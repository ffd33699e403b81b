"""Safetensors shards, planned to the byte before the first tensor is written."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from snugfit.storage.checkpoint import SINGLE_NAME, Checkpoint
from snugfit.storage.files import PIECE
from snugfit.storage.safetensors_header import TORCH_NAMES, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from snugfit.storage.transfer import Moving, Transfer

# safetensors' dtype order, which its writer sorts by, largest first
SERIAL_ORDER = (
    *("BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"),
    *("I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64", "F64", "I64", "U64"),
)


@dataclass(frozen=True)
class Shard:
    """A safetensors file yet to be written: its whole header, and the offset of each tensor in the file."""

    name: str
    header: bytes
    offsets: Mapping[str, int]
    tensors: tuple[TensorInfo, ...]
    bytes: int


def plan_shards(tensors: Sequence[TensorInfo], max_shard_bytes: int) -> list[Shard]:
    """Lay tensors out in shards of at most `max_shard_bytes`, in the given order, one larger tensor to a shard."""
    parts: list[list[TensorInfo]] = [[]]
    filled = 0
    for tensor in tensors:
        if parts[-1] and filled + tensor.bytes > max_shard_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(tensor)
        filled += tensor.bytes
    total = len(parts)
    names = [SINGLE_NAME] if total == 1 else [f"model-{n:05d}-of-{total:05d}.safetensors" for n in range(1, total + 1)]
    return [_lay_out(name, part) for name, part in zip(names, parts, strict=True)]


def _lay_out(name: str, tensors: Iterable[TensorInfo]) -> Shard:
    """One shard, byte for byte as safetensors' own writer lays it out: by dtype, largest first, then by name."""
    ordered = sorted(tensors, key=lambda t: (-SERIAL_ORDER.index(t.dtype), t.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    end = 0
    for tensor in ordered:
        offsets[tensor.name] = end
        end += tensor.bytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offsets[tensor.name], end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    absolute = {name: start + offset for name, offset in offsets.items()}
    return Shard(name, struct.pack("<Q", len(text)) + text, absolute, tuple(ordered), start + end)


class ShardWriter:
    """Writes tensors to their places in planned shards, in any order, in the background; knows which are missing.

    A shard that is whole is digested at once, while others are still written.
    """

    def __init__(self, directory: Path, shards: Sequence[Shard], transfer: Transfer) -> None:
        """Create the shard files at their full size, headers written; files that have both stay as they are."""
        self._transfer = transfer
        self._directory = directory
        self._shards = {shard.name: shard for shard in shards}
        self._shard_of = {tensor.name: shard for shard in shards for tensor in shard.tensors}
        self._missing = {tensor.name: tensor for shard in shards for tensor in shard.tensors}
        self._left = {shard.name: len(shard.tensors) for shard in shards}
        self._under_way: dict[str, Moving[list[int]]] = {}
        self._begun: list[dict[str, Moving[list[int]]]] = []
        self._digests: dict[str, Future[str]] = {}
        self._digester = ThreadPoolExecutor(max_workers=4)
        self._flusher = ThreadPoolExecutor(max_workers=1)
        self._flushes: list[Future[None]] = []
        self._files: dict[str, int] = {}
        try:
            self._create(directory, shards)
        except BaseException:
            self.close()
            raise

    def _create(self, directory: Path, shards: Sequence[Shard]) -> None:
        for shard in shards:
            handle = os.open(directory / shard.name, os.O_RDWR | os.O_CREAT, 0o644)
            self._files[shard.name] = handle
            if os.fstat(handle).st_size == shard.bytes and os.pread(handle, len(shard.header), 0) == shard.header:
                continue
            os.ftruncate(handle, 0)
            os.ftruncate(handle, shard.bytes)
            _write_at(handle, memoryview(shard.header), 0)

    def write(self, name: str, tensor: Tensor) -> None:
        """Begin to write a tensor; a shape or dtype other than the planned one is a defect of ours."""
        import torch

        planned = self._missing.pop(name)
        if tuple(tensor.shape) != planned.shape or tensor.dtype != getattr(torch, TORCH_NAMES[planned.dtype]):
            got = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise AssertionError(f"{name}: planned {planned.dtype} {planned.shape}, got {got}")
        shard = self._shard_of[name]
        self._under_way[name] = self._transfer.write(self._files[shard.name], shard.offsets[name], tensor)

    def copy(self, checkpoint: Checkpoint, name: str) -> None:
        """Begin to copy a tensor from the source as it is."""
        planned, found = self._missing.pop(name), checkpoint.tensors[name]
        if (planned.dtype, planned.shape) != (found.dtype, found.shape):
            raise AssertionError(f"{name}: planned {planned.dtype} {planned.shape}, got {found.dtype} {found.shape}")
        shard = self._shard_of[name]
        self._under_way[name] = self._transfer.copy(checkpoint, name, self._files[shard.name], shard.offsets[name])

    def begun(self) -> Callable[[], dict[str, list[int]]]:
        """What has begun since the last call: the result waits until it is in the files, and gives all CRC-32s."""
        moving, self._under_way = self._under_way, {}

        def settle() -> dict[str, list[int]]:
            found = {name: one.result() for name, one in moving.items()}
            self._begun.remove(moving)
            self._settled(found)
            if all(flush.done() for flush in self._flushes):
                for flush in self._flushes:
                    flush.result()  # the disk tells of an error once
                # the disk's work begins while there is other work; nobody waits for it before the end
                files = {self._shard_of[name].name for name in found}
                self._flushes = [self._flusher.submit(os.fdatasync, self._files[name]) for name in files]
            return found

        self._begun.append(moving)
        return settle

    def holds(self, written: Mapping[str, Sequence[int]]) -> bool:
        """Whether the files have these tensors (name -> CRC-32s), written by an earlier run."""
        return all(name in self._missing and self._crc(name) == list(crcs) for name, crcs in written.items())

    def _crc(self, name: str) -> list[int]:
        shard = self._shard_of[name]
        return crc_of(self._files[shard.name], shard.offsets[name], self._missing[name].bytes)

    def accept(self, names: Iterable[str]) -> None:
        """Tensors that an earlier run wrote are missing no more."""
        names = list(names)
        for name in names:
            del self._missing[name]
        self._settled(names)

    def _settled(self, names: Iterable[str]) -> None:
        for name in names:
            shard = self._shard_of[name].name
            self._left[shard] -= 1
            if not self._left[shard]:
                self._digests[shard] = self._digester.submit(_digest, self._directory / shard)

    def finish(self) -> dict[str, str]:
        """Close every shard; SHA-256 by file name. A tensor never written is a defect of ours."""
        if self._missing or self._under_way:
            raise AssertionError(f"planned tensors were not written: {sorted(self._missing)[:5]}")
        for name in self._shards.keys() - self._digests.keys():  # without tensors
            self._digests[name] = self._digester.submit(_digest, self._directory / name)
        found = {name: self._digests[name].result() for name in self._shards}
        for flush in self._flushes:
            flush.result()
        self.close()
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the shard files as they are, once what is under way has ended."""
        for moving in (*self._begun, self._under_way):
            for one in moving.values():
                one.cancel()
        self._under_way.clear()
        for pool in (self._digester, self._flusher):
            pool.shutdown(wait=True, cancel_futures=True)
        for handle in self._files.values():
            os.close(handle)
        self._files.clear()


def index_of(shards: Sequence[Shard]) -> dict[str, Any]:
    """The content of model.safetensors.index.json for these shards."""
    total = sum(tensor.bytes for shard in shards for tensor in shard.tensors)
    weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _write_at(handle: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(handle, data[done:], offset + done)


def file_digests(directory: Path, names: Sequence[str]) -> dict[str, str]:
    """SHA-256 of files, hexadecimal, by name."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        return dict(zip(names, pool.map(lambda name: _digest(directory / name), names), strict=True))


def crc_of(handle: int, offset: int, size: int) -> list[int]:
    """The CRC-32 of each piece of a tensor that is in an open file."""
    return [zlib.crc32(os.pread(handle, min(PIECE, size - start), offset + start)) for start in range(0, size, PIECE)]


def _digest(file: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
