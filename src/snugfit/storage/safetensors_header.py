"""The safetensors format: the header of a file, checked in every respect, becomes a list of tensors. Reads no files."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import TYPE_CHECKING, Any

from snugfit.errors import UserError
from snugfit.storage.files import DOWNLOAD_AGAIN, parse_json_object

if TYPE_CHECKING:
    import torch

MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
LARGE_HEADER_BYTES = 16_000_000
MAX_NAME_LENGTH = 1000  # characters
MAX_DIMENSIONS = 64
MAX_NUMBER = 2**63 - 1

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


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
class StoredTensor(TensorInfo):
    """A tensor and the place of its bytes: `offset` from the beginning of `file`."""

    file: str
    offset: int


def header_length(prefix: bytes, size: int, *, where: str) -> int:
    """Bytes of a header from the first 8 of a file of `size` bytes."""
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else MAX_HEADER_BYTES + 1
    if length > MAX_HEADER_BYTES or length + 8 > size:
        what = "not a whole safetensors file."
        raise UserError(what, code="header-invalid", where=where, remedy=DOWNLOAD_AGAIN)
    return int(length)


def parse_header(raw: bytes, file: str, size: int, *, where: str) -> list[StoredTensor]:
    """The tensors of a header (without its 8 bytes of length) of `file`, which has `size` bytes in all."""
    start = 8 + len(raw)
    try:
        _check_density(raw)
        header = parse_json_object(raw)
        _check_metadata(header.get("__metadata__"))
        entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
        tensors = [_stored(name, entry, file, start) for name, entry in entries]
    except (ValueError, RecursionError, MemoryError) as error:
        reason = str(error)[:300] or type(error).__name__
        what = f"the safetensors header cannot be read ({reason})."
        raise UserError(what, code="header-invalid", where=where, remedy=DOWNLOAD_AGAIN) from None
    spans = [(tensor.offset, tensor.offset + tensor.bytes, tensor.name) for tensor in tensors]
    for _, end, name in spans:
        if end > size:
            what = f"truncated: tensor {name} ends at byte {end}, the file has {size} bytes."
            raise UserError(what, code="file-damaged", where=where, remedy=DOWNLOAD_AGAIN)
    _check_cover(spans, start, size, where)
    return tensors


def shown(name: str) -> str:
    """A name in a form that a message can contain."""
    return name if name.isprintable() and len(name) <= MAX_NAME_LENGTH else ascii(name)[:300]


def _check_density(raw: bytes) -> None:
    """ValueError for a large header of mostly punctuation, which would take many times its size in memory."""
    if len(raw) <= LARGE_HEADER_BYTES:
        return
    marks = raw.count(b"{") + raw.count(b"[") + raw.count(b",")
    if marks > 32 * raw.count(b"data_offsets") + len(raw) // 32:
        raise ValueError(f"{len(raw):,} bytes that describe no tensors")


def _check_metadata(metadata: Any) -> None:
    """ValueError unless metadata is absent or maps names to texts, as safetensors requires."""
    if metadata is not None and not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise ValueError("__metadata__ must map names to texts")


def _stored(name: str, entry: Any, file: str, start: int) -> StoredTensor:
    """A tensor of the header; ValueError for an entry that describes none."""
    if len(name) > MAX_NAME_LENGTH or not name.isprintable():
        raise ValueError(f"a tensor's name is {len(name)} characters: {ascii(name)[1:200]}")
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"{name} lacks a dtype, a shape or data_offsets")
    dtype, sides, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ValueError(f"unknown dtype {dtype} of {name}")
    if not (_are_numbers(sides) and len(sides) <= MAX_DIMENSIONS and _are_numbers(offsets) and len(offsets) == 2):
        raise ValueError(f"shape or data_offsets of {name} are not lists of whole numbers in range")
    begin, end = offsets
    if any(size > 2 * MAX_NUMBER for size in accumulate(sides, mul)):
        # as safetensors does, even where a later side is 0
        raise ValueError(f"{name} has more than 2^64 values")
    tensor = StoredTensor(name, dtype, tuple(sides), file, start + begin)
    if end - begin != tensor.bytes:
        raise ValueError(f"{name} has {end - begin} bytes where its shape needs {tensor.bytes}")
    return tensor


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and 0 <= number <= MAX_NUMBER for number in value)


def _check_cover(spans: list[tuple[int, int, str]], start: int, size: int, where: str) -> None:
    """UserError where tensors (begin, end, name) leave gaps or overlap, which safetensors does not allow."""
    last = start
    for begin, end, name in sorted(spans):
        if begin != last:
            what = f"tensor {name} begins at byte {begin}, but the tensor before it ends at byte {last}."
            raise UserError(what, code="header-invalid", where=where, remedy=DOWNLOAD_AGAIN)
        last = end
    if last < size:
        what = f"{size - last} bytes at the end belong to no tensor."
        raise UserError(what, code="header-invalid", where=where, remedy=DOWNLOAD_AGAIN)


def dtype_of(info: TensorInfo) -> torch.dtype:
    """torch's dtype of a tensor of the file."""
    import torch

    found: torch.dtype = getattr(torch, TORCH_NAMES[info.dtype])
    return found
