"""Lets runs of effort `good` and `best` make one way alone, without a comparison."""

from __future__ import annotations

from typing import Any

from snugfit.quantization import prepare, ways

_EVERY = ways.ways_of


def take_only(name: str) -> None:
    """From now on runs make the way of this name, and an exact recipe, which has none of it, its own one."""

    def one(*given: Any, **named: Any) -> tuple[ways.Way, ...]:
        found = _EVERY(*given, **named)
        return tuple(way for way in found if way.name == name) or found

    prepare.ways_of = one  # type: ignore[attr-defined]
