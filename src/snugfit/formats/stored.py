"""A stored weight of any format."""

from __future__ import annotations

from torch import Tensor

from snugfit.formats import fp8, int4, integer, mxfp4, nvfp4

Stored = nvfp4.NVFP4Weight | fp8.FP8Weight | int4.INT4Weight | integer.IntegerWeight | mxfp4.MXFP4Weight


def dequantize(stored: Stored) -> Tensor:
    """fp32 [N, K] of a stored weight."""
    if isinstance(stored, nvfp4.NVFP4Weight):
        return nvfp4.dequantize(stored)
    if isinstance(stored, fp8.FP8Weight):
        return fp8.dequantize(stored)
    if isinstance(stored, int4.INT4Weight):
        return int4.dequantize(stored)
    if isinstance(stored, mxfp4.MXFP4Weight):
        return mxfp4.dequantize(stored)
    return integer.dequantize(stored)
