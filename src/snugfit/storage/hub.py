"""A model on the Hugging Face Hub as a checkpoint, without downloading it.

Weights are never stored: headers are the first bytes of each shard, and a tensor is read by HTTP range when it is
needed, so a 700 GB model is inspected for some megabytes and quantized on a disk that holds its result alone. Small
files (config, tokenizer) go through huggingface_hub into its own cache, which is also looked into first: a shard that
lies there whole is read from there. Everything is pinned to one commit, sizes are checked against what the Hub says.

HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE mean what they mean to huggingface_hub.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
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
from snugfit.storage.files import OTHER_WEIGHTS, open_regular, read_file, read_fully
from snugfit.storage.open import REPO_ID
from snugfit.storage.safetensors_header import StoredTensor, header_length, parse_header

# what says how a model is quantized, and what made it
CONFIGS = (CONFIG_NAME, INDEX_NAME, "hf_quant_config.json", "quantize_config.json", "quant_config.json")
RECORDS = ("snugfit-recipe.yaml", "snugfit-record.json")
MAX_RECORD_BYTES = 100_000_000
HEADER_WORKERS = 16
FILE_WORKERS = 8
FIRST_READ = 512_000  # bytes of a shard whose tensors no index names
ENTRY_BYTES = 160  # of a tensor in a header, without its name
FRONT_BYTES = 4096  # of a header besides

Result = TypeVar("Result")


@dataclass(frozen=True)
class HubFiles:
    """The files of a model at one commit; `cached` are its shards that lie whole in the cache, `sizes` are bytes."""

    name: str
    revision: str
    sizes: Mapping[str, int | None]
    snapshot: Path
    cached: frozenset[str]
    places: MutableMapping[str, str] = field(default_factory=dict, repr=False)

    def read_into(self, file: str, offset: int, view: memoryview) -> None:
        """Fill `view` from byte `offset` of `file`, from the cache or over the network."""
        if file not in self.cached:
            ranges.read_web(self.web(file), offset, view)
            return
        fd = open_regular(self.snapshot, file)
        try:
            read_fully(fd, offset, view, where=str(self.snapshot / file), what="a tensor")
        finally:
            os.close(fd)

    def web(self, file: str) -> ranges.WebFile:
        """Where a file is on the Hub."""
        url = hf_hub_url(self.name, file, revision=self.revision)
        return ranges.WebFile(url, f"{self.name}/{file}", self.sizes[file], self.places)


def open_hub(model: str) -> Checkpoint:
    """Config and headers of org/name[@revision]; UserError for what is missing, closed to us, broken or unreachable.

    `other_files` are names; `fetch_other_files` downloads them. With HF_HUB_OFFLINE it is what lies in the cache.
    """
    match = REPO_ID.fullmatch(model)
    assert match is not None, model
    name, revision = match[1], match[2]
    if constants.HF_HUB_OFFLINE:
        return _open_cached(name, revision, model)
    with _no_bars():
        commit, sizes = _repo_info(name, revision, model)
        small = [file for file in CONFIGS if file in sizes]
        small += [file for file in RECORDS if (sizes.get(file) or MAX_RECORD_BYTES) < MAX_RECORD_BYTES]
        if CONFIG_NAME not in sizes:
            raise UserError("config.json is missing.", where=model, remedy="Is this a language model?")
        snapshot = _download(name, commit, small, model).parent
    config = read_config(snapshot)
    weight_map = None
    if INDEX_NAME in sizes:
        weight_map = parse_index(read_file(snapshot, INDEX_NAME), where=f"{model}/{INDEX_NAME}")
    shards = _shards(weight_map, sizes, model)
    cached = frozenset(shard for shard in shards if _is_whole(name, commit, shard, sizes[shard]))
    files = HubFiles(name, commit, sizes, snapshot, cached)
    headers = _read_headers(files, shards, weight_map or {})
    tensors = merge_headers(headers, where=model)
    check_index(weight_map, tensors, where=f"{model}/{INDEX_NAME}")
    others = tuple(sorted(file for file in sizes if file not in {*shards, INDEX_NAME, CONFIG_NAME}))
    return Checkpoint(snapshot, config, tensors, tuple(shards), others, files)


def fetch_other_files(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint with all files that hold no weights below its path; nothing to do for a local one."""
    remote = checkpoint.remote
    if remote is None:
        return checkpoint
    names = [n for n in checkpoint.other_files if not n.endswith(OTHER_WEIGHTS) and not n.endswith(".index.json")]
    with _no_bars():
        _download(remote.name, remote.revision, [CONFIG_NAME, *names], remote.name)
    return checkpoint


def _open_cached(name: str, revision: str | None, model: str) -> Checkpoint:
    found = try_to_load_from_cache(name, CONFIG_NAME, revision=revision)
    offline = "HF_HUB_OFFLINE is set, so nothing is fetched."
    if not isinstance(found, str):
        raise UserError(
            "no such directory, and no such model in the cache.", where=model, remedy=f"{offline} Unset it."
        )
    try:
        return open_directory(Path(found).parent)
    except UserError as error:
        raise UserError(error.what, where=error.where, remedy=f"{offline} {error.remedy}") from None


