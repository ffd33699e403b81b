"""What calibration finds in the original before any group of it is rounded: ranges and E[x^2] of inputs."""

from __future__ import annotations

from pathlib import Path

from snugfit import distributed
from snugfit.data.dataset import Dataset
from snugfit.model.layout import ModelLayout
from snugfit.progress import SILENT, Progress
from snugfit.quantization.loop import run_layers
from snugfit.quantization.options import Calibration
from snugfit.quantization.plan import measure_only
from snugfit.quantization.plan_checks import check_statistics
from snugfit.quantization.prepare import prepare
from snugfit.quantization.prepared_run import PreparedRun
from snugfit.quantization.resume import open_finished
from snugfit.quantization.run import Run, statistics_of
from snugfit.records.statistics_file import ExpertCalibration, Statistics, load_statistics, save_statistics

STATISTICS_NAME = "statistics.json"
_EXPERTS = ExpertCalibration(min_tokens_per_expert=0)


def calibrate(
    layout: ModelLayout,
    samples: Dataset,
    folder: Path,
    *,
    device: str | None = None,
    tokens_per_batch: int | None = None,
    progress: Progress = SILENT,
) -> Statistics:
    """Statistics of these samples, in STATISTICS_NAME below `folder`; a run that was stopped resumes there.

    UserError for a folder with statistics of another model or of other samples.
    """
    file = folder / STATISTICS_NAME
    known = distributed.from_main(file.exists())
    if known:
        return distributed.in_all(lambda: _load(file, layout, samples))

    def prepare_here() -> PreparedRun:
        prepared = prepare_calibration(layout, samples, device=device, tokens_per_batch=tokens_per_batch)
        prepared.check_resources()
        return prepared

    prepared = distributed.in_all(prepare_here).agreed()
    work = folder / "statistics"
    work.mkdir(parents=True, exist_ok=True)
    finished = open_finished(work, prepared.identity(), force=True)
    run = Run(
        prepared=prepared,
        directory=work,
        work=work,
        finished=finished,
        progress=progress,
        title="calibrating",
    )
    run_layers(run)
    found = statistics_of(run)
    distributed.by_main(lambda: save_statistics(found, file))
    return found


def prepare_calibration(
    layout: ModelLayout, samples: Dataset, *, device: str | None, tokens_per_batch: int | None
) -> PreparedRun:
    """The run that `calibrate` is; UserError where it cannot be."""
    calibration = Calibration(
        num_samples=None, max_seq_length=None, device=device, tokens_per_batch=tokens_per_batch, experts=_EXPERTS
    )
    return prepare(measure_only(layout), calibration, samples=samples)


def _load(file: Path, layout: ModelLayout, samples: Dataset) -> Statistics:
    found = load_statistics(file)
    check_statistics(found, layout.checkpoint, samples, _EXPERTS, where=str(file))
    return found
