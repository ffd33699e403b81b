"""What the processes of a run share of a layer: each reads, chooses and writes some tensors, all run with all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from snugfit import distributed
from snugfit.model.layers import ExpertBuffers
from snugfit.quantization.layer.choose import UnitTensor
from snugfit.quantization.layer.division import Division
from snugfit.quantization.layer.layer_pass import LayerPass
from snugfit.quantization.plan import Plan
from snugfit.storage.safetensors_header import dtype_of

Owners = Mapping[str, int]


@dataclass(frozen=True)
class _Rates:
    """What GPTQ takes of K inputs, where reading, rounding and writing a value is 1.

    Passing errors on takes K / `passing` a value; the columns take K * `columns` a weight; and factoring E[x x^T] takes
    K^3 / `factoring` a fused group.
    """

    passing: float
    columns: float
    factoring: float


# by a GPU's 5 GB/s from the page cache, 50 TFLOP/s of fp32 products, 15 of Cholesky's and 1.2 us a column; by a CPU
# core's 10 ns to choose a value's scale, 50 GFLOP/s and 25 of Cholesky's
_RATES = {"cuda": _Rates(10_000, 3_000, 18_000), "cpu": _Rates(250, 0, 750)}


def owners_of(plan: Plan, number: int, division: Division, device: torch.device, *, correlates: bool) -> dict[str, int]:
    """Which process reads, chooses and writes each tensor of unit `number`: fused groups stay together.

    The work on a weight grows with its values; with `correlates` on those that follow the effort also with its inputs.
    """
    groups: list[tuple[str, ...]] = division.coming
    grouped = {name for group in groups for name in group}
    rest = [(name,) for name in plan.units[number] if name not in grouped]
    rates = _RATES[device.type] if correlates else None
    found = distributed.share([_cost(plan, group, rates) for group in (*groups, *rest)])
    return {name: owner for group, owner in zip((*groups, *rest), found, strict=True) for name in group}


def _cost(plan: Plan, group: Sequence[str], rates: _Rates | None) -> int:
    cost = factoring = 0.0
    for name in group:
        info, assignment = plan.weights.tensors[name], plan.assignments.get(name)
        cost += info.elements
        if rates is not None and assignment is not None and assignment.follows_effort and ".experts." not in name:
            inputs = info.shape[-1]
            cost += info.elements * inputs / rates.passing + rates.columns * inputs
            factoring = max(factoring, inputs**3 / rates.factoring)
    return round(cost + factoring)


def is_mine(owners: Owners, name: str) -> bool:
    """Whether this process has a tensor; all, where nothing is shared."""
    return owners.get(name, 0) == distributed.rank()


def send_experts(buffers: ExpertBuffers, names: Iterable[str], owners: Owners) -> None:
    """Give all processes what those of tensors that belong to experts have in the experts' memory."""
    if distributed.world_size() == 1:
        return
    distributed.send_many(
        (buffers.per_expert[one], owners[name])
        for name in names
        for one in (name, *buffers.skeleton.stacks.stacked.get(name, ()))
        if one in buffers.per_expert
    )


def send_tensors(
    plan: Plan, names: Iterable[str], owners: Owners, held: MutableMapping[str, Tensor], device: torch.device
) -> None:
    """Give all processes 16-bit tensors, which their owners have in `held`."""
    if distributed.world_size() == 1:
        return
    for name in names:
        if not is_mine(owners, name):
            info = plan.weights.tensors[name]
            held[name] = torch.empty(info.shape, dtype=dtype_of(info), device=device)
        held[name] = held[name].contiguous()
    distributed.send_many((held[name], owners[name]) for name in names)


def exchange(run: LayerPass, tensors: MutableMapping[str, UnitTensor]) -> None:
    """Give all processes the 16-bit weights that one of them has chosen, and multipliers of inputs that come along."""
    if distributed.world_size() == 1:
        return
    scales: dict[str, Tensor] = {}
    if any((one := run.plan.assignments.get(name)) and one.keeps_codes for name in run.names):
        mine = {name: one.input_scale for name, one in tensors.items() if one.input_scale is not None}
        scales = distributed.merged(mine)
    send_experts(run.buffers, run.names, run.owners)
    outside = [name for name in run.names if not run.buffers.has(name)]
    held = {name: one.weight_16bit for name, one in tensors.items() if one.weight_16bit is not None}
    send_tensors(run.plan, outside, run.owners, held, run.device)
    for name in run.names:
        if not is_mine(run.owners, name):
            tensors[name] = UnitTensor(weight_16bit=held.get(name), input_scale=scales.get(name))
