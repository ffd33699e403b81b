"""Everything that a run works on, decided from headers and a recipe before any weight is read. No torch.

`lay_out` adds to what is decided of each tensor (decide.py) where the bytes go: units that are in memory together,
shards, and the config to write.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from snugfit.dialects import compressed_tensors
from snugfit.errors import UserError
from snugfit.formats.spec import DEFAULT_INPUT_HEADROOM
from snugfit.model.layout import ModelLayout
from snugfit.model.logical_weights import LogicalWeights
from snugfit.quantization.cache_scales import attention_of
from snugfit.quantization.decide import decide
from snugfit.quantization.plan_notes import plan_notes
from snugfit.quantization.units import names_of, units_of
from snugfit.quantization.written_config import config_to_write
from snugfit.recipes.assignment import Assignment
from snugfit.recipes.recipe import LoadedRecipe
from snugfit.records.quantize import DEQUANTIZED, KV_CACHE, PASSTHROUGH, TensorRecord
from snugfit.storage.checkpoint import Checkpoint
from snugfit.storage.safetensors_header import TensorInfo
from snugfit.storage.shards import Shard, plan_shards

# a thirty-second of the model, within these bounds: whole files are digested while others are written
SHARD_BYTES = 500_000_000, 5_000_000_000


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

    def is_copied(self, name: str) -> bool:
        """Whether a tensor is in the result as it is in the source, from file to file."""
        assignment = self.assignments.get(name)
        return name not in self.weights.origins and (assignment is None or assignment.format is None)

    @property
    def copied_bytes(self) -> int:
        """Bytes of the tensors that are in the result as they are in the source, codes that stay among them."""
        return sum(
            info.bytes
            for name, infos in self.outputs.items()
            for info in infos
            if name in self.weights.tensors and (self.is_copied(name) or self.copies(name, info))
        )

    def writes_kv_scales(self, layer: int) -> bool:
        """Whether scales of an FP8 KV cache are written for this layer."""
        return f"{self.observed_caches.get(layer)}.k_scale" in self.outputs


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
        config=config_to_write(layout, recipe, decisions),
        input_headroom=input_headroom if open_ones else None,
        unverified=decisions.unverified,
        notes=plan_notes(layout, recipe, decisions, assignments.values()),
    )


def measure_only(layout: ModelLayout) -> Plan:
    """The plan of a run that writes nothing: it measures the inputs of every linear, and keys and values."""
    layout.check_quantizable()
    weights = layout.weights.restack_unquantized(layout.weights.formats.__contains__)
    units = units_of(layout, names_of(layout, weights))
    attention, notes = {}, [*layout.contradictions]
    try:
        attention = attention_of(layout, units, where="")
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
