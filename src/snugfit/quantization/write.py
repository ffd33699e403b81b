"""Starts to write what stands for each source tensor in the result, and records it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from snugfit.dialects import compressed_tensors
from snugfit.formats.nvfp4 import input_global_scale
from snugfit.model.names import may_be_infinite
from snugfit.quantization.layer import UnitTensor
from snugfit.quantization.measured import Measured
from snugfit.quantization.plan import Plan
from snugfit.records.quantize import TensorRecord
from snugfit.storage.shards import ShardWriter


def write_unit(
    plan: Plan, number: int, tensors: Mapping[str, UnitTensor], measured: Measured, writer: ShardWriter
) -> list[TensorRecord]:
    """Start to write all tensors of unit `number`, and the scales of its FP8 KV cache; their records."""
    names = [name for name in plan.units[number] if name in plan.outputs]
    records = [_write(plan, name, tensors.get(name), measured, writer) for name in names]
    return records + _write_kv_scales(plan, number - 1, measured, writer)


def _write(plan: Plan, name: str, tensor: UnitTensor | None, measured: Measured, writer: ShardWriter) -> TensorRecord:
    planned = plan.record(name)
    if tensor is None or tensor.codes is None:
        if tensor is None or tensor.weight_16bit is None:
            writer.copy(plan.checkpoint, name, infinite=may_be_infinite(name))
        else:
            writer.write(name, tensor.weight_16bit)
        return planned
    amax = measured.inputs.get(name)
    scale = tensor.input_scale
    if amax is not None:
        scale = input_global_scale((plan.headroom_of(name) or 1.0) * amax)
    parts = compressed_tensors.encode(tensor.codes, scale)
    for info in plan.outputs[name]:
        if plan.copies(name, info):  # 1 / (1 / s) need not be s
            writer.copy(plan.checkpoint, info.name)
            continue
        part, shape = parts[info.name.rpartition(".")[2]], info.shape
        # a scale of the source may be () or [N], or one number for all outputs
        writer.write(
            info.name, part.reshape(shape) if part.numel() == math.prod(shape) else part.expand(shape).contiguous()
        )
    assert tensor.relative_error is not None
    return replace(
        planned,
        scale_rule=tensor.scale_rule or planned.scale_rule,
        relative_error=float(tensor.relative_error),
        input_amax=amax,
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
