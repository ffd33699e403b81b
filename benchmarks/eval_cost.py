"""What one candidate adds to an evaluation, as a multiple of the reference's own forward in the same run.

    python eval_cost.py MODEL CHECKPOINT... [--chunks 8] [--context 1024] [--repeats 3] [--device cpu]

Every round walks the reference alone (layers, head, loss), then the reference with each checkpoint in turn; the ratio
is (time with it - time alone) / time alone. Prints a Markdown table of medians and ranges and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from snugfit.evaluation.evaluate import evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description="What one candidate adds to an evaluation.")
    parser.add_argument("model", type=Path)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default=None)
    options = parser.parse_args()
    alone: list[float] = []
    ratios: dict[str, list[float]] = {path.name: [] for path in options.checkpoints}
    seconds(options, [])  # imports and the page cache
    for _ in range(options.repeats):
        alone.append(seconds(options, []))
        for path in options.checkpoints:
            ratios[path.name].append((seconds(options, [path]) - alone[-1]) / alone[-1])
    print("| checkpoint | adds, x the reference's forward: median (range) |\n|---|---|")
    for name, found in ratios.items():
        print(f"| {name} | {statistics.median(found):.2f} ({min(found):.2f}-{max(found):.2f}) |")
    print(json.dumps({"alone_sec": alone, "ratios": ratios}))


def seconds(options: argparse.Namespace, checkpoints: list[Path]) -> float:
    """Of the walk, the heads and the reduction; tokenizing and reading headers are left out."""
    record = evaluate(
        checkpoints,
        reference=options.model,
        contexts=[options.context],
        max_chunks=options.chunks,
        noise_floor="none",
        device=options.device,
    )
    return record.seconds["measure"]


if __name__ == "__main__":
    main()
