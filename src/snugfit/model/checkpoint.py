"""Safetensors on disk: headers, and tensors read by range.

Everything about a checkpoint is checked on its headers, which need no torch; tensors are read with plain positioned
reads, so that memory holds what was asked for and nothing of the rest of the file.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snugfit.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit

DTYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "F64": 8,
    "I64": 8,
    "U64": 8,
}
TORCH_NAMES: Mapping[str, str] = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as its header describes it: safetensors dtype name, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return self.elements * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class StoredTensor(TensorInfo):
    """A tensor and where its bytes are."""

    file: str
    offset: int


@dataclass(frozen=True)
class Checkpoint:
    """A model directory: its config, its tensors by name in file order, and its other files."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    shards: tuple[str, ...]
    other_files: tuple[str, ...]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Read config and headers of a model directory; UserError for anything missing, broken or outside it."""
    root = Path(path)
    if not root.is_dir():
        raise UserError("no such directory.", where=str(path), remedy="Give a directory with config.json and weights.")
    config = _read_config(root)
    shards = _shard_names(root)
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        for tensor in read_header(root / shard):
            if tensor.name in tensors:
                raise UserError(
                    f"tensor {tensor.name} is also in {tensors[tensor.name].file}.",
                    where=str(root / shard),
                    remedy="Download the checkpoint again: two shards disagree.",
                )
            tensors[tensor.name] = tensor
    _check_index(root, tensors)
    weight_files = {*shards, INDEX_NAME, "config.json"}
    others = sorted(
        str(file.relative_to(root))
        for file in root.rglob("*")
        if file.is_file()
        and str(file.relative_to(root)) not in weight_files
        and not _in_hidden_folder(file.relative_to(root))
    )
    return Checkpoint(root, config, tensors, tuple(shards), tuple(others))


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file; UserError where header and file size disagree."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else MAX_HEADER_BYTES + 1
        if length > MAX_HEADER_BYTES or length + 8 > size:
            raise UserError("not a whole safetensors file.", where=str(file), remedy="Download this file again.")
        try:
            header = json.loads(stream.read(length))
            entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
            tensors = [_stored(name, entry, file.name, 8 + length) for name, entry in entries]
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise UserError(
                f"the safetensors header cannot be read ({error}).",
                where=str(file),
                remedy="Download this file again.",
            ) from None
    for tensor in tensors:
        if tensor.offset + tensor.bytes > size:
            raise UserError(
                f"truncated: tensor {tensor.name} ends at byte {tensor.offset + tensor.bytes}, the file has {size}.",
                where=str(file),
                remedy="Download this file again.",
            )
    _check_cover(tensors, 8 + length, size, file)
    return tensors


def header_digest(checkpoint: Checkpoint) -> str:
    """SHA-256 over config and tensor headers, in order; it does not read the weights."""
    parts = [json.dumps(checkpoint.config, sort_keys=True)]
    parts += [f"{t.name} {t.dtype} {t.shape} {t.file} {t.offset}" for t in checkpoint.tensors.values()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def read_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """The tensor `name` on the CPU, read by range into memory of its own."""
    import torch

    tensor = checkpoint.tensors[name]
    buffer = torch.empty(tensor.bytes, dtype=torch.uint8)
    with (checkpoint.path / tensor.file).open("rb", buffering=0) as stream:
        stream.seek(tensor.offset)
        view = memoryview(buffer.numpy())  # type: ignore[arg-type]  # numpy has the buffer protocol
        done = 0
        while done < tensor.bytes:
            count = stream.readinto(view[done:])
            if not count:
                raise UserError(
                    f"the file ended inside tensor {name}.",
                    where=str(checkpoint.path / tensor.file),
                    remedy="It changed while being read; download it again.",
                )
            done += count
    dtype: torch.dtype = getattr(torch, TORCH_NAMES[tensor.dtype])
    return buffer.view(dtype).view(tensor.shape)


def _read_config(root: Path) -> dict[str, Any]:
    file = root / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("config.json is missing.", where=str(root), remedy="Is this a model directory?") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"not valid JSON ({error}).", where=str(file), remedy="Download this file again.") from None
    if not isinstance(config, dict):
        raise UserError("not a JSON object.", where=str(file), remedy="Download this file again.")
    return config


def _shard_names(root: Path) -> list[str]:
    index = root / INDEX_NAME
    if index.exists():
        weight_map = _weight_map(index)
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if not (root / name).is_file()]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(names)} shards are missing: {', '.join(missing[:3])}"
                + (", …" if len(missing) > 3 else "."),
                where=str(root),
                remedy=f"Download them; {INDEX_NAME} names them.",
            )
        return names
    if (root / SINGLE_NAME).is_file():
        return [SINGLE_NAME]
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in root.glob(pattern))
    if pickles:
        raise UserError(
            f"the weights are pickles ({pickles[0]}), which can run code when they are loaded.",
            where=str(root),
            remedy="Convert them to safetensors first, or download the safetensors revision.",
        )
    raise UserError(
        f"no weights: neither {SINGLE_NAME} nor {INDEX_NAME}.",
        where=str(root),
        remedy="Give a directory with safetensors weights.",
    )


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        pairs = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"no readable weight_map ({type(error).__name__}: {error}).",
            where=str(index),
            remedy="Download this file again.",
        ) from None
    for name, file in pairs.items():
        if not re.fullmatch(r"[^/\\\0]+\.safetensors", file):
            raise UserError(
                f"weight_map sends {name} to {file!r}, which is not a safetensors file of this directory.",
                where=str(index),
                remedy="Do not use this checkpoint: its index points outside.",
            )
    return pairs


def _check_index(root: Path, tensors: Mapping[str, StoredTensor]) -> None:
    index = root / INDEX_NAME
    if not index.exists():
        return
    for name, file in _weight_map(index).items():
        if name not in tensors or tensors[name].file != file:
            raise UserError(
                f"weight_map sends {name} to {file}, which does not hold it.",
                where=str(index),
                remedy="Download the checkpoint again: index and shards do not belong together.",
            )


def _stored(name: str, entry: Mapping[str, Any], file: str, start: int) -> StoredTensor:
    name.encode()  # half a surrogate pair cannot be written again
    begin, end = entry["data_offsets"]
    dtype = entry["dtype"]
    shape = tuple(int(side) for side in entry["shape"])
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"unknown dtype {dtype} of {name}")
    tensor = StoredTensor(name, dtype, shape, file, start + int(begin))
    if begin < 0 or min(shape, default=0) < 0 or end - begin != tensor.bytes:
        raise ValueError(f"{name} has {end - begin} bytes where its shape needs {tensor.bytes}")
    return tensor


def _check_cover(tensors: list[StoredTensor], start: int, size: int, file: Path) -> None:
    """As safetensors asks: tensors fill the file without gaps or overlaps."""
    end = start
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.bytes)):
        if tensor.offset != end:
            raise UserError(
                f"tensor {tensor.name} begins at byte {tensor.offset}, the one before it ends at {end}.",
                where=str(file),
                remedy="Download this file again.",
            )
        end += tensor.bytes
    if end < size:
        raise UserError(f"{size - end} bytes belong to no tensor.", where=str(file), remedy="Download this file again.")


def _in_hidden_folder(relative: Path) -> bool:
    """.git, .cache and their like are not the model's."""
    return any(part.startswith(".") for part in relative.parts[:-1])
