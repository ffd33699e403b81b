"""What a router sends to the experts of a layer, of every token; the experts themselves need not run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from snugfit import distributed
from snugfit.calibration.moments import EvenSample, even_samples
from snugfit.model.forward_pass import Batch

SAMPLED_OF_LAYER = 1024  # tokens whose hidden states are kept: so many, up to twice as many


@dataclass(frozen=True)
class Routes:
    """The experts of each token, [tokens, k]; of some tokens hidden states [n, K] and experts [n, k].

    All tokens are those of all processes; `first` is the number of this one's first token among them.
    """

    experts: Tensor
    sample: Tensor
    sampled_experts: Tensor
    first: int = 0

    def sent_before(self, count: int) -> list[int]:
        """How many tokens the router sends to each of `count` experts in front of this process's tokens."""
        found: list[int] = torch.bincount(self.experts[: self.first].flatten(), minlength=count).tolist()
        return found


@contextmanager
def without_experts(module: nn.Module) -> Iterator[None]:
    """The experts `module` gives zeros in place of sums: what is behind them in the layer sees these."""
    module.__dict__["forward"] = lambda states, *_args, **_named: torch.zeros_like(states)
    try:
        yield
    finally:
        module.__dict__.pop("forward", None)


def routes_of(module: nn.Module, run: Callable[[Callable[[Batch], None]], None]) -> Routes | None:
    """What comes to the experts `module` while `run` passes samples; None if nothing does.

    The experts do not run. Several processes, which all call it, have consecutive samples, or none.
    """
    found: list[Tensor] = []
    samples: dict[int, EvenSample] = {}
    valid: Tensor | None = None
    first = 0

    def before(batch: Batch) -> None:
        nonlocal valid, first
        valid = None if batch.valid is None else batch.valid.reshape(-1)
        if not samples:
            first = batch.first
            samples.update({place: EvenSample(SAMPLED_OF_LAYER, first) for place in range(2)})

    def see(_: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        states, index = [*args, *named.values()][:2]
        real = slice(None) if valid is None else valid
        found.append(index[real].to(torch.int32))
        samples[0].add(states[real])
        samples[1].add(found[-1])

    handle = module.register_forward_pre_hook(see, with_kwargs=True)
    try:
        with without_experts(module):
            run(before)
    finally:
        handle.remove()
    everywhere = distributed.in_order(found)
    if not everywhere:
        return None
    kept = even_samples(samples if found else {}, SAMPLED_OF_LAYER)
    whole = torch.cat(everywhere).to(kept[0].device)
    return Routes(whole, kept[0], kept[1], first)
