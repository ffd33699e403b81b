"""How far inputs on held-out samples exceed the range that calibration gave the scales of these inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan

from snugfit.records.base import Number


@dataclass(frozen=True, kw_only=True)
class InputSaturation:
    """Held-out inputs of linears that share one static input scale, under the weights that were written.

    `module` is the first linear of a fused group, or routed experts' gate and up or down together. `range` is the
    largest magnitude that the scale represents, `calibrated_amax` the largest calibrated input that it was made of,
    None for a scale that came with the source's codes. `amax` is the largest magnitude on held-out samples, `ratio`
    that over `calibrated_amax` (or over `range`). `saturated_values` values are beyond the range, in `saturated_tokens`
    of `tokens` tokens.
    """

    module: str
    tokens: int
    saturated_tokens: int
    saturated_values: int
    amax: Number
    ratio: Number
    range: Number
    calibrated_amax: Number | None


def worst(sites: Sequence[InputSaturation]) -> InputSaturation:
    """The site that exceeds its range most, NaN first; where the ranges hold, the one that comes closest."""
    return max(sites, key=lambda site: (isnan(site.amax), site.amax / site.range))
