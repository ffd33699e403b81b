"""Statistics of a model as it is: samples pass its layers, one at a time in memory, and only numbers are written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from snugfit import distributed
from snugfit.arguments import as_sequence
from snugfit.machine import Clock
from snugfit.model.layout import read_layout
from snugfit.progress import SILENT, Progress
from snugfit.quantization.loop import run_layers
from snugfit.quantization.options import Calibration, check_options
from snugfit.quantization.plan import measure_only
from snugfit.quantization.prepare import prepare
from snugfit.quantization.prepared_run import PreparedRun
from snugfit.quantization.resume import open_finished
from snugfit.quantization.run import Run, statistics_of
from snugfit.records.statistics_file import (
    MAX_FORCED_TOKENS,
    MIN_TOKENS_PER_EXPERT,
    STATISTICS_FILE,
    ExpertCalibration,
    Statistics,
)
from snugfit.report.outliers import write_outliers
from snugfit.storage.staging import check_stageable, resumable


@distributed.together
def collect_statistics(
    model: str | Path,
    *,
    output_dir: str | Path,
    dataset: str | Path | Sequence[str | Path] = (),
    num_samples: int | None = None,
    max_seq_length: int | None = None,
    shuffle_seed: int | None = None,
    device: str | None = None,
    tokens_per_batch: int | None = None,
    dtype: str | None = None,
    moe_calibrate_all_experts: bool = True,
    max_forced_tokens: int = MAX_FORCED_TOKENS,
    experts_per_group: int | None = None,
    restart: bool = False,
    force_resume: bool = False,
    progress: Progress = SILENT,
) -> Statistics:
    """Measure the inputs of every linear of `model`, its keys and values, and its experts.

    The samples pass the model's own weights, dequantized if they are stored quantized. The new directory `output_dir`
    holds the statistics, and tables and plots of outliers. The arguments, and the way in which a stopped run resumes,
    are those of `quantize`. Raises UserError for bad input.
    """
    clock, destination = Clock(), Path(output_dir)
    progress = progress if distributed.is_main() else SILENT

    def prepare_here() -> PreparedRun:
        if distributed.is_main():
            check_stageable(destination)
        calibration = Calibration(
            dataset=as_sequence(dataset),
            num_samples=num_samples,
            max_seq_length=max_seq_length,
            shuffle_seed=shuffle_seed,
            device=device,
            tokens_per_batch=tokens_per_batch,
            dtype=dtype,
            experts=ExpertCalibration(moe_calibrate_all_experts, max_forced_tokens, MIN_TOKENS_PER_EXPERT),
            experts_per_group=experts_per_group,
        )
        check_options(calibration)
        prepared = prepare(measure_only(read_layout(model)), calibration)
        place = destination if distributed.is_main() else None
        prepared.check_resources(place, restart=restart, force_resume=force_resume)
        return prepared

    with clock("prepare"):
        prepared = distributed.in_all(prepare_here).agreed()
    prepared.report(progress)
    with resumable(destination, restart=restart) as (directory, work):
        finished = open_finished(work, prepared.identity(), force=force_resume)
        run = Run(prepared=prepared, directory=directory, work=work, finished=finished, clock=clock, progress=progress)
        run_layers(run)
        found = statistics_of(run)
        if distributed.is_main():
            (directory / STATISTICS_FILE).write_text(found.to_json(), encoding="utf-8")
            write_outliers(found, directory)
    return found
