"""An output directory while it is written: what stays of it, and of the folders above it, where a run fails."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from helpers.errors import raises
from snugfit.errors import UserError
from snugfit.storage.staging import resumable, staged

BAD = UserError("bad.", code="option-invalid", where="x")


@pytest.mark.parametrize("stage", [staged, resumable])
def test_bad_input_leaves_no_folder(stage: Callable[[Path], AbstractContextManager[Any]], tmp_path: Path) -> None:
    """The folders that were created above the output go with it; those that were there, or hold something, stay."""
    (tmp_path / "old").mkdir()
    for target in (tmp_path / "new" / "newer" / "out", tmp_path / "old" / "out"):
        with raises("option-invalid"), stage(target):
            raise BAD
    assert [path.name for path in tmp_path.rglob("*")] == ["old"]
    with raises("option-invalid"), stage(tmp_path / "new" / "newer" / "out"):
        (tmp_path / "new" / "mine").touch()
        raise BAD
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine", "new", "old"]


@pytest.mark.parametrize("stage", [staged, resumable])
def test_a_result_keeps_its_folders(stage: Callable[[Path], AbstractContextManager[Any]], tmp_path: Path) -> None:
    """A run that ends has its output below the folders that it created."""
    with stage(tmp_path / "new" / "newer" / "out"):
        pass
    assert (tmp_path / "new" / "newer" / "out").is_dir()


def test_a_name_that_cannot_be_written_leaves_no_folder(tmp_path: Path) -> None:
    """Folders above a name that is too long for the disk are removed again."""
    with raises("output-not-writable"), staged(tmp_path / "new" / ("x" * 300)):
        pass
    assert list(tmp_path.iterdir()) == []
