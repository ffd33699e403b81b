"""What FP8 weights gain by following the effort, as the 4-bit weights beside them do: KL on text no step has seen.

    python benchmarks/fp8_along.py MODEL WORK --calibration A.txt B.txt --evaluation C.txt D.txt [--device cuda]
        [--layout nvfp4-fp8-hybrid] [--effort best] [--way gptq+folds+descent] [--targets vllm-blackwell marlin]

Makes three files for each target: by the layout's exact recipe (NAME-four-over-six), by the layout with its FP8 rules
naming `scale_rule: absmax` (FP8 to the nearest code), and by the layout as it is. The last two are made by one way of
the effort, without a gate. Prints a Markdown table: KL, and its paired ratio to the exact recipe's with two standard
errors; then that of the last file to the one before. Files stay in WORK.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import yaml

from kl_table import evaluated, figures_of, paired_ratio, print_table, with_ratio
from one_way import take_only
from snugfit.progress import TerminalProgress
from snugfit.quantization.quantize import quantize
from snugfit.recipes.recipe import load_recipe


def main() -> None:
    options = _options()
    options.work.mkdir(parents=True, exist_ok=True)
    take_only(options.way)
    entries: list[dict[str, Any]] = []
    for target in options.targets:
        recipes = {
            "exact": f"{options.layout}-four-over-six",
            "nearest": str(_with_nearest_fp8(options)),
            "along": options.layout,
        }
        files = {name: _make(options, name, recipe, target) for name, recipe in recipes.items()}
        for text in options.evaluation:
            record = evaluated(
                list(files.values()),
                options.model,
                [text],
                [options.context],
                target=target,
                max_tokens=options.max_tokens,
                device=options.device,
            )
            found = [figures_of(model) for model in record.contexts[0].models[1:]]
            for name, one in zip(files, found, strict=True):
                row = with_ratio(one, found[0])
                entries.append({"target": target, "text": text.name, "context": options.context, "file": name, **row})
            ratio = paired_ratio(found[2]["kl_by_chunk"], found[1]["kl_by_chunk"])
            print(f"{target} {text.name}: along / nearest {ratio[0]:.4f} +- {ratio[1] or 0:.4f}", flush=True)
    print_table(entries)


def _with_nearest_fp8(options: argparse.Namespace) -> Path:
    """The layout, its FP8 rules naming their scale rule."""
    content = yaml.safe_load(load_recipe(options.layout).text)
    for rule in content["rules"]:
        if rule["format"] == "fp8-dynamic":
            rule["scale_rule"] = "absmax"
    path: Path = options.work / "nearest.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def _make(options: argparse.Namespace, name: str, recipe: str, target: str) -> Path:
    out: Path = options.work / (name if name == "exact" else f"{name}-{target}")
    if out.exists():
        return out
    started = time.perf_counter()
    quantize(
        options.model,
        recipe,
        output_dir=out,
        dataset=options.calibration,
        num_samples=options.num_samples,
        max_seq_length=options.max_seq_length,
        shuffle_seed=0,
        device=options.device,
        effort=None if name == "exact" else options.effort,
        target=target,
        progress=TerminalProgress(),
    )
    print(f"{out.name}: {time.perf_counter() - started:.1f} s", flush=True)
    return out


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--calibration", type=Path, nargs="+", required=True)
    parser.add_argument("--evaluation", type=Path, nargs="+", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layout", default="nvfp4-fp8-hybrid")
    parser.add_argument("--effort", choices=("good", "best"), default="best")
    parser.add_argument("--way", default="gptq+folds+descent")
    parser.add_argument("--targets", nargs="+", default=["vllm-blackwell", "marlin"])
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--max-seq-length", type=int, default=1024)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--max-tokens", type=int, default=32768)
    return parser.parse_args()


if __name__ == "__main__":
    main()
