"""What `serve` saw of an engine that it started. Sizes in bytes, times in seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from snugfit.records.base import Number, as_json, without_nan
from snugfit.records.evaluation import KernelReport

SERVE_SCHEMA = "snugfit.serve/1"


@dataclass(frozen=True, kw_only=True)
class ServePrediction:
    """What `fit` expects of the served file on this GPU: weights and KV cache of one GPU, and the longest context.

    `cache_tokens` is None for caches that do not grow by the token (windows, states). `kernels` are those of the GPU's
    generation, such as "nvfp4: Marlin (W4A16)".
    """

    gpu: str
    engine: str
    kv_cache: str
    weight_bytes: int
    cache_bytes: int
    cache_tokens: int | None
    max_context: int
    kernels: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ServeTaken:
    """What the engine took, from its log and from NVML; None where neither says it."""

    weight_bytes: int | None = None
    cache_bytes: int | None = None
    cache_tokens: int | None = None
    graph_bytes: int | None = None
    gpu_used_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class ServeAnswer:
    """An answer to a greedy question: its text, its tokens, and whether it looks sound.

    `verdict`: "answers"; "empty"; "loops" (ends in a repeated piece of text); "broken" (characters that no text has).
    """

    question: str
    text: str
    tokens: int
    finished: bool
    verdict: Literal["answers", "empty", "loops", "broken"]


@dataclass(frozen=True, kw_only=True)
class EngineRefusal:
    """Why the engine did not start: the log's own line, what it means, and what to do. `known` by a pattern or not."""

    line: str
    reason: str
    remedy: str
    known: bool


@dataclass(frozen=True, kw_only=True)
class ServeRecord:
    """One start of an engine on one checkpoint. `started` is False where it refused; `refusal` then says why.

    `stopped` says what ended the run before all was done: an interrupt, or an error of a measurement.

    `results` names the files that bench, eval and tasks wrote, by verb; `log` is the file of the engine's output.
    """

    snugfit: str
    model: str
    engine: str
    engine_version: str | None
    arguments: Mapping[str, Any]
    command: tuple[str, ...]
    gpu: str | None
    formats: tuple[str, ...]
    started: bool
    refusal: EngineRefusal | None
    stopped: str | None
    predicted: ServePrediction | None
    taken: ServeTaken
    kernels: KernelReport
    answers: tuple[ServeAnswer, ...]
    results: Mapping[str, str]
    seconds: Mapping[str, Number]
    log: str
    notes: tuple[str, ...] = ()
    schema: str = SERVE_SCHEMA

    def to_json(self) -> str:
        """The record as it is stored, one JSON document; NaN and infinities become null."""
        return as_json(without_nan(asdict(self)), allow_nan=False)
