"""One run of bytes in several files, piece after piece in turns, so that several threads can write at once.

A system lets one thread at a time write to a file, however many processes have it open.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from snugfit.storage.files import PIECE_BYTES, read_fully, write_fully


class Stripes:
    """The files PATH, PATH.1, PATH.2 and so on, open for reading and writing, in any thread."""

    def __init__(self, path: Path, count: int) -> None:
        """Open or make `count` files."""
        self.paths = [path, *(path.with_name(f"{path.name}.{number}") for number in range(1, count))]
        self._handles: list[int] = []
        try:
            for one in self.paths:
                self._handles.append(os.open(one, os.O_RDWR | os.O_CREAT, 0o644))
        except BaseException:
            self.close()
            raise

    def read(self, offset: int, view: memoryview) -> None:
        """Fill `view` from byte `offset`; EOFError where the files end before, OSError where the disk fails."""
        for handle, place, part in self._parts(offset, view):
            read_fully(handle, place, part)

    def write(self, offset: int, view: memoryview) -> None:
        """Write all of `view` from byte `offset`; OSError where that fails."""
        for handle, place, part in self._parts(offset, view):
            write_fully(handle, place, part)

    def _parts(self, offset: int, view: memoryview) -> Iterator[tuple[int, int, memoryview]]:
        """File, place in it, and the part of `view` that is there."""
        done = 0
        while done < len(view):
            piece, inside = divmod(offset + done, PIECE_BYTES)
            turn, file = divmod(piece, len(self._handles))
            stop = min(len(view), done + PIECE_BYTES - inside)
            yield self._handles[file], turn * PIECE_BYTES + inside, view[done:stop]
            done = stop

    def unlink(self) -> None:
        """Remove the files."""
        for path in self.paths:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the files; once more does nothing."""
        for handle in self._handles:
            os.close(handle)
        self._handles.clear()
