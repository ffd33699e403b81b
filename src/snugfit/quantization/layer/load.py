"""The tensors of a unit, a decoder layer or all outside the layers, as they are read: fused group by fused group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from snugfit.machine import give_back_memory
from snugfit.methods.method import Target
from snugfit.model.assemble import Loaded
from snugfit.quantization.layer.read_ahead import ReadAhead
from snugfit.quantization.plan import Plan

GIVEN_BACK = 64 << 20  # bytes of 16-bit weights after which freed memory is returned to the system


@dataclass(frozen=True, kw_only=True)
class LoadedGroup:
    """A fused group of tensors as they were read; `target` None: they stay; `has_codes`: the source's codes stay."""

    tensors: dict[str, Loaded]
    target: Target | None
    has_codes: bool


def load(plan: Plan, groups: Sequence[tuple[str, ...]], ahead: ReadAhead) -> Iterator[LoadedGroup]:
    """The tensors of a unit, group by group."""
    handled = 0
    for names in groups:
        handled += sum(plan.weights.tensors[name].bytes for name in names)
        if handled > GIVEN_BACK:  # the C library would keep the memory of many small tensors of experts
            give_back_memory()
            handled = 0
        assignment = plan.assignments.get(names[0])
        tensors = ahead.take(names)
        target, has_codes = target_of(plan, names[0]), assignment is not None and assignment.keeps_codes
        yield LoadedGroup(tensors=tensors, target=target, has_codes=has_codes)


def target_of(plan: Plan, name: str) -> Target | None:
    """How a tensor is to be quantized, None if it stays in 16 bits."""
    one = plan.assignments.get(name)
    if one is None or one.format is None:
        return None
    return Target(format=one.format, scale_rule=one.scale_rule, objective=one.objective)
