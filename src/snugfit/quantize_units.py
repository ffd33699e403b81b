"""One unit of a quantize run: a decoder layer's weights read ahead, quantized, and run once over all rows."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from snugfit.calibration.statistics import InputAmax, KVAmax
from snugfit.engines.fused import group_modules
from snugfit.errors import UserError
from snugfit.formats.stored import Stored
from snugfit.methods.rounding import round_and_compare
from snugfit.model import emulate, layers, walk
from snugfit.model.checkpoint import Checkpoint
from snugfit.model.transfer import Moving, Transfer, check_finite
from snugfit.quantize_plan import Plan


@dataclass(frozen=True)
class UnitTensor:
    """A source tensor in memory. `stored`: quantized, None where kept; `walked`: 16-bit values for the walk, if any.

    `error` is sum((w_hat - w)^2) / sum(w^2), a scalar on the device, None where kept.
    """

    stored: Stored | None
    walked: Tensor | None
    error: Tensor | None


class ReadAhead:
    """Gives groups of tensors in the order of `groups`, reading the next ones while one is worked on.

    At most `budget` bytes are read ahead, and one group in any case.
    """

    def __init__(
        self, transfer: Transfer, checkpoint: Checkpoint, groups: Sequence[tuple[str, ...]], budget: int
    ) -> None:
        self._transfer, self._checkpoint = transfer, checkpoint
        self._left = deque(groups)
        self._coming: deque[tuple[int, dict[str, Moving[Tensor]]]] = deque()
        self._budget = budget
        self._begin()

    def _begin(self) -> None:
        while self._left:
            size = sum(self._checkpoint.tensors[name].bytes for name in self._left[0])
            if self._coming and size + sum(bytes_ for bytes_, _ in self._coming) > self._budget:
                return
            names = self._left.popleft()
            self._coming.append((size, {name: self._transfer.read(self._checkpoint, name) for name in names}))

    def take(self, group: Sequence[str]) -> dict[str, Tensor]:
        """The next group's tensors on the device; UserError where they hold NaN or infinite values."""
        _, coming = self._coming.popleft()
        assert tuple(coming) == tuple(group), "groups are taken in order"
        found = {name: moving.result() for name, moving in coming.items()}
        self._begin()
        return {name: check_finite(self._checkpoint, name, tensor) for name, tensor in found.items()}


def quantize_unit(
    plan: Plan, groups: Sequence[tuple[str, ...]], ahead: ReadAhead, walked: bool
) -> dict[str, UnitTensor]:
    """Quantize a unit's groups; `walked`: keep 16-bit values of all its tensors for the walk."""
    done: dict[str, UnitTensor] = {}
    for names in groups:
        weights = ahead.take(names)
        assignment = plan.assignments.get(names[0])
        if assignment is None or assignment.format is None:
            done |= {name: UnitTensor(None, weight, None) for name, weight in weights.items()}
            continue
        settings = assignment.format, assignment.scale, assignment.objective
        for name, stored, values, error in round_and_compare(weights, *settings, values=walked):
            done[name] = UnitTensor(stored, values, error)
    return done


@dataclass(frozen=True)
class Measured:
    """What a layer's pass found: amax of the inputs of weights by tensor name; of keys and values by attention."""

    inputs: Mapping[str, float]
    keys_values: tuple[float, float] | None


def calibrate(
    plan: Plan,
    skeleton: layers.Skeleton,
    index: int,
    tensors: Mapping[str, UnitTensor],
    batches: Sequence[walk.Batch],
    states: tuple[walk.States, walk.States],
    device: torch.device,
) -> Measured:
    """Run decoder layer `index` with quantized weights over all rows, its hidden states from one file to the other.

    FP8 inputs are quantized meanwhile, NVFP4 inputs not: their scale is what this pass measures.
    """
    prefix = f"{plan.decoder}.{index}."
    # files may hold tensors that transformers computes itself, such as rotary_emb.inv_freq
    used = layers.used_names(skeleton, index)
    weights = {n.removeprefix(prefix): t.walked for n, t in tensors.items() if t.walked is not None}
    layer = layers.resident_layer(skeleton, index, {n: w for n, w in weights.items() if n in used}, device)
    inside = layers.module_names(skeleton, index)
    formats = {
        name.removeprefix(prefix).removesuffix(".weight"): assignment.format
        for name in tensors
        if (assignment := plan.assignments.get(name)) and assignment.format is not None
    }
    quantizers = {inside[module]: emulate.input_quantizer(fmt, "marlin", None) for module, fmt in formats.items()}
    emulate.quantize_inputs(layer, {module: q for module, q in quantizers.items() if q is not None})
    groups = group_modules(module for module, fmt in formats.items() if fmt.spec.calibrated)
    observer = InputAmax(layer, [inside[group[0]] for group in groups])
    cache = KVAmax() if index in plan.attention else None

    def before(batch: walk.Batch) -> None:
        observer.before(batch)
        if cache is not None:
            cache.before(batch)

    walk.run_layer(layer, index, batches, before, cache=cache, states=states)
    found: dict[str, float] = {}
    for group in groups:
        seen = observer.amax.get(inside[group[0]])
        amax = 0.0 if seen is None else float(seen)
        _check_amax(amax, "its calibrated inputs have", prefix + group[0])
        found |= {f"{prefix}{module}.weight": amax for module in group}
    keys_values = None if cache is None else cache.amax
    if cache is not None:
        for what, largest in zip(("keys", "values"), keys_values or (0.0, 0.0), strict=True):
            _check_amax(largest, f"its cached {what} have", plan.attention[index])
    return Measured(found, keys_values)


def _check_amax(amax: float, what: str, where: str) -> None:
    if not 0.0 < amax < float("inf"):
        raise UserError(
            f"{what} largest magnitude {amax}.",
            where=where,
            remedy="No scale can be made of that: check the source's weights, or keep this tensor in the recipe.",
        )
