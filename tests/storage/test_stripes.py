"""One run of bytes in several files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from snugfit.storage import stripes
from snugfit.storage.stripes import Stripes


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of seven bytes."""
    monkeypatch.setattr(stripes, "PIECE_BYTES", 7)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.usefixtures("small_pieces")
def test_what_is_written_anywhere_is_read_anywhere(count: int, tmp_path: Path) -> None:
    """Writes that begin and end inside pieces, in any order, leave the bytes of one file; any part of it is read."""
    whole = os.urandom(200)
    file = Stripes(tmp_path / "states", count)
    for start, stop in ((60, 200), (0, 5), (5, 33), (33, 60)):
        file.write(start, memoryview(whole)[start:stop])
    for start, stop in ((0, 200), (6, 8), (13, 14), (50, 150), (7, 7)):
        found = bytearray(stop - start)
        file.read(start, memoryview(found))
        assert bytes(found) == whole[start:stop]
    assert sum(path.stat().st_size for path in file.paths) == 200
    assert len(file.paths) == count == len(list(tmp_path.iterdir()))
    file.close()


@pytest.mark.usefixtures("small_pieces")
def test_files_that_end_before_are_an_error(tmp_path: Path) -> None:
    """What was never written is not read as zeros."""
    file = Stripes(tmp_path / "states", 2)
    file.write(0, memoryview(b"0123456789"))
    with pytest.raises(EOFError):
        file.read(0, memoryview(bytearray(11)))
    file.close()
    file.close()


def test_one_file_is_the_file_itself(tmp_path: Path) -> None:
    """With one stripe the bytes are in the named file; removing removes every file."""
    one = Stripes(tmp_path / "one", 1)
    one.write(0, memoryview(b"abc"))
    assert (tmp_path / "one").read_bytes() == b"abc"
    many = Stripes(tmp_path / "many", 4)
    for file in (one, many):
        file.unlink()
        file.close()
    assert not list(tmp_path.iterdir())


def open_files() -> int:
    """How many files this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_file_that_cannot_be_made_leaves_none_open(tmp_path: Path) -> None:
    """An error while files are opened closes those that were."""
    (tmp_path / "states.2").mkdir()
    before = open_files()
    with pytest.raises(OSError, match="Is a directory"):
        Stripes(tmp_path / "states", 3)
    assert open_files() == before
