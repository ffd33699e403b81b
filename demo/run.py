"""The main job on a real model: quantize SmolLM2-135M with the hybrid recipe and print what it cost and gained.

python demo/run.py MODEL OUTPUT      (OUTPUT is replaced)
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from snugfit.evaluation.evaluate import evaluate
from snugfit.quantization.quantize import quantize_checkpoint
from snugfit.records.evaluation import ModelFigures
from snugfit.records.quantize import QuantizeRecord, totals_by_format

RECIPE = "nvfp4-fp8-hybrid"
ROWS, LENGTH = 32, 512
EVALUATION_ROWS = 16


def main(model: Path, output: Path) -> None:
    """Quantize, measure both, print one table."""
    shutil.rmtree(output, ignore_errors=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    record = quantize_checkpoint(model, output, RECIPE, rows=ROWS, length=LENGTH, progress=True)
    begin = time.perf_counter()
    before, after = _evaluate(model, output, "vllm-blackwell")
    _, weight_only = _evaluate(model, output, "marlin")
    seconds = dict(record.seconds) | {"evaluate": time.perf_counter() - begin}
    Console(width=110).print(_table(record, before, after, weight_only, seconds))


def _evaluate(model: Path, output: Path, activations: str) -> tuple[ModelFigures, ModelFigures]:
    """The original and the result on text that calibration has not seen, as an engine of this kind runs them."""
    record = evaluate(
        [output],
        reference_model=model,
        contexts=[LENGTH],
        max_chunks=EVALUATION_ROWS,
        activations=activations,
        floors="reference" if activations == "vllm-blackwell" else "none",
        progress=True,
    )
    before, after = record.contexts[0].models
    return before, after


def _table(
    record: QuantizeRecord,
    before: ModelFigures,
    after: ModelFigures,
    weight_only: ModelFigures,
    seconds: dict[str, float],
) -> Table:
    table = Table(title=f"SmolLM2-135M-Instruct, recipe {record.recipe}", show_header=False)
    table.add_row("bytes", f"{record.source_bytes:,} -> {record.bytes:,} ({record.bytes / record.source_bytes:.0%})")
    for total in totals_by_format(record.tensors):
        error = "" if total.relative_error is None else f", relative error {total.relative_error:.5f}"
        parts = ", ".join(_parts(record, total.format))
        table.add_row(
            total.format, f"{parts}: {total.tensors} tensors, {total.bits_per_weight:.2f} bits a weight{error}"
        )
    tokens = f"{sum(before.tokens_by_chunk):,} tokens of Python's documentation"
    table.add_row("perplexity before", f"{_perplexity(before)} ({tokens})")
    table.add_row("W4A4 MLP", f"{_lost(after)} (Blackwell: 4-bit activations)")
    table.add_row("W4A16 MLP", f"{_lost(weight_only)} (Hopper, Ada: NVFP4 runs weight-only)")
    if before.floor is not None:
        table.add_row(
            "noise floor", f"KL {before.floor.kl:.4f}: the original against itself in {before.floor.arithmetic}"
        )
    table.add_row("", "The same tokens everywhere: the errors of the perplexities are shared. KL in nats a token.")
    for stage, spent in seconds.items():
        table.add_row(f"seconds, {stage}", f"{spent:.2f}")
    table.add_row("peak memory", f"{record.peak_rss_bytes / 1e9:.2f} GB while quantizing")
    return table


def _perplexity(figures: ModelFigures) -> str:
    return f"{figures.perplexity:.2f} +- {figures.perplexity_error or 0.0:.2f}"


def _lost(figures: ModelFigures) -> str:
    assert figures.kl is not None
    error = figures.kl.standard_error or 0.0
    kl = f"KL {figures.kl.mean:.4f} +- {error:.4f}, same top token {figures.same_top or 0.0:.1%}"
    return f"perplexity {_perplexity(figures)}, {kl}"


def _parts(record: QuantizeRecord, label: str) -> list[str]:
    """The last parts of the module names that took a format, each once."""
    return sorted({tensor.name.split(".")[-2] for tensor in record.tensors if tensor.format == label})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
