"""The main job on a real model: quantize SmolLM2-135M with the hybrid recipe and print what it saved and what it cost.

python demo/run.py MODEL OUTPUT      (OUTPUT and OUTPUT-report are replaced)

The last lines name its model card and its page.
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
    results, published = output.with_name(f"{output.name}-results"), output.with_name(f"{output.name}-report")
    for folder in (output, results, published):
        shutil.rmtree(folder, ignore_errors=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    progress = snugfit.TerminalProgress()
    record = snugfit.quantize(
        model, RECIPE, output_dir=output, num_samples=NUM_SAMPLES, max_seq_length=MAX_SEQ_LENGTH, progress=progress
    )
    begin = time.perf_counter()
    found = {profile: evaluate(model, output, profile, progress) for profile in ("vllm-blackwell", "marlin")}
    original, blackwell = found["vllm-blackwell"].contexts[0].models
    earlier = found["marlin"].contexts[0].models[1]
    seconds = time.perf_counter() - begin
    console = Console(width=WIDTH)
    console.print(result_table(record, original, blackwell, earlier))
    console.print("\n".join(notes(record, original, seconds)))
    results.mkdir()
    for profile, result in found.items():
        (results / f"{profile}.json").write_text(result.to_json(), encoding="utf-8")
    snugfit.make_report(
        [output, *(results / f"{profile}.json" for profile in found)],
        output_dir=published,
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        license="apache-2.0",
    )
    print(f"Model card: {published / 'README.md'}\nPage: {published / 'index.html'}")


def evaluate(model: Path, output: Path, activations: str, progress: snugfit.Progress) -> snugfit.EvalRecord:
    """The original and the quantized model on text that calibration has not seen, under an activation profile."""
    return snugfit.evaluate(
        [output],
        reference=model,
        contexts=[MAX_SEQ_LENGTH],
        max_chunks=EVALUATION_CHUNKS,
        activations=activations,
        noise_floor="reference" if activations == "vllm-blackwell" else "none",
        progress=progress,
    )


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
