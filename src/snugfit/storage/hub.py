"""A model on the Hugging Face Hub as a checkpoint, without downloading it.

Weights are never stored: headers are the first bytes of each shard, and a tensor is read by HTTP range when it is
needed, so that inspecting a 700 GB model costs some megabytes, and quantizing it needs a disk for the result alone.
Small files (config, tokenizer) go through huggingface_hub into its own cache. A shard that the cache holds whole is
read from there. Everything is pinned to one commit, and sizes are checked against the Hub's listing.

HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE have the same meaning as for huggingface_hub.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from snugfit.errors import UserError
from snugfit.records.quantize import RECIPE_FILE, RECORD_FILE
from snugfit.storage import http_ranges as ranges
from snugfit.storage.checkpoint import (
    CONFIG_NAME,
    INDEX_NAME,
    SINGLE_NAME,
    Checkpoint,
    check_index,
    merge_headers,
    no_weights,
    open_directory,
    parse_index,
    read_config,
)
from snugfit.storage.files import open_regular, read_file, read_part
from snugfit.storage.other_files import ADAPTER_CONFIG, MERGE, is_copied, is_weights
from snugfit.storage.safetensors_header import StoredTensor, header_length, parse_header

# files that describe a model's quantization, and how it was made
CONFIGS = (CONFIG_NAME, INDEX_NAME, "hf_quant_config.json", "quantize_config.json", "quant_config.json")
RECORDS = (RECIPE_FILE, RECORD_FILE)
MAX_RECORD_BYTES = 100_000_000
HEADER_WORKERS = 16
FILE_WORKERS = 8
FIRST_READ_BYTES = 512_000  # of a shard whose tensors no index names
ENTRY_BYTES = 160  # of a tensor in a header, without its name
HEADER_BYTES = 4096  # of a header without its tensors

_UNREACHED = (ranges.NetworkError, LocalEntryNotFoundError, ConnectionError)

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class HubFiles:
    """The files of a model at one commit: `sizes` in bytes, and the shards that the cache holds whole (`cached`)."""

    name: str
    revision: str
    sizes: Mapping[str, int | None]
    snapshot: Path
    cached: frozenset[str]
    redirects: MutableMapping[str, str] = field(default_factory=dict, repr=False)

    def read_into(self, file: str, offset: int, view: memoryview) -> None:
        """Fill `view` from byte `offset` of `file`, from the cache or over the network."""
        if file not in self.cached:
            ranges.read_web(self.web(file), offset, view)
            return
        fd = open_regular(self.snapshot, file)
        try:
            read_part(fd, offset, view, where=str(self.snapshot / file), what="a tensor")
        finally:
            os.close(fd)

    def web(self, file: str) -> ranges.WebFile:
        """A file's address on the Hub."""
        url = hf_hub_url(self.name, file, revision=self.revision)
        return ranges.WebFile(url, f"{self.name}/{file}", self.sizes[file], self.redirects)


def open_hub(name: str, revision: str | None) -> Checkpoint:
    """Config and headers of org/name; UserError for a model that is missing, denied, broken or unreachable.

    `other_files` are names; `fetch_other_files` downloads them. With HF_HUB_OFFLINE the cached model is opened.
    """
    model = name if revision is None else f"{name}@{revision}"
    if constants.HF_HUB_OFFLINE:
        return _open_cached(name, revision, model)
    listed = list_hub(name, revision)
    config = read_config(listed.snapshot)
    weight_map = None
    if INDEX_NAME in listed.sizes:
        weight_map = parse_index(read_file(listed.snapshot, INDEX_NAME), where=f"{model}/{INDEX_NAME}")
    shards = _shards(weight_map, listed.sizes, model)
    files = with_cache(listed, shards)
    headers = _read_headers(files, shards, weight_map or {})
    tensors = merge_headers(headers, where=model)
    missing = check_index(weight_map, tensors, where=f"{model}/{INDEX_NAME}")
    others = tuple(sorted(file for file in files.sizes if file not in {*shards, INDEX_NAME, CONFIG_NAME}))
    return Checkpoint(
        path=files.snapshot,
        config=config,
        tensors=tensors,
        shards=tuple(shards),
        other_files=others,
        missing=missing,
        remote=files,
    )


def list_hub(name: str, revision: str | None) -> HubFiles:
    """The files of org/name, its configs and records downloaded; UserError where there is no config.json."""
    model = name if revision is None else f"{name}@{revision}"
    with no_bars():
        commit, sizes = _repo_info(name, revision, model)
        small = [file for file in CONFIGS if file in sizes]
        small += [file for file in RECORDS if (sizes.get(file) or MAX_RECORD_BYTES) < MAX_RECORD_BYTES]
        if CONFIG_NAME not in sizes:
            what, remedy = "config.json is missing.", "Is this a language model?"
            if ADAPTER_CONFIG in sizes:
                what, remedy = "an adapter without its model.", f"To quantize the model with it, {MERGE}."
            raise UserError(what, code="config-missing", where=model, remedy=remedy)
        snapshot = _download(name, commit, small, model).parent
    return HubFiles(name=name, revision=commit, sizes=sizes, snapshot=snapshot, cached=frozenset())


