"""What a quantize run will do, decided and checked on headers alone before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snugfit.dialects import compressed_tensors as dialect
from snugfit.errors import UserError
from snugfit.model.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from snugfit.model.layers import Skeleton, build_skeleton, linear_names
from snugfit.model.names import TensorName, parse_name
from snugfit.model.shards import Shard, plan_shards
from snugfit.recipe import Assignment, LoadedRecipe, load_recipe, resolve
from snugfit.records import TensorRecord

MAX_SHARD_BYTES = 5_000_000_000
KEPT = "as it was"
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOWERS = ("vision_config", "audio_config", "speech_config")


@dataclass(frozen=True)
class Plan:
    """Everything that headers and recipe decide: what each source tensor becomes, and where its bytes go.

    `units` are names of source tensors that are in memory together: first all outside the decoder layers, then a layer
    each; tensors of layers that transformers does not run (multi-token prediction) count as outside.
    """

    checkpoint: Checkpoint
    skeleton: Skeleton
    recipe: LoadedRecipe
    assignments: Mapping[str, Assignment]
    outputs: Mapping[str, tuple[TensorInfo, ...]]
    units: tuple[tuple[str, ...], ...]
    shards: tuple[Shard, ...]
    config: Mapping[str, Any]

    @property
    def calibrated(self) -> bool:
        """Whether any format needs activations."""
        return any(a.format is not None and a.format.spec.calibrated for a in self.assignments.values())

    @property
    def bytes(self) -> int:
        """Bytes of all tensors to be written, without headers."""
        return sum(info.bytes for infos in self.outputs.values() for info in infos)

    def records(self) -> tuple[TensorRecord, ...]:
        """A record of each source tensor, without what only the run can know."""
        return tuple(self._record(name, infos) for name, infos in self.outputs.items())

    def _record(self, name: str, infos: tuple[TensorInfo, ...]) -> TensorRecord:
        source = self.checkpoint.tensors[name]
        assignment = self.assignments.get(name)
        fmt = assignment.format if assignment else None
        label, scale = (fmt.label(), assignment.scale) if fmt and assignment else (KEPT, "")
        return TensorRecord(name, source.shape, label, scale, source.bytes, sum(info.bytes for info in infos))


def plan_quantization(
    source: str | Path, recipe: str | LoadedRecipe, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> Plan:
    """Decide on headers alone what `recipe` (a built-in name, a YAML file, or a loaded one) does to a model directory.

    Reads no weights. Raises UserError for a broken or already quantized checkpoint, and for whatever is wrong with the
    recipe for this model.
    """
    if max_shard_bytes < 1:
        raise UserError(f"no weight file fits into {max_shard_bytes} bytes.", remedy="Raise --max-shard-size.")
    loaded = load_recipe(recipe) if isinstance(recipe, str) else recipe
    checkpoint = open_checkpoint(source)
    _check_source(checkpoint)
    _check_scope(checkpoint)
    layers = _layer_count(checkpoint)
    skeleton = build_skeleton(checkpoint)
    decoder = skeleton.layers_name
    names = {t.name: parse_name(t.name, t.shape, decoder) for t in checkpoint.tensors.values()}
    _check_layers(checkpoint, names, layers, decoder)
    frozen = _frozen(checkpoint, names, layers)
    tensors = list(checkpoint.tensors.values())
    assignments = resolve(loaded, tensors, layers=layers, decoder=decoder, frozen=frozen)
    _check_linears(assignments, skeleton, loaded.where)
    formats = {names[name].module: a.format for name, a in assignments.items() if a.format is not None}
    if not formats:
        raise UserError("this recipe quantizes nothing.", where=loaded.where, remedy="Give one rule another format.")
    ignore = _unquantized(checkpoint, names, formats, skeleton)
    outside = tuple(name for name in names if names[name].layer is None or name in frozen)
    inside = [tuple(n for n in names if names[n].layer == k and n not in frozen) for k in range(layers)]
    units = (outside, *inside)
    outputs = {name: _outputs(checkpoint.tensors[name], assignments.get(name)) for unit in units for name in unit}
    shards = plan_shards([info for infos in outputs.values() for info in infos], max_shard_bytes)
    config = dict(checkpoint.config) | {"quantization_config": dialect.quantization_config(formats, ignore)}
    return Plan(checkpoint, skeleton, loaded, assignments, outputs, units, tuple(shards), config)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


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
    checkpoint: Checkpoint, names: Mapping[str, TensorName], formats: Mapping[str, object], skeleton: Skeleton
) -> list[str]:
    """Modules for `ignore`: every linear without a format, in the model (a tied lm_head too) or only in the file."""
    only_in_file = [
        parsed.module
        for name, parsed in names.items()
        if parsed.parameter == "weight"
        and parsed.role not in ("embed", "norm")
        and len(checkpoint.tensors[name].shape) == 2
    ]
    everything = dict.fromkeys([*only_in_file, *sorted(linear_names(skeleton))])
    return [module for module in everything if module not in formats]


def _outputs(source: TensorInfo, assignment: Assignment | None) -> tuple[TensorInfo, ...]:
    if assignment is None or assignment.format is None:
        return (TensorInfo(source.name, source.dtype, source.shape),)
    module = source.name.removesuffix(".weight")
    parts = dialect.layout(assignment.format, source.shape, source.dtype)
    return tuple(TensorInfo(f"{module}.{suffix}", dtype, shape) for suffix, (dtype, shape) in parts.items())


def _check_source(checkpoint: Checkpoint) -> None:
    config = checkpoint.config.get("quantization_config") or text_config(checkpoint.config).get("quantization_config")
    packed = next((t.name for t in checkpoint.tensors.values() if _is_quantized(t)), None)
    if config or packed:
        method = config.get("quant_method", "unknown") if isinstance(config, dict) else "unknown"
        evidence = f"quant_method {method!r} in config.json" if config else f"tensor {packed}"
        raise UserError(
            f"already quantized ({evidence}).",
            where=str(checkpoint.path),
            remedy="Start from the original BF16, FP16 or FP32 checkpoint.",
        )


def _check_scope(checkpoint: Checkpoint) -> None:
    """Refuse what would be damaged quietly: experts need calibration of their own, towers are no decoder layers."""
    configs = (checkpoint.config, text_config(checkpoint.config))
    counts = [config.get(key) for config in configs for key in EXPERT_COUNTS]
    towers = [key for key in TOWERS if checkpoint.config.get(key)]
    if any(isinstance(count, int) and count > 1 for count in counts):
        what = "a mixture of experts, which is not handled yet."
    elif towers:
        what = f"a model with a tower of its own ({towers[0]}), which is not handled yet."
    else:
        return
    raise UserError(what, where=str(checkpoint.path / "config.json"), remedy="Use a dense text model.")


def _is_quantized(tensor: TensorInfo) -> bool:
    wide = tensor.dtype in ("BF16", "F16", "F32", "F64")
    return tensor.name.endswith((".weight_packed", ".qweight")) or (tensor.name.endswith(".weight") and not wide)


def _layer_count(checkpoint: Checkpoint) -> int:
    where = str(checkpoint.path / "config.json")
    kind = checkpoint.config.get("model_type")
    if not _known_to_transformers(kind):
        raise UserError(
            f"unknown architecture {kind!r}: transformers has no model_type of that name.",
            where=where,
            remedy="Check the config, or update transformers.",
        )
    count = text_config(checkpoint.config).get("num_hidden_layers")
    if not isinstance(count, int) or count < 1:
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


def _known_to_transformers(kind: object) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return isinstance(kind, str) and kind in CONFIG_MAPPING_NAMES


def _check_linears(assignments: Mapping[str, Assignment], skeleton: Skeleton, where: str) -> None:
    linears = linear_names(skeleton)
    for name, assignment in assignments.items():
        module = name.removesuffix(".weight")
        if assignment.format is not None and module not in linears:
            raise UserError(
                f"{module} is not a linear in transformers.",
                where=f"{where}: rules[{assignment.rule}]",
                remedy="Give it `format: keep` in a rule before.",
            )
