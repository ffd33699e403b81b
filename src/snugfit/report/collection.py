"""What a report is made of: the records of one model, and what is known of its checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from snugfit.records.bench import BenchRecord
from snugfit.records.comparison import CompareRecord
from snugfit.records.evaluation import EvalRecord, EvaluatedServer, TasksRecord
from snugfit.records.fit import FitRecord
from snugfit.records.plan import PlanRecord
from snugfit.records.quantize import QuantizeRecord
from snugfit.records.serve import ServeRecord
from snugfit.records.statistics import Coverage, Outlier


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a record comes from: its file as given, its schema, the digest that it states."""

    file: str
    schema: str
    digest: str


@dataclass(frozen=True, kw_only=True)
class QuantizedCheckpoint:
    """A quantized checkpoint: its record, and what its directory says, where the directory was given.

    `header_digest` identifies its weights. `recipe_text` is the recipe that made it, `recipe_description` its own
    words. `kv_cache` is the format of keys and values that its config asks engines for. `folder` is the directory.
    """

    record: QuantizeRecord
    header_digest: str | None = None
    recipe_text: str = ""
    recipe_description: str = ""
    kv_cache: str | None = None
    architecture: str = ""
    folder: str | None = None

    @property
    def name(self) -> str:
        """Its name in tables: that of its directory."""
        return self.record.target


@dataclass(frozen=True, kw_only=True)
class CalibrationStatistics:
    """What calibration measured: samples and tokens, outliers of inputs, tokens of experts by layer."""

    samples: int
    tokens: int
    all_experts: bool
    outliers: tuple[Outlier, ...]
    coverage: tuple[Coverage, ...]


@dataclass(frozen=True, kw_only=True)
class Hub:
    """The metadata of the card, all of it stated: by an option, or by the original's card beside the weights."""

    base_model: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    quantized_by: str | None = None
    languages: tuple[str, ...] = ()
    pipeline_tag: str | None = None
    repo: str | None = None


@dataclass(frozen=True, kw_only=True)
class KernelUse:
    """The kernel with which an engine runs a format on a generation of GPUs; `kernel` is None where none is known.

    `seen`: this project saw the engine choose it.
    """

    engine: str
    generation: str
    format: str
    kernel: str | None
    arithmetic: str | None
    seen: bool


@dataclass(frozen=True, kw_only=True)
class ServedFit:
    """The longest context of one card, engine, number of cards and of sequences, by kind of KV cache; 0: none fits.

    `headroom_bytes` remain on each card beside a short context, negative for what is missing. `problem` says why the
    engine would not serve the file there.
    """

    card: str
    engine: str
    engine_title: str
    tensor_parallel_size: int
    max_num_seqs: int
    auto: int
    fp8: int
    headroom_bytes: int
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class Collection:
    """All records of one model, each kind in the order in which it was given; the first checkpoint is published."""

    checkpoints: tuple[QuantizedCheckpoint, ...] = ()
    evals: tuple[EvalRecord, ...] = ()
    tasks: tuple[TasksRecord, ...] = ()
    comparisons: tuple[CompareRecord, ...] = ()
    fits: tuple[FitRecord, ...] = ()
    plans: tuple[PlanRecord, ...] = ()
    benches: tuple[BenchRecord, ...] = ()
    serves: tuple[ServeRecord, ...] = ()
    statistics: CalibrationStatistics | None = None
    served: tuple[ServedFit, ...] = ()
    kernels: tuple[KernelUse, ...] = ()
    max_positions: int | None = None
    sources: tuple[Source, ...] = ()
    hub: Hub = Hub()

    @property
    def checkpoint(self) -> QuantizedCheckpoint | None:
        """The checkpoint whose card this is; None without a record of `quantize`."""
        return self.checkpoints[0] if self.checkpoints else None

    @property
    def title(self) -> str:
        """The name of the model that the report is about."""
        if self.checkpoint is not None:
            return self.checkpoint.name
        for record in self.evals:
            if record.reference is not None:
                return record.reference.name
            if record.candidates:
                return record.candidates[0].name
        names = [record.model for record in self.tasks] or [record.model for record in self.fits]
        return names[0] if names else "results"

    def servers(self) -> Iterator[EvaluatedServer]:
        """Servers that were evaluated: which engine ran a file, in which version."""
        for record in self.evals:
            for candidate in record.candidates:
                if isinstance(candidate, EvaluatedServer):
                    yield candidate


def last_part(name: str) -> str:
    """The last part of a path or a Hub id."""
    return name.rstrip("/").rpartition("/")[2]


def stated(mapping: Mapping[str, Any] | None, key: str) -> str:
    """The text or number under a key of a record's free part as text; "" for anything else."""
    value = (mapping or {}).get(key)
    return str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else ""


def counted(mapping: Mapping[str, Any] | None, key: str) -> int | None:
    """The whole number under a key of a record's free part; None for anything else."""
    value = (mapping or {}).get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
