"""The safetensors format: what a header says of a file's tensors, checked in every respect. Reads no files."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import TYPE_CHECKING, Any

from snugfit.errors import UserError
from snugfit.storage.files import AGAIN, parse_json

if TYPE_CHECKING:
    import torch

MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
LARGE_HEADER_BYTES = 16_000_000
MAX_NAME = 1000
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
    """A tensor and where its bytes are."""

    file: str
    offset: int


def header_length(prefix: bytes, size: int, *, where: str) -> int:
    """Bytes of a header from the first 8 of a file of `size` bytes."""
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else MAX_HEADER_BYTES + 1
    if length > MAX_HEADER_BYTES or length + 8 > size:
        raise UserError("not a whole safetensors file.", where=where, remedy=AGAIN)
    return int(length)


def parse_header(raw: bytes, file: str, size: int, *, where: str) -> list[StoredTensor]:
    """The tensors of a header (without its 8 bytes of length) of `file`, which has `size` bytes in all."""
    start = 8 + len(raw)
    try:
        _check_density(raw)
        header = parse_json(raw)
        _check_metadata(header.get("__metadata__"))
        entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
        tensors = [_stored(name, entry, file, start) for name, entry in entries]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, MemoryError) as error:
        reason = str(error)[:300] or type(error).__name__
        raise UserError(f"the safetensors header cannot be read ({reason}).", where=where, remedy=AGAIN) from None
    spans = [(tensor.offset, tensor.offset + tensor.bytes, tensor.name) for tensor in tensors]
    for _, end, name in spans:
        if end > size:
            raise UserError(
                f"truncated: tensor {name} ends at byte {end}, the file has {size}.", where=where, remedy=AGAIN
            )
    _check_cover(spans, start, size, where)
    return tensors


def shown(name: str) -> str:
    """A name as it may stand in a message."""
    return name if name.isprintable() and len(name) <= MAX_NAME else ascii(name)[:300]


def _check_density(raw: bytes) -> None:
    """ValueError for a large header that is mostly punctuation, and would be many times larger in memory."""
    if len(raw) <= LARGE_HEADER_BYTES:
        return
    marks = raw.count(b"{") + raw.count(b"[") + raw.count(b",")
    if marks > 32 * raw.count(b"data_offsets") + len(raw) // 32:
        raise ValueError(f"{len(raw):,} bytes that describe no tensors")


def _check_metadata(metadata: Any) -> None:
    """As safetensors asks: texts by name, if anything."""
    if metadata is not None and not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise ValueError("__metadata__ holds something else than texts")


def _stored(name: str, entry: Mapping[str, Any], file: str, start: int) -> StoredTensor:
    if len(name) > MAX_NAME or not name.isprintable():
        raise ValueError(f"a tensor's name is {len(name)} characters: {ascii(name)[1:200]}")
    begin, end = entry["data_offsets"]
    dtype, sides = entry["dtype"], entry["shape"]
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"unknown dtype {dtype} of {name}")
    sound = isinstance(sides, list) and len(sides) <= 64
    if not sound or not all(type(number) is int and 0 <= number <= MAX_NUMBER for number in (begin, end, *sides)):
        raise ValueError(f"shape or data_offsets of {name} are not numbers that could be")
    if any(size > 2 * MAX_NUMBER for size in accumulate(sides, mul)):  # as safetensors, though a last side be 0
        raise ValueError(f"{name} has more bytes than there can be")
    tensor = StoredTensor(name, dtype, tuple(sides), file, start + begin)
    if end - begin != tensor.bytes:
        raise ValueError(f"{name} has {end - begin} bytes where its shape needs {tensor.bytes}")
    return tensor


def _check_cover(spans: list[tuple[int, int, str]], start: int, size: int, where: str) -> None:
    """As safetensors asks: tensors, given by begin, end and name, fill the file without gaps or overlaps."""
    last = start
    for begin, end, name in sorted(spans):
        if begin != last:
            raise UserError(
                f"tensor {name} begins at byte {begin}, the one before it ends at {last}.", where=where, remedy=AGAIN
            )
        last = end
    if last < size:
        raise UserError(f"{size - last} bytes belong to no tensor.", where=where, remedy=AGAIN)


def dtype_of(info: TensorInfo) -> torch.dtype:
    """torch's dtype of a tensor of the file."""
    import torch

    found: torch.dtype = getattr(torch, TORCH_NAMES[info.dtype])
    return found
