"""Models and texts of the tests of bad input."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from conftest import MakeTiny
from helpers.refusals import put_file
from helpers.tiny_tokenizer import PROSE, add_tokenizer


@pytest.fixture(scope="session")
def bare(make_tiny: MakeTiny) -> Path:
    """A tiny llama in one weight file, without a tokenizer; tests copy it."""
    return make_tiny("llama")


@pytest.fixture(scope="session")
def llama(bare: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a tokenizer; tests copy it."""
    return add_tokenizer(shutil.copytree(bare, tmp_path_factory.mktemp("with") / "llama"))


@pytest.fixture(scope="session")
def sharded(make_tiny: MakeTiny) -> Path:
    """The same in several weight files with an index, with a tokenizer; tests copy it."""
    return add_tokenizer(make_tiny("llama", max_shard_size="60KB"))


@pytest.fixture(scope="session")
def wide(make_tiny: MakeTiny) -> Path:
    """A tiny llama of 80 tokens, without a tokenizer."""
    return make_tiny("llama", vocab_size=80)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where the result would go."""
    return tmp_path / "out"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text of some 800 tokens."""
    return put_file(tmp_path / "a.txt", PROSE)


@pytest.fixture
def good(llama: Path, tmp_path: Path) -> Path:
    """A candidate that is whole, a copy of the reference."""
    return shutil.copytree(llama, tmp_path / "good")
