"""What a quantize run will do, decided and checked on headers alone before any weight is read. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from snugfit.dialects import compressed_tensors as dialect
from snugfit.dialects.reading import kv_cache_format
from snugfit.engines.fused import group_modules
from snugfit.engines.kv_cache import attention_modules
from snugfit.errors import UserError
from snugfit.formats.spec import TensorFormat
from snugfit.model.anatomy import find_decoder
from snugfit.model.names import TensorName, parse_name
from snugfit.model.sources import Weights, language_configs, single_weights, text_config
from snugfit.model.support import check_experts, obstacles, outside_interface
from snugfit.recipes.assignment import Assignment
from snugfit.recipes.recipe import LoadedRecipe, load_recipe, parse_recipe
from snugfit.recipes.resolve import resolve
from snugfit.records.quantize import TensorRecord
from snugfit.storage.checkpoint import Checkpoint
from snugfit.storage.open import open_headers
from snugfit.storage.safetensors_header import TensorInfo
from snugfit.storage.shards import Shard, plan_shards

# a thirty-second of the model, but no smaller and no larger: whole files are digested while others are written
SHARD_BYTES = 500_000_000, 5_000_000_000
KEPT = "as it was"


@dataclass(frozen=True)
class Plan:
    """Everything that headers and recipe decide: what each weight becomes, and where its bytes go.

    `weights` are the model's tensors as a recipe sees them, and where each comes from. `decoder` is the decoder layers'
    name in the file, e.g. model.layers. `units` are names of tensors that are in memory together: first all outside the
    decoder layers, then a layer each; tensors of layers that transformers does not run (multi-token prediction) count
    as outside. `outputs` are what is written for each tensor, and for scales that the source has not; `attention` are
    the modules of layers whose keys and values get such scales. `obstacles` are why a run would be refused, though its
    plan can be made.
    """

    checkpoint: Checkpoint
    weights: Weights
    decoder: str
    recipe: LoadedRecipe
    assignments: Mapping[str, Assignment]
    outputs: Mapping[str, tuple[TensorInfo, ...]]
    units: tuple[tuple[str, ...], ...]
    attention: Mapping[int, str]
    shards: tuple[Shard, ...]
    config: Mapping[str, Any]
    obstacles: tuple[UserError, ...]

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.units) - 1

    @property
    def calibrated(self) -> bool:
        """Whether any format needs activations."""
        return bool(self.attention) or any(a.calibrated for a in self.assignments.values())

    @property
    def bytes(self) -> int:
        """Bytes of all tensors to be written, without headers."""
        return sum(info.bytes for infos in self.outputs.values() for info in infos)

    def records(self) -> tuple[TensorRecord, ...]:
        """A record of each tensor, without what only the run can know."""
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
        label, scale = (fmt.label(), assignment.scale_rule) if fmt and assignment else (KEPT, "")
        return TensorRecord(name, info.shape, label, scale, self.weights.bytes(self.checkpoint, name), written)

    def layer_of(self, number: int) -> tuple[str, ...]:
        """Tensors of decoder layer `number`."""
        return self.units[number + 1]


KV_CACHE = "fp8 KV cache"


def plan_quantization(source: str | Path, recipe: str | LoadedRecipe, *, max_shard_bytes: int | None = None) -> Plan:
    """Decide on headers alone what `recipe` (a built-in name, a YAML file, or a loaded one) does to a model.

    `source` is a directory or a Hugging Face id. Reads no weights. Raises UserError for a broken checkpoint, one that
    is quantized already, and for whatever is wrong with the recipe for this model.
    """
    if max_shard_bytes is not None and max_shard_bytes < 1:
        raise UserError(f"no weight file fits into {max_shard_bytes} bytes.", remedy="Raise --max-shard-size.")
    loaded = load_recipe(recipe) if isinstance(recipe, str) else recipe
    opened = _open(source)
    checkpoint, decoder = opened.checkpoint, opened.decoder
    assignments = resolve(
        loaded,
        list(opened.weights.tensors.values()),
        layers=opened.layers,
        decoder=decoder,
        frozen=opened.frozen,
        stored=opened.weights.formats,
    )
    if loaded.recipe.kv_cache is None and all(a.format is None or a.copied for a in assignments.values()):
        raise _nothing_to_do(checkpoint, loaded, assignments)
    opened = opened.keep_whole(lambda name: name in assignments and assignments[name].format is not None)
    weights, names, units, tensors = opened.weights, opened.names, opened.units, opened.weights.tensors
    assignments = {name: assignment for name, assignment in assignments.items() if name in tensors}
    formats = {names[name].module: a.format for name, a in assignments.items() if a.format is not None}
    outputs = {name: outputs_of(checkpoint, weights, name, assignments.get(name)) for unit in units for name in unit}
    attention = _attention(checkpoint, loaded, units, decoder)
    outputs |= _cache_outputs(checkpoint, tensors, attention, outputs)
    ignore = _unquantized(tensors, names, formats)
    routed = {a.format.name for name, a in assignments.items() if a.format is not None and names[name].routed}
    written = [info for infos in outputs.values() for info in infos]
    low, high = SHARD_BYTES
    default = max(low, min(high, sum(info.bytes for info in written) // 32))
    shards = plan_shards(written, max_shard_bytes or default)
    cache = loaded.recipe.kv_cache or _kept_cache(checkpoint)
    quantization = dialect.quantization_config(formats, ignore, cache)
    config = _without_quantization(checkpoint.config) | {"quantization_config": quantization}
    return Plan(
        checkpoint,
        weights,
        decoder,
        loaded,
        assignments,
        outputs,
        units,
        attention,
        tuple(shards),
        config,
        obstacles(checkpoint, experts=routed),
    )


_NOTHING = "name: none\nrules:\n- {role: linear, format: keep}\n"


def plan_walk(source: str | Path) -> Plan:
    """A plan that writes nothing: rows pass the model as it is, keys and values of every attention are looked at."""
    opened = _open(source)
    opened = opened.keep_whole(opened.weights.formats.__contains__)
    checkpoint, units = opened.checkpoint, opened.units
    loaded = parse_recipe(_NOTHING, where="")
    try:
        attention = _attention_of(checkpoint, units, opened.decoder, where="")
    except UserError:  # a family whose cache is of another kind
        attention = {}
    return Plan(
        *(checkpoint, opened.weights, opened.decoder, loaded, {}, {}, units, attention, (), checkpoint.config, ())
    )


@dataclass(frozen=True)
class _Opened:
    """A checkpoint that a run can start from, its tensors taken apart and named; `frozen` as `_frozen` gives it."""

    checkpoint: Checkpoint
    layers: int
    decoder: str
    weights: Weights
    names: Mapping[str, TensorName]
    frozen: Mapping[str, str]

    @property
    def units(self) -> tuple[tuple[str, ...], ...]:
        """Tensors outside the decoder's layers, then those of each layer."""
        return _units(self.names, self.frozen, self.layers)

    def keep_whole(self, taken: Callable[[str], bool]) -> _Opened:
        """The same, with tensors of all experts together where `taken` asks for none of them."""
        weights, names = self.weights.keep_whole(taken), self.names
        named = {
            name: names[name] if name in names else parse_name(name, t.shape, self.decoder)
            for name, t in weights.tensors.items()
        }
        return replace(self, weights=weights, names=named)


