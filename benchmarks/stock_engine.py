"""What a stock vLLM says of what snugfit writes: recipes on one model, perplexities side by side.

    python benchmarks/stock_engine.py MODEL WORK [--recipes R...] [--device cuda] [--vllm-python PYTHON]
                                      [--rows 16] [--length 512] [--moe-backend emulation]
                                      [--effort best --calibration FILES]

Runs where snugfit is importable; vLLM may live in another environment (`--vllm-python`). On a GPU before Blackwell
NVFP4 is served twice: weight-only through Marlin, as vLLM chooses, and as W4A4 through its emulation kernel (of a
mixture's experts with --moe-backend emulation). vLLM takes an FP8 KV cache by itself where a file asks for it. Prints
two Markdown tables, perplexities and the engine's loss a token minus ours (paired over rows, with one standard
error), and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from snugfit.data.dataset import Dataset, load_dataset
from snugfit.data.python_docs import python_topics
from snugfit.evaluation.evaluate import evaluate
from snugfit.quantization.quantize import quantize
from snugfit.records.evaluation import ModelFigures

RECIPES = ("fp8-dynamic", "fp8-int4-absmax", "nvfp4-four-over-six", "nvfp4-fp8-hybrid-four-over-six")
SERVE = Path(__file__).with_name("serve_vllm.py")


def main() -> None:
    """Quantize, emulate, serve, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), help="built-in names or files")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--vllm-python", default=sys.executable)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--effort", help="of recipes that name no scale rule")
    parser.add_argument("--calibration", type=Path, nargs="*", default=[], help="default: Python's documentation")
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--moe-backend", help="vLLM's moe_backend of the second run of NVFP4 files")
    arguments = parser.parse_args()
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    text = work / "evaluation.txt"
    text.write_text(python_topics("evaluation"), encoding="utf-8")
    rows = load_dataset(arguments.model, [text], num_samples=arguments.rows, max_seq_length=arguments.length)
    (work / "rows.json").write_text(json.dumps({"rows": rows.samples}), encoding="utf-8")
    lines = "".join(json.dumps({"input_ids": row}) + "\n" for row in rows.samples)
    (work / "rows.jsonl").write_text(lines, encoding="utf-8")
    checkpoints = [arguments.model]
    seconds = {}
    for recipe in arguments.recipes:
        target = work / Path(recipe).stem
        shutil.rmtree(target, ignore_errors=True)
        exact = "-four-over-six" in recipe or "-absmax" in recipe
        record = quantize(
            arguments.model,
            recipe,
            output_dir=target,
            dataset=arguments.calibration,
            num_samples=arguments.num_samples,
            max_seq_length=512,
            device=arguments.device,
            effort=None if exact else arguments.effort,
        )
        seconds[target.name] = record.seconds["total"]
        checkpoints.append(target)
    ours = {path.name: _emulate(path, work / "rows.jsonl", arguments.device) for path in checkpoints}
    served = {"served": _serve(arguments.vllm_python, work, checkpoints, "served")}
    if arguments.device != "cpu":
        fp4 = [path for path in checkpoints if path.name.startswith("nvfp4")]
        if fp4:
            options = ["--emulate-nvfp4"]
            options += ["--moe-backend", arguments.moe_backend] if arguments.moe_backend else []
            served["served W4A4"] = _serve(arguments.vllm_python, work, fp4, "emulated", *options)
    _print(ours, served, rows, seconds)


def _emulate(path: Path, rows: Path, device: str) -> dict[str, ModelFigures]:
    figures = {}
    for profile in ("none", "marlin", "vllm-blackwell"):
        record = evaluate([path], dataset=[rows], activations=profile, noise_floor="none", device=device)
        figures[profile] = record.contexts[0].models[0]
    return figures


def _serve(python: str, work: Path, checkpoints: list[Path], name: str, *options: str) -> dict[str, Any]:
    out = work / f"{name}.json"
    command = [python, str(SERVE), str(work / "rows.json"), str(out), *map(str, checkpoints), *options]
    subprocess.run(command, check=False)
    return {Path(entry["path"]).name: entry for entry in json.loads(out.read_text(encoding="utf-8"))["checkpoints"]}


def _print(
    ours: dict[str, dict[str, ModelFigures]],
    served: dict[str, dict[str, Any]],
    rows: Dataset,
    seconds: dict[str, float],
) -> None:
    print(f"{len(rows.samples)} rows, {rows.tokens} tokens, digest {rows.digest[:16]}\n")
    print(
        "| checkpoint | ours: none | ours: marlin | ours: vllm-blackwell | "
        + " | ".join(served)
        + " | kernels, cache |"
    )
    print("|---|" + "---|" * (4 + len(served)))
    for name, values in ours.items():
        entries = [run.get(name) or {} for run in served.values()]
        figures = [f"{result.perplexity:.3f}" for result in values.values()]
        figures += [f"{entry['perplexity']:.3f}" if "perplexity" in entry else "-" for entry in entries]
        kernels = sorted({kernel for entry in entries for kernel in entry.get("kernels", [])})
        kernels += sorted({f"{entry['kv_cache_dtype']} cache" for entry in entries if "kv_cache_dtype" in entry})
        print(f"| {name} | " + " | ".join(figures) + f" | {', '.join(kernels)} |")
    _print_differences(ours, served, rows)
    for run in served.values():
        for name, entry in run.items():
            if "error" in entry:
                print(f"{name}: {entry['error']}", file=sys.stderr)
    plain = {name: {profile: asdict(result) for profile, result in values.items()} for name, values in ours.items()}
    print(json.dumps({"ours": plain, "served": served, "digest": rows.digest, "seconds": seconds}))


def _print_differences(
    ours: dict[str, dict[str, ModelFigures]], served: dict[str, dict[str, Any]], rows: Dataset
) -> None:
    print(
        "\n| checkpoint, run | against profile | loss a token, engine minus ours | in perplexity |\n|---|---|---|---|"
    )
    counts = [len(row) - 1 for row in rows.samples]
    for run, entries in served.items():
        for name, entry in entries.items():
            if "nll_by_row" not in entry:
                continue
            w4a4 = any("emulation" in kernel.lower() for kernel in entry["kernels"])
            profile = "vllm-blackwell" if w4a4 else "marlin"
            pairs = zip(entry["nll_by_row"], ours[name][profile].nll_by_chunk, counts, strict=True)
            differences = [(theirs - mine) / count for theirs, mine, count in pairs]
            mean = statistics.mean(differences)
            error = statistics.stdev(differences) / len(differences) ** 0.5
            print(f"| {name}, {run} | {profile} | {mean:+.5f} +- {error:.5f} | {math.expm1(mean):+.2%} |")


if __name__ == "__main__":
    main()
