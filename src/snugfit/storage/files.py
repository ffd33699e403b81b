"""The files of a model directory, read without trust: regular files inside it only, strict JSON, positioned reads."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from snugfit.errors import Unfinished, UserError

PIECE_BYTES = 16 << 20  # of a tensor that are read or written at once
MAX_JSON_BYTES = 256_000_000
DOWNLOAD_AGAIN = "Download this file again."
# weights in other containers; engines would load them beside the safetensors files
OTHER_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".th", ".ckpt", ".pkl", ".pickle", ".joblib", ".distcp", ".nemo", ".npz"),
    *(".gguf", ".ggml", ".h5", ".hdf5", ".keras", ".msgpack", ".ot", ".onnx", ".onnx_data", ".pdparams", ".tflite"),
    *(".mlmodel", ".mlpackage", ".pte", ".litertlm", ".llamafile", ".engine"),
)
_SHARED_STORE = ".huggingface-shared-blobs"  # marks the store that all repos of a Hugging Face cache share


def nearest_folder(path: Path) -> Path:
    """`path` itself, or the nearest folder above it that exists."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.is_dir())


@contextlib.contextmanager
def with_parents(path: Path) -> Iterator[None]:
    """Create the folders above `path` that are missing; at the end those that are still empty are removed again.

    OSError where one cannot be created.
    """
    missing = [folder for folder in path.absolute().parents if not os.path.lexists(folder)]  # the deepest first
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()


def read_fully(fd: int, offset: int, view: memoryview) -> None:
    """Fill `view` from byte `offset` of an open file, leaving the file's position alone; safe in several threads.

    EOFError where the file ends before, OSError where the disk fails.
    """
    done = 0
    while done < len(view):
        count = os.preadv(fd, [view[done:]], offset + done)
        if not count:
            raise EOFError(f"the file ended at byte {offset + done}")
        done += count


def write_fully(fd: int, offset: int, data: bytes | memoryview) -> None:
    """Write all of `data` from byte `offset` of an open file, leaving its position alone; OSError where that fails."""
    view = memoryview(data)
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)


def read_part(fd: int, offset: int, view: memoryview, *, where: str, what: str) -> None:
    """As `read_fully`, of a model's file named `where`: UserError where `what` (such as "tensor a") is cut off."""
    try:
        read_fully(fd, offset, view)
    except EOFError:
        raise UserError(
            f"the file ended inside {what}.",
            code="file-damaged",
            where=where,
            remedy="The file changed while it was read; download it again.",
        ) from None
    except OSError as error:
        raise Unfinished(
            f"cannot be read ({error.strerror or error}).",
            code="file-unreadable",
            where=where,
            remedy="Check the disk.",
        ) from None


def read_run_file(fd: int, offset: int, view: memoryview) -> None:
    """As `read_fully`, of bytes that this run, or the one that it resumes, has written: Unfinished where they are gone.

    OSError where the disk fails.
    """
    try:
        read_fully(fd, offset, view)
    except EOFError:
        raise Unfinished(
            "a file that this run has written ended early.",
            code="run-damaged",
            remedy="Run it again to resume: it checks what the disk holds.",
        ) from None


def read_file(root: Path, name: str, *, limit: int = MAX_JSON_BYTES) -> bytes:
    """All bytes of a small file of a model directory; FileNotFoundError where it is missing, else UserError."""
    fd = open_regular(root, name)
    try:
        size = os.fstat(fd).st_size
        if size > limit:
            raise UserError(
                f"{size:,} bytes; a file of this name has {limit:,} at most.",
                code="file-unreadable",
                where=str(root / name),
                remedy=DOWNLOAD_AGAIN,
            )
        content = bytearray(size)
        read_part(fd, 0, memoryview(content), where=str(root / name), what="this file")
    finally:
        os.close(fd)
    return bytes(content)


def open_regular(root: Path, name: str) -> int:
    """A descriptor of `name` below `root`; UserError for a file outside, a folder, a pipe, a socket or a device."""
    check_inside(root, name)
    irregular = UserError(
        "not a regular file.",
        code="file-unreadable",
        where=str(root / name),
        remedy="Put the real file in its place.",
    )
    try:
        # a pipe or a device would keep a plain open waiting
        fd = os.open(root / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            raise irregular from None
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise irregular
    return fd


def check_inside(root: Path, name: str) -> None:
    """UserError where `name` is a link out of the model's directory; blobs of a Hugging Face cache are inside."""
    path = root / name
    if not path.is_symlink():
        return
    try:
        target = path.resolve()
    except RuntimeError:  # a link to itself leads nowhere
        return
    if not any(target.is_relative_to(folder) for folder in _inside_folders(root.resolve())):
        raise UserError(
            f"a link to {target}, outside the model's directory.",
            code="file-outside-model",
            where=str(path),
            remedy="Put the file itself in its place, or give the directory that holds all of them.",
        )


def list_files(root: Path) -> list[str]:
    """Names of all regular files below `root`, sorted, without hidden folders; UserError for links out of it."""
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
    found = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    if re.search(rb"\\u[dD][89a-fA-F]", raw):
        json.dumps(found, ensure_ascii=False).encode("utf-8")
    return found


def parse_json_object(raw: bytes) -> dict[str, Any]:
    """As `parse_json`, of a document that is an object; ValueError for another."""
    found = parse_json(raw)
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")  # noqa: TRY004  # a wrong value, as the other faults of the text
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {ascii(repeated)[:200]} is given twice")
    return found


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _inside_folders(root: Path) -> tuple[Path, ...]:
    """Folders in which the files of a model directory may really lie."""
    repo = root.parent.parent
    if root.parent.name != "snapshots" or not repo.name.startswith("models--"):
        return (root,)
    store = repo.parent / "blobs"
    return (root, repo / "blobs", *([store] if (store / _SHARED_STORE).is_file() else []))