def _open(source: str | Path) -> _Opened:
    """UserError for what no run can start from."""
    checkpoint = open_headers(source)
    for outside in outside_interface(checkpoint):
        raise outside
    layers = _layer_count(checkpoint)
    weights = single_weights(checkpoint)
    decoder = find_decoder(weights.tensors, layers, where=str(checkpoint.path))
    names = {t.name: parse_name(t.name, t.shape, decoder) for t in weights.tensors.values()}
    _check_layers(checkpoint, names, layers, decoder)
    check_experts(checkpoint, names.values(), layers)
    return _Opened(checkpoint, layers, decoder, weights, names, _frozen(checkpoint, names, layers))


def groups_of(plan: Plan, unit: Sequence[str], walked: bool) -> list[tuple[str, ...]]:
    """A unit's tensors in the order they are read: fused groups of quantized weights, then (if walked) the rest."""
    assigned = [name for name in unit if (a := plan.assignments.get(name)) and a.format is not None]
    groups = group_modules(name.removesuffix(".weight") for name in assigned)
    found = [tuple(f"{module}.weight" for module in group) for group in groups]
    quantized = set(assigned)
    # biases of single experts are parts of a tensor, and cannot be copied from file to file
    alone = [name for name in unit if name in plan.weights.sources and name in plan.outputs]
    rest = tuple(name for name in (unit if walked else alone) if name not in quantized)
    return [*found, rest] if rest else found


