"""Inputs rounded on the way into a linear, and keys and values of an FP8 cache, let gradients pass."""

from __future__ import annotations

import torch
from torch import nn

from snugfit.formats.inputs import InputRounding
from snugfit.model import emulate


def test_a_rounded_input_passes_its_gradient() -> None:
    """The output is that of the rounded input, bit for bit; the gradient is the weight's, as without rounding."""
    torch.manual_seed(0)
    linear = nn.Linear(32, 16, bias=False).requires_grad_(requires_grad=False)
    layer = nn.Sequential(linear)
    rounding = InputRounding("nvfp4", torch.tensor(0.01))
    inputs = torch.randn(4, 32)
    exact = layer(rounding(inputs))
    emulate.quantize_inputs(layer, {"0": rounding})
    leaf = inputs.clone().requires_grad_()
    output = layer(leaf)
    assert torch.equal(output, exact)
    output.sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, linear.weight.sum(0).expand(4, 32))
    assert not layer(inputs).requires_grad


def test_a_rounded_cache_passes_its_gradient() -> None:
    """Keys and values come rounded out of an FP8 cache, their gradients as they went in."""
    cache = emulate.fp8_cache(torch.tensor(0.02), torch.tensor(0.03))
    keys, values = (torch.randn(1, 2, 4, 8, requires_grad=True) for _ in range(2))
    rounded = cache.update(keys.detach(), values.detach())
    found = cache.update(keys, values)
    assert all(torch.equal(a, b) for a, b in zip(rounded, found, strict=True))
    (found[0].sum() + 2 * found[1].sum()).backward()
    assert keys.grad is not None
    assert values.grad is not None
    assert (keys.grad == 1).all()
    assert (values.grad == 2).all()
