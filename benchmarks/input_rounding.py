"""What rounding a linear's inputs costs on a GPU: the plain definition in slices beside the fused kernel.

    python input_rounding.py [--tokens 16384] [--features 8960] [--repeats 20]

Milliseconds of each kind, medians, and gigabytes a second that the kernel reads and writes, for bf16.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from snugfit.formats.inputs import STATIC_KINDS, InputRounding, kernel_problems
from snugfit.formats.spec import InputKind
from snugfit.model.emulate import SLICE

KINDS: tuple[InputKind, ...] = (
    "nvfp4",
    "mxfp4",
    "fp8-token",
    "fp8-group",
    "fp8-tensor",
    "int8-token",
    "int8-token-asym",
    "int8-tensor",
)


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Median of `repeats` calls after two to warm up."""
    found = []
    for _ in range(repeats + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        found.append(1000 * (time.perf_counter() - start))
    return statistics.median(found[2:])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What rounding inputs costs on a GPU.")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--features", type=int, default=8960)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    values = torch.randn(options.tokens, options.features, device="cuda").to(torch.bfloat16)
    step = max(1, SLICE["cuda"] // options.features)
    print(torch.cuda.get_device_name())
    for kind in KINDS:
        rounding = InputRounding(kind, torch.tensor(0.01, device="cuda") if kind in STATIC_KINDS else None)
        plain = milliseconds(lambda r=rounding: [r.plain(part) for part in values.split(step)], options.repeats)  # type: ignore[misc]
        if not rounding.is_fused(values):
            print(f"{kind}: {plain:.3f} ms, no kernel: {kernel_problems()}")
            continue
        fused = milliseconds(lambda r=rounding: r(values), options.repeats)  # type: ignore[misc]
        print(f"{kind}: {plain:.3f} ms, fused {fused:.3f} ms, {2 * values.nbytes / fused / 1e6:.0f} GB/s")


if __name__ == "__main__":
    main()
