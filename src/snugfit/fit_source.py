"""A model's tensors as engines load them, and the ways in which recipes would store them, from headers alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from snugfit.dialects import compressed_tensors as dialect
from snugfit.dialects.reading import read_formats, read_quant_config
from snugfit.errors import UserError
from snugfit.formats.spec import TensorFormat
from snugfit.model.anatomy import find_decoder
from snugfit.model.checkpoint import Checkpoint, TensorInfo
from snugfit.model.names import parse_name
from snugfit.planning.read_cache import positive, with_defaults
from snugfit.planning.solve import Stored
from snugfit.planning.weights import collapse_experts, is_served
from snugfit.quantize_plan import FP8_SCALES, Plan
from snugfit.recipe import LoadedRecipe, builtin_names, load_recipe, resolve

AS_IT_IS = "as it is"
_NAMES: Mapping[str, str] = {"BF16": "bf16", "F16": "fp16", "F32": "fp32", "F64": "fp64"}


@dataclass(frozen=True)
class Source:
    """A model's served tensors, a layer's experts as one: how often each is there, and what recipes see of it.

    `seen` has FP8 weights as if dequantized; `scales` maps their scales to them.
    """

    checkpoint: Checkpoint
    decoder: str
    layers: int
    tensors: Mapping[str, TensorInfo]
    counts: Mapping[str, int]
    seen: Mapping[str, TensorInfo]
    scales: Mapping[str, str]


@dataclass(frozen=True)
class Candidate:
    """One way to store the weights. `recipes` write a 16-bit cache, `with_fp8_cache` FP8 caches under scales."""

    name: str
    stored: tuple[Stored, ...]
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
    weights = collapse_experts(loaded)
    tensors = {weight.info.name: weight.info for weight in weights}
    counts = {weight.info.name: weight.count for weight in weights}
    seen: dict[str, TensorInfo] = {}
    scales: dict[str, str] = {}
    for name, tensor in tensors.items():
        module, _, parameter = name.rpartition(".")
        if parameter in FP8_SCALES and f"{module}.weight" in tensors:
            scales[name] = f"{module}.weight"
        elif parameter == "weight" and tensor.dtype == "F8_E4M3":
            seen[name] = TensorInfo(name, "BF16", tensor.shape)
        else:
            seen[name] = tensor
    return Source(checkpoint, decoder, layers, tensors, counts, seen, scales)


def candidates_of(source: Source, asked: Sequence[str]) -> tuple[list[Candidate], list[str]]:
    """The model as it is, and what recipes make of it; recipes that store the same bytes are one."""
    original, quantized = _as_it_is(source)
    candidates = [original]
    if quantized is not None:
        remedy = f"{quantized}: recipes start from the 16-bit original"
        if asked:
            raise UserError(f"{remedy}.", where=str(source.checkpoint.path), remedy="Leave --recipe out.")
        return candidates, [remedy]
    found: dict[Any, Candidate] = {}
    for name in asked or builtin_names():
        loaded = load_recipe(name)
        try:
            stored = _stored_by(loaded, source)
        except UserError as error:
            reason = error.what.rstrip(".")
            others = found[reason].recipes if reason in found else ()
            found[reason] = Candidate(shortest((*others, name)), (), (*others, name), problem=reason)
            continue
        key = tuple(weight.format for weight in stored)
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


def _as_it_is(source: Source) -> tuple[Candidate, str | None]:
    """The file's own weights, and what is said of it where it is quantized so that no recipe can start from it."""
    headers = {name: (info.dtype, info.shape) for name, info in source.tensors.items()}
    modules = [name.rpartition(".")[0] for name, info in source.tensors.items() if _is_linear(source, info)]
    checkpoint = source.checkpoint
    formats: dict[str, TensorFormat] = {}
    unread = None
    try:
        own = None if checkpoint.remote else read_quant_config(checkpoint.path)
        formats = read_formats(checkpoint.config, dict.fromkeys(modules), headers, own)
    except UserError as error:
        unread = error.what.rstrip(".")
    stored = tuple(
        Stored(
            name,
            info.shape,
            (info,),
            formats.get(name.rpartition(".")[0]) if _is_weight(name) else None,
            source.counts[name],
        )
        for name, info in source.tensors.items()
    )
    labels = dict.fromkeys(fmt.label() for fmt in formats.values())
    method = _method(checkpoint.config)
    if labels or method:
        name = ", ".join(labels) or str(method)
    else:
        largest = max(source.tensors.values(), key=lambda info: info.elements)
        name = _NAMES.get(largest.dtype, largest.dtype.lower())
    only_fp8 = (
        method in (None, "fp8") and all(fmt.name.startswith("fp8") for fmt in formats.values()) and unread is None
    )
    quantized = None if only_fp8 else f"the file is quantized already ({unread or name})"
    return Candidate(f"{name}, {AS_IT_IS}", stored), quantized


def _method(config: Mapping[str, Any]) -> str | None:
    given = config.get("quantization_config") or with_defaults(config).get("quantization_config")
    return None if not given else str(given.get("quant_method", "unknown")) if isinstance(given, dict) else "unknown"


def _is_weight(name: str) -> bool:
    return name.endswith((".weight", ".weight_packed", ".qweight"))


def _is_linear(source: Source, info: TensorInfo) -> bool:
    parsed = parse_name(info.name, info.shape, source.decoder)
    return parsed.layer is not None and _is_weight(info.name) and len(info.shape) == 2


def _stored_by(loaded: LoadedRecipe, source: Source) -> tuple[Stored, ...]:
    """What a recipe stores; UserError where it does not suit the model. A test holds the bytes to plan_quantization."""
    assignments = resolve(loaded, list(source.seen.values()), layers=source.layers, decoder=source.decoder)
    stored = []
    for name, info in source.tensors.items():
        assigned = assignments.get(source.scales.get(name, name))
        fmt = None if assigned is None else assigned.format
        infos: tuple[TensorInfo, ...] = (info,)
        if fmt is not None:
            parts = {} if name in source.scales else dialect.layout(fmt, info.shape, source.seen[name].dtype)
            module = name.rpartition(".")[0]
            infos = tuple(TensorInfo(f"{module}.{suffix}", *header) for suffix, header in parts.items())
        if infos:
            stored.append(Stored(name, info.shape, infos, fmt, source.counts[name]))
    return tuple(stored)


def stored_by_plan(plan: Plan) -> tuple[Stored, ...]:
    """What a planned run stores, of all that engines load."""
    return tuple(
        Stored(
            name,
            plan.checkpoint.tensors[name].shape if name in plan.checkpoint.tensors else infos[0].shape,
            infos,
            plan.assignments[name].format if name in plan.assignments else None,
        )
        for name, infos in plan.outputs.items()
        if infos and is_served(name, plan.decoder, plan.layers)
    )
