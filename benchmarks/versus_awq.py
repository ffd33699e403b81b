"""snugfit and llm-compressor's AWQ side by side on a mixture: INT4 experts, FP8 attention, same rows, in one run.

    python benchmarks/versus_awq.py MODEL WORK --llmcompressor-python PYTHON --calibration A.txt --evaluation B.txt

MODEL is a mixture that both can run: demo/upcycle_smollm2.py or tests/fixtures/tiny-mixture; --layers cuts it to its
first layers beforehand. Every round runs, one after the other, snugfit's recipe fp8-int4-awq with effort good (weighted
scales, folds inside experts and of the norm before them, each kept only if held-out KL falls), and folds inside experts
from E[x^2] alone (collect, then effort fast: both are timed); llm-compressor's AWQModifier with the folds that it makes
of Qwen3-MoE (norm into router and experts, up_proj into down_proj) and with the one into down_proj alone; and its plain
rounding. Each run is a process of its own, whose imports are left out of the seconds. Then the same code reads all
files and takes their KL to MODEL on text that none has seen. Prints two Markdown tables and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from kl_table import evaluated, figures_of, with_ratio  # scripts import each other by name

HERE = Path(__file__).parent
RECIPE = "fp8-int4-awq"
TARGET = "marlin"  # 4-bit weights, 16-bit inputs; FP8 linears round theirs
GOOD, COLLECTED = "snugfit good", "snugfit, from statistics"
EFFORTS = {GOOD: "good", COLLECTED: "fast"}
RIVALS = {
    "llm-compressor AWQ": "fp8-int4-experts-awq",
    "llm-compressor AWQ, up to down": "fp8-int4-experts-awq-up-down",
    "llm-compressor absmax": "fp8-int4-experts-absmax",
}
CONTEXT = 512


def main() -> None:
    """Run all rounds, measure the files, print."""
    options = parse_arguments()
    if options.effort:
        print(json.dumps(run_snugfit(options)))
        return
    options.work.mkdir(parents=True, exist_ok=True)
    if options.layers:
        options.model = cut(options.model, options.work / f"first-{options.layers}-layers", options.layers)
    write_rows(options)
    runs: dict[str, list[dict[str, Any]]] = {}
    for _ in range(options.repeats):
        for name, command in commands(options).items():
            shutil.rmtree(options.work / directory_of(name), ignore_errors=True)
            made = run_tool(command, options.work / f"{directory_of(name)}.log")
            runs.setdefault(name, []).append(made)
            print(f"{name}: {made['seconds']}", file=sys.stderr, flush=True)
    print_times(runs)
    figures = measure(options, [*runs])
    print_figures(figures)
    print(json.dumps({"runs": runs, "figures": figures}))


def cut(model: Path, target: Path, layers: int) -> Path:
    """A copy of the one-file checkpoint at `model` with its first `layers` decoder layers."""
    from safetensors.torch import load_file, save_file

    target.mkdir(exist_ok=True)
    weights = load_file(model / "model.safetensors")
    numbers = {name: int(name.split(".")[2]) for name in weights if name.startswith("model.layers.")}
    kept = {name: weight for name, weight in weights.items() if numbers.get(name, 0) < layers}
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] = layers
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for file in model.iterdir():
        if file.name not in ("config.json", "model.safetensors") and file.is_file():
            shutil.copy(file, target)
    return target


def write_rows(options: argparse.Namespace) -> None:
    """The calibration rows, for both tools; every row of one length."""
    from snugfit.data.dataset import load_dataset

    asked = {"num_samples": options.num_samples, "max_seq_length": options.max_seq_length, "shuffle_seed": 0}
    rows = load_dataset(options.model, options.calibration, **asked).samples
    (options.work / "rows.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")
    lines = "".join(json.dumps({"input_ids": row}) + "\n" for row in rows)
    (options.work / "rows.jsonl").write_text(lines, encoding="utf-8")


def directory_of(name: str) -> str:
    """The directory of a run's file, below the work directory."""
    return name.replace(",", "").replace(" ", "-")


def commands(options: argparse.Namespace) -> dict[str, list[str]]:
    """What to run in a round, by name."""
    threads = ["--threads", str(options.threads)]
    found = {}
    for name, effort in EFFORTS.items():
        ours = [sys.executable, __file__, str(options.model), str(options.work), "--effort", effort, *threads]
        ours += ["--num-samples", str(options.num_samples), "--max-seq-length", str(options.max_seq_length)]
        found[name] = ours
    for name, recipe in RIVALS.items() if options.llmcompressor_python else ():
        rows = "-" if recipe.endswith("absmax") else str(options.work / "rows.json")
        theirs = [options.llmcompressor_python, str(HERE / "llmcompressor_worker.py"), str(options.model), rows]
        theirs += [str(options.work / directory_of(name)), "--recipe", recipe, *threads]
        found[name] = [*theirs, "--batch-size", str(options.batch_size), "--group-size", str(options.group_size)]
    return found


