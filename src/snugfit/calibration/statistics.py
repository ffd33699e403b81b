"""What is measured on a linear's inputs while rows pass through it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from snugfit.model.walk import Batch


class InputAmax:
    """Largest input magnitude of each watched linear over all real tokens. Fused partners share their inputs."""

    def __init__(self, layer: nn.Module, modules: Iterable[str]) -> None:
        """Watch `modules` (names relative to `layer`) from now on."""
        self.amax: dict[str, Tensor] = {}
        self._valid: Tensor | None = None
        for name in modules:
            self._watch(layer.get_submodule(name), name)

    def before(self, batch: Batch) -> None:
        """Tell which tokens of the coming batch are real."""
        self._valid = batch.valid

    def _watch(self, module: nn.Module, name: str) -> None:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            # some models flatten [B, T, K] to [B * T, K] before a linear
            inputs = args[0] if self._valid is None else args[0].reshape(*self._valid.shape, -1)[self._valid]
            low, high = inputs.aminmax()
            seen = torch.maximum(high, -low).float().abs()
            self.amax[name] = torch.maximum(self.amax[name], seen) if name in self.amax else seen

        module.register_forward_pre_hook(hook)
