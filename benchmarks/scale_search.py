"""What scale searches and column loops cost: the plain definitions in torch beside machine code, on a CPU or a GPU.

    python scale_search.py [--device cpu|cuda] [--rows 1024] [--features 4096] [--repeats 10] [--dtype bfloat16]

Milliseconds, the least of several runs after a first, which compiles. On a GPU beside a floor: the larger of the time
that the weight's bytes take at the memory's bandwidth, and that of the instructions a candidate's error needs, for an
H100 SXM (3.35 TB/s, 132 multiprocessors of 128 lanes at 1.755 GHz). "by neighbours" is torch's own sum over the 16
values of a block, as snugfit had it before.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from snugfit.formats.grids import round_e2m1_magnitude
from snugfit.methods import columns, exponents, integer_scales, kernels, scales

H100_BYTES, H100_LANES = 3.35e12, 132 * 128 * 1.755e9
# for a value and a candidate: clamp, product, 4 of the corrections, 5 to round, product, difference, square, sum
INSTRUCTIONS = 15
INSTRUCTIONS_OF = {"none": INSTRUCTIONS, "features": INSTRUCTIONS + 1, "pairs": INSTRUCTIONS + 17}


def milliseconds(work: Callable[[], object], repeats: int, device: str) -> float:
    def once() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - start)

    once()
    return min(once() for _ in range(repeats))


def by_neighbours(weight: Tensor, scale: Tensor) -> Tensor:
    """The sweep in torch as it was: sums over the innermost dimension, 8192 blocks at a time."""

    def choose(magnitude: Tensor) -> Tensor:
        plain = magnitude.amax(-1).div_(6 * scale).clamp(2.0**-9, 448.0).to(torch.float8_e4m3fn)
        codes = plain.view(torch.uint8).to(torch.int16)
        best, lowest = plain, torch.full(plain.shape, torch.inf, device=plain.device)
        for offset in scales.OFFSETS["sweep"]:
            code = (codes + offset).clamp_(1, 126).to(torch.uint8).view(torch.float8_e4m3fn)
            step = (code.float() * scale).unsqueeze(-1)
            error = round_e2m1_magnitude(magnitude / step).mul_(step).sub_(magnitude).square_().sum(-1)
            better = error < lowest
            lowest = torch.where(better, error, lowest)
            best = torch.where(better, code.view(torch.uint8), best.view(torch.uint8)).view(torch.float8_e4m3fn)
        return best

    blocks = weight.reshape(-1, 16)
    chunk = 1 << 20 if weight.is_cuda else 8192
    return torch.cat([choose(part.float().abs()) for part in blocks.split(chunk)]).view(len(weight), -1)


def main() -> None:  # noqa: PLR0915
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    device, repeats = options.device, options.repeats
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(options.rows, options.features, generator=generator) * 0.02
    weight = exact.to(getattr(torch, options.dtype)).to(device)
    inputs = torch.randn(256, options.features, generator=generator)
    blocks = inputs.view(256, -1, 16)
    importance: dict[str, Tensor | None] = {
        "none": None,
        "features": inputs.square().mean(0).to(device),
        "pairs": (torch.einsum("tbi,tbj->bij", blocks, blocks) / 256).to(device),
    }
    scale = scales.global_scale(weight.abs().max(), "sweep")
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{options.rows} x {options.features} {options.dtype}, {where}; milliseconds")
    print(f"{'':40}{'torch':>10}{'kernel':>10}{'floor' if device == 'cuda' else '':>10}")

    def row(name: str, plain: Callable[[], object] | None, fast: Callable[[], object], instructions: float) -> None:
        before = milliseconds(plain, 2, device) if plain is not None else None
        after = milliseconds(fast, repeats, device)
        floor = max(weight.nbytes / H100_BYTES, weight.numel() * instructions / H100_LANES) * 1000
        shown = "" if before is None else f"{before:10.2f}"
        least = f"{floor:10.3f}" if device == "cuda" else ""
        print(f"{name:40}{shown:>10}{after:10.3f}{least}")

    def search(rule: str, weighting: str, objective: str = "mse") -> None:
        given = importance[weighting]
        count = len(scales.OFFSETS[rule])
        plain = None
        if rule != "exhaustive" and weighting != "pairs":

            def plain() -> Tensor:
                return scales.plain_block_scales(weight, scale, rule, objective, given)

        row(
            f"nvfp4 {rule} ({count}) {objective} {weighting}",
            plain,
            lambda: scales.block_scales(weight, scale, rule, objective, given),
            INSTRUCTIONS_OF[weighting] * count if count > 1 else 0,
        )

    same = torch.equal(
        by_neighbours(weight, scale).view(torch.uint8), scales.block_scales(weight, scale, "sweep").view(torch.uint8)
    )
    print(f"{f'nvfp4 sweep, by neighbours (same: {same})':40}", end="")
    print(f"{milliseconds(lambda: by_neighbours(weight, scale), repeats, device):10.2f}")
    search("absmax", "none")
    search("four-over-six", "none")
    search("sweep", "none")
    for weighting in importance:
        search("weighted", weighting)
    for weighting in importance:
        search("exhaustive", weighting)
    features = importance["features"]
    row(
        "mxfp4 weighted (4) features",
        lambda: exponents.plain_block_exponents(weight, "weighted", features),
        lambda: exponents.block_exponents(weight, "weighted", features),
        4 * 12,
    )
    for group, symmetric in ((128, True), (32, False)):
        row(
            f"int4 g{group} {'symmetric' if symmetric else 'asymmetric'} ({len(integer_scales.FACTORS)}) features",
            None,
            lambda group=group, symmetric=symmetric: integer_scales.integer_scales(  # type: ignore[misc]
                weight, group, symmetric, features
            ),
            len(integer_scales.FACTORS) * 20,
        )
    wide = columns.MOST_COLUMNS
    target = exact[:, :wide].contiguous().to(device)
    step = target.abs().mean() * torch.full_like(target, 0.5)
    gram = (inputs[:, :wide].t() @ inputs[:, :wide] / 256).to(device)
    gram.diagonal().add_(1.0)
    feedback = gram.triu(1) / 4
    column_loops: list[tuple[str, Callable[[], object], Callable[[], object]]] = [
        (
            f"round {wide} columns with feedback",
            lambda: columns.plain_round_block(target.clone(), target, step, None, feedback, "e2m1"),
            lambda: columns.round_block(target.clone(), target, step, None, feedback, "e2m1"),
        ),
        (
            f"descend {wide} columns",
            lambda: columns.plain_descend_block(target.clone(), target.clone(), step, None, gram, "e2m1"),
            lambda: columns.descend_block(target.clone(), target.clone(), step, None, gram, "e2m1"),
        ),
    ]
    for name, plain, fast in column_loops:
        row(name, plain, fast, 0)
    for problem in kernels.kernel_problems():
        print("problem:", problem)


if __name__ == "__main__":
    main()
