"""What a quantize run leaves: a record of each tensor, and of the run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from snugfit.records.base import as_json, without_nan
from snugfit.records.norm_folds import NormFold
from snugfit.records.saturation import InputSaturation
from snugfit.records.trials import Trial

QUANTIZE_SCHEMA = "snugfit.quantize/1"
# files of a quantized checkpoint that say how it was made
RECORD_FILE = "snugfit-record.json"
RECIPE_FILE = "snugfit-recipe.yaml"
# formats of tensors that no rule quantized: in the source's dtype, or out of its codes in 16 bits; scales of a KV cache
PASSTHROUGH, DEQUANTIZED, KV_CACHE = "as it was", "dequantized", "fp8 KV cache"


@dataclass(frozen=True)
class TensorRecord:
    """One source tensor: where it went, what that cost.

    `relative_error` is sum((w_hat - w)^2) / sum(w^2), None for a tensor kept as it is; of learned scales ("+learned" in
    `scale_rule`) it is that of the scales they started from. `input_amax` is the largest calibrated input magnitude of
    its fused group, None where none was needed; `input_headroom` is how far the range of its input scale goes beyond
    that, as a factor. `scale_rule` says how its scales were chosen; in a plan it
    is "effort" where the effort of the run decides.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    scale_rule: str
    source_bytes: int
    bytes: int
    relative_error: float | None = None
    input_amax: float | None = None
    input_headroom: float | None = None


@dataclass(frozen=True)
class QuantizeRecord:
    """A finished quantize run. Sizes in bytes, times in seconds, digests SHA-256.

    `estimates` holds what was foreseen beside what was, {"estimated": ..., "actual": ...} each. `resumed`: units that
    an earlier run had done, and what differed from it; None for a run in one piece. `trials` are the ways that were
    tried on the samples `held_out`, in order, of which the last one kept is the result; none for a run that had one.
    `input_saturation` compares held-out inputs with the range of each static input scale of the result; empty without
    such scales, and without `held_out`. `norm_folds` says of each layer with routed experts whether the norm
    before them was folded, and how that was checked; empty where the result comes of a way that does not try it.
    `files` has the digest of each weight file, `other_files` those of all others but this record.
    """

    snugfit: str
    arguments: Mapping[str, Any]
    recipe: str
    recipe_digest: str
    source: str
    source_header_digest: str
    target: str
    dataset: Mapping[str, Any] | None
    held_out: Mapping[str, Any] | None
    trials: tuple[Trial, ...]
    input_saturation: tuple[InputSaturation, ...]
    tensors: tuple[TensorRecord, ...]
    source_bytes: int
    bytes: int
    files: Mapping[str, str]
    left_out: tuple[str, ...]
    seconds: Mapping[str, float]
    peak_rss_bytes: int
    peak_gpu_bytes: int | None
    hardware: Mapping[str, Any]
    versions: Mapping[str, str]
    estimates: Mapping[str, Any]
    resumed: Mapping[str, Any] | None = None
    norm_folds: tuple[NormFold, ...] = ()
    other_files: Mapping[str, str] = field(default_factory=dict)
    schema: str = QUANTIZE_SCHEMA

    def to_json(self) -> str:
        """The record as it is stored, one JSON document."""
        return as_json(without_nan(asdict(self)))


@dataclass(frozen=True)
class FormatTotal:
    """All tensors of one format together; `relative_error` is the mean over its weights, None where there is none."""

    format: str
    tensors: int
    weights: int
    source_bytes: int
    bytes: int
    relative_error: float | None

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk a weight, scales included."""
        return 8 * self.bytes / self.weights


def totals_by_format(tensors: tuple[TensorRecord, ...]) -> list[FormatTotal]:
    """Totals in order of first appearance; errors are means weighted by the number of weights."""
    groups: dict[str, list[TensorRecord]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.format, []).append(tensor)
    return [_total(name, members) for name, members in groups.items()]


def _total(name: str, members: list[TensorRecord]) -> FormatTotal:
    weights = [math.prod(member.shape) for member in members]
    errors = [member.relative_error for member in members]
    mean = None
    if all(error is not None for error in errors):
        mean = sum(n * (error or 0.0) for n, error in zip(weights, errors, strict=True)) / max(1, sum(weights))
    return FormatTotal(
        name,
        len(members),
        sum(weights),
        sum(m.source_bytes for m in members),
        sum(m.bytes for m in members),
        mean,
    )
