"""Tiny models by family, for tests that run several."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import MakeTiny
from helpers.tiny_mixtures import Source, make_mixture


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, make_tiny: MakeTiny) -> Source:
    """Gives a tiny model of a family, "llama" or a mixture's, made once."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(family) / "model"
            made[family] = make_tiny("llama") if family == "llama" else make_mixture(family, folder)
        return made[family]

    return make
