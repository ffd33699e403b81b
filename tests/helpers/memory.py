"""A machine with as much memory as a test says."""

from __future__ import annotations

import pytest

from snugfit.quantization import estimate


def leave_free(patch: pytest.MonkeyPatch, size: int) -> None:
    """A run may take `size` bytes in all, whatever this process holds from tests before."""
    patch.setattr(estimate, "rss_bytes", lambda: 0)
    patch.setattr(estimate, "free_bytes", lambda _: size)
