"""Numba's machine code that rounds inputs gives the plain definitions' bits: ties, zeros, subnormals, NaN."""

from __future__ import annotations

import sys

import pytest
import torch

from helpers.input_cases import CASES, DTYPES, activations, same
from snugfit.formats import input_cpu_kernels, inputs
from snugfit.formats.inputs import InputRounding
from snugfit.formats.spec import InputKind


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [64, 96, 480, 3008])
def test_machine_code_gives_the_bits_of_the_definition(features: int, dtype: torch.dtype) -> None:
    """Every kind that has machine code, in every dtype and odd sizes, is what the definition gives."""
    different, seen = [], set()
    for kind, scale, group in CASES:
        given = None if scale is None else torch.tensor(scale if len(scale) > 1 else scale[0])
        for name, values in activations(features, dtype):
            if not input_cpu_kernels.fits(kind, values):
                continue
            seen.add(kind)
            found = input_cpu_kernels.round_inputs(kind, values, given, group)
            if not same(InputRounding(kind, given, group).plain(values.clone()), found):
                different.append((kind, scale, group, name))
    assert not different
    assert seen == input_cpu_kernels.KINDS


@pytest.mark.parametrize("kind", ["nvfp4", "fp8-token", "fp8-group"])
def test_large_tensors_are_rounded_by_machine_code(kind: InputKind) -> None:
    """A tensor on the CPU that is worth it goes to machine code, of any strides, and itself stays."""
    rounding = InputRounding(kind, torch.tensor(0.05) if kind == "nvfp4" else None)
    values = torch.randn(16, 24, 512, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    before = values.clone()
    for view in (values, values.transpose(0, 1), values[..., ::2], values[1:]):
        assert rounding.is_fused(view)
        found = rounding(view)
        assert (found.shape, found.dtype) == (view.shape, view.dtype)
        assert same(rounding.plain(view.contiguous()), found.contiguous())
    assert same(values, before)


def test_other_tensors_are_left_to_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors, float64, integers' kinds, and all of them where numba is missing take the plain path."""
    large = torch.ones(1 << 10, 64, dtype=torch.bfloat16)
    token = InputRounding("fp8-token")
    assert token.is_fused(large)
    assert not token.is_fused(large[:2])
    assert not token.is_fused(large.double())
    assert not InputRounding("int8-token").is_fused(large)
    assert not InputRounding("mxfp4").is_fused(torch.ones(1 << 13, 40))
    monkeypatch.delattr("snugfit.formats.input_cpu_kernels")
    monkeypatch.setitem(sys.modules, "snugfit.formats.input_cpu_kernels", None)
    assert not token.is_fused(large)
    assert torch.equal(token(large), token.plain(large))
    assert inputs.kernel_problems() == []
