"""Result files as frozen dataclasses. Each names its schema, and what made it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

QUANTIZE_SCHEMA = "snugfit.quantization.quantize/1"
EVAL_SCHEMA = "snugfit.eval/1"
TASKS_SCHEMA = "snugfit.tasks/1"
FIT_SCHEMA = "snugfit.planning.fit/1"


def as_json(document: Any, *, allow_nan: bool = True) -> str:
    """A JSON document as it is stored; half a surrogate pair, as in names that are no UTF-8, stands there escaped."""
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=allow_nan) + "\n"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


@dataclass(frozen=True)
class TensorRecord:
    """One source tensor: where it went, what that cost.

    `relative_error` is sum((w_hat - w)^2) / sum(w^2), None for a tensor kept as it is; `input_amax` the largest
    calibrated input magnitude of its fused group, None where none was needed.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    scale_rule: str
    source_bytes: int
    bytes: int
    relative_error: float | None = None
    input_amax: float | None = None


@dataclass(frozen=True)
class QuantizeRecord:
    """A finished quantize run. Sizes in bytes, times in seconds, digests SHA-256.

    `estimates` holds what was foreseen beside what was, {"estimated": ..., "actual": ...} each. `resumed`: units that
    an earlier run had done, and what differed from it; None for a run in one piece.
    """

    snugfit: str
    arguments: Mapping[str, Any]
    recipe: str
    recipe_digest: str
    source: str
    source_header_digest: str
    target: str
    dataset: Mapping[str, Any] | None
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
    schema: str = QUANTIZE_SCHEMA

    def to_json(self) -> str:
        """The record as it is stored, one JSON document."""
        return as_json(asdict(self))


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


def _plain(value: Any) -> Any:
    """`value` with None for numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
