"""Layers larger than memory: `quantize` on layers of DeepSeek-V3's or MiniMax-M2's shape under limits that are set.

    PYTHONPATH=src:tests python layer_limit.py WORK [--shape minimax-m2] [--limit 8e9] [--gpu-limit 8e9]
    PYTHONPATH=src:tests python layer_limit.py WORK --device cpu --shape minimax-m2 --experts 32 --limit 1.6e9

Writes two layers, both with routed experts, FP8 as in the release (weights of most experts are zeros in sparse files;
memory and time do not depend on values), and rows of random tokens. Each run is a process of its own: `RECIPE`, or
`RECIPE:EFFORT`. Its memory is limited by a cgroup where this user may make one (pages of files count, too), else by
RLIMIT_DATA: from what the process holds with all imported and the GPU's context made, private memory may grow by what
the limit leaves of resident memory. Of the GPU torch's share of the process is what the limit leaves beside the
context. Nothing else tells snugfit of the limits. Prints and writes to WORK/layer_limit.json: the peak of resident
memory and of torch's memory beside the estimate made before the run, what the driver says at most, the experts that
were in memory at once, and the seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

MOUNT = Path("/sys/fs/cgroup")
GROUP = f"snugfit-{os.getpid()}"
RUNS = ("nvfp4-moe-four-over-six", "nvfp4-moe:fast")
ROWS, VOCABULARY = 16, 4096


def main() -> None:
    """Make the model, run everything, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--shape", choices=["deepseek-v3", "minimax-m2"], default="deepseek-v3")
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--values", type=int, default=8, help="experts of a layer whose weights are no zeros")
    parser.add_argument("--limit", type=float, default=8e9, help="bytes of main memory")
    parser.add_argument("--gpu-limit", type=float, default=8e9, help="bytes of GPU memory, the context among them")
    parser.add_argument("--runs", nargs="+", default=list(RUNS), metavar="RECIPE[:EFFORT]")
    parser.add_argument("--length", type=int, default=128, help=f"tokens of a row; there are {ROWS}")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no further run starts")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step is not None:
        print(json.dumps(run(options, json.loads(options.step))))
        return
    deadline = time.monotonic() + options.budget
    model = make_model(options)
    found: list[dict[str, Any]] = []
    for name in options.runs:
        if time.monotonic() > deadline:
            say(f"no time for {name}")
            continue
        found.append({"run": name, **start(options, model, name)})
        say(line_of(found[-1]))
        say(json.dumps(found[-1]))
        result = {"shape": options.shape, "experts": options.experts, "limit": options.limit, "runs": found}
        (options.work / "layer_limit.json").write_text(json.dumps(result, indent=2))


