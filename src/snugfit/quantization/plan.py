"""What a quantization does to each tensor, decided from headers and a recipe before any weight is read. No torch.

`decide` gives every tensor its format and outputs; `fit` uses it too, so that both refuse the same. `lay_out` adds
where the bytes go: units that are in memory together, shards, and the config to write.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from snugfit.dialects import compressed_tensors
from snugfit.engines.fused import group_modules
from snugfit.engines.kernels import HEAD_ENGINES
from snugfit.engines.kv_cache import attention_modules, has_scales, scale_names
from snugfit.errors import UserError
from snugfit.formats.spec import DEFAULT_INPUT_HEADROOM, TensorFormat
from snugfit.model.language_config import nested_language_keys
from snugfit.model.layout import ModelLayout
from snugfit.model.logical_weights import LogicalWeights
from snugfit.model.loose import taken_note
from snugfit.model.names import TensorName, parse_name
from snugfit.model.support import unverified_formats
from snugfit.model.tied import untied
from snugfit.recipes.assignment import Assignment, runs_in_engines
from snugfit.recipes.recipe import LoadedRecipe
from snugfit.recipes.resolve import resolve
from snugfit.records.quantize import DEQUANTIZED, KV_CACHE, PASSTHROUGH, TensorRecord
from snugfit.storage.checkpoint import Checkpoint
from snugfit.storage.safetensors_header import TensorInfo
from snugfit.storage.shards import Shard, plan_shards

# a thirty-second of the model, within these bounds: whole files are digested while others are written
SHARD_BYTES = 500_000_000, 5_000_000_000
_FOUR_BITS = frozenset({"nvfp4", "nvfp4a16", "mxfp4", "int4"})


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


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that a run over a model's layers works on.

    `units` are names of tensors that are in memory together: first all outside the decoder layers, then one unit a
    layer; tensors of layers that transformers does not run on text (multi-token prediction, cross attention to
    pictures) count as outside. `observed_caches`
    maps a layer to the module whose keys and values are measured. `recipe` is None for a run that only measures; such
    a run has no assignments, outputs, shards or config. `input_headroom` is that of rules that name none, None if there
    is no such rule. `notes` are for the person who waits.
    """

    layout: ModelLayout
    weights: LogicalWeights
    units: tuple[tuple[str, ...], ...]
    observed_caches: Mapping[int, str]
    recipe: LoadedRecipe | None = None
    assignments: Mapping[str, Assignment]
    outputs: Mapping[str, tuple[TensorInfo, ...]]
    shards: tuple[Shard, ...] = ()
    config: Mapping[str, Any]
    input_headroom: float | None = None
    unverified: tuple[UserError, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def checkpoint(self) -> Checkpoint:
        """The source."""
        return self.layout.checkpoint

    @property
    def decoder(self) -> str:
        """The name of the list of decoder layers in the file."""
        return self.layout.decoder

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.units) - 1

    @property
    def needs_activations(self) -> bool:
        """Whether any format needs a scale that is measured."""
        return bool(self.observed_caches) or any(a.calibrated for a in self.assignments.values())

    @property
    def follows_effort(self) -> bool:
        """Whether the effort of the run decides how any weight is quantized."""
        return any(assignment.follows_effort for assignment in self.assignments.values())

    @property
    def bytes(self) -> int:
        """Bytes of all tensors to be written, without headers."""
        return sum(info.bytes for infos in self.outputs.values() for info in infos)

    def records(self) -> tuple[TensorRecord, ...]:
        """A record of each tensor, without what only the run can measure."""
        return tuple(self.record(name) for name in self.outputs)

    def record(self, name: str) -> TensorRecord:
        """The record of one of `outputs`."""
        infos = self.outputs[name]
        written = sum(info.bytes for info in infos)
        if name not in self.weights.tensors:
            return TensorRecord(name, infos[0].shape, KV_CACHE, "absmax", 0, written)
        info = self.weights.tensors[name]
        assignment = self.assignments.get(name)
        fmt = assignment.format if assignment else None
        origin = self.weights.origins.get(name)
        plain = PASSTHROUGH if origin is None or origin.format is None else DEQUANTIZED
        label, rule = (fmt.label(), assignment.scale_rule) if fmt and assignment else (plain, "")
        size = self.weights.file_bytes(name)
        return TensorRecord(name, info.shape, label, rule, size, written, input_headroom=self.headroom_of(name))

    def headroom_of(self, name: str) -> float | None:
        """How far the range of a weight's input scale goes beyond the calibrated one; None without such a scale."""
        assignment = self.assignments.get(name)
        return assignment.input_headroom if assignment is not None and assignment.calibrated else None

    def unit_of_layer(self, number: int) -> tuple[str, ...]:
        """Names of the tensors of decoder layer `number`."""
        return self.units[number + 1]

    def unit_digest(self, number: int) -> str:
        """A digest of what becomes of the tensors of unit `number`, whatever recipe says so."""
        attention = self.observed_caches.get(number - 1)
        scales = () if attention is None else (f"{attention}.k_scale", f"{attention}.v_scale")
        parts: list[Any] = [attention]
        for name in (*self.units[number], *scales):
            assignment = self.assignments.get(name)
            rule = None if assignment is None else (assignment.label(), assignment.scale_rule, assignment.objective)
            codes = assignment is not None and assignment.keeps_codes
            written = [(info.name, info.dtype, info.shape) for info in self.outputs.get(name, ())]
            parts.append((name, rule, codes, self.headroom_of(name), written))
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def copies(self, name: str, info: TensorInfo) -> bool:
        """Whether `info`, one of the outputs of the logical weight `name`, is a tensor of the source as it is."""
        assignment, origin = self.assignments.get(name), self.weights.origins.get(name)
        if assignment is None or not assignment.keeps_codes or origin is None or origin.part is not None:
            return False
        found = self.checkpoint.tensors.get(info.name)
        same = found is not None and (found.dtype, found.shape) == (info.dtype, info.shape)
        return same and self.weights.dialect.file_format is compressed_tensors

    def writes_kv_scales(self, layer: int) -> bool:
        """Whether scales of an FP8 KV cache are written for this layer."""
        return f"{self.observed_caches.get(layer)}.k_scale" in self.outputs


