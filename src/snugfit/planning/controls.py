"""What a plan has to beat: built-in recipes that fit, and mixes of equal bytes that know nothing of the model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from snugfit.errors import UserError
from snugfit.formats.spec import FORMATS, KEEP
from snugfit.model.layout import ModelLayout
from snugfit.model.names import EXPERTS
from snugfit.planning.caches import kept_layers
from snugfit.planning.groups import HEAD
from snugfit.planning.menu import Bytes, GroupMenu, Option
from snugfit.planning.search import Limit, Mix, Space, make_mix, within
from snugfit.quantization.decide import decide
from snugfit.recipes.recipe import LoadedRecipe, builtin_names, load_recipe
from snugfit.records.scores import Scores

BUILT_IN, UNIFORM, MATCHED = "built-in", "uniform", "byte-matched"
_WITH_HEAD = f", {HEAD} in "


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
    """Built-in recipes and uniform formats, with and without a quantized output head, and mixes of two of these.

    The mixes fill the limits. Each way of storing occurs once.

    `everything` are the options of all formats, `space` those that the menu and the constraints leave.
    """
    found: list[Control] = []
    plain = [*_built_in(layout, everything, space), *_uniform(everything, space)]
    for name, chosen, cache, recipe in (*plain, *_with_head(plain, everything)):
        mix = make_mix(chosen, cache, space.outside[cache], scores, context)
        if any(_key(other.mix) == _key(mix) for other in found):
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
    return or_last(control.mix.predicted.kl), -control.mix.bytes.served, control.name


def or_last(kl: float) -> float:
    """A KL by which to sort: NaN comes behind all others."""
    return math.inf if math.isnan(kl) else kl


_Choice = tuple[str, Mapping[str, Option], str, str | None]


def _built_in(layout: ModelLayout, everything: Sequence[GroupMenu], space: Space) -> Iterator[_Choice]:
    """The built-in recipes that this model and engine can run; of those that store the same the plainest name."""
    mixture = any(name.routed for name in layout.names.values())
    for name in sorted(builtin_names(), key=lambda name: (len(name), name)):
        loaded = load_recipe(name)
        if not mixture and any(EXPERTS in rule.role for rule in loaded.recipe.rules):
            continue
        cache = loaded.recipe.kv_cache or KEEP
        if cache not in space.outside:
            continue
        chosen = _chosen_by(layout, loaded, everything)
        if chosen is not None:
            yield name, chosen, cache, name


def _chosen_by(layout: ModelLayout, recipe: LoadedRecipe, everything: Sequence[GroupMenu]) -> dict[str, Option] | None:
    """The option of each group that a recipe takes; None where it cannot be run or is no choice by groups."""
    try:
        assignments = decide(layout, recipe).assignments
    except UserError:
        return None
    found: dict[str, Option] = {}
    for menu in everything:
        used = {assignments[name].label() for name in menu.group.weights if name in assignments} or {KEEP}
        option = next((one for one in reversed(menu.options) if {one.label} == used), None)
        if option is None:
            return None
        found[menu.group.name] = option
    return found


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
        for cache in (one for one in space.outside if not kept_layers(one)):
            yield f"{fmt}{' with an FP8 cache' if cache != KEEP else ''}", chosen, cache, None


def _with_head(plain: Sequence[_Choice], everything: Sequence[GroupMenu]) -> Iterator[_Choice]:
    """The same with a quantized output head, which no built-in recipe has, but a plan may have."""
    for menu in everything:
        if menu.group.role == HEAD:
            for one in menu.options[1:]:
                for name, chosen, cache, _ in plain:
                    yield f"{name}{_WITH_HEAD}{one.format}", {**chosen, menu.group.name: one}, cache, None


def _is_allowed(mix: Mix, space: Space) -> bool:
    """Whether menu and constraints permit every format of a mix."""
    options = {menu.group.name: menu.options for menu in space.menus}
    formats = {one.format for one in mix.options.values()} - {KEEP}
    few = space.max_formats is None or len(formats) <= space.max_formats
    runs = (tuple(mix.options[menu.group.name].format for menu in one.menus) for one in space.decisions)
    few = few and all(len(set(run)) == 1 for run in runs)
    return few and mix.kv_cache in space.limits and all(one in options[name] for name, one in mix.options.items())


def _matched(found: Sequence[Control], space: Space, scores: Scores | None, context: int) -> Iterator[Control]:
    """Of each pair the smaller one in some layers, the larger one in as many others as fit, evenly spread.

    Where runs of layers have one format, whole runs. Weights that need one format in all layers stay as in the smaller
    one.
    """
    length = space.run_length or 1
    part_of = {
        menu.group.name: menu.group.layer // length
        for menu in space.menus
        if menu.group.layer is not None and not menu.group.everywhere
    }
    heads = [menu.group.name for menu in space.menus if menu.group.layer is None]
    by_part = {control.name: _by_part(control.mix, part_of) for control in found if control.allowed}
    known = {_key(control.mix) for control in found}
    for small, large in product(found, found):
        pair = small.allowed and small.fits and large.allowed and not large.fits
        if not pair or small.mix.kv_cache != large.mix.kv_cache:
            continue
        if any(small.mix.options[name] != large.mix.options[name] for name in heads):
            continue
        limits = space.limits[small.mix.kv_cache]
        upgraded = _parts_that_fit(small.mix, by_part[small.name], by_part[large.name], limits)
        if not upgraded:
            continue
        options = {
            name: large.mix.options[name] if part_of.get(name) in upgraded else one
            for name, one in small.mix.options.items()
        }
        cache = small.mix.kv_cache
        mix = make_mix(options, cache, space.outside[cache], scores, context)
        if _key(mix) in known or not _is_allowed(mix, space):
            continue
        known.add(_key(mix))
        parts = len(by_part[small.name])
        head = small.name.partition(_WITH_HEAD)[1:]
        names = [control.name.partition(_WITH_HEAD)[0] for control in (large, small)]
        what = "layers" if length == 1 else f"runs of {length} layers"
        name = f"{names[0]} in {len(upgraded)} of {parts} {what}, {names[1]} in the others{''.join(head)}"
        yield Control(name=name, kind=MATCHED, mix=mix, recipe=None, allowed=True, fits=True)


def _key(mix: Mix) -> tuple[str, ...]:
    """What a mix stores."""
    return mix.kv_cache, *(one.format for one in mix.options.values())


def _by_part(mix: Mix, part_of: Mapping[str, int]) -> dict[int, Bytes]:
    """Bytes of the groups of each layer or run of layers."""
    found: dict[int, Bytes] = {}
    for name, part in part_of.items():
        found[part] = found.get(part, Bytes()) + mix.options[name].bytes
    return found


def _parts_that_fit(
    mix: Mix, small: Mapping[int, Bytes], large: Mapping[int, Bytes], limits: Sequence[Limit]
) -> set[int]:
    """As many evenly spread parts as can have the larger sizes under the limits; none where the mix grows by none."""
    parts = sorted(small)

    def fits(count: int) -> bool:
        chosen = _spread(parts, count)
        return all(
            limit.amount(mix.bytes) + sum(limit.amount(large[n]) - limit.amount(small[n]) for n in chosen)
            <= limit.bytes
            for limit in limits
        )

    low, high = 0, len(parts) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return _spread(parts, low) if low else set()


def _spread(parts: Sequence[int], count: int) -> set[int]:
    """`count` of the parts at even distances."""
    return {parts[(2 * place + 1) * len(parts) // (2 * count)] for place in range(count)}
