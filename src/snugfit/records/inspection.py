"""What is in a checkpoint: the result of `inspect`. Sizes are in bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from snugfit.records.base import as_json
from snugfit.records.statistics import Coverage, Outlier
from snugfit.version import __version__

INSPECT_SCHEMA = "snugfit.inspect/1"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What config.json states of the language model; None for what it does not state.

    `latent` is the number of values that MLA caches a token and layer. `experts` and `active_experts` are those of one
    layer, `prediction_layers` the layers of multi-token prediction.
    """

    architectures: tuple[str, ...]
    model_type: str | None
    dtype: str | None
    layers: int
    hidden_size: int | None
    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    latent: int | None
    experts: int | None
    active_experts: int | None
    shared_experts: int | None
    vocabulary: int | None
    context: int | None
    sliding_window: int | None
    prediction_layers: int | None
    tied_embeddings: bool


@dataclass(frozen=True, kw_only=True)
class Part:
    """Weights of one part of the model that are alike: same unpacked shape, stored alike, with the same prospects.

    `names` are the last parts of their names, `weights` their number, `parameters` and `bytes` (scales included) those
    of all; `shape` is () where they differ. `can_be` are the formats that `quantize` could give them, `cannot_be` maps
    each other format to the reason; `stays` is the reason where there are none. `single` is the shape of one expert's
    matrix where all experts are in one tensor that `quantize` can split, () elsewhere.
    """

    part: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    weights: int
    parameters: int
    bytes: int
    stored: tuple[str, ...]
    can_be: tuple[str, ...] = ()
    cannot_be: Mapping[str, str] | None = None
    stays: str = ""
    single: tuple[int, ...] = ()


@dataclass(frozen=True)
class LayerRun:
    """Decoder layers that are alike: their numbers, what one of them contains, its parameters and bytes."""

    layers: tuple[int, ...]
    what: str
    stored: tuple[str, ...]
    parameters: int
    bytes: int


@dataclass(frozen=True)
class FusedGroup:
    """A fused group: linears that engines run as one product, and so need one format.

    `complete` is the number of modules with all members, `incomplete` are the modules with only some, `mixed` those
    whose members are stored differently. `cannot_be` are formats that one member, and so none, can have.
    """

    members: tuple[str, ...]
    complete: int
    cannot_be: tuple[str, ...]
    incomplete: tuple[str, ...]
    mixed: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How a checkpoint is quantized: the method's name, its settings, and the number of matrices by stored format.

    `kv_cache` is the format of the KV cache that the config states, None for none. `refused` is the reason why snugfit
    cannot read the weights, "" where it can; without `has_reader` snugfit does not know the method, otherwise config
    and tensors disagree.
    """

    method: str
    settings: Mapping[str, Any]
    weights: Mapping[str, int]
    kv_cache: str | None
    refused: str
    has_reader: bool = True


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """What the statistics beside a checkpoint state: the samples of its calibration, and what was measured.

    `all_experts` and `max_forced_tokens` are those of ExpertCalibration. `recipe` names the recipe whose quantized
    weights the model had, None for its own weights.
    """

    model: str
    sources: tuple[str, ...]
    num_samples: int
    tokens: int
    all_experts: bool
    max_forced_tokens: int
    recipe: str | None
    coverage: tuple[Coverage, ...]
    outliers: tuple[Outlier, ...]


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Everything that `inspect` finds. Parameters are those of the model, unpacked, not those of its files.

    `prediction_parameters` are those of multi-token prediction, `parameters` all others. `active_parameters` are those
    that a token runs through in a mixture of experts, None for other models: without the experts that it does not
    visit, the table of embeddings, and towers. `problems` are contradictions in the checkpoint, `remarks` the reasons
    why `quantize` would refuse it, and the files beside it that could not be read.
    """

    model: str
    revision: str | None
    architecture: Architecture
    parameters: int
    active_parameters: int | None
    prediction_parameters: int
    bytes: int
    tensors: int
    files: int
    parts: tuple[Part, ...]
    layers: tuple[LayerRun, ...]
    fused: tuple[FusedGroup, ...]
    quantization: Quantization | None
    problems: tuple[str, ...]
    other_weights: tuple[str, ...]
    made_by: str | None
    calibration: Calibrated | None = None
    remarks: tuple[str, ...] = ()
    snugfit: str = __version__
    schema: str = INSPECT_SCHEMA

    def to_json(self) -> str:
        """The record, one JSON document."""
        return as_json(asdict(self))
