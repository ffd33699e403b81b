"""Scales that learn: the codes of a quantized weight stay, each block scale s becomes s * exp(t), and t gets gradients.

The rounding of a scale to its stored type is straight-through: the forward pass sees the rounded scale, the gradient
passes as if it had not been rounded. The optimizer is Adam in fp32 with a rate that falls along a cosine; the result is
a running mean of the last steps, which overfits less than the last one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from snugfit.formats.grids import E4M3_MAX, E4M3_TINY, e2m1_pairs, to_e4m3, unpack_int4
from snugfit.formats.int4 import INT4Weight
from snugfit.formats.nvfp4 import NVFP4Weight
from snugfit.formats.spec import NVFP4_BLOCK

LEARNED_FORMATS = frozenset({"nvfp4", "nvfp4a16", "int4"})  # MXFP4's scales are powers of two: nothing lies between
FARTHEST = 1.0  # |t| at most
FIRST_DECAY, SECOND_DECAY, EPSILON = 0.9, 0.99, 1e-10  # of Adam
MEAN_SHARE = 0.05  # of all steps, over which the running mean of t is taken


@dataclass(frozen=True, eq=False)
class ScaledCodes:
    """Codes of a weight [N, K] under scales that learn; the weight that runs is in `dtype`."""

    quantized: NVFP4Weight | INT4Weight
    dtype: torch.dtype

    @property
    def stored(self) -> Tensor:
        """The scales [N, K / block] that it starts from, as files store them."""
        return self.quantized.block_scale if isinstance(self.quantized, NVFP4Weight) else self.quantized.scale

    @cached_property
    def _limits(self) -> tuple[float, float]:
        """The smallest and the largest positive scale that can be stored."""
        if isinstance(self.quantized, NVFP4Weight):
            return E4M3_TINY, E4M3_MAX
        kind = torch.finfo(self.quantized.scale.dtype)
        return kind.tiny, kind.max

    def scales(self, shifts: Tensor) -> Tensor:
        """The scales under the logarithms `shifts` of their factors, fp32 [N, K / block], as files store them."""
        exact = (self.stored.float() * shifts.exp()).clamp_(*self._limits)
        return to_e4m3(exact) if isinstance(self.quantized, NVFP4Weight) else exact.to(self.stored.dtype)

    def clamp_(self, shifts: Tensor) -> None:
        """Bring `shifts` back, in place, to where scales can be stored, and to FARTHEST at most."""
        start, (low, high) = self.stored.float(), self._limits
        shifts.clamp_(-FARTHEST, FARTHEST)
        torch.minimum(torch.maximum(shifts, (low / start).log_()), (high / start).log_(), out=shifts)

    def codes(self) -> Tensor:
        """What scales multiply, fp32 [N, K / block, block], without the global scale."""
        if isinstance(self.quantized, NVFP4Weight):
            values: Tensor = e2m1_pairs(self.quantized.packed).unflatten(-1, (-1, NVFP4_BLOCK))
            return values
        codes = unpack_int4(self.quantized.packed, self.quantized.shape).float()
        groups: Tensor = codes.unflatten(1, (self.quantized.scale.shape[1], -1))
        zero = self.quantized.zero_point
        return groups if zero is None else groups.sub_(zero.float().unsqueeze(-1))

    def with_global(self, scales: Tensor) -> Tensor:
        """fp32 scales times the global scale, if the format has one."""
        return scales * self.quantized.global_scale if isinstance(self.quantized, NVFP4Weight) else scales

    def weight(self, shifts: Tensor) -> Tensor:
        """The weight [N, K] under `shifts`, to which gradients flow; with shifts of 0 that of the file."""
        result: Tensor = _Weight.apply(shifts, self)  # type: ignore[no-untyped-call]
        return result


class _Weight(torch.autograd.Function):
    """`ScaledCodes.weight`: its gradient needs the codes alone, so that no 16-bit weight is kept for it."""

    @staticmethod
    def forward(ctx: Any, shifts: Tensor, codes: ScaledCodes) -> Tensor:
        """The weight."""
        ctx.save_for_backward(shifts)
        ctx.codes = codes
        step = codes.with_global(codes.scales(shifts).float())
        return codes.codes().mul_(step.unsqueeze(-1)).flatten(1).to(codes.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """The gradient of `shifts`: that of a scale is the sum over its block, and ds / dt = s."""
        (shifts,), codes = ctx.saved_tensors, ctx.codes
        of_steps = codes.codes().mul_(gradient.reshape(*shifts.shape, -1)).sum(-1)
        return codes.with_global(of_steps).mul_(codes.stored.float()).mul_(shifts.exp()), None


@dataclass(frozen=True)
class Schedule:
    """`steps` of Adam: the rate rises over the first twentieth of them to `rate`, then falls to 0 along a cosine."""

    steps: int
    rate: float

    @property
    def decay(self) -> float:
        """What the running mean keeps of itself in a step."""
        return 1 - 1 / max(1.0, MEAN_SHARE * self.steps)

    def rate_at(self, step: int) -> float:
        """The rate of step 0, 1, ..."""
        warmup = max(1, self.steps // 20)
        return self.rate * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / self.steps))


class LearnedScales:
    """The logarithms t of the factors of all scales, their gradients, and what Adam keeps of them, fp32.

    `shifts` has a leaf [N, K / block] for each of `codes`, by the same names; their gradients add up in `gradient`.
    """

    def __init__(self, codes: Mapping[str, ScaledCodes], schedule: Schedule) -> None:
        device = next(iter(codes.values())).stored.device
        size = sum(one.stored.numel() for one in codes.values())
        self.codes, self.schedule = codes, schedule
        self.step = 0
        self._all, self.gradient, self._first, self._second, self._mean = (
            torch.zeros(size, dtype=torch.float32, device=device) for _ in range(5)
        )
        self.shifts = {name: view.requires_grad_() for name, view in self._views(self._all).items()}
        for name, view in self._views(self.gradient).items():
            self.shifts[name].grad = view

    @property
    def size(self) -> int:
        """The number of scales."""
        return self._all.numel()

    def _views(self, flat: Tensor) -> dict[str, Tensor]:
        parts = flat.split([one.stored.numel() for one in self.codes.values()])
        return {name: part.view(self.codes[name].stored.shape) for name, part in zip(self.codes, parts, strict=True)}

    @torch.no_grad()
    def update(self) -> None:
        """One step of Adam along `gradient`, which is zero then."""
        rate = self.schedule.rate_at(self.step)
        self.step += 1
        self._first.lerp_(self.gradient, 1 - FIRST_DECAY)
        self._second.mul_(SECOND_DECAY).addcmul_(self.gradient, self.gradient, value=1 - SECOND_DECAY)
        root = self._second.sqrt().div_(math.sqrt(1 - SECOND_DECAY**self.step)).add_(EPSILON)
        self._all.addcdiv_(self._first, root, value=-rate / (1 - FIRST_DECAY**self.step))
        for name, view in self._views(self._all).items():
            self.codes[name].clamp_(view)
        self._mean.lerp_(self._all, 1 - self.schedule.decay)
        self.gradient.zero_()

    @torch.no_grad()
    def result(self) -> dict[str, Tensor]:
        """The scales of the running mean, by name, as files store them; those of the start before the first step."""
        mean = self._mean / (1 - self.schedule.decay**self.step) if self.step else self._mean
        return {name: self.codes[name].scales(view) for name, view in self._views(mean).items()}

    def state(self) -> dict[str, Tensor]:
        """What `restore` needs, beside `step`."""
        return {"shifts": self._all, "first": self._first, "second": self._second, "mean": self._mean}

    @torch.no_grad()
    def restore(self, step: int, state: Mapping[str, Tensor]) -> None:
        """Continue behind `step` steps."""
        self.step = step
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
