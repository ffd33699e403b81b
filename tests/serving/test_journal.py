"""The journal of scored rows: what was put is there after any kill, and belongs to one run."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.errors import raises
from snugfit.serving.answers import PromptLogprobs
from snugfit.serving.journal import FRAME, MARK, Journal

KEY = {"model": "mock/model", "rows": "5f3a", "top": 2}
ENDLESS = """
import sys
import numpy as np
from snugfit.serving.answers import PromptLogprobs
from snugfit.serving.journal import Journal
with Journal.open(sys.argv[1], {"top": 0}) as journal:
    for row in range(10**9):
        nothing = np.zeros((5000, 0))
        journal.put(row, PromptLogprobs(np.full(5000, float(row)), nothing.astype("i4"), nothing.astype("f4")))
        print(row, flush=True)
"""


def result(row: int, *, dense: bool = False) -> PromptLogprobs:
    """A small result that differs from row to row, with NaN and minus infinity in it."""
    random = np.random.default_rng(row)
    true = random.normal(size=3)
    true[1] = np.nan
    top = random.normal(size=(3, 2)).astype(np.float32)
    top[2, 1] = -np.inf
    ids = random.integers(-1, 99, (3, 2)).astype(np.int32)
    table = random.normal(size=(3, 7)).astype(np.float32) if dense else None
    return PromptLogprobs(true, ids, top, table, f"build {row}")


def same(found: PromptLogprobs | None, wanted: PromptLogprobs) -> bool:
    """Bit for bit, types included."""
    if found is None or found.fingerprint != wanted.fingerprint or (found.dense is None) != (wanted.dense is None):
        return False
    pairs: list[tuple[np.ndarray[Any, Any] | None, np.ndarray[Any, Any] | None]]
    pairs = [(found.true_logprob, wanted.true_logprob), (found.top_ids, wanted.top_ids)]
    pairs += [(found.top_logprob, wanted.top_logprob), (found.dense, wanted.dense)]
    return all(
        a is b is None or (a is not None and b is not None and a.dtype == b.dtype and a.tobytes() == b.tobytes())
        for a, b in pairs
    )


def write(path: Path, rows: int, key: Mapping[str, Any] = KEY) -> list[int]:
    """A journal of some rows; the sizes of the file with 0, 1, ... of them."""
    sizes = []
    with Journal.open(path, key) as journal:
        sizes.append(path.stat().st_size)
        for row in range(rows):
            journal.put(row, result(row))
            sizes.append(path.stat().st_size)
    return sizes


def test_what_is_put_comes_back(tmp_path: Path) -> None:
    """Every array bit for bit, NaN, infinities, types and a dense table included, at once and after opening again."""
    wanted = {7: result(7), 0: result(0, dense=True), 123456: result(3)}
    with Journal.open(tmp_path / "rows", KEY) as journal:
        for row, content in wanted.items():
            journal.put(row, content)
            assert same(journal.get(row), content)
    with Journal.open(tmp_path / "rows", KEY) as journal:
        assert all(same(journal.get(row), content) for row, content in wanted.items())
        assert journal.get(1) is None
        assert 1 not in journal
        assert 7 in journal
        assert (len(journal), journal.dropped) == (3, 0)


def test_results_can_be_changed_by_their_owner(tmp_path: Path) -> None:
    """Arrays that come back are the caller's own."""
    write(tmp_path / "rows", 1)
    with Journal.open(tmp_path / "rows", KEY) as journal:
        found = journal.get(0)
        assert found is not None
        found.true_logprob[:] = 0
        assert same(journal.get(0), result(0))


def test_the_later_of_two_records_holds(tmp_path: Path) -> None:
    """A row that is put twice is what was put last."""
    with Journal.open(tmp_path / "rows", KEY) as journal:
        journal.put(1, result(1))
        journal.put(1, result(2))
        assert same(journal.get(1), result(2))
    with Journal.open(tmp_path / "rows", KEY) as journal:
        assert same(journal.get(1), result(2))
        assert len(journal) == 1


def test_a_record_torn_anywhere_loses_only_itself(tmp_path: Path) -> None:
    """Cut at every byte of the last record: the others are there, the row can be put again, and then all is whole."""
    whole = tmp_path / "whole"
    sizes = write(whole, 3)
    content = whole.read_bytes()
    for end in range(sizes[2] + 1, sizes[3]):
        torn = tmp_path / "torn"
        torn.write_bytes(content[:end])
        with Journal.open(torn, KEY) as journal:
            assert (len(journal), journal.dropped) == (2, end - sizes[2])
            assert journal.get(2) is None
            assert same(journal.get(1), result(1))
            journal.put(2, result(2))
        assert torn.read_bytes() == content


