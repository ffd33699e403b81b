"""The ways in which a model's weights could be stored: as they are, and as each recipe would write them. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from snugfit.dialects.packed import serves, split_name
from snugfit.errors import UserError
from snugfit.model.layout import NOT_CHECKED, ModelLayout
from snugfit.model.names import EXPERTS
from snugfit.model.representatives import representatives
from snugfit.quantization.decide import decide
from snugfit.recipes.recipe import LoadedRecipe, builtin_names, load_recipe
from snugfit.vram.fit import PlannedTensor
from snugfit.vram.weights import is_served

AS_IT_IS = "as it is"
_NAMES: Mapping[str, str] = {"BF16": "bf16", "F16": "fp16", "F32": "fp32", "F64": "fp64"}


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model's layout with one of the experts that are alike, and the tensors of the file that engines load.

    `whole` is the layout with all of them. `counts` is the number of tensors that each one stands for. `shapes` are
    those of the file's weights unpacked, () for tensors that only serve a weight.
    """

    layout: ModelLayout
    whole: ModelLayout
    counts: Mapping[str, int]
    served: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]

    def elements(self) -> dict[str, int]:
        """Parameters of the model behind each tensor of the file, and behind each logical weight."""
        logical = {name: info.elements for name, info in self.whole.weights.tensors.items()}
        logical |= {name: info.elements for name, info in self.layout.weights.tensors.items()}
        return logical | {name: math.prod(shape) if shape else 0 for name, shape in self.shapes.items()}


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to store the weights. `recipes` write a 16-bit cache, `with_fp8_cache` the scales of an FP8 cache.

    `problem` is the reason why no run could write it, None if one could.
    """

    name: str
    tensors: tuple[PlannedTensor, ...]
    recipes: tuple[str, ...] = ()
    with_fp8_cache: tuple[str, ...] = ()
    problem: str | None = None


def read_source(layout: ModelLayout) -> Source:
    """What engines load of a model: no heads of multi-token prediction, no output head that is tied."""
    if not layout.decoder:
        layout.check_quantizable()
    alone, counts = representatives(layout)
    served = tuple(
        name
        for name in alone.checkpoint.tensors
        if is_served(name, layout.decoder, layout.num_layers) and name not in layout.tied.copies
    )
    return Source(layout=alone, whole=layout, counts=counts, served=served, shapes=_shapes(alone))


def _shapes(layout: ModelLayout) -> dict[str, tuple[int, ...]]:
    """Shape of the weight that each tensor of the file stands for, () for scales and the like."""
    found: dict[str, tuple[int, ...]] = {}
    for name, info in layout.checkpoint.tensors.items():
        module, suffix = split_name(name)
        heads = {packed.tensor: packed.shape for packed in layout.packed[module]}
        found[name] = heads.get(suffix, () if serves(suffix) else info.shape)
    return found


def candidates_of(source: Source, asked: Sequence[str]) -> tuple[list[Candidate], list[str]]:
    """The model as it is, and what recipes make of it; recipes that store the same bytes are one candidate.

    `asked` are the recipes to try; none: all built-in ones, those for mixtures of experts only if the model is one.
    """
    layout = source.layout
    candidates = [as_it_is(source)]
    if layout.blockers:
        error = layout.blockers[0].error
        if asked:
            remedy = f"{error.remedy} Or leave `recipes` out."
            raise UserError(error.what, code=error.code, where=error.where, remedy=remedy)
        return candidates, [f"no recipe: {error.what} {error.remedy}"]
    mixture = any(name.routed for name in layout.names.values())
    found: dict[Any, Candidate] = {}
    for name in asked or builtin_names():
        loaded = load_recipe(name)
        if not asked and not mixture and any(EXPERTS in rule.role for rule in loaded.recipe.rules):
            continue
        try:
            tensors = _planned_tensors(loaded, source)
        except UserError as error:
            reason = error.what.rstrip(".")
            others = found[reason].recipes if reason in found else ()
            found[reason] = Candidate(
                name=shortest((*others, name)), tensors=(), recipes=(*others, name), problem=reason
            )
            continue
        key = tuple((tensor.format, tensor.infos) for tensor in tensors)
        known = found.get(key, Candidate(name=name, tensors=tensors))
        plain, scaled = known.recipes, known.with_fp8_cache
        if loaded.recipe.kv_cache is None:
            plain = (*plain, name)
        else:
            scaled = (*scaled, name)
        found[key] = Candidate(
            name=shortest((*plain, *scaled)), tensors=known.tensors, recipes=plain, with_fp8_cache=scaled
        )
    return [*candidates, *found.values()], [NOT_CHECKED]


def shortest(names: Iterable[str]) -> str:
    """The shortest name: the plain recipe of several that store the same bytes."""
    return min(names, key=lambda name: (len(name), name))


def as_it_is(source: Source) -> Candidate:
    """The file's own weights."""
    layout = source.layout
    tensors = tuple(
        PlannedTensor(
            name,
            source.shapes[name],
            (layout.checkpoint.tensors[name],),
            layout.formats.get(name.rpartition(".")[0]) if _is_weight(name) else None,
            source.counts[name],
        )
        for name in source.served
    )
    labels = dict.fromkeys(tensor.format.label() for tensor in tensors if tensor.format is not None)
    if labels or layout.method:
        name = ", ".join(labels) or layout.method
    else:
        largest = max((layout.checkpoint.tensors[name] for name in source.served), key=lambda info: info.elements)
        name = _NAMES.get(largest.dtype, largest.dtype.lower())
    problem = None
    if layout.stale_method:
        problem = (
            f"config.json states a quantization ({layout.stale_method}) that the weights do not have: remove "
            "quantization_config first"
        )
    return Candidate(name=f"{name}, {AS_IT_IS}", tensors=tensors, problem=problem)


def _is_weight(name: str) -> bool:
    return name.endswith((".weight", ".weight_packed", ".qweight"))


def _planned_tensors(recipe: LoadedRecipe, source: Source) -> tuple[PlannedTensor, ...]:
    """What a recipe stores of all that engines load; UserError if a run would be refused."""
    # a rule with a name may distinguish experts that are alike
    by_name = any(rule.name is not None for rule in recipe.recipe.rules)
    layout = source.whole if by_name else source.layout
    counts = {} if by_name else source.counts
    decisions = decide(layout, recipe)
    for error in decisions.unverified:
        raise error
    return tuple(
        PlannedTensor(
            name,
            decisions.weights.tensors[name].shape,
            infos,
            assignment.format if (assignment := decisions.assignments.get(name)) else None,
            counts.get(name, 1),
        )
        for name, infos in decisions.outputs.items()
        if name in decisions.weights.tensors
        and is_served(name, layout.decoder, layout.num_layers)
        and name not in layout.tied.copies
    )
