"""What is measured while rows pass through a layer: the inputs of its linears, the keys and values it would cache."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from snugfit.model.cache import NoCache
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


class KVAmax(NoCache):
    """Largest key and value magnitudes that one layer would cache, over all real tokens; given as `past_key_values`.

    Keys come as engines keep them: normalized and rotated. They pass unchanged, because the scale that an FP8 cache
    would round them under is what this pass measures; the layers behind see exact keys and values too.
    """

    def __init__(self) -> None:
        self._largest: tuple[Tensor, Tensor] | None = None
        self._valid: Tensor | None = None

    def before(self, batch: Batch) -> None:
        """Tell which tokens of the coming batch are real."""
        self._valid = batch.valid

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: object, **_kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, T, D] as they are, their magnitudes noted."""
        keys, values = self._magnitude(key_states), self._magnitude(value_states)
        if self._largest is not None:
            keys, values = torch.maximum(self._largest[0], keys), torch.maximum(self._largest[1], values)
        self._largest = keys, values
        return key_states, value_states

    @property
    def amax(self) -> tuple[float, float] | None:
        """Largest magnitudes of keys and of values; None where the layer has cached nothing, as linear attention."""
        return None if self._largest is None else (float(self._largest[0]), float(self._largest[1]))

    def _magnitude(self, states: Tensor) -> Tensor:
        of_tokens = torch.maximum(states.amax((1, 3)), -states.amin((1, 3)))  # [B, T]; NaN carries through
        real = of_tokens if self._valid is None else of_tokens[self._valid]
        return real.amax().float()
