"""Checkpoints on the Hub: the same as local ones, for some kilobytes, whatever the network does meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from helpers.errors import raises
from helpers.hub_server import COMMIT, Hub, files_of, serve
from snugfit.errors import Unfinished
from snugfit.storage import http_ranges as ranges
from snugfit.storage import transfer
from snugfit.storage.checkpoint import INDEX_NAME, SINGLE_NAME, read_range, read_tensor
from snugfit.storage.hub import fetch_other_files
from snugfit.storage.open import open_checkpoint, open_headers

MakeTiny = Callable[..., Path]


@pytest.fixture(scope="module")
def tiny(make_tiny: MakeTiny) -> Path:
    """A tiny llama in several shards, with what else lies in a repository."""
    directory = make_tiny("llama", max_shard_size="60KB")
    (directory / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    (directory / "pytorch_model.bin").write_bytes(b"never fetched")
    (directory / "sub").mkdir()
    (directory / "sub" / "notes.txt").write_text("hello", encoding="utf-8")
    return directory


@pytest.fixture
def hub(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that has the tiny model as org/name; failures are retried without waiting."""
    with serve(files_of(tiny)) as running:
        point_at(running, tmp_path / "cache", monkeypatch)
        yield running
        huggingface_hub.close_session()


def point_at(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(ranges, "WAIT_SECONDS", (0.0,) * len(ranges.WAIT_SECONDS))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")


# --- the checkpoint


def test_a_model_on_the_hub_is_the_same_checkpoint(hub: Hub, tiny: Path) -> None:
    """Config, tensors, shards and other files of a Hub id are those of the directory, pinned to a commit."""
    remote, local = open_checkpoint("org/name"), open_checkpoint(tiny)
    assert remote.config == local.config
    assert dict(remote.tensors) == dict(local.tensors)
    assert list(remote.tensors) == list(local.tensors)
    assert (remote.shards, remote.other_files) == (local.shards, local.other_files)
    assert remote.name == "org/name"
    assert remote.remote is not None
    assert remote.remote.revision == COMMIT


def test_tensors_are_read_from_the_hub_to_the_bit(hub: Hub, tiny: Path) -> None:
    """Every tensor read by range has the bits that it has on disk, and no shard lies on the disk afterwards."""
    remote, local = open_headers("org/name"), open_checkpoint(tiny)
    for name in local.tensors:
        assert torch.equal(read_tensor(remote, name), read_tensor(local, name)), name
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.safetensors"))


def test_a_transfer_reads_a_tensor_in_pieces(hub: Hub, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transfer reads a large tensor in pieces, which together are the tensor, faults in between or not."""
    remote, local = open_headers("org/name"), open_checkpoint(tiny)
    tensor = max(local.tensors.values(), key=lambda t: t.bytes)
    monkeypatch.setattr(transfer, "PIECE_BYTES", 1000)
    for faults in ((), ("drop", "503", "none", "429", "shifted", "403", "drop")):
        hub.requests.clear()
        hub.faults.extend(faults)
        with transfer.Transfer(torch.device("cpu")) as reader:
            assert torch.equal(reader.read(remote, tensor.name).result(), read_tensor(local, tensor.name))
        assert len(hub.ranges(tensor.file)) >= -(-tensor.bytes // 1000)
        assert not hub.faults


def test_part_of_a_tensor_is_read_alone(hub: Hub, tiny: Path) -> None:
    """Bytes from the middle of a tensor are asked for by their own range, in one request."""
    remote, local = open_headers("org/name"), open_checkpoint(tiny)
    tensor = max(local.tensors.values(), key=lambda t: t.bytes)
    hub.requests.clear()
    here, there = bytearray(100), bytearray(100)
    read_range(local, tensor, 50, memoryview(here))
    read_range(remote, tensor, 50, memoryview(there))
    assert here == there
    assert hub.ranges() == [f"bytes={tensor.offset + 50}-{tensor.offset + 149}"]


def test_threads_read_side_by_side(hub: Hub, tiny: Path) -> None:
    """Reads from many threads at once do not disturb each other, with faults in between."""
    remote, local = open_headers("org/name"), open_checkpoint(tiny)
    hub.faults.extend(["drop", "503", "none", "403"] * 2)  # fewer than one thread may meet
    with ThreadPoolExecutor(8) as pool:
        found = dict(zip(local.tensors, pool.map(lambda name: read_tensor(remote, name), local.tensors), strict=True))
    assert all(torch.equal(found[name], read_tensor(local, name)) for name in local.tensors)


def test_headers_cost_a_request_a_shard(hub: Hub, tiny: Path) -> None:
    """Opening asks for the front of each shard once and for nothing else of it."""
    remote = open_headers("org/name")
    asked = hub.ranges()
    assert len(asked) == len(remote.shards)
    assert all(span.startswith("bytes=0-") for span in asked)


def test_a_header_longer_than_expected(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the first read ends inside the header, the rest is read from there."""
    whole = dict(open_headers("org/name").tensors)
    monkeypatch.setattr("snugfit.storage.hub.ENTRY_BYTES", 0)
    monkeypatch.setattr("snugfit.storage.hub.HEADER_BYTES", 8)
    hub.requests.clear()
    again = open_headers("org/name")
    assert dict(again.tensors) == whole
    assert any(not span.startswith("bytes=0-") for span in hub.ranges())


def test_only_config_files_are_fetched_for_headers(hub: Hub) -> None:
    """`open_headers` fetches config and index, `open_checkpoint` all that holds no weights."""

    def fetched() -> set[str]:
        snapshot = Path(constants.HF_HUB_CACHE) / "models--org--name" / "snapshots" / COMMIT
        return {str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file()}

    open_headers("org/name")
    assert fetched() == {"config.json", INDEX_NAME}
    opened = open_checkpoint("org/name")
    assert fetched() >= {"config.json", "generation_config.json", "tokenizer_config.json", "sub/notes.txt"}
    assert "pytorch_model.bin" in opened.other_files
    assert not {"pytorch_model.bin", *opened.shards} & fetched()
    assert (opened.path / "sub" / "notes.txt").read_text(encoding="utf-8") == "hello"


def test_adapters_are_fetched_to_be_copied(hub: Hub, tiny: Path) -> None:
    """An adapter in a folder of a Hub model is fetched by what copies it, and by nothing else; a trainer's never is."""
    names = [
        f"{folder}/adapter_{file}" for folder in ("a", "checkpoint-5") for file in ("config.json", "model.safetensors")
    ]
    hub.files = files_of(tiny) | dict.fromkeys(names, b"{}")
    opened = open_checkpoint("org/name")
    assert [name for name in names if (opened.path / name).is_file()] == ["a/adapter_config.json"]
    fetch_other_files(opened, to_copy=True)
    assert [name for name in names if (opened.path / name).is_file()] == names[:2]


def test_the_token_stays_with_the_hub(hub: Hub) -> None:
    """The Hub gets the token, the server that it redirects to never does."""
    remote = open_headers("org/name")
    read_tensor(remote, next(iter(remote.tensors)))
    tokens = {server: {token for name, _, _, token in hub.requests if name == server} for server in ("small", "large")}
    assert tokens == {"small": {True}, "large": {False}}


def test_the_signed_address_is_kept_until_it_expires(hub: Hub) -> None:
    """The Hub is asked once for a shard's address; when that is refused, once more."""
    remote = open_headers("org/name")
    tensor = max(remote.tensors.values(), key=lambda t: t.bytes)
    hub.requests.clear()
    read_tensor(remote, tensor.name)
    read_tensor(remote, tensor.name)
    assert [server for server, *_ in hub.requests] == ["large", "large"]
    hub.faults.append("403")
    hub.requests.clear()
    read_tensor(remote, tensor.name)
    assert [server for server, *_ in hub.requests] == ["large", "small", "large"]


def test_a_revision_is_asked_for(hub: Hub) -> None:
    """org/name@main and @commit are that revision; a missing revision is refused."""
    assert open_headers("org/name@main").remote is not None
    assert open_headers(f"org/name@{COMMIT}").remote is not None
    with raises("model-not-found", "org/name@other"):
        open_headers("org/name@other")


def test_one_file_without_an_index(hub: Hub, make_tiny: MakeTiny) -> None:
    """A model in one file has no index; its header is read all the same."""
    directory = make_tiny("llama")
    hub.files = files_of(directory)
    assert dict(open_headers("org/name").tensors) == dict(open_checkpoint(directory).tensors)


def test_a_directory_goes_before_a_name(hub: Hub, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local directory org/name is meant, not the Hub's model of that name."""
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").symlink_to(tiny)
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("org/name").remote is None
    assert hub.requests == []


# --- the cache


def cached(hub: Hub, tiny: Path, names: list[str]) -> Path:
    """The tiny model's files in the cache, as huggingface_hub lays them out: links to blobs."""
    repo = Path(constants.HF_HUB_CACHE) / "models--org--name"
    for folder in ("blobs", "refs", f"snapshots/{COMMIT}"):
        (repo / folder).mkdir(parents=True, exist_ok=True)
    (repo / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    for number, name in enumerate(names):
        (repo / "blobs" / str(number)).write_bytes((tiny / name).read_bytes())
        (repo / "snapshots" / COMMIT / name).symlink_to(f"../../blobs/{number}")
    return repo / "snapshots" / COMMIT


def test_a_shard_in_the_cache_is_read_there(hub: Hub, tiny: Path) -> None:
    """A whole shard in the cache is not requested again; a cached shard of another size is not trusted."""
    local = open_checkpoint(tiny)
    first, second = local.shards[:2]
    snapshot = cached(hub, tiny, [first, second])
    blob = (snapshot / second).resolve()
    blob.write_bytes(blob.read_bytes()[:-1])
    remote = open_headers("org/name")
    assert not hub.ranges(first)
    assert hub.ranges(second)
    for name, tensor in local.tensors.items():
        if tensor.file in (first, second):
            assert torch.equal(read_tensor(remote, name), read_tensor(local, name))
    assert not hub.ranges(first)


def test_offline_the_cache_is_enough(hub: Hub, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With HF_HUB_OFFLINE a model that lies whole in the cache is opened there, as is its snapshot's directory."""
    names = [name for name in files_of(tiny) if "/" not in name]
    snapshot = cached(hub, tiny, names)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    opened = open_checkpoint("org/name")
    assert dict(opened.tensors) == dict(open_checkpoint(tiny).tensors)
    assert (opened.path, opened.name) == (snapshot, "org/name")
    assert dict(open_checkpoint(snapshot).tensors) == dict(opened.tensors)
    assert hub.requests == []


def test_offline_and_not_in_the_cache(hub: Hub, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With HF_HUB_OFFLINE a model that is not cached, or not wholly, is refused with that reason."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with raises("model-not-found", "org/name") as caught:
        open_checkpoint("org/name")
    assert "HF_HUB_OFFLINE" in caught.value.remedy
    names = [name for name in files_of(tiny) if "/" not in name]
    cached(hub, tiny, [name for name in names if not name.startswith("model-00001")])
    with raises("weights-missing", COMMIT) as caught:
        open_checkpoint("org/name")
    assert "model-00001" in caught.value.what
    assert "HF_HUB_OFFLINE" in caught.value.remedy
    assert hub.requests == []


# --- faults


@pytest.mark.parametrize("fault", ["drop", "none", "503", "429", "403", "shifted"])
def test_faults_that_pass(fault: str, hub: Hub, tiny: Path) -> None:
    """A line that is cut, an overloaded server, an expired address: tried again, with the right bytes in the end."""
    remote, local = open_headers("org/name"), open_checkpoint(tiny)
    name = max(local.tensors, key=lambda n: local.tensors[n].bytes)
    hub.faults.extend([fault] * 3)
    assert torch.equal(read_tensor(remote, name), read_tensor(local, name))
    assert not hub.faults


def test_a_range_continues_where_it_broke_off(hub: Hub) -> None:
    """After a cut in the middle only the rest is asked for."""
    remote = open_headers("org/name")
    tensor = max(remote.tensors.values(), key=lambda t: t.bytes)
    hub.requests.clear()
    hub.faults.append("drop")
    read_tensor(remote, tensor.name)
    end = tensor.offset + tensor.bytes - 1
    middle = tensor.offset + tensor.bytes // 2
    assert hub.ranges() == [f"bytes={tensor.offset}-{end}", f"bytes={middle}-{end}"]


def test_a_line_that_drops_at_any_byte(hub: Hub, tiny: Path) -> None:
    """Wherever in a tensor the line is cut, and again in what is left, it arrives whole."""
    remote, local = open_headers("org/name"), open_checkpoint(tiny)
    name = min(local.tensors, key=lambda n: local.tensors[n].bytes)
    expected = read_tensor(local, name)
    for place in range(local.tensors[name].bytes):
        hub.faults.extend([f"drop {place}", "drop 1"])
        assert torch.equal(read_tensor(remote, name), expected)
        hub.faults.clear()


@pytest.mark.parametrize("fault", ["none", "503", "429"])
def test_faults_that_stay(fault: str, hub: Hub) -> None:
    """When nothing helps, the error names the file and the number of tries."""
    remote = open_headers("org/name")
    name, tensor = next(iter(remote.tensors.items()))
    hub.faults.extend([fault] * 100)
    with raises("hub-unreachable", f"org/name/{tensor.file}") as caught:
        read_tensor(remote, name)
    assert isinstance(caught.value, Unfinished)
    assert "10 tries" in caught.value.what


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("whole", "hub-answer-unusable"),
        ("gzip", "hub-answer-unusable"),
        ("total", "hub-changed"),
        ("416", "hub-changed"),
    ],
)
def test_faults_that_are_refused_at_once(fault: str, code: str, hub: Hub) -> None:
    """A server that ignores ranges, compresses, or has another file is refused without another try."""
    remote = open_headers("org/name")
    hub.requests.clear()
    hub.faults.append(fault)
    name, tensor = next(iter(remote.tensors.items()))
    with raises(code, tensor.file):
        read_tensor(remote, name)
    assert len(hub.ranges()) == 1


@pytest.mark.parametrize(
    ("denied", "code", "says"),
    [
        ((404, "RepoNotFound"), "model-not-found", "HF_TOKEN"),
        ((401, "RepoNotFound"), "model-not-found", "HF_TOKEN"),
        ((403, "GatedRepo"), "hub-refused", "gated"),
        ((401, "GatedRepo"), "hub-refused", "gated"),
        ((401, ""), "hub-refused", "401"),
        ((403, ""), "hub-refused", "403"),
        ((503, ""), "hub-unreachable", "503"),
        ((429, ""), "hub-unreachable", "429"),
    ],
    ids=str,
)
def test_a_hub_that_refuses(denied: tuple[int, str], code: str, says: str, hub: Hub) -> None:
    """Missing, private and gated models, bad tokens and a Hub that is down have different errors with remedies."""
    hub.denied = denied
    with raises(code, "org/name") as caught:
        open_headers("org/name")
    assert says in str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("denied", "code"),
    [((403, "GatedRepo"), "hub-refused"), ((404, "EntryNotFound"), "model-not-found"), ((401, ""), "hub-refused")],
    ids=str,
)
def test_access_that_ends_meanwhile(denied: tuple[int, str], code: str, hub: Hub) -> None:
    """A model that is withdrawn between two reads is refused by the shard's name."""
    remote = open_headers("org/name")
    remote.remote.redirects.clear()  # type: ignore[union-attr]  # HubFiles
    hub.denied = denied
    with raises(code, "org/name/model-"):
        read_tensor(remote, next(iter(remote.tensors)))


def test_no_hub_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing listens, the error names the address and what else could be done."""
    with serve({}) as gone:
        point_at(gone, tmp_path, monkeypatch)
    with raises("hub-unreachable", "org/name") as caught:
        open_headers("org/name")
    assert "no such directory" in caught.value.what
    assert gone.url in caught.value.what


# --- models that are no good


def without(files: dict[str, bytes], *names: str) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name not in names}


def test_models_that_are_no_good(hub: Hub, tiny: Path) -> None:
    """Without config, without weights, with pickles alone, without a shard: refused as a directory would be."""
    files = files_of(tiny)
    shards = [name for name in files if name.endswith(".safetensors")]
    bare = without(files, INDEX_NAME, *shards)
    for given, code, says in (
        (without(files, "config.json"), "config-missing", "config.json"),
        (without(files, shards[0]), "weights-missing", f"1 of {len(shards)} shards are missing: {shards[0]}"),
        (bare, "weights-unsafe", "pytorch_model.bin"),
        (without(bare, "pytorch_model.bin"), "weights-missing", SINGLE_NAME),
        (files | {shards[0]: files[shards[0]][:-8]}, "file-damaged", shards[0]),
        (files | {shards[0]: b"{" * 999}, "header-invalid", shards[0]),
        (files | {shards[0]: b""}, "header-invalid", shards[0]),
        (files | {"../evil.py": b"x"}, "file-outside-model", "../evil.py"),
        (files | {INDEX_NAME: b"[]"}, "index-invalid", INDEX_NAME),
    ):
        hub.files = given
        for cached_file in Path(constants.HF_HUB_CACHE).rglob("*.index.json"):
            cached_file.unlink()
        with raises(code, "org/name") as caught:
            open_headers("org/name")
        assert says in str(caught.value)


def test_index_and_shards_of_the_hub_disagree(hub: Hub, tiny: Path) -> None:
    """An index that sends a tensor to the wrong shard is refused, as on disk; one that no shard holds is remembered."""
    files = files_of(tiny)
    index = json.loads(files[INDEX_NAME])
    first, last = min(index["weight_map"].values()), max(index["weight_map"].values())
    index["weight_map"]["model.ghost"] = first
    hub.files = files | {INDEX_NAME: json.dumps(index).encode()}
    assert open_headers("org/name").missing == {"model.ghost": first}
    moved = next(name for name, file in index["weight_map"].items() if file == last)
    index["weight_map"][moved] = first
    hub.files = files | {INDEX_NAME: json.dumps(index).encode()}
    for cached_file in Path(constants.HF_HUB_CACHE).rglob("*.index.json"):
        cached_file.unlink()
    with raises("index-invalid", f"org/name/{INDEX_NAME}"):
        open_headers("org/name")


def test_the_hub_says_another_size(hub: Hub) -> None:
    """A shard whose server has another size than the Hub's listing is refused before its header is believed."""
    shard = min(name for name in hub.files if name.endswith(".safetensors"))
    hub.sizes[shard] = len(hub.files[shard]) + 1
    with raises("hub-changed", f"org/name/{shard}"):
        open_headers("org/name")


@pytest.mark.parametrize("name", ["org/name/more", "name", "org--x/na--me", "./org/name", "org/..", "a b/c"])
def test_neither_directory_nor_id(name: str, hub: Hub) -> None:
    """A text that is neither a directory nor an id of the Hub is refused."""
    with raises("model-not-found", Path(name)):
        open_headers(name)


def test_the_environment_is_heard(tiny: Path, tmp_path: Path) -> None:
    """HF_ENDPOINT and HF_HOME alone lead a command to another Hub and another cache."""
    code = "from snugfit.storage.open import open_checkpoint as o; print(len(o('org/name').tensors))"
    with serve(files_of(tiny)) as hub:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment = kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)}
        command = [sys.executable, "-c", code]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) == len(open_checkpoint(tiny).tensors)
    assert (tmp_path / "hub" / "models--org--name").is_dir()
    assert SINGLE_NAME not in {path.name for path in tmp_path.rglob("*")}
