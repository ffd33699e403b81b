"""Safetensors shards, planned to the byte before the first tensor is written."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from snugfit.storage.background import WORKERS, Background
from snugfit.storage.checkpoint import SINGLE_NAME, Checkpoint
from snugfit.storage.files import PIECE_BYTES, write_fully
from snugfit.storage.growing import GrowingFile
from snugfit.storage.safetensors_header import TORCH_NAMES, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from snugfit.storage.transfer import Copy, PendingTransfer, Transfer

SMALL_BYTES, MOST_SMALL = 1 << 17, 64  # of a tensor that is written with others; so many in one job

# safetensors' dtype order, which its writer sorts by, largest first
SERIAL_ORDER = (
    *("BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"),
    *("I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64", "F64", "I64", "U64"),
)


@dataclass(frozen=True)
class Shard:
    """A planned safetensors file: its whole header, and the offset of each tensor in the file."""

    name: str
    header: bytes
    offsets: Mapping[str, int]
    tensors: tuple[TensorInfo, ...]
    bytes: int


def plan_shards(tensors: Sequence[TensorInfo], max_shard_bytes: int) -> list[Shard]:
    """Lay tensors out in shards of at most `max_shard_bytes`, in the given order; a larger tensor has its own shard."""
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
    return [lay_out(name, part) for name, part in zip(names, parts, strict=True)]


def lay_out(name: str, tensors: Iterable[TensorInfo]) -> Shard:
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


class WrittenFiles:
    """Shards that are whole: the background has the disk take them, and closes them once they are digested, too."""

    def __init__(
        self, digests: Mapping[str, Future[str]], ends: Sequence[Future[None]], stopped: threading.Event
    ) -> None:
        """`ends` are those of the work on each file, of which no more is begun once it is `stopped`."""
        self._digests, self._ends, self._stopped = digests, ends, stopped

    def digests(self) -> dict[str, str]:
        """SHA-256 by file name, nothing without digests, when what this process wrote is on the disk."""
        for end in self._ends:
            end.result()
        return {name: digest.result() for name, digest in self._digests.items()}

    def forget(self) -> None:
        """Nobody will ask for the files: no more is digested or flushed."""
        self._stopped.set()


class ShardWriter:
    """Writes tensors to their places in planned shards, in any order, in the background; knows which are missing.

    The SHA-256 of a shard is computed, and the disk takes it, while it grows. One thread calls the methods; another may
    call the functions that `pending_writes` returns, so the state that both change is under a lock.
    """

    def __init__(
        self,
        directory: Path,
        shards: Sequence[Shard],
        transfer: Transfer,
        *,
        digests: bool = True,
        lasts: bool = True,
    ) -> None:
        """Create the shard files at their full size, headers written; files that have both stay as they are.

        Of what is written to such files bytes that they have already are not written again.

        Without `digests` others write to the same files, and one of them computes the digests. Files that do not last
        have no digests, nothing has the disk take them, and tensors that are copies of the source's are left out.
        """
        self._transfer = transfer
        self._shard_of = {tensor.name: shard for shard in shards for tensor in shard.tensors}
        self._missing = {tensor.name: tensor for shard in shards for tensor in shard.tensors}
        self._started: dict[str, PendingTransfer[list[int]]] = {}  # since the last call of `pending_writes`
        self._omitted: list[str] = []  # since then, too
        self._from_memory: list[PendingTransfer[list[int]]] = []  # of those, what holds tensors until it has ended
        self._before: list[PendingTransfer[list[int]]] = []  # such writes that were started before the last call
        self._small: dict[str, Tensor] = {}  # to be written in one job, which costs more than their bytes
        self._copies: list[Copy] = []  # to begin together
        self.lasts = lasts
        self._digester = ThreadPoolExecutor(WORKERS) if digests and lasts else None
        self._flusher = ThreadPoolExecutor(WORKERS) if lasts else None
        self._lock = threading.Lock()  # of the next two
        self._pending: list[dict[str, PendingTransfer[list[int]]]] = []
        self._settled: set[str] = set()  # files that tensors were written to
        self._files: dict[str, GrowingFile] = {}
        self._by_handle: dict[int, GrowingFile] = {}
        self._stopped = threading.Event()
        try:
            for shard in shards:
                self._create(directory / shard.name, shard)
        except BaseException:
            self.close()
            raise

    def _create(self, path: Path, shard: Shard) -> None:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._files[shard.name] = file = GrowingFile(handle, shard.bytes, self._digester, self._flusher, self._stopped)
        self._by_handle[handle] = file
        size = os.fstat(handle).st_size
        if size != shard.bytes or os.pread(handle, len(shard.header), 0) != shard.header:
            if size:
                os.ftruncate(handle, 0)  # of an empty file it makes ext4 write all of it to the disk when it is closed
            os.ftruncate(handle, shard.bytes)
            write_fully(handle, 0, shard.header)
        file.note(0, len(shard.header))

    def write(self, name: str, tensor: Tensor) -> None:
        """Begin to write a tensor; AssertionError for a shape or dtype other than the planned one."""
        import torch

        planned = self._missing.pop(name)
        if tuple(tensor.shape) != planned.shape or tensor.dtype != getattr(torch, TORCH_NAMES[planned.dtype]):
            got = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise AssertionError(f"{name}: planned {planned.dtype} {planned.shape}, got {got}")
        if tensor.nbytes <= SMALL_BYTES:
            self._small[name] = tensor
            if len(self._small) == MOST_SMALL:
                self._start_small()
            return
        self._started[name] = self._transfer.write(*self._place(name), tensor, self._note)
        self._from_memory.append(self._started[name])

    def _place(self, name: str) -> tuple[int, int]:
        """The open file that a tensor goes to, and where in it."""
        shard = self._shard_of[name]
        return self._files[shard.name].handle, shard.offsets[name]

    def _note(self, handle: int, start: int, end: int) -> None:
        self._by_handle[handle].note(start, end)

    def _start_small(self) -> None:
        small, self._small = self._small, {}
        if small:
            places = [(*self._place(name), tensor) for name, tensor in small.items()]
            found = self._transfer.write_many(places, self._note)
            self._started |= dict(zip(small, found, strict=True))
            self._from_memory += found

    def copy(self, checkpoint: Checkpoint, name: str, *, infinite: bool = False) -> None:
        """Have `start` copy a tensor from the source as it is, `infinite` values too if it may have some.

        It is left out of files that do not last. AssertionError where it is not as planned.
        """
        from snugfit.storage.transfer import Copy

        planned, found = self._missing.pop(name), checkpoint.tensors[name]
        if (planned.dtype, planned.shape) != (found.dtype, found.shape):
            raise AssertionError(f"{name}: planned {planned.dtype} {planned.shape}, got {found.dtype} {found.shape}")
        if self.lasts:
            self._copies.append(Copy(checkpoint, name, *self._place(name), infinite))
        else:
            self._omitted.append(name)

    def start(self) -> None:
        """Begin with what was held back to be written together."""
        self._start_small()
        copies, self._copies = self._copies, []
        found = self._transfer.copy_many(copies, self._note)
        self._started |= {copy.name: pending for copy, pending in zip(copies, found, strict=True)}

    def drain(self) -> None:
        """Wait for the writes started since the last call of `pending_writes`; raises what went wrong."""
        self.start()
        for write in self._started.values():
            write.result()

    def pending_writes(self) -> Callable[[], dict[str, list[int] | None]]:
        """The writes started since the last call, as a function that waits until the files hold them.

        It returns the CRC-32s of each tensor's pieces, None for one that was left out, and may be called in another
        thread. It raises what the disk said of the tensors before.

        Tensors that wait for a slow disk do not add up: those of the call before have left memory when this one ends.
        Copies from file to file, which hold none, are not waited for.
        """
        self.start()
        before, self._before, self._from_memory = self._before, self._from_memory, []
        for write in before:
            write.result()
        writes, self._started = self._started, {}
        omitted, self._omitted = self._omitted, []
        with self._lock:
            self._pending.append(writes)

        def wait() -> dict[str, list[int] | None]:
            found: dict[str, list[int] | None] = {name: write.result() for name, write in writes.items()}
            found |= dict.fromkeys(omitted)
            with self._lock:
                self._pending.remove(writes)
                for name in self._settled:
                    self._files[name].check()
                self._settled |= {self._shard_of[name].name for name in found}
            return found

        return wait

    def holds(self, written: Mapping[str, Sequence[int] | None]) -> bool:
        """Whether the files have these tensors (name -> CRC-32s, None for one left out), written by an earlier run."""
        return all(
            name in self._missing and (crcs is None or self._crc(name) == list(crcs)) for name, crcs in written.items()
        )

    def _crc(self, name: str) -> list[int]:
        return crc_of(*self._place(name), self._missing[name].bytes)

    def accept(self, names: Iterable[str]) -> None:
        """Count tensors that an earlier run wrote, or another process of this one, as written."""
        for name in names:
            handle, start = self._place(name)
            self._note(handle, start, start + self._missing.pop(name).bytes)

    def finish(self, background: Background) -> WrittenFiles:
        """Leave the shards to the background. AssertionError for a planned tensor that was not written."""
        open_ends = (self._missing, self._small, self._copies, self._omitted, self._started, self._pending)
        if any(open_ends):
            raise AssertionError(f"planned tensors were not written: {sorted(self._missing)[:5]}")
        files, self._files = self._files, {}
        for pool in filter(None, (self._digester, self._flusher)):
            pool.shutdown(wait=False)
        digests = {name: file.digest for name, file in files.items() if file.digest is not None}
        return WrittenFiles(digests, [background.submit(file.end) for file in files.values()], self._stopped)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the shard files as they are, once the writes that have started have ended."""
        with self._lock:
            pending = [*self._pending, self._started]
        for writes in pending:
            for write in writes.values():
                write.cancel()
        self._started.clear()
        if not self._files:  # the background has them
            return
        self._stopped.set()
        for pool in filter(None, (self._digester, self._flusher)):
            pool.shutdown(wait=True, cancel_futures=True)
        for file in self._files.values():
            os.close(file.handle)
        self._files.clear()


def index_text(tensors: Iterable[tuple[str, TensorInfo]]) -> str:
    """The text of model.safetensors.index.json for tensors, each with the name of its file."""
    files = sorted((tensor.name, file, tensor.bytes) for file, tensor in tensors)
    total = sum(size for _, _, size in files)
    index = {"metadata": {"total_size": total}, "weight_map": {name: file for name, file, _ in files}}
    return json.dumps(index, indent=2) + "\n"


def file_digests(directory: Path, names: Sequence[str]) -> dict[str, str]:
    """SHA-256 of files, hexadecimal, by name."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        return dict(zip(names, pool.map(lambda name: file_digest(directory / name), names), strict=True))


def crc_of(handle: int, offset: int, size: int) -> list[int]:
    """The CRC-32 of each piece of a tensor in an open file; of fewer bytes where the file ends before."""
    pieces = ((offset + start, min(PIECE_BYTES, size - start)) for start in range(0, size, PIECE_BYTES))
    return [zlib.crc32(os.pread(handle, length, start)) for start, length in pieces]


def file_digest(file: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
