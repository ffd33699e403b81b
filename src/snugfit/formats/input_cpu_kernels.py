"""Machine code for CPUs that rounds a linear's inputs in one pass over memory, with the bits of the plain definitions.

The definitions are `quantize_dequantize_input*` of this room; `snugfit.formats.inputs` chooses between the two. Every
operation is rounded alone, as there. bfloat16 is read and written as it is; other dtypes go through fp32. Import this
module only where numba is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import njit, types
from torch import Tensor

from snugfit.formats import fp8, grids
from snugfit.formats.machine_code import (
    ROWS,
    compiled,
    loaded,
    magnitude_bits,
    number,
    on_threads,
    power_below,
    signed_as,
    stored_like,
)
from snugfit.formats.spec import MXFP4_BLOCK, NVFP4_BLOCK, InputKind

GROUP_SIZES: dict[InputKind, int] = {"nvfp4": NVFP4_BLOCK, "mxfp4": MXFP4_BLOCK}
KINDS: frozenset[InputKind] = frozenset({"nvfp4", "mxfp4", "fp8-token", "fp8-group", "fp8-tensor"})

ONE, TWO, FOUR, SIX = (np.float32(value) for value in (1, 2, 4, 6))
ROUND_HALVES, ROUND_ONES, ROUND_TWOS = np.float32(2**22), np.float32(2**23), np.float32(2**24)
E4M3_MAX, E4M3_NORMAL = np.float32(grids.E4M3_MAX), np.float32(2**-6)
TINY = np.float32(grids.FP32_TINY)
TOKEN_SCALE_MIN, GROUP_AMAX_MIN = np.float32(fp8.TOKEN_SCALE_MIN), np.float32(fp8.GROUP_AMAX_MIN)
ONE_AND_A_HALF = np.float32(1.5)
THREE_MANTISSA_BITS = np.int32(20)
NO_BITS = np.int32(0)


@njit(inline="always")  # type: ignore[untyped-decorator]
def round_e2m1(magnitude: Any) -> Any:
    """The E2M1 value nearest to a non-negative number, as `grids.round_e2m1_magnitude` has it; NaN stays."""
    magnitude = SIX if magnitude > SIX else magnitude  # noqa: FURB136 - min() of numba asks for NaN
    offset = ROUND_HALVES if magnitude < TWO else (ROUND_ONES if magnitude < FOUR else ROUND_TWOS)
    return (magnitude + offset) - offset


@njit(inline="always")  # type: ignore[untyped-decorator]
def round_e4m3(value: Any) -> Any:
    """The E4M3 value nearest to a number within +-448, as `grids.round_e4m3_` has it."""
    magnitude = abs(value)
    anchor = magnitude if magnitude > E4M3_NORMAL else E4M3_NORMAL  # noqa: FURB136
    offset = power_below(anchor, THREE_MANTISSA_BITS) * ONE_AND_A_HALF
    return (value + offset) - offset


@njit(inline="always")  # type: ignore[untyped-decorator]
def round_fp8(exact: Any, scale: Any) -> Any:
    """`fp8._round_under`."""
    value = exact / scale
    value = E4M3_MAX if value > E4M3_MAX else value  # noqa: FURB136
    value = -E4M3_MAX if value < -E4M3_MAX else value  # noqa: FURB136
    return round_e4m3(value) * scale


@njit(inline="always")  # type: ignore[untyped-decorator]
def power_that_fits(amax: Any) -> Any:
    """2**ceil(log2(amax / 6)), the exponent within -127..127, as `mxfp4.quantize_dequantize_input` has it."""
    wanted = amax / SIX
    if wanted == np.float32(0) or wanted != wanted:  # noqa: PLR0124
        return np.float32(0.5)
    if wanted == np.float32(np.inf):
        return ONE
    if wanted <= np.float32(2.0**-127):
        return np.float32(2.0**-127)
    below = power_below(wanted, NO_BITS)
    return below if below == wanted else below * TWO if below >= TINY else TINY


def _kernel(kind: InputKind) -> Callable[..., None]:  # noqa: C901  # one loop each, inlined
    """Rounds rows start..stop of `source` [T, K] into `target`; groups of `size` features, or all under `given`."""
    is_nvfp4, is_mxfp4, by_token, is_static = (kind == one for one in ("nvfp4", "mxfp4", "fp8-token", "fp8-tensor"))

    def fp4(source: Any, target: Any, given: Any, _: Any, start: Any, stop: Any) -> None:
        width = NVFP4_BLOCK if is_nvfp4 else MXFP4_BLOCK  # constant: inner loops become vector instructions
        blocks = source.shape[1] // width
        steps = np.empty(blocks, np.float32)
        on_six = given * SIX
        for row in range(start, stop):
            for block in range(blocks):
                most = NO_BITS
                for i in range(width):
                    bits = magnitude_bits(loaded(source[row, block * width + i]))
                    most = bits if bits > most else most  # noqa: FURB136
                steps[block] = number(most)
            for block in range(blocks):
                if is_mxfp4:
                    steps[block] = power_that_fits(steps[block])
                else:
                    scale = steps[block] / on_six
                    scale = E4M3_MAX if scale > E4M3_MAX else scale  # noqa: FURB136
                    steps[block] = round_e4m3(scale) * given
            for block in range(blocks):
                step = steps[block]
                divisor = step
                if is_nvfp4:
                    divisor = TINY if step < TINY else step  # noqa: FURB136
                for i in range(width):
                    stored = source[row, block * width + i]
                    exact = loaded(stored)
                    rounded = round_e2m1(abs(exact) / divisor) * step
                    target[row, block * width + i] = stored_like(signed_as(rounded, exact), stored)

    def fp8_(source: Any, target: Any, given: Any, size: Any, start: Any, stop: Any) -> None:
        for row in range(start, stop):
            for first in range(0, source.shape[1], size):
                # indices that begin at 0 cannot be negative: only then do these loops become vector instructions
                some, rounded = source[row, first : first + size], target[row, first : first + size]
                scale = given
                if not is_static:
                    most = NO_BITS
                    for i in range(len(some)):
                        bits = magnitude_bits(loaded(some[i]))
                        most = bits if bits > most else most  # noqa: FURB136
                    amax = number(most)
                    if by_token:
                        scale = amax / E4M3_MAX
                        scale = TOKEN_SCALE_MIN if scale < TOKEN_SCALE_MIN else scale  # noqa: FURB136
                    else:
                        amax = GROUP_AMAX_MIN if amax < GROUP_AMAX_MIN else amax  # noqa: FURB136
                        scale = amax / E4M3_MAX
                for i in range(len(some)):
                    rounded[i] = stored_like(round_fp8(loaded(some[i]), scale), some[i])

    return fp4 if is_nvfp4 or is_mxfp4 else fp8_


@cache
def _compiled(kind: InputKind, *, bfloat16: bool) -> Callable[..., None]:
    values = types.Array(types.uint16 if bfloat16 else types.float32, 2, "C")
    return compiled(_kernel(kind), values, values, types.float32, types.int64, *ROWS)


def fits(kind: InputKind, activations: Tensor) -> bool:
    """Whether machine code rounds this tensor; the others are for the plain definition, errors among them."""
    whole = activations.dim() > 0 and activations.shape[-1] % GROUP_SIZES.get(kind, 1) == 0
    floats = activations.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return kind in KINDS and floats and activations.numel() > 0 and whole


def round_inputs(kind: InputKind, activations: Tensor, scale: Tensor | None, group: int) -> Tensor:
    """Activations [..., K] rounded as `kind` says, in their own dtype; `fits` says of which tensors.

    `scale` is the static multiplier of kinds that have one, fp32, `group` the number of features of "fp8-group".
    """
    features = activations.shape[-1]
    source = activations.detach().reshape(-1, features).contiguous()
    bfloat16 = source.dtype == torch.bfloat16
    if source.dtype == torch.float16:
        source = source.float()
    target = torch.empty_like(source)
    kernel = _compiled(kind, bfloat16=bfloat16)
    given = np.float32(1.0 if scale is None else float(scale.reshape(-1)[0]))
    size = group if kind == "fp8-group" else features
    arrays = [_array(tensor) for tensor in (source, target)]
    on_threads(lambda start, stop: kernel(*arrays, given, size, start, stop), len(source))
    return target.to(activations.dtype).view(activations.shape)


def _array(tensor: Tensor) -> Any:
    """The tensor's memory for numba, which knows no bfloat16."""
    return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy()
