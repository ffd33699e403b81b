"""How long parts of a model take on this machine: a decoder layer, forwards and backwards, and its predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from snugfit.evaluation.divergence import exact_kl, softmax
from snugfit.machine import Seconds, timed
from snugfit.model import forward_pass
from snugfit.model.forward_pass import Batch


@torch.no_grad()
def forward(layer: nn.Module, index: int, batch: Batch, hidden: Tensor) -> None:
    """Run a batch's `hidden` states [B, T, H] through decoder layer `index`."""
    forward_pass.call_layer(layer, index, batch, hidden)


@torch.enable_grad()
def backward(layer: nn.Module, index: int, batch: Batch, hidden: Tensor, parameters: Sequence[Tensor] = ()) -> None:
    """Run them forwards and backwards, for gradients of the layer's input and of its `parameters`."""
    wanted = [hidden.detach().requires_grad_(), *parameters]
    output = forward_pass.call_layer(layer, index, batch, wanted[0])
    torch.autograd.grad(output, wanted, torch.ones_like(output))


def backward_time(
    layer: nn.Module, index: int, batch: Batch, hidden: Tensor, parameters: Sequence[Tensor] = ()
) -> Seconds:
    """Seconds of `backward`."""
    return timed(partial(backward, layer, index, batch, hidden, parameters), hidden.device, twice=True)


def prediction_time(head: Callable[[Tensor], Tensor], hidden: Tensor) -> Seconds:
    """Seconds of the predictions of two models out of `hidden` states [1, n, H], and of their KL, divided by 2 n."""

    @torch.no_grad()
    def predict() -> None:
        exact_kl(softmax(head(hidden)[0]), head(hidden)[0])

    return timed(predict, hidden.device, twice=True) * (1 / (2 * hidden.shape[1]))
