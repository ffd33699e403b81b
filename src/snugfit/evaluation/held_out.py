"""KL to the original on held-out samples, sample by sample: what a run decides by between ways to quantize."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from snugfit import distributed
from snugfit.evaluation.divergence import exact_kl, softmax
from snugfit.evaluation.evaluated_model import EvaluatedModel, last_states, open_head, open_model
from snugfit.evaluation.measure import SLICE
from snugfit.evaluation.saturation import InputWatch
from snugfit.storage.checkpoint import borrow, header_digest
from snugfit.storage.open import open_checkpoint

LOGITS = {"cpu": 1 << 22, "cuda": 1 << 24}  # of one model in memory at once
SEGMENT_TOKENS = 128  # tokens whose KL is averaged: what errors are estimated from


def segments(samples: Sequence[Sequence[int]], shares: Sequence[int]) -> tuple[list[int], list[int]]:
    """Scored tokens (all but a sample's first) of each segment of the samples in order, and the file that it is of.

    `shares` are the numbers of samples of each file; none: all are of one.
    """
    tokens: list[int] = []
    files: list[int] = []
    file_of = [file for file, count in enumerate(shares or [len(samples)]) for _ in range(count)]
    for sample, file in zip(samples, file_of, strict=True):
        starts = range(0, len(sample) - 1, SEGMENT_TOKENS)
        tokens += [min(SEGMENT_TOKENS, len(sample) - 1 - start) for start in starts]
        files += [file] * len(starts)
    return tokens, files


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
        experts_per_group: int | None = None,
        same_head: bool = False,
    ) -> None:
        """Open the original; it runs when the first candidate is measured. `profile` is that of candidates' inputs.

        `experts_per_group` are the routed experts of a layer that are in memory at once, None for all. With `same_head`
        candidates have the original's tensors outside their decoder layers.
        """
        self._same_head = same_head
        self._experts = experts_per_group
        self._original = replace(open_model(original, activations="none"), experts_per_group=experts_per_group)
        self._samples = samples
        self._device = device
        self._profile, self._tokens_per_batch = profile, tokens_per_batch
        self._states: list[Tensor] | None = None
        self._opened: tuple[Path, EvaluatedModel] | None = None

    def open(self, candidate: str | Path) -> EvaluatedModel:
        """A candidate before it is measured: its headers and config have to be there, its weights not yet.

        One with the headers and config of the candidate before it has its modules, too.
        """
        folder = Path(candidate)
        if self._opened is not None:
            before, known = self._opened
            if folder == before:
                return known
            checkpoint = open_checkpoint(folder)
            if header_digest(checkpoint) == header_digest(known.checkpoint):
                self._opened = folder, replace(known, checkpoint=checkpoint, name=folder.resolve().name)
                return self._opened[1]
        model = replace(open_model(folder, activations=self._profile), experts_per_group=self._experts)
        self._opened = folder, model
        return model

    @torch.no_grad()
    def divergences(
        self, candidate: str | Path, watch: InputWatch | None = None, *, same: Sequence[str] = ()
    ) -> list[float]:
        """Mean KL(original || candidate), nats a token, of each of `segments`; NaN where a number was not finite.

        `watch` sees what comes to the candidate's linears that have static scales of their inputs. The tensors `same`
        are read of the original, the candidate's files need not hold them.
        """
        model = self.open(candidate)
        model = replace(model, checkpoint=borrow(model.checkpoint, self._original.checkpoint, same))
        if self._states is None:
            self._states = self._last_states(self._original)
        states = self._last_states(model, watch)
        if watch is not None:
            watch.share()
        head = open_head(self._original, self._device, shared=True)
        is_same = self._same_head and model.arithmetic == self._original.arithmetic
        heads = head, head if is_same else open_head(model, self._device, shared=True)
        pairs = zip(self._states, states, strict=True)
        means = distributed.merged({n: self._means(heads, pair) for n, pair in enumerate(pairs) if len(pair[0])})
        return [mean for n in range(len(states)) for mean in means[n]]

    def _last_states(self, model: EvaluatedModel, watch: InputWatch | None = None) -> list[Tensor]:
        positions = [torch.arange(len(sample) - 1) for sample in self._samples]
        return last_states(
            model,
            self._samples,
            positions,
            self._device,
            tokens_per_batch=self._tokens_per_batch,
            watch=watch,
            shared=True,
        )

    def _means(self, heads: tuple[Callable[[Tensor], Tensor], ...], states: tuple[Tensor, Tensor]) -> list[float]:
        """The mean of each segment of a sample."""
        found = []
        width = self._original.vocabulary
        # a head is read once for many tokens, whose predictions are compared a few at a time, in a CPU's caches
        kind = self._device.type
        rows, step = (max(1, size // width) for size in (LOGITS[kind], min(LOGITS[kind], SLICE[kind])))
        for parts in zip(*(of_sample.split(rows) for of_sample in states), strict=True):
            logits = [head(part.to(self._device).unsqueeze(0))[0] for head, part in zip(heads, parts, strict=True)]
            for first, second in zip(*(of_part.split(step) for of_part in logits), strict=True):
                found.append(exact_kl(softmax(first), second).double())
        return [float(segment.mean()) for segment in torch.cat(found).cpu().split(SEGMENT_TOKENS)]
