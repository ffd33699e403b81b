"""What an effort costs on a model: seconds of its stages and ways, beside plain forward passes of the same rows.

    python good_cost.py MODEL WORK --dataset A.txt B.txt [--num-samples 64] [--max-seq-length 1024] [--device cuda]
                        [--effort good] [--rounds 2] [--forward] [--samples] [--profile] [--operations]

Every round quantizes anew, in this process; the first one has the compilation of kernels in it. `--forward` times
transformers' plain forward of the same rows, output head included, before and after the rounds. `--samples` writes
to WORK/EFFORT-ROUND.0.txt where the main thread was, 50 times a second. `--profile` adds a round under cProfile,
`--operations` one that counts the operations of torch that the main thread starts, by stage of the run,
`--kernels` one that adds up the time of a GPU's kernels. Prints a line a figure; WORK/good_cost.json has all.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import json
import pstats
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from ranks import sampled
from snugfit.data.dataset import load_dataset
from snugfit.machine import Clock
from snugfit.quantization.quantize import quantize

SHOWN = 45  # functions of a profile, operations of a stage
BATCH_TOKENS = 4096  # of the plain forward


def main() -> None:
    """Run all rounds, print."""
    options = parse_arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"torch": torch.__version__, "forward": [], "rounds": []}
    for number in range(options.rounds):
        if options.forward:
            found["forward"].append(forward(options))
        with sampled(str(options.work / f"{options.effort}-{number}") if options.samples else None):
            found["rounds"].append(one_round(options))
    if options.profile:
        profiled(options)
    if options.kernels:
        kernels(options)
    if options.operations:
        found["operations"] = counted(options)
    (options.work / "good_cost.json").write_text(json.dumps(found, indent=2), encoding="utf-8")


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What `work` returns, its wall seconds and those of all cores."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def one_round(options: argparse.Namespace) -> dict[str, Any]:
    """Quantize once; wall and CPU seconds, stages, ways."""
    out = options.work / "out"
    shutil.rmtree(out, ignore_errors=True)
    record, seconds = timed(
        lambda: quantize(
            options.model,
            options.layout,
            output_dir=out,
            dataset=options.dataset,
            num_samples=options.num_samples,
            max_seq_length=options.max_seq_length,
            device=options.device,
            effort=options.effort,
            target=options.target,
            restart=True,
        )
    )
    stages = ", ".join(f"{name} {value:.2f}" for name, value in record.seconds.items())
    print(f"{options.effort}: {seconds['wall']:.2f} s, CPU {seconds['cpu']:.2f} s; {stages}", flush=True)
    ways = [{key: getattr(t, key) for key in ("name", "kl", "error", "kept", "seconds")} for t in record.trials]
    for way in ways:
        print(f"    {way['name']}: KL {way['kl']:.4f} +- {way['error']:.4f}, {way['seconds']:.2f} s", flush=True)
    return {**seconds, "stages": dict(record.seconds), "ways": ways, "peak_gpu_bytes": record.peak_gpu_bytes}


@torch.no_grad()
def forward(options: argparse.Namespace) -> dict[str, float]:
    """Seconds of transformers' forward of all rows, loading left out."""
    rows = load_dataset(
        options.model,
        options.dataset,
        num_samples=options.num_samples,
        max_seq_length=options.max_seq_length,
    ).samples
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto").to(options.device)
    size = max(1, BATCH_TOKENS // max(map(len, rows)))
    alike: dict[int, list[Any]] = {}
    for row in rows:
        alike.setdefault(len(row), []).append(row)
    batches = [some[n : n + size] for some in alike.values() for n in range(0, len(some), size)]

    def run() -> None:
        for batch in batches:
            model(input_ids=torch.tensor(batch, device=options.device), use_cache=False)
        if options.device == "cuda":
            torch.cuda.synchronize()

    _, seconds = timed(run)
    print(f"plain forward: {seconds['wall']:.2f} s, CPU {seconds['cpu']:.2f} s", flush=True)
    return seconds


def profiled(options: argparse.Namespace) -> None:
    """A round under cProfile: the functions with the most time of their own, and of all that they call.

    Without a GPU these are seconds of all cores.
    """
    profile = cProfile.Profile(time.process_time) if options.device == "cpu" else cProfile.Profile()
    profile.runcall(one_round, options)
    for order in ("tottime", "cumulative"):
        text = io.StringIO()
        pstats.Stats(profile, stream=text).strip_dirs().sort_stats(order).print_stats(SHOWN)
        print(text.getvalue(), flush=True)


def kernels(options: argparse.Namespace) -> None:
    """A round under torch's profiler: what keeps the GPU busy, and for how long."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        one_round(options)
    events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    busy, launches = sum(event.self_device_time_total for event in events), sum(event.count for event in events)
    print(f"GPU busy {busy / 1e6:.2f} s in {launches} kernels and copies", flush=True)
    for event in events[:SHOWN]:
        print(f"    {event.self_device_time_total / 1e6:.3f} s, {event.count} x {event.key[:110]}", flush=True)


class Operations(TorchDispatchMode):
    """Counts operations of torch by the stage that the clock of a run is in."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stage = "-"
        self.counts: dict[str, Counter[str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operation, and run it."""
        self.counts.setdefault(self.stage, Counter())[str(func)] += 1
        return func(*args, **(kwargs or {}))


def counted(options: argparse.Namespace) -> dict[str, dict[str, int]]:
    """A round whose operations are counted."""
    operations, real = Operations(), Clock.__call__

    @contextmanager
    def within(self: Clock, stage: str) -> Iterator[None]:
        before, operations.stage = operations.stage, stage
        with real(self, stage):
            yield
        operations.stage = before

    Clock.__call__ = within  # type: ignore[method-assign]
    with operations:
        one_round(options)
    Clock.__call__ = real  # type: ignore[method-assign]
    for stage, counts in operations.counts.items():
        most = ", ".join(f"{name.removeprefix('aten.')} {count}" for name, count in counts.most_common(SHOWN))
        print(f"{stage}: {counts.total()} operations: {most}", flush=True)
    return {stage: dict(counts) for stage, counts in operations.counts.items()}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--dataset", type=Path, nargs="+", required=True)
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--max-seq-length", type=int, default=1024)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layout", default="nvfp4-fp8-hybrid")
    parser.add_argument("--effort", default="good")
    parser.add_argument("--target", default="vllm-blackwell")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, help="of torch (default: its own)")
    parser.add_argument("--forward", action="store_true")
    parser.add_argument("--samples", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--operations", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