def _repo_info(name: str, revision: str | None, model: str) -> tuple[str, dict[str, int | None]]:
    """Commit, and size of every file."""
    try:
        info = _patiently(lambda: HfApi().model_info(name, revision=revision, files_metadata=True, timeout=30), model)
    except UserError as error:
        unreached = f"no such directory, and {error.what}" if "cannot be reached" in error.what else error.what
        raise UserError(unreached, where=error.where, remedy=error.remedy) from None
    sizes = {str(file.rfilename): file.size for file in info.siblings or ()}
    for file in sizes:
        if not file.isprintable() or "\\" in file or any(part in ("", ".", "..") for part in file.split("/")):
            raise UserError(
                f"a file is named {ascii(file)[:200]}, which is no place in a directory.",
                where=model,
                remedy="Do not use this model.",
            )
    if not info.sha:
        raise UserError("the Hub names no commit.", where=model, remedy="Check HF_ENDPOINT.")
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
            where=model,
            remedy=f"{INDEX_NAME} names them; choose another revision with {model.partition('@')[0]}@REVISION.",
        )
    return names


def _read_headers(
    files: HubFiles, shards: Sequence[str], weight_map: Mapping[str, str]
) -> dict[str, list[StoredTensor]]:
    expected = dict.fromkeys(shards, FRONT_BYTES)
    for tensor, shard in weight_map.items():
        expected[shard] += len(tensor) + ENTRY_BYTES

    def read(shard: str) -> list[StoredTensor]:
        size = files.sizes[shard]
        if size is None:
            raise UserError("the Hub does not tell its size.", where=f"{files.name}/{shard}", remedy="Try again later.")
        where = f"{files.name}/{shard}"
        first = bytearray(min(size, expected[shard] if weight_map else FIRST_READ))
        files.read_into(shard, 0, memoryview(first))
        raw = bytearray(header_length(bytes(first[:8]), size, where=where))
        got = min(len(raw), len(first) - 8)
        raw[:got] = first[8 : 8 + got]
        files.read_into(shard, 8 + got, memoryview(raw)[got:])
        return parse_header(bytes(raw), shard, size, where=where)

    return dict(zip(shards, _in_threads(read, shards, HEADER_WORKERS), strict=True))


def _is_whole(name: str, commit: str, file: str, size: int | None) -> bool:
    """Whether a file lies in the cache with the size that the Hub says."""
    found = try_to_load_from_cache(name, file, revision=commit)
    return isinstance(found, str) and Path(found).stat().st_size == size


def _download(name: str, commit: str, files: Sequence[str], model: str) -> Path:
    """Fetch small files into the cache, several at a time; the path of the first."""

    def fetch(file: str) -> Path:
        return Path(_patiently(lambda: hf_hub_download(name, file, revision=commit), f"{model}/{file}"))

    return next(iter(_in_threads(fetch, files, FILE_WORKERS)))


def _in_threads(call: Callable[[str], Result], names: Iterable[str], workers: int) -> list[Result]:
    """Results in order; the first error ends what has not begun."""
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(call, name) for name in names]
        try:
            return [future.result() for future in futures]
        finally:
            pool.shutdown(cancel_futures=True)


def _patiently(call: Callable[[], Result], where: str) -> Result:
    """The result of a call of huggingface_hub, tried again while failures may pass; UserError for others."""
    waits = iter(ranges.WAITS[:4])
    while True:
        try:
            return call()
        except (HfHubHTTPError, HFValidationError, ranges.NetworkError, OSError) as error:
            seconds = _seconds_to_wait(error, waits)
            if seconds is None:
                raise _explained(error, where) from None
            time.sleep(seconds)


def _seconds_to_wait(error: Exception, waits: Iterator[float]) -> float | None:
    """None where another try would not help."""
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status != 429 and status < 500:
            return None
        asked = ranges.retry_after(error.response.headers)
        usual = next(waits, None)
        return usual if usual is None or asked is None else min(asked, ranges.LONGEST_WAIT)
    passing = isinstance(error, (ranges.NetworkError, LocalEntryNotFoundError, ConnectionError))
    return next(waits, None) if passing else None


def _explained(error: Exception, where: str) -> UserError:
    if isinstance(error, HFValidationError):
        return UserError("no such directory, and no model's id either.", where=where, remedy="An id is org/name.")
    if isinstance(error, GatedRepoError):
        return ranges.denied(403, "GatedRepo", where)
    if isinstance(error, RevisionNotFoundError):
        return UserError("no such revision.", where=where, remedy="Name a branch, a tag or a commit behind the @.")
    if isinstance(error, RepositoryNotFoundError):
        return UserError(
            "no such directory, and no such model on the Hub.",
            where=where,
            remedy="Check the name; a private model needs `hf auth login` (or HF_TOKEN).",
        )
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403, 404):
        return ranges.denied(error.response.status_code, "", where)
    if isinstance(error, HfHubHTTPError):
        what = f"the Hub answers HTTP {error.response.status_code}."
    elif isinstance(error, (ranges.NetworkError, LocalEntryNotFoundError, ConnectionError)):
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        what = f"{_without_password(constants.ENDPOINT)} cannot be reached ({reason or type(error).__name__})."
    else:
        what = f"the cache cannot be written ({getattr(error, 'strerror', None) or error})."
    return UserError(
        what, where=where, remedy=f"{ranges.GO_ON} HF_HUB_OFFLINE=1 uses what lies in the cache; or give a directory."
    )


def _without_password(url: str) -> str:
    return re.sub(r"//[^/]*@", "//", url)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without huggingface_hub's progress bars: these files are small."""
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()
