"""A model directory in the making: shards planned to the byte before the first is written, a whole-or-nothing end."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from snugfit.errors import UserError
from snugfit.model.checkpoint import SINGLE_NAME, TORCH_NAMES, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

LOCK_NAME = ".snugfit-lock"
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
    """Writes tensors to their places in planned shards, in any order, and knows which are still missing."""

    def __init__(self, directory: Path, shards: Sequence[Shard]) -> None:
        """Create the shard files at their full size, headers written."""
        self._shard_of = {tensor.name: shard for shard in shards for tensor in shard.tensors}
        self._missing = {tensor.name: tensor for shard in shards for tensor in shard.tensors}
        self._files: dict[str, int] = {}
        try:
            self._create(directory, shards)
        except BaseException:
            self.close()
            raise

    def _create(self, directory: Path, shards: Sequence[Shard]) -> None:
        for shard in shards:
            handle = os.open(directory / shard.name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            self._files[shard.name] = handle
            os.ftruncate(handle, shard.bytes)
            _write_at(handle, memoryview(shard.header), 0)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor; a shape or dtype other than the planned one is a defect of ours and stops the run."""
        import torch

        planned = self._missing.pop(name)
        data = tensor.detach().to("cpu").contiguous()
        if tuple(data.shape) != planned.shape or data.dtype != getattr(torch, TORCH_NAMES[planned.dtype]):
            raise AssertionError(f"{name}: planned {planned.dtype} {planned.shape}, got {data.dtype} {data.shape}")
        shard = self._shard_of[name]
        raw = memoryview(data.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # it is a buffer
        _write_at(self._files[shard.name], raw, shard.offsets[name])

    def finish(self) -> None:
        """Close every shard; a tensor never written is a defect of ours."""
        if self._missing:
            raise AssertionError(f"planned tensors were not written: {sorted(self._missing)[:5]}")
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the shard files as they are."""
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


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A directory TARGET.partial to write into, renamed to TARGET at the end; removed where anything goes wrong.

    What a killed run left there is removed first. UserError where TARGET exists or another run is writing it.
    """
    partial = _partial_of(target)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(partial / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(
            f"cannot be written ({error.strerror}).", where=str(partial), remedy="Choose another."
        ) from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError("another run is writing this.", where=str(partial), remedy="Wait for it.") from None
        try:
            _clear(partial)
            yield partial
            _flush(partial)
            (partial / LOCK_NAME).unlink()
            partial.rename(target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def check_stageable(target: Path) -> None:
    """UserError where `staged` would refuse TARGET or could not write it; nothing is made."""
    partial = _partial_of(target)
    check_folder(partial, remedy="Choose another.")
    if not (partial / LOCK_NAME).is_file():
        return
    lock = os.open(partial / LOCK_NAME, os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError("another run is writing this.", where=str(partial), remedy="Wait for it.") from None
    finally:
        os.close(lock)


def check_folder(folder: Path, *, remedy: str) -> None:
    """UserError where files could not be made in `folder`, or the folder itself; nothing is left behind."""
    place = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        what = f"cannot be written ({place}: {error.strerror})."
        raise UserError(what, where=str(folder), remedy=remedy) from None


def _partial_of(target: Path) -> Path:
    """TARGET.partial; UserError where TARGET exists, or something that no run of ours made is in the way."""
    check_target(target)
    partial = target.with_name(target.name + ".partial")
    ours = not partial.is_symlink() and (partial / LOCK_NAME).is_file()
    if not ours and (partial.is_symlink() or partial.exists()) and not _is_empty(partial):
        raise UserError("is in the way, and no run of ours made it.", where=str(partial), remedy="Move it away.")
    return partial


def check_target(target: Path) -> None:
    """UserError where the output exists already."""
    if target.exists() or target.is_symlink():
        raise UserError("the output exists already.", where=str(target), remedy="Remove it or choose another -o.")


def check_room(target: Path, shards: Sequence[Shard]) -> None:
    """UserError where the disk has no room for the shards: they are sparse until written and would fail at the end."""
    folder = next(folder for folder in target.absolute().parents if folder.exists())
    free, needed = shutil.disk_usage(folder).free, sum(shard.bytes for shard in shards)
    if free < needed:
        raise UserError(
            f"{needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free.",
            where=str(folder),
            remedy="Free some room, or choose another disk with -o.",
        )


def _flush(directory: Path) -> None:
    """Have the disk hold every file and name below `directory`, so that a power cut after the rename loses nothing."""
    for path in (directory, *directory.rglob("*")):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _is_empty(directory: Path) -> bool:
    return not directory.is_symlink() and directory.is_dir() and not any(directory.iterdir())


def _clear(partial: Path) -> None:
    for entry in partial.iterdir():
        if entry.name == LOCK_NAME:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def file_digests(directory: Path, names: Sequence[str]) -> dict[str, str]:
    """SHA-256 of files, hexadecimal, by name."""

    def digest(name: str) -> str:
        with (directory / name).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    with ThreadPoolExecutor(max_workers=4) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))
