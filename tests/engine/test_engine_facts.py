"""The tables that `doctor` uses say what the installed engines' sources say."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from engine_facts import differences, installed, release_of


def test_the_library_of_this_environment() -> None:
    """transformers with compressed-tensors, which the tests have installed."""
    packages = installed(sys.executable)
    packages.pop("vllm", None)
    release = release_of(packages)
    assert release is not None
    assert list(differences(packages, release)) == []


@pytest.mark.engine
def test_the_installed_vllm() -> None:
    """vLLM's release in the environment of the engine tests is in the table, and as the table says."""
    python = os.environ.get("SNUGFIT_VLLM_PYTHON")
    if not python:
        pytest.fail("SNUGFIT_VLLM_PYTHON must name the Python of a vLLM environment: run `make engine`")
    packages = installed(python)
    release = release_of(packages)
    assert release is not None
    assert list(differences(packages, release)) == []
