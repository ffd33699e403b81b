"""What `bench` measured of running servers, or read from another tool's result. Times in seconds, sizes in bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from snugfit.records.base import Number, as_json, without_nan

BENCH_SCHEMA = "snugfit.bench/1"

# prefill: prompts one after another, one token asked; decode: one user, a prompt of some depth, then tokens; load:
# several users at once
CellKind = Literal["prefill", "decode", "load"]
# partial: the run ended within the cell; refused: the server answered from its prefix cache; failed: no request worked
CellStatus = Literal["measured", "partial", "refused", "failed"]


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """A quantity over `count` requests, tokens or repeats. Quantiles of few values are interpolated.

    `values` are all of them in the order of measurement, empty where there are more than 512 or another tool kept none.
    """

    count: int
    median: Number
    mean: Number | None = None
    p25: Number | None = None
    p75: Number | None = None
    p90: Number | None = None
    p95: Number | None = None
    p99: Number | None = None
    min: Number | None = None
    max: Number | None = None
    values: tuple[Number, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BenchCell:
    """One setting: `concurrency` users, each with prompts of `prompt_tokens` that ask for `output_tokens`.

    `requests` were answered, `errors` were not (`error_messages` counts each kind); warm-up requests are in neither.
    `prompt_tokens_counted` is the median that the server counted. `prefix_hits` are prompt tokens that the server took
    from its prefix cache, None where it does not report them. The figures are of answered requests, None where the cell
    has none:

    - `prefill`: prompt tokens / seconds to the first token, of each request (kind "prefill" and "decode");
    - `first_token`: seconds from the request to its first token; `latency`: to its last;
    - `decode`: tokens a second of one user, (tokens - 1) / (last token - first token), of each request;
    - `between_tokens`: seconds a token after the first, the reciprocal of `decode`, of each request;
    - `throughput`: output tokens a second of all users, `total_throughput` with the prompts' tokens, of each repeat.
    """

    kind: CellKind
    prompt_tokens: int
    output_tokens: int
    concurrency: int
    status: CellStatus
    reason: str | None = None
    requests: int
    errors: int
    error_messages: Mapping[str, int]
    repeats: int
    seconds: Number
    prompt_tokens_counted: Number | None = None
    prefix_hits: int | None = None
    prefill: Distribution | None = None
    first_token: Distribution | None = None
    decode: Distribution | None = None
    between_tokens: Distribution | None = None
    latency: Distribution | None = None
    throughput: Distribution | None = None
    total_throughput: Distribution | None = None

    @property
    def label(self) -> str:
        """The setting in llama-benchy's notation: pp4096, tg128 @ d4096, tg128 @ d1024 c8."""
        return _label(self)


@dataclass(frozen=True, kw_only=True)
class BenchMemory:
    """What the server holds. None: not reported.

    `gpu` and its bytes come from NVML, of the whole card and so of every process on it; `kv_cache_tokens` from the
    server's metrics or its log, which `kv_cache_source` names.
    """

    gpu: str | None = None
    gpu_total_bytes: int | None = None
    gpu_used_bytes: int | None = None
    kv_cache_tokens: int | None = None
    kv_cache_source: Literal["metrics", "log"] | None = None


@dataclass(frozen=True, kw_only=True)
class BenchServer:
    """A server as it describes itself; None for what it does not report. `name` is the one in tables."""

    name: str
    url: str | None
    engine: str | None
    version: str | None
    model: str
    root: str | None
    max_model_len: int | None
    memory: BenchMemory


@dataclass(frozen=True, kw_only=True)
class BenchRun:
    """All cells of one server. `prefix_cache` says how it is known that prompts were computed and not looked up.

    "counted": the server's own counters of hits did not move; "unique": no prompt shares its beginning with another,
    but the server reports no hits; "unknown": the result of another tool, which does not say.
    """

    server: BenchServer
    cells: tuple[BenchCell, ...]
    prefix_cache: Literal["counted", "unique", "unknown"]


@dataclass(frozen=True, kw_only=True)
class BenchRatio:
    """The second server's figure over the first's in one cell, from repeats measured in turn.

    `ratio` is the geometric mean over `pairs` of repeats; [low, high] its 95 % interval by Student's t on logarithms,
    None with fewer than two pairs. A ratio of a rate above 1 means that the second server is faster, of a time slower.
    """

    kind: CellKind
    prompt_tokens: int
    output_tokens: int
    concurrency: int
    figure: Literal["prefill", "first_token", "decode", "latency", "throughput"]
    ratio: Number
    low: Number | None
    high: Number | None
    pairs: int

    @property
    def label(self) -> str:
        """The setting, as `BenchCell.label`."""
        return _label(self)


def _label(one: BenchCell | BenchRatio) -> str:
    if one.kind == "prefill":
        return f"pp{one.prompt_tokens}"
    users = f" c{one.concurrency}" if one.kind == "load" else ""
    return f"tg{one.output_tokens} @ d{one.prompt_tokens}{users}"


@dataclass(frozen=True, kw_only=True)
class BenchRecord:
    """A benchmark of one server, or of two in turn (`ratios` compare the second with the first).

    `tool` names what measured: "snugfit", or the tool whose result was read. `complete` is False where the run was
    stopped; `stopped` says by what. Cells that were not begun are absent.
    """

    snugfit: str
    tool: str
    tool_version: str | None
    arguments: Mapping[str, Any]
    runs: tuple[BenchRun, ...]
    ratios: tuple[BenchRatio, ...]
    complete: bool
    stopped: str | None
    seconds: Mapping[str, float]
    hardware: Mapping[str, Any]
    versions: Mapping[str, str]
    notes: tuple[str, ...] = ()
    schema: str = BENCH_SCHEMA

    def to_json(self) -> str:
        """The record as it is stored, one JSON document; NaN and infinities become null."""
        return as_json(without_nan(asdict(self)), allow_nan=False)
