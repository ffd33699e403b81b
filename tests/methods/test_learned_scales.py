"""Scales that learn: their gradients, their limits, the optimizer, and what files store of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from snugfit.formats import int4, nvfp4
from snugfit.formats.grids import E4M3_MAX, E4M3_TINY
from snugfit.formats.int4 import INT4Weight
from snugfit.formats.nvfp4 import NVFP4Weight
from snugfit.formats.quantized_weight import dequantize
from snugfit.methods.learned_scales import FARTHEST, LearnedScales, ScaledCodes, Schedule
from snugfit.methods.scales import block_scales, global_scale

KINDS = ("nvfp4", "int4", "int4-asymmetric")


def quantized(kind: str, n: int = 8, k: int = 64) -> NVFP4Weight | INT4Weight:
    """Random codes and scales."""
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0))
    if kind == "nvfp4":
        shared = global_scale(weight.abs().amax(), "absmax")
        return nvfp4.quantize(weight, block_scales(weight, shared, "absmax", "mse"), shared)
    return int4.quantize(weight, group_size=32, symmetric=kind == "int4")


def some_shifts(codes: ScaledCodes, size: float = 0.1) -> Tensor:
    return torch.randn(codes.stored.shape, generator=torch.Generator().manual_seed(1)) * size


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_learned_is_the_file(kind: str) -> None:
    """Shifts of 0 give the file's weight and the file's scales, bit for bit."""
    codes = ScaledCodes(quantized(kind), torch.float32)
    shifts = torch.zeros(codes.stored.shape)
    assert torch.equal(codes.weight(shifts), dequantize(codes.quantized))
    assert codes.scales(shifts).dtype == codes.stored.dtype
    assert torch.equal(codes.scales(shifts).float(), codes.stored.float())


@pytest.mark.parametrize("kind", ["int4", "int4-asymmetric"])
def test_a_gradient_is_a_finite_difference(kind: str) -> None:
    """Where scales are not rounded (INT4 of an fp32 model), the gradient of each is the loss's slope."""
    codes = ScaledCodes(quantized(kind, n=4), torch.float32)
    shifts = some_shifts(codes).requires_grad_()
    inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(2))

    def loss(at: Tensor) -> Tensor:
        return (codes.weight(at) @ inputs).tanh().square().double().sum()

    loss(shifts).backward()
    assert shifts.grad is not None
    for place in range(shifts.numel()):
        step = torch.zeros(shifts.numel()).index_fill_(0, torch.tensor([place]), 5e-3).view_as(shifts)
        with torch.no_grad():
            slope = (loss(shifts + step) - loss(shifts - step)) / 1e-2
        assert float(shifts.grad.flatten()[place]) == pytest.approx(float(slope), rel=2e-2, abs=2e-2)


