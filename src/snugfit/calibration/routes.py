"""What a router sends to the experts of a layer, of every token; the experts themselves need not run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from snugfit.calibration.moments import EvenSample
from snugfit.model.forward_pass import Batch

SAMPLED_OF_LAYER = 1024  # tokens whose hidden states are kept: so many, up to twice as many


@dataclass(frozen=True)
class Routes:
    """The experts of each token, [tokens, k]; of some tokens hidden states [n, K] and experts [n, k]."""

    experts: Tensor
    sample: Tensor
    sampled_experts: Tensor


def routes_of(
    module: nn.Module, run: Callable[[Callable[[Batch], None]], None], *, experts_run: bool = False
) -> Routes | None:
    """What comes to the experts `module` while `run` passes samples; None if nothing does.

    Unless `experts_run`, they give zeros in place of their sums: what is behind them in the layer sees these.
    """
    found: list[Tensor] = []
    hidden, chosen = EvenSample(SAMPLED_OF_LAYER), EvenSample(SAMPLED_OF_LAYER)
    valid: Tensor | None = None

    def before(batch: Batch) -> None:
        nonlocal valid
        valid = None if batch.valid is None else batch.valid.reshape(-1)

    def see(_: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        states, index = [*args, *named.values()][:2]
        real = slice(None) if valid is None else valid
        found.append(index[real].to(torch.int32))
        hidden.add(states[real])
        chosen.add(found[-1])

    handle = module.register_forward_pre_hook(see, with_kwargs=True)
    if not experts_run:
        module.__dict__["forward"] = lambda states, *_args, **_named: torch.zeros_like(states)
    try:
        run(before)
    finally:
        handle.remove()
        module.__dict__.pop("forward", None)
    return Routes(torch.cat(found), hidden.result(), chosen.result()) if found else None
