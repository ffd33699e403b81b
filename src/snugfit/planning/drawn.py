"""Tokens drawn from a model's own predictions and the gradient of their loss: its covariance is the curvature of KL."""

from __future__ import annotations

import torch
from torch import Tensor

from snugfit.model.forward_pass import Head


def loss_gradient(head: Head, hidden: Tensor, seed: int, row: int, start: int) -> Tensor:
    """The gradient of the summed loss of some tokens at their hidden states [n, H]; see `draw`."""
    with torch.enable_grad():
        part = hidden.detach().clone().requires_grad_()
        predicted = head(part.unsqueeze(0))[0].float().log_softmax(-1)
        loss = -predicted.gather(-1, draw(predicted.detach(), seed, row, start)).sum()
        (gradient,) = torch.autograd.grad(loss, part)
    return gradient.float()


def draw(predicted: Tensor, seed: int, row: int, start: int) -> Tensor:
    """Token ids [n, 1] drawn from log probabilities [n, V]: the same for the same seed, row and first token."""
    generator = torch.Generator().manual_seed(hash((seed, row, start)) & 0x7FFFFFFF)
    drawn = torch.rand(len(predicted), 1, generator=generator).to(predicted.device)
    ends = predicted.exp().cumsum(-1)
    return torch.searchsorted(ends, drawn * ends[:, -1:]).clamp_(max=ends.shape[1] - 1)
