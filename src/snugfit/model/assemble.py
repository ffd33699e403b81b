"""Reads logical weights: decodes codes and scales, and cuts single experts out of 3-D tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from snugfit.errors import UserError
from snugfit.formats import fp8
from snugfit.formats.fp8 import FP8Weight
from snugfit.formats.mxfp4 import MXFP4Weight
from snugfit.formats.quantized_weight import QuantizedWeight, dequantize
from snugfit.formats.spec import E8M0_NAN
from snugfit.model.logical_weights import ExpertSlice, LogicalWeights, Origin
from snugfit.storage.checkpoint import read_tensor
from snugfit.storage.safetensors_header import dtype_of
from snugfit.storage.tensor_reader import ReadTensor

OUTPUTS = 1024  # out_features dequantized at once

Piece = tuple[str, int | None]  # a tensor of the file; of one that holds all experts, which expert


@dataclass(frozen=True)
class Loaded:
    """A tensor in memory: `values`, or the source's codes (`quantized`) and the multiplier of their inputs."""

    values: Tensor | None
    quantized: QuantizedWeight | None = None
    input_scale: Tensor | None = None

    def in_dtype(self, dtype: torch.dtype) -> Tensor:
        """The values, dequantized where need be."""
        if self.values is not None:
            return self.values
        assert self.quantized is not None
        if isinstance(self.quantized, FP8Weight):  # in slices: fp32 takes four times the memory of the codes
            return torch.cat([dequantize(part).to(dtype) for part in fp8.split_outputs(self.quantized, OUTPUTS)])
        return dequantize(self.quantized).to(dtype)


def pieces_of(weights: LogicalWeights, name: str) -> list[Piece]:
    """What to read of the file for the logical weight `name`."""
    origin = weights.origins.get(name)
    if origin is None:
        return [(name, None)]
    return [(part, None if origin.part is None else origin.part.expert) for part in origin.parts.values()]


def assemble(weights: LogicalWeights, name: str, pieces: Mapping[Piece, Tensor]) -> Loaded:
    """The logical weight `name` made of what `pieces_of` lists; UserError for a scale that is not a finite number."""
    origin = weights.origins.get(name)
    if origin is None:
        return Loaded(pieces[name, None])
    expert = None if origin.part is None else origin.part.expert
    parts = {suffix: pieces[part, expert] for suffix, part in origin.parts.items()}
    if origin.part is None:
        assert origin.format is not None
        quantized, scale = weights.dialect.decode(name.removesuffix(".weight"), origin.format, parts)
        return Loaded(None, quantized, scale)
    return _from_stack(origin, origin.part, parts, where=str(weights.checkpoint.path))


def _from_stack(origin: Origin, part: ExpertSlice, parts: Mapping[str, Tensor], *, where: str) -> Loaded:
    outputs = slice(part.start, part.stop, part.step)
    if origin.format is not None:  # [outputs, K/32, 16 bytes of two codes] beside [outputs, K/32]
        exponents = parts["scales"][outputs].contiguous()
        if bool((exponents == E8M0_NAN).any()):
            raise UserError(
                f"{origin.parts['scales']} holds NaN scales for expert {part.expert}.",
                code="scale-invalid",
                where=where,
                remedy="The source is damaged: download it again.",
            )
        return Loaded(None, MXFP4Weight(parts["blocks"][outputs].flatten(1).contiguous(), exponents))
    stack = parts["weight"]
    return Loaded((stack.t() if part.transposed else stack)[outputs].contiguous())


def part_of(origin: Origin, stack: Tensor) -> Tensor:
    """A view of the expert's part that `origin` describes in a 16-bit tensor of all experts: [N, K], of biases [N]."""
    part = origin.part
    assert part is not None
    mine = stack[part.expert]
    return (mine.t() if part.transposed else mine)[part.start : part.stop : part.step]


def read_single(weights: LogicalWeights, name: str, read: ReadTensor | None = None) -> Tensor:
    """One expert's weight, dequantized where it is stored as codes; `read` reads tensors, by default to the CPU."""
    read = read or partial(read_tensor, weights.checkpoint)
    pieces = {(part, expert): read(part, expert) for part, expert in pieces_of(weights, name)}
    return assemble(weights, name, pieces).in_dtype(dtype_of(weights.tensors[name]))
