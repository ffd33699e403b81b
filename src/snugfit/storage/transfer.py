"""Tensors between files and a device, in pieces and in threads: only a few pieces are in memory at once.

The next weights are read and the last ones are written while the device computes.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, zip_longest
from typing import Any, Generic, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from snugfit.errors import UserError
from snugfit.storage.checkpoint import Checkpoint, piece_of, read_range, read_whole
from snugfit.storage.files import PIECE_BYTES, read_run_file, write_fully
from snugfit.storage.safetensors_header import StoredTensor, dtype_of

WORKERS = {"cpu": 1, "cuda": 8}  # for reading, and as many for writing
CONNECTIONS = 8  # to the Hub: a request waits for the other side more than for this one
REMOTE_AHEAD_BYTES = 256_000_000  # of weights on the Hub that are read while others are worked on
COPIERS = {"cpu": 1, "cuda": 8}  # for copies from file to file: a core checks and sums up half a GB a second
PACK_BYTES = 4 << 20  # of small tensors that are read at once
_ALIGNED = 512  # bytes, as torch aligns tensors on a GPU: where one begins decides which kernels run it
# the bits of the exponent, which are all set in numbers that are not finite
_EXPONENTS: Mapping[str, tuple[type[np.unsignedinteger[Any]], int]] = {
    "BF16": (np.uint16, 0x7F80),
    "F16": (np.uint16, 0x7C00),
    "F32": (np.uint32, 0x7F800000),
    "F64": (np.uint64, 0x7FF0000000000000),
}

E4M3_NAN = 0x7F  # without the sign

Result = TypeVar("Result")
# hears that an open file has its bytes from the first number to the second, in the thread that wrote them
Note = Callable[[int, int, int], object]


def nobody(*_: int) -> None:
    """A `Note` that nobody hears."""


def buffer_bytes(device: torch.device, *, remote: bool = False) -> int:
    """Bytes of main memory that the threads of a Transfer hold at most."""
    readers = CONNECTIONS if remote else WORKERS[device.type]
    return (readers + WORKERS[device.type] + COPIERS[device.type]) * PIECE_BYTES


@dataclass(frozen=True)
class Copy:
    """A tensor of a checkpoint, by its name, and where it goes: an open file, and an offset in it."""

    checkpoint: Checkpoint
    name: str
    handle: int
    offset: int
    infinite: bool = False  # it may have such values


@dataclass
class PendingTransfer(Generic[Result]):
    """A read or write whose pieces are queued or running; `result` waits for all of them."""

    pieces: Sequence[Future[Any]]
    finish: Callable[[list[Any]], Result]

    def result(self) -> Result:
        """The tensor, or the CRC-32 of each piece; raises the first error of a piece."""
        return self.finish([piece.result() for piece in self.pieces])

    def done(self) -> bool:
        """Whether all pieces have ended."""
        return all(piece.done() for piece in self.pieces)

    def cancel(self) -> None:
        """Cancel the pieces that have not started, and wait for the others."""
        for piece in self.pieces:
            if not piece.cancel():
                piece.exception()


class Transfer:
    """Threads that read and write tensors.

    For a GPU each thread has a stream of its own and a buffer of one piece in page-locked memory.
    """

    def __init__(self, device: torch.device, *, remote: bool = False) -> None:
        """Threads for `device`; with `remote` as many connections as a server on the network needs to keep busy."""
        self.device = device
        # separate pools: a read that the run waits for must not queue behind writes
        self._readers = _threads(CONNECTIONS if remote else WORKERS[device.type], device)
        self._writers = _threads(WORKERS[device.type], device)
        self._copiers = _threads(COPIERS[device.type], device)
        self._local = threading.local()

    def read(self, checkpoint: Checkpoint, name: str, expert: int | None = None) -> PendingTransfer[Tensor]:
        """Begin to read a tensor to the device; with `expert`, that expert's part of a tensor of all experts."""
        info = checkpoint.tensors[name]
        part, first = piece_of(info, expert)
        return self._read(
            part.shape, dtype_of(part), lambda start, view: read_range(checkpoint, info, first + start, view)
        )

    def read_many(self, checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, PendingTransfer[Tensor]]:
        """Begin to read tensors to the device; small ones, in the order of the file, share a job and a piece of memory.

        A mixture has thousands of small tensors, whose jobs cost more than their bytes.
        """
        found: dict[str, PendingTransfer[Tensor]] = {}
        for pack in packs_of([checkpoint.tensors[name] for name in names]):
            if len(pack) == 1:
                found[pack[0].name] = self.read(checkpoint, pack[0].name)
            else:
                found |= self._read_pack(checkpoint, pack)
        return found

    def _read_pack(self, checkpoint: Checkpoint, pack: Sequence[StoredTensor]) -> dict[str, PendingTransfer[Tensor]]:
        starts = [0, *accumulate(aligned(tensor) for tensor in pack)]
        places = [slice(start, start + tensor.bytes) for start, tensor in zip(starts, pack, strict=False)]
        target = torch.empty(starts[-1], dtype=torch.uint8, device=self.device)

        def fill(raw: memoryview) -> None:
            read_whole(checkpoint, ((tensor, raw[place]) for tensor, place in zip(pack, places, strict=True)))

        pieces = [self.fill(target, fill, record_event(self.device))]

        def pending(tensor: StoredTensor, place: slice) -> PendingTransfer[Tensor]:
            return PendingTransfer(pieces, lambda _: target[place].view(dtype_of(tensor)).view(tensor.shape))

        return {tensor.name: pending(tensor, place) for tensor, place in zip(pack, places, strict=True)}

    def read_file(
        self, handle: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> PendingTransfer[Tensor]:
        """Begin to read a tensor from an open file to the device."""
        return self._read(shape, dtype, lambda start, view: read_run_file(handle, offset + start, view))

    def _read(
        self, shape: tuple[int, ...], dtype: torch.dtype, fill: Callable[[int, memoryview], None]
    ) -> PendingTransfer[Tensor]:
        target = torch.empty(shape, dtype=dtype, device=self.device)
        flat = _bytes_of(target)
        ready = record_event(self.device)
        starts = range(0, flat.numel(), PIECE_BYTES)
        pieces = [self.fill(flat[start : start + PIECE_BYTES], partial(fill, start), ready) for start in starts]
        return PendingTransfer(pieces, lambda _: target)

    def fill(self, target: Tensor, fill: Callable[[memoryview], None], ready: torch.cuda.Event | None) -> Future[int]:
        """Begin to have `fill` read the bytes `target` uint8 [n], a piece at most, of a tensor on the device.

        Until the event `ready`, recorded when the tensor was made, earlier work may still use its memory.
        """

        def job() -> int:
            if not target.is_cuda:
                fill(_raw(target))
                return 0
            buffer, stream = self._thread_buffers()
            held = buffer[: len(target)]
            fill(_raw(held))
            _run_on_stream(stream, ready, lambda: target.copy_(held, non_blocking=True))
            return 0

        return self._readers.submit(job)

    def write(self, handle: int, offset: int, tensor: Tensor, note: Note = nobody) -> PendingTransfer[list[int]]:
        """Begin to write a tensor to an open file; the result is the CRC-32 of each piece, `note` hears of each."""
        flat = _bytes_of(tensor.detach())
        ready = record_event(tensor.device)

        def piece(start: int, size: int) -> int:
            if not flat.is_cuda:
                return _write_run_file(handle, offset + start, _raw(flat[start : start + size]), note)
            buffer, stream = self._thread_buffers()
            _run_on_stream(stream, ready, lambda: buffer[:size].copy_(flat[start : start + size], non_blocking=True))
            return _write_run_file(handle, offset + start, _raw(buffer[:size]), note)

        return PendingTransfer(_pieces(self._writers, flat.numel(), piece), list)

    def write_many(
        self, places: Sequence[tuple[int, int, Tensor]], note: Note = nobody
    ) -> list[PendingTransfer[list[int]]]:
        """Begin to write tensors, each to an open file at an offset, in one job; together they take a piece at most."""
        sources = [_bytes_of(tensor.detach()) for _, _, tensor in places]
        ready = record_event(self.device)

        def job() -> list[list[int]]:
            held = sources
            if self.device.type == "cuda":
                buffer, stream = self._thread_buffers()
                held = list(buffer.split([len(source) for source in sources] + [PIECE_BYTES - total]))[:-1]

                def fetch() -> None:
                    for target, source in zip(held, sources, strict=True):
                        target.copy_(source, non_blocking=True)

                _run_on_stream(stream, ready, fetch)
            return [
                [_write_run_file(handle, offset, _raw(raw), note)] if len(raw) else []
                for (handle, offset, _), raw in zip(places, held, strict=True)
            ]

        total = sum(map(len, sources))
        found = self._writers.submit(job)
        return [PendingTransfer([found], partial(_entry, number)) for number in range(len(places))]

    def copy_many(self, copies: Sequence[Copy], note: Note = nobody) -> list[PendingTransfer[list[int]]]:
        """Begin to copy tensors from file to file; UserError for NaN, and for infinite values where none may be.

        The files take turns, a piece each, so that all grow, and are digested, at the same time.
        """

        def piece(copy: Copy, start: int, size: int) -> int:
            info = copy.checkpoint.tensors[copy.name]
            buffer, _ = self._thread_buffers()
            raw = _raw(buffer[:size])
            read_range(copy.checkpoint, info, start, raw)
            _check_finite(copy.checkpoint, info, raw, infinite=copy.infinite)
            return _write_run_file(copy.handle, copy.offset + start, raw, note)

        files: dict[int, list[tuple[int, int, int]]] = {}
        for number, copy in sorted(enumerate(copies), key=lambda entry: entry[1].offset):
            total = copy.checkpoint.tensors[copy.name].bytes
            pieces = [(number, start, min(PIECE_BYTES, total - start)) for start in range(0, total, PIECE_BYTES)]
            files.setdefault(copy.handle, []).extend(pieces)
        found: list[list[Future[int]]] = [[] for _ in copies]
        for turn in zip_longest(*files.values()):
            for number, start, size in filter(None, turn):
                found[number].append(self._copiers.submit(piece, copies[number], start, size))
        return [PendingTransfer(pieces, list) for pieces in found]

    def _thread_buffers(self) -> tuple[Tensor, torch.cuda.Stream | None]:
        """This thread's buffer of one piece, and its stream (None on the CPU)."""
        if not hasattr(self._local, "buffer"):
            cuda = self.device.type == "cuda"
            self._local.buffer = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=cuda)
            self._local.stream = torch.cuda.Stream(self.device) if cuda else None
        return self._local.buffer, self._local.stream

    def close(self) -> None:
        """Cancel work that has not started, and wait for the rest."""
        for pool in (self._readers, self._writers, self._copiers):
            pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _entry(number: int, results: list[list[list[int]]]) -> list[int]:
    """One tensor's part of what a job gave."""
    return results[0][number]


