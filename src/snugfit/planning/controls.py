"""What a plan has to beat: built-in recipes that fit, and mixes of equal bytes that know nothing of the model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from snugfit.errors import UserError
from snugfit.formats.spec import FORMATS, KEEP
from snugfit.model.layout import ModelLayout
from snugfit.model.names import EXPERTS
from snugfit.planning.menu import GroupMenu, Option
from snugfit.planning.search import Mix, Space, make_mix, within
from snugfit.quantization.plan import decide
from snugfit.recipes.recipe import LoadedRecipe, builtin_names, load_recipe
from snugfit.records.scores import Scores

BUILT_IN, UNIFORM, MATCHED = "built-in", "uniform", "byte-matched"


@dataclass(frozen=True, kw_only=True)
class Control:
    """A way to store the model that no score chose: `kind` is BUILT_IN, UNIFORM or MATCHED.

    `recipe` is the built-in recipe that writes it, None for others. `allowed`: constraints permit it. `fits`: it keeps
    all limits as well.
    """

    name: str
    kind: str
    mix: Mix
    recipe: str | None
    allowed: bool
    fits: bool


def find_controls(
    layout: ModelLayout, everything: Sequence[GroupMenu], space: Space, scores: Scores | None, context: int
) -> list[Control]:
    """Built-in recipes, uniform formats, and mixes of two of them that fill the limits, each way of storing once.

    `everything` are the options of all formats, `space` those that the menu and the constraints leave.
    """
    options = {menu.group.name: {one.label: one for one in menu.options} for menu in everything}
    found: list[Control] = []
    for name, chosen, cache, recipe in (*_built_in(layout, options, space), *_uniform(everything, space)):
        mix = make_mix(chosen, cache, space.outside[cache], scores, context)
        if any(other.mix.formats == mix.formats for other in found):
            continue
        kind = UNIFORM if recipe is None else BUILT_IN
        allowed = _is_allowed(mix, space)
        fits = allowed and within(mix, space.limits[cache])
        found.append(Control(name=name, kind=kind, mix=mix, recipe=recipe, allowed=allowed, fits=fits))
    return [*found, *_matched(found, space, scores, context)]


def strongest(controls: Sequence[Control]) -> Control | None:
    """The control that fits and is expected to lose least; without scores the one with the most bytes."""
    fitting = [control for control in controls if control.fits]
    return min(fitting, key=_strength, default=None)


def _strength(control: Control) -> tuple[float, int, str]:
    kl = control.mix.predicted.kl
    return (math.inf if math.isnan(kl) else kl), -control.mix.bytes.served, control.name


_Choice = tuple[str, Mapping[str, Option], str, str | None]


def _built_in(layout: ModelLayout, options: Mapping[str, Mapping[str, Option]], space: Space) -> Iterator[_Choice]:
    """The built-in recipes that this model and engine can run; of those that store the same the plainest name."""
    mixture = any(name.routed for name in layout.names.values())
    for name in sorted(builtin_names(), key=lambda name: (len(name), name)):
        loaded = load_recipe(name)
        if not mixture and any(EXPERTS in rule.role for rule in loaded.recipe.rules):
            continue
        cache = loaded.recipe.kv_cache or KEEP
        if cache not in space.outside:
            continue
        chosen = _chosen_by(layout, loaded, options)
        if chosen is not None:
            yield name, chosen, cache, name


def _chosen_by(
    layout: ModelLayout, recipe: LoadedRecipe, options: Mapping[str, Mapping[str, Option]]
) -> dict[str, Option] | None:
    """The option of each group that a recipe takes; None where it cannot be run or is no choice by groups."""
    try:
        assignments = decide(layout, recipe).assignments
    except UserError:
        return None
    labels: dict[str, set[str]] = {}
    group_of = _group_of(layout)
    for name, assignment in assignments.items():
        if name in group_of:
            labels.setdefault(group_of[name], set()).add(assignment.label())
    found: dict[str, Option] = {}
    for group, by_label in options.items():
        used = labels.get(group, {KEEP})
        if len(used) != 1 or (label := next(iter(used))) not in by_label:
            return None
        found[group] = by_label[label]
    return found


def _group_of(layout: ModelLayout) -> Mapping[str, str]:
    """The group of each weight."""
    from snugfit.planning.groups import find_groups

    return {name: group.name for group in find_groups(layout) for name in group.weights}


def _uniform(everything: Sequence[GroupMenu], space: Space) -> Iterator[_Choice]:
    """One format for every group that can have it; the others, such as an output head, are kept."""
    for fmt in FORMATS:
        if not any(fmt == one.format for menu in everything for one in menu.options):
            continue
        chosen = {
            menu.group.name: next(
                (one for one in menu.options if one.format == fmt and menu.group.layer is not None), menu.options[0]
            )
            for menu in everything
        }
        for cache in space.outside:
            yield f"{fmt}{' with an FP8 cache' if cache != KEEP else ''}", chosen, cache, None


def _is_allowed(mix: Mix, space: Space) -> bool:
    """Whether menu and constraints permit every format of a mix."""
    options = {menu.group.name: menu.options for menu in space.menus}
    formats = {one.format for one in mix.options.values()} - {KEEP}
    few = space.max_formats is None or len(formats) <= space.max_formats
    return few and mix.kv_cache in space.limits and all(one in options[name] for name, one in mix.options.items())


def _matched(found: Sequence[Control], space: Space, scores: Scores | None, context: int) -> Iterator[Control]:
    """Of each pair the smaller one in some layers, the larger one in as many others as fit, evenly spread."""
    allowed = [control for control in found if control.allowed]
    for small in allowed:
        if not small.fits:
            continue
        for large in allowed:
            same_cache = small.mix.kv_cache == large.mix.kv_cache
            if large.fits or not same_cache or large.mix.bytes.served <= small.mix.bytes.served:
                continue
            control = _between(small, large, space, scores, context)
            if control is not None and not any(other.mix.formats == control.mix.formats for other in found):
                yield control


def _between(small: Control, large: Control, space: Space, scores: Scores | None, context: int) -> Control | None:
    """`large` in as many evenly spread layers as fit, `small` in the others; None where no layer more fits."""
    layers = sorted({menu.group.layer for menu in space.menus if menu.group.layer is not None})
    layer_of = {menu.group.name: menu.group.layer for menu in space.menus}
    cache = small.mix.kv_cache
    low, best = 0, None
    high = len(layers) - 1
    while low < high:
        count = (low + high + 1) // 2
        upgraded = _spread(layers, count)
        options = {
            name: large.mix.options[name] if layer_of[name] in upgraded else one
            for name, one in small.mix.options.items()
        }
        mix = make_mix(options, cache, space.outside[cache], scores, context)
        if within(mix, space.limits[cache]) and _is_allowed(mix, space):
            low, best = count, mix
        else:
            high = count - 1
    if best is None:
        return None
    name = f"{large.name} in {low} of {len(layers)} layers, {small.name} in the others"
    return Control(name=name, kind=MATCHED, mix=best, recipe=None, allowed=True, fits=True)


def _spread(layers: Sequence[int], count: int) -> set[int]:
    """`count` of the layers at even distances."""
    return {layers[(2 * place + 1) * len(layers) // (2 * count)] for place in range(count)}
