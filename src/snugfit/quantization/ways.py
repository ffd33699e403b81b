"""The ways in which a run may choose codes, by its effort: simplest first, each to be tried against the one before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from snugfit.data.dataset import Dataset
from snugfit.errors import UserError
from snugfit.methods.calibrated import Calibrated
from snugfit.methods.expert_folds import Product
from snugfit.methods.learned_scales import LEARNED_FORMATS
from snugfit.methods.method import Method
from snugfit.methods.round_to_nearest import ROUND_TO_NEAREST
from snugfit.model.experts import DOWN, why_not_linear_in_up
from snugfit.model.skeleton import Skeleton
from snugfit.quantization.plan import Plan
from snugfit.recipes.assignment import Assignment

FAST, GOOD, BEST = EFFORTS = ("fast", "good", "best")
HELD_OUT_EVERY = 8  # one of so many samples of each file is held out
FEWEST_SAMPLES = 8
DESCENT_SWEEPS = 2
# block scales for each calibration token, above which steps follow the noise of their samples: 44 and 87 lowered the KL
# of other texts by a sixth and an eighth, 180 raised it, 630 raised that of one text (docs/effort.md)
MOST_LEARNED_PER_TOKEN = 100


@dataclass(frozen=True)
class Way:
    """A way to choose codes, by its name in records.

    With `learns` it takes the codes of the way that was kept before it, and learns their scales; `method` is unused.
    `recall` makes what the method would observe of a layer, of E[x^2] in statistics by the file's names of linears, of
    what can be folded, and of what gives the weight of a linear. Where one of the ways `unless` was kept this one is
    not tried. `adds` are the options of Calibrated that it has and the simpler ways do not, under the name of `step`.
    """

    name: str
    method: Method
    learns: bool = False
    unless: tuple[str, ...] = ()
    recall: Callable[[Mapping[str, Tensor], Sequence[Product], Callable[[str], Tensor]], Any] | None = None
    step: str = ""
    adds: Mapping[str, Any] = field(default_factory=dict)

    def on(self, kept: Way) -> Way:
        """This way as a step from the one that was `kept`; itself where it is no step, or cannot be one from there."""
        method = kept.method
        if not self.step or not isinstance(method, Calibrated) or ("sweeps" in self.adds and not method.gptq):
            return self
        return replace(self, name=f"{kept.name}+{self.step}", method=method.adding(self.adds))


PLAIN = Way("plain", ROUND_TO_NEAREST)
LEARNED = Way("learned", ROUND_TO_NEAREST, learns=True)


def ways_of(
    plan: Plan,
    effort: str | None,
    target: str,
    *,
    samples_run: bool,
    tokens: int = 0,
    recalls: bool = False,
    folds_experts: bool = False,
    folds_norms: bool = False,
) -> tuple[Way, ...]:
    """The ways that a run of this effort tries, the simplest first; `target` is the engine profile to be good under.

    GPTQ has weighted scales, too, and layers keep no fold that does not lower their error: so GPTQ with folds is tried
    first, GPTQ alone only if that was not kept, and where there are `tokens` enough for its matrices weighted scales
    alone only if neither was.

    Each way behind these adds something to the one that is kept by then: its name here is what it has if all are kept.

    `fast` has one: weighted scales where samples run anyway (`samples_run`) or statistics have E[x^2] of inputs
    (`recalls`), else plain ones. Routed experts get no GPTQ, which was seen to cost mixtures accuracy, but folds inside
    of each (`folds_experts`: some can), and last, by itself, one of the norm before them (`folds_norms`: some may).
    """
    if effort == FAST and recalls:
        method = Calibrated(target, folds=True, expert_folds=True)
        return (Way("weighted+folds", method, recall=method.recall),)
    if effort is None or (effort == FAST and not samples_run):
        return (PLAIN,)
    weighted = Way("weighted", Calibrated(target))
    if effort == FAST:
        return (weighted,)
    ways, name, options = [PLAIN, weighted], "weighted", dict[str, Any]()
    if _linears(plan):
        name, options = "gptq+folds", {"gptq": True, "folds": True}
        gptq = [Way(name, Calibrated(target, **options)), Way("gptq", Calibrated(target, gptq=True), unless=(name,))]
        few = tokens < _widest(plan)
        ways = [*ways, *gptq] if few else [PLAIN, *gptq, replace(weighted, unless=(name, "gptq"))]
    steps: list[tuple[str, dict[str, Any]]] = [("expert-folds", {"expert_folds": True})] if folds_experts else []
    if effort == BEST and _linears(plan):
        steps.append(("descent", {"sweeps": DESCENT_SWEEPS}))
    if folds_norms:
        steps.append(("norm-folds", {"norm_folds": True}))
    for step, adds in steps:
        name, options = f"{name}+{step}", options | adds
        ways.append(Way(name, Calibrated(target, **options), step=step, adds=adds))
    return tuple(ways)


def why_no_expert_folds(plan: Plan, skeleton: Skeleton) -> str | None:
    """Why nothing is folded inside routed experts that follow the effort; empty if something can, None without any."""
    reasons = {
        why_not_linear_in_up(skeleton.layers[number].get_submodule(mixture.module))
        for number, mixture in skeleton.experts.items()
        if any(
            a.follows_effort
            for name in mixture.names.values()
            if (a := plan.assignments.get(f"{plan.decoder}.{number}.{name}"))
        )
    }
    return None if not reasons else min(reasons)


def may_fold_norms(plan: Plan, skeleton: Skeleton) -> bool:
    """Whether a layer has routed experts of which all that reads their inputs follows the effort."""
    return any(
        all(
            (a := plan.assignments.get(f"{plan.decoder}.{number}.{name}")) is not None and a.follows_effort
            for (_, role, parameter), name in mixture.names.items()
            if parameter == "weight" and role != DOWN
        )
        for number, mixture in skeleton.experts.items()
    )


def _linears(plan: Plan) -> dict[str, Assignment]:
    """What is decided of weights, but routed experts', that follow the effort."""
    return {name: a for name, a in plan.assignments.items() if a.follows_effort and ".experts." not in name}


