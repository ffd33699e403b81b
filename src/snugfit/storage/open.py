"""Opens a model, a directory or an id of the Hugging Face Hub: its config and the headers of its weights."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from snugfit.storage.checkpoint import Checkpoint, open_directory, read_header
from snugfit.storage.safetensors_header import StoredTensor

# org/name, org/name@revision
_REPO_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w][\w./+-]*))?", re.ASCII)


def is_hub_id(model: str | Path) -> bool:
    """Whether `model` is the id of a model on the Hub, and not an existing path."""
    return _REPO_ID.fullmatch(str(model)) is not None and not Path(model).exists()


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Read config and headers of a model: a directory, or a Hub id org/name[@revision]; UserError for anything wrong.

    A directory has precedence over an id. All files without weights of a model on the Hub are downloaded into
    huggingface_hub's cache.
    """
    checkpoint = open_headers(model)
    if checkpoint.remote is None:
        return checkpoint
    from snugfit.storage.hub import fetch_other_files

    return fetch_other_files(checkpoint)


def open_headers(model: str | Path) -> Checkpoint:
    """As `open_checkpoint`, but only the config files of a model on the Hub are downloaded, not its `other_files`."""
    match = _REPO_ID.fullmatch(str(model))
    if match is None or Path(model).exists():
        return open_directory(Path(model))
    from snugfit.storage.hub import open_hub

    return open_hub(match[1], match[2])


def fetch_small_files(checkpoint: Checkpoint, names: Iterable[str], *, limit: int) -> None:
    """Download those of `names` that a model on the Hub has, at most `limit` bytes each; a directory has them."""
    if checkpoint.remote is not None:
        from snugfit.storage.hub import fetch_files

        fetch_files(checkpoint, names, limit=limit)


def read_file_header(checkpoint: Checkpoint, file: str) -> list[StoredTensor]:
    """The tensors of one more safetensors file of a model, here or on the Hub; UserError where it cannot be read."""
    if checkpoint.remote is None:
        return read_header(checkpoint.path / file)
    from snugfit.storage.hub import read_remote_header

    return read_remote_header(checkpoint, file)
