"""Safetensors, on disk or on the Hub: headers, and tensors read by range.

A checkpoint is checked on its headers alone, which need no torch. Tensors are read with plain positioned reads, so
that memory holds the requested bytes and nothing of the rest of the file. Nothing in a checkpoint is trusted: whatever
is wrong with it is a UserError.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from snugfit.errors import Unfinished, UserError
from snugfit.storage.files import (
    DOWNLOAD_AGAIN,
    PIECE_BYTES,
    list_files,
    open_regular,
    parse_json_object,
    read_file,
    read_part,
)
from snugfit.storage.other_files import ADAPTER_CONFIG, MERGE
from snugfit.storage.safetensors_header import (
    TORCH_NAMES,
    StoredTensor,
    TensorInfo,
    header_length,
    parse_header,
    shown,
)

if TYPE_CHECKING:
    from torch import Tensor

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
FINGERPRINT_TENSORS, FINGERPRINT_BYTES = 64, 1024
_SAMPLE_BYTES = 1 << 16  # of each of four places, where two tensors on the Hub are compared


class Remote(Protocol):
    """The place of a checkpoint's weights that are not on this disk."""

    @property
    def name(self) -> str:
        """org/name."""

    @property
    def revision(self) -> str:
        """The commit, 40 hexadecimal digits."""

    def read_into(self, file: str, offset: int, view: memoryview) -> None:
        """Fill `view` from byte `offset` of `file`; safe in several threads. UserError where it cannot be read."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model directory: its config, its tensors by name in file order, and its other files.

    `missing` are tensors that the index names and no shard holds, with the shards that should. `lent` are files of
    another model of which tensors are read: its directory, and their names in it.

    The weights of a `remote` checkpoint are not below `path`; its other files are there once `fetch_other_files`
    has downloaded them.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    shards: tuple[str, ...]
    other_files: tuple[str, ...]
    missing: Mapping[str, str] = field(default_factory=dict)
    remote: Remote | None = None
    lent: Mapping[str, tuple[Path, str]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The model's name: org/name, or the name of its directory."""
        if self.remote is not None:
            return self.remote.name
        path = self.path.resolve()
        repo = path.parent.parent.name
        if path.parent.name == "snapshots" and repo.startswith("models--"):
            return repo.removeprefix("models--").replace("--", "/", 1)
        return path.name


def open_directory(root: Path) -> Checkpoint:
    """Read config and headers of a model directory."""
    if not root.is_dir():
        what = "a file, not a directory." if root.exists() else "no such directory."
        remedy = "Give a directory with config.json and weights, or the id of a model on the Hub: org/name."
        raise UserError(what, code="model-not-found", where=str(root), remedy=remedy)
    config = read_config(root)
    weight_map = _read_index(root)
    shards = _shard_names(root, weight_map)
    tensors = merge_headers({shard: read_header(root / shard) for shard in shards}, where=str(root))
    missing = check_index(weight_map, tensors, where=str(root / INDEX_NAME))
    weight_files = {*shards, INDEX_NAME, CONFIG_NAME}
    others = tuple(name for name in list_files(root) if name not in weight_files)
    return Checkpoint(
        path=root, config=config, tensors=tensors, shards=tuple(shards), other_files=others, missing=missing
    )


def merge_headers(headers: Mapping[str, list[StoredTensor]], *, where: str) -> dict[str, StoredTensor]:
    """Tensors of all shards by name; UserError for a tensor that two shards hold."""
    tensors: dict[str, StoredTensor] = {}
    for shard, found in headers.items():
        for tensor in found:
            if tensor.name in tensors:
                raise stored_twice(tensor, tensors[tensor.name], where=f"{where}/{shard}")
            tensors[tensor.name] = tensor
    return tensors


