"""The searches and column loops of this room as Triton kernels for CUDA, with the bits of the plain definitions.

Every product and sum is rounded alone (`enable_fp_fusion=False`) and in the order of `snugfit.methods.importance`;
divisions are to nearest, subnormal numbers kept. A thread has a block of a weight, all of its features in registers,
and goes over all candidates with them. Import this module only where Triton is installed.

The search for NVFP4 divides 16 values by each candidate's step. It takes the step's reciprocal once, rounded to
nearest, and corrects each product with it twice by its own remainder, in fused multiply-adds: after the first
correction the quotient is within a unit of its last place, after the second it is rounded to nearest (Markstein 1990;
tried for every significand of a step beside every threshold between codes). Step and values are brought near 1 by one
power of two before, so that no reciprocal or remainder leaves the range; values so small that this loses bits are far
below half a step.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl
from torch import Tensor

from snugfit.formats import grids
from snugfit.methods.candidates import EVERY_CODE, FOUR_OVER_SIX, Grid

BLOCKS = 128  # of a program of the searches
GROUPS = 64  # of integers, the same
ROWS = 4  # of a program of the column loops, a warp each
INTERPRETED = bool(triton.knobs.runtime.interpret)  # on a CPU: multiply-adds are not fused there, so divisions it is

_INTERPRETED = tl.constexpr(INTERPRETED)
_FOUR_OVER_SIX = tl.constexpr(FOUR_OVER_SIX)
_EVERY_CODE = tl.constexpr(EVERY_CODE)
_E2M1_MAX = tl.constexpr(grids.E2M1_MAX)
_E4M3_MAX = tl.constexpr(grids.E4M3_MAX)
_E4M3_TINY = tl.constexpr(grids.E4M3_TINY)
_E4M3_NORMAL = tl.constexpr(2.0**-6)
_WHOLE = tl.constexpr(2.0**23)  # from here on fp32 numbers are whole
_SIGN = tl.constexpr(-(1 << 31))
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_EXPONENT = tl.constexpr(0x7F800000)
_MANTISSA = tl.constexpr(0x7FFFFF)
_ONE_MANTISSA_BIT = tl.constexpr(22 << 23)
_THREE_MANTISSA_BITS = tl.constexpr(20 << 23)


@triton.jit
def _bits(values):
    return values.to(tl.int32, bitcast=True)


@triton.jit
def _number(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _nearest_e2m1(magnitude):
    """The E2M1 value nearest to non-negative numbers."""
    return _nearest_up_to_six(tl.where(magnitude < _E2M1_MAX, magnitude, _E2M1_MAX))


@triton.jit
def _nearest_up_to_six(magnitude):
    """The same for numbers that are at most 6, or a last place above."""
    anchor = tl.maximum(magnitude, 1.0)
    offset = _number((_bits(anchor) & _EXPONENT) + _ONE_MANTISSA_BIT)
    return (magnitude + offset) - offset


@triton.jit
def _signed_as(magnitude, values):
    """Non-negative numbers with the signs of others, zeros too: Triton's minus is 0 - x, which has no negative zero."""
    return _number(_bits(magnitude) | (_bits(values) & _SIGN))


@triton.jit
def _nearest_signed_e2m1(scaled):
    return _signed_as(_nearest_e2m1(tl.abs(scaled)), scaled)


@triton.jit
def _whole(values):
    """Whole numbers nearest to `values`, ties to even."""
    magnitude = tl.abs(values)
    rounded = (magnitude + _WHOLE) - _WHOLE
    return tl.where(magnitude < _WHOLE, _signed_as(rounded, values), values)


@triton.jit
def _nearest_e4m3(scaled):
    """The E4M3 value nearest to numbers; zeros are positive."""
    scaled = tl.where(scaled < -_E4M3_MAX, -_E4M3_MAX, scaled)
    scaled = tl.where(scaled > _E4M3_MAX, _E4M3_MAX, scaled)
    anchor = tl.maximum(tl.abs(scaled), _E4M3_NORMAL)
    offset = _number((_bits(anchor) & _EXPONENT) + _THREE_MANTISSA_BITS) * 1.5
    return (scaled + offset) - offset


@triton.jit
def _nearest_int4(scaled, zero):
    code = _whole(scaled + zero)
    code = tl.where(code < -8.0, -8.0, code)
    code = tl.where(code > 7.0, 7.0, code)
    return code - zero


