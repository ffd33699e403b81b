"""How long parts of a model take on this machine: a decoder layer, forwards and backwards, and its predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from snugfit.evaluation.divergence import diverge, softmax
from snugfit.machine import Seconds, timed
from snugfit.model import forward_pass
from snugfit.model.forward_pass import Batch


def backward_time(
    layer: nn.Module, index: int, batch: Batch, hidden: Tensor, parameters: Sequence[Tensor] = ()
) -> Seconds:
    """Seconds of a forward and a backward pass: gradients of the layer's input, and of its `parameters`."""

    def backward() -> None:
        with torch.enable_grad():
            wanted = [hidden.detach().requires_grad_(), *parameters]
            output = forward_pass.call_layer(layer, index, batch, wanted[0])
            torch.autograd.grad(output, wanted, torch.ones_like(output))

    return timed(backward, hidden.device, twice=True)


def prediction_time(head: Callable[[Tensor], Tensor], hidden: Tensor) -> Seconds:
    """Seconds of the predictions of `hidden` states [1, n, H], and of their KL, divided by n."""

    @torch.no_grad()
    def predict() -> None:
        one = softmax(head(hidden)[0])
        diverge(one, one)

    return timed(predict, hidden.device, twice=True) * (1 / hidden.shape[1])