def _units(names: Mapping[str, TensorName], frozen: Mapping[str, str], layers: int) -> tuple[tuple[str, ...], ...]:
    units: list[list[str]] = [[] for _ in range(layers + 1)]
    for name, parsed in names.items():
        units[0 if parsed.layer is None or name in frozen else parsed.layer + 1].append(name)
    return tuple(tuple(unit) for unit in units)


def _attention(
    checkpoint: Checkpoint, loaded: LoadedRecipe, units: Sequence[Sequence[str]], decoder: str
) -> dict[int, str]:
    """Layer -> the module whose keys and values get scales; empty where the recipe asks for none."""
    if loaded.recipe.kv_cache is None:
        return {}
    attention = _attention_of(checkpoint, units, decoder, where=f"{loaded.where}: kv_cache")
    if not attention:
        what = "this model has no layer that keeps keys and values."
        raise UserError(what, where=f"{loaded.where}: kv_cache", remedy="Take it out.")
    return attention


def _nothing_to_do(checkpoint: Checkpoint, loaded: LoadedRecipe, assignments: Mapping[str, Assignment]) -> UserError:
    """Why a recipe that makes no codes is refused."""
    labels = ", ".join(dict.fromkeys(a.format.label() for a in assignments.values() if a.format is not None))
    if not labels:
        return UserError("this recipe quantizes nothing.", where=loaded.where, remedy="Give one rule another format.")
    configs = (config.get("quantization_config") for config in language_configs(checkpoint.config))
    method = next((config.get("quant_method") for config in configs if isinstance(config, dict)), "unknown")
    return UserError(
        f"already quantized (quant_method {method!r}: {labels}), as this recipe asks.",
        where=str(checkpoint.path),
        remedy="Start from the original, choose another format, or add `requantize: true` to a rule.",
    )


def _cache_outputs(
    checkpoint: Checkpoint,
    tensors: Mapping[str, TensorInfo],
    attention: Mapping[int, str],
    outputs: Mapping[str, object],
) -> dict[str, tuple[TensorInfo, ...]]:
    """Scales of an FP8 cache of these attention modules; UserError where the source has such already."""
    found: dict[str, tuple[TensorInfo, ...]] = {}
    for module in attention.values():
        dtype = next(t.dtype for t in tensors.values() if t.name.startswith(f"{module}."))
        parts = dialect.kv_layout(module, dtype)
        if not outputs.keys().isdisjoint(parts):
            what = f"{module} has scales of an FP8 cache already."
            raise UserError(what, where=str(checkpoint.path), remedy="Take `kv_cache` out of the recipe: they stay.")
        found |= {name: (TensorInfo(name, *header),) for name, header in parts.items()}
    return found


def _attention_of(
    checkpoint: Checkpoint, units: Sequence[Sequence[str]], decoder: str, *, where: str
) -> dict[int, str]:
    """Layer -> the module that keeps keys and values."""
    inside = [[name for name in unit if name.startswith(f"{decoder}.")] for unit in units[1:]]
    found = attention_modules(inside, text_config(checkpoint.config), where=where)
    return {layer: module for layer, module in enumerate(found) if module is not None}