@triton.jit
def _e4m3_code(wanted):
    """The E4M3 code nearest to positive numbers, from the smallest to the largest there is; 127 for NaN."""
    wanted = tl.where(wanted < _E4M3_TINY, _E4M3_TINY, wanted)
    wanted = tl.where(wanted > _E4M3_MAX, _E4M3_MAX, wanted)
    bits = _bits(wanted)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    subnormal = ((wanted * 512.0 + _WHOLE) - _WHOLE).to(tl.int32)
    code = tl.where(wanted < _E4M3_NORMAL, subnormal, normal)
    return tl.where(wanted != wanted, 127, code)


@triton.jit
def _e4m3_value(code):
    """The fp32 value of E4M3 codes 0..126."""
    return tl.where(code < 8, code.to(tl.float32) * _E4M3_TINY, _number((code << 20) + (120 << 23)))


@triton.jit
def _load(weight, place, inside):
    return tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _larger(one, other):
    """The larger of two magnitudes by their bits, which have NaN above infinity."""
    return tl.maximum(one, _bits(other) & _MAGNITUDE)


@triton.jit
def _error(value, step, near_one, moved_step, reciprocal):
    """What rounding adds to a magnitude."""
    magnitude = tl.abs(value)
    if _INTERPRETED:
        rounded = _nearest_e2m1(tl.div_rn(magnitude, step))
    else:
        moved = tl.minimum(magnitude * near_one, moved_step * _E2M1_MAX)
        quotient = moved * reciprocal
        quotient = tl.fma(tl.fma(-quotient, moved_step, moved), reciprocal, quotient)
        quotient = tl.fma(tl.fma(-quotient, moved_step, moved), reciprocal, quotient)
        rounded = _nearest_up_to_six(quotient)
    return rounded * step - magnitude


@triton.jit
def _signed(value, error):
    return tl.where(value < 0, -error, error)


@triton.jit
def _two(one, other, one_factor, other_factor, OBJECTIVE: tl.constexpr, WEIGHTED: tl.constexpr):
    """The share of two errors in the objective."""
    if OBJECTIVE == "mae":
        return tl.abs(one) + tl.abs(other)
    if OBJECTIVE == "absmax":
        return _number(_larger(_bits(one) & _MAGNITUDE, other))
    if WEIGHTED:
        return one * one * one_factor + other * other * other_factor
    return one * one + other * other


@triton.jit
def _add(total, two, OBJECTIVE: tl.constexpr):
    if OBJECTIVE == "absmax":
        return _number(_larger(_bits(total), two))
    return total + two


@triton.jit
def _products(factors, errors, FIRST: tl.constexpr):
    """error_i times the sum over j >= i of factor_ij error_j, i = FIRST."""
    row = tl.load(factors + 17 * FIRST) * errors[FIRST]
    for j in tl.static_range(FIRST + 1, 16):
        row += tl.load(factors + (16 * FIRST + j)) * errors[j]
    return errors[FIRST] * row


@triton.jit
def _code_of(candidate, plain, larger, KIND: tl.constexpr, LOWER: tl.constexpr):
    """The code of a candidate by its number; LOWER candidates have codes below the plain one."""
    if KIND == _FOUR_OVER_SIX:
        return tl.where(candidate == 0, plain, larger)
    if KIND == _EVERY_CODE:
        code = tl.where(candidate == 0, plain, candidate)
    else:
        offset = candidate - LOWER - tl.where(candidate <= LOWER, 1, 0)
        code = plain + tl.where(candidate == 0, 0, offset)
    code = tl.where(code < 1, 1, code)
    return tl.where(code > 126, 126, code)


