"""Round-to-nearest: codes for a fused group of weights, format by format, a slice of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from snugfit.formats import fp8, int4, mxfp4, nvfp4
from snugfit.formats.quantized_weight import QuantizedWeight, dequantize, stack
from snugfit.formats.spec import FP8_BLOCK, TensorFormat
from snugfit.methods.exponents import block_exponents
from snugfit.methods.scales import block_scales, global_scale, largest_magnitude

Group = Mapping[str, Tensor]
Round = Callable[[Tensor], QuantizedWeight]
Rounder = Callable[[Group, TensorFormat, str, str], Round]

# values rounded at once: their temporaries are several times as large, in fp32
SLICE = {"cpu": 1 << 22, "cuda": 1 << 24}
SLICE_ROWS = 128  # what a slice's rows are a multiple of: the rows of a block of scales


def _nvfp4(weights: Group, _: TensorFormat, scale: str, objective: str) -> Round:
    amax = torch.stack([largest_magnitude(weight) for weight in weights.values()]).amax()
    one = global_scale(amax, scale)  # for all members
    return lambda weight: nvfp4.quantize(weight, block_scales(weight, one, scale, objective), one)


def _fp8(_weights: Group, _fmt: TensorFormat, _scale: str, _objective: str) -> Round:
    return fp8.quantize


def _fp8_block(_weights: Group, _fmt: TensorFormat, _scale: str, _objective: str) -> Round:
    return lambda weight: fp8.quantize_blocks(weight, (FP8_BLOCK, FP8_BLOCK))


def _mxfp4(_weights: Group, _fmt: TensorFormat, scale: str, _objective: str) -> Round:
    return lambda weight: mxfp4.quantize(weight, block_exponents(weight, scale))


def _int4(_weights: Group, fmt: TensorFormat, _scale: str, _objective: str) -> Round:
    return lambda weight: int4.quantize(weight, group_size=fmt.group_size, symmetric=fmt.symmetric)


# how each format rounds some rows of a weight, given the whole group that it is fused with
ROUNDERS: Mapping[str, Rounder] = {
    "nvfp4": _nvfp4,
    "nvfp4a16": _nvfp4,
    "fp8-dynamic": _fp8,
    "fp8-block": _fp8_block,
    "mxfp4": _mxfp4,
    "int4": _int4,
}


def round_group(weights: Group, fmt: TensorFormat, scale: str, objective: str) -> Mapping[str, QuantizedWeight]:
    """Stored weights of one fused group (tensor name -> weight [N, K]) in `fmt`, scales chosen by the named rule."""
    rounding = ROUNDERS[fmt.name](weights, fmt, scale, objective)
    return {name: stack([rounding(part) for part in weight.split(_rows(weight))]) for name, weight in weights.items()}


def round_and_compare(
    weights: dict[str, Tensor],
    fmt: TensorFormat,
    scale: str,
    objective: str,
    *,
    values: bool,
    into: Mapping[str, Tensor] | None = None,
) -> Iterator[tuple[str, QuantizedWeight, Tensor | None, Tensor]]:
    """As `round_group`, which empties `weights` meanwhile: name, stored weight, its values, its relative error.

    The values [N, K] are in the weight's dtype, None where not asked for; those of names in `into` are written there,
    in its dtype. The error is sum((w_hat - w)^2) / sum(w^2), fp64 (), 0 where all weights are.
    """
    rounding = ROUNDERS[fmt.name](weights, fmt, scale, objective)
    for name in list(weights):
        weight = weights.pop(name)
        kept = None
        if values:
            kept = into[name] if into is not None and name in into else torch.empty_like(weight)
        parts: list[QuantizedWeight] = []
        sums = torch.zeros(2, dtype=torch.float64, device=weight.device)
        step = _rows(weight)
        for number, part in enumerate(weight.split(step)):
            parts.append(rounding(part))
            found = dequantize(parts[-1])
            if kept is not None:
                kept[number * step : number * step + len(part)] = found
            exact = part.float()
            sums[1] += exact.square().sum()
            sums[0] += exact.sub_(found).square_().sum()
        del weight
        yield name, stack(parts), kept, torch.where(sums[1] == 0, 0.0, sums[0] / sums[1])


def _rows(weight: Tensor) -> int:
    rows = SLICE[weight.device.type] // max(1, weight.shape[1])
    return max(1, rows // SLICE_ROWS) * SLICE_ROWS
