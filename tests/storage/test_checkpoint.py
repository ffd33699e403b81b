"""Weight files: byte-identical to safetensors' own, split as planned, and read back to the bit."""

from __future__ import annotations

import itertools
import json
import os
import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from helpers.errors import raises
from snugfit.errors import UserError
from snugfit.storage.background import Background
from snugfit.storage.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint, read_header, read_tensor
from snugfit.storage.open import open_checkpoint
from snugfit.storage.safetensors_header import DTYPE_BYTES, TORCH_NAMES, TensorInfo
from snugfit.storage.shards import SMALL_BYTES, ShardWriter, file_digests, index_text, plan_shards
from snugfit.storage.staging import (
    LOCK_NAME,
    WORK_NAME,
    check_stageable,
    resumable,
    staged,
    unit_name,
    units_done,
)
from snugfit.storage.transfer import PendingTransfer, Transfer

NAME_OF = {getattr(torch, name): short for short, name in TORCH_NAMES.items()}


def random_tensor(dtype: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Random bits, for BOOL random truth values."""
    generator = torch.Generator().manual_seed(seed)
    count = TensorInfo("", dtype, shape).bytes
    raw = torch.randint(0, 2 if dtype == "BOOL" else 256, (count,), dtype=torch.uint8, generator=generator)
    return raw.view(getattr(torch, TORCH_NAMES[dtype])).view(shape)


def infos(tensors: Mapping[str, Tensor]) -> list[TensorInfo]:
    return [TensorInfo(name, NAME_OF[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]


def finish(writer: ShardWriter) -> dict[str, str]:
    """SHA-256 of the files that were written, by name."""
    with Background() as background:
        return writer.finish(background).digests()


def write(directory: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int = 10**9) -> list[str]:
    """Plans and writes the tensors, last ones first; an index where there are several files. Names of the files."""
    shards = plan_shards(infos(tensors), max_shard_bytes)
    with Transfer(torch.device("cpu")) as transfer, ShardWriter(directory, shards, transfer) as writer:
        for name in reversed(list(tensors)):
            writer.write(name, tensors[name])
        writer.pending_writes()()
        finish(writer)
    if len(shards) > 1:
        text = index_text((shard.name, tensor) for shard in shards for tensor in shard.tensors)
        (directory / INDEX_NAME).write_text(text, encoding="utf-8")
    return [shard.name for shard in shards]


def model_directory(directory: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int = 10**9) -> Checkpoint:
    directory.mkdir(exist_ok=True)
    write(directory, tensors, max_shard_bytes)
    (directory / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    return open_checkpoint(directory)


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.numel() == 0 or torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def every_dtype() -> dict[str, Tensor]:
    shapes: list[tuple[int, ...]] = [(3, 5), (), (0,), (7,), (2, 0, 3), (2, 3, 4)]
    pairs = itertools.product(DTYPE_BYTES, shapes)
    return {f"t.{dtype}.{n}": random_tensor(dtype, shape, n) for n, (dtype, shape) in enumerate(pairs)}


# --- the bytes of a file

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=6).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.dictionaries(NAMES, st.tuples(st.sampled_from(sorted(DTYPE_BYTES)), SHAPES), max_size=6))
def test_file_is_the_one_that_safetensors_writes(
    content: dict[str, tuple[str, tuple[int, ...]]], tmp_path: Path
) -> None:
    """Whatever the names, dtypes and shapes, the file has the same bytes as safetensors' own of the same tensors."""
    tensors = {name: random_tensor(dtype, shape, seed) for seed, (name, (dtype, shape)) in enumerate(content.items())}
    save_file(tensors, tmp_path / "expected", metadata={"format": "pt"})
    assert write(tmp_path, tensors) == [SINGLE_NAME]
    assert (tmp_path / SINGLE_NAME).read_bytes() == (tmp_path / "expected").read_bytes()


def test_file_of_every_dtype_is_the_one_that_safetensors_writes(tmp_path: Path) -> None:
    """With tensors of every dtype and many shapes in one file, bytes are safetensors' own, too."""
    tensors = every_dtype()
    save_file(tensors, tmp_path / "expected", metadata={"format": "pt"})
    write(tmp_path, tensors)
    assert (tmp_path / SINGLE_NAME).read_bytes() == (tmp_path / "expected").read_bytes()


def test_views_are_written_as_what_they_show(tmp_path: Path) -> None:
    """A transposed or sliced tensor is written in the order of its indices."""
    base = torch.arange(12.0).view(3, 4)
    write(tmp_path, {"a": base.T, "b": base[:, 1:3]})
    with safe_open(tmp_path / SINGLE_NAME, framework="pt") as stream:
        assert torch.equal(stream.get_tensor("a"), base.T)
        assert torch.equal(stream.get_tensor("b"), base[:, 1:3])


@pytest.mark.parametrize(
    ("tensor", "planned"),
    [
        (torch.zeros(2, 3), TensorInfo("a", "F32", (3, 2))),
        (torch.zeros(2, 3), TensorInfo("a", "F32", (6,))),
        (torch.zeros(2, 3), TensorInfo("a", "I32", (2, 3))),
    ],
    ids=["shape", "dimensions", "dtype"],
)
def test_a_tensor_other_than_planned_stops_the_run(tensor: Tensor, planned: TensorInfo, tmp_path: Path) -> None:
    """A tensor with another shape or dtype than the header's is never written."""
    shards = plan_shards([planned], 10**9)
    with (
        Transfer(torch.device("cpu")) as transfer,
        ShardWriter(tmp_path, shards, transfer) as writer,
        pytest.raises(AssertionError, match="a: planned"),
    ):
        writer.write("a", tensor)


def test_a_tensor_never_written_stops_the_run(tmp_path: Path) -> None:
    """Finishing while a planned tensor is missing fails with its name."""
    shards = plan_shards(infos({"a": torch.zeros(2), "b": torch.zeros(2)}), 10**9)
    with Transfer(torch.device("cpu")) as transfer, ShardWriter(tmp_path, shards, transfer) as writer:
        writer.write("a", torch.zeros(2))
        writer.pending_writes()()
        with pytest.raises(AssertionError, match="'b'"):
            finish(writer)


def test_a_pending_write_stops_the_run(tmp_path: Path) -> None:
    """Finishing while writes may still be running fails; their wait may be called in another thread."""
    shards = plan_shards(infos({"a": torch.ones(3), "b": torch.zeros(2)}), 10**9)
    with Transfer(torch.device("cpu")) as transfer, ShardWriter(tmp_path, shards, transfer) as writer:
        writer.write("a", torch.ones(3))
        waits = [writer.pending_writes()]
        writer.write("b", torch.zeros(2))
        waits.append(writer.pending_writes())
        with pytest.raises(AssertionError, match="not written"):
            finish(writer)
        with ThreadPoolExecutor(2) as pool:
            written = [wait.result() for wait in [pool.submit(wait) for wait in waits]]
        assert [list(crcs) for crcs in written] == [["a"], ["b"]]
        assert finish(writer) == file_digests(tmp_path, [SINGLE_NAME])


@pytest.mark.parametrize("size", [8, SMALL_BYTES + 4])
def test_tensors_do_not_add_up_before_a_slow_disk(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of unit after unit that is written, tensors of the last two are in memory at most, copies being none."""
    names = "abcdefgh"
    shards = plan_shards([TensorInfo(name, "U8", (size,)) for name in names], 10**9)
    held: set[str] = set()
    most = 0
    write_many, write = Transfer.write_many, Transfer.write

    class Slow(PendingTransfer[Any]):
        """A write that ends when it is waited for, so that whatever nobody waits for is held."""

        name = ""

        def result(self) -> Any:
            """The CRC-32s; the tensor is no longer held."""
            held.discard(self.name)
            return super().result()

    def slow(pending: PendingTransfer[Any], offset: int) -> Slow:
        nonlocal most
        found = Slow(pending.pieces, pending.finish)
        found.name = next(name for name, start in shards[0].offsets.items() if start == offset)
        held.add(found.name)
        most = max(most, len(held))
        return found

    monkeypatch.setattr(
        Transfer,
        "write_many",
        lambda self, places, note: [
            slow(one, place[1]) for one, place in zip(write_many(self, places, note), places, strict=True)
        ],
    )
    monkeypatch.setattr(
        Transfer, "write", lambda self, handle, offset, *rest: slow(write(self, handle, offset, *rest), offset)
    )
    with Transfer(torch.device("cpu")) as transfer, ShardWriter(tmp_path, shards, transfer) as writer:
        waits = []
        for name in names:
            writer.write(name, torch.zeros(size, dtype=torch.uint8))
            waits.append(writer.pending_writes())
        assert most == 2
        assert [[*wait()] for wait in waits] == [[name] for name in names]
        finish(writer)


@pytest.mark.parametrize("lasts", [True, False])
@pytest.mark.parametrize(("small", "most"), [(-1, 1), (40, 1), (40, 3), (1 << 20, 64)])
def test_tensors_written_in_one_job(
    small: int, most: int, lasts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many small tensors share a job, files and CRC-32s are those of tensors that were written alone."""
    monkeypatch.setattr("snugfit.storage.shards.MOST_SMALL", most)
    tensors = every_dtype()
    expected = tmp_path / "expected"
    expected.mkdir()
    monkeypatch.setattr("snugfit.storage.shards.SMALL_BYTES", -1)
    write(expected, tensors)
    monkeypatch.setattr("snugfit.storage.shards.SMALL_BYTES", small)
    shards = plan_shards(infos(tensors), 10**9)
    with Transfer(torch.device("cpu")) as transfer:
        with ShardWriter(tmp_path, shards, transfer, lasts=lasts) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
            written = writer.pending_writes()()
            found = finish(writer)
        assert found == (file_digests(expected, [SINGLE_NAME]) if lasts else {})
        assert (tmp_path / SINGLE_NAME).read_bytes() == (expected / SINGLE_NAME).read_bytes()
        with ShardWriter(tmp_path, shards, transfer) as writer:
            assert written.keys() == tensors.keys()
            assert writer.holds(written)


@pytest.mark.parametrize("files", [1, 3])
def test_tensors_read_at_once_are_those_read_alone(files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small neighbours share a job, empty and large tensors have their own; all have their bytes, dtypes and shapes."""
    monkeypatch.setattr("snugfit.storage.transfer.PACK_BYTES", 4096)
    shapes = [(3,), (), (7, 5), (0, 4), (40, 50), (900,), (1,), (33, 11), (2, 2)]
    dtypes = ["F8_E4M3", "F32", "BF16", "F16", "U8", "I64", "BF16", "F8_E4M3", "F32"]
    tensors = {f"t{n}": random_tensor(d, s, n) for n, (d, s) in enumerate(zip(dtypes, shapes, strict=True))}
    checkpoint = model_directory(tmp_path / "model", tensors, sum(t.nbytes for t in tensors.values()) // files)
    with Transfer(torch.device("cpu")) as transfer:
        pending = transfer.read_many(checkpoint, tensors)
        assert sorted(pending) == sorted(tensors)
        jobs = {id(piece) for read in pending.values() for piece in read.pieces}
        assert len(jobs) < len(tensors) - 1
        for name, tensor in tensors.items():
            found = pending[name].result()
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert found.reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()


def test_a_tensor_cut_off_is_named_among_those_read_at_once(tmp_path: Path) -> None:
    """A file that shrank since its header was read is an error that names the first tensor that is cut off."""
    checkpoint = model_directory(tmp_path / "model", {"a": torch.ones(8), "b": torch.ones(8), "c": torch.ones(8)})
    file = tmp_path / "model" / SINGLE_NAME
    os.truncate(file, file.stat().st_size - 8)
    with Transfer(torch.device("cpu")) as transfer, raises("file-damaged", where=file) as caught:
        transfer.read_many(checkpoint, ["a", "b", "c"])["a"].result()
    assert "tensor c" in str(caught.value)


# --- the split into files


def test_shards_hold_what_fits_in_the_given_order() -> None:
    """Tensors fill shards up to the limit, in order; a tensor larger than the limit has its own shard."""
    sizes = {"a": 40, "b": 60, "c": 1, "d": 500, "e": 30, "f": 30, "g": 50}
    shards = plan_shards([TensorInfo(name, "U8", (size,)) for name, size in sizes.items()], 100)
    assert [{tensor.name for tensor in shard.tensors} for shard in shards] == [
        {"a", "b"},
        {"c"},
        {"d"},
        {"e", "f"},
        {"g"},
    ]
    assert [shard.name for shard in shards] == [f"model-0000{n}-of-00005.safetensors" for n in range(1, 6)]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(0, 40), max_size=20), limit=st.integers(1, 100))
def test_shards_never_exceed_the_limit(sizes: list[int], limit: int) -> None:
    """Every tensor is in one shard, in order; only a shard of a single tensor with bytes may exceed the limit."""
    tensors = [TensorInfo(f"{n:02d}", "U8", (size,)) for n, size in enumerate(sizes)]
    shards = plan_shards(tensors, limit)
    assert [name for shard in shards for name in sorted(t.name for t in shard.tensors)] == [t.name for t in tensors]
    for shard in shards:
        total = sum(tensor.bytes for tensor in shard.tensors)
        assert total <= limit or sum(tensor.bytes > 0 for tensor in shard.tensors) == 1
        (length,) = struct.unpack("<Q", shard.header[:8])
        assert len(shard.header) == 8 + length
        assert shard.bytes == len(shard.header) + total


def test_index_says_which_shard_holds_what(tmp_path: Path) -> None:
    """The index has every tensor with its shard, sorted by name, and the bytes of all tensors without headers."""
    tensors = {"b": torch.zeros(10), "a": torch.zeros(3, dtype=torch.int8), "c": torch.zeros(4, dtype=torch.bfloat16)}
    files = write(tmp_path, tensors, 43)
    index = json.loads((tmp_path / INDEX_NAME).read_text(encoding="utf-8"))
    assert index["metadata"] == {"total_size": 40 + 3 + 8}
    assert list(index["weight_map"]) == ["a", "b", "c"]
    assert index["weight_map"] == {"a": files[0], "b": files[0], "c": files[1]}
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, framework="pt") as stream:
            assert same_bits(stream.get_tensor(name), tensors[name])


# --- reading


@pytest.mark.parametrize("limit", [10**9, 200, 1])
def test_tensors_are_read_as_safetensors_reads_them(limit: int, tmp_path: Path) -> None:
    """Of one file or many, every tensor of every dtype is read with the bits, dtype and shape that safe_open gives."""
    checkpoint = model_directory(tmp_path, every_dtype(), limit)
    assert len(checkpoint.shards) > 1 or limit > 200
    for name, info in checkpoint.tensors.items():
        with safe_open(tmp_path / info.file, framework="pt") as stream:
            assert same_bits(read_tensor(checkpoint, name), stream.get_tensor(name)), name
    assert set(checkpoint.tensors) == set(every_dtype())


def test_files_of_safetensors_are_read(tmp_path: Path) -> None:
    """Files written by safetensors itself, metadata and all, are read the same way."""
    tensors = every_dtype()
    save_file(tensors, tmp_path / SINGLE_NAME, metadata={"format": "pt", "more": "ü"})
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    checkpoint = open_checkpoint(tmp_path)
    for name, tensor in tensors.items():
        assert same_bits(read_tensor(checkpoint, name), tensor), name


def test_weight_and_scale_in_different_shards(tmp_path: Path) -> None:
    """A module's weight and scale are found by name, though they are in different files."""
    tensors = {
        "m.weight": random_tensor("F8_E4M3", (8, 16)),
        "n.weight": random_tensor("BF16", (8, 16)),
        "m.weight_scale": random_tensor("BF16", (8, 1)),
    }
    checkpoint = model_directory(tmp_path, tensors, 130)
    found = {name: info.file for name, info in checkpoint.tensors.items()}
    assert found["m.weight"] != found["m.weight_scale"]
    assert all(same_bits(read_tensor(checkpoint, name), tensor) for name, tensor in tensors.items())


def test_a_tensor_read_is_memory_of_its_own(tmp_path: Path) -> None:
    """Changing a tensor that was read changes neither the file nor the next reading."""
    checkpoint = model_directory(tmp_path, {"a": torch.ones(4)})
    read_tensor(checkpoint, "a").zero_()
    assert torch.equal(read_tensor(checkpoint, "a"), torch.ones(4))


def test_a_file_that_shrinks_meanwhile(tmp_path: Path) -> None:
    """A file that was cut after its header had been read is refused with file and tensor."""
    checkpoint = model_directory(tmp_path, {"a": torch.ones(400)})
    file = tmp_path / SINGLE_NAME
    file.write_bytes(file.read_bytes()[:-8])
    with raises("file-damaged", SINGLE_NAME) as caught:
        read_tensor(checkpoint, "a")
    assert "tensor a" in str(caught.value)


def test_headers_are_read_in_file_order(tmp_path: Path) -> None:
    """A header gives every tensor's dtype, shape, file and the place of its first byte."""
    write(tmp_path, {"b": torch.arange(3.0), "a": torch.arange(4, dtype=torch.int64)})
    raw = (tmp_path / SINGLE_NAME).read_bytes()
    found = {info.name: info for info in read_header(tmp_path / SINGLE_NAME)}
    assert list(found) == ["a", "b"]
    assert (found["a"].dtype, found["a"].shape, found["a"].file) == ("I64", (4,), SINGLE_NAME)
    assert raw[found["a"].offset :][:32] == struct.pack("<4q", 0, 1, 2, 3)
    assert raw[found["b"].offset :] == struct.pack("<3f", 0.0, 1.0, 2.0)


@pytest.mark.parametrize(("names", "code"), [((), "config-missing"), (("config.json",), "weights-missing")])
@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_alone_is_to_be_merged(weights: str, names: tuple[str, ...], code: str, tmp_path: Path) -> None:
    """A directory with an adapter and no model is refused with merging as the remedy."""
    for name in ("adapter_config.json", weights, *names):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    with raises(code, tmp_path) as caught:
        open_checkpoint(tmp_path)
    assert "merge" in caught.value.remedy


def test_other_files_are_all_but_weights_config_and_hidden_ones(tmp_path: Path) -> None:
    """A checkpoint lists its other files, those of subdirectories too, and passes over hidden ones."""
    for name in ("tokenizer.json", "original/params.json", ".git/config", "sub/.cache/x", "pytorch_model.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    checkpoint = model_directory(tmp_path, {"a": torch.ones(40), "b": torch.ones(4)}, 100)
    assert checkpoint.other_files == ("original/params.json", "pytorch_model.bin", "tokenizer.json")
    assert checkpoint.shards == ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    assert checkpoint.config == {"model_type": "llama"}


def test_an_index_goes_before_a_single_file(tmp_path: Path) -> None:
    """Where there is an index, its shards are the weights, and a stray model.safetensors is one of the other files."""
    model_directory(tmp_path, {"a": torch.ones(40), "b": torch.ones(4)}, 100)
    save_file({"z": torch.ones(1)}, tmp_path / SINGLE_NAME)
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.tensors) == {"a", "b"}
    assert checkpoint.other_files == (SINGLE_NAME,)


# --- whole or not at all


def test_a_directory_appears_when_it_is_whole(tmp_path: Path) -> None:
    """Until the end only TARGET.partial exists, afterwards only TARGET, without the lock."""
    target = tmp_path / "deep" / "out"
    with staged(target) as directory:
        assert directory == tmp_path / "deep" / "out.partial"
        assert (directory / LOCK_NAME).exists()
        (directory / "a").write_text("x", encoding="utf-8")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["a"]
    assert not directory.exists()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_directory_that_fails_does_not_appear(error: type[BaseException], tmp_path: Path) -> None:
    """Whatever ends the block early, neither TARGET nor TARGET.partial is left."""
    target = tmp_path / "out"

    def fail() -> None:
        with staged(target) as directory:
            (directory / "sub").mkdir()
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_only_one_at_a_time(tmp_path: Path) -> None:
    """A second writer of the same target is refused, and the first is not disturbed."""
    target = tmp_path / "out"
    with staged(target) as directory:
        (directory / "a").touch()
        with raises("output-busy", directory), staged(target):
            pytest.fail("two writers at once")
        assert (directory / "a").exists()
    assert (target / "a").exists()


def unfinished(target: Path) -> Path:
    """An unfinished run of one unit, which wrote one file; its directory."""
    with suppress(KeyboardInterrupt), resumable(target) as (directory, work):
        (work / unit_name(0)).write_text("{}", encoding="utf-8")
        (directory / "a").write_text("x", encoding="utf-8")
        raise KeyboardInterrupt
    return target.with_name("out.partial")


def test_an_unfinished_run_stays_and_is_resumed(tmp_path: Path) -> None:
    """A run that was stopped after its first unit finds its files again; `restart` removes them first."""
    partial = unfinished(tmp_path / "out")
    assert units_done(partial) == 1
    with suppress(KeyboardInterrupt), resumable(tmp_path / "out") as (directory, _):
        assert (directory / "a").read_text(encoding="utf-8") == "x"
        raise KeyboardInterrupt
    with resumable(tmp_path / "out", restart=True) as (directory, work):
        assert not (directory / "a").exists()
        assert not list(work.iterdir())
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("error", [UserError("bad", code="option-invalid"), ValueError("a defect")], ids=str)
def test_what_removes_an_unfinished_run(error: Exception, tmp_path: Path) -> None:
    """Bad input removes an unfinished run, a defect does not."""
    partial = unfinished(tmp_path / "out")
    with pytest.raises(type(error)), resumable(tmp_path / "out"):
        raise error
    assert partial.exists() is not isinstance(error, UserError)


@pytest.mark.parametrize("name", ["a", "b", f"{WORK_NAME}/states-0", f"{WORK_NAME}/{unit_name(1)}"])
def test_a_link_in_an_unfinished_run_is_refused(name: str, tmp_path: Path) -> None:
    """A link among an unfinished run's files is refused, and the run is kept until `restart` removes it."""
    partial = unfinished(tmp_path / "out")
    (partial / name).unlink(missing_ok=True)
    (partial / name).symlink_to(tmp_path / "victim")
    with raises("run-damaged", partial / name), resumable(tmp_path / "out"):
        pytest.fail("resumed through a link")
    assert units_done(partial) >= 1
    with resumable(tmp_path / "out", restart=True):
        assert not (partial / name).is_symlink()
    assert not (tmp_path / "victim").exists()


def test_outputs_that_exist(tmp_path: Path) -> None:
    """An output that exists, and an OUT.partial that snugfit did not create, are refused before anything is written."""
    (tmp_path / "out").mkdir()
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "mine").touch()
    for name, place in (("out", "out"), ("other", "other.partial")):
        with raises("output-exists", tmp_path / place):
            check_stageable(tmp_path / name)
        with raises("output-exists", tmp_path / place), staged(tmp_path / name):
            pytest.fail("written")


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    """An output below a file is refused by its place."""
    (tmp_path / "file").touch()
    with raises("output-not-writable", tmp_path / "file" / "out.partial"):
        check_stageable(tmp_path / "file" / "out")
    with raises("output-not-writable", tmp_path / "file" / "out.partial"), staged(tmp_path / "file" / "out"):
        pytest.fail("written")


def test_digests_are_of_the_files_bytes(tmp_path: Path) -> None:
    """File digests are SHA-256 of the whole files, by name."""
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").write_bytes(b"")
    assert file_digests(tmp_path, ["a", "b"]) == {
        "a": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        "b": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    }
