"""What a recipe does to each tensor of a model, decided from headers before any weight is read. No torch.

`decide` gives every tensor its format and outputs. Runs and `fit` use it, so that both refuse the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from snugfit.dialects import compressed_tensors
from snugfit.errors import UserError
from snugfit.formats.spec import TensorFormat
from snugfit.model.layout import ModelLayout
from snugfit.model.logical_weights import LogicalWeights
from snugfit.model.names import TensorName
from snugfit.model.support import unverified_formats
from snugfit.quantization.cache_scales import kv_cache_modules, kv_scale_outputs
from snugfit.quantization.units import names_of, units_of
from snugfit.recipes.assignment import Assignment
from snugfit.recipes.recipe import LoadedRecipe
from snugfit.recipes.resolve import resolve
from snugfit.storage.safetensors_header import TensorInfo


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """What a recipe does to a model's tensors.

    `assignments` are those of logical weights by name; `outputs` the tensors that are written for each, and for scales
    that the source does not have. `attention` maps a layer to the module whose keys and values get scales of an FP8
    cache. `unverified` says why no tested engine loads the result, if so.
    """

    weights: LogicalWeights
    names: Mapping[str, TensorName]
    assignments: Mapping[str, Assignment]
    outputs: Mapping[str, tuple[TensorInfo, ...]]
    attention: Mapping[int, str]
    unverified: tuple[UserError, ...]


def assignments_of(
    layout: ModelLayout, recipe: LoadedRecipe, source_formats: Mapping[str, TensorFormat] | None = None
) -> dict[str, Assignment]:
    """What a recipe's rules give the tensors of a model, stored in `source_formats`; see `resolve`."""
    return resolve(
        recipe,
        list(layout.weights.tensors.values()),
        num_layers=layout.num_layers,
        decoder=layout.decoder,
        not_quantizable=layout.not_quantizable,
        unquantized=layout.unquantized,
        source_formats=source_formats,
    )


def decide(layout: ModelLayout, recipe: LoadedRecipe) -> Decisions:
    """What `recipe` does to the tensors of a model.

    Raises UserError for a blocker of the model, and for whatever is wrong with the recipe for this model.
    """
    layout.check_quantizable()
    assignments = assignments_of(layout, recipe, layout.weights.formats)
    if recipe.recipe.kv_cache is None and all(a.format is None or a.keeps_codes for a in assignments.values()):
        raise _changes_nothing(layout, recipe, assignments)
    weights = layout.weights.restack_unquantized(
        lambda name: name in assignments and assignments[name].format is not None
    )
    names = names_of(layout, weights)
    assignments = {name: assignment for name, assignment in assignments.items() if name in weights.tensors}
    units = units_of(layout, names)
    outputs = {name: outputs_of(weights, name, assignments.get(name)) for unit in units for name in unit}
    attention = kv_cache_modules(layout, recipe, units)
    outputs |= kv_scale_outputs(weights, attention)
    expert_formats = {a.format.name for n, a in assignments.items() if a.format is not None and names[n].routed}
    return Decisions(
        weights=weights,
        names=names,
        assignments=assignments,
        outputs=outputs,
        attention=attention,
        unverified=tuple(unverified_formats(layout.checkpoint, expert_formats)),
    )


def outputs_of(weights: LogicalWeights, name: str, assignment: Assignment | None) -> tuple[TensorInfo, ...]:
    """The tensors that are written for one logical weight."""
    info = weights.tensors[name]
    if assignment is None or assignment.format is None:
        return (info,)
    module = name.removesuffix(".weight")
    if assignment.keeps_codes and weights.origins[name].part is None:
        headers = {s: weights.checkpoint.tensors[part] for s, part in weights.origins[name].parts.items()}
        given = {suffix: (tensor.dtype, tensor.shape) for suffix, tensor in headers.items()}
        parts = compressed_tensors.copied_layout(assignment.format, given, info.shape)
    else:
        parts = compressed_tensors.layout(assignment.format, info.shape, info.dtype)
    return tuple(TensorInfo(f"{module}.{suffix}", dtype, shape) for suffix, (dtype, shape) in parts.items())


def _changes_nothing(layout: ModelLayout, recipe: LoadedRecipe, assignments: Mapping[str, Assignment]) -> UserError:
    """Why a recipe that makes no codes is refused."""
    labels = ", ".join(dict.fromkeys(a.format.label() for a in assignments.values() if a.format is not None))
    if not labels:
        what = "this recipe quantizes nothing in this model."
        remedy = "Give at least one rule another format than `keep`."
        return UserError(what, code="recipe-changes-nothing", where=recipe.where, remedy=remedy)
    return UserError(
        f"already quantized (quant_method {layout.method or 'unknown'!r}: {labels}), as this recipe asks.",
        code="already-quantized",
        where=layout.checkpoint.name if layout.checkpoint.remote else str(layout.checkpoint.path),
        remedy="Start from the original, choose another format, or add `requantize: true` to a rule.",
    )
