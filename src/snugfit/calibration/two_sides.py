"""Inputs of linears and of routed experts, of two groups of samples apart, measured in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from snugfit.calibration.moments import ExpertMoments, Moments, MomentsObserver
from snugfit.model.experts import NoHooks
from snugfit.model.forward_pass import Batch, real_tokens


@dataclass(frozen=True)
class _Part:
    """The tokens of a batch that one group of samples has: as a batch shows its real ones."""

    valid: Tensor
    number: int


def parts_of(batch: Batch, first: int) -> tuple[Any, Any]:
    """The tokens of samples before number `first`, and of the others; each with a mask [B, T] named `valid`."""
    real = batch.valid
    width = batch.tokens.shape[1]
    mask = torch.ones(len(batch.rows), width, dtype=torch.bool, device=batch.tokens.device) if real is None else real
    before = torch.tensor([row < first for row in batch.rows], device=mask.device)[:, None]
    return _Part(mask & before, batch.number), _Part(mask & ~before, batch.number)


class TwoSides:
    """Moments, and the largest magnitude of every input channel, of watched linears; of either group of samples."""

    def __init__(self, layer: nn.Module, modules: Sequence[str], first: int) -> None:
        """Watch `modules` (names relative to `layer`); samples from number `first` on are the second group."""
        self._first = first
        self._moments = [MomentsObserver(layer, dict.fromkeys(modules, True)) for _ in range(2)]
        self._channels: list[dict[str, Tensor]] = [{}, {}]
        self._parts: tuple[Any, Any] | None = None
        self._handles = [layer.get_submodule(name).register_forward_pre_hook(self._hook(name)) for name in modules]

    def _hook(self, name: str):  # type: ignore[no-untyped-def]  # noqa: ANN202
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            assert self._parts is not None
            for part, channels in zip(self._parts, self._channels, strict=True):
                inputs = real_tokens(args[0], part.valid)
                if len(inputs):
                    amax = inputs.abs().amax(0).float()
                    channels[name] = torch.maximum(channels[name], amax) if name in channels else amax

        return hook

    def before(self, batch: Batch) -> None:
        """Note which tokens of the coming batch each group has."""
        self._parts = parts_of(batch, self._first)
        for part, moments in zip(self._parts, self._moments, strict=True):
            moments.before(part)

    def result(self) -> tuple[tuple[dict[str, Moments], dict[str, Tensor]], ...]:
        """Of each group moments and largest magnitudes [K], by module. The hooks are removed."""
        for handle in self._handles:
            handle.remove()
        moments = [one.result() for one in self._moments]
        return tuple(zip(moments, self._channels, strict=True))


class TwoSidedExperts(NoHooks):
    """E[x^2] of what comes to each routed expert of a layer, and how many tokens, of either group of samples."""

    def __init__(self, first: int) -> None:
        """Samples from number `first` on are the second group."""
        self._first = first
        self.moments = ExpertMoments(), ExpertMoments()
        self.routed: tuple[list[int], list[int]] = [], []
        self._masks: tuple[Tensor, ...] = ()

    def before(self, batch: Batch) -> None:
        """Note which tokens of the coming batch each group has."""
        parts = parts_of(batch, self._first)
        self._masks = tuple(part.valid.reshape(-1) for part in parts)
        for part, moments in zip(parts, self.moments, strict=True):
            moments.before(part)

    def begin(self, hidden: Tensor, count: int) -> None:
        """A pass of hidden states [tokens, K] through `count` experts begins."""
        for moments, routed in zip(self.moments, self.routed, strict=True):
            moments.begin(hidden, count)
            routed.extend([0] * (count - len(routed)))

    def second(self, expert: int, hidden: Tensor, tokens: Tensor, *, forced: bool) -> Tensor:
        """Inputs of an expert's down projection [n, K], of `tokens` [n]."""
        for moments, routed, mask in zip(self.moments, self.routed, self._masks, strict=True):
            moments.second(expert, hidden, tokens, forced=forced)
            routed[expert] += int(mask[tokens].sum())
        return hidden
