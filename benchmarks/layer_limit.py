"""A layer of DeepSeek-V3's shape, 23 GB in 16 bits, quantized with less memory than it has: peaks and seconds.

    python layer_limit.py WORK [--memory 8e9] [--gpu-memory 8e9] [--recipes nvfp4-moe-four-over-six nvfp4-moe]
                          [--effort fast] [--experts 256] [--rows 32] [--length 1024] [--device cuda]

Writes two layers in FP8, one dense and one of 256 experts, of which a few have values and the others are zeros (the
files have holes). Each run is a process whose main memory is limited by a cgroup where that is allowed (root; pages of
files count, but can be dropped), and whose torch may take the given GPU memory less 0.55 GB for CUDA itself; it is told
that no more is free. It chooses how many experts are held at once. A recipe that follows the effort runs under
`--effort`. Prints a JSON line a run: experts at once, peaks beside estimates, seconds. Needs the tests on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

CONTEXT_BYTES = 550_000_000  # of CUDA
VOCABULARY = 4096
CGROUP = Path("/sys/fs/cgroup/layer-limit")


def main() -> None:
    """Make the layers, run each recipe in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--memory", type=float, default=8e9)
    parser.add_argument("--gpu-memory", type=float, default=8e9)
    parser.add_argument("--recipes", nargs="+", default=["nvfp4-moe-four-over-six", "nvfp4-moe"])
    parser.add_argument("--effort", default="fast")
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step is not None:
        run(json.loads(options.step))
        return
    from helpers.sparse_models import deepseek_v3_layers

    options.work.mkdir(parents=True, exist_ok=True)
    model = options.work / f"deepseek-{options.experts}"
    if not model.exists():
        deepseek_v3_layers(model, experts=options.experts, vocabulary=VOCABULARY, values_of_experts=4)
    rows, generator = options.work / "rows.jsonl", random.Random(1)  # noqa: S311
    ids = [[generator.randrange(3, VOCABULARY) for _ in range(options.length)] for _ in range(options.rows)]
    rows.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids), encoding="utf-8")
    for recipe in options.recipes:
        given = {"model": str(model), "recipe": recipe, "dataset": [str(rows)], "num_samples": options.rows}
        given |= {"output_dir": str(options.work / "out"), "device": options.device, "max_seq_length": options.length}
        given |= {"effort": None if "four-over-six" in recipe else options.effort, "min_tokens_per_expert": 0}
        step = {"memory": options.memory, "gpu_memory": options.gpu_memory, "given": given}
        shutil.rmtree(options.work / "out", ignore_errors=True)
        command = [sys.executable, str(Path(__file__)), str(options.work), "--step", json.dumps(step)]
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
        print(done.stdout.splitlines()[-1] if not done.returncode else f"{recipe}: exit code {done.returncode}")
        sys.stdout.flush()
    shutil.rmtree(options.work / "out", ignore_errors=True)


def run(step: dict[str, Any]) -> None:
    """Quantize within the limits; print what it took."""
    memory, gpu_memory, given = int(step["memory"]), int(step["gpu_memory"]) - CONTEXT_BYTES, step["given"]
    limited = join_cgroup(memory)
    import torch

    from snugfit import machine

    free = machine.free_bytes

    def within_limits(device: torch.device) -> int:
        if device.type == "cuda":
            return min(free(device), gpu_memory - torch.cuda.memory_allocated(device))
        return min(free(device), memory - machine.rss_bytes())

    machine.free_bytes = within_limits  # before others take it from there
    if given["device"] == "cuda":
        torch.cuda.set_per_process_memory_fraction(gpu_memory / torch.cuda.get_device_properties(0).total_memory)
    import snugfit

    record = snugfit.quantize(**given)
    found = {"recipe": given["recipe"], "effort": given["effort"], "limited_by_cgroup": limited}
    found |= {"experts_per_group": record.arguments["experts_per_group"], "peak_rss": machine.peak_rss_bytes()}
    found |= {"peak_gpu": record.peak_gpu_bytes, "estimates": dict(record.estimates), "seconds": dict(record.seconds)}
    peak = CGROUP / "memory.peak"
    found["peak_cgroup"] = int(peak.read_text()) if limited and peak.exists() else None
    print(json.dumps(found | {"bytes": record.bytes}, default=str))


def join_cgroup(limit: int) -> bool:
    """Put this process under a limit of main memory; False where that is not allowed."""
    try:
        if CGROUP.exists():
            CGROUP.rmdir()
        CGROUP.mkdir()
        (CGROUP / "memory.max").write_text(str(limit))
        (CGROUP / "cgroup.procs").write_text(str(os.getpid()))
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main()
