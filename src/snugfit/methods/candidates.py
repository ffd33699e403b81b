"""How the block scales that a search tries follow from the plain one: numbers that kernels are compiled with."""

from __future__ import annotations

# offsets from the plain code; the plain code, then that of 1.5 times the scale; the plain code, then every code
BY_OFFSET, FOUR_OVER_SIX, EVERY_CODE = 0, 1, 2
