"""What a dataset gave: its sources and what was skipped, lengths, positions and languages of its samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from snugfit.records.base import Number, as_json, without_nan

DATASET_SCHEMA = "snugfit.dataset/1"
COMPARISON_SCHEMA = "snugfit.dataset-comparison/1"
RAISED = 1.25  # times a largest magnitude: more is counted


@dataclass(frozen=True, kw_only=True)
class SourceUse:
    """What one source of a dataset gave.

    `revision` is the commit of a set on the Hub. `asked` is the number of samples that were wanted, None for all;
    `drawn` is what there was before limits on the whole set left `samples` of it, None for plain files.
    `skipped` counts rows that gave no sample, by reason.
    """

    dataset: str
    subset: str | None = None
    split: str | None = None
    revision: str | None = None
    formatter: str | None = None
    category: str = ""
    language: str = ""
    asked: int | None = None
    drawn: int | None = None
    samples: int
    tokens: int
    rows: int
    skipped: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Share:
    """Samples and tokens of a part of a dataset, and its part of all samples (0..1)."""

    name: str
    samples: int
    tokens: int
    share: float


@dataclass(frozen=True, kw_only=True)
class PositionRange:
    """Positions `first` .. `last` of a sample: how many samples reach the last of them, how many tokens are there."""

    first: int
    last: int
    samples: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class HeldOutPart:
    """The part of a dataset that is held out: some of every source. `kept_digest` is that of the other samples."""

    percent: float
    num_samples: int
    tokens: int
    digest: str
    kept_digest: str


@dataclass(frozen=True, kw_only=True)
class DatasetRecord:
    """What `describe_dataset` finds; every figure is of the samples that a run would use.

    `set_digest` is SHA-256 of the set's text, None for plain files. `digest` is SHA-256 of all token ids in order,
    `held_out` the same of the part that is held out. `scripts` are shares of letters (0..1) by the script they are of.
    `lengths` are the shortest, the quartiles and the longest sample in tokens.
    """

    snugfit: str
    model: str
    source: str
    set_digest: str | None
    digest: str
    num_samples: int
    tokens: int
    max_seq_length: int
    sources: tuple[SourceUse, ...]
    categories: tuple[Share, ...]
    languages: tuple[Share, ...]
    scripts: Mapping[str, float]
    lengths: tuple[int, int, int, int, int]
    positions: tuple[PositionRange, ...]
    repeated: int
    examples: tuple[str, ...]
    held_out: HeldOutPart | None = None
    schema: str = DATASET_SCHEMA

    def to_json(self) -> str:
        """The record's JSON text."""
        found: dict[str, Any] = {"schema": self.schema, **asdict(self)}
        return as_json(without_nan(found), allow_nan=False)


@dataclass(frozen=True, kw_only=True)
class ComparedDataset:
    """One of two datasets that are compared: its name, samples, tokens and digest."""

    source: str
    num_samples: int
    tokens: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class LinearComparison:
    """The inputs of linears that share theirs, and the error of their weights, under either dataset.

    All routed experts of a layer are one entry for each projection, `*` in place of their number, without channels.
    `raised_by_b` counts input channels whose largest magnitude under B is more than `RAISED` times that under A,
    `largest_raise_b` is the largest such factor; the same the other way round. `error_a_on_b` is the relative error of
    outputs, E|(W_A - W) x|^2 / E|W x|^2 over the inputs x of B, of weights W_A that were quantized by what A measured;
    the other three accordingly. None where a dataset sent nothing, or the format does not fit.
    """

    name: str
    channels: int
    raised_by_a: int
    raised_by_b: int
    largest_raise_a: float
    largest_raise_b: float
    error_a_on_a: Number | None
    error_b_on_a: Number | None
    error_a_on_b: Number | None
    error_b_on_b: Number | None


@dataclass(frozen=True, kw_only=True)
class ExpertsComparison:
    """Routed experts of a layer: how many tokens each dataset sent to each of them."""

    name: str
    routed_a: tuple[int, ...]
    routed_b: tuple[int, ...]

    def uncovered(self, least: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Experts that A, and that B, sent fewer than `least` tokens."""
        a, b = (
            tuple(number for number, count in enumerate(routed) if count < least)
            for routed in (self.routed_a, self.routed_b)
        )
        return a, b


@dataclass(frozen=True, kw_only=True)
class DatasetComparison:
    """What `compare_datasets` finds; `format` is the one that weights were quantized to for the errors."""

    snugfit: str
    model: str
    a: ComparedDataset
    b: ComparedDataset
    format: str
    shared_samples: int
    linears: tuple[LinearComparison, ...]
    experts: tuple[ExpertsComparison, ...]
    schema: str = COMPARISON_SCHEMA

    def to_json(self) -> str:
        """The record's JSON text."""
        return as_json(without_nan({"schema": self.schema, **asdict(self)}), allow_nan=False)
