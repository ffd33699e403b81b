"""A model's tensors as engines load them, and the ways in which recipes would store them, from headers alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from snugfit.dialects.packed import bits_of, quantization_of, serves, split_name, weights_of
from snugfit.dialects.reading import read_formats, read_quant_config
from snugfit.errors import UserError
from snugfit.formats.spec import TensorFormat
from snugfit.model.anatomy import find_decoder
from snugfit.model.language_config import positive, with_defaults
from snugfit.model.names import EXPERTS, parse_name
from snugfit.model.sources import Weights, single_weights
from snugfit.model.support import obstacles
from snugfit.quantization.plan import outputs_of
from snugfit.recipes.recipe import LoadedRecipe, builtin_names, load_recipe
from snugfit.recipes.resolve import resolve
from snugfit.storage.checkpoint import Checkpoint
from snugfit.storage.safetensors_header import TensorInfo
from snugfit.vram.fit import PlannedTensor
from snugfit.vram.weights import collapse_experts, is_served

AS_IT_IS = "as it is"
_NAMES: Mapping[str, str] = {"BF16": "bf16", "F16": "fp16", "F32": "fp32", "F64": "fp64"}


@dataclass(frozen=True)
class Source:
    """A model's served tensors, those of a layer's experts that are alike once: `counts` says how often each is there.

    `shapes` are those of the file's weights were they not packed, () for what serves them. `weights` are what recipes
    see, None where `refused` says why none can start from this file; of 3-D tensors the first expert stands for all.
    """

    checkpoint: Checkpoint
    decoder: str
    layers: int
    counts: Mapping[str, int]
    formats: Mapping[str, TensorFormat]
    shapes: Mapping[str, tuple[int, ...]]
    unread: str | None
    weights: Weights | None
    refused: UserError | None

    def elements(self) -> dict[str, int]:
        """Numbers of the model behind each tensor of the file, and behind each weight that a recipe sees."""
        seen = {} if self.weights is None else self.weights.tensors
        taken = {name: info.elements for name, info in seen.items()}
        return taken | {name: math.prod(shape) if shape else 0 for name, shape in self.shapes.items()}


@dataclass(frozen=True)
class Candidate:
    """One way to store the weights. `recipes` write a 16-bit cache, `with_fp8_cache` FP8 caches under scales."""

    name: str
    stored: tuple[PlannedTensor, ...]
    recipes: tuple[str, ...] = ()
    with_fp8_cache: tuple[str, ...] = ()
    problem: str | None = None


def read_source(checkpoint: Checkpoint) -> Source:
    """The tensors that engines load: no heads of multi-token prediction, no output head that is tied."""
    text = with_defaults(checkpoint.config)
    layers = positive(text, "num_hidden_layers")
    decoder = find_decoder(checkpoint.tensors, layers, where=str(checkpoint.path))
    tied = any(config.get("tie_word_embeddings") for config in (checkpoint.config, text))
    loaded = (
        tensor
        for name, tensor in checkpoint.tensors.items()
        if is_served(name, decoder, layers) and not (tied and name.endswith("lm_head.weight"))
    )
    counts = {weight.info.name: weight.count for weight in collapse_experts(loaded)}
    few = replace(checkpoint, tensors={name: checkpoint.tensors[name] for name in counts})
    own = None if checkpoint.remote else read_quant_config(checkpoint.path)
    formats: Mapping[str, TensorFormat] = {}
    unread = None
    try:
        headers = {name: (info.dtype, info.shape) for name, info in few.tensors.items()}
        formats = read_formats(checkpoint.config, _linears(few, decoder), headers, own)
    except UserError as error:
        unread = error.what.rstrip(".")
    shapes = _shapes(few, formats, bits_of(quantization_of(checkpoint.config, own)))
    weights, refused = None, None
    try:
        weights, more = _first_experts(single_weights(few))
        counts |= more
    except UserError as error:
        refused = error
    return Source(few, decoder, layers, counts, formats, shapes, unread, weights, refused)


def _linears(checkpoint: Checkpoint, decoder: str) -> list[str]:
    """Modules of decoder layers whose weight is a matrix, or is packed."""
    matrices = [info for name, info in checkpoint.tensors.items() if _is_weight(name) and len(info.shape) == 2]
    names = [parse_name(info.name, info.shape, decoder) for info in matrices]
    return list(dict.fromkeys(name.module for name in names if name.layer is not None))


def _shapes(
    checkpoint: Checkpoint, formats: Mapping[str, TensorFormat], bits: int | None
) -> dict[str, tuple[int, ...]]:
    """Shape of the weight that each tensor stands for, () for scales and the like."""
    modules: dict[str, dict[str, TensorInfo]] = {}
    for name, tensor in checkpoint.tensors.items():
        module, suffix = split_name(name)
        modules.setdefault(module, {})[suffix] = tensor
    found: dict[str, tuple[int, ...]] = {}
    for module, parts in modules.items():
        fmt = formats.get(module)
        known = int(fmt.name[3:]) if fmt is not None and fmt.name in ("int4", "int8") else bits
        packed = weights_of({suffix: (info.dtype, info.shape) for suffix, info in parts.items()}, known)
        heads = {weight.tensor: weight.shape for weight in packed}
        for suffix, info in parts.items():
            found[info.name] = heads.get(suffix, () if serves(suffix) else info.shape)
    return found


def _first_experts(weights: Weights) -> tuple[Weights, dict[str, int]]:
    """The same with the first expert of each 3-D tensor for all of them, and how many each then stands for."""
    counts: dict[str, int] = {}
    stacks: dict[str, tuple[str, ...]] = {}
    others: set[str] = set()
    for stack, names in weights.stacks.items():
        slots = {name: weights.sources[name].slot for name in names}
        first = tuple(name for name, slot in slots.items() if slot is not None and slot.expert == 0)
        stacks[stack] = first
        counts |= dict.fromkeys(first, len(names) // len(first))
        others.update(names[len(first) :])
    tensors = {name: info for name, info in weights.tensors.items() if name not in others}
    sources = {name: source for name, source in weights.sources.items() if name not in others}
    return Weights(tensors, sources, stacks, weights.whole), counts


def candidates_of(source: Source, asked: Sequence[str]) -> tuple[list[Candidate], list[str]]:
    """The model as it is, and what recipes make of it; recipes that store the same bytes are one.

    Where none is asked for, all built-in ones, those for mixtures of experts only of a mixture.
    """
    candidates = [_as_it_is(source)]
    if source.weights is None:
        error = source.refused
        assert error is not None
        if asked:
            raise UserError(error.what, where=error.where, remedy=f"{error.remedy} Or leave --recipe out.")
        return candidates, [f"no recipe: {error.what} {error.remedy}"]
    mixture = any(parse_name(t.name, t.shape, source.decoder).routed for t in source.weights.tensors.values())
    found: dict[Any, Candidate] = {}
    for name in asked or builtin_names():
        loaded = load_recipe(name)
        if not asked and not mixture and any(EXPERTS in rule.role for rule in loaded.recipe.rules):
            continue
        try:
            stored = _stored_by(loaded, source, source.weights)
        except UserError as error:
            reason = error.what.rstrip(".")
            others = found[reason].recipes if reason in found else ()
            found[reason] = Candidate(shortest((*others, name)), (), (*others, name), problem=reason)
            continue
        key = tuple((weight.format, weight.infos) for weight in stored)
        known = found.get(key, Candidate(name, stored))
        plain, scaled = known.recipes, known.with_fp8_cache
        if getattr(loaded.recipe, "kv_cache", None) is None:
            plain = (*plain, name)
        else:
            scaled = (*scaled, name)
        found[key] = Candidate(shortest((*plain, *scaled)), stored, plain, scaled)
    return [*candidates, *found.values()], []


def shortest(names: Iterable[str]) -> str:
    """The shortest name: the plain recipe of several that store the same bytes."""
    return min(names, key=lambda name: (len(name), name))


def _as_it_is(source: Source) -> Candidate:
    """The file's own weights."""
    tensors = source.checkpoint.tensors
    stored = tuple(
        PlannedTensor(
            name,
            source.shapes[name],
            (info,),
            source.formats.get(name.rpartition(".")[0]) if _is_weight(name) else None,
            source.counts[name],
        )
        for name, info in tensors.items()
    )
    labels = dict.fromkeys(fmt.label() for fmt in source.formats.values())
    method = _method(source.checkpoint.config)
    if labels or method:
        name = ", ".join(labels) or str(method)
    else:
        largest = max(tensors.values(), key=lambda info: info.elements)
        name = _NAMES.get(largest.dtype, largest.dtype.lower())
    return Candidate(f"{name}, {AS_IT_IS}", stored)


