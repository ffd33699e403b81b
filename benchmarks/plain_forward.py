"""Time the plain forward of a model over token rows: the floor for any tool that calibrates on them.

It runs wherever torch and transformers are, and needs nothing else:

    python plain_forward.py MODEL ROWS.json --batch-size 4 --threads 2 --repeats 3

ROWS.json holds {"rows": [[token ids], ...]}. The model is loaded by transformers in bfloat16 and run with its output
head (unless --without-head), without gradients and without a cache. The last line of stdout is one JSON document:
`forward_seconds` has the model's own time for each repeat (the loss is computed outside of it), `forward_cpu_seconds`
the processor time, all threads together; `perplexity` is over all predicted tokens. On a shared machine compare with
--threads 1 and by processor seconds: threads that wait for each other lose far more to a busy neighbour than one does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import platform
import resource
import sys
import time
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any


def peak_rss_bytes() -> int:
    """Peak resident memory of this process.

    Linux hands ru_maxrss on from the parent through exec, so a large parent would show; VmHWM there starts afresh.
    """
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Time the plain bfloat16 forward of MODEL over token rows.")
    parser.add_argument("model", type=Path, help="Hugging Face checkpoint directory")
    parser.add_argument("rows", type=Path, help='{"rows": [[ids], ...]} as JSON')
    parser.add_argument("--batch-size", type=int, default=4, help="rows of one length per forward")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--without-head", action="store_true", help="decoder only, as calibration needs")
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "eager"])
    return parser.parse_args()


def make_batches(rows: list[list[int]], *, batch_size: int) -> list[list[list[int]]]:
    """Rows in batches of at most `batch_size`, all rows of a batch of one length: no padding, no truncation."""
    batches: list[list[list[int]]] = []
    for row in sorted(rows, key=len, reverse=True):
        if batches and len(batches[-1]) < batch_size and len(batches[-1][0]) == len(row):
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


@dataclass(slots=True)
class Pass:
    """One pass over the rows: seconds of the model alone, sum of the next-token losses in nats, and their count."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    loss: float = 0.0
    count: int = 0


def run_rows(model: Any, batches: list[list[list[int]]], *, with_head: bool) -> Pass:
    """Run every batch once; the loss is computed outside of the measured time, and only with the head."""
    torch = import_module("torch")
    result = Pass()
    with torch.no_grad():
        for batch in batches:
            ids = torch.tensor(batch)
            start, cpu_start = time.perf_counter(), time.process_time()
            outputs = (model if with_head else model.base_model)(input_ids=ids, use_cache=False)
            result.seconds += time.perf_counter() - start
            result.cpu_seconds += time.process_time() - cpu_start
            if not with_head:
                continue
            for row, targets in zip(outputs.logits, ids, strict=True):  # by rows: fp32 logits of a batch are large
                loss = torch.nn.functional.cross_entropy(row[:-1].float(), targets[1:], reduction="sum")
                result.loss += float(loss)
                result.count += len(targets) - 1
    return result


def main() -> None:
    """Load, run `repeats` times, print the measurements as the last line of stdout."""
    arguments = parse_arguments()
    torch, transformers = import_module("torch"), import_module("transformers")
    torch.set_num_threads(arguments.threads)
    rows: list[list[int]] = json.loads(arguments.rows.read_text())["rows"]
    peak_after_import = peak_rss_bytes()
    start = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.bfloat16, attn_implementation=arguments.attention
    ).eval()
    load_seconds = time.perf_counter() - start
    batches = make_batches(rows, batch_size=arguments.batch_size)
    passes = [run_rows(model, batches, with_head=not arguments.without_head) for _ in range(arguments.repeats)]
    report = {
        "rows": len(rows),
        "tokens": sum(map(len, rows)),
        "batch_size": arguments.batch_size,
        "threads": arguments.threads,
        "attention": arguments.attention,
        "head": not arguments.without_head,
        "load_seconds": round(load_seconds, 3),
        "forward_seconds": [round(result.seconds, 3) for result in passes],
        "forward_cpu_seconds": [round(result.cpu_seconds, 3) for result in passes],
        "forward_seconds_best": round(min(result.seconds for result in passes), 3),
        "perplexity": round(math.exp(passes[-1].loss / passes[-1].count), 4) if passes[-1].count else None,
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_rss_after_import_bytes": peak_after_import,
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("torch", "transformers")},
        },
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
