"""What `snugfit inspect` tells, as records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from snugfit.records.base import as_json
from snugfit.records.statistics import Coverage, Outlier
from snugfit.version import __version__

INSPECT_SCHEMA = "snugfit.inspect/1"


@dataclass(frozen=True)
class Architecture:
    """What config.json says of the language model; None for what it does not say.

    `latent` is the width of what MLA caches a token and layer, `experts` and `active_experts` are of one layer,
    `prediction_layers` predict further tokens.
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


@dataclass(frozen=True)
class Part:
    """Weights of one part of the model that are alike: same real shape, stored alike, with the same prospects.

    `names` are the last parts of their names, `weights` how many there are, `parameters` and `bytes` (scales included)
    of all; `shape` is empty where they differ. `can_be` are formats that `quantize` could give them; `stays` says why
    there are none, `cannot_be` why not one of them. `single` is the shape of one expert's matrix where all experts
    stand in one tensor and `quantize` takes them apart, () elsewhere.
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
    """Decoder layers that are alike: their numbers, what is in one of them, its parameters and bytes."""

    layers: tuple[int, ...]
    what: str
    stored: tuple[str, ...]
    parameters: int
    bytes: int


@dataclass(frozen=True)
class FusedGroup:
    """Linears that engines run as one product, and so need one format: how often they stand together in one module.

    `cannot_be` are formats that one member, and so none, can have. `incomplete` are modules that have only some of
    them, `mixed` those whose members are stored differently.
    """

    members: tuple[str, ...]
    complete: int
    cannot_be: tuple[str, ...]
    incomplete: tuple[str, ...]
    mixed: tuple[str, ...]


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint is quantized already: the method's name, its numbers, and how many matrices are stored how.

    `kv_cache` is what is asked of the KV cache, None for nothing; `refused` says why this tool cannot read it.
    """

    method: str
    settings: Mapping[str, Any]
    weights: Mapping[str, int]
    kv_cache: str | None
    refused: str


@dataclass(frozen=True)
class Calibrated:
    """What the statistics beside a checkpoint say it was calibrated on, and what was seen.

    `experts` are "all" or "routed", with at most `forced_tokens` forced on each in a layer; `recipe` names the one
    whose quantized weights the rows walked through, None for the model's own.
    """

    model: str
    sources: tuple[str, ...]
    rows: int
    tokens: int
    experts: str
    forced_tokens: int
    recipe: str | None
    coverage: tuple[Coverage, ...]
    outliers: tuple[Outlier, ...]


@dataclass(frozen=True)
class Inspection:
    """Everything that `snugfit inspect` tells. Sizes in bytes; `parameters` are those of the model, not of its files.

    `active_parameters` are what a token runs through (None but for mixtures of experts): all but experts that it does
    not visit, the table of embeddings, towers and heads of multi-token prediction. `parameters` are all but the last,
    the `prediction_parameters`. `problems` are contradictions in the checkpoint, `remarks` why `quantize` would refuse
    it, and what could not be read beside it.
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
