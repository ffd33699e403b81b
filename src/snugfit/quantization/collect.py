"""Statistics of a model as it is: rows pass its layers, one at a time in memory, and nothing is written but numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from snugfit.data.rows import DEFAULT_LENGTH, DEFAULT_ROWS
from snugfit.errors import UserError
from snugfit.machine import Clock, pick_device, progress_bar
from snugfit.quantization.estimate import check_estimate, estimate_run
from snugfit.quantization.plan import plan_walk
from snugfit.quantization.quantize import (
    TOKENS_PER_BATCH,
    identity_of,
    load_rows_for,
    skeleton_of,
    statistics_of,
    with_other_files,
)
from snugfit.quantization.resume import Progress
from snugfit.quantization.run import Run, run_units
from snugfit.records.statistics_file import DEFAULT_CALIBRATION, STATISTICS_FILE, Calibration, Statistics
from snugfit.report.outliers import write_outliers
from snugfit.storage.staging import check_stageable, resumable


def collect_statistics(
    source: str | Path,
    target: str | Path,
    *,
    text: Sequence[str | Path] = (),
    rows: int = DEFAULT_ROWS,
    length: int = DEFAULT_LENGTH,
    device: str | None = None,
    tokens_per_batch: int | None = None,
    calibration: Calibration = DEFAULT_CALIBRATION,
    restart: bool = False,
    resume_anyway: bool = False,
    progress: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> Statistics:
    """Measure inputs of every linear of `source`, keys and values, and experts, into the new directory `target`.

    The rows walk through the model's own weights, dequantized where they are stored quantized. `target` holds the
    statistics, and tables and plots of outliers. A run that was stopped goes on as a quantize run does. Raises UserError
    for bad input.
    """
    clock, destination = Clock(), Path(target)
    if tokens_per_batch is not None and tokens_per_batch < 1:
        raise UserError(f"{tokens_per_batch} tokens a batch are none.", remedy="Give --tokens-per-batch 1 at least.")
    with clock("prepare"):
        plan = with_other_files(plan_walk(source))
        check_stageable(destination)
        place = pick_device(device)
        data = load_rows_for(plan, text, rows, length)
        skeleton = skeleton_of(plan)
        batch = tokens_per_batch or TOKENS_PER_BATCH[place.type]
        estimate = estimate_run(plan, data, place, batch)
        check_estimate(estimate, destination, place)
    tell(estimate.line())
    with resumable(destination, restart=restart) as (directory, work):
        done = Progress(work, identity_of(plan, data, place, batch, calibration), anyway=resume_anyway)
        run = Run(plan, skeleton, place, data, directory, work, done, clock, tell, calibration)
        with progress_bar(progress, len(plan.units), "walking layers") as step:
            run_units(run, batch, step)
        found = statistics_of(run, calibration, recipe=None)
        (directory / STATISTICS_FILE).write_text(found.to_json(), encoding="utf-8")
        write_outliers(found, directory)
    return found
