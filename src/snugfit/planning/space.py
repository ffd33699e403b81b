"""Everything that a plan may choose for a model: menus, caches, limits and what lies outside of them. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from snugfit.engines.launch import LAUNCHES
from snugfit.errors import UserError
from snugfit.formats.spec import KEEP
from snugfit.model.layout import ModelLayout
from snugfit.planning.caches import FP8, costliest_layers, fp8_except, kept_layers
from snugfit.planning.constraints import Constraints, LoadedConstraints, constrained
from snugfit.planning.decisions import narrowed
from snugfit.planning.limits import Place, impossible, limits_of
from snugfit.planning.menu import Bytes, GroupMenu, Option, on_menu, read_options, sizes_outside
from snugfit.planning.recipe_text import WeightFormat, recipe_text
from snugfit.planning.search import Mix, Space
from snugfit.quantization.cache_scales import kept_cache
from snugfit.quantization.decide import decide
from snugfit.quantization.written_config import config_to_write
from snugfit.recipes.recipe import LoadedRecipe, parse_recipe
from snugfit.records.scores import Scores
from snugfit.vram.blocks import why_not_mixed


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What may be chosen: `space` under menu, constraints and limits, `everything` in all formats that run.

    `fp8_kept`: the source declares an FP8 cache with scales, which stays whatever the recipe says. `caches` says of
    each kind of cache why it is not offered, "" if it is.
    """

    layout: ModelLayout
    place: Place
    constraints: LoadedConstraints
    space: Space
    everything: tuple[GroupMenu, ...]
    caches: Mapping[str, str]
    fp8_kept: bool

    def is_fp8(self, cache: str) -> bool:
        """Whether keys and values are in FP8 under a choice of the cache."""
        return cache != KEEP or self.fp8_kept

    def impossible(self, space: Space | None = None) -> UserError:
        """Why no mix keeps the limits, of `space` where it has others."""
        constrained = self.constraints.constraints != Constraints()
        return impossible(space or self.space, self.place, self.is_fp8, constrained=constrained)

    def at(self, context: int) -> Space:
        """The space with the limits of another context."""
        limits = {
            cache: limits_of(
                self.layout, self.place, fp8=self.is_fp8(cache), context=context, kept_layers=kept_layers(cache)
            )
            for cache in self.space.limits
        }
        return self.space.with_limits(limits)

    def with_mixed_caches(self, scores: Scores, context: int) -> Choices:
        """The same with FP8 caches in which the layers that cost most keep 16 bits, where that can be had."""
        if self.why_not_mixed() or FP8 not in self.space.limits:
            return self
        outside, limits = dict(self.space.outside), dict(self.space.limits)
        for layers in costliest_layers(scores, context):
            cache = fp8_except(layers)
            outside[cache] = outside[FP8]
            limits[cache] = limits_of(self.layout, self.place, fp8=True, kept_layers=layers)
        return replace(self, space=replace(self.space, outside=outside, limits=limits))

    def why_not_mixed(self) -> str:
        """Why no layer may keep 16 bits beside an FP8 cache; "" if some may."""
        served, budget = self.place.served, self.place.budget
        if served is None:
            return "without a GPU an FP8 cache saves nothing"
        if self.fp8_kept or self.constraints.constraints.kv_cache is not None:
            return "one kind of cache is asked for"
        if not LAUNCHES[budget.engine].skip_layers:
            return "this engine was not seen to keep 16 bits in some layers"
        return why_not_mixed(served.cache)


def read_choices(
    layout: ModelLayout, place: Place, menu: Sequence[str] = (), constraints: LoadedConstraints | None = None
) -> Choices:
    """What may be chosen for a model in a place.

    UserError for a model that cannot be quantized, unknown formats, constraints that leave nothing to a group or match
    nothing, and an FP8 cache that is demanded and impossible.
    """
    loaded = constraints or LoadedConstraints()
    everything = read_options(layout, place.server)
    menus = on_menu(everything, menu, place.server)
    asked = loaded.constraints
    menus = narrowed(constrained(menus, loaded, layout.names, layout.num_layers), asked.run_length, loaded.where)
    kept = kept_cache(layout) is not None
    outside, caches = _outside(layout, everything, place, loaded, fp8_kept=kept)
    limits = {cache: limits_of(layout, place, fp8=kept or cache == FP8) for cache in outside}
    return Choices(
        layout=layout,
        place=place,
        constraints=loaded,
        space=Space(
            menus=menus, outside=outside, limits=limits, max_formats=asked.max_formats, run_length=asked.run_length
        ),
        everything=everything,
        caches=caches,
        fp8_kept=kept,
    )


def recipe_of_mix(
    layout: ModelLayout,
    options: Mapping[str, Option],
    groups: Sequence[GroupMenu],
    *,
    fp8_cache: bool,
    name: str = "plan",
    description: str = "",
    comments: Sequence[str] = (),
) -> LoadedRecipe:
    """The recipe that gives each group the format of its option."""
    formats = {
        weight: WeightFormat(options[menu.group.name].format, options[menu.group.name].group_size)
        for menu in groups
        for weight in menu.group.weights
    }
    text = recipe_text(
        formats,
        layout.names,
        num_layers=layout.num_layers,
        name=name,
        description=description,
        comments=comments,
        fp8_cache=fp8_cache,
    )
    return parse_recipe(text, where=name)


def check_bytes(layout: ModelLayout, mix: Mix, recipe: LoadedRecipe) -> None:
    """RuntimeError where the recipe of a mix would write other bytes than were planned: a defect of this package."""
    decisions = decide(layout, recipe)
    config_to_write(layout, recipe, decisions)  # raises where engines could not be told
    written = sum(info.bytes for infos in decisions.outputs.values() for info in infos)
    if written != mix.bytes.file:
        raise RuntimeError(f"planned {mix.bytes.file} bytes, but the recipe writes {written}:\n{recipe.text}")


def _outside(
    layout: ModelLayout, menus: Sequence[GroupMenu], place: Place, loaded: LoadedConstraints, *, fp8_kept: bool
) -> tuple[dict[str, Bytes], dict[str, str]]:
    """Bytes beside the groups with each kind of cache that is offered, and why others are not."""
    wanted = loaded.constraints.kv_cache
    found: dict[str, Bytes] = {}
    reasons = {KEEP: "", FP8: ""}
    first = next(menu for menu in menus if len(menu.options) > 1)
    options = {menu.group.name: menu.options[0] for menu in menus} | {first.group.name: first.options[1]}
    for cache in (KEEP, FP8):
        reason = ""
        if cache == FP8 and fp8_kept:
            reason = "the source has scales of an FP8 cache already, which stay"
        elif wanted is not None and wanted != cache:
            reason = f"{loaded.where} asks for {wanted}"
        elif cache == FP8 and place.served is None and wanted is None:
            reason = "without a GPU an FP8 cache saves nothing"
        if not reason:
            try:
                recipe = recipe_of_mix(layout, options, menus, fp8_cache=cache == FP8)
                found[cache] = sizes_outside(layout, decide(layout, recipe).outputs, place.server)
            except UserError as error:
                if cache == KEEP:
                    raise
                reason = error.what.rstrip(".")
        reasons[cache] = reason
    if not found:
        raise UserError(f"{reasons[FP8]}.", code="plan-impossible", where=loaded.where, remedy="Remove `kv_cache`.")
    return found, reasons