def _kept_cache(checkpoint: Checkpoint) -> Literal["fp8"] | None:
    """The FP8 cache that the source asks for, under scales that it brings along."""
    if not any(name.endswith((".k_scale", ".v_scale")) for name in checkpoint.tensors):
        return None
    return kv_cache_format(checkpoint.config)


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config that says nothing of the source's own quantization."""
    gone = ("quantization_config", "compression_config")
    found = {key: value for key, value in config.items() if key not in gone}
    nested = found.get("text_config")
    if isinstance(nested, dict) and any(key in nested for key in gone):
        found["text_config"] = {key: value for key, value in nested.items() if key not in gone}
    return found


def outputs_of(
    checkpoint: Checkpoint, weights: Weights, name: str, assignment: Assignment | None
) -> tuple[TensorInfo, ...]:
    """What is written for one tensor."""
    info = weights.tensors[name]
    if assignment is None or assignment.format is None:
        return (info,)
    module = name.removesuffix(".weight")
    if assignment.copied and assignment.format.name.startswith("fp8"):
        headers = {s: checkpoint.tensors[part] for s, part in weights.sources[name].parts.items()}
        parts = dialect.copied_layout(assignment.format, {s: (t.dtype, t.shape) for s, t in headers.items()})
    else:
        parts = dialect.layout(assignment.format, info.shape, info.dtype)
    return tuple(TensorInfo(f"{module}.{suffix}", dtype, shape) for suffix, (dtype, shape) in parts.items())


def _frozen(checkpoint: Checkpoint, names: Mapping[str, TensorName], layers: int) -> dict[str, str]:
    """Tensors that no rule may quantize, with the reason."""
    frozen = {
        name: "transformers does not run this layer"
        for name, parsed in names.items()
        if parsed.layer is not None and parsed.layer >= layers
    }
    if any(config.get("tie_word_embeddings") for config in (checkpoint.config, text_config(checkpoint.config))):
        frozen |= {name: "it is tied to the embeddings" for name, p in names.items() if p.role == "lm_head"}
    return frozen


def _unquantized(
    tensors: Mapping[str, TensorInfo], names: Mapping[str, TensorName], formats: Mapping[str, TensorFormat]
) -> list[str]:
    """Modules for `ignore`: every linear without a format, and a tied lm_head, which the file has not."""
    linears = [
        parsed.module
        for name, parsed in names.items()
        if parsed.parameter == "weight" and parsed.role not in ("embed", "norm") and len(tensors[name].shape) == 2
    ]
    head = [] if any(parsed.role == "lm_head" for parsed in names.values()) else ["lm_head"]
    return [module for module in dict.fromkeys([*linears, *head]) if module not in formats]


def _layer_count(checkpoint: Checkpoint) -> int:
    config = text_config(checkpoint.config)
    count = config.get("num_hidden_layers")
    if count is None:  # transformers may save a list of the layers' kinds alone
        kinds = (config.get(key) for key in ("layers_block_type", "layer_types"))
        count = next((len(kind) for kind in kinds if isinstance(kind, list)), None)
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        where = str(checkpoint.path / "config.json")
        raise UserError(f"num_hidden_layers is {count!r}.", where=where, remedy="Mend the config.")
    return count


def _check_layers(checkpoint: Checkpoint, names: Mapping[str, TensorName], layers: int, decoder: str) -> None:
    present = {parsed.layer for parsed in names.values()}
    absent = next((k for k in range(layers) if k not in present), None)
    if absent is not None:
        raise UserError(
            f"no tensor of {decoder}.{absent}, though the config has {layers} layers.",
            where=str(checkpoint.path),
            remedy="Config and weights do not belong together.",
        )


def check_linears(assignments: Mapping[str, Assignment], linears: Sequence[str], where: str) -> None:
    """UserError where a format is given to what transformers does not run as a linear."""
    known = set(linears)
    for name, assignment in assignments.items():
        module = name.removesuffix(".weight")
        if assignment.format is not None and not assignment.copied and module not in known:
            raise UserError(
                f"{module} is not a linear in transformers.",
                where=f"{where}: rules[{assignment.rule}]",
                remedy="Give it `format: keep` in a rule before.",
            )