def _widest(plan: Plan) -> int:
    """The most input features that a linear has which follows the effort."""
    return max((plan.weights.tensors[name].shape[-1] for name in _linears(plan)), default=0)


def few_tokens_note(plan: Plan, tokens: int) -> list[str]:
    """A note if there are fewer calibration tokens than a linear has input features: E[x x^T] is singular then.

    GPTQ damps it, and the gate judges what comes of that.
    """
    widest = _widest(plan)
    if tokens >= widest:
        return []
    return [f"{tokens:,} calibration tokens for linears of up to {widest:,} input features: GPTQ needs more of them"]


def learned_weights(plan: Plan) -> frozenset[str]:
    """Weights of decoder layers, but routed experts', that follow the effort and whose scales can learn."""
    can = {name for name, a in _linears(plan).items() if a.format is not None and a.format.name in LEARNED_FORMATS}
    return frozenset(name for unit in plan.units[1:] for name in unit if name in can)


def why_not_learned(plan: Plan, skeleton: Skeleton, tokens: int) -> str:
    """Why scales cannot learn at the model's output from so many calibration `tokens`; empty if they can."""
    if skeleton.experts:
        return "gradients do not pass through routed experts"
    if skeleton.carries_state:
        return "layers of this family pass more on than hidden states"
    if not learned_weights(plan):
        return "no format that follows the effort has scales between which others lie (NVFP4, INT4)"
    scales = sum(_scales(plan, name) for name in learned_weights(plan))
    if scales > MOST_LEARNED_PER_TOKEN * tokens:
        enough = -(-scales // MOST_LEARNED_PER_TOKEN)
        return f"{scales:,} of them would follow the noise of {tokens:,} tokens: give {enough:,} or more"
    return ""


def _scales(plan: Plan, name: str) -> int:
    """The block scales that are written of a weight."""
    return next(info.elements for info in plan.outputs[name] if info.name.endswith(".weight_scale"))


def why_no_trials(plan: Plan, skeleton: Skeleton, dataset: Dataset | None) -> UserError | None:
    """Why ways cannot be tried on held-out samples, None if they can: the error for an effort that was asked for."""

    def refuse(what: str, remedy: str) -> UserError:
        return UserError(
            f"{what}.", code="option-conflict", where="effort", remedy=f'{remedy}, or set `effort="fast"`.'
        )

    if plan.checkpoint.remote is not None:
        return refuse("the original on the Hub cannot be run to compare with", "Download it first")
    if skeleton.why_not_run:
        return refuse(f"samples cannot run: {skeleton.why_not_run}", "Take formats that need no samples")
    if not skeleton.has_head:
        return refuse("a model without an output head predicts nothing to compare", "Name scale rules in the recipe")
    if not skeleton.is_causal:
        return refuse("a model that is not causal predicts nothing to compare", "Name scale rules in the recipe")
    if dataset is not None and len(dataset.samples) < FEWEST_SAMPLES:
        what = f"{len(dataset.samples)} samples are too few to hold some of them out (at least {FEWEST_SAMPLES})"
        return refuse(what, "Give more samples")
    return None
