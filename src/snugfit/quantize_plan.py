"""What a quantize run will do, decided and checked on headers alone before any weight is read. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snugfit.dialects import compressed_tensors as dialect
from snugfit.engines.fused import group_modules
from snugfit.engines.kv_cache import attention_modules
from snugfit.errors import UserError
from snugfit.formats.spec import TensorFormat
from snugfit.model.anatomy import find_decoder
from snugfit.model.checkpoint import Checkpoint, TensorInfo, open_headers
from snugfit.model.names import TensorName, parse_name
from snugfit.model.shards import Shard, plan_shards
from snugfit.recipe import Assignment, LoadedRecipe, load_recipe, resolve
from snugfit.records import TensorRecord

# a thirty-second of the model, but no smaller and no larger: whole files are digested while others are written
SHARD_BYTES = 500_000_000, 5_000_000_000
KEPT = "as it was"
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# what Hugging Face's FP8 releases and compressed-tensors keep beside FP8 weights
FP8_SCALES = ("weight_scale_inv", "weight_scale", "input_scale", "activation_scale")


@dataclass(frozen=True)
class Plan:
    """Everything that headers and recipe decide: what each source tensor becomes, and where its bytes go.

    `decoder` is the decoder layers' name in the file, e.g. model.layers. `units` are names of source tensors that are
    in memory together: first all outside the decoder layers, then a layer each; tensors of layers that transformers
    does not run (multi-token prediction) count as outside. `outputs` are what is written for each source tensor, and
    for scales that the source has not; `attention` are the modules of layers whose keys and values get such scales.
    `obstacles` are why a run would be refused, though its plan can be made.
    """

    checkpoint: Checkpoint
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
        return bool(self.attention) or any(
            a.format is not None and a.format.spec.calibrated for a in self.assignments.values()
        )

    @property
    def bytes(self) -> int:
        """Bytes of all tensors to be written, without headers."""
        return sum(info.bytes for infos in self.outputs.values() for info in infos)

    def records(self) -> tuple[TensorRecord, ...]:
        """A record of each source tensor, without what only the run can know."""
        return tuple(self.record(name) for name in self.outputs)

    def record(self, name: str) -> TensorRecord:
        """The record of one of `outputs`."""
        infos = self.outputs[name]
        written = sum(info.bytes for info in infos)
        if name not in self.checkpoint.tensors:
            return TensorRecord(name, infos[0].shape, KV_CACHE, "absmax", 0, written)
        source = self.checkpoint.tensors[name]
        assignment = self.assignments.get(name)
        fmt = assignment.format if assignment else None
        label, scale = (fmt.label(), assignment.scale) if fmt and assignment else (KEPT, "")
        return TensorRecord(name, source.shape, label, scale, source.bytes, written)


KV_CACHE = "fp8 KV cache"


def plan_quantization(source: str | Path, recipe: str | LoadedRecipe, *, max_shard_bytes: int | None = None) -> Plan:
    """Decide on headers alone what `recipe` (a built-in name, a YAML file, or a loaded one) does to a model.

    `source` is a directory or a Hugging Face id. Reads no weights. Raises UserError for a broken checkpoint, one that
    is quantized already, and for whatever is wrong with the recipe for this model.
    """
    if max_shard_bytes is not None and max_shard_bytes < 1:
        raise UserError(f"no weight file fits into {max_shard_bytes} bytes.", remedy="Raise --max-shard-size.")
    loaded = load_recipe(recipe) if isinstance(recipe, str) else recipe
    checkpoint = open_headers(source)
    layers = _layer_count(checkpoint)
    tensors, scales = _weights(checkpoint)
    decoder = find_decoder(tensors, layers, where=str(checkpoint.path))
    names = {t.name: parse_name(t.name, t.shape, decoder) for t in tensors.values()}
    _check_layers(checkpoint, names, layers, decoder)
    frozen = _frozen(checkpoint, names, layers)
    assignments = resolve(loaded, list(tensors.values()), layers=layers, decoder=decoder, frozen=frozen)
    formats = {names[name].module: a.format for name, a in assignments.items() if a.format is not None}
    if not formats:
        raise UserError("this recipe quantizes nothing.", where=loaded.where, remedy="Give one rule another format.")
    units = _units(checkpoint, names, frozen, layers, scales)
    outputs = {
        name: _outputs(checkpoint, name, tensors, assignments.get(scales.get(name, name))) for u in units for name in u
    }
    attention = _attention(checkpoint, loaded, units, decoder)
    for module in attention.values():
        dtype = next(t.dtype for t in tensors.values() if t.name.startswith(f"{module}."))
        parts = dialect.kv_layout(module, dtype)
        if not outputs.keys().isdisjoint(parts):
            what = f"{module} has scales of an FP8 cache already."
            raise UserError(what, where=str(checkpoint.path), remedy="Take `kv_cache` out of the recipe.")
        outputs |= {name: (TensorInfo(name, *header),) for name, header in parts.items()}
    ignore = _unquantized(tensors, names, formats)
    written = [info for infos in outputs.values() for info in infos]
    low, high = SHARD_BYTES
    default = max(low, min(high, sum(info.bytes for info in written) // 32))
    shards = plan_shards(written, max_shard_bytes or default)
    quantization = dialect.quantization_config(formats, ignore, loaded.recipe.kv_cache)
    config = dict(checkpoint.config) | {"quantization_config": quantization}
    return Plan(
        checkpoint,
        decoder,
        loaded,
        assignments,
        outputs,
        units,
        attention,
        tuple(shards),
        config,
        obstacles(checkpoint),
    )


def groups_of(plan: Plan, unit: Sequence[str], walked: bool) -> list[tuple[str, ...]]:
    """A unit's tensors in the order they are read: fused groups of quantized weights, then (if walked) the rest."""
    assigned = [name for name in unit if (a := plan.assignments.get(name)) and a.format is not None]
    groups = group_modules(name.removesuffix(".weight") for name in assigned)
    found = [tuple(f"{module}.weight" for module in group) for group in groups]
    quantized = set(assigned)
    rest = tuple(name for name in unit if name not in quantized) if walked else ()
    return [*found, rest] if rest else found


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def _weights(checkpoint: Checkpoint) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors as a recipe sees them, FP8 weights as if dequantized; and FP8 scales -> the weight they belong to."""
    _check_source(checkpoint)
    tensors: dict[str, TensorInfo] = {}
    scales: dict[str, str] = {}
    for name, tensor in checkpoint.tensors.items():
        module, _, parameter = name.rpartition(".")
        weight = f"{module}.weight"
        if parameter in FP8_SCALES and weight in checkpoint.tensors:
            scales[name] = weight
        elif parameter == "weight" and tensor.dtype == "F8_E4M3":
            tensors[name] = TensorInfo(name, "BF16", tensor.shape)
        else:
            tensors[name] = tensor
    return tensors, scales


def _check_source(checkpoint: Checkpoint) -> None:
    """UserError for a source whose codes cannot be taken apart again."""
    config = checkpoint.config.get("quantization_config") or text_config(checkpoint.config).get("quantization_config")
    method = config.get("quant_method", "unknown") if isinstance(config, dict) else "unknown" if config else None
    odd = next((t.name for t in checkpoint.tensors.values() if _is_quantized(checkpoint, t)), None)
    if odd is None and method in (None, "fp8"):
        return
    evidence = f"quant_method {method!r} in config.json" if method else f"tensor {odd}"
    raise UserError(
        f"already quantized ({evidence}).",
        where=str(checkpoint.path),
        remedy="Start from the original BF16, FP16 or FP32 checkpoint.",
    )


def _is_quantized(checkpoint: Checkpoint, tensor: TensorInfo) -> bool:
    """Whether it holds codes other than FP8 beside a scale."""
    if tensor.name.endswith((".weight_packed", ".qweight")):
        return True
    if not tensor.name.endswith(".weight") or tensor.dtype in ("BF16", "F16", "F32", "F64"):
        return False
    module = tensor.name.removesuffix(".weight")
    scaled = any(f"{module}.{suffix}" in checkpoint.tensors for suffix in FP8_SCALES)
    return not (tensor.dtype == "F8_E4M3" and scaled)


def _units(
    checkpoint: Checkpoint,
    names: Mapping[str, TensorName],
    frozen: Mapping[str, str],
    layers: int,
    scales: Mapping[str, str],
) -> tuple[tuple[str, ...], ...]:
    units: list[list[str]] = [[] for _ in range(layers + 1)]
    for name in checkpoint.tensors:
        weight = scales.get(name, name)
        layer = names[weight].layer
        units[0 if layer is None or weight in frozen else layer + 1].append(name)
    return tuple(tuple(unit) for unit in units)


def _attention(
    checkpoint: Checkpoint, loaded: LoadedRecipe, units: Sequence[Sequence[str]], decoder: str
) -> dict[int, str]:
    """Layer -> the module whose keys and values get scales; empty where the recipe asks for none."""
    if loaded.recipe.kv_cache is None:
        return {}
    inside = [[name for name in unit if name.startswith(f"{decoder}.")] for unit in units[1:]]
    found = attention_modules(inside, text_config(checkpoint.config), where=f"{loaded.where}: kv_cache")
    attention = {layer: module for layer, module in enumerate(found) if module is not None}
    if not attention:
        what = "this model has no layer that keeps keys and values."
        raise UserError(what, where=f"{loaded.where}: kv_cache", remedy="Take it out.")
    return attention


def _outputs(
    checkpoint: Checkpoint, name: str, tensors: Mapping[str, TensorInfo], assignment: Assignment | None
) -> tuple[TensorInfo, ...]:
    """What is written for one source tensor; nothing for the old scales of a weight that gets another format."""
    if assignment is None or assignment.format is None:
        source = checkpoint.tensors[name]
        return (TensorInfo(source.name, source.dtype, source.shape),)
    if name not in tensors:
        return ()
    weight = tensors[name]
    module = name.removesuffix(".weight")
    parts = dialect.layout(assignment.format, weight.shape, weight.dtype)
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


def obstacles(checkpoint: Checkpoint) -> tuple[UserError, ...]:
    """Why a run would damage this model quietly: experts need calibration of their own, FP8 sources a reader."""
    configs = (checkpoint.config, text_config(checkpoint.config))
    counts = [config.get(key) for config in configs for key in EXPERT_COUNTS]
    where = str(checkpoint.path / "config.json")
    found = []
    if any(isinstance(count, int) and count > 1 for count in counts):
        found.append(
            UserError("a mixture of experts, which is not handled yet.", where=where, remedy="Use a dense model.")
        )
    codes = any(tensor.dtype == "F8_E4M3" for tensor in checkpoint.tensors.values())
    if codes or any(config.get("quantization_config") for config in configs):
        found.append(
            UserError(
                "already quantized (quant_method 'fp8' in config.json).",
                where=str(checkpoint.path),
                remedy="Start from the original BF16, FP16 or FP32 checkpoint.",
            )
        )
    return tuple(found)


def _layer_count(checkpoint: Checkpoint) -> int:
    count = text_config(checkpoint.config).get("num_hidden_layers")
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
        if assignment.format is not None and module not in known:
            raise UserError(
                f"{module} is not a linear in transformers.",
                where=f"{where}: rules[{assignment.rule}]",
                remedy="Give it `format: keep` in a rule before.",
            )