@pytest.mark.parametrize("kept", [0, 4, FRAME.size, FRAME.size + 9])
def test_a_record_that_is_partly_zeros_is_torn(tmp_path: Path, kept: int) -> None:
    """After a power cut a file may have its length and not its bytes."""
    path = tmp_path / "rows"
    sizes = write(path, 3)
    content = path.read_bytes()
    path.write_bytes(content[: sizes[2] + kept] + bytes(sizes[3] - sizes[2] - kept))
    with Journal.open(path, KEY) as journal:
        assert (len(journal), journal.dropped) == (2, sizes[3] - sizes[2])


def test_a_first_line_torn_anywhere_is_written_again(tmp_path: Path) -> None:
    """A run that was killed while it made the file starts as if there were none."""
    path = tmp_path / "rows"
    (size,) = write(path, 0)
    line = path.read_bytes()
    for end in range(size):
        path.write_bytes(line[:end])
        with Journal.open(path, KEY) as journal:
            assert len(journal) == 0
        assert path.read_bytes() == line


def test_damage_before_whole_records_is_refused(tmp_path: Path) -> None:
    """A changed byte anywhere in a record that others follow is no torn end: nothing is cut off."""
    path = tmp_path / "rows"
    sizes = write(path, 3)
    content = path.read_bytes()
    for at in range(sizes[1], sizes[2]):
        damaged = bytearray(content)
        damaged[at] ^= 0x40
        path.write_bytes(damaged)
        with raises("run-damaged", where=path) as caught:
            Journal.open(path, KEY)
        assert f"byte {sizes[1]}." in caught.value.what
        assert path.read_bytes() == bytes(damaged)


def test_another_run_is_refused(tmp_path: Path) -> None:
    """A key that differs is named with both values, in either direction; the order of its fields means nothing."""
    path = tmp_path / "rows"
    write(path, 1)
    for key, in_file, here in (
        (KEY | {"top": 20, "rows": "77"}, 'rows "5f3a", top 2', 'rows "77", top 20'),
        (KEY | {"extra": 1}, "extra null", "extra 1"),
        ({"model": "mock/model", "rows": "5f3a"}, "top 2", "top null"),
    ):
        with raises("run-differs", where=path) as caught:
            Journal.open(path, key)
        assert in_file in caught.value.what
        assert here in caught.value.what
    with Journal.open(path, dict(reversed(KEY.items()))) as journal:
        assert len(journal) == 1


@pytest.mark.parametrize("content", [b"hello\n", b"\x00\xff\n", b'{"key": {}}\n', b"[]\n", b"no end", MARK * 9])
def test_other_files_are_left_alone(tmp_path: Path, content: bytes) -> None:
    """A file that is not a journal is refused and stays as it is."""
    path = tmp_path / "rows"
    path.write_bytes(content)
    with raises("run-damaged", where=path):
        Journal.open(path, KEY)
    assert path.read_bytes() == content


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """A missing directory, or a directory in the place of the file, is an error of the user."""
    for path in (tmp_path / "missing" / "rows", tmp_path):
        with raises("output-not-writable", where=path):
            Journal.open(path, KEY)


def test_two_runs_do_not_share_a_journal(tmp_path: Path) -> None:
    """A second opener is refused until the first closes."""
    path = tmp_path / "rows"
    with Journal.open(path, KEY), raises("output-busy", where=path):
        Journal.open(path, KEY)
    Journal.open(path, KEY).close()


def test_a_full_disk_spoils_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A put that fails half-way raises, its row is not there, and the next put is whole."""
    path = tmp_path / "rows"
    write_some, left = os.pwrite, [40]

    def fill(file: int, content: memoryview, place: int) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write_some(file, content[: left[0]], place)
        left[0] -= written
        return written

    with Journal.open(path, KEY) as journal:
        journal.put(0, result(0))
        monkeypatch.setattr(os, "pwrite", fill)
        with pytest.raises(OSError, match="No space left"):
            journal.put(1, result(1))
        monkeypatch.undo()
        assert 1 not in journal
        journal.put(2, result(2))
    with Journal.open(path, KEY) as journal:
        assert (len(journal), journal.dropped) == (2, 0)
        assert same(journal.get(2), result(2))


def test_a_killed_writer_has_kept_what_it_said(tmp_path: Path) -> None:
    """kill -9 in the middle of writing: every row that was reported is there and right."""
    path = tmp_path / "rows"
    command = [sys.executable, "-c", ENDLESS, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        reported = [int(writer.stdout.readline()) for _ in range(20)]
        writer.send_signal(signal.SIGKILL)
        reported += [int(line) for line in writer.stdout.read().split("\n")[:-1]]
    with Journal.open(path, {"top": 0}) as journal:
        assert len(journal) in (len(reported), len(reported) + 1)
        for row in reported:
            found = journal.get(row)
            assert found is not None
            assert (found.true_logprob == row).all()
