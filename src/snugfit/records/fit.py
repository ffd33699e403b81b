"""What fits on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from snugfit.records.base import as_json

FIT_SCHEMA = "snugfit.fit/1"


@dataclass(frozen=True)
class FitCache:
    """One way to keep the cache with the weights of a `FitRow`. Bytes are one GPU's.

    `kv_cache` is "auto" (16 bits) or "fp8"; `recipe` writes it (an FP8 cache under calibrated scales, where a recipe
    does that). `longest` is the longest context of each sequence, 0 for none, at most what the model was made for.
    `spare_bytes` is what is left beside the asked context, negative where so much is missing; `gpus` how many would do
    where it does not fit, None where 16 do not.
    """

    kv_cache: str
    recipe: str | None
    bytes_per_token: int
    longest: int
    fits: bool
    spare_bytes: int
    gpus: int | None


@dataclass(frozen=True)
class FitRow:
    """One way to store the weights: the recipes that do it (none: the model as it is), with either cache.

    `kernels` names what runs them, by GPU generation. `problem` says why it cannot be, and then nothing else is known.
    """

    name: str
    recipes: tuple[str, ...]
    formats: tuple[str, ...]
    bytes: int | None = None
    gpu_bytes: int | None = None
    bits_per_weight: float | None = None
    caches: tuple[FitCache, ...] = ()
    kernels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    problem: str | None = None

    @property
    def fits(self) -> bool:
        """Whether it fits with some cache."""
        return any(cache.fits for cache in self.caches)


@dataclass(frozen=True)
class FitRecord:
    """What fits on a GPU, the answer first. Sizes in bytes.

    `memory` are the parts of one GPU beside weights and cache, `attention` what reads the cache, by generation, in 16
    bits and in FP8. `limit` is the longest context that the model was made for.
    """

    snugfit: str
    model: str
    arguments: Mapping[str, Any]
    gpu: Mapping[str, Any]
    engine: Mapping[str, Any]
    memory: Mapping[str, int]
    attention: Mapping[str, tuple[str, str]]
    context: int | None
    limit: int
    windows: tuple[int, ...]
    state_bytes: int
    rows: tuple[FitRow, ...]
    notes: tuple[str, ...]
    schema: str = FIT_SCHEMA

    def to_json(self) -> str:
        """The record as it is stored, one JSON document."""
        return as_json(asdict(self))
