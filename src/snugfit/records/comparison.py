"""What `compare` found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from snugfit.records.base import as_json

COMPARE_SCHEMA = "snugfit.compare/1"


@dataclass(frozen=True, kw_only=True)
class TaskRow:
    """One metric of one task: both reported values, and the paired difference (`a` minus `b`, mean over the items).

    `only_a` and `only_b` count the items that only one model has right, None where scores are not 0 or 1; then `p` is
    the paired bootstrap's, otherwise McNemar's. `low` and `high` are the bootstrap's 95 % interval. `z` is the unpaired
    score, for reference.
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


@dataclass(frozen=True, kw_only=True)
class LossRow:
    """Loss or KL at one context length (0: chat rows), nats a token; `a` minus `b`, paired over chunks.

    Rows of losses have the perplexities and their ratio, a over b. `more_tokens` is from `tokens_to_settle`.
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
    """A task or context that only `side`, "A" or "B", has."""

    family: str
    name: str
    metric: str
    side: str


@dataclass(frozen=True)
class Side:
    """One of the two results: its file or directory, and the models in it whose tasks and losses were compared."""

    path: str
    tasks_model: str | None
    eval_model: str | None


@dataclass(frozen=True, kw_only=True)
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
