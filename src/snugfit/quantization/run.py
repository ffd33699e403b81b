"""A prepared run that has a directory to write into, and what comes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from snugfit import distributed
from snugfit.machine import Clock
from snugfit.progress import Progress
from snugfit.quantization.prepared_run import PreparedRun
from snugfit.quantization.resume import FinishedUnits
from snugfit.records.norm_folds import NormFold
from snugfit.records.statistics import layer_from_json
from snugfit.records.statistics_file import DatasetUsed, Statistics
from snugfit.storage.checkpoint import fingerprint, header_digest
from snugfit.storage.shards import WrittenFiles
from snugfit.version import __version__


@dataclass(frozen=True, kw_only=True)
class Run:
    """A prepared run that has a directory to write into; `title` is what progress calls its layers."""

    prepared: PreparedRun
    directory: Path
    work: Path
    finished: FinishedUnits
    progress: Progress
    clock: Clock = field(default_factory=Clock)
    title: str = "layers"

    @property
    def runs_layers(self) -> bool:
        """Whether samples pass the layers."""
        return self.prepared.dataset is not None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """SHA-256 of each weight file; units that an earlier run had finished; seconds expected after the second layer."""

    files: Mapping[str, str]
    resumed: int
    expected_seconds: float | None


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a run has made, whose files are yet to be digested, taken by the disk, and closed; the rest as `Outcome`.

    Files that do not last (`lasts`) have no digests, and lack what is the source's.
    """

    files: WrittenFiles
    lasts: bool
    resumed: int
    expected_seconds: float | None

    def outcome(self) -> Outcome:
        """Wait for the files, in all processes."""
        files = distributed.gather(self.files.digests())[0]
        return Outcome(files=files, resumed=self.resumed, expected_seconds=self.expected_seconds)


def norm_folds_of(run: Run) -> tuple[NormFold, ...]:
    """What became of norms before routed experts, layer by layer; empty if no way tried to fold them."""
    found = [fold for entry in run.finished.entries for fold in entry.get("norm_folds", ())]
    return tuple(NormFold(**fold | {"readers": tuple(fold["readers"])}) for fold in found)


def statistics_of(run: Run) -> Statistics:
    """What a run measured, for its file."""
    prepared = run.prepared
    assert prepared.dataset is not None
    checkpoint, recipe = prepared.plan.checkpoint, prepared.plan.recipe
    dataset = prepared.dataset
    layers_found = [entry["statistics"] for entry in run.finished.entries[1:]]
    return Statistics(
        snugfit=__version__,
        model=checkpoint.name,
        header_digest=header_digest(checkpoint),
        fingerprint=fingerprint(checkpoint),
        datasets=(DatasetUsed(dataset.source, len(dataset.samples), dataset.tokens, dataset.digest),),
        all_experts=prepared.experts.all_experts,
        max_forced_tokens=prepared.experts.max_forced_tokens,
        recipe=None if recipe is None else recipe.recipe.name,
        recipe_digest=None if recipe is None else recipe.digest,
        layers={number: layer_from_json(found) for number, found in enumerate(layers_found)},
    )
