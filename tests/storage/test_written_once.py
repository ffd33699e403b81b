"""What files hold already is not written again, and what is the source's need not be written to be read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from snugfit.storage.background import Background
from snugfit.storage.checkpoint import SINGLE_NAME, borrow, open_directory, read_tensor
from snugfit.storage.files import COMPARED_BYTES, PROBED_BYTES, copy_changes, write_changes
from snugfit.storage.safetensors_header import TensorInfo
from snugfit.storage.shards import ShardWriter, plan_shards
from snugfit.storage.transfer import Transfer

CPU = torch.device("cpu")
SIZE = 3 * COMPARED_BYTES + 1234


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each call that writes."""
    found, real = list[int](), os.pwrite

    def pwrite(handle: int, data: Any, offset: int) -> int:
        found.append(len(data))
        return real(handle, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    return found


@pytest.mark.parametrize(
    ("changed", "equal"),
    [
        ([], SIZE),
        ([0], 0),
        ([PROBED_BYTES - 1, SIZE - 1], 0),
        ([PROBED_BYTES], PROBED_BYTES),
        ([COMPARED_BYTES + PROBED_BYTES], COMPARED_BYTES + PROBED_BYTES),
        ([SIZE - 1], 2 * COMPARED_BYTES + PROBED_BYTES),
    ],
)
def test_what_a_file_holds_is_not_written_again(
    changed: list[int], equal: int, tmp_path: Path, written: list[int]
) -> None:
    """The parts in front of the first that differs are not written; the file has what it was to hold."""
    file, start = tmp_path / "file", 77
    before = bytearray(os.urandom(SIZE))
    file.write_bytes(b"x" * start + before + b"end")
    after = bytearray(before)
    for place in changed:
        after[place] ^= 1
    handle = os.open(file, os.O_RDWR)
    write_changes(handle, start, memoryview(after))
    os.close(handle)
    assert file.read_bytes() == b"x" * start + after + b"end"
    assert sum(written) == SIZE - equal


def test_a_file_that_ends_before(tmp_path: Path) -> None:
    """Where a file is shorter than what it is to hold, or missing, it gets all of it."""
    content = os.urandom(COMPARED_BYTES + 99)
    (tmp_path / "source").write_bytes(content)
    for held in (b"", content[:50], content[: PROBED_BYTES + 5], content + b"more"):
        target = tmp_path / "target"
        target.unlink(missing_ok=True)
        if held:
            target.write_bytes(held)
        copy_changes(tmp_path / "source", target)
        assert target.read_bytes() == content


def make(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """A model directory with these tensors."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file(tensors, folder / SINGLE_NAME)
    return folder


def test_a_run_in_the_files_of_another(tmp_path: Path, written: list[int]) -> None:
    """Only tensors that differ are written, and the digest is that of the file; one left out comes behind."""
    source = open_directory(make(tmp_path / "source", {"kept": torch.arange(1 << 18, dtype=torch.int32)}))
    first, second = (torch.full((1 << 20,), value, dtype=torch.uint8) for value in (1, 2))
    infos = [TensorInfo("kept", "I32", (1 << 18,)), TensorInfo("codes", "U8", (1 << 20,))]
    shards = plan_shards(infos, 1 << 30)
    (tmp_path / "out").mkdir()

    def run(codes: Tensor, *, lasts: bool) -> tuple[int, dict[str, Any], dict[str, str]]:
        written.clear()
        with Background() as background, Transfer(CPU) as transfer:
            with ShardWriter(tmp_path / "out", shards, transfer, lasts=lasts) as writer:
                writer.copy(source, "kept")
                writer.write("codes", codes)
                found = writer.pending_writes()()
                files = writer.finish(background)
            return sum(size for size in written if size > len(shards[0].header)), found, files.digests()

    size, found, digests = run(first, lasts=False)
    assert (size, found["kept"], digests) == (1 << 20, None, {})
    size, found, digests = run(first, lasts=True)
    assert size == 1 << 20  # what was left out
    assert found["kept"] is not None
    expected = (tmp_path / "out" / SINGLE_NAME).read_bytes()
    assert run(first, lasts=True) == (0, found, digests)
    size, _, others = run(second, lasts=True)
    assert size == 1 << 20
    assert others != digests
    assert run(first, lasts=True) == (1 << 20, found, digests)
    assert (tmp_path / "out" / SINGLE_NAME).read_bytes() == expected


def test_tensors_that_are_lent(tmp_path: Path) -> None:
    """A tensor that is borrowed is read of the other model, whose file has the same name or is a link to a blob."""
    names = ("a", "b")
    lender, own = ({name: torch.full((9,), float(n + k)) for k, name in enumerate(names)} for n in (10, 20))
    repo = tmp_path / "models--org--name"
    (repo / "snapshots").mkdir(parents=True)
    (repo / "blobs").mkdir()
    folder = make(repo / "snapshots" / "commit", lender)
    (folder / SINGLE_NAME).rename(repo / "blobs" / "blob")
    (folder / SINGLE_NAME).symlink_to(Path("../../blobs/blob"))
    found = borrow(open_directory(make(tmp_path / "own", own)), open_directory(folder), ["b"])
    assert torch.equal(read_tensor(found, "a"), own["a"])
    assert torch.equal(read_tensor(found, "b"), lender["b"])
    assert borrow(found, open_directory(folder), []).tensors == found.tensors
