"""Rows of datasets on the Hub, read by the `datasets` library and kept, so that a later run needs no network.

What is kept are the rows that were asked for, in the order they were drawn, under everything that decides them: name,
subset, split, the commit, the seed of a random order, and how a stream is shuffled. With a `revision` that is a commit
a kept source is read without a single request.
"""

from __future__ import annotations

import datetime as dt
import decimal
import gzip
import hashlib
import json
import os
import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO, cast

from snugfit.errors import UserError

STREAM_BUFFER = 1_000  # rows among which a stream is shuffled
_COMMIT = re.compile(r"[0-9a-f]{40}")
_VERSION = 1  # of kept files
_INSTALL = 'Install it: pip install "snugfit[datasets]". Or name local files.'


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """Which rows of the Hub: `seed` of a random order, None for the order in which they are stored."""

    name: str
    subset: str | None
    split: str
    revision: str | None
    streaming: bool
    seed: int | None


def open_hub_rows(source: HubSource, *, where: str) -> tuple[Iterator[tuple[str, dict[str, Any]]], str]:
    """The rows (place, row) in the order they are drawn, and the commit they are of.

    UserError for a dataset, subset, split or revision that does not exist, that cannot be reached, or whose rows cannot
    be read; the rows are opened when the first that is not kept is asked for.
    """
    commit = _commit(source, where)
    return _rows(source, commit, where), commit


def kept_file(source: HubSource, commit: str) -> Path:
    """The file that keeps the rows of a source at a commit."""
    key: dict[str, Any] = {**asdict(source), "revision": commit, "version": _VERSION}
    if source.streaming and source.seed is not None:
        key |= {"buffer": STREAM_BUFFER, "datasets": _library(source.name).__version__}
    else:
        del key["streaming"]  # the same rows in the same order
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return _folder(source) / f"{digest[:32]}.jsonl.gz"


def _folder(source: HubSource) -> Path:
    """The folder of what is kept of a dataset, where huggingface_hub's `cached_assets_path` would put it."""
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE) / "snugfit" / "datasets" / source.name.replace("/", "--")


