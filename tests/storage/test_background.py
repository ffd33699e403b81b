"""Work on files that nothing waits for: it ends, its errors are raised, and what is forgotten is not done."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from snugfit.storage.background import Background, remove_files
from snugfit.storage.safetensors_header import TensorInfo
from snugfit.storage.shards import ShardWriter, WrittenFiles, plan_shards
from snugfit.storage.transfer import Transfer

CPU = torch.device("cpu")


def test_errors_are_raised_at_the_end() -> None:
    """An error in the background is raised by `wait` or where the block ends, behind all other work."""
    done = threading.Event()

    def fail() -> None:
        raise OSError("disk")

    background = Background()
    background.submit(fail)
    with pytest.raises(OSError, match="disk"):
        background.wait()

    def work() -> None:
        with background:
            background.submit(fail)
            background.submit(done.set)

    with pytest.raises(OSError, match="disk"):
        work()
    assert done.is_set()

    def stopped() -> None:
        with Background() as another:
            another.submit(fail)
            raise KeyError

    with pytest.raises(KeyError):  # the block's own error comes first
        stopped()


def test_removed_files(tmp_path: Path) -> None:
    """Files lose their names at once; what a killed run left half removed goes too, and twice is no error."""
    for name in ("a.safetensors", "b.safetensors", "c.json", "d.safetensors.removed"):
        (tmp_path / name).write_text("")
    blocked = threading.Event()
    with Background() as background:
        for _ in range(4):
            background.submit(blocked.wait)
        remove_files(tmp_path, "*.safetensors", background)
        assert not list(tmp_path.glob("*.safetensors"))
        assert len(list(tmp_path.iterdir())) == 4
        remove_files(tmp_path, "*.safetensors", background)
        blocked.set()
    assert [file.name for file in tmp_path.iterdir()] == ["c.json"]


def write_two(folder: Path, background: Background, **options: Any) -> tuple[ShardWriter, WrittenFiles]:
    """Two shards of one tensor each, written."""
    tensors = {name: torch.arange(1 << 10, dtype=torch.uint8) for name in ("a", "b")}
    shards = plan_shards([TensorInfo(name, "U8", (1 << 10,)) for name in tensors], 1 << 10)
    with Transfer(CPU) as transfer, ShardWriter(folder, shards, transfer, **options) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.pending_writes()()
        return writer, writer.finish(background)


def test_digests_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer ends while the disk is busy; digests come when it has every file, and all handles are closed."""
    busy, flushed, closed = threading.Event(), list[int](), list[int]()
    real_close = os.close

    def flush(handle: int) -> None:
        busy.wait()
        flushed.append(handle)

    def close(handle: int) -> None:
        closed.append(handle)
        real_close(handle)

    monkeypatch.setattr(os, "fdatasync", flush)
    monkeypatch.setattr(os, "close", close)
    with Background() as background:
        _, files = write_two(tmp_path, background)
        assert not flushed
        busy.set()
        found = files.digests()
        assert len(set(flushed)) == 2
    assert set(closed) >= set(flushed)
    assert found == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(tmp_path.iterdir())}


def test_forgotten_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that nobody wants any more are closed, and neither flushed nor digested."""
    seen = list[str]()
    monkeypatch.setattr(os, "fdatasync", lambda _: seen.append("flushed"))
    blocked = threading.Event()
    with Background() as background:
        for _ in range(4):
            background.submit(blocked.wait)
        _, files = write_two(tmp_path, background)
        files.forget()
        blocked.set()
        background.wait()
    assert len(seen) <= 2  # that began while they were written


def test_files_that_do_not_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are neither flushed nor digested; another process's part is flushed without digests."""
    seen = list[int]()
    monkeypatch.setattr(os, "fdatasync", seen.append)
    with Background() as background:
        assert write_two(tmp_path, background, lasts=False)[1].digests() == {}
        assert not seen
        assert write_two(tmp_path, background, digests=False)[1].digests() == {}
        assert len(set(seen)) == 2


def test_an_error_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the disk says when it is to take a file is raised to who asks for the digests."""

    def fail(_: int) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "fdatasync", fail)
    background = Background()
    _, files = write_two(tmp_path, background)
    with pytest.raises(OSError, match="no space"):
        files.digests()
