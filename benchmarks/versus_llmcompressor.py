"""snugfit and llm-compressor side by side: same recipe, rows and model, each in its own environment, in one run.

    python benchmarks/versus_llmcompressor.py MODEL WORK --llmcompressor-python PYTHON [--recipe R] [--repeats 3]

Every round times, one after the other, the plain transformers forward of the rows (with its head), snugfit, and
llm-compressor; imports are left out of all three. Then both results are read back by the same code: relative weight
error against the source, and perplexity with 4-bit and 8-bit activations emulated on rows that neither calibrated on.
Prints a Markdown table of medians and ratios to the plain forward and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROWS, LENGTH = 32, 512


def main() -> None:
    """Run all rounds, read both results, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument(
        "--llmcompressor-python", help="Python of an environment with llm-compressor; none: leave it out"
    )
    parser.add_argument("--recipe", default="nvfp4-fp8-hybrid-four-over-six", help="one that both tools know")
    parser.add_argument("--also", nargs="*", default=["nvfp4-sweep"], help="more snugfit recipes to time")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work_once(arguments.model, arguments.work, arguments.recipe, arguments.threads)
        return
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    _write_rows(arguments.model, work)
    recipes = [arguments.recipe, *(_recipe_file(work, name) for name in arguments.also)]
    runs: dict[str, list[dict[str, Any]]] = {}
    for _ in range(arguments.repeats):
        for name, command in _commands(arguments, work, recipes).items():
            runs.setdefault(name, []).append(_last_json(command))
    outputs = {"snugfit": work / "snugfit"}
    if arguments.llmcompressor_python:
        outputs["llm-compressor"] = work / "llm-compressor"
    _print_times(runs)
    measured = {name: _quality(arguments.model, path, work / "evaluation.jsonl") for name, path in outputs.items()}
    _print_quality({name: figures for name, (figures, _) in measured.items()})
    _print_paired({name: losses for name, (_, losses) in measured.items()})
    print(json.dumps({"runs": runs, "quality": measured}))


def work_once(model: Path, work: Path, recipe: str, threads: int) -> None:
    """Quantize once with everything imported beforehand; one JSON line on stdout."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401  # llm-compressor's import is left out too

    import snugfit.calibration.observers
    import snugfit.data.dataset
    import snugfit.methods.rounding
    import snugfit.model.emulate  # noqa: F401
    from snugfit.machine import peak_rss_bytes
    from snugfit.quantization.quantize import quantize

    torch.set_num_threads(threads)
    after_imports = peak_rss_bytes()
    target = work / "snugfit" if not recipe.endswith(".yaml") else work / "also"
    shutil.rmtree(target, ignore_errors=True)
    cpu = time.process_time()
    record = quantize(
        model, recipe, output_dir=target, dataset=[work / "rows.jsonl"], num_samples=ROWS, max_seq_length=LENGTH
    )
    stages = dict(record.seconds)
    result = {
        "wall_seconds": stages.pop("total"),
        "cpu_seconds": time.process_time() - cpu,
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_rss_after_imports_bytes": after_imports,
        "stages": stages,
    }
    print(json.dumps(result))


def _commands(arguments: argparse.Namespace, work: Path, recipes: list[str]) -> dict[str, list[str]]:
    model, rows, threads = str(arguments.model), str(work / "rows.json"), ["--threads", str(arguments.threads)]
    plain = [sys.executable, str(HERE / "plain_forward.py"), model, rows, "--batch-size", "1", *threads]
    commands = {"plain forward": plain}
    for recipe in recipes:
        ours = [sys.executable, __file__, model, str(work), "--recipe", recipe, "--worker", *threads]
        commands["snugfit" if recipe == arguments.recipe else f"snugfit {Path(recipe).stem}"] = ours
    if arguments.llmcompressor_python:
        script = [arguments.llmcompressor_python, str(HERE / "llmcompressor_worker.py")]
        target = str(work / "llm-compressor")
        theirs = [*script, model, rows, target, "--recipe", arguments.recipe, *threads, "--pipeline"]
        commands["llm-compressor"] = [*theirs, "independent"]  # what its users get
        commands["llm-compressor, basic pipeline"] = [*theirs, "basic"]  # one pass, the same bytes
    return commands


def _recipe_file(work: Path, name: str) -> str:
    """A hybrid recipe whose NVFP4 part uses another scale rule, as a file: NAME is nvfp4-RULE."""
    scale = name.removeprefix("nvfp4-")
    rules = [{"role": "mlp", "format": "nvfp4", "scale_rule": scale}, {"role": "linear", "format": "fp8-dynamic"}]
    file = work / f"{scale}.yaml"
    file.write_text(json.dumps({"name": f"hybrid-{scale}", "rules": rules}), encoding="utf-8")  # JSON is YAML
    return str(file)


def _last_json(command: list[str]) -> dict[str, Any]:
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    document: dict[str, Any] = json.loads(finished.stdout.strip().splitlines()[-1])
    return document


def _write_rows(model: Path, work: Path) -> None:
    from snugfit.data.dataset import load_dataset
    from snugfit.data.python_docs import python_topics

    rows = load_dataset(model, [], num_samples=ROWS, max_seq_length=LENGTH).samples
    (work / "rows.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")
    (work / "rows.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows), encoding="utf-8")
    (work / "evaluation.txt").write_text(python_topics("evaluation"), encoding="utf-8")
    held_out = load_dataset(model, [work / "evaluation.txt"], num_samples=16, max_seq_length=LENGTH).samples
    lines = "".join(json.dumps({"input_ids": row}) + "\n" for row in held_out)
    (work / "evaluation.jsonl").write_text(lines, encoding="utf-8")


def _quality(model: Path, path: Path, rows_file: Path) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Figures of a compressed-tensors checkpoint (weight errors by format, perplexities), and its losses by row."""
    from snugfit.dialects.dialect import open_dialect
    from snugfit.evaluation.evaluate import evaluate
    from snugfit.model.emulate import read_module
    from snugfit.storage.checkpoint import read_tensor
    from snugfit.storage.open import open_checkpoint

    source, result = open_checkpoint(model), open_checkpoint(path)
    modules = [name.removesuffix(".weight") for name in source.tensors if name.endswith("_proj.weight")]
    sums: dict[str, list[float]] = {}
    headers = {name: (tensor.dtype, tensor.shape) for name, tensor in result.tensors.items()}
    dialect = open_dialect(result.config, where=str(result.path / "config.json"))
    for module, fmt in dialect.read_formats(modules, headers).items():
        weight = read_tensor(source, f"{module}.weight").float()
        values, _ = read_module(result, dialect, module, fmt, tuple(weight.shape))
        entry = sums.setdefault(fmt.name, [0.0, 0.0])
        entry[0] += float((values - weight).square().sum())
        entry[1] += float(weight.square().sum())
    quality = {f"relative error, {name}": error / square for name, (error, square) in sums.items()}
    losses: dict[str, list[float]] = {}
    for profile in ("vllm-blackwell", "marlin"):
        scored = evaluate([path], dataset=[rows_file], activations=profile).contexts[0].models[0]
        quality[f"perplexity, {profile}"] = scored.perplexity
        pairs = zip(scored.nll_by_chunk, scored.tokens_by_chunk, strict=True)
        losses[profile] = [loss / tokens for loss, tokens in pairs]
    return quality, losses


