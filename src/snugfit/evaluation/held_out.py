"""KL to the original on held-out samples, sample by sample: what a run decides by between ways to quantize."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from snugfit.evaluation.divergence import diverge, softmax
from snugfit.evaluation.evaluated_model import EvaluatedModel, last_states, open_head, open_model
from snugfit.evaluation.measure import LOGITS, SLICE

Advance = Callable[[], None]


class HeldOut:
    """Held-out samples, and what the original predicts on them."""

    def __init__(
        self,
        original: str | Path,
        samples: Sequence[Sequence[int]],
        device: torch.device,
        *,
        profile: str,
        tokens_per_batch: int,
    ) -> None:
        """Open the original; it runs when the first candidate is measured. `profile` is that of candidates' inputs."""
        self._original = open_model(original, activations="none")
        self._samples = samples
        self._device = device
        self._profile, self._tokens_per_batch = profile, tokens_per_batch
        self._states: list[Tensor] | None = None

    @torch.no_grad()
    def divergences(self, candidate: str | Path) -> list[float]:
        """Mean KL(original || candidate) in nats a token of each sample, over all tokens but the first.

        NaN where a prediction was not finite.
        """
        model = open_model(candidate, activations=self._profile)
        if self._states is None:
            self._states = self._last_states(self._original)
        states = self._last_states(model)
        heads = open_head(self._original, self._device), open_head(model, self._device)
        return [self._mean(heads, pair) for pair in zip(self._states, states, strict=True)]

    def _last_states(self, model: EvaluatedModel) -> list[Tensor]:
        positions = [torch.arange(len(sample) - 1) for sample in self._samples]
        return last_states(
            model, self._samples, positions, self._device, tokens_per_batch=self._tokens_per_batch
        )

    def _mean(self, heads: tuple[Callable[[Tensor], Tensor], ...], states: tuple[Tensor, Tensor]) -> float:
        total = torch.zeros((), dtype=torch.float64)
        width = self._original.vocabulary
        step = max(1, min(LOGITS, SLICE[self._device.type]) // width)
        for start in range(0, len(states[0]), step):
            first, second = (
                softmax(head(part[start : start + step].to(self._device).unsqueeze(0))[0])
                for head, part in zip(heads, states, strict=True)
            )
            kl = diverge(first, second).kl
            finite = first.finite & second.finite
            total += torch.where(finite, kl, torch.nan).double().sum().cpu()
        return float(total) / len(states[0])
