"""The record of a plan: the groups of the mix that was chosen, every other mix beside it, and the recipe to write."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace

from snugfit import distributed
from snugfit.byte_counts import size
from snugfit.engines.launch import LAUNCHES
from snugfit.formats.spec import FORMATS
from snugfit.planning.caches import FP8
from snugfit.planning.controls import Control
from snugfit.planning.explain import cache_reasons, nats, planned_groups
from snugfit.planning.knapsack import CLOSE
from snugfit.planning.limits import Budget, context_beside, served_elements
from snugfit.planning.menu import Option
from snugfit.planning.search import NOT_SCORED, Mix, Space, frontier_limits, least_kl, within
from snugfit.planning.space import Choices, check_bytes, recipe_of_mix
from snugfit.recipes.recipe import load_recipe
from snugfit.records.plan import (
    Expected,
    PlanBudget,
    PlanLimit,
    PlanPoint,
    PlanRecord,
    PlanVerdict,
    ProvenKl,
)
from snugfit.records.scores import KEEP, Scores
from snugfit.version import __version__

FRONTIER_POINTS = 12
RUNS_OF = "mix in runs of "  # with what the name of a simpler mix begins


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a search and a proof found: candidates by name, controls, and which candidate is the plan.

    `space` has the limits that were in force. `measured` is by name.
    """

    budget: Budget
    choices: Choices
    space: Space
    scores: Scores
    context: int
    candidates: tuple[tuple[str, Mix], ...]
    controls: tuple[Control, ...]
    measured: Mapping[str, tuple[ProvenKl, ...]]
    verdict: PlanVerdict
    chosen: str
    notes: tuple[str, ...]
    seconds: Mapping[str, float]

    @property
    def mix(self) -> Mix:
        """The mix that is the plan."""
        return dict(self.candidates)[self.chosen]


def record_of(found: Outcome) -> PlanRecord:
    """The record, with the recipe of the plan, or of the control if the plan was refused."""
    written, recipe = _recipe(found)
    mix, choices = found.mix, found.choices
    limits = found.space.limits[mix.kv_cache]
    return PlanRecord(
        snugfit=__version__,
        model=choices.layout.checkpoint.name,
        budget=_budget(found),
        menu=tuple(dict.fromkeys(one.format for menu in found.space.menus for one in menu.options)),
        constraints=choices.constraints.where or None,
        max_formats=found.space.max_formats,
        context=found.context,
        target=found.scores.target,
        effort=found.scores.effort,
        scored_on=tuple(one.source for one in found.scores.datasets),
        scored_tokens=sum(found.scores.tokens),
        kv_cache=FP8 if choices.is_fp8(mix.kv_cache) else KEEP,
        kv_caches=cache_reasons(mix, found.scores, choices.caches),
        limits=tuple(PlanLimit(limit.name, limit.bytes, limit.amount(mix.bytes)) for limit in limits),
        outside_bytes=found.space.outside[mix.kv_cache].file,
        groups=planned_groups(found.space, found.scores, mix),
        points=tuple(_points(found)),
        verdict=found.verdict,
        written=written,
        recipe=recipe,
        notes=(*found.notes, *_notes(found)),
        seconds=dict(found.seconds),
        processes=distributed.world_size(),
    )


def _budget(found: Outcome) -> PlanBudget:
    settings = found.choices.place.server.settings
    return PlanBudget(
        **asdict(found.budget),
        gpu_title=settings.gpu.title if settings else None,
        engine_title=settings.engine.title if settings else None,
    )


def _recipe(found: Outcome) -> tuple[str, str]:
    """The name of the point whose recipe is written, and its YAML."""
    refused = found.verdict.accepted is False
    control = next((c for c in found.controls if c.name == found.verdict.control), None) if refused else None
    model = found.choices.layout.checkpoint.name
    if control is not None and control.recipe is not None:
        mark = f"# CONTROL, not a plan: {found.verdict.statement}\n"
        return control.name, mark + load_recipe(control.recipe).text
    mix = found.mix if control is None else control.mix
    name = "a-plan" if control is None else "a-control"
    words = f"{size(mix.bytes.file)}, expected KL {mix.predicted.kl:.4f} at {found.context:,} tokens"
    said = found.verdict.statement if control is None else f"CONTROL, not a plan: {found.verdict.statement}"
    recipe = recipe_of_mix(
        found.choices.layout,
        mix.options,
        found.choices.everything,
        fp8_cache=mix.kv_cache != KEEP,
        name=name,
        description=f"{'A plan' if control is None else 'A control, not a plan,'} for {model}: {words}.",
        comments=[*_cache_comment(found, mix), said],
    )
    check_bytes(found.choices.layout, mix, recipe)
    return (found.chosen if control is None else control.name), recipe.text


def _cache_comment(found: Outcome, mix: Mix) -> Iterator[str]:
    """What no recipe can say: the layers that keep 16 bits beside an FP8 cache."""
    if mix.kept_caches:
        option = LAUNCHES[found.budget.engine].skip_layers
        layers = " ".join(map(str, mix.kept_caches))
        yield f"keys and values of layers {layers} keep 16 bits, which no file can say: serve with {option} {layers}"


