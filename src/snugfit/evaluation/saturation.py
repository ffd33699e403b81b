"""What comes to linears with static scales of their inputs, compared with the range of these scales.

An NVFP4 file has one fp32 scale for the inputs of a fused group, made of the largest calibrated input. A block that
exceeds its range gets the largest E4M3 block scale there is, and its largest values are cut off. So do values under a
static FP8 scale. Nothing of that shows on the samples that the scale was made from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from snugfit import distributed
from snugfit.engines.fused import group_modules
from snugfit.model.emulate import ExpertInputs
from snugfit.model.experts import DOWN, ExpertNames, NoHooks, Watching
from snugfit.model.forward_pass import Batch, real_tokens

_ROUNDED = 1 + 2.0**-20  # what two reciprocals in fp32 may take of a range


@dataclass(frozen=True)
class SeenInputs:
    """Inputs under one static scale, by its `module`: the first linear of a fused group, or all experts' together.

    `weight` is the file's name of a weight whose inputs they are.
    `amax` is their largest magnitude, `range` the largest that the scale represents. Beyond that are
    `saturated_values` values, which belong to `saturated_tokens` of `tokens` tokens.
    """

    module: str
    weight: str
    tokens: int
    saturated_tokens: int
    saturated_values: int
    amax: float
    range: float


class InputWatch:
    """Sees the inputs of linears with static input scales before they are rounded, over all real tokens."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str], _Sums] = {}  # by module and weight
        self._valid: Tensor | None = None

    def before(self, batch: Batch) -> None:
        """Note which tokens of the coming batch are real."""
        self._valid = batch.valid

    def linears(self, layer: nn.Module, prefix: str, modules: Mapping[str, str], ranges: Mapping[str, Tensor]) -> None:
        """Watch linears of a layer: `ranges` by the file's names relative to `prefix`, `modules` maps them to its own.

        Whatever else changes inputs has to be hooked in later.
        """
        for group in group_modules(ranges):
            module = prefix + group[0]
            sums = self._sums[module, f"{module}.weight"] = _Sums(ranges[group[0]])

            def hook(_: nn.Module, args: tuple[Tensor, ...], sums: _Sums = sums) -> None:
                sums.add(real_tokens(args[0], self._valid))

            layer.get_submodule(modules[group[0]]).register_forward_pre_hook(hook)

    def experts(self, prefix: str, mixture: ExpertNames, inputs: ExpertInputs) -> NoHooks:
        """Hooks for a layer's routed experts, that watch what comes and then do as `inputs`."""
        module = f"{prefix}{mixture.file_module}"
        sums: list[_Sums | None] = []
        for what, is_down, limit in (("gate_up", False, inputs.ranges[0]), ("down", True, inputs.ranges[1])):
            weights = (
                n for (_, role, kind), n in mixture.names.items() if kind == "weight" and (role == DOWN) == is_down
            )
            sums.append(None if limit is None else _Sums(limit))
            if (one := sums[-1]) is not None:
                self._sums[f"{module}.{what}", prefix + next(weights)] = one
        return Watching(inputs, _ExpertWatch(self, sums[0], sums[1]))

    @property
    def valid(self) -> Tensor | None:
        """Mask [B, T] of the batch's real tokens, None if all are real."""
        return self._valid

    def share(self) -> None:
        """Take in what all processes have seen, which all call it."""
        if distributed.world_size() == 1:
            return
        said = distributed.gather([sums.stated() for sums in self._sums.values()])
        for place, sums in enumerate(self._sums.values()):
            sums.take([one[place] for one in said])

    def result(self) -> list[SeenInputs]:
        """What was seen under each scale, in the order of the layers; scales that nothing came to are missing."""
        return [sums.result(*names) for names, sums in self._sums.items() if sums.tokens]


class _ExpertWatch(NoHooks):
    """Sees the inputs of experts."""

    def __init__(self, watch: InputWatch, gate_up: _Sums | None, down: _Sums | None) -> None:
        self._watch, self._gate_up, self._down = watch, gate_up, down

    def first(self, hidden: Tensor) -> Tensor:
        """Inputs of all gate and up projections [tokens, K]."""
        if self._gate_up is not None:
            valid = self._watch.valid
            self._gate_up.add(hidden if valid is None else hidden[valid.reshape(-1)])
        return hidden

    def second(self, expert: int, hidden: Tensor, tokens: Tensor, *, forced: bool) -> Tensor:  # noqa: ARG002
        """Inputs of an expert's down projection [n, K]."""
        if self._down is not None:
            valid = self._watch.valid
            self._down.add(hidden if valid is None else hidden[valid.reshape(-1)[tokens]])
        return hidden


class _Sums:
    """Adds up what `SeenInputs` holds; its numbers stay on the device until they are asked for."""

    def __init__(self, limit: Tensor) -> None:
        self._range = limit
        self._found: Tensor | None = None  # tokens and values beyond the range, int64 [2]
        self._amax: Tensor | None = None
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Take in inputs [n, K]."""
        if not len(inputs):
            return
        limit = (self._range * _ROUNDED).view(1)  # as a scalar it would be rounded to 16 bits before it is compared
        sizes = inputs.abs()
        of_tokens = sizes.amax(-1).float()  # NaN carries through; aminmax is ten times slower on a CPU
        amax, beyond = of_tokens.amax(), (of_tokens > limit).sum()
        self._amax = amax if self._amax is None else self._amax.maximum(amax)
        if inputs.is_cuda or int(beyond):  # a GPU would be waited for
            found = torch.stack((beyond, (sizes > limit).sum()))
            self._found = found if self._found is None else self._found + found
        self.tokens += len(inputs)

    def stated(self) -> tuple[int, Tensor | None, Tensor | None]:
        """What this process has taken in, for all others."""
        return self.tokens, self._amax, self._found

    def take(self, said: Sequence[tuple[int, Tensor | None, Tensor | None]]) -> None:
        """Take in what all processes have `stated`."""
        self.tokens, self._amax, self._found = distributed.tallied(said)

    def result(self, module: str, weight: str) -> SeenInputs:
        """All that was taken in."""
        assert self._amax is not None
        tokens, values = (0, 0) if self._found is None else self._found.tolist()
        return SeenInputs(module, weight, self.tokens, tokens, values, float(self._amax), float(self._range))