def test_the_rounding_of_a_scale_is_straight_through() -> None:
    """NVFP4: the weight has the rounded scale, the gradient is that of the scale without rounding."""
    codes = ScaledCodes(quantized("nvfp4"), torch.float32)
    assert isinstance(codes.quantized, NVFP4Weight)
    shifts = some_shifts(codes).requires_grad_()
    slopes = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))
    weight = codes.weight(shifts)
    assert torch.equal(
        weight,
        nvfp4.dequantize(
            NVFP4Weight(codes.quantized.packed, codes.scales(shifts.detach()), codes.quantized.global_scale)
        ),
    )
    weight.backward(slopes)
    plain = shifts.detach().clone().requires_grad_()
    exact = codes.stored.float() * plain.exp() * codes.quantized.global_scale
    (codes.codes() * exact.unsqueeze(-1)).flatten(1).backward(slopes)
    assert shifts.grad is not None
    assert plain.grad is not None
    torch.testing.assert_close(shifts.grad, plain.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_scales_stay_storable(kind: str) -> None:
    """However far gradients push, a scale stays positive, finite and within FARTHEST of where it started."""
    start = quantized(kind)
    if isinstance(start, NVFP4Weight):
        ends = torch.tensor([E4M3_TINY, E4M3_MAX]).to(torch.float8_e4m3fn)
        start = NVFP4Weight(start.packed, ends.repeat(8, 2), start.global_scale)
    codes = ScaledCodes(start, torch.float32)
    for sign in (-1.0, 1.0):
        learned = LearnedScales({"a": codes}, Schedule(20, 1.0))
        for _ in range(20):
            learned.gradient.fill_(sign)
            learned.update()
        found = learned.result()["a"].float()
        assert found.isfinite().all()
        assert (found > 0).all()
        assert ((found / codes.stored.float()).log().abs() <= FARTHEST + 0.1).all()
        assert not torch.equal(found, codes.stored.float())


def test_what_gets_no_gradient_stays() -> None:
    """A scale without a gradient, as of a block of zeros, is the file's after any number of steps."""
    codes = ScaledCodes(quantized("nvfp4"), torch.float32)
    learned = LearnedScales({"a": codes}, Schedule(10, 0.1))
    for _ in range(10):
        learned.gradient[: learned.size // 2] = 1.0
        learned.update()
    same = learned.result()["a"].float() == codes.stored.float()
    assert same.flatten()[learned.size // 2 :].all()
    assert not same.flatten()[: learned.size // 2].any()


def test_steps_are_those_of_adam() -> None:
    """The updates are torch's Adam under the same rates, and gradients add up in the leaves."""
    codes = {name: ScaledCodes(quantized("int4"), torch.float32) for name in ("a", "b")}
    learned = LearnedScales(codes, Schedule(8, 0.01))
    own = torch.zeros(learned.size, requires_grad=True)
    adam = torch.optim.Adam([own], lr=1.0, betas=(0.9, 0.99), eps=1e-10)
    generator = torch.Generator().manual_seed(3)
    for step in range(8):
        slopes = torch.randn(learned.size, generator=generator)
        halves = slopes.view(2, *codes["a"].stored.shape)
        for name, half in zip(("a", "b"), halves, strict=True):
            learned.shifts[name].backward(half / 2)
            learned.shifts[name].backward(half / 2)
        torch.testing.assert_close(learned.gradient, slopes)
        own.grad = slopes
        adam.param_groups[0]["lr"] = learned.schedule.rate_at(step)
        adam.step()
        learned.update()
        assert not learned.gradient.any()
    found = torch.cat([learned.shifts[name].flatten() for name in ("a", "b")])
    torch.testing.assert_close(found.detach(), own.detach())


def test_the_rate_rises_and_falls() -> None:
    """The rate never exceeds its largest, comes near it once, and ends near 0."""
    schedule = Schedule(200, 0.01)
    rates = [schedule.rate_at(step) for step in range(200)]
    assert 0.0098 < max(rates) <= 0.01
    assert rates[0] == pytest.approx(0.001)
    assert 0 < rates[-1] < 1e-5
    assert Schedule(1, 0.01).rate_at(0) == 0.01


def test_what_was_stored_continues() -> None:
    """Optimizer and mean restored from their state take the same steps, bit for bit."""
    codes = {"a": ScaledCodes(quantized("nvfp4"), torch.float32)}

    def steps(learned: LearnedScales, first: int, stop: int) -> None:
        for step in range(first, stop):
            learned.gradient.copy_(torch.randn(learned.size, generator=torch.Generator().manual_seed(step)))
            learned.update()

    whole, half, other = (LearnedScales(codes, Schedule(40, 0.1)) for _ in range(3))
    steps(whole, 0, 40)
    steps(half, 0, 17)
    other.restore(17, {name: tensor.clone() for name, tensor in half.state().items()})
    steps(other, 17, 40)
    assert all(torch.equal(tensor, other.state()[name]) for name, tensor in whole.state().items())
    assert torch.equal(whole.result()["a"].float(), other.result()["a"].float())
