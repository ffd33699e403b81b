"""Files that are digested and flushed while they grow, and copies that let several grow at once."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from helpers.errors import raises
from snugfit.storage import growing
from snugfit.storage.background import Background
from snugfit.storage.checkpoint import Checkpoint
from snugfit.storage.files import read_run_file
from snugfit.storage.growing import GrowingFile
from snugfit.storage.open import open_checkpoint
from snugfit.storage.safetensors_header import TensorInfo
from snugfit.storage.shards import Shard, ShardWriter, crc_of, file_digests, plan_shards
from snugfit.storage.staging import LOCK_NAME, resumable
from snugfit.storage.transfer import Copy, Transfer

CPU = torch.device("cpu")
SIZE, AT_ONCE = 1000, 64
CONTENT = random.Random(5).randbytes(SIZE)  # noqa: S311
SHA = hashlib.sha256(CONTENT).hexdigest()


@contextmanager
def grown(
    folder: Path, stopped: threading.Event | None = None, size: int = SIZE, *, flushes: bool = False
) -> Iterator[GrowingFile]:
    """A file that holds all of its content, of which nothing was noted yet."""
    (folder / "file").write_bytes(CONTENT)
    handle = os.open(folder / "file", os.O_RDWR)
    with ThreadPoolExecutor(2) as pool:
        yield GrowingFile(handle, size, pool, pool if flushes else None, stopped or threading.Event())


def ranges(seed: int) -> list[tuple[int, int]]:
    """The file in parts of many sizes, in any order."""
    generator = random.Random(seed)  # noqa: S311
    cuts = sorted({0, SIZE, *(generator.randrange(SIZE) for _ in range(generator.choice((0, 3, 40))))})
    found = list(itertools.pairwise(cuts))
    generator.shuffle(found)
    return [*found, (7, 7)]


@pytest.mark.parametrize("seed", range(8))
def test_the_digest_is_that_of_the_file(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever order, and in whatever threads, bytes come, the digest is that of the whole file."""
    monkeypatch.setattr(growing, "DIGESTED_BYTES", AT_ONCE)
    with grown(tmp_path) as file:
        with ThreadPoolExecutor(1 + seed % 3) as threads:
            for entry in ranges(seed):
                threads.submit(file.note, *entry)
        assert file.digest is not None
        assert file.digest.result(timeout=20) == SHA
        file.end()


def test_no_byte_behind_a_gap_is_digested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in front of the first gap is digested before the file is whole, and nothing behind it."""
    read: list[tuple[int, int]] = []
    seen = threading.Semaphore(0)

    def reading(handle: int, start: int, view: memoryview) -> None:
        read.append((start, len(view)))
        read_run_file(handle, start, view)
        seen.release()

    monkeypatch.setattr(growing, "DIGESTED_BYTES", AT_ONCE)
    monkeypatch.setattr(growing, "read_run_file", reading)
    with grown(tmp_path) as file:
        assert file.digest is not None
        file.note(200, SIZE)
        file.note(0, 150)
        for _ in range(2):
            assert seen.acquire(timeout=20)
        assert read == [(0, AT_ONCE), (AT_ONCE, AT_ONCE)]
        assert not file.digest.done()
        file.note(150, 200)
        assert file.digest.result(timeout=20) == SHA
        file.end()
    assert sum(length for _, length in read) == SIZE


def test_a_file_that_was_cut_has_no_digest(tmp_path: Path) -> None:
    """Where another has cut the file, its digest is an error rather than that of fewer bytes."""
    with grown(tmp_path, size=2 * SIZE) as file:
        file.note(0, 2 * SIZE)
        assert file.digest is not None
        with raises("run-damaged"):
            file.digest.result(timeout=20)
        file.end()


def test_nothing_waits_for_a_stopped_file(tmp_path: Path) -> None:
    """Once it is stopped, a file ends without a read or a flush more."""
    stopped = threading.Event()
    with grown(tmp_path, stopped, flushes=True) as file:
        stopped.set()
        file.note(0, SIZE)
        file.end()
        assert file.digest is not None
        assert file.digest.result(timeout=20) == hashlib.sha256(b"").hexdigest()


def test_the_disk_takes_a_file_while_it_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every so many bytes are flushed beside the writing, and whatever is noted last before the file is closed."""
    events: list[str] = []
    begun = threading.Semaphore(0)

    def flush(_: int) -> None:
        events.append("flush")
        begun.release()

    monkeypatch.setattr(growing, "FLUSHED_BYTES", 400)
    monkeypatch.setattr(os, "fdatasync", flush)
    with grown(tmp_path, flushes=True) as file:
        file.note(500, 899)
        file.note(0, 1)
        assert begun.acquire(timeout=20)
        file.note(1, 100)
        events.append("not enough")
        file.note(100, 500)
        assert begun.acquire(timeout=20)
        events.append("last")
        file.note(899, SIZE)
        file.end()
    assert events[:3] == ["flush", "not enough", "flush"]
    assert events[-1] == "flush"


def shards_of(names: str, size: int) -> list[Shard]:
    """A file for each tensor of so many bytes."""
    return plan_shards([TensorInfo(name, "U8", (size,)) for name in names], size)


