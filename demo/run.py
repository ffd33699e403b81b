"""The main job on a real model: quantize SmolLM2-135M with the hybrid recipe and print what it saved and what it cost.

python demo/run.py MODEL OUTPUT      (OUTPUT is replaced)
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

import snugfit
from snugfit.records.evaluation import ModelFigures
from snugfit.records.quantize import totals_by_format

RECIPE = "nvfp4-fp8-hybrid-four-over-six"
NUM_SAMPLES, MAX_SEQ_LENGTH = 32, 512
EVALUATION_CHUNKS = 16
WIDTH = 110


def main(model: Path, output: Path) -> None:
    """Quantize, measure both models, print one table."""
    shutil.rmtree(output, ignore_errors=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    progress = snugfit.TerminalProgress()
    record = snugfit.quantize(
        model, RECIPE, output_dir=output, num_samples=NUM_SAMPLES, max_seq_length=MAX_SEQ_LENGTH, progress=progress
    )
    begin = time.perf_counter()
    original, blackwell = evaluate(model, output, "vllm-blackwell", progress)
    _, earlier = evaluate(model, output, "marlin", progress)
    seconds = time.perf_counter() - begin
    console = Console(width=WIDTH)
    console.print(result_table(record, original, blackwell, earlier))
    console.print("\n".join(notes(record, original, seconds)))


def evaluate(
    model: Path, output: Path, activations: str, progress: snugfit.Progress
) -> tuple[ModelFigures, ModelFigures]:
    """The original and the quantized model on text that calibration has not seen, under an activation profile."""
    record = snugfit.evaluate(
        [output],
        reference=model,
        contexts=[MAX_SEQ_LENGTH],
        max_chunks=EVALUATION_CHUNKS,
        activations=activations,
        noise_floor="reference" if activations == "vllm-blackwell" else "none",
        progress=progress,
    )
    original, quantized = record.contexts[0].models
    return original, quantized


def result_table(
    record: snugfit.QuantizeRecord, original: ModelFigures, blackwell: ModelFigures, earlier: ModelFigures
) -> Table:
    """Size and loss: the original, and the quantized model on either generation of GPUs."""
    table = Table(title=f"SmolLM2-135M-Instruct, recipe {record.recipe}")
    table.add_column("")
    for heading in ("original", "quantized, on Blackwell", "quantized, on Hopper or Ada"):
        table.add_column(heading, justify="right")
    size = f"{record.bytes / 1e6:.1f} MB ({record.bytes / record.source_bytes:.0%})"
    table.add_row("size", f"{record.source_bytes / 1e6:.1f} MB", size, size)
    table.add_row("inputs of 4-bit weights", "", "4 bits", "16 bits")
    table.add_row("perplexity", *map(perplexity, (original, blackwell, earlier)))
    table.add_row("KL to the original, nats per token", "", *map(divergence, (blackwell, earlier)))
    table.add_row("same most likely token", "", *(f"{figures.same_top or 0.0:.1%}" for figures in (blackwell, earlier)))
    return table


def notes(record: snugfit.QuantizeRecord, original: ModelFigures, seconds: float) -> list[str]:
    """What the formats are, what was measured, and what it took."""
    lines = []
    for total in totals_by_format(record.tensors):
        modules = sorted({t.name.split(".")[-2] for t in record.tensors if t.format == total.format})
        error = "" if total.relative_error is None else f", relative error {total.relative_error:.5f}"
        bits = f"{total.bits_per_weight:.2f} bits per weight{error}"
        lines.append(f"{total.format}: {', '.join(modules)} ({total.tensors} tensors, {bits})")
    tokens = sum(original.tokens_by_chunk)
    lines.append(
        f"Measured on {tokens:,} tokens of Python's documentation, the same in all columns; +- one standard error."
    )
    if original.floor is not None:
        floor = f"KL {original.floor.kl:.4f}"
        lines.append(f"Noise floor: {floor}, the original against itself in {original.floor.arithmetic}.")
    peak = f"{record.peak_rss_bytes / 1e9:.2f} GB of memory"
    lines.append(f"Quantizing took {record.seconds['total']:.1f} s and {peak}, measuring {seconds:.1f} s.")
    return lines


def perplexity(figures: ModelFigures) -> str:
    """Perplexity and its error."""
    return f"{figures.perplexity:.2f} +- {figures.perplexity_error or 0.0:.2f}"


def divergence(figures: ModelFigures) -> str:
    """KL to the original and its error."""
    assert figures.kl is not None
    return f"{figures.kl.mean:.4f} +- {figures.kl.standard_error or 0.0:.4f}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
