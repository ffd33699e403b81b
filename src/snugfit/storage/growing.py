"""A file whose bytes come in any order: digested up to its first gap, and taken by the disk, while it grows."""

from __future__ import annotations

import hashlib
import os
import threading
from concurrent.futures import Executor, Future, wait
from typing import Any

from snugfit.storage.files import read_run_file

DIGESTED_BYTES = 4 << 20  # that are read at once for a digest; fewer wait for more, unless the file is whole
FLUSHED_BYTES = 64 << 20  # that the disk is to take at once, unless the file is whole


class GrowingFile:
    """An open file of known size, each byte of which is written once.

    `digest` is its SHA-256, hexadecimal, some time after the last byte was noted; None without a `digester`. Without a
    `flusher` nothing has the disk take it. Nothing more of both is begun once `stopped` is set: then the digest is that
    of fewer bytes.
    """

    def __init__(
        self, handle: int, size: int, digester: Executor | None, flusher: Executor | None, stopped: threading.Event
    ) -> None:
        self.handle = handle
        self.digest: Future[str] | None = None if digester is None else Future()
        self._size, self._stopped = size, stopped
        self._digester, self._flusher = digester, flusher
        self._sha = hashlib.sha256()  # of the first `_digested` bytes; only the one job that digests changes both
        self._digested = 0
        self._flush: Future[None] | None = None  # the last job that flushes
        self._lock = threading.Lock()  # of all below
        self._apart: dict[int, int] = {}  # where bytes begin and end that are behind a gap
        self._gap = 0  # where the first one begins
        self._missing = size
        self._unflushed = 0
        self._is_digesting = self._is_flushing = False

    def note(self, start: int, end: int) -> None:
        """The file holds its bytes from `start` to `end` from now on; in any order, and in any thread."""
        if start == end:
            return
        with self._lock:
            self._apart[start] = end
            while self._gap in self._apart:
                self._gap = self._apart.pop(self._gap)
            self._missing -= end - start
            self._unflushed += end - start
            if self._digester is not None and not self._is_digesting and self._digestible():
                self._is_digesting = True
                self._digester.submit(self._digest)
            if self._flusher is not None and not self._is_flushing and self._flushable():
                self._is_flushing = True
                self._flush = self._flusher.submit(self._flush_all)

    def check(self) -> None:
        """Raise what the disk said when it was to take bytes; it says so once."""
        with self._lock:
            last = self._flush
        if last is not None and last.done() and not last.cancelled():
            last.result()

    def end(self) -> None:
        """Close a file whose bytes are all noted, once it is digested and flushed; raises what the disk says."""
        jobs: list[Future[Any]] = [job for job in (self._flush, self.digest) if job is not None]
        try:
            wait(jobs)
        finally:
            os.close(self.handle)
        self.check()

    def _digestible(self) -> int:
        """Bytes that can be digested at once now, or 0. The caller holds the lock."""
        ready = min(self._gap - self._digested, DIGESTED_BYTES)
        return ready if ready == DIGESTED_BYTES or not self._missing else 0

    def _flushable(self) -> bool:
        """Whether the disk is to take something now. The caller holds the lock."""
        return self._unflushed > 0 and (self._unflushed >= FLUSHED_BYTES or not self._missing)

    def _digest(self) -> None:
        assert self.digest is not None
        try:
            buffer = memoryview(bytearray(min(DIGESTED_BYTES, self._size)))
            while size := self._next_digested():
                part = buffer[:size]
                read_run_file(self.handle, self._digested, part)
                self._sha.update(part)
                self._digested += size
        except BaseException as error:  # noqa: BLE001  # who asks for the digest gets it
            self.digest.set_exception(error)

    def _next_digested(self) -> int:
        """How many bytes the job digests next; 0 where it ends, for now or because nothing is left to do."""
        assert self.digest is not None
        with self._lock:
            if self._stopped.is_set() or self._digested == self._size:  # no other job begins after this one
                self.digest.set_result(self._sha.hexdigest())
                return 0
            size = self._digestible()
            self._is_digesting = size > 0
            return size

    def _flush_all(self) -> None:
        while self._next_flushed():
            os.fdatasync(self.handle)

    def _next_flushed(self) -> bool:
        with self._lock:
            self._is_flushing = not self._stopped.is_set() and self._flushable()
            if self._is_flushing:
                self._unflushed = 0
            return self._is_flushing
