"""What `eval` and `tasks` measure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from snugfit.records.base import _plain, as_json

EVAL_SCHEMA = "snugfit.eval/1"


TASKS_SCHEMA = "snugfit.tasks/1"


@dataclass(frozen=True)
class TextRecord:
    """A file that was evaluated on: its name, SHA-256 of its bytes, what it is ("text" or "rows")."""

    name: str
    sha256: str
    kind: str


@dataclass(frozen=True)
class Spread:
    """What a quantity did over all scored tokens: nats a token, quantiles over tokens, one standard error of the mean.

    `by_chunk` are the chunks' sums, in the order of the context's `chunk_tokens`; the error is over chunks.
    """

    mean: float
    standard_error: float | None
    median: float
    p90: float
    p95: float
    p99: float
    p999: float
    max: float
    by_chunk: tuple[float, ...]


@dataclass(frozen=True)
class Bin:
    """Figures of the tokens with low <= position (or largest probability, the reference's if there is one) < high.

    A probability of 1 belongs to the last bin.
    """

    low: float
    high: float
    tokens: int
    perplexity: float
    perplexity_error: float | None
    kl: float | None = None
    kl_error: float | None = None
    same_top: float | None = None


@dataclass(frozen=True)
class Floor:
    """KL of a model against itself under another equally valid arithmetic, on `chunks` of the chunks, evenly spread."""

    kl: float
    standard_error: float | None
    same_top: float
    chunks: int
    tokens: int
    arithmetic: str


@dataclass(frozen=True)
class ModelFigures:
    """One model at one context length. Errors are one standard error over chunks, None where there is one chunk.

    `kl` is KL(reference || model), `reverse_kl` KL(model || reference), nats. `kl_kind` says what they are: "exact",
    "estimate" (from a stored reference: unbiased, `kl_sampling_error` is one standard error of its mean's sampling) or
    "lower bound" (from a server's top tokens). `same_top` is the share of tokens whose most likely token is the
    reference's; `rms_change` the root mean square change of the true token's probability. `nonfinite` tokens had NaN or
    infinite logits and are left out of every figure of this model. An estimate's quantiles are of its lower bound.
    `loss_change` is this model's loss minus the reference's, nats a token, its error of the paired differences; None
    for the reference, and where either has tokens left out.
    """

    name: str
    perplexity: float
    perplexity_error: float | None
    nll_by_chunk: tuple[float, ...]
    tokens_by_chunk: tuple[int, ...]
    nonfinite: int
    by_position: tuple[Bin, ...]
    by_confidence: tuple[Bin, ...] = ()
    kl: Spread | None = None
    kl_kind: str = "exact"
    kl_sampling_error: float | None = None
    reverse_kl: Spread | None = None
    same_top: float | None = None
    same_top_error: float | None = None
    rms_change: float | None = None
    floor: Floor | None = None
    loss_change: float | None = None
    loss_change_error: float | None = None


@dataclass(frozen=True)
class PairFigures:
    """Model `a` minus model `b` on the same chunks: loss or KL, nats a token, by a paired bootstrap over chunks.

    `more_tokens`: how many more would make p < 0.05 four times in five, were the difference what it seems; 0 where it
    is settled, None where no number can be given. `p_holm` is p as Holm adjusts it to all pairs of the record.
    """

    a: str
    b: str
    figure: str
    difference: float
    low: float | None
    high: float | None
    p: float | None
    chunks: int
    more_tokens: int | None
    p_holm: float | None = None


@dataclass(frozen=True)
class ContextFigures:
    """All models at one context length (0: chat rows, each as long as it is). The first is the reference, if any.

    `chunk_tokens` are the tokens scored in each chunk; `digest` is that of the token rows and their scored places.
    """

    context: int
    chunks: int
    tokens: int
    digest: str
    chunk_tokens: tuple[int, ...]
    models: tuple[ModelFigures, ...]
    pairs: tuple[PairFigures, ...]


@dataclass(frozen=True)
class EvalRecord:
    """A finished evaluation. Sizes in bytes, times in seconds, digests SHA-256."""

    snugfit: str
    arguments: Mapping[str, Any]
    metrics_version: int
    reference: Mapping[str, Any] | None
    candidates: tuple[Mapping[str, Any], ...]
    texts: tuple[TextRecord, ...]
    contexts: tuple[ContextFigures, ...]
    chat: Mapping[str, Any] | None
    seconds: Mapping[str, float]
    peak_rss_bytes: int
    peak_gpu_bytes: int | None
    hardware: Mapping[str, Any]
    versions: Mapping[str, str]
    schema: str = EVAL_SCHEMA

    def to_json(self) -> str:
        """The record as it is stored, one JSON document; NaN and infinities become null."""
        return as_json(_plain(asdict(self)), allow_nan=False)


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task on one model, with every item's score.

    `kind` is "accuracy" (items are 0 or 1) or "mean"; `items` maps an item's key (document id and a digest of its
    text) to its score. `value` is what lm_eval reports, `standard_error` too.
    """

    task: str
    metric: str
    kind: str
    higher_is_better: bool
    value: float
    standard_error: float | None
    items: Mapping[str, float]


@dataclass(frozen=True)
class TasksRecord:
    """Tasks run on one model by lm_eval."""

    snugfit: str
    model: str
    arguments: Mapping[str, Any]
    tasks: tuple[TaskResult, ...]
    seconds: Mapping[str, float]
    versions: Mapping[str, str]
    schema: str = TASKS_SCHEMA

    def to_json(self) -> str:
        """The record as it is stored, one JSON document; NaN and infinities become null."""
        return as_json(_plain(asdict(self)), allow_nan=False)
