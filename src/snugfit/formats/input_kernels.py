"""Triton kernels that round a linear's inputs in one pass over memory, with the bits of the plain definitions.

The definitions are `quantize_dequantize_input*` of this room; `snugfit.formats.inputs` chooses between the two. Every
operation here is rounded as there: divisions to nearest, sums and products one by one (`enable_fp_fusion=False`),
subnormal numbers kept. The largest magnitude of a group is that of its bits without the sign, which are in the order of
the numbers and have NaN above infinity, so that NaN carries through. Import this module only where Triton is installed.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from snugfit.formats import fp8, grids, integer
from snugfit.formats.spec import MXFP4_BLOCK, NVFP4_BLOCK, InputKind

VALUES = 2048  # of several small groups in one program
WIDEST = 8192  # values of a token at once, and the largest group
GROUP_SIZES: dict[InputKind, int] = {"nvfp4": NVFP4_BLOCK, "mxfp4": MXFP4_BLOCK}

_E2M1_MAX = tl.constexpr(grids.E2M1_MAX)
_E4M3_MAX = tl.constexpr(grids.E4M3_MAX)
_TINY = tl.constexpr(grids.FP32_TINY)
_E4M3_NORMAL = tl.constexpr(2.0**-6)
_TOKEN_SCALE_MIN = tl.constexpr(fp8.TOKEN_SCALE_MIN)
_GROUP_AMAX_MIN = tl.constexpr(fp8.GROUP_AMAX_MIN)
_INT8_MIN = tl.constexpr(integer.INT8_MIN)
_INT8_MAX = tl.constexpr(integer.INT8_MAX)
_WHOLE = tl.constexpr(2.0**23)  # from here on fp32 numbers are whole

_SIGN = tl.constexpr(-(1 << 31))
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_EXPONENT = tl.constexpr(0x7F800000)
_MANTISSA = tl.constexpr(0x7FFFFF)
_HALF_TINY = tl.constexpr(0x400000)  # 2**-127
_ONE_MANTISSA_BIT = tl.constexpr(22 << 23)
_THREE_MANTISSA_BITS = tl.constexpr(20 << 23)


@triton.jit
def _bits(values):
    return values.to(tl.int32, bitcast=True)


@triton.jit
def _number(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _at_most(values, most):
    return tl.where(values > most, most, values)  # NaN stays


@triton.jit
def _at_least(values, least):
    return tl.where(values < least, least, values)  # NaN stays


@triton.jit
def _round_e2m1(magnitude):
    """`grids.round_e2m1_magnitude`."""
    magnitude = _at_most(magnitude, _E2M1_MAX)
    anchor = tl.where(magnitude > 1.0, magnitude, 1.0)
    offset = _number((_bits(anchor) & _EXPONENT) + _ONE_MANTISSA_BIT)
    return (magnitude + offset) - offset


@triton.jit
def _round_e4m3(values):
    """`grids.round_e4m3_`."""
    magnitude = tl.abs(values)
    anchor = tl.where(magnitude > _E4M3_NORMAL, magnitude, _E4M3_NORMAL)
    offset = _number((_bits(anchor) & _EXPONENT) + _THREE_MANTISSA_BITS) * 1.5
    return (values + offset) - offset


@triton.jit
def _round_fp8(exact, scale):
    """`fp8._round_under`."""
    values = _at_least(_at_most(tl.div_rn(exact, scale), _E4M3_MAX), -_E4M3_MAX)
    return _round_e4m3(values) * scale


@triton.jit
def _round_whole(values):
    """Whole numbers nearest to `values`, ties to even, zeros with their sign."""
    magnitude = tl.abs(values)
    whole = (magnitude + _WHOLE) - _WHOLE
    return tl.where(magnitude < _WHOLE, _number(_bits(whole) | (_bits(values) & _SIGN)), values)


@triton.jit
def _round_int8(exact, scale, zero_point):
    """`integer._round_between`."""
    codes = _round_whole(tl.div_rn(exact, scale)) + zero_point
    codes = _at_most(_at_least(codes, _INT8_MIN), _INT8_MAX)
    return (codes - zero_point) * scale


@triton.jit
def _power_of_two_that_fits(amax):
    """2**ceil(log2(amax / 6)), the exponent within -127..127, as `mxfp4.quantize_dequantize_input` has it."""
    bits = _bits(tl.div_rn(amax, _E2M1_MAX))
    exponent = (bits >> 23) - 127 + tl.where((bits & _MANTISSA) > 0, 1, 0)
    exponent = tl.where(bits <= _HALF_TINY, -127, exponent)
    exponent = tl.where(bits == _EXPONENT, 0, exponent)  # infinity
    exponent = tl.where((bits == 0) | (bits > _EXPONENT), -1, exponent)  # zero and NaN
    return _number(tl.where(exponent == -127, _HALF_TINY, (exponent + 127) << 23))


@triton.jit(do_not_specialize=["groups"])
def _round_groups(
    source,
    target,
    scale,
    groups,
    features,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    EXACT: tl.constexpr,  # whether groups divide the features
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS groups of GROUP features a program, a power of two WIDTH with what is left out."""
    number = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    lane = tl.arange(0, WIDTH)[None, :]
    inside = (number < groups) & (lane < GROUP)
    if EXACT:
        place = number * GROUP + lane
    else:
        a_row = (features + GROUP - 1) // GROUP
        column = (number % a_row) * GROUP + lane
        inside = inside & (column < features)
        place = (number // a_row) * features + column
    exact = tl.load(source + place, mask=inside, other=0.0).to(tl.float32)
    magnitude_bits = _bits(exact) & _MAGNITUDE
    amax = _number(tl.max(magnitude_bits, axis=1, keep_dims=True))
    if KIND == "fp8-group":
        amax = _at_least(amax, _GROUP_AMAX_MIN)
        result = _round_fp8(exact, tl.div_rn(amax, _E4M3_MAX))
    else:
        if KIND == "nvfp4":
            one = tl.load(scale)
            block_scale = _round_e4m3(_at_most(tl.div_rn(amax, one * _E2M1_MAX), _E4M3_MAX))
            step = block_scale * one
            divisor = _at_least(step, _TINY)
        else:
            step = _power_of_two_that_fits(amax)
            divisor = step
        rounded = _round_e2m1(tl.div_rn(_number(magnitude_bits), divisor)) * step
        result = _number(_bits(rounded) | (_bits(exact) & _SIGN))
    tl.store(target + place, result.to(target.dtype.element_ty), mask=inside)


@triton.jit
def _round_tokens(source, target, scale, features, KIND: tl.constexpr, WIDTH: tl.constexpr):
    """A token a program, WIDTH features at a time: once for its scale, and once more from the cache to be rounded."""
    first = tl.program_id(0).to(tl.int64) * features
    lane = tl.arange(0, WIDTH)
    zero_point = 0.0
    if KIND == "fp8-tensor" or KIND == "int8-tensor" or KIND == "int8-tensor-asym":
        step = tl.load(scale)
        if KIND == "int8-tensor-asym":
            zero_point = tl.load(scale + 1)
    else:
        most = tl.zeros([WIDTH], tl.int32)
        low = tl.full([WIDTH], float("inf"), tl.float32)
        high = tl.full([WIDTH], float("-inf"), tl.float32)
        for start in range(0, features, WIDTH):
            inside = start + lane < features
            exact = tl.load(source + first + start + lane, mask=inside, other=0.0).to(tl.float32)
            most = tl.maximum(most, _bits(exact) & _MAGNITUDE)
            if KIND == "int8-token-asym":
                low = tl.minimum(low, tl.where(inside, exact, float("inf")))
                high = tl.maximum(high, tl.where(inside, exact, float("-inf")))
        amax = _number(tl.max(most, axis=0))
        if KIND == "fp8-token":
            step = _at_least(tl.div_rn(amax, _E4M3_MAX), _TOKEN_SCALE_MIN)
        elif KIND == "int8-token":
            step = _at_least(tl.div_rn(amax, _INT8_MAX), _TINY)
        else:
            lowest = tl.where(amax != amax, amax, tl.min(low, axis=0))
            highest = tl.where(amax != amax, amax, tl.max(high, axis=0))
            gap = highest - lowest
            step = _at_least(tl.div_rn(gap, _INT8_MAX - _INT8_MIN), _TINY)
            zero_point = _round_whole(-tl.div_rn(lowest, step) + _INT8_MIN)
    for start in range(0, features, WIDTH):
        inside = start + lane < features
        exact = tl.load(source + first + start + lane, mask=inside, other=0.0).to(tl.float32)
        steps = tl.zeros([WIDTH], tl.float32) + step
        if KIND == "fp8-token" or KIND == "fp8-tensor":
            result = _round_fp8(exact, steps)
        elif KIND == "int8-token":
            codes = _round_whole(tl.div_rn(exact, steps))
            result = _at_most(_at_least(codes, _INT8_MIN), _INT8_MAX) * steps
        else:
            result = _round_int8(exact, steps, zero_point)
        tl.store(target + first + start + lane, result.to(target.dtype.element_ty), mask=inside)


def group_of(kind: InputKind, group: int) -> int:
    """Features that share a scale of `kind`, where groups are rounded; 0 where a token or a tensor is one group."""
    return group if kind == "fp8-group" else GROUP_SIZES.get(kind, 0)


def fits(kind: InputKind, activations: Tensor, group: int) -> bool:
    """Whether a kernel rounds this tensor; the others are for the plain definition, errors among them."""
    size = group_of(kind, group)
    whole = kind not in GROUP_SIZES or activations.shape[-1] % size == 0
    floats = activations.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return floats and activations.numel() > 0 and size <= WIDEST and whole


def round_inputs(kind: InputKind, activations: Tensor, scale: Tensor | None, group: int) -> Tensor:
    """Activations [..., K] rounded as `kind` says, in their own dtype; `fits` says of which tensors.

    `scale` is the static multiplier (and zero point) of kinds that have one, fp32 on the tensor's device, `group` the
    number of features of "fp8-group".
    """
    source = activations.contiguous()
    target = torch.empty_like(source)
    features, size = source.shape[-1], group_of(kind, group)
    given = source if scale is None else scale  # a pointer that is not read
    place = torch.cuda.device(source.device) if source.is_cuda else contextlib.nullcontext()
    with place:  # Triton launches on the current device
        if size:
            groups = source.numel() // features * -(-features // size)
            width = triton.next_power_of_2(size)
            rows = max(1, VALUES // width)
            _round_groups[(triton.cdiv(groups, rows),)](
                source,
                target,
                given,
                groups,
                features,
                GROUP=size,
                KIND=kind,
                EXACT=features % size == 0,
                WIDTH=width,
                ROWS=rows,
                num_warps=4,
                enable_fp_fusion=False,
            )
        else:
            width = min(triton.next_power_of_2(features), WIDEST)
            _round_tokens[(source.numel() // features,)](
                source,
                target,
                given,
                features,
                KIND=kind,
                WIDTH=width,
                num_warps=8 if width > 2048 else 4,
                enable_fp_fusion=False,
            )
    return target
