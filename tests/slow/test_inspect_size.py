"""`inspect` on the headers of a giant in 16 bits; that of giants in FP8 is among the default tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from inspection.test_inspect import inspect_with_bounds

pytestmark = pytest.mark.slow


def test_deepseek_in_16_bits(tmp_path: Path) -> None:
    """DeepSeek-V3 in BF16 takes millions of calls (seconds) and under 1 GB, and no torch; all of it is plain."""
    found = inspect_with_bounds(tmp_path, "deepseek", "bf16")
    assert {stored for part in found.parts for stored in part.stored} <= {"bf16", "f32"}