def stored_twice(tensor: StoredTensor, first: StoredTensor, *, where: str) -> UserError:
    """The error for a tensor that another shard holds as well."""
    return UserError(
        f"tensor {tensor.name} is also in {first.file}.",
        code="tensor-duplicate",
        where=where,
        remedy="Download the checkpoint again: two shards disagree.",
    )


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file; UserError where header and file size disagree."""
    try:
        fd = open_regular(file.parent, file.name)
    except OSError as error:
        what = f"cannot be read ({error.strerror or error})."
        raise UserError(what, code="file-unreadable", where=str(file), remedy=DOWNLOAD_AGAIN) from None
    try:
        size = os.fstat(fd).st_size
        prefix = bytearray(min(8, size))
        read_part(fd, 0, memoryview(prefix), where=str(file), what="its header")
        raw = bytearray(header_length(bytes(prefix), size, where=str(file)))
        read_part(fd, 8, memoryview(raw), where=str(file), what="its header")
    finally:
        os.close(fd)
    return parse_header(bytes(raw), file.name, size, where=str(file))


def header_digest(checkpoint: Checkpoint) -> str:
    """SHA-256 over config and tensor headers, in order; it does not read the weights."""
    parts = [json.dumps(checkpoint.config, sort_keys=True)]
    parts += [f"{t.name} {t.dtype} {t.shape} {t.file} {t.offset}" for t in checkpoint.tensors.values()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def borrow(checkpoint: Checkpoint, lender: Checkpoint, names: Iterable[str]) -> Checkpoint:
    """The checkpoint with the tensors `names` of a local lender, which has them in the same dtypes and shapes."""
    found = {name: lender.tensors[name] for name in names}
    files = {tensor.file: str((lender.path / tensor.file).absolute()) for tensor in found.values()}
    lent = {place: (lender.path, file) for file, place in files.items()}
    moved = {name: replace(tensor, file=files[tensor.file]) for name, tensor in found.items()}
    return replace(checkpoint, tensors={**checkpoint.tensors, **moved}, lent={**checkpoint.lent, **lent})


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 over the first bytes of some tensors: it differs between two models of the same shapes."""
    # by the hash of their names: a stride would meet the same part of every layer
    named = sorted(checkpoint.tensors, key=lambda name: hashlib.sha256(name.encode("utf-8", "replace")).digest())
    chosen = named[:FINGERPRINT_TENSORS]
    digest = hashlib.sha256()
    for name in chosen:
        buffer = bytearray(min(checkpoint.tensors[name].bytes, FINGERPRINT_BYTES))
        read_range(checkpoint, checkpoint.tensors[name], 0, memoryview(buffer))
        digest.update(name.encode("utf-8", "replace") + b"\0" + buffer)
    return digest.hexdigest()


def read_tensor(checkpoint: Checkpoint, name: str, expert: int | None = None) -> Tensor:
    """The tensor `name` on the CPU, read by range; with `expert`, that expert's part of a tensor of all experts."""
    import torch

    tensor = checkpoint.tensors[name]
    part, first = piece_of(tensor, expert)
    buffer = torch.empty(part.bytes, dtype=torch.uint8)
    view = memoryview(buffer.numpy())  # type: ignore[arg-type]  # it has the buffer protocol
    read_range(checkpoint, tensor, first, view)
    dtype: torch.dtype = getattr(torch, TORCH_NAMES[tensor.dtype])
    return buffer.view(dtype).view(part.shape)


def piece_of(tensor: StoredTensor, expert: int | None) -> tuple[TensorInfo, int]:
    """One expert's part of a tensor of all experts (None: the whole tensor), and its offset in the tensor in bytes."""
    if expert is None:
        return TensorInfo(tensor.name, tensor.dtype, tensor.shape), 0
    part = TensorInfo(tensor.name, tensor.dtype, tensor.shape[1:])
    return part, expert * part.bytes


