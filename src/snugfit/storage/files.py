"""The files of a model directory, read without trust: regular files inside it only, strict JSON, positioned reads."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from snugfit.errors import Unfinished, UserError

AGAIN = "Download this file again."
MAX_JSON_BYTES = 256_000_000
# weights in other containers; engines would load them beside ours
OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
_SHARED_STORE = ".huggingface-shared-blobs"  # marks the store that all repos of a Hugging Face cache share


def read_file(root: Path, name: str, *, limit: int = MAX_JSON_BYTES) -> bytes:
    """All bytes of a small file of a model directory; FileNotFoundError where there is none, else UserError."""
    fd = open_regular(root, name)
    try:
        size = os.fstat(fd).st_size
        if size > limit:
            raise UserError(f"{size:,} bytes, which no such file has.", where=str(root / name), remedy=AGAIN)
        content = bytearray(size)
        read_fully(fd, 0, memoryview(content), where=str(root / name), what="this file")
    finally:
        os.close(fd)
    return bytes(content)


def open_regular(root: Path, name: str) -> int:
    """A descriptor of `name` below `root`; UserError for what is no regular file, or stands outside."""
    check_inside(root, name)
    # a pipe or a device would keep a plain open waiting
    no_file = UserError("not a regular file.", where=str(root / name), remedy="Put the real file in its place.")
    try:
        fd = os.open(root / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            raise no_file from None
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise no_file
    return fd


def read_fully(fd: int, offset: int, view: memoryview, *, where: str, what: str) -> None:
    """Fill `view` from byte `offset` of an open file, leaving the file's position alone; UserError where it ends."""
    done = 0
    while done < len(view):
        try:
            count = os.preadv(fd, [view[done:]], offset + done)
        except OSError as error:
            raise Unfinished(
                f"cannot be read ({error.strerror or error}).", where=where, remedy="Check the disk."
            ) from None
        if not count:
            raise UserError(
                f"the file ended inside {what}.", where=where, remedy="It changed while being read; download it again."
            )
        done += count


def check_inside(root: Path, name: str) -> None:
    """UserError where `name` is a link out of the model's directory; blobs of a Hugging Face cache are inside."""
    path = root / name
    if not path.is_symlink():
        return
    try:
        target = path.resolve()
    except RuntimeError:  # it leads to itself, and so to nothing
        return
    if not any(target.is_relative_to(place) for place in _insides(root.resolve())):
        raise UserError(
            f"a link to {target}, outside the model's directory.",
            where=str(path),
            remedy="Put the file itself in its place, or give the directory that holds all of them.",
        )


def list_files(root: Path) -> list[str]:
    """Names of all regular files below `root`, sorted; hidden folders are passed over, links out of it refused."""
    names: list[str] = []
    for folder, folders, files in os.walk(root):
        here = Path(folder).relative_to(root)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            check_inside(root, str(here / name))
        for name in files:
            inner = str(here / name)
            check_inside(root, inner)
            if (root / inner).is_file():
                names.append(inner)
    return sorted(names)


def parse_json(raw: bytes) -> Any:
    """Strict JSON: UTF-8, no half of a surrogate pair, no key twice, no NaN; ValueError or RecursionError otherwise."""
    found = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    if re.search(rb"\\u[dD][89a-fA-F]", raw):
        json.dumps(found, ensure_ascii=False).encode("utf-8")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {ascii(twice)[:200]} stands there twice")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _insides(root: Path) -> tuple[Path, ...]:
    """Where files of a model directory may really lie."""
    repo = root.parent.parent
    if root.parent.name != "snapshots" or not repo.name.startswith("models--"):
        return (root,)
    store = repo.parent / "blobs"
    return (root, repo / "blobs", *([store] if (store / _SHARED_STORE).is_file() else []))


PIECE = 16 << 20  # bytes of a tensor that are moved at once
