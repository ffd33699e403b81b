"""A plan: which format each group of weights gets under a budget, what that is expected to cost, and what it measured.

Also what a checkpoint's plan differs in from another. Sizes are in bytes, costs in nats of KL(original || quantized) a
token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field

from snugfit.records.base import Number, as_json, without_nan

PLAN_SCHEMA = "snugfit.plan/1"
PLAN_FILE, RECIPE_FILE = "plan.json", "recipe.yaml"
DIFFERENCES_SCHEMA = "snugfit.plan-differences/1"


@dataclass(frozen=True, kw_only=True)
class PlanBudget:
    """What the plan had to fit, as asked for: see `plan`. `gpu_title` and `engine_title` are those that were found."""

    gpu: str | None
    context: int | None
    tensor_parallel_size: int
    engine: str
    gpu_memory_utilization: float | None
    max_num_seqs: int
    bytes: int | None
    bits_per_weight: float | None
    disk: int | None
    max_kl: float | None
    gpu_title: str | None
    engine_title: str | None


@dataclass(frozen=True)
class PlanLimit:
    """A limit in bytes, what the plan takes of it, and the parameter that asked for it."""

    name: str
    bytes: int
    used: int


@dataclass(frozen=True)
class Expected:
    """A KL that scores expect, and its standard error; both NaN where a format was not scored."""

    kl: Number
    error: Number


@dataclass(frozen=True, kw_only=True)
class ProvenKl:
    """A KL that was measured on held-out text, and its standard error, over `tokens` tokens in so long contexts.

    `context` is None for all contexts together, `text` names the text, "" for all together. `expected` is what scores
    expect at this context, NaN where they do not say.
    """

    kl: Number
    error: Number
    tokens: int
    context: int | None
    text: str = ""
    expected: Number = math.nan


@dataclass(frozen=True, kw_only=True)
class PlannedGroup:
    """A group of weights and its format, `keep` for what the source has.

    `label` says what it is stored in, `arithmetic` in what the kernel computes ("" where the GPU is unknown). `cost` is
    by how much the plan's expected KL falls if this group alone is kept; `why` says in words what decided, `refused`
    which formats of the menu it cannot have.
    """

    name: str
    layer: int | None
    role: str
    elements: int
    format: str
    label: str
    arithmetic: str
    bytes: int
    cost: Number
    why: str
    refused: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class PlanPoint:
    """One way to store the model: `kind` is plan, alternative, built-in, uniform, byte-matched, or frontier.

    `recipe` is the file or the name of the recipe that writes it, None where none was written; `formats` are the bytes
    of groups by format. `fits` says whether it keeps all limits, `differs` in how many groups it differs from the plan
    (-1: nobody compared), `rules` is the number of its recipe's rules (0: nobody counted). `cache_kept_in` are the
    layers that keep 16 bits beside an FP8 cache, which an engine has to be told. `measured` is empty for what was not
    built.
    """

    name: str
    kind: str
    recipe: str | None
    kv_cache: str
    formats: Mapping[str, int]
    bytes: int
    bytes_per_gpu: int
    bits_per_weight: float
    max_context: int | None
    fits: bool
    expected: Expected
    measured: tuple[ProvenKl, ...] = ()
    differs: int = -1
    rules: int = 0
    cache_kept_in: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PlanVerdict:
    """Whether the plan may be called one: `accepted` if it beats `control` beyond the error on held-out text.

    `accepted` is None where nothing was measured. `gain` is by how much its KL is lower, segment by segment, with its
    error; both None where nothing was measured or no control fits. `statement` says it in words.
    """

    accepted: bool | None
    control: str | None
    gain: float | None
    gain_error: float | None
    statement: str


@dataclass(frozen=True, kw_only=True)
class PlanRecord:
    """The result of `plan`. `groups` are those of the plan that scores expect to lose least, `recipe` is its YAML.

    `scores` names the file of scores and `scored_on` its samples; `context` is the length for which KL is expected.
    `points` are the plan, its alternatives, the controls and the built-in recipes. `written` is the name of the point
    whose recipe was written: the plan's, or the control's if the plan was refused. `seconds` are what parts of the run
    took, `foreseen` what was expected of them before, empty where nothing was timed: both are of clocks, and differ
    between runs of the same plan. `processes` shared the work.
    """

    snugfit: str
    model: str
    budget: PlanBudget
    menu: tuple[str, ...]
    constraints: str | None
    max_formats: int | None
    context: int
    target: str
    effort: str
    scored_on: tuple[str, ...]
    scored_tokens: int
    kv_cache: str
    kv_caches: Mapping[str, str]
    limits: tuple[PlanLimit, ...]
    outside_bytes: int
    groups: tuple[PlannedGroup, ...]
    points: tuple[PlanPoint, ...]
    verdict: PlanVerdict
    written: str
    recipe: str
    notes: tuple[str, ...]
    seconds: Mapping[str, float]
    foreseen: Mapping[str, float] = field(default_factory=dict)
    processes: int = 1
    schema: str = PLAN_SCHEMA

    @property
    def plan(self) -> PlanPoint:
        """The point of the plan itself."""
        return next(point for point in self.points if point.kind == "plan")

    def to_json(self) -> str:
        """The record as one JSON document; NaN is null."""
        found = without_nan(asdict(self))
        return as_json({"schema": found.pop("schema"), **found}, allow_nan=False)


@dataclass(frozen=True, kw_only=True)
class PlanDifference:
    """Weights at one place in the layers that have format `a` in one plan and `b` in the other."""

    place: str
    layers: str
    a: str
    b: str
    weights: int


@dataclass(frozen=True, kw_only=True)
class PlanDifferences:
    """Where two plans differ: of `weights` linears that both have `different` have another format."""

    a: str
    b: str
    weights: int
    different: int
    rows: tuple[PlanDifference, ...]
    kv_cache: tuple[str, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    schema: str = DIFFERENCES_SCHEMA

    def to_json(self) -> str:
        """The differences as one JSON document."""
        found = asdict(self)
        return as_json({"schema": found.pop("schema"), **found})


def layer_runs(layers: Iterable[int]) -> str:
    """Numbers of layers as a rule writes them: "0..3, 7, 9..11"."""
    runs: list[list[int]] = []
    for number in sorted(set(layers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}..{high}" for low, high in runs)
