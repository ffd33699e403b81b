"""The Triton kernels that round inputs give the plain definitions' bits: ties, zeros, subnormals, NaN, infinities."""

from __future__ import annotations

import pytest
import torch

from helpers.input_cases import CASES, DTYPES, activations, same
from snugfit.engines.profiles import PROFILES
from snugfit.formats import inputs
from snugfit.formats.inputs import InputRounding
from snugfit.formats.spec import InputKind
from snugfit.model import emulate

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [64, 96, 480, 3008, 8960, 20000])
def test_kernels_give_the_bits_of_the_definition(cuda: torch.device, features: int, dtype: torch.dtype) -> None:
    """Every kind, in every dtype and odd sizes, is what the definition gives on the CPU, and on CUDA if finite."""
    from snugfit.formats import input_kernels  # needs Triton

    different = []
    for kind, scale, group in CASES:
        given = None if scale is None else torch.tensor(scale if len(scale) > 1 else scale[0])
        rounding = InputRounding(kind, given, group)
        on_gpu = InputRounding(kind, None if given is None else given.to(cuda), group)
        for name, values in activations(features, dtype):
            if not input_kernels.fits(kind, values, group):
                assert features % 16
                continue
            expected = rounding.plain(values.clone())
            static = None if given is None else given.to(cuda).view(-1)
            found = input_kernels.round_inputs(kind, values.to(cuda), static, group)
            if not same(expected, found):
                different.append((kind, scale, group, name, "CPU"))
            if values.isfinite().all() and not same(expected, on_gpu.plain(values.to(cuda))):
                different.append((kind, scale, group, name, "the definition on CUDA"))
    assert not different


@pytest.mark.parametrize("kind", sorted({kind for profile in PROFILES.values() for kind in profile.values()}))
def test_every_kind_is_fused(cuda: torch.device, kind: InputKind) -> None:
    """Each kind of every profile is rounded by its kernel here, in the shape and dtype of its input, of any strides."""
    scale = torch.tensor([0.05, 3.0]) if kind == "int8-tensor-asym" else torch.tensor(0.05)
    rounding = InputRounding(kind, scale.to(cuda) if kind in inputs.STATIC_KINDS else None)
    values = torch.randn(3, 5, 512, device=cuda).to(torch.bfloat16)
    assert rounding.is_fused(values), inputs.kernel_problems()
    for view in (values, values.transpose(0, 1), values[..., ::2], values[1:]):
        found = emulate._in_slices(rounding, view)
        assert found.shape == view.shape
        assert found.dtype == view.dtype
        assert same(rounding.plain(view).cpu(), found)
    assert not inputs.kernel_problems()


def test_tensors_of_other_shapes_are_left_to_the_definition(cuda: torch.device) -> None:
    """No tokens, float64 and blocks that do not divide take the plain path, with its results and errors."""
    token = InputRounding("fp8-token")
    assert token(torch.empty(0, 64, device=cuda)).shape == (0, 64)
    wide = torch.randn(3, 64, dtype=torch.float64, device=cuda)
    assert torch.equal(token(wide), token.plain(wide))
    with pytest.raises(RuntimeError):
        InputRounding("mxfp4")(torch.ones(3, 40, device=cuda))


def test_many_tokens(cuda: torch.device) -> None:
    """A tensor of more than 2**31 values, where GPUs have the memory, is rounded to its end."""
    tokens = (1 << 31) // 8192 + 8
    if torch.cuda.mem_get_info(cuda)[0] < 3 * tokens * 8192 * 2:
        pytest.skip("not enough memory")
    values = torch.zeros(tokens, 8192, dtype=torch.bfloat16, device=cuda)
    values[-8:] = torch.randn(8, 8192)
    for kind in ("nvfp4", "fp8-token"):
        rounding = InputRounding(kind, torch.tensor(0.01, device=cuda) if kind == "nvfp4" else None)
        found = rounding(values)
        assert same(rounding.plain(values[-8:]).cpu(), found[-8:])
        del found