@triton.jit(do_not_specialize=["rows"])
def _search_nvfp4(
    weight,
    factors,
    scale,
    codes,
    rows,
    blocks,  # of a row
    features,  # from a row to the next
    OBJECTIVE: tl.constexpr,
    WEIGHTING: tl.constexpr,
    KIND: tl.constexpr,
    LOWER: tl.constexpr,
    CANDIDATES: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """BLOCKS blocks a program: of neighbours in a row, or of one place in neighbouring rows, which share pairs."""
    pair_factors = factors
    if WEIGHTING == "pairs":
        block = tl.program_id(1)
        row = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
        inside = row < rows
        pair_factors = factors + block.to(tl.int64) * 256
    else:
        number = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
        inside = number < rows.to(tl.int64) * blocks
        row = number // blocks
        block = (number % blocks).to(tl.int32)
    first = row * features + block * 16
    v0 = _load(weight, first, inside)
    v1 = _load(weight, first + 1, inside)
    v2 = _load(weight, first + 2, inside)
    v3 = _load(weight, first + 3, inside)
    v4 = _load(weight, first + 4, inside)
    v5 = _load(weight, first + 5, inside)
    v6 = _load(weight, first + 6, inside)
    v7 = _load(weight, first + 7, inside)
    v8 = _load(weight, first + 8, inside)
    v9 = _load(weight, first + 9, inside)
    v10 = _load(weight, first + 10, inside)
    v11 = _load(weight, first + 11, inside)
    v12 = _load(weight, first + 12, inside)
    v13 = _load(weight, first + 13, inside)
    v14 = _load(weight, first + 14, inside)
    v15 = _load(weight, first + 15, inside)
    values = (v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, v10, v11, v12, v13, v14, v15)
    h0 = v0
    h1 = v0
    h2 = v0
    h3 = v0
    h4 = v0
    h5 = v0
    h6 = v0
    h7 = v0
    h8 = v0
    h9 = v0
    h10 = v0
    h11 = v0
    h12 = v0
    h13 = v0
    h14 = v0
    h15 = v0
    if WEIGHTING == "features":
        place = block * 16
        h0 = _load(factors, place, inside)
        h1 = _load(factors, place + 1, inside)
        h2 = _load(factors, place + 2, inside)
        h3 = _load(factors, place + 3, inside)
        h4 = _load(factors, place + 4, inside)
        h5 = _load(factors, place + 5, inside)
        h6 = _load(factors, place + 6, inside)
        h7 = _load(factors, place + 7, inside)
        h8 = _load(factors, place + 8, inside)
        h9 = _load(factors, place + 9, inside)
        h10 = _load(factors, place + 10, inside)
        h11 = _load(factors, place + 11, inside)
        h12 = _load(factors, place + 12, inside)
        h13 = _load(factors, place + 13, inside)
        h14 = _load(factors, place + 14, inside)
        h15 = _load(factors, place + 15, inside)
    weights = (h0, h1, h2, h3, h4, h5, h6, h7, h8, h9, h10, h11, h12, h13, h14, h15)
    largest = _bits(v0) & _MAGNITUDE
    for i in tl.static_range(1, 16):
        largest = _larger(largest, values[i])
    one = tl.load(scale)
    near_one = _number(254 * (1 << 23) - tl.minimum(_bits(one) & _EXPONENT, 253 * (1 << 23)))
    wanted = tl.div_rn(_number(largest), one * _E2M1_MAX)
    plain = _e4m3_code(wanted)
    larger = plain
    if KIND == _FOUR_OVER_SIX:
        larger = _e4m3_code(wanted * 1.5)
    best = plain
    if CANDIDATES > 1:
        best = _code_of(0, plain, larger, KIND, LOWER)
        lowest = tl.full([BLOCKS], float("inf"), tl.float32)
        for candidate in range(CANDIDATES):
            code = _code_of(candidate, plain, larger, KIND, LOWER)
            step = _e4m3_value(code) * one
            moved_step = step * near_one
            reciprocal = tl.div_rn(1.0, moved_step)
            loss = tl.zeros([BLOCKS], tl.float32)
            if WEIGHTING == "pairs":
                e0 = _signed(v0, _error(v0, step, near_one, moved_step, reciprocal))
                e1 = _signed(v1, _error(v1, step, near_one, moved_step, reciprocal))
                e2 = _signed(v2, _error(v2, step, near_one, moved_step, reciprocal))
                e3 = _signed(v3, _error(v3, step, near_one, moved_step, reciprocal))
                e4 = _signed(v4, _error(v4, step, near_one, moved_step, reciprocal))
                e5 = _signed(v5, _error(v5, step, near_one, moved_step, reciprocal))
                e6 = _signed(v6, _error(v6, step, near_one, moved_step, reciprocal))
                e7 = _signed(v7, _error(v7, step, near_one, moved_step, reciprocal))
                e8 = _signed(v8, _error(v8, step, near_one, moved_step, reciprocal))
                e9 = _signed(v9, _error(v9, step, near_one, moved_step, reciprocal))
                e10 = _signed(v10, _error(v10, step, near_one, moved_step, reciprocal))
                e11 = _signed(v11, _error(v11, step, near_one, moved_step, reciprocal))
                e12 = _signed(v12, _error(v12, step, near_one, moved_step, reciprocal))
                e13 = _signed(v13, _error(v13, step, near_one, moved_step, reciprocal))
                e14 = _signed(v14, _error(v14, step, near_one, moved_step, reciprocal))
                e15 = _signed(v15, _error(v15, step, near_one, moved_step, reciprocal))
                errors = (e0, e1, e2, e3, e4, e5, e6, e7, e8, e9, e10, e11, e12, e13, e14, e15)
                for i in tl.static_range(8):
                    loss += _products(pair_factors, errors, i) + _products(pair_factors, errors, i + 8)
            else:
                for i in tl.static_range(8):
                    left = _error(values[i], step, near_one, moved_step, reciprocal)
                    right = _error(values[i + 8], step, near_one, moved_step, reciprocal)
                    two = _two(left, right, weights[i], weights[i + 8], OBJECTIVE, WEIGHTING == "features")
                    loss = _add(loss, two, OBJECTIVE)
            better = loss < lowest
            lowest = tl.where(better, loss, lowest)
            best = tl.where(better, code, best)
    tl.store(codes + row * blocks + block, best.to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _search_mxfp4(
    weight,
    factors,
    exponents,
    rows,
    blocks,
    features,
    LOWER: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """BLOCKS blocks of 32 a program; features are read anew for each candidate, from the cache."""
    number = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = number < rows.to(tl.int64) * blocks
    block = (number % blocks).to(tl.int32)
    first = number // blocks * features + block * 32
    largest = tl.zeros([BLOCKS], tl.int32)
    for i in range(32):
        largest = _larger(largest, _load(weight, first + i, inside))
    plain = (largest >> 23) - 2 + tl.where((largest & _MANTISSA) >= 0x600000, 1, 0)
    best = tl.zeros([BLOCKS], tl.int32)
    if LOWER > 0:
        lowest = tl.full([BLOCKS], float("inf"), tl.float32)
        for candidate in range(LOWER + 1):
            exponent = tl.where(plain < candidate, 0, plain - candidate)
            exponent = tl.where(exponent > 252, 252, exponent)
            step = _number(tl.where(exponent == 0, 0x400000, exponent << 23))
            reciprocal = _number((254 - exponent) << 23)
            loss = tl.zeros([BLOCKS], tl.float32)
            for i in range(8):
                part = tl.zeros([BLOCKS], tl.float32)
                for j in tl.static_range(4):
                    magnitude = tl.abs(_load(weight, first + (8 * j + i), inside))
                    error = _nearest_e2m1(magnitude * reciprocal) * step - magnitude
                    square = error * error
                    if WEIGHTED:
                        square = square * _load(factors, block * 32 + (8 * j + i), inside)
                    part += square
                loss += part
            better = loss < lowest
            lowest = tl.where(better, loss, lowest)
            best = tl.where(better, candidate, best)
    chosen = tl.where(plain < best, 0, plain - best)
    tl.store(exponents + number, tl.where(chosen > 252, 252, chosen).to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _search_int4(
    weight,
    factors,
    scales,
    zeros,
    chosen,
    rows,
    groups,
    features,
    candidates,
    SIZE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """BLOCKS groups of SIZE a program, eight lanes a group; features are read anew for each candidate, from the cache.

    Lane i adds up features i, i + 8, ...; the eight sums are then added in order, each fetched by a sum of bits with
    zeros.
    """
    number = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    every = rows.to(tl.int64) * groups
    inside = number < every
    group = (number % groups).to(tl.int32)
    lane = tl.arange(0, 8)
    place = (number // groups * features + group * SIZE)[:, None] + lane[None, :]
    of_factors = (group * SIZE)[:, None] + lane[None, :]
    both = inside[:, None] & (lane < 8)[None, :]
    lowest = tl.full([BLOCKS], float("inf"), tl.float32)
    best = tl.zeros([BLOCKS], tl.int32)
    for candidate in range(candidates):
        step = tl.load(scales + candidate * every + number, mask=inside, other=1.0)[:, None]
        zero = tl.load(zeros + candidate * every + number, mask=inside, other=0.0)[:, None]
        parts = tl.zeros([BLOCKS, 8], tl.float32)
        for j in range(SIZE // 8):
            value = _load(weight, place + 8 * j, both)
            error = _nearest_int4(tl.div_rn(value, step + tl.zeros_like(value)), zero) * step - value
            square = error * error
            if WEIGHTED:
                square = square * _load(factors, of_factors + 8 * j, both)
            parts += square
        loss = tl.zeros([BLOCKS], tl.float32)
        for i in tl.static_range(8):
            loss += _number(tl.sum(tl.where((lane == i)[None, :], _bits(parts), 0), axis=1))
        better = loss < lowest
        lowest = tl.where(better, loss, lowest)
        best = tl.where(better, candidate, best)
    tl.store(chosen + number, best.to(tl.uint8), mask=inside)


@triton.jit
def _nearest(target, step, zeros, place, inside, GRID: tl.constexpr, ZERO: tl.constexpr):
    """The value of the grid nearest to each target."""
    scaled = tl.div_rn(target, step)
    if GRID == "int4":
        zero = tl.zeros_like(step)
        if ZERO:
            zero = tl.load(zeros + place, mask=inside, other=0.0)
        return _nearest_int4(scaled, zero) * step
    if GRID == "e4m3":
        return _nearest_e4m3(scaled) * step
    return _nearest_signed_e2m1(scaled) * step


@triton.jit(do_not_specialize=["rows"])
def _round_columns(
    target,
    exact,
    steps,
    zeros,
    feedback,
    values,
    rows,
    columns,
    GRID: tl.constexpr,
    ZERO: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """ROWS rows a program, their targets in registers; that of each column is fetched by a sum of bits with zeros."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    lane = tl.arange(0, WIDTH)
    place = row[:, None] * columns + lane[None, :]
    targets = tl.load(target + place, mask=inside[:, None] & (lane < columns)[None, :], other=0.0)
    for i in range(columns):
        here = row * columns + i
        step = tl.load(steps + here, mask=inside, other=1.0)
        wanted = _number(tl.sum(tl.where((lane == i)[None, :], _bits(targets), 0), axis=1))
        value = _nearest(wanted, step, zeros, here, inside, GRID, ZERO)
        tl.store(values + here, value, mask=inside)
        error = tl.load(exact + here, mask=inside, other=0.0) - value
        behind = (lane > i) & (lane < columns)
        factor = tl.load(feedback + i * columns + lane, mask=behind, other=0.0)
        targets = tl.where(behind[None, :], targets + error[:, None] * factor[None, :], targets)


@triton.jit(do_not_specialize=["rows"])
def _descend_columns(
    values,
    gradient,
    steps,
    zeros,
    hessian,
    rows,
    columns,
    GRID: tl.constexpr,
    ZERO: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """ROWS rows a program, their gradients in registers."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    lane = tl.arange(0, WIDTH)
    place = row[:, None] * columns + lane[None, :]
    both = inside[:, None] & (lane < columns)[None, :]
    slopes = tl.load(gradient + place, mask=both, other=0.0)
    for i in range(columns):
        here = row * columns + i
        step = tl.load(steps + here, mask=inside, other=1.0)
        before = tl.load(values + here, mask=inside, other=0.0)
        slope = _number(tl.sum(tl.where((lane == i)[None, :], _bits(slopes), 0), axis=1))
        curvature = tl.zeros_like(slope) + tl.load(hessian + i * columns + i)
        wanted = before - tl.div_rn(slope, curvature)
        value = _nearest(wanted, step, zeros, here, inside, GRID, ZERO)
        tl.store(values + here, value, mask=inside)
        factor = tl.load(hessian + i * columns + lane, mask=lane < columns, other=0.0)
        slopes = slopes + (value - before)[:, None] * factor[None, :]
    tl.store(gradient + place, slopes, mask=both)


def _place(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _source(weight: Tensor) -> Tensor:
    """A weight as kernels read it: any float of 16 or 32 bits, without gaps inside a row."""
    weight = weight.detach()
    return weight if weight.stride(1) == 1 and weight.element_size() in (2, 4) else weight.float().contiguous()


def block_scales(
    weight: Tensor, scale: Tensor, *, offsets: tuple[int, ...], kind: int, objective: str, factors: Tensor | None
) -> Tensor:
    """NVFP4's block scales: see `snugfit.methods.cpu_kernels.block_scales`."""
    source = _source(weight)
    rows, blocks = source.shape[0], source.shape[1] // 16
    codes = torch.empty(rows, blocks, dtype=torch.uint8, device=source.device)
    weighting = "none" if factors is None else "features" if factors.dim() == 2 else "pairs"
    grid = (triton.cdiv(rows, BLOCKS), blocks) if weighting == "pairs" else (triton.cdiv(rows * blocks, BLOCKS),)
    with _place(source):
        _search_nvfp4[grid](
            source,
            source if factors is None else factors.contiguous(),
            scale,
            codes,
            rows,
            blocks,
            source.stride(0),
            OBJECTIVE=objective,
            WEIGHTING=weighting,
            KIND=kind,
            LOWER=-min(offsets),
            CANDIDATES=len(offsets),
            BLOCKS=BLOCKS,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return codes.view(torch.float8_e4m3fn)


def block_exponents(weight: Tensor, *, lower: int, factors: Tensor | None) -> Tensor:
    """MXFP4's exponents: see `snugfit.methods.cpu_kernels.block_exponents`."""
    source = _source(weight)
    rows, blocks = source.shape[0], source.shape[1] // 32
    exponents = torch.empty(rows, blocks, dtype=torch.uint8, device=source.device)
    with _place(source):
        _search_mxfp4[(triton.cdiv(rows * blocks, BLOCKS),)](
            source,
            source if factors is None else factors.contiguous(),
            exponents,
            rows,
            blocks,
            source.stride(0),
            LOWER=lower,
            WEIGHTED=factors is not None,
            BLOCKS=BLOCKS,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return exponents


def best_scales(weight: Tensor, scales: Tensor, zeros: Tensor, factors: Tensor | None) -> Tensor:
    """The best of several scales of integers: see `snugfit.methods.cpu_kernels.best_scales`."""
    source = _source(weight)
    candidates, rows, groups = scales.shape
    chosen = torch.empty(rows, groups, dtype=torch.uint8, device=source.device)
    with _place(source):
        _search_int4[(triton.cdiv(rows * groups, GROUPS),)](
            source,
            source if factors is None else factors.contiguous(),
            scales.contiguous(),
            zeros.contiguous(),
            chosen,
            rows,
            groups,
            source.stride(0),
            candidates,
            SIZE=source.shape[1] // groups,
            WEIGHTED=factors is not None,
            BLOCKS=GROUPS,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return chosen


def round_block(
    target: Tensor, exact: Tensor, step: Tensor, zero: Tensor | None, feedback: Tensor, *, grid: Grid
) -> Tensor:
    """See `snugfit.methods.columns.round_block`; `target` is left as it is."""
    target, exact, step, feedback = (tensor.contiguous() for tensor in (target, exact, step, feedback))
    rows, columns = target.shape
    values = torch.empty_like(exact)
    with _place(target):
        _round_columns[(triton.cdiv(rows, ROWS),)](
            target,
            exact,
            step,
            step if zero is None else zero.contiguous(),
            feedback,
            values,
            rows,
            columns,
            GRID=grid,
            ZERO=zero is not None,
            ROWS=ROWS,
            WIDTH=triton.next_power_of_2(columns),
            num_warps=ROWS,
            enable_fp_fusion=False,
        )
    return values


def descend_block(
    values: Tensor, gradient: Tensor, step: Tensor, zero: Tensor | None, hessian: Tensor, *, grid: Grid
) -> None:
    """See `snugfit.methods.columns.descend_block`; `values` and `gradient` have no gaps."""
    rows, columns = values.shape
    with _place(values):
        _descend_columns[(triton.cdiv(rows, ROWS),)](
            values,
            gradient,
            step.contiguous(),
            step if zero is None else zero.contiguous(),
            hessian.contiguous(),
            rows,
            columns,
            GRID=grid,
            ZERO=zero is not None,
            ROWS=ROWS,
            WIDTH=triton.next_power_of_2(columns),
            num_warps=ROWS,
            enable_fp_fusion=False,
        )
