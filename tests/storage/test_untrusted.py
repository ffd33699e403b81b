"""A checkpoint is not trusted: links, pipes and nonsense in headers end in one clear error, never in a hang."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from helpers.errors import raises
from helpers.sparse_models import deepseek_v3
from snugfit.storage import safetensors_header as safetensors
from snugfit.storage.checkpoint import INDEX_NAME, SINGLE_NAME, read_range, read_tensor
from snugfit.storage.files import MAX_JSON_BYTES
from snugfit.storage.open import open_checkpoint
from snugfit.storage.safetensors_header import parse_header

Change = Callable[[Path], None]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model directory with one weight file."""
    directory = tmp_path / "model"
    directory.mkdir()
    save_file({"a": torch.arange(1000.0), "b": torch.ones(3, 5)}, directory / SINGLE_NAME)
    (directory / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    (directory / "tokenizer.json").write_text("{}", encoding="utf-8")
    return directory


@pytest.fixture
def indexed(model: Path) -> Path:
    """The same with an index."""
    weight_map = {"a": "x.safetensors", "b": "x.safetensors"}
    (model / SINGLE_NAME).rename(model / "x.safetensors")
    (model / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return model


def refused(model: Path, code: str, where: object = "") -> str:
    """The message of a model that must be refused with this code at this place."""
    with raises(code, where) as caught:
        open_checkpoint(model)
    assert len(str(caught.value)) < 2000
    assert str(caught.value).isprintable()
    return str(caught.value)


# --- links


@pytest.mark.parametrize("name", ["config.json", SINGLE_NAME, "tokenizer.json"])
def test_a_link_out_of_the_directory(name: str, model: Path, tmp_path: Path) -> None:
    """Weights, config or any other file that is a link to elsewhere is refused with file and target."""
    elsewhere = tmp_path / "secret"
    (model / name).rename(elsewhere)
    (model / name).symlink_to(elsewhere)
    assert str(elsewhere) in refused(model, "file-outside-model", model / name)


def test_links_that_lead_nowhere_or_to_folders(model: Path, tmp_path: Path) -> None:
    """A link out of the directory is refused whether it leads to a folder or to nothing."""
    (tmp_path / "folder").mkdir()
    for target in ("folder", "nothing"):
        (model / "extra").symlink_to(tmp_path / target)
        assert str(tmp_path / target) in refused(model, "file-outside-model", model / "extra")
        (model / "extra").unlink()


def test_links_within_the_directory(model: Path) -> None:
    """Links that stay inside are followed, and a link to nothing inside is ignored."""
    (model / "sub").mkdir()
    (model / SINGLE_NAME).rename(model / "sub" / "weights")
    (model / SINGLE_NAME).symlink_to("sub/weights")
    (model / "gone").symlink_to("nothing")
    opened = open_checkpoint(model)
    assert torch.equal(read_tensor(opened, "a"), torch.arange(1000.0))
    assert opened.other_files == ("sub/weights", "tokenizer.json")


def test_a_directory_that_is_a_link_itself(model: Path, tmp_path: Path) -> None:
    """The model's directory may be reached through a link."""
    (tmp_path / "alias").symlink_to(model)
    assert set(open_checkpoint(tmp_path / "alias").tensors) == {"a", "b"}


def cache(model: Path, hub: Path, place: Path) -> Path:
    """The model as a snapshot of a Hugging Face cache, its files links to `place`; gives the snapshot."""
    snapshot = hub / "models--org--name" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    place.mkdir(parents=True, exist_ok=True)
    for number, file in enumerate(sorted(model.iterdir())):
        file.rename(place / str(number))
        (snapshot / file.name).symlink_to(os.path.relpath(place / str(number), snapshot))
    return snapshot


def test_a_snapshot_of_the_hugging_face_cache(model: Path, tmp_path: Path) -> None:
    """A snapshot, whose files are links to the blobs of its own repository, is a model directory."""
    opened = open_checkpoint(cache(model, tmp_path / "hub", tmp_path / "hub" / "models--org--name" / "blobs"))
    assert torch.equal(read_tensor(opened, "a"), torch.arange(1000.0))
    assert opened.name == "org/name"


def test_a_snapshot_that_links_to_another_repository(model: Path, tmp_path: Path) -> None:
    """A snapshot whose links lead to blobs of another repository is refused."""
    snapshot = cache(model, tmp_path / "hub", tmp_path / "hub" / "models--org--other" / "blobs")
    refused(snapshot, "file-outside-model", snapshot)


def test_a_snapshot_with_the_cache_s_shared_store(model: Path, tmp_path: Path) -> None:
    """Blobs in the store that all repositories of a cache share count as inside, if the cache marks it as that."""
    store = tmp_path / "hub" / "blobs"
    snapshot = cache(model, tmp_path / "hub", store / "ab")
    refused(snapshot, "file-outside-model", snapshot)
    (store / ".huggingface-shared-blobs").write_text("1\n", encoding="utf-8")
    assert set(open_checkpoint(snapshot).tensors) == {"a", "b"}


# --- files that are not regular


@pytest.mark.parametrize("name", ["config.json", SINGLE_NAME, INDEX_NAME])
def test_a_pipe_in_the_place_of_a_file(name: str, model: Path) -> None:
    """A named pipe, on which a plain open would wait for ever, is refused."""
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    refused(model, "file-unreadable", model / name)


def test_a_pipe_among_other_files(model: Path) -> None:
    """A named pipe beside the model is no file of it."""
    os.mkfifo(model / "pipe")
    assert open_checkpoint(model).other_files == ("tokenizer.json",)


@pytest.mark.parametrize("name", ["config.json", SINGLE_NAME, INDEX_NAME])
def test_a_folder_in_the_place_of_a_file(name: str, model: Path) -> None:
    """A folder of a file's name is refused."""
    (model / name).unlink(missing_ok=True)
    (model / name).mkdir()
    refused(model, "file-unreadable", model / name)


def test_a_file_in_the_place_of_the_directory(model: Path) -> None:
    """A file is no model directory, and the message says so."""
    assert "a file" in refused(model / SINGLE_NAME, "model-not-found", model / SINGLE_NAME)


def test_a_config_of_gigabytes(model: Path) -> None:
    """A config.json that would fill the memory is refused by its size."""
    os.truncate(model / "config.json", MAX_JSON_BYTES + 1)
    assert f"{MAX_JSON_BYTES + 1:,} bytes" in refused(model, "file-unreadable", model / "config.json")


# --- headers


def header(text: bytes, size: int = 0) -> str:
    """The message with which a header is refused, in a file with `size` bytes behind it."""
    with raises("header-invalid", "x.safetensors") as caught:
        parse_header(text, "x.safetensors", 8 + len(text) + size, where="x.safetensors")
    assert len(str(caught.value)) < 1000
    assert str(caught.value).isprintable()
    return str(caught.value)


def shaped(shape: str, offsets: str = "0,1", dtype: str = '"U8"') -> str:
    """A header of a tensor a."""
    return f'{{"a":{{"dtype":{dtype},"shape":{shape},"data_offsets":[{offsets}]}}}}'


ENTRY = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
WRONG_NUMBERS = "shape or data_offsets of a"
HEADERS = {
    "a name twice": (f'{{"a":{ENTRY},"a":{ENTRY}}}', "'a'"),
    "a key twice": (f'{{"a":{ENTRY[:-1]},"dtype":"I8"}}}}', "'dtype'"),
    "a list": (f"[{ENTRY}]", "not a JSON object"),
    "no dtype": ('{"a":{"shape":[1],"data_offsets":[0,1]}}', "a lacks a dtype"),
    "a number": ('{"a":1}', "a lacks a dtype"),
    "NaN": (shaped("[NaN]"), "NaN"),
    "-Infinity": (shaped("[1]", "-Infinity,1"), "-Infinity"),
    "huge number": (shaped(f"[{2**64}]"), WRONG_NUMBERS),
    "endless number": (shaped(f"[{'9' * 5000}]"), "digits"),
    "float": (shaped("[1.0]"), WRONG_NUMBERS),
    "truth value": (shaped("[true]"), WRONG_NUMBERS),
    "negative": (shaped("[-1]", "0,-1"), WRONG_NUMBERS),
    "one offset": (shaped("[1]", "0"), WRONG_NUMBERS),
    "overflowing": (shaped(f"[{','.join(['9' * 18] * 60)}]", dtype='"F64"'), "a has more than"),
    "many dimensions": (shaped(f"[{','.join('1' * 65)}]"), WRONG_NUMBERS),
    "endless name": (f'{{"{"a" * 5000}":{ENTRY}}}', "5000 characters: aaaa"),
    "control characters": (f'{{"a\\u0007\\u001b[2J":{ENTRY}}}', r"a\x07\x1b[2J"),
    "a line's end": (f'{{"a\\n":{ENTRY}}}', "a tensor's name is"),
    "invisible": (f'{{"a\\u202e":{ENTRY}}}', "a tensor's name is"),
    "half a character": (f'{{"a\\ud800":{ENTRY}}}', "surrogates not allowed"),
    "UTF-16": ("", "utf-8"),
    "deep": ('{"a":' + "[" * 200_000, "recursion"),
    "deep in metadata": ('{"__metadata__":' + '{"a":' * 100_000, "recursion"),
    "text behind it": (f'{{"a":{ENTRY}}} x', "Extra data"),
    "another dtype": (shaped("[1]", dtype='{"a":1}'), "unknown dtype"),
    "shape of keys": (shaped('{"x":1}'), WRONG_NUMBERS),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_of_nonsense(name: str) -> None:
    """Whatever a header holds in the place of tensors, it is refused in words that can be printed."""
    text, says = HEADERS[name]
    raw = f'{{"a":{ENTRY}}}'.encode("utf-16") if name == "UTF-16" else text.encode("utf-8")
    message = header(raw, 1)
    assert says in message, message


@pytest.mark.parametrize("filling", ["[],", '{"":0},', "1,", "[[],[]],"])
def test_headers_that_would_explode(filling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large header that is mostly punctuation, which would be many times that in memory, is not even parsed."""
    monkeypatch.setattr(safetensors, "parse_json_object", lambda _raw: pytest.fail("parsed"))
    text = '{"a":[' + filling * (20_000_000 // len(filling)) + "0]}"
    header(text.encode())


def test_a_large_header_of_tensors_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large header that describes tensors with short names is read."""
    monkeypatch.setattr(safetensors, "LARGE_HEADER_BYTES", 1_000_000)
    entry = '"%x":{"dtype":"U8","shape":[],"data_offsets":[%d,%d]}'
    text = "{" + ",".join(entry % (n, n, n + 1) for n in range(20_000)) + "}"
    assert len(text) > 1_000_000
    assert len(parse_header(text.encode(), "x", 8 + len(text) + 20_000, where="x")) == 20_000


def test_impossible_header_lengths(model: Path) -> None:
    """A length of 2^64 - 1, or one just beyond the file, allocates nothing and is refused."""
    for length in (2**64 - 1, 2**63, 100_000_001, 5000):
        (model / SINGLE_NAME).write_bytes(struct.pack("<Q", length) + b"{}" * 100)
        refused(model, "header-invalid", model / SINGLE_NAME)


# --- indexes

INDEXES = {
    "a name twice": ('{"weight_map": {"a": "x.safetensors", "a": "x.safetensors"}}', "'a'"),
    "NaN": ('{"weight_map": NaN}', "NaN"),
    "control characters": ('{"weight_map": {"a": "x\\u0007.safetensors"}}', "weight_map sends a"),
    "endless": (json.dumps({"weight_map": {"a": "x" * 300 + ".safetensors"}}), "weight_map sends a"),
    "a name of control characters": ('{"weight_map": {"a\\n": "x.safetensors"}}', "weight_map sends 'a\\n'"),
    "numbers": ('{"weight_map": {"a": 3}}', "weight_map sends a"),
    "a list": ("[]", "not a JSON object"),
    "a list of names": ('{"weight_map": ["a"]}', "weight_map"),
    "deep": ('{"weight_map": ' + '{"a":' * 100_000, "no readable weight_map"),
}


@pytest.mark.parametrize("name", INDEXES)
def test_indexes_of_nonsense(name: str, indexed: Path) -> None:
    """An index with doubled, unprintable or endless names is refused by its file."""
    text, says = INDEXES[name]
    (indexed / INDEX_NAME).write_text(text, encoding="utf-8")
    message = refused(indexed, "index-invalid", indexed / INDEX_NAME)
    assert says in message, message


# --- reading by range


def test_any_part_of_a_tensor_is_read(model: Path) -> None:
    """Bytes from any place of a tensor are read there, none are nothing, and those beyond its end are refused."""
    opened = open_checkpoint(model)
    tensor = opened.tensors["a"]
    whole = torch.arange(1000.0).numpy().tobytes()
    for start, count in ((0, 4000), (0, 1), (3999, 1), (17, 1000), (4000, 0), (0, 0)):
        view = bytearray(count)
        read_range(opened, tensor, start, memoryview(view))
        assert bytes(view) == whole[start : start + count]
    for start, count in ((-1, 1), (0, 4001), (4000, 1)):
        with pytest.raises(ValueError, match="which has 4000"):
            read_range(opened, tensor, start, memoryview(bytearray(count)))


def test_threads_read_the_same_file(model: Path) -> None:
    """Reads from many threads at once each get their own bytes."""
    opened = open_checkpoint(model)
    whole = torch.arange(1000.0).numpy().tobytes()

    def read(start: int) -> bool:
        view = bytearray(100)
        read_range(opened, opened.tensors["a"], start, memoryview(view))
        return bytes(view) == whole[start : start + 100]

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(read, list(range(3900)) * 2))


@pytest.mark.parametrize(
    ("change", "code"),
    [(Path.unlink, "file-unreadable"), (lambda file: os.truncate(file, 100), "file-damaged")],
    ids=["gone", "shorter"],
)
def test_files_that_change_meanwhile(change: Change, code: str, model: Path) -> None:
    """A weight file that is removed or cut after it was opened is refused by its name."""
    opened = open_checkpoint(model)
    change(model / SINGLE_NAME)
    with raises(code, SINGLE_NAME):
        read_tensor(opened, "a")


def test_a_file_that_becomes_a_link_meanwhile(model: Path, tmp_path: Path) -> None:
    """A weight file that is replaced by a link to elsewhere after it was checked is not read."""
    opened = open_checkpoint(model)
    (model / SINGLE_NAME).rename(tmp_path / "elsewhere")
    (model / SINGLE_NAME).symlink_to(tmp_path / "elsewhere")
    with raises("file-outside-model", SINGLE_NAME):
        read_tensor(opened, "a")


def test_bytes_come_from_a_remote_where_there_is_one(model: Path) -> None:
    """A checkpoint with a remote asks that for its bytes, by file and offset in it, and its disk for nothing."""
    local = open_checkpoint(model)
    content = (model / SINGLE_NAME).read_bytes()

    class Memory:
        name, revision = "org/name", "0123"

        def read_into(self, file: str, offset: int, view: memoryview) -> None:
            assert file == SINGLE_NAME
            view[:] = content[offset : offset + len(view)]

    (model / SINGLE_NAME).unlink()
    remote = replace(local, remote=Memory())
    assert torch.equal(read_tensor(remote, "a"), torch.arange(1000.0))
    assert torch.equal(read_tensor(remote, "b"), torch.ones(3, 5))
    assert (remote.name, local.name) == ("org/name", "model")


# --- size

OPENED = """
import sys
from snugfit.storage import files
from snugfit.storage.open import open_checkpoint
read, bytes_read = files.os.preadv, []
files.os.preadv = lambda fd, views, offset: bytes_read.append(read(fd, views, offset)) or bytes_read[-1]
count = len(open_checkpoint(sys.argv[1]).tensors)
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(count, len(bytes_read), sum(bytes_read), peak)
"""


def test_the_headers_of_671_billion_weights(tmp_path: Path) -> None:
    """A checkpoint of 92,000 tensors in 163 shards is opened with two reads a shard, headers alone, below 300 MB."""
    directory = deepseek_v3(tmp_path)
    run = subprocess.run([sys.executable, "-c", OPENED, str(directory)], capture_output=True, text=True, check=True)
    count, reads, bytes_read, peak = map(int, run.stdout.split())
    assert count == 91_991
    assert reads <= 2 * 163 + 2
    assert bytes_read < 50_000_000
    assert peak < 300_000  # kB