def run_snugfit(options: argparse.Namespace) -> dict[str, Any]:
    """Quantize once with everything imported beforehand."""
    import torch

    import snugfit.calibration.observers
    import snugfit.evaluation.held_out
    import snugfit.methods.expert_folds
    import snugfit.model.emulate  # noqa: F401
    from snugfit.machine import peak_rss_bytes
    from snugfit.quantization.collect import collect_statistics
    from snugfit.quantization.quantize import quantize

    torch.set_num_threads(options.threads)
    model_type = json.loads((options.model / "config.json").read_text(encoding="utf-8"))["model_type"]
    import_module(f"transformers.models.{model_type}.modeling_{model_type}")  # llm-compressor's is left out, too
    name = next(name for name, effort in EFFORTS.items() if effort == options.effort)
    begin, cpu = time.perf_counter(), time.process_time()
    samples = {"dataset": [options.work / "rows.jsonl"], "num_samples": options.num_samples}
    samples["max_seq_length"] = options.max_seq_length
    seconds = {}
    if name == COLLECTED:
        collected = options.work / "collected"
        shutil.rmtree(collected, ignore_errors=True)
        collect_statistics(options.model, output_dir=collected, device="cpu", **samples)
        seconds["collect"] = time.perf_counter() - begin
        samples = {"statistics": collected}
    out = options.work / directory_of(name)
    record = quantize(
        options.model, RECIPE, output_dir=out, effort=options.effort, target=TARGET, device="cpu", **samples
    )
    return {
        "seconds": {**seconds, **record.seconds, "total": time.perf_counter() - begin},
        "cpu_seconds": {"total": time.process_time() - cpu},
        "peak_rss_bytes": peak_rss_bytes(),
        "trials": [[trial.name, trial.kept, trial.seconds] for trial in record.trials],
    }


def run_tool(command: list[str], log: Path) -> dict[str, Any]:
    """The last line of a command's output; what else it says goes to `log`."""
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    with log.open("w", encoding="utf-8") as errors:
        ended = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
    made: dict[str, Any] = json.loads(ended.stdout.strip().splitlines()[-1])
    return made


def measure(options: argparse.Namespace, names: list[str]) -> dict[str, dict[str, Any]]:
    """KL to the 16-bit mixture of every file, and the paired ratio of each to the first rival's (else to the first)."""
    models = (
        evaluated(
            [options.work / directory_of(name) for name in names],
            options.model,
            options.evaluation,
            [CONTEXT],
            target=TARGET,
            max_tokens=options.max_tokens,
            device="cpu",
        )
        .contexts[0]
        .models
    )
    found = {name: figures_of(model) for name, model in zip(names, models[1:], strict=True)}
    base = found[next((name for name in RIVALS if name in found), names[0])]
    return {name: {**with_ratio(one, base), "reference": models[0].perplexity} for name, one in found.items()}


def print_times(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Medians over rounds, and ratios to snugfit's effort good in the same round."""
    ours = [run["seconds"]["total"] for run in runs[GOOD]]
    print("| | seconds | of snugfit's `good` in the same round | CPU seconds | peak MB |\n|---|---|---|---|---|")
    for name, entries in runs.items():
        walls = [run["seconds"]["total"] for run in entries]
        ratios = [wall / base for wall, base in zip(walls, ours, strict=True)]
        cpu = statistics.median(run["cpu_seconds"]["total"] for run in entries)
        peak = max(run["peak_rss_bytes"] for run in entries) / 1e6
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        print(f"| {name} | {statistics.median(walls):.1f} | {spread} | {cpu:.1f} | {peak:.0f} |")


def print_figures(figures: dict[str, dict[str, Any]]) -> None:
    """One line a file: KL with its standard error, its ratio with two, perplexity."""
    print(f"\nreference perplexity {next(iter(figures.values()))['reference']:.3f}")
    print("| | KL | of llm-compressor AWQ's | perplexity |\n|---|---|---|---|")
    for name, one in figures.items():
        margin = "" if one["two_errors"] is None else f" +- {one['two_errors']:.3f}"
        kl = f"{one['kl']:.4f} +- {one['kl_error']:.4f}"
        print(f"| {name} | {kl} | {one['ratio']:.3f}{margin} | {one['perplexity']:.3f} |")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--llmcompressor-python", help="Python of an environment with it; none: snugfit alone")
    parser.add_argument("--calibration", type=Path, nargs="+", default=[])
    parser.add_argument("--evaluation", type=Path, nargs="+", default=[])
    parser.add_argument("--layers", type=int, help="cut the model to its first layers")
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--max-seq-length", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=8 * CONTEXT)
    parser.add_argument("--batch-size", type=int, default=16, help="rows in a forward of llm-compressor's")
    parser.add_argument("--group-size", type=int, default=64, help="of llm-compressor's INT4: that of snugfit's file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--effort", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
