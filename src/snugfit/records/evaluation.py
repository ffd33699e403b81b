"""What `evaluate` and `run_tasks` measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from snugfit.records.base import Number, as_json, without_nan

EVAL_SCHEMA = "snugfit.eval/1"
TASKS_SCHEMA = "snugfit.tasks/1"
MIN_CHUNKS_FOR_P = 5  # with fewer, the paired bootstrap gives no p: four chunks have 35 different resamples

# how a KL was computed: from full predictions, from a stored reference, from a server's most likely tokens
KLKind = Literal["exact", "estimate", "lower bound"]


@dataclass(frozen=True)
class TextRecord:
    """A file that was evaluated on: its name, SHA-256 of its bytes, what it is ("text", "rows" or "set")."""

    name: str
    sha256: str
    kind: str


@dataclass(frozen=True, kw_only=True)
class EvaluatedCheckpoint:
    """A checkpoint that was run: name in tables, SHA-256 of its headers, bytes of its tensors, dtype of its arithmetic.

    `formats` counts the quantized modules of each format; `kv_cache` is the format of keys and values, None for the
    model's own. `stored_bytes` is the size of the file of its predictions, where these were read instead.
    """

    name: str
    header_digest: str
    bytes: int
    arithmetic: str
    formats: Mapping[str, int]
    kv_cache: str | None
    stored_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class KernelReport:
    """Which kernels an engine chose, in the words of its log and in order; None or empty where the log does not say.

    `linear` has entries such as "MarlinNvFp4LinearKernel for NVFP4 GEMM". `kv_cache_dtype` may be "auto", which is
    the model's own type or what the checkpoint asks for.
    """

    engine_version: str | None = None
    quantization: str | None = None
    kv_cache_dtype: str | None = None
    attention: tuple[str, ...] = ()
    linear: tuple[str, ...] = ()
    moe: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self != KernelReport()


@dataclass(frozen=True, kw_only=True)
class EvaluatedServer:
    """A server that was asked: name in tables, what it reports of itself (None: it does not), its kernels.

    `top_logprobs` is how many tokens it gave at each position, "all" for the full vocabulary.
    """

    name: str
    url: str
    engine: str | None
    version: str | None
    model: str
    root: str | None
    max_model_len: int | None
    top_logprobs: int | Literal["all"]
    kernels: KernelReport


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A quantity over all scored tokens: nats a token, quantiles over tokens, one standard error of the mean.

    `by_chunk` are the chunks' sums, in the order of the context's `chunk_tokens`; the error is over chunks.
    """

    mean: Number
    standard_error: Number | None
    median: Number
    p90: Number
    p95: Number
    p99: Number
    p999: Number
    max: Number
    by_chunk: tuple[Number, ...]


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Figures of the tokens with low <= position (or largest probability, the reference's if there is one) < high.

    A probability of 1 belongs to the last bin.
    """

    low: float
    high: float
    tokens: int
    perplexity: Number
    perplexity_error: Number | None
    kl: Number | None = None
    kl_error: Number | None = None
    same_top: Number | None = None


@dataclass(frozen=True, kw_only=True)
class Floor:
    """KL of a model against itself under another equally valid arithmetic, on `chunks` of the chunks, evenly spread."""

    kl: Number
    standard_error: Number | None
    same_top: Number
    chunks: int
    tokens: int
    arithmetic: str


@dataclass(frozen=True, kw_only=True)
class ModelFigures:
    """One model at one context length. Errors are one standard error over chunks, None where there is one chunk.

    `kl` is KL(reference || model), `reverse_kl` KL(model || reference), nats. `kl_kind` says what they are: "exact",
    "estimate" (from a stored reference: unbiased, `kl_sampling_error` is one standard error of its mean's sampling) or
    "lower bound" (from a server's top tokens). `same_top` is the share of tokens whose most likely token is the
    reference's; `rms_change` the root mean square change of the true token's probability. `nonfinite` tokens had NaN or
    infinite logits and are left out of every figure of this model. An estimate's quantiles are of its lower bound.
    `acceptance` is the expected acceptance rate of this model's drafts by the reference (speculative decoding): the
    overlap sum min(p, q) of the two predictions, from 0 to 1, averaged over tokens (1 - total variation; Leviathan et
    al. 2023, arXiv 2211.17192, corollary 3.6). Where `kl_kind` is "lower bound" it is an upper bound.
    `loss_change` is this model's loss minus the reference's, nats a token, its error of the paired differences; None
    for the reference, and where either has tokens left out.
    """

    name: str
    perplexity: Number
    perplexity_error: Number | None
    nll_by_chunk: tuple[Number, ...]
    tokens_by_chunk: tuple[int, ...]
    nonfinite: int
    by_position: tuple[Bin, ...]
    by_confidence: tuple[Bin, ...] = ()
    kl: Spread | None = None
    kl_kind: KLKind = "exact"
    kl_sampling_error: Number | None = None
    reverse_kl: Spread | None = None
    same_top: Number | None = None
    same_top_error: Number | None = None
    rms_change: Number | None = None
    floor: Floor | None = None
    loss_change: Number | None = None
    loss_change_error: Number | None = None
    acceptance: Number | None = None
    acceptance_error: Number | None = None


@dataclass(frozen=True, kw_only=True)
class PairFigures:
    """Model `a` minus model `b` on the same chunks: loss or KL, nats a token, by a paired bootstrap over chunks.

    `more_tokens`: how many more would make p < 0.05 four times in five, were the difference what it seems; 0 where it
    is settled, None where no number can be given. `p_holm` is p as Holm adjusts it to all pairs of the record.
    """

    a: str
    b: str
    figure: Literal["loss", "kl"]
    difference: Number
    low: Number | None
    high: Number | None
    p: float | None
    chunks: int
    more_tokens: int | None
    p_holm: float | None = None


@dataclass(frozen=True, kw_only=True)
class ContextFigures:
    """All models at one context length (0: chat rows, each as long as it is). The first is the reference, if any.

    `chunk_tokens` are the tokens scored in each chunk; `digest` is that of the token rows and their scored positions.
    """

    context: int
    chunks: int
    tokens: int
    digest: str
    chunk_tokens: tuple[int, ...]
    models: tuple[ModelFigures, ...]
    pairs: tuple[PairFigures, ...]


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """A position in a conversation where `model` diverges from the reference, and how both continue from there.

    `source` is the conversation's file and line, `position` that of the token `text`, `before` the text ahead of it;
    `same_tokens` is how many tokens the two continuations share from their beginning.
    """

    model: str
    source: str
    position: int
    kl: float
    before: str
    text: str
    reference_continuation: str
    model_continuation: str
    same_tokens: int


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A model's greedy answer to a question. `tokens` it has; `finished`: the model ended it, not the limit.

    `repeated` is the share of its 4-token sequences that occurred in it before. `loops`: it ends in a piece of text
    that stands there three times or more in a row. `same_tokens`: how many tokens it shares with the reference's answer
    from the beginning; None for the reference, and without one.
    """

    model: str
    question: str
    text: str
    tokens: int
    finished: bool
    repeated: Number
    loops: bool
    same_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class AnswerFigures:
    """One model's greedy answers to all questions: means, with one standard error over questions.

    `length_change` is its tokens over the reference's minus 1, of the sums; `repeated_change` its repeated share minus
    the reference's, paired over questions. None for the reference, and errors of fewer than two questions.
    """

    model: str
    questions: int
    limit: int
    tokens: Number
    tokens_error: Number | None
    repeated: Number
    repeated_error: Number | None
    loops: int
    unfinished: int
    length_change: Number | None = None
    length_change_error: Number | None = None
    repeated_change: Number | None = None
    repeated_change_error: Number | None = None
    same_tokens: Number | None = None


@dataclass(frozen=True, kw_only=True)
class EvalRecord:
    """A finished evaluation. Sizes in bytes, times in seconds, digests SHA-256.

    `continuations` are of the conversations, each model's largest divergences first. `answers` are greedy answers to
    questions, the reference's first, where they were asked for; `answer_figures` has a line for each model.
    """

    snugfit: str
    arguments: Mapping[str, Any]
    metrics_version: int
    reference: EvaluatedCheckpoint | None
    candidates: tuple[EvaluatedCheckpoint | EvaluatedServer, ...]
    texts: tuple[TextRecord, ...]
    contexts: tuple[ContextFigures, ...]
    continuations: tuple[Continuation, ...]
    seconds: Mapping[str, float]
    peak_rss_bytes: int
    peak_gpu_bytes: int | None
    hardware: Mapping[str, Any]
    versions: Mapping[str, str]
    answers: tuple[Answer, ...] = ()
    answer_figures: tuple[AnswerFigures, ...] = ()
    schema: str = EVAL_SCHEMA

    def to_json(self) -> str:
        """The record as it is stored, one JSON document; NaN and infinities become null."""
        return as_json(without_nan(asdict(self)), allow_nan=False)


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One metric of one task on one model, with every item's score.

    `kind` is "accuracy" (items are 0 or 1) or "mean"; `items` maps an item's key (document id and a digest of its
    text) to its score. `value` is what lm_eval reports, `standard_error` too.
    """

    task: str
    metric: str
    kind: Literal["accuracy", "mean"]
    higher_is_better: bool
    value: Number
    standard_error: Number | None
    items: Mapping[str, Number]


@dataclass(frozen=True, kw_only=True)
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
        return as_json(without_nan(asdict(self)), allow_nan=False)
