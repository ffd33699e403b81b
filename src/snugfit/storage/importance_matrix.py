"""llama.cpp's importance matrices: sums of squares of what came into each weight of a GGUF model, in two file formats.

Both are read here within bounds, from files that may come from strangers. GGUF (since 2025): for each weight NAME the
fp32 tensors NAME.in_sum2 [experts, K], sums over tokens, and NAME.counts [experts, 1], tokens; metadata name the texts.
The older format: a count of entries, each a name, a number of calls and values, mean squares times that number; then
the number of chunks and the name of the text. It does not say how many tokens reached an expert; experts that none
reached have values of one. Layouts as in llama.cpp's tools/imatrix/imatrix.cpp.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from snugfit.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LEGACY_CHUNK = 512  # tokens of a chunk: llama-imatrix's default, which the older format does not store
MAX_ENTRIES, MAX_NAME = 1_000_000, 4096
_GGUF, _FP32, _STRING, _ARRAY, _UINT32 = b"GGUF", 0, 8, 9, 4
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value by its type
_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class Importance:
    """Of one weight: mean squares of its input features, fp32 [matrices * K], and tokens that reached each matrix.

    The older format has one count for all matrices of a weight: those with data had as many tokens at most.
    """

    squares: NDArray[np.float32]
    counts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ImportanceMatrix:
    """A file: its weights by GGUF names, the texts that it was made of, chunks, and the file's SHA-256."""

    weights: Mapping[str, Importance]
    texts: tuple[str, ...]
    chunks: int
    digest: str
    is_legacy: bool


def read_importance_matrix(file: Path) -> ImportanceMatrix:
    """An importance matrix of either format; UserError for a file that is anything else."""
    if not file.is_file():
        remedy = "Give an importance matrix of llama.cpp: a file, imatrix.gguf or imatrix.dat."
        raise UserError("no such file.", code="file-missing", where=str(file), remedy=remedy)
    try:
        content = file.read_bytes()
    except OSError as error:
        what = f"cannot be read ({error.strerror or error})."
        raise UserError(what, code="file-unreadable", where=str(file), remedy="Check its permissions.") from None
    try:
        found = _read_gguf(content) if content[:4] == _GGUF else _read_legacy(content)
        _check(found)
    except (ValueError, struct.error) as error:
        raise UserError(
            f"no importance matrix of llama.cpp, or a damaged one ({error}).",
            code="statistics-invalid",
            where=str(file),
            remedy="Give a file that llama-imatrix wrote, whole.",
        ) from None
    return found


def _check(found: ImportanceMatrix) -> None:
    import numpy as np

    if not found.weights:
        raise ValueError("it has no entries")
    for name, one in found.weights.items():
        if not len(one.squares) or not (np.isfinite(one.squares).all() and (one.squares >= 0).all()):
            raise ValueError(f"{name!r}: mean squares must be >= 0 and finite")
        if len(one.squares) % max(1, len(one.counts)):
            raise ValueError(f"{name!r}: {len(one.squares)} values and {len(one.counts)} counts")


class _Bytes:
    """Reads little-endian values one after another; struct.error or ValueError beyond the end."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.at = 0

    def number(self, kind: str) -> int:
        """A number of struct's kind."""
        (value,) = struct.unpack_from(f"<{kind}", self.content, self.at)
        self.at += struct.calcsize(f"<{kind}")
        return int(value)

    def skip(self, count: int) -> None:
        """Leave out bytes."""
        if not 0 <= count <= len(self.content) - self.at:
            raise ValueError("it ends early")
        self.at += count

    def text(self, kind: str) -> str:
        """A text behind its length, a number of struct's kind."""
        length = self.number(kind)
        if not 0 <= length <= MAX_NAME:
            raise ValueError(f"a name of {length} bytes")
        start = self.at
        self.skip(length)
        return self.content[start : self.at].decode("utf-8", "replace")

    def floats(self, count: int) -> NDArray[np.float32]:
        """fp32 numbers [count]."""
        import numpy as np

        start = self.at
        self.skip(4 * count)
        return np.frombuffer(self.content, dtype="<f4", count=count, offset=start).astype(np.float32)


