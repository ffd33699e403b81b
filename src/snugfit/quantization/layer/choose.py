"""What becomes of the tensors of a unit: a method chooses codes and 16-bit weights. Nothing here knows which method."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from snugfit.formats.quantized_weight import QuantizedWeight
from snugfit.methods.method import Method, Purpose, WeightGroup
from snugfit.model.layers import ExpertBuffers
from snugfit.quantization.layer.load import LoadedGroup
from snugfit.quantization.plan import Plan
from snugfit.storage.safetensors_header import dtype_of


@dataclass(frozen=True, kw_only=True)
class UnitTensor:
    """A tensor that is ready to be written and run.

    `codes` are None for a tensor that stays in 16 bits; `weight_16bit` is what the layer runs with, None if it is not
    needed or is in the layer's expert buffers. `relative_error` is sum((w_hat - w)^2) / sum(w^2), a scalar on the
    device; `input_scale` the multiplier of inputs that came with the source's codes; `scale_rule` how the scales of
    codes were chosen, "" for the source's codes. `changed`: it stays in 16 bits and is not the source's any more.
    `begun`: all of it is being written but a scale of inputs that is yet to be measured.
    """

    codes: QuantizedWeight | None = None
    weight_16bit: Tensor | None = None
    relative_error: Tensor | None = None
    input_scale: Tensor | None = None
    scale_rule: str = ""
    changed: bool = False
    begun: bool = False


def choose(
    plan: Plan, groups: Iterable[LoadedGroup], method: Method, buffers: ExpertBuffers | None, observed: Any = None
) -> dict[str, UnitTensor]:
    """What becomes of every tensor of a unit; with `buffers` the layer runs afterwards, and 16-bit weights are kept."""
    done: dict[str, UnitTensor] = {}
    purpose = Purpose(
        runs=buffers is not None, buffers={} if buffers is None else buffers.per_expert, observed=observed
    )
    for choice in method.choose(_for_method(plan, groups, buffers, done), purpose):
        weight = choice.weight_16bit
        held = buffers is not None and weight is not None and buffers.copy_in(choice.name, weight)
        # experts that stay are large: a tensor of the file is copied from file to file
        from_file = choice.codes is None and choice.name not in plan.weights.origins and not choice.changed
        if held and (choice.codes is not None or from_file):
            weight = None
        done[choice.name] = UnitTensor(
            codes=choice.codes,
            weight_16bit=weight,
            relative_error=choice.relative_error,
            scale_rule=choice.scale_rule,
            changed=choice.changed,
        )
    return done


def _for_method(
    plan: Plan, groups: Iterable[LoadedGroup], buffers: ExpertBuffers | None, done: MutableMapping[str, UnitTensor]
) -> Iterator[WeightGroup]:
    """The groups of 16-bit weights that a method works on; those whose codes stay go to `done`."""
    for group in groups:
        dtypes = {name: dtype_of(plan.weights.tensors[name]) for name in group.tensors}
        if not group.has_codes:
            weights = {name: group.tensors.pop(name).in_dtype(dtype) for name, dtype in dtypes.items()}
            yield WeightGroup(weights=weights, target=group.target)
            continue
        for name, dtype in dtypes.items():
            one = group.tensors.pop(name)
            weight = None
            if buffers is not None:
                weight = one.in_dtype(dtype)
                weight = None if buffers.copy_in(name, weight) else weight
            done[name] = UnitTensor(
                codes=one.quantized, weight_16bit=weight, relative_error=torch.zeros(()), input_scale=one.input_scale
            )