def make_model(options: argparse.Namespace) -> Path:
    """Two layers, and rows for them."""
    from helpers.sparse_models import deepseek_v3_layers, minimax_m2_layers

    model: Path = options.work / f"{options.shape}-{options.experts}"
    if not (model / "rows.jsonl").exists():
        shutil.rmtree(model, ignore_errors=True)
        begin = time.monotonic()
        sizes = {"experts": options.experts, "vocabulary": VOCABULARY, "values_of_experts": options.values}
        if options.shape == "deepseek-v3":
            deepseek_v3_layers(model, **sizes, dense=0)
        else:
            minimax_m2_layers(model, **sizes)
        generator = random.Random(1)  # noqa: S311
        rows = [[generator.randrange(3, VOCABULARY) for _ in range(options.length)] for _ in range(ROWS)]
        (model / "rows.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
        say(f"model made in {time.monotonic() - begin:.0f} s")
    return model


def start(options: argparse.Namespace, model: Path, name: str) -> dict[str, Any]:
    """One run in a process of its own; what it found, or how it ended."""
    recipe, _, effort = name.partition(":")
    out: Path = options.work / "out"
    for folder in (out, out.with_name("out.partial")):
        shutil.rmtree(folder, ignore_errors=True)
    given = {"recipe": recipe, "effort": effort or None, "model": str(model), "output_dir": str(out)}
    with cgroup(int(options.limit)) as group:
        given["group"] = None if group is None else str(group)
        command = [sys.executable, __file__, *sys.argv[1:], "--step", json.dumps(given)]
        begin = time.monotonic()
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        seconds = time.monotonic() - begin
    shutil.rmtree(out, ignore_errors=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"error": done.stderr[-2000:], "exit": done.returncode, "with_start": seconds}
    return {**json.loads(lines[-1]), "with_start": seconds}


@contextmanager
def cgroup(limit: int) -> Iterator[Path | None]:
    """A cgroup with this limit of memory and no swap; None where this user may not make one."""
    two = (MOUNT / "cgroup.controllers").exists()
    parent, name, swap = (MOUNT, "memory.max", "memory.swap.max")
    if not two:
        parent, name, swap = (MOUNT / "memory", "memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
    group = parent / GROUP
    try:
        if two:
            (MOUNT / "cgroup.subtree_control").write_text("+memory")
        group.mkdir()
        (group / name).write_text(str(limit))
    except OSError:
        with suppress(OSError):
            group.rmdir()
        yield None
        return
    with suppress(OSError):
        (group / swap).write_text("0" if two else str(limit))
    try:
        yield group
    finally:
        with suppress(OSError):
            group.rmdir()


def run(options: argparse.Namespace, given: dict[str, Any]) -> dict[str, Any]:
    """In one process: quantize under the limits."""
    if given["group"] is not None:
        (Path(given["group"]) / "cgroup.procs").write_text(str(os.getpid()))
    import torch
    import transformers.models.deepseek_v3.modeling_deepseek_v3
    import transformers.models.minimax_m2.modeling_minimax_m2  # noqa: F401

    import snugfit
    from snugfit.machine import _status_bytes, peak_rss_bytes, rss_bytes

    gpu = options.device == "cuda"
    outside = 0
    if gpu:
        torch.zeros(1, device="cuda")
        free, total = torch.cuda.mem_get_info()
        outside = total - free - torch.cuda.memory_reserved()
        torch.cuda.set_per_process_memory_fraction((options.gpu_limit - outside) / total)
    before = rss_bytes()
    if given["group"] is None:
        soft = _status_bytes("VmData") + int(options.limit) - before
        resource.setrlimit(resource.RLIMIT_DATA, (soft, soft))
    with most_used(gpu=gpu) as used:
        record = snugfit.quantize(
            given["model"],
            given["recipe"],
            output_dir=given["output_dir"],
            dataset=[Path(given["model"]) / "rows.jsonl"],
            device=options.device,
            effort=given["effort"],
            min_tokens_per_expert=0,
        )
    return {
        "limited_by": "RLIMIT_DATA" if given["group"] is None else "cgroup",
        "before": before,
        "peak_rss": peak_rss_bytes(),
        "estimates": dict(record.estimates),
        "gpu_outside_torch": outside,
        "gpu_reserved": torch.cuda.max_memory_reserved() if gpu else None,
        "gpu_used": used[0] if gpu else None,
        "gpu_device": torch.cuda.get_device_name() if gpu else None,
        "experts_per_group": record.arguments["experts_per_group"],
        "trials": [(trial.name, trial.kl, trial.kept) for trial in record.trials],
        "seconds": dict(record.seconds),
        "written": record.bytes,
    }


@contextmanager
def most_used(*, gpu: bool) -> Iterator[list[int]]:
    """The most that the driver calls used of the GPU, by all, 20 times a second."""
    import torch

    most, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            free, total = torch.cuda.mem_get_info()
            most[0] = max(most[0], total - free)

    watcher = threading.Thread(target=watch)
    if gpu:
        watcher.start()
    yield most
    ended.set()
    if gpu:
        watcher.join()


def line_of(one: dict[str, Any]) -> str:
    """One line for people."""
    if "error" in one:
        return f"{one['run']}: failed with {one['exit']}: {one['error'][-600:]}"
    found, peaks = one["estimates"], []
    for key, peak in (("peak_rss_bytes", one["peak_rss"]), ("peak_gpu_bytes", one["gpu_reserved"])):
        if peak is not None:
            kind = "GPU" if "gpu" in key else "RSS"
            peaks.append(f"{kind} {peak / 1e9:.2f} GB, estimated {found[key]['estimated'] / 1e9:.2f}")
    if one["gpu_used"] is not None:
        peaks.append(f"driver {one['gpu_used'] / 1e9:.2f} GB, {one['gpu_outside_torch'] / 1e9:.2f} at the start")
    seconds = one["seconds"]["total"]
    return (
        f"{one['run']}: {'; '.join(peaks)}; {one['experts_per_group']} experts at a time, {seconds:.1f} s, "
        f"{one['written'] / 1e9:.1f} GB written, limited by {one['limited_by']}; {one['trials']}"
    )


def say(text: str) -> None:
    """Print at once."""
    print(text, flush=True)


if __name__ == "__main__":
    main()
