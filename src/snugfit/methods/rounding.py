"""Round-to-nearest: codes for a fused group of weights, format by format."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from snugfit.formats import fp8, int4, mxfp4
from snugfit.formats.spec import FP8_BLOCK, TensorFormat
from snugfit.formats.stored import Stored
from snugfit.methods.exponents import block_exponents
from snugfit.methods.scales import quantize_fused_group

Group = Mapping[str, Tensor]
Rounder = Callable[[Group, TensorFormat, str, str], Mapping[str, Stored]]


def _nvfp4(weights: Group, _: TensorFormat, scale: str, objective: str) -> Mapping[str, Stored]:
    return quantize_fused_group(weights, scale, objective)


def _fp8(weights: Group, _fmt: TensorFormat, _scale: str, _objective: str) -> Mapping[str, Stored]:
    return {name: fp8.quantize(weight) for name, weight in weights.items()}


def _fp8_block(weights: Group, _fmt: TensorFormat, _scale: str, _objective: str) -> Mapping[str, Stored]:
    return {name: fp8.quantize_blocks(weight, (FP8_BLOCK, FP8_BLOCK)) for name, weight in weights.items()}


def _mxfp4(weights: Group, _fmt: TensorFormat, scale: str, _objective: str) -> Mapping[str, Stored]:
    return {name: mxfp4.quantize(weight, block_exponents(weight, scale)) for name, weight in weights.items()}


def _int4(weights: Group, fmt: TensorFormat, _scale: str, _objective: str) -> Mapping[str, Stored]:
    return {name: int4.quantize(weight, group=fmt.group, symmetric=fmt.symmetric) for name, weight in weights.items()}


ROUNDERS: Mapping[str, Rounder] = {
    "nvfp4": _nvfp4,
    "nvfp4a16": _nvfp4,
    "fp8-dynamic": _fp8,
    "fp8-block": _fp8_block,
    "mxfp4": _mxfp4,
    "int4": _int4,
}


def round_group(weights: Group, fmt: TensorFormat, scale: str, objective: str) -> Mapping[str, Stored]:
    """Stored weights of one fused group (tensor name -> weight [N, K]) in `fmt`, scales chosen by the named rule."""
    return ROUNDERS[fmt.name](weights, fmt, scale, objective)
