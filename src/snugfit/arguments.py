"""What callers of the Python API may pass in more than one form."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def as_sequence(given: str | Path | Sequence[str | Path]) -> Sequence[str | Path]:
    """A sequence of paths or names; a single one counts as a sequence of one."""
    return (given,) if isinstance(given, str | Path) else given