def with_cache(files: HubFiles, shards: Iterable[str]) -> HubFiles:
    """The same files, with those of `shards` that the cache holds whole."""
    name, commit, sizes = files.name, files.revision, files.sizes
    return replace(files, cached=frozenset(shard for shard in shards if _is_whole(name, commit, shard, sizes[shard])))


def cached_snapshot(name: str, revision: str | None) -> Path | None:
    """With HF_HUB_OFFLINE the directory of a cached model, None without one and while the Hub may be asked."""
    found = try_to_load_from_cache(name, CONFIG_NAME, revision=revision) if constants.HF_HUB_OFFLINE else None
    return Path(found).parent if isinstance(found, str) else None


def fetch_files(checkpoint: Checkpoint, names: Iterable[str], *, limit: int) -> None:
    """Download those of `names` that a model on the Hub has, and that are no larger than `limit` bytes, to its path."""
    remote = checkpoint.remote
    if not isinstance(remote, HubFiles):
        return
    wanted = [name for name in names if name in checkpoint.other_files and (remote.sizes[name] or 0) <= limit]
    if wanted:
        with no_bars():
            _download(remote.name, remote.revision, wanted, remote.name)


def fetch_other_files(checkpoint: Checkpoint, *, to_copy: bool = False) -> Checkpoint:
    """The same checkpoint, all its files without weights downloaded to its path; a local one is returned as it is.

    With `to_copy` also adapters in folders of their own, which a quantized model keeps.
    """
    remote = checkpoint.remote
    if remote is None:
        return checkpoint
    known = frozenset(checkpoint.other_files)
    names = [name for name in checkpoint.other_files if is_copied(name, known) and (to_copy or not is_weights(name))]
    with no_bars():
        _download(remote.name, remote.revision, [CONFIG_NAME, *names], remote.name)
    return checkpoint


def try_headers(
    files: HubFiles, shards: Sequence[str], weight_map: Mapping[str, str], codes: frozenset[str]
) -> dict[str, list[StoredTensor] | UserError]:
    """The tensors of each shard, or its error where that has one of `codes`; other errors are raised."""

    def read(shard: str) -> list[StoredTensor] | UserError:
        try:
            return _read_headers(files, [shard], {n: file for n, file in weight_map.items() if file == shard})[shard]
        except UserError as error:
            if error.code not in codes:
                raise
            return error.at(error.where)  # without its traceback, which holds the header's bytes

    return dict(zip(shards, _in_threads(read, shards, HEADER_WORKERS), strict=True))


def read_remote_header(checkpoint: Checkpoint, file: str) -> list[StoredTensor]:
    """The tensors of a safetensors file that no index of a model on the Hub names; UserError where it is unreadable."""
    assert isinstance(checkpoint.remote, HubFiles), "a local checkpoint has files of its own"
    return _read_headers(checkpoint.remote, [file], {})[file]


def _open_cached(name: str, revision: str | None, model: str) -> Checkpoint:
    found = try_to_load_from_cache(name, CONFIG_NAME, revision=revision)
    offline = "HF_HUB_OFFLINE is set, so nothing is fetched."
    if not isinstance(found, str):
        what = "no such directory, and no such model in the cache."
        raise UserError(what, code="model-not-found", where=model, remedy=f"{offline} Unset it.")
    try:
        return open_directory(Path(found).parent)
    except UserError as error:
        remedy = f"{offline} {error.remedy}"
        raise UserError(error.what, code=error.code, where=error.where, remedy=remedy) from None


def _repo_info(name: str, revision: str | None, model: str) -> tuple[str, dict[str, int | None]]:
    """The commit, and the size of every file."""
    try:
        info = _with_retries(
            lambda: HfApi().model_info(name, revision=revision, files_metadata=True, timeout=30), model
        )
    except UserError as error:
        if error.code != "hub-unreachable":
            raise
        what = f"no such directory, and {error.what}"
        raise UserError(what, code=error.code, where=error.where, remedy=error.remedy) from None
    sizes = {str(file.rfilename): file.size for file in info.siblings or ()}
    for file in sizes:
        if not file.isprintable() or "\\" in file or any(part in ("", ".", "..") for part in file.split("/")):
            raise UserError(
                f"a file is named {ascii(file)[:200]}, which is not a path inside a directory.",
                code="file-outside-model",
                where=model,
                remedy="Do not use this model.",
            )
    if not info.sha:
        what = "the Hub's answer has no commit."
        raise UserError(what, code="hub-answer-unusable", where=model, remedy="Check HF_ENDPOINT.")
    return info.sha, sizes


