"""Which machine code searches scales and goes through columns: numba's on a CPU, Triton's on CUDA, none for little.

Both give the bits of the plain definitions (`snugfit.methods.scales.plain_block_scales` and its neighbours), which also
serve where numba or Triton cannot be imported, and for small weights, which need not wait for a compiler.
"""

from __future__ import annotations

from functools import cache
from typing import Protocol

from torch import Tensor

SMALL = 1 << 16  # values below which torch is faster than starting a compiler

# how candidates follow from the plain code: offsets from it; its own code, then that of 1.5 times the scale; itself,
# then every code
BY_OFFSET, FOUR_OVER_SIX, EVERY_CODE = 0, 1, 2


class Kernels(Protocol):
    """What each kind of machine code can do; arguments are those of `cpu_kernels`."""

    def block_scales(
        self,
        weight: Tensor,
        scale: Tensor,
        *,
        offsets: tuple[int, ...],
        kind: int,
        objective: str,
        factors: Tensor | None,
    ) -> Tensor:
        """NVFP4's block scales, E4M3 [N, K/16]."""

    def block_exponents(self, weight: Tensor, *, lower: int, factors: Tensor | None) -> Tensor:
        """MXFP4's exponents, uint8 [N, K/32]."""

    def best_scales(self, weight: Tensor, scales: Tensor, zeros: Tensor, factors: Tensor | None) -> Tensor:
        """uint8 [N, K/g]: the candidate with the least error for each group of integers."""

    def round_block(
        self, target: Tensor, exact: Tensor, step: Tensor, zero: Tensor | None, feedback: Tensor, *, integers: bool
    ) -> Tensor:
        """Values of a block of columns, each making up for those before it."""

    def descend_block(
        self, values: Tensor, gradient: Tensor, step: Tensor, zero: Tensor | None, hessian: Tensor, *, integers: bool
    ) -> None:
        """A block of columns moved to its best values, one after another."""


def kernels_for(tensor: Tensor) -> Kernels | None:
    """The machine code for work on this tensor; None: the plain definition is to be used."""
    if tensor.numel() < SMALL:
        return None
    return {"cpu": _of_cpu, "cuda": _of_gpu}.get(tensor.device.type, _none)()


def _none() -> None:
    return None


@cache
def _of_cpu() -> Kernels | None:
    try:
        from snugfit.methods import cpu_kernels
    except ImportError:
        return None
    return cpu_kernels


@cache
def _of_gpu() -> Kernels | None:
    return None
