"""Six mixes of NVFP4 and FP8 against their original, by context length: one table, one set of plots.

    python seed_variants.py MODEL CALIBRATION.txt EVALUATION.txt OUT [--contexts 1024,2048,4096,8192] [--max-tokens N]

The variants are those that a model card measured by hand on a 12B model: NVFP4 everywhere with largest-value scales
or Four Over Six, FP8 attention with either (the latter is the hybrid), FP8 down_proj with either. OUT gets
a checkpoint a variant, and OUT/eval-PROFILE what `snugfit eval` writes. The evaluation is this one command:

    snugfit eval OUT/nvfp4-absmax ... --reference MODEL --dataset EVALUATION.txt --context 1k,2k,4k,8k
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from snugfit.evaluation.evaluate import evaluate, write_results
from snugfit.progress import TerminalProgress
from snugfit.quantization.quantize import quantize
from snugfit.report.tables import to_markdown

VARIANTS = (
    "nvfp4-absmax",
    "nvfp4-four-over-six",
    "nvfp4-fp8-attention-absmax",
    "nvfp4-fp8-hybrid-four-over-six",
    "nvfp4-fp8-down-absmax",
    "nvfp4-fp8-down-four-over-six",
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Six variants by context length.")
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path, help="text to calibrate on, 32 x 1024 tokens")
    parser.add_argument("evaluation", type=Path, help="another text to evaluate on")
    parser.add_argument("out", type=Path)
    parser.add_argument("--contexts", default="1024,2048,4096,8192")
    parser.add_argument("--max-tokens", type=int, help="the same first tokens of the text at every length")
    parser.add_argument("--profiles", default="vllm-blackwell", help="engine profiles, with commas")
    parser.add_argument("--device", default=None)
    arguments = parser.parse_args()
    for recipe in VARIANTS:
        target = arguments.out / recipe
        if not target.exists():
            quantize(
                arguments.model,
                recipe,
                output_dir=target,
                dataset=[arguments.calibration],
                num_samples=32,
                max_seq_length=1024,
                device=arguments.device,
            )
    for profile in arguments.profiles.split(","):
        record = evaluate(
            [arguments.out / recipe for recipe in VARIANTS],
            reference=arguments.model,
            dataset=[arguments.evaluation],
            contexts=[int(length) for length in arguments.contexts.split(",")],
            max_tokens=arguments.max_tokens,
            activations=profile,
            device=arguments.device,
            progress=TerminalProgress(),
        )
        write_results(record, arguments.out / f"eval-{profile}")
        print(to_markdown(record))
        print(json.dumps({"profile": profile, "seconds": record.seconds, "peak_gpu_bytes": record.peak_gpu_bytes}))


if __name__ == "__main__":
    main()
