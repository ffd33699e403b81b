"""Statistics of calibration as a file: what was measured on which model and samples, for later runs to reuse.

Files of the same model and settings can be merged, as if one run had measured all samples. Imports no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from snugfit.errors import UserError
from snugfit.records.base import as_json
from snugfit.records.json_file import FileKind, load_file, save_file, validated
from snugfit.records.statistics import (
    COUNT_LIMIT,
    LayerStatistics,
    check_layer,
    has_squares,
    layer_to_json,
    merge_layers,
)

# the second has E[x^2] of inputs too, or has no ranges; the first stays for files without, which older versions read
STATISTICS_SCHEMA, SQUARES_SCHEMA = "snugfit.statistics/1", "snugfit.statistics/2"
STATISTICS_FILE = "snugfit-statistics.json"
# E[x^2] of 384 experts in 60 layers of hidden size 7,168 takes 1.1 GB
MAX_BYTES, MAX_LAYERS = 4_000_000_000, 10_000
_KIND = FileKind(
    content="statistics",
    file_name=STATISTICS_FILE,
    schemas=(STATISTICS_SCHEMA, SQUARES_SCHEMA),
    max_bytes=MAX_BYTES,
    code="statistics-invalid",
    remedy="Give a file that `collect_statistics` or `quantize` wrote.",
)
MAX_FORCED_TOKENS, MIN_TOKENS_PER_EXPERT = 32_768, 32


@dataclass(frozen=True)
class ExpertCalibration:
    """Which tokens the experts of a mixture are calibrated on.

    With `all_experts` each expert runs, in a layer, at most `max_forced_tokens` in addition to the tokens that the
    router sends to it; without, the routed tokens alone. An expert that saw fewer than `min_tokens_per_expert` is an
    error.
    """

    all_experts: bool = True
    max_forced_tokens: int = MAX_FORCED_TOKENS
    min_tokens_per_expert: int = MIN_TOKENS_PER_EXPERT


@dataclass(frozen=True)
class DatasetUsed:
    """A dataset that was measured: its files' names, its number of samples and tokens, and the samples' digest."""

    source: str
    num_samples: int
    tokens: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What calibration measured of each decoder layer (by number), and on which model and samples.

    `header_digest` and `fingerprint` (of some of its weights) identify the model. `all_experts` and `max_forced_tokens`
    are those of ExpertCalibration. `recipe` names the recipe whose quantized weights the model had, None for its own
    weights; `recipe_digest` is the recipe's digest. `ranges`: magnitudes and histograms were measured; an importance
    matrix has E[x^2] alone.
    """

    snugfit: str
    model: str
    header_digest: str
    fingerprint: str
    datasets: tuple[DatasetUsed, ...]
    all_experts: bool
    max_forced_tokens: int
    recipe: str | None
    recipe_digest: str | None
    layers: Mapping[int, LayerStatistics]
    ranges: bool = True

    @property
    def has_squares(self) -> bool:
        """Whether E[x^2] of any inputs is in it."""
        return any(map(has_squares, self.layers.values()))

    @property
    def schema(self) -> str:
        """The schema of its file."""
        return SQUARES_SCHEMA if self.has_squares or not self.ranges else STATISTICS_SCHEMA

    def to_json(self) -> str:
        """The file's text."""
        left_out = ("layers", "datasets", *(["ranges"] if self.ranges else []))
        plain = {key: value for key, value in vars(self).items() if key not in left_out}
        datasets = [vars(one) for one in self.datasets]
        layers = {str(number): layer_to_json(layer) for number, layer in self.layers.items()}
        return as_json({"schema": self.schema, **plain, "datasets": datasets, "layers": layers})

    @property
    def tokens(self) -> int:
        """Number of tokens of all samples."""
        return sum(one.tokens for one in self.datasets)

    @property
    def num_samples(self) -> int:
        """Number of samples of all datasets."""
        return sum(one.num_samples for one in self.datasets)


def text_digest(text: str) -> str:
    """SHA-256 of a text, hexadecimal."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def load_statistics(path: Path) -> Statistics:
    """Statistics from a file, or from a directory that holds one; UserError for a file that is anything else."""
    return load_file(path, _KIND, _parse)


def save_statistics(found: Statistics, file: Path) -> None:
    """Write a new file, whole or not at all; UserError where it exists or cannot be written."""
    save_file(found.to_json(), file)


def _parse(document: Mapping[str, Any]) -> Statistics:
    """ValueError, with the key, for a document of another structure or with values out of range."""
    found = validated(Statistics, document)
    counts = [n for one in found.datasets for n in (one.num_samples, one.tokens)]
    if not counts or not all(0 <= n < COUNT_LIMIT for n in counts):
        raise ValueError(f"datasets: needs at least one, with counts >= 0 and < {COUNT_LIMIT}")
    if not all(0 <= number < MAX_LAYERS for number in found.layers):
        raise ValueError(f"layers: numbers must be within 0..{MAX_LAYERS - 1}")
    for number, layer in found.layers.items():
        try:
            check_layer(layer)
        except ValueError as error:
            raise ValueError(f"layers.{number}: {error}") from None
    return found


def merge_statistics(parts: Sequence[tuple[str, Statistics]]) -> Statistics:
    """All parts (each with a name for messages) as one.

    UserError for parts of different models, settings or layers, and for samples that two parts have in common.
    """
    name, first = parts[0]
    owners: dict[str, str] = {}  # digest -> the part that has these samples
    for other, part in parts:
        _check_settings(other, part, name, first)
        for one in part.datasets:
            if one.digest in owners:
                what = f"has the same samples as {owners[one.digest]} ({one.source})."
                raise _mismatch(what, other, "Merge statistics of different samples.")
            owners[one.digest] = other
        if part.layers.keys() != first.layers.keys():
            raise _mismatch(f"has other layers than {name}.", other, "Merge statistics of one model.")
    layers: dict[int, LayerStatistics] = {}
    for number in first.layers:
        try:
            layers[number] = merge_layers([part.layers[number] for _, part in parts])
        except ValueError as error:
            remedy = "Merge statistics that were made with the same recipe."
            raise _mismatch(f"layer {number}: {error}.", parts[-1][0], remedy) from None
    return replace(first, datasets=tuple(one for _, part in parts for one in part.datasets), layers=layers)


def _check_settings(name: str, part: Statistics, first_name: str, first: Statistics) -> None:
    for key in ("header_digest", "fingerprint", "all_experts", "max_forced_tokens", "recipe_digest", "ranges"):
        mine, other = getattr(part, key), getattr(first, key)
        if mine != other:
            what = f"{key} is {mine!r}, in {first_name} it is {other!r}."
            raise _mismatch(what, name, "Merge statistics of one model and one kind of run.")


def _mismatch(what: str, where: str, remedy: str) -> UserError:
    return UserError(what, code="statistics-mismatch", where=where, remedy=remedy)
