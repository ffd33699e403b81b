"""Machine code for CPUs, made by numba when first used, and threads of our own to run it on.

Numba's own threads would not survive a fork. Machine code is kept in numba's cache where that can be written to; it is
made anew when the file changes that defines a kernel, not when this one does: remove `__pycache__` after an edit here.
Import this module only where numba is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

ROWS = types.int64, types.int64  # first row, row behind the last

_made: list[str] = []  # kernels that were not in numba's cache

_I16, _I32, _FLOAT = ir.IntType(16), ir.IntType(32), ir.FloatType()


def compiled(function: Callable[..., None], *arguments: Any) -> Callable[..., None]:
    """Machine code of a function of these types of arguments."""
    options = {"nogil": True, "boundscheck": False, "error_model": "numpy"}
    try:
        kept = njit(types.void(*arguments), cache=True, **options)(function)
    except (OSError, RuntimeError):  # no folder for the cache can be written to
        machine_code: Callable[..., None] = njit(types.void(*arguments), **options)(function)
        found = False
    else:
        machine_code, found = kept, bool(kept.stats.cache_hits)
    if not found:
        _made.append(function.__name__)
    return machine_code


def kernels_made() -> int:
    """How many kernels this process has compiled, which takes seconds of each; those of numba's cache do not count."""
    return len(_made)


def on_threads(kernel: Callable[[int, int], None], rows: int, tile: int = 1) -> None:
    """Run `kernel(start, stop)` over all rows, whole tiles of them, in as many parts as torch has threads."""
    tiles = -(-rows // tile)
    workers = min(torch.get_num_threads(), tiles)
    if workers <= 1:
        kernel(0, rows)
        return
    bounds = [min(rows, tiles * worker // workers * tile) for worker in range(workers + 1)]
    with ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(kernel, *part) for part in pairwise(bounds)]:
            done.result()


@intrinsic  # type: ignore[untyped-decorator]
def magnitude_bits(_: Any, value: Any) -> Any:
    """int32: the bits of an fp32 number without its sign; they are in the order of magnitudes, NaN above infinity."""

    def code(__: Any, builder: Any, ___: Any, given: Any) -> Any:
        return builder.and_(builder.bitcast(given[0], _I32), _I32(0x7FFFFFFF))

    return types.int32(value), code


@intrinsic  # type: ignore[untyped-decorator]
def number(_: Any, bits: Any) -> Any:
    """fp32: the number of these bits (int32)."""

    def code(__: Any, builder: Any, ___: Any, given: Any) -> Any:
        return builder.bitcast(given[0], _FLOAT)

    return types.float32(bits), code


@intrinsic  # type: ignore[untyped-decorator]
def power_below(_: Any, value: Any, more: Any) -> Any:
    """fp32: the power of two at or below the magnitude of `value`, its exponent raised by `more` (int32)."""

    def code(__: Any, builder: Any, ___: Any, given: Any) -> Any:
        exponent = builder.and_(builder.bitcast(given[0], _I32), _I32(0x7F800000))
        return builder.bitcast(builder.add(exponent, builder.shl(given[1], _I32(23))), _FLOAT)

    return types.float32(value, more), code


@intrinsic  # type: ignore[untyped-decorator]
def signed_as(_: Any, magnitude: Any, sign: Any) -> Any:
    """fp32: a non-negative number with the sign of another one."""

    def code(__: Any, builder: Any, ___: Any, given: Any) -> Any:
        signs = builder.and_(builder.bitcast(given[1], _I32), _I32(0x80000000))
        return builder.bitcast(builder.or_(builder.bitcast(given[0], _I32), signs), _FLOAT)

    return types.float32(magnitude, sign), code


@intrinsic  # type: ignore[untyped-decorator]
def loaded(_: Any, stored: Any) -> Any:
    """fp32: a number that is stored as fp32, or as the bits of a bfloat16 one (uint16)."""

    def code(__: Any, builder: Any, ___: Any, given: Any) -> Any:
        if stored != types.uint16:
            return given[0]
        return builder.bitcast(builder.shl(builder.zext(given[0], _I32), _I32(16)), _FLOAT)

    return types.float32(stored), code


@intrinsic  # type: ignore[untyped-decorator]
def stored_like(_: Any, value: Any, stored: Any) -> Any:
    """An fp32 number in the type of `stored`: fp32, or the bits (uint16) of the nearest bfloat16, ties to even."""

    def code(__: Any, builder: Any, ___: Any, given: Any) -> Any:
        if stored != types.uint16:
            return given[0]
        bits = builder.bitcast(given[0], _I32)
        odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
        rounded = builder.lshr(builder.add(bits, builder.add(odd, _I32(0x7FFF))), _I32(16))
        nan = builder.fcmp_unordered("uno", given[0], given[0])
        return builder.trunc(builder.select(nan, _I32(0x7FC0), rounded), _I16)

    return (types.uint16 if stored == types.uint16 else types.float32)(value, stored), code