def _method(config: Mapping[str, Any]) -> str | None:
    given = config.get("quantization_config") or with_defaults(config).get("quantization_config")
    return None if not given else str(given.get("quant_method", "unknown")) if isinstance(given, dict) else "unknown"


def _is_weight(name: str) -> bool:
    return name.endswith((".weight", ".weight_packed", ".qweight"))


def _stored_by(loaded: LoadedRecipe, source: Source, weights: Weights) -> tuple[PlannedTensor, ...]:
    """What a recipe stores; UserError where a run would be refused. A test holds the bytes to plan_quantization."""
    for obstacle in obstacles(source.checkpoint):
        raise obstacle
    seen = list(weights.tensors.values())
    assignments = resolve(loaded, seen, layers=source.layers, decoder=source.decoder, stored=weights.formats)
    if loaded.recipe.kv_cache is None and all(a.format is None or a.copied for a in assignments.values()):
        labels = ", ".join(dict.fromkeys(a.format.label() for a in assignments.values() if a.format is not None))
        what = f"the weights are {labels} already, as this recipe asks." if labels else "this recipe quantizes nothing."
        raise UserError(what, where=loaded.where)
    weights = weights.keep_whole(lambda name: name in assignments and assignments[name].format is not None)
    formats_of = {name: a.format.name for name, a in assignments.items() if a.format is not None}
    routed = {fmt for name, fmt in formats_of.items() if parse_name(name, (1, 1), source.decoder).routed}
    for obstacle in obstacles(source.checkpoint, experts=routed):
        raise obstacle
    stored = []
    for name, info in weights.tensors.items():
        assignment = assignments.get(name)
        infos = outputs_of(source.checkpoint, weights, name, assignment)
        fmt = None if assignment is None else assignment.format
        stored.append(PlannedTensor(name, info.shape, infos, fmt, source.counts.get(name, 1)))
    return tuple(stored)
