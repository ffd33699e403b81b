"""The searches and column loops of this room as machine code for CPUs, made by numba when first used.

Every kernel gives the bits of its plain definition in torch: fp32 products and sums, each rounded alone, in the same
order (see `snugfit.methods.importance`). Kernels take LANES rows of a weight at once and lay them side by side, so that
one instruction handles the same feature of several rows: the innermost loops over `lane` are the ones that vectorize.
They do so only while all scratch arrays have constant shapes, and while no `if` chooses between two array elements.
Loops that are hot go over all LANES, a constant, also where the last rows fill fewer: the others hold older numbers.

Kernels run without Python's lock, on as many threads of our own as torch uses (snugfit.formats.machine_code).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import njit, types
from torch import Tensor

from snugfit.formats.machine_code import ROWS, compiled, on_threads
from snugfit.methods.candidates import EVERY_CODE, FOUR_OVER_SIX, Grid

LANES = 64
# values converted to fp32 at once, a row at least for each thread
CHUNK_VALUES = 1 << 22

ZERO, ONE, TWO, FOUR, SIX = (np.float32(number) for number in (0, 1, 2, 4, 6))
LOWEST_CODE, HIGHEST_CODE = np.float32(-8), np.float32(7)
INFINITY = np.float32(np.inf)
# adding and subtracting leaves what the grid of E2M1 has for magnitudes below 2, below 4, and from 4 on
ROUND_HALVES, ROUND_ONES, ROUND_TWOS = np.float32(2**22), np.float32(2**23), np.float32(2**24)
E4M3_TINY, E4M3_MAX, E4M3_NORMAL, E4M3_STEPS = (np.float32(number) for number in (2**-9, 448, 2**-6, 2**9))
# adding and subtracting leaves what the grid of E4M3 has for numbers below 2**-5
E4M3_OFFSET = np.float32(1.5 * 2**14)

_FLOATS_1 = types.Array(types.float32, 1, "C")
_FLOATS_2 = types.Array(types.float32, 2, "C")
_FLOATS_3 = types.Array(types.float32, 3, "C")
_INTEGERS = types.Array(types.int32, 1, "C")
_BYTES = types.Array(types.uint8, 2, "C")


@njit(inline="always")  # type: ignore[untyped-decorator]
def nearest_e2m1(magnitude: Any) -> Any:
    """The E2M1 value nearest to a non-negative number."""
    magnitude = magnitude if magnitude < SIX else SIX  # noqa: FURB136 - min() of numba asks for NaN
    offset = ROUND_HALVES if magnitude < TWO else (ROUND_ONES if magnitude < FOUR else ROUND_TWOS)
    return (magnitude + offset) - offset


@njit(inline="always")  # type: ignore[untyped-decorator]
def e2m1_error(magnitude: Any, step: Any) -> Any:
    """What rounding a magnitude adds to it."""
    return nearest_e2m1(magnitude / step) * step - magnitude


@njit(inline="always")  # type: ignore[untyped-decorator]
def larger(magnitude: Any, other: Any) -> Any:
    """The larger of two magnitudes; NaN if one is."""
    return magnitude if (magnitude >= other or magnitude != magnitude) else other  # noqa: PLR0124


def _nvfp4_kernel(objective: str, weighting: str) -> Callable[..., None]:
    """A search for block scales by `objective`; `weighting` is "none", "features" or "pairs"."""
    measures_mae, measures_largest = objective == "mae", objective == "absmax"
    by_features, by_pairs = weighting == "features", weighting == "pairs"

    def search(
        weight: Any, factors: Any, scale: Any, offsets: Any, kind: Any, decode: Any, start: Any, stop: Any, codes: Any
    ) -> None:
        values = np.empty((16, LANES), np.float32)
        errors = np.empty((16, LANES), np.float32)
        terms = np.empty((16, LANES), np.float32)
        largest = np.empty((2, LANES), np.float32)  # scales wanted: the plain one, 1.5 times as much
        bits = largest.view(np.int32)
        plain = np.empty((2, LANES), np.int32)
        step = np.empty(LANES, np.float32)
        loss = np.empty(LANES, np.float32)
        lowest = np.empty(LANES, np.float32)
        best = np.empty(LANES, np.float32)
        on_six = SIX * scale
        candidates = len(offsets)
        for row in range(start, stop, LANES):
            lanes = min(LANES, stop - row)
            for block in range(codes.shape[1]):
                for lane in range(lanes):
                    for i in range(16):
                        value = weight[row + lane, 16 * block + i]
                        values[i, lane] = value if by_pairs else abs(value)
                for lane in range(lanes):
                    found = ZERO
                    for i in range(16):
                        found = larger(found, abs(values[i, lane]))
                    largest[0, lane] = found / on_six
                    largest[1, lane] = (found / on_six) * np.float32(1.5)
                for which in range(2):
                    for lane in range(lanes):
                        wanted = largest[which, lane]
                        wanted = E4M3_TINY if wanted < E4M3_TINY else wanted  # noqa: FURB136
                        largest[which, lane] = E4M3_MAX if wanted > E4M3_MAX else wanted  # noqa: FURB136
                    for lane in range(lanes):
                        if largest[which, lane] < E4M3_NORMAL:
                            plain[which, lane] = np.int32(np.rint(largest[which, lane] * E4M3_STEPS))
                        else:
                            # half of the last place but one bit, one more if that place is odd; 120 binades less
                            code = bits[which, lane] + 0x7FFFF + ((bits[which, lane] >> 20) & 1)
                            plain[which, lane] = min((code >> 20) - 960, 127)
                for lane in range(lanes):
                    lowest[lane] = INFINITY
                    best[lane] = ZERO
                for candidate in range(candidates if candidates > 1 else 0):
                    number = np.float32(candidate)
                    for lane in range(lanes):
                        if kind == FOUR_OVER_SIX:
                            code = plain[candidate, lane]
                        elif kind == EVERY_CODE and candidate > 0:
                            code = candidate
                        else:
                            code = min(max(plain[0, lane] + offsets[candidate], 1), 126)
                        step[lane] = decode[code] * scale
                    if by_pairs:
                        for i in range(16):
                            for lane in range(lanes):
                                error = e2m1_error(abs(values[i, lane]), step[lane])
                                errors[i, lane] = -error if values[i, lane] < ZERO else error
                        for i in range(16):
                            for lane in range(lanes):
                                terms[i, lane] = factors[block, i, i] * errors[i, lane]
                            for j in range(i + 1, 16):
                                factor = factors[block, i, j]
                                for lane in range(lanes):
                                    terms[i, lane] += factor * errors[j, lane]
                        for lane in range(lanes):
                            total = ZERO
                            for i in range(8):
                                total += errors[i, lane] * terms[i, lane] + errors[i + 8, lane] * terms[i + 8, lane]
                            loss[lane] = total
                    else:
                        for lane in range(lanes):
                            total = ZERO
                            for i in range(8):
                                one = e2m1_error(values[i, lane], step[lane])
                                other = e2m1_error(values[i + 8, lane], step[lane])
                                if measures_largest:
                                    total = larger(larger(total, abs(one)), abs(other))
                                elif measures_mae:
                                    total += abs(one) + abs(other)
                                elif by_features:
                                    total += one * one * factors[block, i, 0] + other * other * factors[block, i + 8, 0]
                                else:
                                    total += one * one + other * other
                            loss[lane] = total
                    for lane in range(lanes):
                        total, least, known = loss[lane], lowest[lane], best[lane]
                        lowest[lane] = total if total < least else least  # noqa: FURB136
                        best[lane] = number if total < least else known
                for lane in range(lanes):
                    candidate = int(best[lane])
                    if kind == FOUR_OVER_SIX:
                        code = plain[candidate, lane]
                    elif kind == EVERY_CODE and candidate > 0:
                        code = candidate
                    elif candidates == 1:
                        code = plain[0, lane]
                    else:
                        code = min(max(plain[0, lane] + offsets[candidate], 1), 126)
                    codes[row + lane, block] = code

    return search


@cache
def _nvfp4(objective: str, weighting: str) -> Callable[..., None]:
    kernel = _nvfp4_kernel(objective, weighting)
    return compiled(kernel, _FLOATS_2, _FLOATS_3, types.float32, _INTEGERS, types.int64, _FLOATS_1, *ROWS, _BYTES)


def block_scales(
    weight: Tensor,
    scale: Tensor,
    *,
    offsets: tuple[int, ...],
    kind: int,
    objective: str,
    factors: Tensor | None,
) -> Tensor:
    """NVFP4's block scales, E4M3 [N, K/16]: see `snugfit.methods.scales`.

    `factors` are fp32 [K/16, 16] for features or [K/16, 16, 16] for pairs, `offsets` one for each candidate.
    """
    weighting = "none" if factors is None else "features" if factors.dim() == 2 else "pairs"
    search = _nvfp4(objective, weighting)
    decode = torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    given = torch.zeros(1, 1, 1) if factors is None else factors.contiguous().view(len(factors), 16, -1)
    settings = given.numpy(), np.float32(scale.item()), np.array(offsets, np.int32), kind, decode
    codes = np.empty((weight.shape[0], weight.shape[1] // 16), np.uint8)
    _by_chunks(weight, lambda part, first: lambda start, stop: search(part, *settings, start, stop, codes[first:]))
    return torch.from_numpy(codes).view(torch.float8_e4m3fn)


def _by_chunks(weight: Tensor, kernel_of: Callable[[Any, int], Callable[[int, int], None]]) -> None:
    """Run a kernel over rows of `weight` in fp32, as many at once as CHUNK_VALUES allow."""
    rows = max(LANES * torch.get_num_threads(), CHUNK_VALUES // max(1, weight.shape[1]))
    for first in range(0, len(weight), rows):
        part = weight[first : first + rows].detach().float().contiguous()
        on_threads(kernel_of(part.numpy(), first), len(part), LANES)


def _mxfp4_kernel(*, weighted: bool) -> Callable[..., None]:
    def search(weight: Any, factors: Any, lower: Any, decode: Any, start: Any, stop: Any, exponents: Any) -> None:
        values = np.empty((32, LANES), np.float32)
        parts = np.empty((8, LANES), np.float32)
        largest = np.empty(LANES, np.float32)
        bits = largest.view(np.int32)
        plain = np.empty(LANES, np.int32)
        step = np.empty(LANES, np.float32)
        lowest = np.empty(LANES, np.float32)
        best = np.empty(LANES, np.float32)
        for row in range(start, stop, LANES):
            lanes = min(LANES, stop - row)
            for block in range(exponents.shape[1]):
                for lane in range(lanes):
                    for i in range(32):
                        values[i, lane] = abs(weight[row + lane, 32 * block + i])
                for lane in range(lanes):
                    found = ZERO
                    for i in range(32):
                        found = larger(found, values[i, lane])
                    largest[lane] = found
                for lane in range(lanes):
                    # the largest magnitude's own exponent less two, one more from 1.75 of it on
                    plain[lane] = (bits[lane] >> 23) - 2 + ((bits[lane] & 0x7FFFFF) >= 0x600000)
                    lowest[lane] = INFINITY
                    best[lane] = ZERO
                for candidate in range(lower + 1 if lower > 0 else 0):
                    number = np.float32(candidate)
                    for lane in range(lanes):
                        step[lane] = decode[min(max(plain[lane] - candidate, 0), 252)]
                    for first in range(0, 32, 8):
                        for i in range(8):
                            factor = factors[block, first + i] if weighted else ONE
                            for lane in range(lanes):
                                error = e2m1_error(values[first + i, lane], step[lane])
                                square = error * error
                                if weighted:
                                    square *= factor
                                before = parts[i, lane]
                                parts[i, lane] = square if first == 0 else before + square
                    for lane in range(lanes):
                        total = ZERO
                        for i in range(8):
                            total += parts[i, lane]
                        least, known = lowest[lane], best[lane]
                        lowest[lane] = total if total < least else least  # noqa: FURB136
                        best[lane] = number if total < least else known
                for lane in range(lanes):
                    exponents[row + lane, block] = min(max(plain[lane] - int(best[lane]), 0), 252)

    return search


@cache
def _mxfp4(*, weighted: bool) -> Callable[..., None]:
    kernel = _mxfp4_kernel(weighted=weighted)
    return compiled(kernel, _FLOATS_2, _FLOATS_2, types.int64, _FLOATS_1, *ROWS, _BYTES)


def block_exponents(weight: Tensor, *, lower: int, factors: Tensor | None) -> Tensor:
    """MXFP4's exponents, uint8 [N, K/32]: see `snugfit.methods.exponents`; `factors` are fp32 [K/32, 32]."""
    search = _mxfp4(weighted=factors is not None)
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu).float()
    given = torch.zeros(1, 1) if factors is None else factors.contiguous()
    settings = given.numpy(), lower, every.numpy()
    found = np.empty((weight.shape[0], weight.shape[1] // 32), np.uint8)
    _by_chunks(weight, lambda part, first: lambda start, stop: search(part, *settings, start, stop, found[first:]))
    return torch.from_numpy(found)


def _int4_kernel(*, weighted: bool) -> Callable[..., None]:
    def search(weight: Any, factors: Any, scales: Any, zeros: Any, start: Any, stop: Any, best_of: Any) -> None:
        size = factors.shape[1]
        values = np.empty((128, LANES), np.float32)
        parts = np.empty((8, LANES), np.float32)
        step = np.empty(LANES, np.float32)
        zero = np.empty(LANES, np.float32)
        lowest = np.empty(LANES, np.float32)
        best = np.empty(LANES, np.float32)
        for row in range(start, stop, LANES):
            lanes = min(LANES, stop - row)
            for group in range(best_of.shape[1]):
                for lane in range(lanes):
                    for i in range(size):
                        values[i, lane] = weight[row + lane, size * group + i]
                    lowest[lane] = INFINITY
                    best[lane] = ZERO
                for candidate in range(len(scales)):
                    number = np.float32(candidate)
                    for lane in range(lanes):
                        step[lane] = scales[candidate, row + lane, group]
                        zero[lane] = zeros[candidate, row + lane, group]
                    for first in range(0, size, 8):
                        for i in range(8):
                            factor = factors[group, first + i]
                            for lane in range(lanes):
                                value = values[first + i, lane]
                                code = np.rint(value / step[lane] + zero[lane])
                                code = LOWEST_CODE if code < LOWEST_CODE else code  # noqa: FURB136
                                code = HIGHEST_CODE if code > HIGHEST_CODE else code  # noqa: FURB136
                                error = (code - zero[lane]) * step[lane] - value
                                square = error * error
                                if weighted:
                                    square *= factor
                                before = parts[i, lane]
                                parts[i, lane] = square if first == 0 else before + square
                    for lane in range(lanes):
                        total = ZERO
                        for i in range(8):
                            total += parts[i, lane]
                        least, known = lowest[lane], best[lane]
                        lowest[lane] = total if total < least else least  # noqa: FURB136
                        best[lane] = number if total < least else known
                for lane in range(lanes):
                    best_of[row + lane, group] = int(best[lane])

    return search


@cache
def _int4(*, weighted: bool) -> Callable[..., None]:
    kernel = _int4_kernel(weighted=weighted)
    return compiled(kernel, _FLOATS_2, _FLOATS_2, _FLOATS_3, _FLOATS_3, *ROWS, _BYTES)


def best_scales(weight: Tensor, scales: Tensor, zeros: Tensor, factors: Tensor | None) -> Tensor:
    """uint8 [N, K/g]: which of the scales, fp32 [candidates, N, K/g], gives each group of `weight` [N, K] least error.

    `zeros` are fp32 zero points of the same shape, `factors` fp32 [K/g, g]; g is 128 at most, a multiple of 8.
    """
    search = _int4(weighted=factors is not None)
    groups = scales.shape[2]
    given = torch.zeros(groups, weight.shape[1] // groups) if factors is None else factors.contiguous()
    found = np.empty((weight.shape[0], groups), np.uint8)
    exact = weight.detach().float().contiguous().numpy()
    arrays = exact, given.numpy(), scales.contiguous().numpy(), zeros.contiguous().numpy()
    on_threads(lambda start, stop: search(*arrays, start, stop, found), len(weight), LANES)
    return torch.from_numpy(found)


@njit(inline="always")  # type: ignore[untyped-decorator]
def _nearest_signed_e2m1(scaled: Any) -> Any:
    magnitude = nearest_e2m1(abs(scaled))
    return -magnitude if scaled < ZERO else magnitude


@njit(inline="always")  # type: ignore[untyped-decorator]
def _nearest_e4m3(scaled: Any) -> Any:
    scaled = -E4M3_MAX if scaled < -E4M3_MAX else scaled  # noqa: FURB136
    scaled = E4M3_MAX if scaled > E4M3_MAX else scaled  # noqa: FURB136
    magnitude = abs(scaled)
    offset, bound = E4M3_OFFSET, E4M3_NORMAL * TWO
    for _ in range(14):  # binades from 2**-5 to 2**8
        offset = offset * TWO if magnitude >= bound else offset
        bound = bound * TWO
    return (scaled + offset) - offset


@njit(inline="always")  # type: ignore[untyped-decorator]
def _nearest_int4(scaled: Any, zero: Any) -> Any:
    code = np.rint(scaled + zero)
    code = LOWEST_CODE if code < LOWEST_CODE else code  # noqa: FURB136
    code = HIGHEST_CODE if code > HIGHEST_CODE else code  # noqa: FURB136
    return code - zero


def _round_kernel(grid: Grid) -> Callable[..., None]:
    integers, eighths = grid == "int4", grid == "e4m3"

    def round_columns(
        target: Any, exact: Any, step: Any, zero: Any, feedback: Any, start: Any, stop: Any, values: Any
    ) -> None:
        columns = target.shape[1]
        inside = np.zeros((128, LANES), np.float32)
        wanted = np.zeros((128, LANES), np.float32)
        units = np.ones((128, LANES), np.float32)
        zeros = np.zeros((128, LANES), np.float32)
        error = np.empty(LANES, np.float32)
        for row in range(start, stop, LANES):
            lanes = min(LANES, stop - row)
            for lane in range(lanes):
                for i in range(columns):
                    inside[i, lane] = target[row + lane, i]
                    wanted[i, lane] = exact[row + lane, i]
                    units[i, lane] = step[row + lane, i]
                    if integers:
                        zeros[i, lane] = zero[row + lane, i]
            for i in range(columns):
                for lane in range(LANES):
                    unit = units[i, lane]
                    scaled = inside[i, lane] / unit
                    if integers:
                        value = _nearest_int4(scaled, zeros[i, lane]) * unit
                    elif eighths:
                        value = _nearest_e4m3(scaled) * unit
                    else:
                        value = _nearest_signed_e2m1(scaled) * unit
                    inside[i, lane] = value
                    error[lane] = wanted[i, lane] - value
                for j in range(i + 1, columns):
                    factor = feedback[i, j]
                    for lane in range(LANES):
                        inside[j, lane] += error[lane] * factor
            for lane in range(lanes):
                for i in range(columns):
                    values[row + lane, i] = inside[i, lane]

    return round_columns


@cache
def _round(grid: Grid) -> Callable[..., None]:
    arrays = [_FLOATS_2] * 5
    return compiled(_round_kernel(grid), *arrays, *ROWS, _FLOATS_2)


def round_block(
    target: Tensor, exact: Tensor, step: Tensor, zero: Tensor | None, feedback: Tensor, *, grid: Grid
) -> Tensor:
    """See `snugfit.methods.columns.round_block`, which this equals bit for bit; 128 columns at most."""
    kernel = _round(grid)
    values = torch.empty_like(exact, memory_format=torch.contiguous_format)
    zeros = torch.zeros(1, 1) if grid != "int4" else torch.zeros_like(step) if zero is None else zero
    arrays = [tensor.contiguous().numpy() for tensor in (target, exact, step, zeros, feedback)]
    on_threads(lambda start, stop: kernel(*arrays, start, stop, values.numpy()), len(target), LANES)
    return values


def _descend_kernel(grid: Grid) -> Callable[..., None]:
    integers, eighths = grid == "int4", grid == "e4m3"

    def descend_columns(values: Any, gradient: Any, step: Any, zero: Any, hessian: Any, start: Any, stop: Any) -> None:
        columns = values.shape[1]
        slope = np.zeros((128, LANES), np.float32)
        inside = np.zeros((128, LANES), np.float32)
        units = np.ones((128, LANES), np.float32)
        zeros = np.zeros((128, LANES), np.float32)
        moved = np.empty(LANES, np.float32)
        for row in range(start, stop, LANES):
            lanes = min(LANES, stop - row)
            for lane in range(lanes):
                for i in range(columns):
                    slope[i, lane] = gradient[row + lane, i]
                    inside[i, lane] = values[row + lane, i]
                    units[i, lane] = step[row + lane, i]
                    if integers:
                        zeros[i, lane] = zero[row + lane, i]
            for i in range(columns):
                curvature = hessian[i, i]
                for lane in range(LANES):
                    before, unit = inside[i, lane], units[i, lane]
                    scaled = (before - slope[i, lane] / curvature) / unit
                    if integers:
                        value = _nearest_int4(scaled, zeros[i, lane]) * unit
                    elif eighths:
                        value = _nearest_e4m3(scaled) * unit
                    else:
                        value = _nearest_signed_e2m1(scaled) * unit
                    inside[i, lane] = value
                    moved[lane] = value - before
                for j in range(columns):
                    factor = hessian[i, j]
                    for lane in range(LANES):
                        slope[j, lane] += moved[lane] * factor
            for lane in range(lanes):
                for i in range(columns):
                    gradient[row + lane, i] = slope[i, lane]
                    values[row + lane, i] = inside[i, lane]

    return descend_columns


@cache
def _descend(grid: Grid) -> Callable[..., None]:
    arrays = [_FLOATS_2] * 5
    return compiled(_descend_kernel(grid), *arrays, *ROWS)


def descend_block(
    values: Tensor, gradient: Tensor, step: Tensor, zero: Tensor | None, hessian: Tensor, *, grid: Grid
) -> None:
    """See `snugfit.methods.columns.descend_block`, which this equals bit for bit; contiguous, 128 columns at most."""
    kernel = _descend(grid)
    zeros = torch.zeros(1, 1) if grid != "int4" else torch.zeros_like(step) if zero is None else zero
    arrays = [values.numpy(), gradient.numpy()]
    arrays += [tensor.contiguous().numpy() for tensor in (step, zeros, hessian)]
    on_threads(lambda start, stop: kernel(*arrays, start, stop), len(values), LANES)
