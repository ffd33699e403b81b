"""A finished comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from snugfit.records.base import as_json

COMPARE_SCHEMA = "snugfit.compare/1"


@dataclass(frozen=True)
class TaskRow:
    """One metric of one task: what both report, and their paired difference (`a` minus `b`, mean over the items).

    `only_a` and `only_b` are the items that only one has right, None where scores are not 0 or 1. `p` is McNemar's for
    those, else the paired bootstrap's, as the 95 % interval always is. `z` is the unpaired score, for reference.
    """

    task: str
    metric: str
    kind: str
    higher_is_better: bool
    a: float | None
    b: float | None
    items: int
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    only_a: int | None = None
    only_b: int | None = None
    p: float | None = None
    p_holm: float | None = None
    z: float | None = None
    note: str = ""


@dataclass(frozen=True)
class LossRow:
    """Loss or KL at one context length (0: chat rows), nats a token; `a` minus `b`, paired over chunks.

    The perplexities and their ratio, a over b, belong to the loss; `more_tokens` is what `tokens_to_settle` says.
    """

    context: int
    figure: str
    a: float | None
    b: float | None
    chunks: int
    tokens: int
    perplexity_a: float | None = None
    perplexity_b: float | None = None
    perplexity_ratio: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    more_tokens: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Unpaired:
    """What only side "A" or "B" has."""

    family: str
    name: str
    metric: str
    side: str


@dataclass(frozen=True)
class Side:
    """One of the two: its file or directory, and the models in it whose tasks and losses were compared."""

    path: str
    tasks_model: str | None
    eval_model: str | None


@dataclass(frozen=True)
class CompareRecord:
    """A finished comparison. Tasks are one family of Holm's correction, losses and KL together another."""

    snugfit: str
    arguments: Mapping[str, Any]
    a: Side
    b: Side
    tasks: tuple[TaskRow, ...]
    losses: tuple[LossRow, ...]
    unpaired: tuple[Unpaired, ...]
    schema: str = COMPARE_SCHEMA

    def to_json(self) -> str:
        """The record as one JSON document."""
        return as_json(asdict(self), allow_nan=False)
