"""What learned block scales gain, and what they cost: one model quantized with effort `best`, its trials in a table.

    python learned_scales.py WORK --model DIR --dataset A.txt [B.py ...] [--recipe nvfp4-fp8-hybrid] [--device cuda]
    python learned_scales.py WORK ... --start weighted --travel 0.1 0.3 1.0 --steps 200 [--num-samples 128]

The first tries all ways of `best`. With `--start` learning starts from that way alone (plain, weighted, gptq,
gptq+folds, gptq+folds+descent), once for each `--travel` (how far a scale's logarithm may get in all steps) and each
`--passes` (over the samples, at most): what the constants of quantization/learned.py were chosen by. Tune on other
texts than those that are reported on: held-out samples are one in eight of these. Prints seconds and the GPU memory
that was estimated and used; WORK/learned_scales.json has it all.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from one_way import take_only
from snugfit.progress import TerminalProgress
from snugfit.quantization import learned
from snugfit.quantization.quantize import plan_quantization, quantize


def main() -> None:
    options = _options()
    found = []
    if options.start:
        take_only(options.start)
    for travel in options.travel:
        for passes in options.passes:
            learned.TRAVEL, learned.PASSES, learned.STEPS = travel, passes, options.steps
            found.append({"travel": travel, "passes": passes, "steps": options.steps, **_run(options)})
    (options.work / "learned_scales.json").write_text(json.dumps(found, indent=2), encoding="utf-8")


def _run(options: argparse.Namespace) -> dict[str, Any]:
    out = options.work / "out"
    shutil.rmtree(out, ignore_errors=True)
    given: dict[str, Any] = {
        "dataset": options.dataset,
        "num_samples": options.num_samples,
        "max_seq_length": options.max_seq_length,
        "shuffle_seed": 0,
        "device": options.device,
        "effort": "best",
        "target": options.target,
    }
    planned = plan_quantization(options.model, options.recipe, **given)
    record = quantize(options.model, options.recipe, output_dir=out, progress=TerminalProgress(), **given)
    for trial in record.trials:
        gain = "" if trial.gain is None else f"{trial.gain:+.5f} +- {trial.gain_error:.5f}"
        print(f"| {trial.name} | {trial.kl:.5f} +- {trial.error:.5f} | {gain} | {trial.kept} | {trial.seconds:.1f} s |")
    learning = None if planned.learning is None else asdict(planned.learning)
    print(f"learning estimated {learning}, used in all {record.peak_gpu_bytes} (GPU), {record.peak_rss_bytes}")
    print({stage: round(seconds, 1) for stage, seconds in record.seconds.items()}, flush=True)
    return {
        "trials": [asdict(trial) for trial in record.trials],
        "learning": learning,
        "peak_gpu_bytes": record.peak_gpu_bytes,
        "peak_rss_bytes": record.peak_rss_bytes,
        "seconds": dict(record.seconds),
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dataset", type=Path, nargs="+", required=True)
    parser.add_argument("--recipe", default="nvfp4-fp8-hybrid")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--target", default="vllm-blackwell")
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--max-seq-length", type=int, default=1024)
    parser.add_argument("--start", default="")
    parser.add_argument("--travel", type=float, nargs="+", default=[learned.TRAVEL])
    parser.add_argument("--passes", type=int, nargs="+", default=[learned.PASSES])
    parser.add_argument("--steps", type=int, default=learned.STEPS)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    main()