def decide(layout: ModelLayout, recipe: LoadedRecipe) -> Decisions:
    """What `recipe` does to the tensors of a model.

    Raises UserError for a blocker of the model, and for whatever is wrong with the recipe for this model.
    """
    layout.check_quantizable()
    assignments = resolve(
        recipe,
        list(layout.weights.tensors.values()),
        num_layers=layout.num_layers,
        decoder=layout.decoder,
        not_quantizable=layout.not_quantizable,
        unquantized=layout.unquantized,
        source_formats=layout.weights.formats,
    )
    if recipe.recipe.kv_cache is None and all(a.format is None or a.keeps_codes for a in assignments.values()):
        raise _changes_nothing(layout, recipe, assignments)
    weights = layout.weights.restack_unquantized(
        lambda name: name in assignments and assignments[name].format is not None
    )
    names = names_of(layout, weights)
    assignments = {name: assignment for name, assignment in assignments.items() if name in weights.tensors}
    units = units_of(layout, names)
    outputs = {name: _outputs_of(weights, name, assignments.get(name)) for unit in units for name in unit}
    attention = _kv_cache_modules(layout, recipe, units)
    outputs |= _kv_scale_outputs(weights, attention)
    expert_formats = {a.format.name for n, a in assignments.items() if a.format is not None and names[n].routed}
    return Decisions(
        weights=weights,
        names=names,
        assignments=assignments,
        outputs=outputs,
        attention=attention,
        unverified=tuple(unverified_formats(layout.checkpoint, expert_formats)),
    )


