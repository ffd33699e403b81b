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

from snugfit.calibration.dataset import load_rows, python_topics
from snugfit.evaluation.fidelity import Perplexity, perplexity
from snugfit.quantize import quantize_checkpoint
from snugfit.records import QuantizeRecord, totals_by_format

RECIPE = "nvfp4-fp8-hybrid"
ROWS, LENGTH = 32, 512
EVALUATION_ROWS = 16


def main(model: Path, output: Path) -> None:
    """Quantize, measure both, print one table."""
    shutil.rmtree(output, ignore_errors=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    record = quantize_checkpoint(model, output, RECIPE, rows=ROWS, length=LENGTH, progress=True)
    text = output.parent / "evaluation.txt"
    text.write_text(python_topics("evaluation"), encoding="utf-8")
    rows = load_rows(model, [text], count=EVALUATION_ROWS, length=LENGTH)
    begin = time.perf_counter()
    before = perplexity(model, rows)
    after = perplexity(output, rows)
    weight_only = perplexity(output, rows, activations="marlin")
    seconds = dict(record.seconds) | {"evaluate": time.perf_counter() - begin}
    Console(width=110).print(_table(record, before, after, weight_only, seconds))


def _table(
    record: QuantizeRecord, before: Perplexity, after: Perplexity, weight_only: Perplexity, seconds: dict[str, float]
) -> Table:
    table = Table(title=f"SmolLM2-135M-Instruct, recipe {record.recipe}", show_header=False)
    table.add_row("bytes", f"{record.source_bytes:,} -> {record.bytes:,} ({record.bytes / record.source_bytes:.0%})")
    for total in totals_by_format(record.tensors):
        error = "" if total.relative_error is None else f", relative error {total.relative_error:.5f}"
        parts = ", ".join(_parts(record, total.format))
        table.add_row(
            total.format, f"{parts}: {total.tensors} tensors, {total.bits_per_weight:.2f} bits a weight{error}"
        )
    pair = "{0.value:.2f} +- {0.standard_error:.2f}"
    table.add_row("perplexity before", pair.format(before) + f" ({before.tokens:,} tokens of Python's documentation)")
    table.add_row("perplexity, W4A4 MLP", pair.format(after) + " (Blackwell: 4-bit activations)")
    table.add_row("perplexity, W4A16 MLP", pair.format(weight_only) + " (Hopper, Ada: NVFP4 runs weight-only)")
    table.add_row("", "The same rows everywhere: the errors are shared, the differences are not noise of that size.")
    for stage, spent in seconds.items():
        table.add_row(f"seconds, {stage}", f"{spent:.2f}")
    table.add_row("peak memory", f"{record.peak_rss_bytes / 1e9:.2f} GB while quantizing")
    return table


def _parts(record: QuantizeRecord, label: str) -> list[str]:
    """The last parts of the module names that took a format, each once."""
    return sorted({tensor.name.split(".")[-2] for tensor in record.tensors if tensor.format == label})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