def read_range(checkpoint: Checkpoint, tensor: StoredTensor, start: int, view: memoryview) -> None:
    """Fill `view` with the tensor's bytes from its byte `start` on; safe in several threads.

    UserError where the bytes cannot be read: a file that shrank, a disk that fails, a lost network.
    """
    view = view.cast("B")
    if not (start >= 0 and start + len(view) <= tensor.bytes):
        raise ValueError(f"bytes {start} to {start + len(view)} of {tensor.name}, which has {tensor.bytes}")
    if not len(view):
        return
    if checkpoint.remote is not None:
        checkpoint.remote.read_into(tensor.file, tensor.offset + start, view)
        return
    with _opened(checkpoint, tensor.file) as fd:
        where = str(checkpoint.path / tensor.file)
        read_part(fd, tensor.offset + start, view, where=where, what=f"tensor {tensor.name}")


def read_whole(checkpoint: Checkpoint, parts: Iterable[tuple[StoredTensor, memoryview]]) -> None:
    """Fill each view with all bytes of its tensor, none of which is empty; safe in several threads.

    A file is opened once for neighbours in `parts`. UserError as from `read_range`.
    """
    for file, found in groupby(parts, key=lambda part: part[0].file):
        if checkpoint.remote is not None:
            for tensor, view in found:
                checkpoint.remote.read_into(file, tensor.offset, view)
            continue
        where = str(checkpoint.path / file)
        with _opened(checkpoint, file) as fd:
            for tensor, view in found:
                read_part(fd, tensor.offset, view, where=where, what=f"tensor {tensor.name}")


@contextmanager
def _opened(checkpoint: Checkpoint, file: str) -> Iterator[int]:
    """A weight file of a local checkpoint, open for reading."""
    try:
        fd = open_regular(*checkpoint.lent.get(file, (checkpoint.path, file)))
    except OSError as error:
        what = f"cannot be read ({error.strerror or error})."
        where = str(checkpoint.path / file)
        raise Unfinished(what, code="file-unreadable", where=where, remedy=DOWNLOAD_AGAIN) from None
    try:
        yield fd
    finally:
        os.close(fd)


