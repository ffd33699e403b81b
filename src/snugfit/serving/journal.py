r"""A file of scored rows that only grows, so that an interrupted run can resume.

    {"journal": "snugfit.served/1", "key": {"model": ..., "rows": digest, ...}}\n      the first line, JSON
    MARK, 16 bytes | CRC-32 of the content, u32 | its length, u64 | content            one record a row, little-endian

A record's content is a line of JSON, `{"row": 7, "fingerprint": ..., "arrays": [["true_logprob", "<f8", [511]], ...]}`,
and the bytes of these arrays in that order. A record is on disk before `put` returns, so a kill or a power cut can only
tear the last one. An incomplete record that no mark follows is such a torn one: it is cut off when the file is opened,
and so is a torn first line. Damaged bytes that a mark follows have another cause and are refused. If a row has two
records, the later one counts.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from snugfit.errors import UserError
from snugfit.serving.answers import PromptLogprobs
from snugfit.storage.files import write_fully

FORMAT = "snugfit.served/1"
MARK = bytes.fromhex("f5736e75676669740ad1c8b2a94e6f0d")
FRAME = struct.Struct("<16sIQ")
ARRAYS = ("true_logprob", "top_ids", "top_logprob", "dense")
START_AGAIN = "Remove it to start again, or name another file."


class Journal:
    """An open journal, locked against other processes; a context manager, which removes one that failed empty.

    `dropped` is how many bytes of a torn record were cut off when it was opened.
    """

    def __init__(self, path: Path, file: int, records: dict[int, tuple[int, int]], end: int, dropped: int) -> None:
        self.path, self.dropped = path, dropped
        self._file, self._records, self._end = file, records, end

    @classmethod
    def open(cls, path: str | Path, key: Mapping[str, Any]) -> Self:
        """The journal at `path`, created if it does not exist, of the run that `key` (plain JSON) identifies.

        UserError where the file belongs to another run, is not a journal, is damaged, or is in use.
        """
        place = Path(path)
        try:
            file = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UserError(
                f"cannot be opened ({error.strerror}).", code="output-not-writable", where=str(place)
            ) from None
        try:
            _lock(file, place)
            _begin(file, place, _first_line(key))
            with mmap.mmap(file, 0, access=mmap.ACCESS_READ) as data:
                start = _check_first_line(data, key, place)
                records, end = _scan(data, start, place)
                dropped = len(data) - end
            if dropped:
                os.ftruncate(file, end)
                os.fsync(file)
        except BaseException:
            os.close(file)
            raise
        return cls(place, file, records, end, dropped)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        if failed and not self._records:
            self.path.unlink(missing_ok=True)  # it keeps nothing, and another run may come
        self.close()

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, row: int) -> bool:
        return row in self._records

    def close(self) -> None:
        """Close the file and release its lock."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def get(self, row: int) -> PromptLogprobs | None:
        """The result of a row, bit for bit as it was put; None if the journal does not have it."""
        if row not in self._records:
            return None
        start, length = self._records[row]
        with mmap.mmap(self._file, 0, access=mmap.ACCESS_READ) as data:
            return _decode(bytearray(data[start : start + length]))

    def put(self, row: int, result: PromptLogprobs) -> None:
        """Store the result of a row; it is on disk when this returns. OSError if it cannot be written."""
        content = _encode(row, result)
        frame = FRAME.pack(MARK, zlib.crc32(content), len(content))
        write_fully(self._file, self._end, frame + content)  # overwrites what a failed put left
        os.fsync(self._file)
        self._records[row] = self._end + len(frame), len(content)
        self._end += len(frame) + len(content)


# The file.


def _lock(file: int, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(
            "another run is writing it.", code="output-busy", where=str(path), remedy="Wait until it ends."
        ) from None


def _first_line(key: Mapping[str, Any]) -> bytes:
    return json.dumps({"journal": FORMAT, "key": dict(key)}, ensure_ascii=False).encode() + b"\n"


def _begin(file: int, path: Path, line: bytes) -> None:
    """Write the first line of a new file, or of a file whose creation was interrupted."""
    if os.fstat(file).st_size >= len(line) or not line.startswith(os.pread(file, len(line), 0)):
        return
    write_fully(file, 0, line)
    os.fsync(file)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _check_first_line(data: mmap.mmap, key: Mapping[str, Any], path: Path) -> int:
    """Where the records begin; UserError for another run's file, with both values of every key that differs."""
    end = data.find(b"\n") + 1
    try:
        line = json.loads(data[:end])
        found = line["key"] if line["journal"] == FORMAT else None
    except (ValueError, LookupError, TypeError):
        found = None
    if not isinstance(found, dict):
        what = "this file is not a journal of scored rows."
        raise UserError(what, code="run-damaged", where=str(path), remedy=START_AGAIN)
    wanted = json.loads(_first_line(key))["key"]
    differing = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    if differing:
        in_file, here = ({name: side.get(name) for name in differing} for side in (found, wanted))
        what = f"belongs to another run: {_say(in_file)} in the file, {_say(here)} here."
        raise UserError(what, code="run-differs", where=str(path), remedy=START_AGAIN)
    return end


def _say(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {json.dumps(value, ensure_ascii=False)}" for name, value in values.items())


def _scan(data: mmap.mmap, place: int, path: Path) -> tuple[dict[int, tuple[int, int]], int]:
    """Offset and length of each row's content, and the end of the last complete record."""
    records = {}
    while place + FRAME.size <= len(data):
        mark, checksum, length = FRAME.unpack_from(data, place)
        start = place + FRAME.size
        if mark != MARK or start + length > len(data):
            break
        content = data[start : start + length]
        if zlib.crc32(content) != checksum:
            break
        records[int(json.loads(content[: content.index(b"\n")])["row"])] = start, length
        place = start + length
    if data.find(MARK, place + 1) >= 0:
        raise UserError(f"is damaged at byte {place}.", code="run-damaged", where=str(path), remedy=START_AGAIN)
    return records, place


# One record's content.


def _encode(row: int, result: PromptLogprobs) -> bytes:
    arrays = {name: getattr(result, name) for name in ARRAYS if getattr(result, name) is not None}
    stored = {name: np.asarray(array, array.dtype.newbyteorder("<"), order="C") for name, array in arrays.items()}
    layout = [[name, array.dtype.str, array.shape] for name, array in stored.items()]
    line = json.dumps({"row": row, "fingerprint": result.fingerprint, "arrays": layout}).encode() + b"\n"
    return b"".join([line, *(array.tobytes() for array in stored.values())])


def _decode(content: bytearray) -> PromptLogprobs:
    place = content.index(b"\n") + 1
    line = json.loads(content[:place])
    arrays = {}
    for name, dtype, shape in line["arrays"]:
        count = int(np.prod(shape, dtype=np.int64))
        array = np.frombuffer(content, dtype, count, place).reshape(shape)
        arrays[name] = array.astype(array.dtype.newbyteorder("="))
        place += array.nbytes
    return PromptLogprobs(fingerprint=line["fingerprint"], **arrays)