def packs_of(tensors: Sequence[StoredTensor]) -> list[list[StoredTensor]]:
    """Tensors in the order of their files, small neighbours together; large and empty ones are alone."""
    packs: list[list[StoredTensor]] = []
    size = PACK_BYTES
    for tensor in sorted(tensors, key=lambda tensor: (tensor.file, tensor.offset)):
        if not 0 < tensor.bytes <= PACK_BYTES // 2:
            packs.append([tensor])
            size = PACK_BYTES
        elif size + aligned(tensor) > PACK_BYTES:
            packs.append([tensor])
            size = aligned(tensor)
        else:
            packs[-1].append(tensor)
            size += aligned(tensor)
    return packs


def aligned(tensor: StoredTensor) -> int:
    """Bytes from a tensor's beginning to where the next one may begin in the memory of a GPU."""
    return -(-tensor.bytes // _ALIGNED) * _ALIGNED


def _threads(count: int, device: torch.device) -> ThreadPoolExecutor:
    """Threads that work on `device`: a new thread's own is the first GPU, on which page-locked memory takes 0.5 GB."""
    if device.type != "cuda":
        return ThreadPoolExecutor(count)
    index = torch.cuda.current_device() if device.index is None else device.index
    return ThreadPoolExecutor(count, initializer=torch.cuda.set_device, initargs=(index,))


def _pieces(pool: ThreadPoolExecutor, size: int, work: Callable[[int, int], int]) -> list[Future[int]]:
    starts = range(0, size, PIECE_BYTES)
    return [pool.submit(work, start, min(PIECE_BYTES, size - start)) for start in starts]


def check_finite(checkpoint: Checkpoint, name: str, tensor: Tensor, *, infinite: bool = False) -> Tensor:
    """`tensor`, read under `name`; UserError where it holds NaN or, unless `infinite`, infinite values."""
    if tensor.dtype == torch.float8_e4m3fn and tensor.numel():
        size = (tensor.view(torch.uint8) & 0x7F).amax()
        if int(size) == E4M3_NAN:
            count = int((tensor.view(torch.uint8) & 0x7F == E4M3_NAN).sum())
            raise _damaged(checkpoint, checkpoint.tensors[name], f"{count} NaN values")
    if not tensor.numel() or not tensor.is_floating_point() or tensor.itemsize == 1:
        return tensor
    low, high = tensor.aminmax()  # NaN carries through
    sound = ~(torch.isnan(low) | torch.isnan(high)) if infinite else torch.isfinite(low) & torch.isfinite(high)
    if not bool(sound):
        nan, inf = int(tensor.isnan().sum()), int(tensor.isinf().sum())
        raise _damaged(checkpoint, checkpoint.tensors[name], f"{nan} NaN and {inf} infinite values")
    return tensor


def _check_finite(checkpoint: Checkpoint, info: StoredTensor, raw: memoryview, *, infinite: bool) -> None:
    if info.dtype not in _EXPONENTS:
        return
    kind, exponent = _EXPONENTS[info.dtype]
    numbers = np.frombuffer(raw, dtype=kind)
    exponents = numbers & exponent
    if exponents.max(initial=0) != exponent:
        return
    bad, words = exponents == exponent, "NaN or infinite values"
    if infinite:  # infinities have no bit of the mantissa
        bad, words = (numbers & (int(np.iinfo(numbers.dtype).max) >> 1)) > exponent, "NaN values"
    if bad.any():
        raise _damaged(checkpoint, info, f"{int(bad.sum())} {words}")


def _damaged(checkpoint: Checkpoint, info: StoredTensor, what: str) -> UserError:
    return UserError(
        f"{what} among {info.elements}.",
        where=f"{checkpoint.path / info.file}: {info.name}",
        code="tensor-not-finite",
        remedy="The source is damaged: download this file again.",
    )


def record_event(device: torch.device) -> torch.cuda.Event | None:
    """An event behind the work that the device's current stream has now; None on the CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def _run_on_stream(
    stream: torch.cuda.Stream | None, ready: torch.cuda.Event | None, work: Callable[[], object]
) -> None:
    """Do `work` on a stream after the event `ready`, and wait for it."""
    assert stream is not None
    assert ready is not None
    with torch.cuda.stream(stream):
        stream.wait_event(ready)
        work()
    stream.synchronize()


def _raw(data: Tensor) -> memoryview:
    return memoryview(data.numpy())  # type: ignore[arg-type]  # it is a buffer


def _bytes_of(tensor: Tensor) -> Tensor:
    """A flat view of the bytes of a contiguous tensor, of a copy for another; an empty tensor is on the CPU."""
    return tensor.reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)


def _write_run_file(handle: int, offset: int, raw: memoryview, note: Note) -> int:
    """Write bytes and note that the file has them; their CRC-32."""
    write_fully(handle, offset, raw)
    note(handle, offset, offset + len(raw))
    return zlib.crc32(raw)