def _rows(source: HubSource, commit: str, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Kept rows, then those of the library, which are kept while they are read; one row is in memory at a time."""
    file = kept_file(source, commit)
    kept = _Kept(file)
    known = 0
    for row in kept.rows():
        yield f"{source.name}[{known}]", row
        known += 1
    if kept.complete:
        return
    writer = _Writer(file)
    try:
        for number, row in enumerate(_read_live(source, commit, where)):
            writer.add(row)
            if number >= known:
                yield f"{source.name}[{number}]", row
        writer.complete = True
    finally:
        writer.finish(keep=writer.count > known or writer.complete)


def _read_live(source: HubSource, commit: str, where: str) -> Iterator[dict[str, Any]]:
    """The rows as JSON has them, from the library."""
    library = _library(where)
    try:
        table = library.load_dataset(
            source.name, source.subset, split=source.split, revision=commit, streaming=source.streaming
        )
        if source.seed is not None and source.streaming:
            table = table.shuffle(seed=source.seed, buffer_size=STREAM_BUFFER)
        rows = iter(table)
        if source.seed is not None and not source.streaming:
            generator = random.Random(source.seed)  # noqa: S311  # no secret
            order = sorted((generator.random(), place) for place in range(len(table)))
            rows = (table[place] for _, place in order)
        for row in rows:
            yield json.loads(json.dumps(_without_nulls(dict(row)), default=_plain))
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001  # the library lets through errors of many others
        raise _hub_error(error, source, where) from None


def _commit(source: HubSource, where: str) -> str:
    """The commit that the revision (default: main) stands for; offline, the one that it last stood for."""
    if source.revision is not None and _COMMIT.fullmatch(source.revision):
        return source.revision
    from huggingface_hub import HfApi, constants

    name = hashlib.sha256(f"{source.name}@{source.revision or 'main'}".encode()).hexdigest()[:32]
    note = _folder(source) / f"{name}.commit"
    if constants.HF_HUB_OFFLINE:
        if note.is_file() and _COMMIT.fullmatch(commit := note.read_text(encoding="ascii").strip()):
            return commit
        what = f"{source.name} was never read on this machine, and HF_HUB_OFFLINE is set."
        raise UserError(what, code="hub-unreachable", where=where, remedy="Unset it, or name local files.")
    try:
        commit = str(HfApi().dataset_info(source.name, revision=source.revision).sha)
    except Exception as error:  # noqa: BLE001  # of the library, of its HTTP client, of the system
        raise _hub_error(error, source, where) from None
    _writable(lambda: _write_note(note, commit))
    return commit


def _write_note(note: Path, commit: str) -> None:
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(commit, encoding="ascii")


def _library(where: str) -> Any:
    try:
        import datasets
    except ImportError:
        what = "reading datasets of the Hub needs the `datasets` library."
        raise UserError(what, code="dependency-missing", where=where, remedy=_INSTALL) from None
    return datasets


def _hub_error(error: Exception, source: HubSource, where: str) -> UserError:
    """What went wrong in the words of this project, at the source's place in the set."""
    names = {kind.__name__ for kind in type(error).__mro__}
    line = " ".join(str(error).split())[:300] or type(error).__name__
    of = f"{source.name}{f' ({source.subset})' if source.subset else ''}, split {source.split}"
    if names & {"GatedRepoError"} or "gated" in line.lower() or " 401" in line or " 403" in line:
        remedy = "Accept its terms on the Hub and log in (`hf auth login`), or leave this source out."
        return UserError(f"the Hub refuses access to {of} ({line}).", code="hub-refused", where=where, remedy=remedy)
    missing = {"RepositoryNotFoundError", "RevisionNotFoundError", "DatasetNotFoundError", "DataFilesNotFoundError"}
    missing |= {"EntryNotFoundError", "HFValidationError"}
    if names & missing or (isinstance(error, ValueError) and not names & {"JSONDecodeError", "UnicodeError"}):
        remedy = "Correct `dataset`, `subset`, `split` or `revision`, or leave this source out."
        return UserError(f"no {of} on the Hub ({line}).", code="dataset-not-found", where=where, remedy=remedy)
    network = {"ConnectionError", "HTTPError", "HfHubHTTPError", "RequestError", "TimeoutError", "TransportError"}
    network |= {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "FileNotFoundError", "ClientError"}
    if names & network:
        remedy = "Run the same command again; a `revision` that is a commit is read without network once it is kept."
        return UserError(f"cannot reach {of} ({line}).", code="hub-unreachable", where=where, remedy=remedy)
    remedy = "Leave this source out, or download it and name its files."
    return UserError(f"cannot read {of} ({line}).", code="dataset-unreadable", where=where, remedy=remedy)


class _Kept:
    """Rows in a kept file, a line each; the last line says how many there are, and whether they are all of the source.

    A file that is damaged or cut short counts as none.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._count, self.complete = 0, False
        try:
            with gzip.open(file, "rt", encoding="utf-8") as stream:  # gzip checks what it has read at the end
                count, last = -1, ""
                for line in stream:
                    count, last = count + 1, line
            if json.loads(last) in ([count, True], [count, False]):
                self._count, self.complete = count, json.loads(last)[1]
        except (OSError, EOFError, ValueError, zlib.error):
            return

    def rows(self) -> Iterator[dict[str, Any]]:
        """Row after row."""
        if self._count:
            with gzip.open(self._file, "rt", encoding="utf-8") as stream:
                for line in islice(stream, self._count):
                    yield json.loads(line)


class _Writer:
    """Writes rows while they are read; the file appears whole when it is finished."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
        self.count, self.complete = 0, False
        self._stream: TextIO = _writable(self._open)

    def _open(self) -> TextIO:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        return cast("TextIO", gzip.open(self._partial, "wt", encoding="utf-8"))  # `finish` closes it

    def add(self, row: dict[str, Any]) -> None:
        """Keep one more row."""
        _writable(lambda: self._stream.write(json.dumps(row) + "\n"))
        self.count += 1

    def finish(self, *, keep: bool) -> None:
        """Replace the kept file by what was written, or drop that."""

        def finish() -> None:
            self._stream.write(json.dumps([self.count, self.complete]) + "\n")
            self._stream.close()
            if keep:
                self._partial.replace(self._file)
            else:
                self._partial.unlink(missing_ok=True)

        _writable(finish)


def _writable(action: Any) -> Any:
    try:
        return action()
    except OSError as error:
        what = f"the cache of rows cannot be written ({error.strerror or error})."
        remedy = "Set HF_ASSETS_CACHE to a folder that can be written."
        where = str(error.filename or "HF_ASSETS_CACHE")
        raise UserError(what, code="cache-not-writable", where=where, remedy=remedy) from None


def _without_nulls(value: Any) -> Any:
    """A row whose columns have no nulls in them: the library gives all objects of a column the keys of all others."""

    def inner(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: inner(one) for key, one in part.items() if one is not None}
        return [inner(one) for one in part] if isinstance(part, list | tuple) else part

    return {key: inner(part) for key, part in value.items()}


def _plain(value: Any) -> Any:
    """What JSON has no form of, as a text that is the same on every machine."""
    if isinstance(value, dt.date | dt.time | decimal.Decimal):
        return str(value)  # as rows of a local Parquet file show it
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    return f"<{type(value).__name__}>"
