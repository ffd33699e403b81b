"""How the block scales that a search tries follow from the plain one, and the values between which columns choose."""

from __future__ import annotations

from typing import Literal

Grid = Literal["e2m1", "e4m3", "int4"]

# numbers that kernels are compiled with: offsets from the plain code; the plain code, then that of 1.5 times the scale;
# the plain code, then every code
BY_OFFSET, FOUR_OVER_SIX, EVERY_CODE = 0, 1, 2
