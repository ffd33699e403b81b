"""Rounds a fused group of weights to the nearest codes of a format, a slice of output features at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from snugfit.formats import fp8, int4, mxfp4, nvfp4
from snugfit.formats.quantized_weight import QuantizedWeight, dequantize, stack
from snugfit.formats.spec import FP8_BLOCK, TensorFormat
from snugfit.methods import powers_of_two
from snugfit.methods.exponents import block_exponents
from snugfit.methods.scales import block_scales, global_scale, largest_magnitude

Group = Mapping[str, Tensor]
Round = Callable[[Tensor], QuantizedWeight]
Rounder = Callable[[Group, TensorFormat, str, str], Round]

# values rounded at once; the fp32 temporaries are several times as large
SLICE = {"cpu": 1 << 22, "cuda": 1 << 24}
ABSMAX = "absmax"  # the rule that a recipe names to get no other scales
_SLICE_MULTIPLE = 128  # output features of a slice are a multiple of those of a block of scales


@dataclass(frozen=True)
class Rounded:
    """A quantized weight [N, K] by its name.

    `values` are those of its codes in the 16-bit weight's dtype, None if not asked for. `relative_error` is
    sum((w_hat - w)^2) / sum(w^2), fp64 (), 0 for a weight of zeros.
    """

    name: str
    weight: QuantizedWeight
    values: Tensor | None
    relative_error: Tensor


def _nvfp4(weights: Group, _: TensorFormat, scale_rule: str, objective: str) -> Round:
    exact = None if scale_rule == ABSMAX else powers_of_two.exact_global_scale(weights.values())
    if exact is not None:  # no rule could do better
        return lambda weight: nvfp4.quantize(weight, powers_of_two.block_scales(weight, exact), exact)
    amax = torch.stack([largest_magnitude(weight) for weight in weights.values()]).amax()
    shared = global_scale(amax, scale_rule)  # of all members of the group
    return lambda weight: nvfp4.quantize(weight, block_scales(weight, shared, scale_rule, objective), shared)


def _fp8(_weights: Group, _fmt: TensorFormat, _scale_rule: str, _objective: str) -> Round:
    return fp8.quantize


def _fp8_block(_weights: Group, _fmt: TensorFormat, _scale_rule: str, _objective: str) -> Round:
    return lambda weight: fp8.quantize_blocks(weight, (FP8_BLOCK, FP8_BLOCK))


def _mxfp4(_weights: Group, _fmt: TensorFormat, scale_rule: str, _objective: str) -> Round:
    return lambda weight: mxfp4.quantize(weight, block_exponents(weight, scale_rule))


def _int4(_weights: Group, fmt: TensorFormat, _scale_rule: str, _objective: str) -> Round:
    return lambda weight: int4.quantize(weight, group_size=fmt.group_size, symmetric=fmt.symmetric)


# format -> what makes, from a whole fused group, the function that rounds a slice of one of its weights
ROUNDERS: Mapping[str, Rounder] = {
    "nvfp4": _nvfp4,
    "nvfp4a16": _nvfp4,
    "fp8-dynamic": _fp8,
    "fp8-block": _fp8_block,
    "mxfp4": _mxfp4,
    "int4": _int4,
}


def round_and_compare(
    weights: dict[str, Tensor],
    fmt: TensorFormat,
    scale_rule: str,
    objective: str,
    *,
    values: bool,
    into: Mapping[str, Tensor] | None = None,
) -> Iterator[Rounded]:
    """Round the weights [N, K] of one fused group, one after another; removes them from `weights`, overwrites them.

    With `values`, results have the codes' values; for names in `into` these are written to that tensor, in its dtype.
    """
    rounding = ROUNDERS[fmt.name](weights, fmt, scale_rule, objective)
    for name in list(weights):
        weight = weights.pop(name)
        kept = None
        if values:
            kept = into[name] if into is not None and name in into else torch.empty_like(weight)
        parts: list[QuantizedWeight] = []
        error, square = torch.zeros(2, dtype=torch.float64, device=weight.device)
        start = 0
        for part in weight.split(slice_outputs(weight)):
            parts.append(rounding(part))
            found = dequantize(parts[-1])
            if kept is not None:
                kept[start : start + len(part)] = found
            start += len(part)
            exact = part.float()
            square += exact.square().sum()
            error += exact.sub_(found).square_().sum()
        del weight
        yield Rounded(name, stack(parts), kept, torch.where(square == 0, 0.0, error / square))


def slice_outputs(weight: Tensor) -> int:
    """How many output features of a weight [N, K] are rounded at once."""
    outputs = SLICE[weight.device.type] // max(1, weight.shape[1])
    return max(1, outputs // _SLICE_MULTIPLE) * _SLICE_MULTIPLE