def _read_legacy(content: bytes) -> ImportanceMatrix:
    import numpy as np

    file = _Bytes(content)
    entries = file.number("i")
    if not 0 < entries <= MAX_ENTRIES:
        raise ValueError(f"{entries} entries")
    weights: dict[str, Importance] = {}
    for _ in range(entries):
        name, calls, count = file.text("i"), file.number("i"), file.number("i")
        if calls < 0 or count < 1:
            raise ValueError(f"{name!r} has {count} values of {calls} calls")
        values = file.floats(count)
        weights[name] = Importance(values / np.float32(max(1, calls)), (calls * LEGACY_CHUNK,))
    chunks, texts = 0, []
    if file.at < len(content):  # the first versions end here
        chunks = max(0, file.number("i"))
    if file.at < len(content):
        texts.append(file.text("i"))
    return ImportanceMatrix(weights=weights, texts=tuple(texts), chunks=chunks, digest=_digest(content), is_legacy=True)


def _read_gguf(content: bytes) -> ImportanceMatrix:
    import numpy as np

    file = _Bytes(content)
    file.skip(len(_GGUF))
    version, tensors, pairs = file.number("I"), file.number("Q"), file.number("Q")
    if version not in (2, 3):
        raise ValueError(f"GGUF of version {version}")
    if tensors > MAX_ENTRIES or pairs > MAX_ENTRIES:
        raise ValueError(f"{tensors} tensors, {pairs} keys")
    metadata = dict(_pair(file) for _ in range(pairs))
    if metadata.get("general.type") != "imatrix":
        raise ValueError(f"a GGUF file of general.type {metadata.get('general.type')!r}, not 'imatrix'")
    infos = [_tensor_info(file) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
        raise ValueError(f"alignment {alignment!r}")
    file.skip(-file.at % alignment if -file.at % alignment <= len(content) - file.at else 0)
    start, found = file.at, {}
    for name, count, offset in infos:
        file.at = start
        file.skip(offset)
        found[name] = file.floats(count)
    weights: dict[str, Importance] = {}
    for name, sums in found.items():
        if not name.endswith(_SUMS):
            continue
        weight = name.removesuffix(_SUMS)
        counts = found.get(weight + _COUNTS)
        if counts is None or not len(counts) or len(sums) % len(counts):
            raise ValueError(f"{weight!r} has no counts that fit its sums")
        if not (np.isfinite(counts).all() and (counts >= 0).all()):
            raise ValueError(f"{weight!r}: counts must be >= 0 and finite")
        tokens = np.maximum(counts, 1).astype(np.float32).repeat(len(sums) // len(counts))
        weights[weight] = Importance(sums / tokens, tuple(round(float(count)) for count in counts))
    texts, chunks = metadata.get("imatrix.datasets", ()), metadata.get("imatrix.chunk_count", 0)
    return ImportanceMatrix(
        weights=weights,
        texts=texts if isinstance(texts, tuple) else (),
        chunks=chunks if isinstance(chunks, int) else 0,
        digest=_digest(content),
        is_legacy=False,
    )


def _pair(file: _Bytes) -> tuple[str, str | int | tuple[str, ...] | None]:
    """A key of GGUF's metadata and its value, None for a kind that is of no use here."""
    key, kind = file.text("Q"), file.number("I")
    if kind == _STRING:
        return key, file.text("Q")
    if kind == _UINT32:
        return key, file.number("I")
    if kind != _ARRAY:
        file.skip(_size(kind))
        return key, None
    kind, count = file.number("I"), file.number("Q")
    if kind == _STRING:
        if count > MAX_ENTRIES:
            raise ValueError(f"{count} texts")
        return key, tuple(file.text("Q") for _ in range(count))
    file.skip(count * _size(kind))
    return key, None


def _size(kind: int) -> int:
    if kind not in _SIZES:
        raise ValueError(f"metadata of type {kind}")
    return _SIZES[kind]


def _tensor_info(file: _Bytes) -> tuple[str, int, int]:
    """A tensor's name, number of fp32 values and offset."""
    name, dimensions = file.text("Q"), file.number("I")
    if not 1 <= dimensions <= 4:
        raise ValueError(f"{name!r} has {dimensions} dimensions")
    count = 1
    for _ in range(dimensions):
        count *= file.number("Q")
    kind, offset = file.number("I"), file.number("Q")
    if kind != _FP32:
        raise ValueError(f"{name!r} has type {kind}, not fp32")
    return name, count, offset


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
