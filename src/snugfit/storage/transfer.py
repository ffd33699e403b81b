"""Tensors between files and a device, in pieces and in threads: what is under way in memory is a few pieces.

Reading the next weights and writing the last ones go on while the device computes.
"""

from __future__ import annotations

import errno
import os
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from snugfit.errors import UserError
from snugfit.storage.checkpoint import Checkpoint, piece_of, read_range
from snugfit.storage.files import PIECE
from snugfit.storage.safetensors_header import StoredTensor, dtype_of

WORKERS = {"cpu": 1, "cuda": 8}  # for reading, and as many for writing
COPIERS = {"cpu": 1, "cuda": 3}  # for what goes from file to file
# bits that are all set in numbers that are not finite
_EXPONENTS = {
    "BF16": (np.uint16, 0x7F80),
    "F16": (np.uint16, 0x7C00),
    "F32": (np.uint32, 0x7F800000),
    "F64": (np.uint64, 0x7FF0000000000000),
}

E4M3_NAN = 0x7F  # without its sign

Result = TypeVar("Result")


@dataclass
class Moving(Generic[Result]):
    """Something under way: `result` waits for all its pieces."""

    pieces: list[Future[int]]
    finish: Callable[[list[int]], Result]

    def result(self) -> Result:
        """What it came to; raises what went wrong."""
        return self.finish([piece.result() for piece in self.pieces])

    def done(self) -> bool:
        """Whether nothing is left to wait for."""
        return all(piece.done() for piece in self.pieces)

    def cancel(self) -> None:
        """Give up what has not begun, and wait for the rest."""
        for piece in self.pieces:
            if not piece.cancel():
                piece.exception()


