"""Rounds a linear's inputs as an engine does, by kind: the plain definitions, and kernels with the same bits.

On CUDA the kernels (`input_kernels.py`) need Triton, which comes with torch's CUDA build, and a C compiler. The first
tensor of each kind is rounded both ways; where Triton is missing or anything differs, the plain definitions round all
tensors. On a CPU numba makes them (`input_cpu_kernels.py`), for tensors that are worth a compiler's time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from snugfit.formats import fp8, integer, mxfp4, nvfp4
from snugfit.formats.spec import FP8_BLOCK, InputKind

CHECKED_TOKENS = 4  # tokens that are rounded both ways
SMALL = 1 << 16  # values below which torch on a CPU is faster than starting a compiler

# inputs under scales made at run time, and those under numbers from the file: a multiplier, and a zero point if any
_DYNAMIC: Mapping[InputKind, Callable[[Tensor], Tensor]] = {
    "fp8-token": fp8.quantize_dequantize_input,
    "int8-token": integer.quantize_dequantize_input,
    "int8-token-asym": integer.quantize_dequantize_input_asymmetric,
    "mxfp4": mxfp4.quantize_dequantize_input,
}
_STATIC: Mapping[InputKind, Callable[..., Tensor]] = {
    "nvfp4": nvfp4.quantize_dequantize_input,
    "fp8-tensor": fp8.quantize_dequantize_input_static,
    "int8-tensor": integer.quantize_dequantize_input_static,
    "int8-tensor-asym": integer.quantize_dequantize_input_static,
}
STATIC_KINDS = frozenset(_STATIC)
_checked: dict[tuple[InputKind, int, torch.dtype, torch.device], bool] = {}
_problems: dict[str, None] = {}


@dataclass(frozen=True, eq=False)
class InputRounding:
    """Rounds activations [..., K] as `kind` says, in their own dtype.

    `scale` is the static multiplier, fp32 () (with a zero point [2]), of kinds that have one. `group` is the number of
    features under one scale of kind "fp8-group".
    """

    kind: InputKind
    scale: Tensor | None = None
    group: int = FP8_BLOCK
    _placed: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __call__(self, activations: Tensor) -> Tensor:
        """The activations rounded, in one pass where a kernel can."""
        if not self.is_fused(activations):
            return self.plain(activations)
        if activations.device.type == "cpu":
            from snugfit.formats import input_cpu_kernels

            return input_cpu_kernels.round_inputs(self.kind, activations, self.scale, self.group)
        from snugfit.formats import input_kernels

        return input_kernels.round_inputs(self.kind, activations, self._static(activations), self.group)

    def plain(self, activations: Tensor) -> Tensor:
        """The same by the definition, in plain torch."""
        if self.kind == "fp8-group":
            return fp8.quantize_dequantize_input_groups(activations, self.group)
        if self.kind in _DYNAMIC:
            return _DYNAMIC[self.kind](activations)
        assert self.scale is not None, f"{self.kind} without a scale"
        return _STATIC[self.kind](activations, *self.scale.to(activations.device).view(-1))

    def is_fused(self, activations: Tensor) -> bool:
        """Whether a kernel rounds these activations; on CUDA the first of a kind are rounded both ways to see it."""
        if activations.device.type == "cpu":
            return activations.numel() >= SMALL and _numba_rounds(self.kind, activations)
        if not activations.is_cuda or _triton_problem() is not None:
            return False
        from snugfit.formats import input_kernels

        if not input_kernels.fits(self.kind, activations, self.group):
            return False
        key = (self.kind, input_kernels.group_of(self.kind, self.group), activations.dtype, activations.device)
        if key not in _checked:
            _checked[key] = self._agrees(activations.reshape(-1, activations.shape[-1])[:CHECKED_TOKENS])
        return _checked[key]

    def _agrees(self, activations: Tensor) -> bool:
        """Whether the kernel gives the plain definition's bits; what else happens is kept for `kernel_problems`."""
        from snugfit.formats import input_kernels

        finite = activations.nan_to_num(0.0, 0.0, 0.0)
        try:
            found = input_kernels.round_inputs(self.kind, finite, self._static(finite), self.group)
        except Exception as error:  # noqa: BLE001  # whatever Triton, a compiler or a driver says, torch can do it
            _problems[f"{self.kind}: {type(error).__name__}: {str(error).strip().splitlines()[:1]}"] = None
            return False
        same = torch.equal(found.view(torch.uint8), self.plain(finite).view(torch.uint8))
        if not same:
            _problems[f"{self.kind}: the kernel gives other bits on this GPU"] = None
        return same

    def _static(self, activations: Tensor) -> Tensor | None:
        """The scale where the activations are; it goes to a device once, because a GPU is waited for."""
        if self.scale is None:
            return None
        device = activations.device
        if device not in self._placed:
            self._placed[device] = self.scale.to(device, torch.float32).view(-1)
        return self._placed[device]


def kernel_problems() -> list[str]:
    """Why tensors on CUDA were rounded by the plain definitions, which are slower; empty where none was."""
    return list(_problems)


def _numba_rounds(kind: InputKind, activations: Tensor) -> bool:
    """Whether numba is installed, and rounds these activations."""
    try:
        from snugfit.formats import input_cpu_kernels
    except ImportError:
        return False
    return input_cpu_kernels.fits(kind, activations)


@cache
def _triton_problem() -> str | None:
    """Why there are no kernels at all, None where Triton is installed."""
    try:
        from snugfit.formats import input_kernels  # noqa: F401
    except ImportError as error:
        _problems[f"Triton: {error}"] = None
        return str(error)
    return None