def lay_out(
    layout: ModelLayout,
    recipe: LoadedRecipe,
    *,
    max_shard_size: int | None = None,
    input_headroom: float = DEFAULT_INPUT_HEADROOM,
) -> Plan:
    """The plan of a run that quantizes a model by a recipe, weight files of at most `max_shard_size` bytes each.

    `input_headroom` is that of rules that neither name one nor a scale rule.
    """
    decisions = decide(layout, recipe)
    open_ones = {n: a for n, a in decisions.assignments.items() if a.calibrated and a.input_headroom is None}
    filled = {name: replace(one, input_headroom=input_headroom) for name, one in open_ones.items()}
    assignments = {**decisions.assignments, **filled}
    written = [info for infos in decisions.outputs.values() for info in infos]
    low, high = SHARD_BYTES
    default = max(low, min(high, sum(info.bytes for info in written) // 32))
    return Plan(
        layout=layout,
        weights=decisions.weights,
        units=units_of(layout, decisions.names),
        observed_caches=decisions.attention,
        recipe=recipe,
        assignments=assignments,
        outputs=decisions.outputs,
        shards=tuple(plan_shards(written, max_shard_size or default)),
        config=_config_to_write(layout, recipe, decisions),
        input_headroom=input_headroom if open_ones else None,
        unverified=decisions.unverified,
        notes=(
            *layout.contradictions,
            *([taken_note(layout.taken_in)] if layout.taken_in else []),
            *_cache_notes(layout, recipe),
            *_format_notes(decisions),
            *_headroom_notes(assignments.values()),
        ),
    )


def measure_only(layout: ModelLayout) -> Plan:
    """The plan of a run that writes nothing: it measures the inputs of every linear, and keys and values."""
    layout.check_quantizable()
    weights = layout.weights.restack_unquantized(layout.weights.formats.__contains__)
    units = units_of(layout, names_of(layout, weights))
    attention, notes = {}, [*layout.contradictions]
    try:
        attention = _attention_of(layout, units, where="")
    except UserError as error:  # a family whose cache is of another kind
        notes.append(f"keys and values are not measured: {error.what}")
    return Plan(
        layout=layout,
        weights=weights,
        units=units,
        observed_caches=attention,
        assignments={},
        outputs={},
        config=layout.checkpoint.config,
        notes=tuple(notes),
    )


def names_of(layout: ModelLayout, weights: LogicalWeights) -> dict[str, TensorName]:
    """The parsed name of each of `weights`, which may be restacked ones of the layout."""
    return {
        name: layout.names[name] if name in layout.names else parse_name(name, info.shape, layout.decoder)
        for name, info in weights.tensors.items()
    }


def units_of(layout: ModelLayout, names: Mapping[str, TensorName]) -> tuple[tuple[str, ...], ...]:
    """Names of the tensors outside the decoder layers, then of each layer."""
    units: list[list[str]] = [[] for _ in range(layout.num_layers + 1)]
    for name, parsed in names.items():
        inside = parsed.layer is not None and parsed.layer < layout.num_layers and name not in layout.not_quantizable
        units[parsed.layer + 1 if inside and parsed.layer is not None else 0].append(name)
    return tuple(tuple(unit) for unit in units)


def groups_of(plan: Plan, unit: Sequence[str], *, runs: bool) -> list[tuple[str, ...]]:
    """The tensors of a unit in the order in which they are read: fused groups of quantized weights, then each other.

    Without `runs` (the layer's forward pass is not needed) the rest is only what cannot be copied from file to file.
    """
    assigned = [name for name in unit if (a := plan.assignments.get(name)) and a.format is not None]
    groups = group_modules(name.removesuffix(".weight") for name in assigned)
    found = [tuple(f"{module}.weight" for module in group) for group in groups]
    quantized = set(assigned)
    # biases of single experts are parts of a tensor, and cannot be copied from file to file
    assembled = [name for name in unit if name in plan.weights.origins and name in plan.outputs]
    rest = [name for name in (unit if runs else assembled) if name not in quantized]
    return [*found, *_by_file_tensors(plan.weights, rest)]


def _by_file_tensors(weights: LogicalWeights, names: Sequence[str]) -> list[tuple[str, ...]]:
    """`names` one by one, so that little is in memory at once, but together if they are parts of the same tensor."""
    found: dict[object, list[str]] = {}
    for name in names:
        origin = weights.origins.get(name)
        key = name if origin is None or origin.part is None else (weights.parts(name), origin.part.expert)
        found.setdefault(key, []).append(name)
    return [tuple(group) for group in found.values()]


def _outputs_of(weights: LogicalWeights, name: str, assignment: Assignment | None) -> tuple[TensorInfo, ...]:
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


def _kv_cache_modules(layout: ModelLayout, recipe: LoadedRecipe, units: Sequence[Sequence[str]]) -> dict[int, str]:
    """Layer -> the module whose keys and values get scales; empty where the recipe asks for none."""
    if recipe.recipe.kv_cache is None:
        return {}
    where = f"{recipe.where}: kv_cache"
    attention = _attention_of(layout, units, where=where)
    if not attention:
        what = "this model has no layer that caches keys and values."
        raise UserError(what, code="recipe-not-quantizable", where=where, remedy="Remove `kv_cache` from the recipe.")
    return attention


def _attention_of(layout: ModelLayout, units: Sequence[Sequence[str]], *, where: str) -> dict[int, str]:
    """Layer -> the module that caches keys and values."""
    inside = [[name for name in unit if name.startswith(f"{layout.decoder}.")] for unit in units[1:]]
    found = attention_modules(inside, layout.config, where=where)
    return {layer: module for layer, module in enumerate(found) if module is not None}


def _kv_scale_outputs(weights: LogicalWeights, attention: Mapping[int, str]) -> dict[str, tuple[TensorInfo, ...]]:
    """Scales of an FP8 cache of these attention modules; UserError where the source has such scales already."""
    found: dict[str, tuple[TensorInfo, ...]] = {}
    for module in attention.values():
        dtype = next(t.dtype for t in weights.tensors.values() if t.name.startswith(f"{module}."))
        parts = compressed_tensors.kv_layout(module, dtype)
        layer = module.rpartition(".")[0]
        if any(name in weights.checkpoint.tensors for which in "kv" for name in scale_names(layer, which)):
            raise UserError(
                f"{module} has scales of an FP8 cache already, which the source's engine uses.",
                code="already-quantized",
                where=str(weights.checkpoint.path),
                remedy="Remove `kv_cache` from the recipe: they stay.",
            )
        found |= {name: (TensorInfo(name, *header),) for name, header in parts.items()}
    return found


def _config_to_write(layout: ModelLayout, recipe: LoadedRecipe, decisions: Decisions) -> dict[str, Any]:
    """The source's config.json with the quantization config of what is written in place of its own."""
    names = decisions.names
    formats = {names[name].module: a.format for name, a in decisions.assignments.items() if a.format is not None}
    cache = recipe.recipe.kv_cache or _kept_cache(layout)
    ignore = _ignored_modules(decisions, formats)
    config = _without_quantization(layout.checkpoint.config)
    if layout.tied.own_head:
        config = untied(config)
    return config | {"quantization_config": compressed_tensors.quantization_config(formats, ignore, cache)}


def _cache_notes(layout: ModelLayout, recipe: LoadedRecipe) -> list[str]:
    """What becomes of an FP8 cache that the source declares without scales."""
    if not layout.cache_without_scales or recipe.recipe.kv_cache is not None:
        return []
    kept = "stays declared" if _kept_cache(layout) else "is not declared in the result"
    return [f"the source's FP8 KV cache {kept}: {layout.cache_without_scales}"]


def _format_notes(decisions: Decisions) -> list[str]:
    """Which engines load a quantized head, and what becomes of codes of the source: of 4 bits, and not written."""
    assigned = decisions.assignments
    again = [
        name
        for name, fmt in decisions.weights.formats.items()
        if fmt.name in _FOUR_BITS and (a := assigned.get(name)) and a.format is not None and not a.keeps_codes
    ]
    head = any(a.format is not None and decisions.names[name].role == "lm_head" for name, a in assigned.items())
    notes = [HEAD_ENGINES] if head else []
    notes += [f"{len(again)} weights of 4 bits are quantized again: both losses add up"] if again else []
    return notes + _not_written(decisions)


def _headroom_notes(assignments: Iterable[Assignment]) -> list[str]:
    """How far the ranges of calibrated input scales go beyond what calibration sees, if any does."""
    counts = Counter(a.input_headroom for a in assignments if a.calibrated and a.input_headroom is not None)
    if not any(factor > 1 for factor in counts):
        return []
    parts = [f"{factor:g} times for {count} weights" for factor, count in sorted(counts.items(), reverse=True)]
    return [f"the range of input scales is the largest calibrated input {', '.join(parts)}"]


def _not_written(decisions: Decisions) -> list[str]:
    """What becomes of codes of the source in formats that are not written."""
    formats = {name: fmt for name, fmt in decisions.weights.formats.items() if not runs_in_engines(fmt)}
    if not formats:
        return []
    assigned = [decisions.assignments[name].format for name in formats if name in decisions.assignments]
    again = sum(fmt is not None for fmt in assigned)
    labels = ", ".join(dict.fromkeys(fmt.label() for fmt in formats.values()))
    what = f"{again} are quantized again as the recipe says, {len(formats) - again} are dequantized to 16 bits"
    return [f"codes in {labels} are not written: of {len(formats)} such weights of the source {what}"]


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without the quantization that it states, at any level that describes the language model."""
    removed = {"quantization_config", "compression_config"}
    if isinstance(config.get("quantization"), dict):  # MLX's
        removed.add("quantization")
    kept = {key: value for key, value in config.items() if key not in removed}
    return kept | {key: _without_quantization(kept[key]) for key in nested_language_keys(kept)}


def _kept_cache(layout: ModelLayout) -> Literal["fp8"] | None:
    """The FP8 cache that the source asks for, under scales that it has."""
    tensors = layout.checkpoint.tensors
    if not any(has_scales(tensors, f"{layout.decoder}.{number}") for number in range(layout.num_layers)):
        return None
    return layout.dialect.kv_cache_format()


def _ignored_modules(decisions: Decisions, formats: Mapping[str, TensorFormat]) -> list[str]:
    """Modules for `ignore`: every linear without a format, and a tied lm_head, which the file does not have."""
    linears = [
        parsed.module
        for name, parsed in decisions.names.items()
        if parsed.parameter == "weight"
        and parsed.role not in ("embed", "norm")
        and len(decisions.weights.tensors[name].shape) == 2
    ]
    head = [] if any(parsed.role == "lm_head" for parsed in decisions.names.values()) else ["lm_head"]
    return [module for module in dict.fromkeys([*linears, *head]) if module not in formats]


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
        where=str(layout.checkpoint.path),
        remedy="Start from the original, choose another format, or add `requantize: true` to a rule.",
    )