class Transfer:
    """Threads that move tensors; each has a buffer of one piece, page-locked beside a GPU, and a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # apart, so that the weights that are waited for do not queue behind what is only to be written
        self._readers = ThreadPoolExecutor(WORKERS[device.type])
        self._writers = ThreadPoolExecutor(WORKERS[device.type])
        self._copiers = ThreadPoolExecutor(COPIERS[device.type])
        self._own = threading.local()

    def read(self, checkpoint: Checkpoint, name: str, expert: int | None = None) -> Moving[Tensor]:
        """Begin to read a tensor to the device, or (of one with all experts) the part that is the given expert's."""
        info = checkpoint.tensors[name]
        part, first = piece_of(info, expert)
        return self._read(
            part.shape, dtype_of(part), lambda start, view: read_range(checkpoint, info, first + start, view)
        )

    def read_file(self, handle: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Moving[Tensor]:
        """Begin to read a tensor from an open file to the device."""
        return self._read(shape, dtype, lambda start, view: _load(handle, view, offset + start))

    def _read(
        self, shape: tuple[int, ...], dtype: torch.dtype, fill: Callable[[int, memoryview], None]
    ) -> Moving[Tensor]:
        target = torch.empty(shape, dtype=dtype, device=self.device)
        flat = _bytes_of(target)
        ready = _mark(self.device)

        def piece(start: int, size: int) -> int:
            if not flat.is_cuda:
                fill(start, _raw(flat[start : start + size]))
                return 0
            buffer, stream = self._tools()
            fill(start, _raw(buffer[:size]))
            # the memory may be in use until `ready`
            _on(stream, ready, lambda: flat[start : start + size].copy_(buffer[:size], non_blocking=True))
            return 0

        return Moving(_pieces(self._readers, flat.numel(), piece), lambda _: target)

    def write(self, handle: int, offset: int, tensor: Tensor) -> Moving[list[int]]:
        """Begin to write a tensor to an open file; the result is the CRC-32 of each piece."""
        flat = _bytes_of(tensor.detach())
        ready = _mark(tensor.device)

        def piece(start: int, size: int) -> int:
            if not flat.is_cuda:
                return _store(handle, _raw(flat[start : start + size]), offset + start)
            buffer, stream = self._tools()
            _on(stream, ready, lambda: buffer[:size].copy_(flat[start : start + size], non_blocking=True))
            return _store(handle, _raw(buffer[:size]), offset + start)

        return Moving(_pieces(self._writers, flat.numel(), piece), list)

    def copy(self, checkpoint: Checkpoint, name: str, handle: int, offset: int) -> Moving[list[int]]:
        """Begin to copy a tensor from file to file; UserError where it holds NaN or infinite values."""
        info = checkpoint.tensors[name]

        def piece(start: int, size: int) -> int:
            buffer, _ = self._tools()
            raw = _raw(buffer[:size])
            read_range(checkpoint, info, start, raw)
            _check_finite(checkpoint, info, raw)
            return _store(handle, raw, offset + start)

        return Moving(_pieces(self._copiers, info.bytes, piece), list)

    def _tools(self) -> tuple[Tensor, torch.cuda.Stream | None]:
        """This thread's buffer, and its stream where there is a GPU."""
        if not hasattr(self._own, "buffer"):
            cuda = self.device.type == "cuda"
            self._own.buffer = torch.empty(PIECE, dtype=torch.uint8, pin_memory=cuda)
            self._own.stream = torch.cuda.Stream(self.device) if cuda else None
        return self._own.buffer, self._own.stream

    def close(self) -> None:
        """Give up what has not begun, and wait for the rest."""
        for pool in (self._readers, self._writers, self._copiers):
            pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _pieces(pool: ThreadPoolExecutor, size: int, work: Callable[[int, int], int]) -> list[Future[int]]:
    return [pool.submit(work, start, min(PIECE, size - start)) for start in range(0, size, PIECE)]


def check_finite(checkpoint: Checkpoint, name: str, tensor: Tensor) -> Tensor:
    """`tensor`, read under `name`; UserError where it holds NaN or infinite values."""
    if tensor.dtype == torch.float8_e4m3fn and tensor.numel():
        size = (tensor.view(torch.uint8) & 0x7F).amax()
        if int(size) == E4M3_NAN:
            count = int((tensor.view(torch.uint8) & 0x7F == E4M3_NAN).sum())
            raise _damaged(checkpoint, checkpoint.tensors[name], f"{count} NaN values")
    if not tensor.numel() or not tensor.is_floating_point() or tensor.itemsize == 1:
        return tensor
    low, high = tensor.aminmax()  # NaN carries through
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        nan, inf = int(tensor.isnan().sum()), int(tensor.isinf().sum())
        raise _damaged(checkpoint, checkpoint.tensors[name], f"{nan} NaN and {inf} infinite values")
    return tensor


def _check_finite(checkpoint: Checkpoint, info: StoredTensor, raw: memoryview) -> None:
    if info.dtype not in _EXPONENTS:
        return
    kind, exponent = _EXPONENTS[info.dtype]
    exponents = np.frombuffer(raw, dtype=kind) & exponent
    if exponents.max(initial=0) == exponent:
        raise _damaged(checkpoint, info, f"{int((exponents == exponent).sum())} NaN or infinite values")


def _damaged(checkpoint: Checkpoint, info: StoredTensor, what: str) -> UserError:
    return UserError(
        f"{what} among {info.elements}.",
        where=f"{checkpoint.path / info.file}: {info.name}",
        remedy="The source is damaged: download this file again.",
    )


def _mark(device: torch.device) -> torch.cuda.Event | None:
    """A mark in the device's current work; None on the CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def _on(stream: torch.cuda.Stream | None, ready: torch.cuda.Event | None, work: Callable[[], object]) -> None:
    """Do `work` on a stream once `ready` has come, and wait for it."""
    assert stream is not None
    assert ready is not None
    with torch.cuda.stream(stream):
        stream.wait_event(ready)
        work()
    stream.synchronize()


def _raw(data: Tensor) -> memoryview:
    return memoryview(data.numpy())  # type: ignore[arg-type]  # it is a buffer


def _bytes_of(tensor: Tensor) -> Tensor:
    """A flat view of a contiguous tensor's bytes, or of a copy's; on the CPU where there are none."""
    return tensor.reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)


def _load(handle: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        count = os.preadv(handle, [view[done:]], offset + done)
        if not count:
            raise OSError(errno.EIO, "a file of this run ended early")
        done += count


def _store(handle: int, raw: memoryview, offset: int) -> int:
    done = 0
    while done < len(raw):
        done += os.pwrite(handle, raw[done:], offset + done)
    return zlib.crc32(raw)
