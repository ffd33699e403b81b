"""A model by directory or Hub id -> its config and headers."""

from __future__ import annotations

import re
from pathlib import Path

from snugfit.storage.checkpoint import Checkpoint, open_directory

# org/name, org/name@revision
REPO_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w][\w./+-]*))?", re.ASCII)


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Read config and headers of a model: a directory, or a Hub id org/name[@revision]; UserError for anything wrong.

    A directory goes before an id. Of a model on the Hub all files without weights are downloaded into its own cache.
    """
    if Path(model).exists() or REPO_ID.fullmatch(str(model)) is None:
        return open_directory(Path(model))
    from snugfit.storage.hub import fetch_other_files, open_hub

    return fetch_other_files(open_hub(str(model)))


def open_headers(model: str | Path) -> Checkpoint:
    """The same, but of a model on the Hub only config files are downloaded; `other_files` are then names alone."""
    if Path(model).exists() or REPO_ID.fullmatch(str(model)) is None:
        return open_directory(Path(model))
    from snugfit.storage.hub import open_hub

    return open_hub(str(model))
