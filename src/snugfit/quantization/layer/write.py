"""Starts to write what stands for each source tensor in the result, and records it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from snugfit import distributed
from snugfit.dialects import compressed_tensors
from snugfit.formats.nvfp4 import input_global_scale
from snugfit.model.names import may_be_infinite
from snugfit.quantization.layer.choose import UnitTensor
from snugfit.quantization.layer.division import Division
from snugfit.quantization.layer.exchange import is_mine
from snugfit.quantization.layer.measured import Measured
from snugfit.quantization.plan import Plan
from snugfit.records.quantize import TensorRecord
from snugfit.storage.safetensors_header import TensorInfo
from snugfit.storage.shards import ShardWriter


def write_unit(
    plan: Plan,
    number: int,
    tensors: Mapping[str, UnitTensor],
    measured: Measured,
    writer: ShardWriter,
    owners: Mapping[str, int],
) -> list[TensorRecord]:
    """Start to write the tensors of unit `number` that this process has, and scales of an FP8 KV cache; records."""
    names = [name for name in plan.units[number] if name in plan.outputs and is_mine(owners, name)]
    records = [_write(plan, name, tensors.get(name), measured, writer) for name in names]
    if distributed.is_main():
        records += _write_kv_scales(plan, number - 1, measured, writer)
    writer.start()
    return records


def begin_copies(
    plan: Plan, number: int, division: Division, writer: ShardWriter, owners: Mapping[str, int]
) -> dict[str, UnitTensor]:
    """Start to copy the tensors of unit `number` that this process has and that are not read, before its turn comes.

    The result is what `write_unit` needs of them.
    """
    read = {name for group in division.coming for name in group}
    names = [name for name in plan.units[number] if name not in read and name in plan.outputs and is_mine(owners, name)]
    for name in names:
        _write_16bit(plan, name, None, writer)
    writer.start()
    return {name: UnitTensor(begun=True) for name in names}


def write_early(plan: Plan, tensors: Mapping[str, UnitTensor], writer: ShardWriter) -> dict[str, UnitTensor]:
    """Start to write tensors before their layer is measured: all but scales of inputs that are yet to be measured.

    The result is what `write_unit` needs of them, without what takes memory.
    """
    for name, tensor in tensors.items():
        if name not in plan.outputs:
            continue
        if tensor.codes is None:
            _write_16bit(plan, name, tensor, writer)
        else:
            infos = [info for info in plan.outputs[name] if not _is_measured(plan, name, info)]
            _write_parts(plan, name, infos, compressed_tensors.encode(tensor.codes, tensor.input_scale), writer)
    writer.start()
    return {name: replace(tensor, codes=None, weight_16bit=None, begun=True) for name, tensor in tensors.items()}


def _is_measured(plan: Plan, name: str, info: TensorInfo) -> bool:
    """Whether one of the outputs of a weight is the scale of its inputs, which this run measures."""
    assignment = plan.assignments.get(name)
    measured = assignment is not None and assignment.calibrated
    return measured and info.name.rpartition(".")[2] == compressed_tensors.INPUT_SCALE


def _write_16bit(plan: Plan, name: str, tensor: UnitTensor | None, writer: ShardWriter) -> None:
    if tensor is None or tensor.weight_16bit is None or (not writer.lasts and _is_sources(plan, name, tensor)):
        writer.copy(plan.checkpoint, name, infinite=may_be_infinite(name))
    else:
        writer.write(name, tensor.weight_16bit)


def _is_sources(plan: Plan, name: str, tensor: UnitTensor) -> bool:
    """Whether a tensor in 16 bits is a tensor of the source's files as it is there."""
    return not tensor.changed and name not in plan.weights.origins


def _write(plan: Plan, name: str, tensor: UnitTensor | None, measured: Measured, writer: ShardWriter) -> TensorRecord:
    planned = plan.record(name)
    if tensor is None or (tensor.codes is None and not tensor.begun):
        _write_16bit(plan, name, tensor, writer)
        return planned
    amax = measured.inputs.get(name)
    scale = tensor.input_scale
    if amax is not None:
        scale = input_global_scale((plan.headroom_of(name) or 1.0) * amax)
    infos = plan.outputs[name]
    if tensor.codes is None:
        infos = tuple(info for info in infos if _is_measured(plan, name, info))
        parts = {} if scale is None else compressed_tensors.encode_input_scale(scale)
    else:
        parts = compressed_tensors.encode(tensor.codes, scale)
    _write_parts(plan, name, infos, parts, writer)
    if tensor.relative_error is None:
        return planned
    return replace(
        planned,
        scale_rule=tensor.scale_rule or planned.scale_rule,
        relative_error=float(tensor.relative_error),
        input_amax=amax,
    )


def _write_parts(
    plan: Plan, name: str, infos: Sequence[TensorInfo], parts: Mapping[str, Tensor], writer: ShardWriter
) -> None:
    for info in infos:
        if plan.copies(name, info):  # 1 / (1 / s) need not be s
            writer.copy(plan.checkpoint, info.name)
            continue
        part, shape = parts[info.name.rpartition(".")[2]], info.shape
        # a scale of the source may be () or [N], or one number for all outputs
        writer.write(
            info.name, part.reshape(shape) if part.numel() == math.prod(shape) else part.expand(shape).contiguous()
        )


def _write_kv_scales(plan: Plan, layer: int, measured: Measured, writer: ShardWriter) -> list[TensorRecord]:
    if measured.keys_values is None or not plan.writes_kv_scales(layer):
        return []
    attention = plan.observed_caches[layer]
    dtype = plan.outputs[f"{attention}.k_scale"][0].dtype
    scales = compressed_tensors.kv_encode(attention, measured.keys_values, dtype)
    records = []
    for (name, scale), amax in zip(scales.items(), measured.keys_values, strict=True):
        writer.write(name, scale)
        records.append(replace(plan.record(name), input_amax=amax))
    return records
