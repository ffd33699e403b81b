"""`fit` on the headers of a second giant: bounded work, under 1 GB, no torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from planning.test_fit import GIANTS, check_bounded_work

pytestmark = pytest.mark.slow


def test_deepseek_takes_bounded_work(tmp_path: Path) -> None:
    """DeepSeek-V3 takes some million calls (seconds) and under 1 GB, without torch or transformers."""
    check_bounded_work(GIANTS["deepseek"], tmp_path / "model")
