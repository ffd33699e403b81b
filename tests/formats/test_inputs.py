"""One object rounds the inputs of a linear, by kind: few of them on the CPU by the plain definitions."""

from __future__ import annotations

import pytest
import torch

from snugfit.formats import fp8, inputs, mxfp4, nvfp4
from snugfit.formats.inputs import InputRounding


def test_a_few_inputs_are_rounded_by_the_definitions() -> None:
    """No small tensor on the CPU goes to a kernel, and a kind's result is that of its definition."""
    values = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    scale = torch.tensor(0.01)
    expected = {
        InputRounding("nvfp4", scale): nvfp4.quantize_dequantize_input(values, scale),
        InputRounding("mxfp4"): mxfp4.quantize_dequantize_input(values),
        InputRounding("fp8-group", group=64): fp8.quantize_dequantize_input_groups(values, 64),
        InputRounding("fp8-tensor", scale): fp8.quantize_dequantize_input_static(values, scale),
    }
    for rounding, rounded in expected.items():
        assert not rounding.is_fused(values)
        assert torch.equal(rounding(values), rounded)
    assert inputs.kernel_problems() == []


def test_a_static_kind_needs_its_scale() -> None:
    """A kind under a number from the file is not rounded without it."""
    with pytest.raises(AssertionError, match="nvfp4"):
        InputRounding("nvfp4").plain(torch.ones(1, 16))