def _print_times(runs: dict[str, list[dict[str, Any]]]) -> None:
    walls = {name: [_wall(run) for run in entries] for name, entries in runs.items()}
    base = walls["plain forward"]
    print("| | wall s | x plain forward (by round) | CPU s | peak RSS MB |")
    print("|---|---|---|---|---|")
    for name, entries in runs.items():
        ratios = [wall / plain for wall, plain in zip(walls[name], base, strict=True)]
        cpu = statistics.median(_cpu(run) for run in entries)
        rss = max(run["peak_rss_bytes"] for run in entries) / 1e6
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        print(f"| {name} | {statistics.median(walls[name]):.1f} | {spread} | {cpu:.1f} | {rss:.0f} |")


def _print_quality(quality: dict[str, dict[str, float]]) -> None:
    print("\n| | " + " | ".join(quality) + " |\n|---|" + "---|" * len(quality))
    for figure in next(iter(quality.values())):
        print(f"| {figure} | " + " | ".join(f"{values[figure]:.5g}" for values in quality.values()) + " |")


def _print_paired(losses: dict[str, dict[str, list[float]]]) -> None:
    """Mean difference of the loss a token between the tools, row by row, with its standard error."""
    if len(losses) < 2:
        return
    ours, theirs = losses.values()
    for profile, mine in ours.items():
        differences = [a - b for a, b in zip(mine, theirs[profile], strict=True)]
        error = statistics.stdev(differences) / len(differences) ** 0.5
        print(
            f"\nloss a token, {profile}, {' minus '.join(losses)}: {statistics.mean(differences):+.4f} +- {error:.4f}"
        )


def _wall(run: dict[str, Any]) -> float:
    if "forward_seconds" in run:
        return float(run["forward_seconds"][0])
    return float(run["seconds"]["total"] if "seconds" in run else run["wall_seconds"])


def _cpu(run: dict[str, Any]) -> float:
    if "forward_cpu_seconds" in run:
        return float(run["forward_cpu_seconds"][0])
    return float(run["cpu_seconds"]["total"] if "seconds" in run else run["cpu_seconds"])


if __name__ == "__main__":
    main()
