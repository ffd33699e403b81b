"""Weights made of what the file keeps them in: codes and scales, or one expert's part of a 3-D tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from snugfit.dialects import reading
from snugfit.errors import UserError
from snugfit.formats import fp8
from snugfit.formats.fp8 import FP8Weight
from snugfit.formats.mxfp4 import MXFP4Weight
from snugfit.formats.stored import Stored, dequantize
from snugfit.model.sources import Source, Weights
from snugfit.storage.checkpoint import Checkpoint, read_tensor
from snugfit.storage.safetensors_header import dtype_of

E8M0_NAN = 255
ROWS = 1024  # dequantized at once


@dataclass(frozen=True)
class Loaded:
    """A tensor in memory: `values`, or the codes that the source has (`stored`) and the multiplier of their inputs."""

    values: Tensor | None
    stored: Stored | None = None
    input_scale: Tensor | None = None

    def in_dtype(self, dtype: torch.dtype) -> Tensor:
        """The values, dequantized where need be."""
        if self.values is not None:
            return self.values
        assert self.stored is not None
        if isinstance(self.stored, FP8Weight):  # some rows at a time: fp32 takes four times the room of the codes
            return torch.cat([dequantize(part).to(dtype) for part in fp8.in_rows(self.stored, ROWS)])
        return dequantize(self.stored).to(dtype)


def pieces_of(weights: Weights, name: str) -> list[tuple[str, int | None]]:
    """What to read of the file for the tensor `name`: tensors' names, and which expert's part of them."""
    source = weights.sources.get(name)
    if source is None:
        return [(name, None)]
    return [(part, None if source.slot is None else source.slot.expert) for part in source.parts.values()]


def assemble(
    checkpoint: Checkpoint, weights: Weights, name: str, pieces: Mapping[tuple[str, int | None], Tensor]
) -> Loaded:
    """The tensor `name` out of what `pieces_of` names; UserError for scales under which an engine gives garbage."""
    source = weights.sources.get(name)
    if source is None:
        return Loaded(pieces[name, None])
    expert = None if source.slot is None else source.slot.expert
    parts = {suffix: pieces[part, expert] for suffix, part in source.parts.items()}
    if source.slot is None:
        assert source.format is not None
        stored, scale = reading.decode(checkpoint.config, name.removesuffix(".weight"), source.format, parts)
        return Loaded(None, stored, scale)
    return _from_stack(source, parts, where=str(checkpoint.path))


def _from_stack(source: Source, parts: Mapping[str, Tensor], *, where: str) -> Loaded:
    slot = source.slot
    assert slot is not None
    rows = slice(slot.start, slot.stop, slot.step)
    if source.format is not None:  # [outputs, K/32, 16 bytes of two codes] beside [outputs, K/32]
        exponents = parts["scales"][rows].contiguous()
        if bool((exponents == E8M0_NAN).any()):
            what = f"expert {slot.expert} of {source.parts['scales']} has scales that are no numbers."
            raise UserError(what, where=where, remedy="The source is damaged: download it again.")
        return Loaded(None, MXFP4Weight(parts["blocks"][rows].flatten(1).contiguous(), exponents))
    whole = parts["weight"]
    return Loaded((whole.t() if slot.transposed else whole)[rows].contiguous())


def part_of(source: Source, whole: Tensor) -> Tensor:
    """A view of the part of a 16-bit tensor of all experts that `source` stands for: [N, K], or of biases [N]."""
    slot = source.slot
    assert slot is not None
    mine = whole[slot.expert]
    return (mine.t() if slot.transposed else mine)[slot.start : slot.stop : slot.step]


def read_single(checkpoint: Checkpoint, weights: Weights, name: str) -> Tensor:
    """A single expert's tensor out of one of all experts, read by range to the CPU: 16-bit values, or dequantized."""
    pieces = {(part, expert): read_tensor(checkpoint, part, expert) for part, expert in pieces_of(weights, name)}
    return assemble(checkpoint, weights, name, pieces).in_dtype(dtype_of(weights.tensors[name]))
