"""The Triton kernels of scale searches and column loops give the plain definitions' bits."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from snugfit.methods import columns, exponents, integer_scales, kernels, scales
from snugfit.methods.candidates import Grid

pytestmark = pytest.mark.gpu

K = 512
IMPORTANCE = ("none", "features", "pairs")


@pytest.fixture(autouse=True)
def _kernels_for_small_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SMALL", 0)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "usual": lambda: random(0, 300, K) * 0.02,
    "outliers": lambda: (random(1, 131, K) / random(2, 131, K)).clamp(-1e4, 1e4),
    "every size": lambda: random(3, 260, K) * torch.logspace(-44, 37, 260).unsqueeze(1),
    "few values": lambda: torch.randint(-8, 9, (67, K), generator=torch.Generator().manual_seed(4)).float() / 4,
    "one row": lambda: random(6, 1, K),
    "zeros": lambda: torch.zeros(3, K),
}


def weight_of(kind: str, dtype: torch.dtype) -> Tensor:
    weight = WEIGHTS[kind]()
    weight[:, 32:48] = 0
    return (weight.clamp(-6e4, 6e4) if dtype == torch.float16 else weight).to(dtype)


def importance(kind: str) -> Tensor | None:
    inputs = random(7, 40, K) * torch.logspace(-3, 3, K)[torch.randperm(K, generator=torch.Generator().manual_seed(8))]
    inputs[:, :16] = 0
    inputs[:, 40] = 0
    blocks = inputs.view(40, K // 16, 16)
    found = {"none": None, "features": inputs.square().mean(0), "pairs": torch.einsum("tbi,tbj->bij", blocks, blocks)}
    return found[kind]


def on(device: torch.device, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def differences(here: Tensor, there: Tensor) -> int:
    return int((here.contiguous().view(torch.uint8) != there.cpu().contiguous().view(torch.uint8)).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weighting", IMPORTANCE)
@pytest.mark.parametrize("rule", tuple(scales.OFFSETS))
def test_block_scales_are_the_plain_ones(cuda: torch.device, rule: str, weighting: str, dtype: torch.dtype) -> None:
    """NVFP4's scales equal the definition's on the CPU, for each rule, importance and dtype."""
    for kind in WEIGHTS:
        weight = weight_of(kind, dtype)
        factors = importance(weighting)
        scale = scales.global_scale(weight.abs().max(), rule)
        found = scales.block_scales(weight.to(cuda), scale.to(cuda), rule, "mse", on(cuda, factors))
        assert differences(scales.plain_block_scales(weight, scale, rule, "mse", factors), found) == 0, kind
    assert not kernels.kernel_problems()


@pytest.mark.parametrize("objective", ["mae", "absmax"])
@pytest.mark.parametrize("rule", ["four-over-six", "sweep"])
def test_other_objectives_are_the_plain_ones(cuda: torch.device, rule: str, objective: str) -> None:
    """The same for sums and maxima of magnitudes of errors."""
    for kind in WEIGHTS:
        weight = weight_of(kind, torch.float32)
        scale = scales.global_scale(weight.abs().max(), rule)
        found = scales.block_scales(weight.to(cuda), scale.to(cuda), rule, objective)
        assert differences(scales.plain_block_scales(weight, scale, rule, objective), found) == 0, kind
    assert not kernels.kernel_problems()


def test_quotients_near_a_threshold_are_rounded_as_divisions(cuda: torch.device) -> None:
    """Values a last place from the middle between two codes, under steps of all kinds, end where division puts them."""
    generator = torch.Generator().manual_seed(9)
    thresholds = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    for _ in range(50):
        scale = torch.rand((), generator=generator) * 2.0 ** float(torch.randint(-40, 40, (), generator=generator))
        codes = torch.randint(1, 127, (2000, 1), generator=generator, dtype=torch.uint8).view(torch.float8_e4m3fn)
        middle = thresholds[torch.randint(7, (2000, 16), generator=generator)] * (codes.float() * scale)
        moved = middle.view(torch.int32) + torch.randint(-2, 3, (2000, 16), generator=generator, dtype=torch.int32)
        weight = moved.view(torch.float32)
        found = scales.block_scales(weight.to(cuda), scale.to(cuda), "weighted")
        assert differences(scales.plain_block_scales(weight, scale, "weighted"), found) == 0
    assert not kernels.kernel_problems()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rule", tuple(exponents.LOWER))
def test_exponents_are_the_plain_ones(cuda: torch.device, rule: str, *, weighted: bool) -> None:
    """MXFP4's exponents equal the definition's."""
    factors = importance("features") if weighted else None
    for kind in WEIGHTS:
        weight = weight_of(kind, torch.bfloat16)
        found = exponents.block_exponents(weight.to(cuda), rule, on(cuda, factors))
        assert differences(exponents.plain_block_exponents(weight, rule, factors), found) == 0, kind
    assert not kernels.kernel_problems()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_integer_scales_are_the_plain_ones(
    cuda: torch.device, group: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, *, symmetric: bool
) -> None:
    """INT4's scales and zero points equal the definition's, with importance and without."""
    for factors in (None, importance("features")):
        for kind in WEIGHTS:
            weight = weight_of(kind, dtype).clamp(-6e4, 6e4)
            monkeypatch.setattr(kernels, "SMALL", 0)
            found, zeros = integer_scales.integer_scales(weight.to(cuda), group, symmetric, on(cuda, factors))
            monkeypatch.setattr(kernels, "SMALL", math.inf)
            wanted, wanted_zeros = integer_scales.integer_scales(weight, group, symmetric, factors)
            assert differences(wanted, found) == 0, kind
            if zeros is not None and wanted_zeros is not None:
                assert differences(wanted_zeros, zeros) == 0, kind
    assert not kernels.kernel_problems()


@pytest.mark.parametrize("columns_in_block", [1, 48, 128])
@pytest.mark.parametrize("rows", [1, 150, 1027])
@pytest.mark.parametrize("grid", ["e2m1", "e4m3", "int4", "int4 with zero points"])
def test_columns_are_the_plain_ones(
    cuda: torch.device, grid: str, rows: int, columns_in_block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding with feedback, and descent after it, give the definition's bits, and gradients, on the device itself."""
    monkeypatch.setattr(kernels, "SMALL", 0)
    monkeypatch.setattr(kernels, "_checked", {})  # each case is checked against the definition on CUDA, too
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
    start[:, ::7] *= 0.0  # zeros of both signs
    plain = columns.plain_round_block(start.clone(), exact, step, zero, feedback, name)
    there = (start.to(cuda), exact.to(cuda), step.to(cuda), on(cuda, zero), feedback.to(cuda))
    found = columns.round_block(*there, name)
    assert torch.equal(found.cpu().view(torch.int32), plain.view(torch.int32))
    gradient = (plain - exact) @ hessian
    moved, moved_gradient = plain.to(cuda), gradient.to(cuda)
    columns.descend_block(moved, moved_gradient, there[2], there[3], hessian.to(cuda), name)
    columns.plain_descend_block(plain, gradient, step, zero, hessian, name)
    assert torch.equal(moved.cpu().view(torch.int32), plain.view(torch.int32))
    assert torch.equal(moved_gradient.cpu(), gradient)
    assert not kernels.kernel_problems()


def test_a_kernel_that_fails_is_done_without(cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Triton or a driver refuses, or bits differ, the plain definition does the work, and it is said."""
    monkeypatch.setattr(kernels, "_checked", {})
    monkeypatch.setattr(kernels, "_problems", {})
    gpu_kernels = pytest.importorskip("snugfit.methods.gpu_kernels")

    def refuse(*_: object, **__: object) -> Tensor:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(gpu_kernels, "block_scales", refuse)
    weight, scale = random(9, 70, K).to(cuda), torch.tensor(0.01, device=cuda)
    found = scales.block_scales(weight, scale, "sweep")
    assert differences(scales.plain_block_scales(weight, scale, "sweep").cpu(), found) == 0
    assert [problem for problem in kernels.kernel_problems() if "no compiler" in problem]