def test_the_disk_is_heard_before_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the disk is raised where a later unit is recorded, long before the run ends."""

    def fail(_: int) -> None:
        raise OSError("worn out")

    monkeypatch.setattr(os, "fdatasync", fail)
    names = "abcdefghijklmnopqrstuvwxyz"
    written = []
    with Transfer(CPU) as transfer, ShardWriter(tmp_path, shards_of(names, 8), transfer) as writer:

        def work() -> None:
            for name in names:
                writer.write(name, torch.zeros(8, dtype=torch.uint8))
                writer.pending_writes()()
                written.append(name)
                time.sleep(0.05)

        with pytest.raises(OSError, match="worn out"):
            work()
    assert 0 < len(written) < len(names)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_a_resumed_run_digests_what_was_there(order: tuple[int, ...], tmp_path: Path) -> None:
    """Of tensors that an earlier run wrote and of new ones, whichever come first, the digest is that of the file."""
    tensors = {f"t{n}": torch.full((999 + n,), n + 1, dtype=torch.uint8) for n in range(3)}
    shards = plan_shards([TensorInfo(name, "U8", tuple(one.shape)) for name, one in tensors.items()], 10**9)
    first, second, third = (f"t{number}" for number in order)
    with Transfer(CPU) as transfer:
        with ShardWriter(tmp_path, shards, transfer) as writer:
            for name in (first, second):
                writer.write(name, tensors[name])
            before = writer.pending_writes()()
        with ShardWriter(tmp_path, shards, transfer) as writer, Background() as background:
            assert writer.holds(before)
            writer.accept([first])
            for name in (second, third):
                writer.write(name, tensors[name])
            writer.pending_writes()()
            found = writer.finish(background).digests()
    assert found == file_digests(tmp_path, [shards[0].name])
    assert (tmp_path / shards[0].name).read_bytes().endswith(b"".join(bytes(one.numpy()) for one in tensors.values()))


def source(folder: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    """A checkpoint of these tensors."""
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    return open_checkpoint(folder)


def test_files_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies to several files are made a piece of each at a time, from its beginning on, with the source's bytes."""
    monkeypatch.setattr("snugfit.storage.transfer.PIECE_BYTES", 100)
    monkeypatch.setattr("snugfit.storage.shards.PIECE_BYTES", 100)
    torch.manual_seed(3)
    sizes = {"x": 250, "empty": 0, "y": 420, "z": 90}
    tensors = {name: torch.randint(0, 256, (size,)).to(torch.uint8) for name, size in sizes.items()}
    checkpoint = source(tmp_path / "source", tensors)
    files = [os.open(tmp_path / name, os.O_RDWR | os.O_CREAT) for name in ("first", "second")]
    copies = [
        Copy(checkpoint, "z", files[0], 250),
        Copy(checkpoint, "y", files[1], 5),
        Copy(checkpoint, "x", files[0], 0),
        Copy(checkpoint, "empty", files[1], 0),
    ]
    noted: list[tuple[int, int, int]] = []
    with Transfer(CPU) as transfer:
        found = [one.result() for one in transfer.copy_many(copies, lambda *entry: noted.append(entry))]
    one, two = files
    assert noted == [
        *((one, 0, 100), (two, 5, 105), (one, 100, 200), (two, 105, 205), (one, 200, 250), (two, 205, 305)),
        *((one, 250, 340), (two, 305, 405), (two, 405, 425)),
    ]
    for copy, crcs in zip(copies, found, strict=True):
        content = bytes(tensors[copy.name].numpy())
        assert os.pread(copy.handle, len(content), copy.offset) == content
        assert crcs == crc_of(copy.handle, copy.offset, len(content))
    for handle in files:
        os.close(handle)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_damaged_copy_stops_the_run(number: float, tmp_path: Path) -> None:
    """A tensor that is not finite is named, whatever is copied beside it; the writer leaves its files as they are."""
    tensors = {"a": torch.zeros(40), "b": torch.tensor([0.0, number])}
    checkpoint = source(tmp_path / "source", tensors)
    shards = plan_shards([TensorInfo(name, "F32", tuple(one.shape)) for name, one in tensors.items()], 100)
    with Transfer(CPU) as transfer, ShardWriter(tmp_path, shards, transfer) as writer:
        for name in tensors:
            writer.copy(checkpoint, name)
        with raises("tensor-not-finite", where=": b"):
            writer.pending_writes()()
    assert {file.name for file in tmp_path.glob("*.safetensors")} == {shard.name for shard in shards}


def test_held_back_copies_count_as_not_written(tmp_path: Path) -> None:
    """A writer does not finish while copies have not begun; `start` begins them."""
    checkpoint = source(tmp_path / "source", {"a": torch.ones(40)})
    shards = plan_shards([TensorInfo("a", "F32", (40,))], 10**9)
    with Transfer(CPU) as transfer, ShardWriter(tmp_path, shards, transfer) as writer, Background() as background:
        writer.copy(checkpoint, "a")
        with pytest.raises(AssertionError, match="not written"):
            writer.finish(background)
        writer.start()
        writer.pending_writes()()
        found = writer.finish(background).digests()
    assert found == file_digests(tmp_path / "source", ["model.safetensors"])


def test_only_the_result_is_flushed_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file and folder of a result is on the disk before it has its name; what unfinished runs need is not."""
    flushed: list[tuple[str, bool]] = []
    target = tmp_path / "out"

    def noting(handle: int) -> None:
        path = Path(f"/proc/self/fd/{handle}").readlink()
        flushed.append((str(path.relative_to(tmp_path)), target.exists()))

    monkeypatch.setattr(os, "fsync", noting)
    with resumable(target) as (directory, work):
        (directory / "inner").mkdir()
        (directory / "inner" / "a.json").write_text("a")
        (directory / "b.json").write_text("b")
        (work / "unit-00000.json").write_text("c")
    names = {"out.partial", *(f"out.partial/{name}" for name in ("inner", "inner/a.json", "b.json", LOCK_NAME))}
    assert {name for name, whole in flushed if not whole} == names
    assert [name for name, whole in flushed if whole] == ["."]
    assert sorted(path.name for path in target.iterdir()) == ["b.json", "inner"]
