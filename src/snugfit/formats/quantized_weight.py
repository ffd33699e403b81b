"""A quantized weight of any format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from snugfit.formats import fp8, int4, integer, mxfp4, nvfp4

QuantizedWeight = nvfp4.NVFP4Weight | fp8.FP8Weight | int4.INT4Weight | integer.IntegerWeight | mxfp4.MXFP4Weight


def dequantize(quantized: QuantizedWeight) -> Tensor:
    """fp32 [N, K] of a quantized weight."""
    if isinstance(quantized, nvfp4.NVFP4Weight):
        return nvfp4.dequantize(quantized)
    if isinstance(quantized, fp8.FP8Weight):
        return fp8.dequantize(quantized)
    if isinstance(quantized, int4.INT4Weight):
        return int4.dequantize(quantized)
    if isinstance(quantized, mxfp4.MXFP4Weight):
        return mxfp4.dequantize(quantized)
    return integer.dequantize(quantized)


def dequantize_all(weights: Sequence[QuantizedWeight]) -> list[Tensor]:
    """fp32 [N, K] of each weight: NVFP4 weights of one width in one pass, which a GPU does faster than many small ones.

    The values are those of `dequantize`, bit for bit.
    """
    found: dict[int, Tensor] = {}
    alike: dict[tuple[int, ...], dict[int, nvfp4.NVFP4Weight]] = {}
    for number, weight in enumerate(weights):
        if isinstance(weight, nvfp4.NVFP4Weight) and len(weight.packed) == len(weight.block_scale):
            alike.setdefault((*weight.packed.shape[1:], *weight.block_scale.shape[1:]), {})[number] = weight
        else:
            found[number] = dequantize(weight)
    for parts in alike.values():
        sizes = [len(part.packed) for part in parts.values()]
        scales = [part.global_scale.expand(size, 1) for part, size in zip(parts.values(), sizes, strict=True)]
        joined = stack([replace(part, global_scale=scales[0]) for part in parts.values()])
        assert isinstance(joined, nvfp4.NVFP4Weight)
        values = nvfp4.dequantize(replace(joined, global_scale=torch.cat(scales)))
        found |= dict(zip(parts, values.split(sizes), strict=True))
    return [found[number] for number in range(len(weights))]


def stack(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """One weight made of parts with consecutive output features, which share the scales of the whole weight."""
    first = parts[0]
    if len(parts) == 1:
        return first

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    if isinstance(first, nvfp4.NVFP4Weight):
        return replace(first, packed=joined("packed"), block_scale=joined("block_scale"))
    if isinstance(first, fp8.FP8Weight):
        return replace(first, codes=joined("codes"), scale=joined("scale"))
    if isinstance(first, int4.INT4Weight):
        zero_point = None if first.zero_point is None else joined("zero_point")
        out_features = sum(len(part.packed) for part in parts if isinstance(part, int4.INT4Weight))
        shape = out_features, first.shape[1]
        return replace(first, packed=joined("packed"), scale=joined("scale"), zero_point=zero_point, shape=shape)
    if isinstance(first, mxfp4.MXFP4Weight):
        return replace(first, packed=joined("packed"), exponent=joined("exponent"))
    raise TypeError(f"{type(first).__name__} cannot be written")