def _points(found: Outcome) -> Iterator[PlanPoint]:
    """The plan first, then alternatives, controls and the frontier."""
    for name, mix in sorted(found.candidates, key=lambda pair: pair[0] != found.chosen):
        plan = name == found.chosen
        point = _point(found, name, "plan" if plan else "alternative", mix, recipe="recipe.yaml" if plan else None)
        yield replace(point, rules=_rules(found, mix))
    for control in found.controls:
        point = _point(found, control.name, control.kind, control.mix, recipe=control.recipe, fits=control.fits)
        yield replace(point, rules=len(load_recipe(control.recipe).recipe.rules) if control.recipe else 0)
    for number, mix in enumerate(_frontier(found)):
        yield _point(found, f"frontier {number}", "frontier", mix)


def _point(
    found: Outcome, name: str, kind: str, mix: Mix, *, recipe: str | None = None, fits: bool | None = None
) -> PlanPoint:
    choices, plan = found.choices, found.mix
    formats: dict[str, int] = {}
    for one in mix.options.values():
        formats[one.label] = formats.get(one.label, 0) + one.bytes.file
    keeps = mix.kv_cache in found.space.limits and within(mix, found.space.limits[mix.kv_cache])
    return PlanPoint(
        name=name,
        kind=kind,
        recipe=recipe,
        kv_cache=FP8 if choices.is_fp8(mix.kv_cache) else KEEP,
        formats=formats,
        bytes=mix.bytes.file,
        bytes_per_gpu=mix.bytes.gpu,
        bits_per_weight=8 * mix.bytes.served / max(1, served_elements(choices.layout)),
        max_context=context_beside(
            choices.place, mix.bytes.gpu, fp8=choices.is_fp8(mix.kv_cache), kept_layers=mix.kept_caches
        ),
        cache_kept_in=mix.kept_caches,
        fits=keeps if fits is None else fits,
        expected=Expected(mix.predicted.kl, mix.predicted.error),
        measured=found.measured.get(name, ()),
        differs=sum(one.format != plan.options[group].format for group, one in mix.options.items()),
    )


def _rules(found: Outcome, mix: Mix) -> int:
    """How many rules the recipe of a mix has."""
    recipe = recipe_of_mix(
        found.choices.layout, mix.options, found.choices.everything, fp8_cache=mix.kv_cache != KEEP, name="a-mix"
    )
    return len(recipe.recipe.rules)


def _frontier(found: Outcome) -> list[Mix]:
    """The best mixes at sizes from the smallest possible to the largest that costs anything, whatever the budget."""
    cache = found.mix.kv_cache
    mixes = []
    for limit in frontier_limits(found.space, cache, FRONTIER_POINTS):
        space = found.space.with_limits({cache: (limit,)})
        mixes += least_kl(space, found.scores, found.context, gap=CLOSE)
    return mixes


def _notes(found: Outcome) -> list[str]:
    """What a reader should know of the figures."""
    notes = []
    last = found.scores.edges[-1]
    if found.context > last:
        notes.append(
            f"positions beyond {last:,} are expected to cost what those before {last:,} do: `max_seq_length` "
            "scores longer contexts"
        )
    unscored = sorted({fmt for menu in found.space.menus for fmt, why in menu.refused.items() if why == NOT_SCORED})
    if unscored:
        notes.append(f"not scored, and so not on the menu of some weights: {', '.join(unscored)}")
    notes += _note_of_simpler(found)
    weight_only = dict.fromkeys(one.label for one in found.mix.options.values() if _is_weight_only(one))
    if weight_only:
        notes.append(
            f"weight-only here: {', '.join(weight_only)}, so prompts are processed at the speed of 16 bits; `menu` can "
            "leave them out"
        )
    measured = found.measured.get(found.chosen, ())
    at = next((one for one in measured if one.context == found.context and not one.text), None)
    most = found.budget.max_kl
    if most is not None and at is not None and at.kl > most:
        notes.append(f"the measured KL at {found.context:,} tokens is {at.kl:.4f}, above `max_kl`: ask for less")
    return notes


def _note_of_simpler(found: Outcome) -> Iterator[str]:
    """What the mix in runs of layers saves and costs, where it is not the plan itself."""
    for name, mix in found.candidates:
        if not name.startswith(RUNS_OF) or name == found.chosen:
            continue
        fewer = _rules(found, mix), _rules(found, found.mix)
        if fewer[0] < fewer[1]:
            rules = f"{fewer[0]} rules in place of {fewer[1]}"
            more = nats(mix.predicted.kl - found.mix.predicted.kl)
            length = name.removeprefix(RUNS_OF).split()[0]
            asked = f"`run_length: {length}` in `constraints` asks for it"
            yield f"a simpler plan, {name}, has {rules} and is expected to cost {more} nats more; {asked}"


def _is_weight_only(one: Option) -> bool:
    """Whether engines run a quantized weight on inputs of 16 bits."""
    if one.format == KEEP:
        return False
    return one.arithmetic.endswith("A16") if one.arithmetic else FORMATS[one.format].inputs == "none"