def have_same_bytes(checkpoint: Checkpoint, first: str, second: str) -> bool:
    """Whether two tensors of a checkpoint hold the same bytes; of a model on the Hub a few pieces are compared."""
    one, other = checkpoint.tensors[first], checkpoint.tensors[second]
    if one.bytes != other.bytes:
        return False
    pair = (checkpoint, one), (checkpoint, other)
    if checkpoint.remote is None:
        return are_equal(*pair)
    piece = min(_SAMPLE_BYTES, one.bytes)
    last = one.bytes - piece
    return are_equal(*pair, range(0, last + 1, max(1, last // 3)), piece)


def are_equal(
    first: tuple[Checkpoint, StoredTensor],
    second: tuple[Checkpoint, StoredTensor],
    starts: Iterable[int] | None = None,
    piece: int = PIECE_BYTES,
) -> bool:
    """Whether two tensors of as many bytes hold the same; with `starts` only `piece` bytes from each of these on."""
    total = first[1].bytes
    for start in range(0, total, piece) if starts is None else starts:
        found = []
        for checkpoint, tensor in (first, second):
            buffer = bytearray(min(piece, total - start))
            read_range(checkpoint, tensor, start, memoryview(buffer))
            found.append(buffer)
        if found[0] != found[1]:
            return False
    return True


def read_config(root: Path) -> dict[str, Any]:
    """config.json of a model directory; UserError where it is missing or not a JSON object."""
    file = root / CONFIG_NAME
    try:
        config = json.loads(read_file(root, CONFIG_NAME).decode("utf-8"))
    except FileNotFoundError:
        what, remedy = "config.json is missing.", "Is this a model directory?"
        if (root / ADAPTER_CONFIG).is_file():
            what, remedy = "an adapter without its model.", f"To quantize the model with it, {MERGE}."
        raise UserError(what, code="config-missing", where=str(root), remedy=remedy) from None
    except (ValueError, RecursionError) as error:
        what = f"not valid JSON ({error})."
        raise UserError(what, code="json-invalid", where=str(file), remedy=DOWNLOAD_AGAIN) from None
    if not isinstance(config, dict):
        raise UserError("not a JSON object.", code="json-invalid", where=str(file), remedy=DOWNLOAD_AGAIN)
    return config


def parse_index(raw: bytes, *, where: str) -> dict[str, str]:
    """Tensor name -> shard, from an index; UserError for a shard that is not a safetensors file beside the index."""
    try:
        weight_map = parse_json_object(raw).get("weight_map")
    except (ValueError, RecursionError, MemoryError) as error:
        what = f"no readable weight_map ({str(error)[:300] or type(error).__name__})."
        raise UserError(what, code="index-invalid", where=where, remedy=DOWNLOAD_AGAIN) from None
    if not isinstance(weight_map, dict):
        raise UserError("weight_map is no object.", code="index-invalid", where=where, remedy=DOWNLOAD_AGAIN)
    pairs = {name: str(file) for name, file in weight_map.items()}
    sound = {file for file in set(pairs.values()) if _is_shard_name(file)}
    for name, file in pairs.items():
        if file not in sound:
            raise UserError(
                f"weight_map sends {shown(name)} to {file[:300]!r}, which is not a safetensors file of this directory.",
                code="index-invalid",
                where=where,
                remedy="Do not use this checkpoint: its index points outside.",
            )
    return pairs


def check_index(
    weight_map: Mapping[str, str] | None, tensors: Mapping[str, StoredTensor], *, where: str
) -> dict[str, str]:
    """Tensors that the index names and no shard holds, with their files; UserError for one that another shard holds."""
    missing = {}
    for name, file in (weight_map or {}).items():
        if name not in tensors and name.isprintable():
            missing[name] = file
        elif name not in tensors or tensors[name].file != file:
            raise UserError(
                f"weight_map sends {shown(name)} to {file}, which does not hold it.",
                code="index-invalid",
                where=where,
                remedy="Download the checkpoint again: index and shards do not belong together.",
            )
    return missing


def _read_index(root: Path) -> dict[str, str] | None:
    try:
        return parse_index(read_file(root, INDEX_NAME), where=str(root / INDEX_NAME))
    except FileNotFoundError:
        return None


def _shard_names(root: Path, weight_map: Mapping[str, str] | None) -> list[str]:
    if weight_map is not None:
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if not (root / name).exists()]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(names)} shards are missing: {', '.join(missing[:3])}"
                + (", …" if len(missing) > 3 else "."),
                code="weights-missing",
                where=str(root),
                remedy=f"Download them; {INDEX_NAME} names them.",
            )
        return names
    if (root / SINGLE_NAME).exists():
        return [SINGLE_NAME]
    raise no_weights((path.name for path in root.iterdir()), where=str(root))


def no_weights(names: Iterable[str], *, where: str) -> UserError:
    """The error for a model without safetensors weights: its weights are pickles, or missing."""
    names = tuple(names)
    if ADAPTER_CONFIG in names:
        remedy = f"To quantize the model with it, {MERGE}."
        return UserError("an adapter without its model.", code="weights-missing", where=where, remedy=remedy)
    pickles = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt")))
    if pickles:
        return UserError(
            f"the weights are pickles ({pickles[0]}), which can run code when they are loaded.",
            code="weights-unsafe",
            where=where,
            remedy="Convert them to safetensors first, or download the safetensors revision.",
        )
    return UserError(
        f"no weights: neither {SINGLE_NAME} nor {INDEX_NAME}.",
        code="weights-missing",
        where=where,
        remedy="Give a directory with safetensors weights.",
    )


def _is_shard_name(file: str) -> bool:
    return (
        re.fullmatch(r"[^/\\\0]+\.safetensors", file) is not None
        and file.isprintable()
        and len(os.fsencode(file)) <= 255
    )