def _shards(weight_map: Mapping[str, str] | None, sizes: Mapping[str, int | None], model: str) -> list[str]:
    if weight_map is None:
        if SINGLE_NAME not in sizes:
            raise no_weights(sizes, where=model)
        return [SINGLE_NAME]
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if name not in sizes]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(names)} shards are missing: {', '.join(missing[:3])}.",
            code="weights-missing",
            where=model,
            remedy=f"{INDEX_NAME} names them; choose another revision with {model.partition('@')[0]}@REVISION.",
        )
    return names


def _read_headers(
    files: HubFiles, shards: Sequence[str], weight_map: Mapping[str, str]
) -> dict[str, list[StoredTensor]]:
    expected = dict.fromkeys(shards, HEADER_BYTES)
    for tensor, shard in weight_map.items():
        expected[shard] += len(tensor) + ENTRY_BYTES

    def read(shard: str) -> list[StoredTensor]:
        where, size = f"{files.name}/{shard}", files.sizes[shard]
        if size is None:
            what = "the Hub does not list its size."
            raise UserError(what, code="hub-answer-unusable", where=where, remedy="Try again later.")
        first = bytearray(min(size, expected[shard] if weight_map else FIRST_READ_BYTES))
        files.read_into(shard, 0, memoryview(first))
        raw = bytearray(header_length(bytes(first[:8]), size, where=where))
        got = min(len(raw), len(first) - 8)
        raw[:got] = first[8 : 8 + got]
        files.read_into(shard, 8 + got, memoryview(raw)[got:])
        return parse_header(bytes(raw), shard, size, where=where)

    return dict(zip(shards, _in_threads(read, shards, HEADER_WORKERS), strict=True))


def _is_whole(name: str, commit: str, file: str, size: int | None) -> bool:
    """Whether the cache holds a file with the size that the Hub lists."""
    found = try_to_load_from_cache(name, file, revision=commit)
    return isinstance(found, str) and Path(found).stat().st_size == size


def _download(name: str, commit: str, files: Sequence[str], model: str) -> Path:
    """Fetch small files into the cache, several at a time; the path of the first."""

    def fetch(file: str) -> Path:
        return Path(_with_retries(lambda: hf_hub_download(name, file, revision=commit), f"{model}/{file}"))

    return next(iter(_in_threads(fetch, files, FILE_WORKERS)))


def _in_threads(call: Callable[[str], Result], names: Iterable[str], workers: int) -> list[Result]:
    """Results in order; the first error cancels the calls that have not started."""
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(call, name) for name in names]
        try:
            return [future.result() for future in futures]
        finally:
            pool.shutdown(cancel_futures=True)


def _with_retries(call: Callable[[], Result], where: str) -> Result:
    """The result of a call of huggingface_hub, tried again after failures that may pass; UserError for others."""
    waits = iter(ranges.WAIT_SECONDS[:4])
    while True:
        try:
            return call()
        except (HfHubHTTPError, HFValidationError, ranges.NetworkError, OSError) as error:
            seconds = _seconds_to_wait(error, waits)
            if seconds is None:
                raise _as_user_error(error, where) from None
            time.sleep(seconds)


def _seconds_to_wait(error: Exception, waits: Iterator[float]) -> float | None:
    """None where another try would not help."""
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status != 429 and status < 500:
            return None
        asked = ranges.retry_after(error.response.headers)
        usual = next(waits, None)
        return usual if usual is None or asked is None else min(asked, ranges.MAX_WAIT_SECONDS)
    return next(waits, None) if isinstance(error, _UNREACHED) else None


def _as_user_error(error: Exception, where: str) -> UserError:
    if isinstance(error, HFValidationError):
        what = "no such directory, and not a model's id either."
        return UserError(what, code="model-not-found", where=where, remedy="An id is org/name.")
    if isinstance(error, GatedRepoError):
        return ranges.denied(403, "GatedRepo", where)
    if isinstance(error, RevisionNotFoundError):
        remedy = "Name a branch, a tag or a commit behind the @."
        return UserError("no such revision.", code="model-not-found", where=where, remedy=remedy)
    if isinstance(error, RepositoryNotFoundError):
        return UserError(
            "no such directory, and no such model on the Hub.",
            code="model-not-found",
            where=where,
            remedy="Check the name; a private model needs `hf auth login` (or HF_TOKEN).",
        )
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403, 404):
        return ranges.denied(error.response.status_code, "", where)
    code = "hub-unreachable"
    if isinstance(error, HfHubHTTPError):
        what = f"the Hub answers HTTP {error.response.status_code}."
    elif isinstance(error, _UNREACHED):
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        what = f"{_without_password(constants.ENDPOINT)} cannot be reached ({reason or type(error).__name__})."
    else:
        code = "cache-not-writable"
        what = f"the cache cannot be written ({getattr(error, 'strerror', None) or error})."
    remedy = f"{ranges.RUN_AGAIN} HF_HUB_OFFLINE=1 uses a cached model; or give a directory."
    return UserError(what, code=code, where=where, remedy=remedy)


def _without_password(url: str) -> str:
    return re.sub(r"//[^/]*@", "//", url)


@contextmanager
def no_bars() -> Iterator[None]:
    """Without huggingface_hub's progress bars: these files are small."""
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()
