"""Fixtures: the sound checkpoints of doctor's zoo, made once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from helpers.zoo import make_sound

Sound = Mapping[str, tuple[Path, Path]]


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    """Sound checkpoints, and the models that they were made of."""
    return make_sound(tmp_path_factory.mktemp("zoo"))
