"""Machine code for scale searches and columns: bit for bit what the plain definitions say, on every kind of input."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from snugfit.formats import machine_code
from snugfit.methods import columns, cpu_kernels, exponents, integer_scales, kernels, scales
from snugfit.methods.candidates import Grid

RULES = tuple(scales.OFFSETS)
K = 256


@pytest.fixture(autouse=True)
def _kernels_for_small_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SMALL", 0)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def usual() -> Tensor:
    return random(0, 150, K) * 0.02


def outliers() -> Tensor:
    return (random(1, 65, K) / random(2, 65, K)).clamp(-1e4, 1e4)


def every_size() -> Tensor:
    """From numbers whose squares vanish, subnormal ones among them, to numbers whose squares are infinite."""
    return random(3, 130, K) * torch.logspace(-44, 37, 130).unsqueeze(1)


def few_values() -> Tensor:
    return torch.randint(-8, 9, (67, K), generator=torch.Generator().manual_seed(4)).float() / 4


def zeros_inside() -> Tensor:
    weight = random(5, 64, K)
    weight[:, 32:96] = 0
    weight[::2, 96:112] = 0
    return weight


def one_row() -> Tensor:
    return random(6, 1, K)


def all_zero() -> Tensor:
    return torch.zeros(3, K)


WEIGHTS: dict[str, Callable[[], Tensor]] = {
    make.__name__: make for make in (usual, outliers, every_size, few_values, zeros_inside, one_row, all_zero)
}
IMPORTANCE = ("none", "features", "pairs")


def importance(kind: str) -> Tensor | None:
    """E[x^2] or E[x x^T] of inputs of all sizes, of which the first block's, and one more, are always zero."""
    inputs = random(7, 40, K) * torch.logspace(-3, 3, K)[torch.randperm(K, generator=torch.Generator().manual_seed(8))]
    inputs[:, :16] = 0
    inputs[:, 40] = 0
    blocks = inputs.view(40, K // 16, 16)
    found = {"none": None, "features": inputs.square().mean(0), "pairs": torch.einsum("tbi,tbj->bij", blocks, blocks)}
    return found[kind]


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weighting", IMPORTANCE)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_block_scales_are_the_plain_ones(kind: str, rule: str, weighting: str, dtype: torch.dtype) -> None:
    """NVFP4's scales equal the definition's, for each rule, importance and dtype."""
    weight = WEIGHTS[kind]().clamp(-6e4, 6e4).to(dtype) if dtype == torch.float16 else WEIGHTS[kind]().to(dtype)
    if rule == "exhaustive":
        weight = weight[:: max(1, len(weight) // 3)]
    scale = scales.global_scale(weight.abs().max(), rule)
    found = scales.block_scales(weight, scale, rule, "mse", importance(weighting))
    assert same(found, scales.plain_block_scales(weight, scale, rule, "mse", importance(weighting)))


@pytest.mark.parametrize("objective", ["mae", "absmax"])
@pytest.mark.parametrize("rule", ["four-over-six", "sweep"])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_other_objectives_are_the_plain_ones(kind: str, rule: str, objective: str) -> None:
    """The same for sums and maxima of magnitudes of errors."""
    weight = WEIGHTS[kind]()
    scale = scales.global_scale(weight.abs().max(), rule)
    found = scales.block_scales(weight, scale, rule, objective)
    assert same(found, scales.plain_block_scales(weight, scale, rule, objective))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rule", tuple(exponents.LOWER))
@pytest.mark.parametrize("kind", WEIGHTS)
def test_exponents_are_the_plain_ones(kind: str, rule: str, *, weighted: bool) -> None:
    """MXFP4's exponents equal the definition's."""
    weight, factors = WEIGHTS[kind](), importance("features") if weighted else None
    assert same(
        exponents.block_exponents(weight, rule, factors), exponents.plain_block_exponents(weight, rule, factors)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_integer_scales_are_the_plain_ones(
    kind: str, group: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, *, symmetric: bool
) -> None:
    """INT4's scales and zero points equal the definition's, with importance and without."""
    weight = WEIGHTS[kind]().clamp(-6e4, 6e4).to(dtype)
    for factors in (None, importance("features")):
        monkeypatch.setattr(kernels, "SMALL", 0)
        found, zeros = integer_scales.integer_scales(weight, group, symmetric, factors)
        monkeypatch.setattr(kernels, "SMALL", math.inf)
        wanted, wanted_zeros = integer_scales.integer_scales(weight, group, symmetric, factors)
        assert same(found, wanted)
        assert (zeros is None) == (wanted_zeros is None) == symmetric
        assert zeros is None or wanted_zeros is None or same(zeros, wanted_zeros)


@pytest.mark.parametrize("columns_in_block", [1, 48, 128])
@pytest.mark.parametrize("rows", [1, 64, 150])
@pytest.mark.parametrize("grid", ["e2m1", "e4m3", "int4", "int4 with zero points"])
def test_columns_are_the_plain_ones(grid: str, rows: int, columns_in_block: int) -> None:
    """Rounding with feedback, and descent after it, give the definition's values and gradients."""
    shape = rows, columns_in_block
    names: dict[str, Grid] = {"e2m1": "e2m1", "e4m3": "e4m3"}
    name = names.get(grid, "int4")
    zero = random(1, *shape).mul(3).round().clamp(-8, 7) if grid.endswith("points") else None
    exact, step = random(2, *shape), random(3, *shape).abs() * 0.3 + 0.02
    inputs = random(4, 300, columns_in_block)
    hessian = inputs.t() @ inputs / 300 + 0.05 * torch.eye(columns_in_block)
    feedback = (hessian / hessian.diagonal().unsqueeze(1)).triu(1)
    start = exact + 0.1 * random(5, *shape)
    step[:, 1::5] *= 1e-3  # values beyond the largest code
    found = columns.round_block(start.clone(), exact, step, zero, feedback, name)
    assert torch.equal(found, columns.plain_round_block(start.clone(), exact, step, zero, feedback, name))
    moved, gradient = found.clone(), (found - exact) @ hessian
    plain, plain_gradient = moved.clone(), gradient.clone()
    columns.descend_block(moved, gradient, step, zero, hessian, name)
    columns.plain_descend_block(plain, plain_gradient, step, zero, hessian, name)
    assert torch.equal(moved, plain)
    assert torch.equal(gradient, plain_gradient)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_and_chunks_do_not_show(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales are the same on any number of threads, and however many rows are converted at once."""
    weight = torch.cat([usual(), outliers(), usual()])
    before = weight.clone()
    scale = scales.global_scale(weight.abs().max(), "weighted")
    wanted = scales.plain_block_scales(weight, scale, "weighted")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(cpu_kernels, "CHUNK_VALUES", 1)
    assert same(scales.block_scales(weight, scale, "weighted"), wanted)
    assert torch.equal(weight, before)


def test_few_rows_of_many_columns_go_by_machine_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns are gone through one after another, so a block is worth a compiler's time that other work is not."""
    plainly: list[int] = []

    def plain(target: Tensor, *_: object) -> Tensor:
        plainly.append(len(target))
        return target

    monkeypatch.setattr(columns, "plain_round_block", plain)
    for rows in (192, 16):
        block = torch.ones(rows, 128)
        columns.round_block(block, block, block, None, torch.zeros(128, 128), "e4m3")
    assert plainly == [16]


def test_a_slice_of_a_weight_with_gradients_is_searched() -> None:
    """Neither memory with gaps nor a parameter's gradient is in the way."""
    weight = torch.nn.Parameter(random(9, 70, 2 * K))[:, ::2]
    scale = scales.global_scale(weight.detach().abs().max(), "sweep")
    assert same(scales.block_scales(weight, scale, "sweep"), scales.plain_block_scales(weight.detach(), scale, "sweep"))


def test_without_numba_the_plain_definition_serves() -> None:
    """Where numba cannot be imported a search gives the same scales; small weights do not import it at all."""
    script = """
import sys
import torch
from snugfit.methods import scales
weight, scale = torch.ones(2, 64), torch.tensor(0.01)
scales.block_scales(weight, scale, "sweep")
assert "numba" not in sys.modules
sys.modules["numba"] = None
found = scales.block_scales(torch.ones(2, 1 << 16), scale, "sweep")
assert (found.view(torch.uint8) == scales.block_scales(weight, scale, "sweep").view(torch.uint8)[0, 0]).all()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where numba finds no folder for machine code, kernels are made anew by each process."""
    seen: list[bool] = []

    def no_cache(*signature: object, cache: bool = False, **_: object) -> Callable[[Callable[..., None]], object]:
        seen.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr(machine_code, "njit", no_cache)
    assert machine_code.compiled(print) is print
    assert seen == [True, False]
