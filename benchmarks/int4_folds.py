"""What activation-aware folds gain for 4-bit weights: one model quantized in each way, KL to the original beside plain.

    python benchmarks/int4_folds.py WORK --model DIR --calibration A.txt --evaluation B.txt [--recipe fp8-int4-awq]

Ways: plain (round to nearest), weighted scales, folds (AWQ: weighted scales and every fold that the layer allows; in
mixtures inside each expert), gptq, gptq+folds; with --statistics also weighted scales and folds from E[x^2] alone,
collected beforehand, no sample running. KL in nats a token over segments of 128 tokens of text that no way has seen;
differences to plain are paired by segment. Seconds are of each run alone. Prints rows of a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from snugfit.data.dataset import load_dataset
from snugfit.evaluation.held_out import HeldOut
from snugfit.methods.calibrated import Calibrated
from snugfit.methods.method import Method
from snugfit.methods.round_to_nearest import ROUND_TO_NEAREST
from snugfit.model.layout import read_layout
from snugfit.progress import SILENT
from snugfit.quantization.collect import collect_statistics
from snugfit.quantization.loop import run_layers
from snugfit.quantization.options import Calibration
from snugfit.quantization.plan import lay_out
from snugfit.quantization.prepare import prepare
from snugfit.quantization.quantize import _write_config, quantize
from snugfit.quantization.resume import FinishedUnits
from snugfit.quantization.run import Run
from snugfit.recipes.recipe import load_recipe
from snugfit.records.statistics_file import ExpertCalibration
from snugfit.storage.staging import resumable

TARGET = "marlin"  # 4-bit weights, 16-bit inputs; FP8 linears round theirs
WAYS: dict[str, Method] = {
    "plain": ROUND_TO_NEAREST,
    "weighted": Calibrated(TARGET),
    "folds": Calibrated(TARGET, folds=True, expert_folds=True),
    "gptq": Calibrated(TARGET, gptq=True),
    "gptq+folds": Calibrated(TARGET, gptq=True, folds=True),
}


def main() -> None:
    """Quantize in each way, and print what each lost."""
    options = _options()
    options.work.mkdir(parents=True, exist_ok=True)
    calibration = Calibration(
        dataset=options.calibration,
        num_samples=options.samples,
        max_seq_length=options.length,
        device=options.device,
        experts=ExpertCalibration(min_tokens_per_expert=0),
    )
    evaluated = load_dataset(options.model, options.evaluation, num_samples=options.rows, max_seq_length=options.row)
    held_out = HeldOut(
        options.model, evaluated.samples, torch.device(options.device), profile=TARGET, tokens_per_batch=4096
    )
    found: dict[str, list[float]] = {}
    print(f"| {options.model.name}, {options.recipe} | KL | minus plain | of plain | seconds |\n|---|---|---|---|---|")
    for name in options.ways:
        out = options.work / name
        shutil.rmtree(out, ignore_errors=True)
        started = time.perf_counter()
        _run(options.model, options.recipe, out, calibration, WAYS[name])
        _report(name, found, held_out, out, time.perf_counter() - started)
    if options.statistics:
        collected, out = options.work / "collected", options.work / "statistics"
        for folder in (collected, out):
            shutil.rmtree(folder, ignore_errors=True)
        asked = {"num_samples": options.samples, "max_seq_length": options.length, "device": options.device}
        collect_statistics(options.model, output_dir=collected, dataset=options.calibration, **asked)
        started = time.perf_counter()
        quantize(options.model, options.recipe, output_dir=out, statistics=collected, device=options.device)
        _report("from statistics", found, held_out, out, time.perf_counter() - started)
    (options.work / "int4_folds.json").write_text(json.dumps(found), encoding="utf-8")


def _run(model: Path, recipe: str, out: Path, calibration: Calibration, method: Method) -> None:
    prepared = prepare(lay_out(read_layout(model), load_recipe(recipe)), calibration, method)
    with resumable(out) as (directory, work):
        finished = FinishedUnits(work, prepared.identity())
        run = Run(prepared=prepared, directory=directory, work=work, finished=finished, progress=SILENT)
        run_layers(run)
        _write_config(prepared.plan, directory)


def _report(name: str, found: dict[str, list[float]], held_out: HeldOut, out: Path, seconds: float) -> None:
    found[name] = held_out.divergences(out)
    plain = next(iter(found.values()))
    mean, difference = _mean(found[name]), _mean([one - other for one, other in zip(found[name], plain, strict=True)])
    print(
        f"| {name} | {mean[0]:.4f} ± {mean[1]:.4f} | {difference[0]:+.4f} ± {difference[1]:.4f} "
        f"| {mean[0] / _mean(plain)[0]:.2f}x | {seconds:.0f} |",
        flush=True,
    )


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """The mean of segments, and its standard error."""
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, nargs="+", required=True)
    parser.add_argument("--evaluation", type=Path, nargs="+", required=True)
    parser.add_argument("--recipe", default="fp8-int4-awq")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS])
    parser.add_argument("--statistics", action="store_true")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--row", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
