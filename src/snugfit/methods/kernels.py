"""Which machine code searches scales and goes through columns: numba's on a CPU, Triton's on CUDA, none for little.

Both give the bits of the plain definitions (`snugfit.methods.scales.plain_block_scales` and its neighbours), which also
serve where numba or Triton cannot be imported, and for small weights, which need not wait for a compiler. On CUDA each
kind of work is first done both ways on a few rows; where anything differs or fails, the plain definition does it all.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from snugfit.methods.candidates import Grid

SMALL = 1 << 16  # values below which torch on a CPU is faster than starting a compiler
CHECKED_ROWS = 8  # that are done both ways

_checked: dict[tuple[object, ...], bool] = {}
_problems: dict[str, None] = {}


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
        self, target: Tensor, exact: Tensor, step: Tensor, zero: Tensor | None, feedback: Tensor, *, grid: Grid
    ) -> Tensor:
        """Values of a block of columns, each making up for those before it."""

    def descend_block(
        self, values: Tensor, gradient: Tensor, step: Tensor, zero: Tensor | None, hessian: Tensor, *, grid: Grid
    ) -> None:
        """A block of columns moved to its best values, one after another."""


def kernels_for(
    tensor: Tensor,
    work: tuple[object, ...],
    here: Callable[[Kernels], Tensor],
    there: Callable[[], Tensor],
    *,
    small: int = SMALL,
) -> Kernels | None:
    """The machine code for this kind of work on this tensor; None: the plain definition is to be used.

    `here` and `there` do the work on the first CHECKED_ROWS of the tensor, with machine code and without. A CPU does
    tensors of fewer than `small` values plainly.
    """
    if tensor.device.type != "cuda":
        return _of_cpu() if tensor.device.type == "cpu" and tensor.numel() >= small else None
    found = _of_gpu()
    if found is None:
        return None
    key = (tensor.device, tensor.dtype, *work)
    if key not in _checked:
        _checked[key] = _agree(work, lambda: here(found), there)
    return found if _checked[key] else None


def _agree(work: tuple[object, ...], here: Callable[[], Tensor], there: Callable[[], Tensor]) -> bool:
    """Whether both ways give the same bits; if not, `kernel_problems` says why."""
    what = " ".join(str(part) for part in work)
    try:
        found = here()
        same = torch.equal(found.view(torch.uint8), there().view(torch.uint8))
    except Exception as error:  # noqa: BLE001  # whatever Triton, a compiler or a driver says, torch can do it
        _problems[f"{what}: {type(error).__name__}: {str(error).strip().splitlines()[:1]}"] = None
        return False
    if not same:
        _problems[f"{what}: the kernel gives other bits on this GPU"] = None
    return same


def warm_up(device: torch.device) -> None:
    """For a GPU begin, in a thread, with what Triton does once before its first kernel: it takes half a second."""
    if device.type == "cuda":
        threading.Thread(target=_make_key, daemon=True).start()


def _make_key() -> None:
    """Have Triton hash itself, for the names of kernels in its cache; it keeps the result."""
    with suppress(Exception):  # no public name; the first kernel does it otherwise
        from triton.runtime import cache as of_triton

        of_triton.triton_key()


def kernel_problems() -> list[str]:
    """Why work on CUDA was done by the plain definitions, which are slower; empty where none was."""
    return list(_problems)


@cache
def _of_cpu() -> Kernels | None:
    try:
        from snugfit.methods import cpu_kernels
    except ImportError:
        return None
    return cpu_kernels


@cache
def _of_gpu() -> Kernels | None:
    try:
        from snugfit.methods import gpu_kernels
    except ImportError as error:
        _problems[f"Triton: {error}"] = None
        return None
    return gpu_kernels
