"""What the processes of a run share of a layer: each reads, chooses and writes some tensors, all run with all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping

import torch
from torch import Tensor

from snugfit import distributed
from snugfit.model.layers import ExpertBuffers
from snugfit.quantization.division import Division
from snugfit.quantization.plan import Plan
from snugfit.storage.safetensors_header import dtype_of

Owners = Mapping[str, int]


def owners_of(plan: Plan, number: int, division: Division, *, correlates: bool) -> dict[str, int]:
    """Which process reads, chooses and writes each tensor of unit `number`: fused groups stay together.

    The work on a weight grows with its values; with `correlates` on those that follow the effort also with its inputs.
    """
    groups: list[tuple[str, ...]] = division.coming
    grouped = {name for group in groups for name in group}
    rest = [(name,) for name in plan.units[number] if name not in grouped]
    costs = [sum(_cost(plan, name, correlates=correlates) for name in group) for group in (*groups, *rest)]
    found = distributed.share(costs)
    return {name: owner for group, owner in zip((*groups, *rest), found, strict=True) for name in group}


def _cost(plan: Plan, name: str, *, correlates: bool) -> int:
    info = plan.weights.tensors[name]
    assignment = plan.assignments.get(name)
    deep = correlates and assignment is not None and assignment.follows_effort and ".experts." not in name
    return info.elements * (info.shape[-1] if deep else 1)


def is_mine(owners: Owners, name: str) -> bool:
    """Whether this process has a tensor; all, where nothing is shared."""
    return owners.get(name, 0) == distributed.rank()


def send_experts(buffers: ExpertBuffers, names: Iterable[str], owners: Owners) -> None:
    """Give all processes what those of tensors that belong to experts have in the experts' memory."""
    if distributed.world_size() == 1:
        return
    for name in names:
        singles = buffers.skeleton.stacks.stacked.get(name, ())
        for one in (name, *singles):
            if one in buffers.per_expert:
                distributed.send(buffers.per_expert[one], owners[name])


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
        distributed.send(held[name], owners[name])
