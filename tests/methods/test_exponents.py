"""Exponents of MXFP4 blocks: the library's rule, the best of all 255 by brute force, and the ends of the range."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from snugfit.formats import mxfp4
from snugfit.methods.exponents import block_exponents, error

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_blocks(seed: int, spread: float, rows: int = 2000) -> Tensor:
    """fp32 [rows, 32]: sizes spread log-normally inside a block and between blocks."""
    generator = torch.Generator().manual_seed(seed)
    size = (torch.randn(rows, 32, generator=generator) * spread).exp() * torch.randn(rows, 1, generator=generator).exp()
    return torch.randn(rows, 32, generator=generator) * size


def relative_error(weight: Tensor, rule: str) -> float:
    seen = mxfp4.dequantize(mxfp4.quantize(weight, block_exponents(weight, rule)))
    return float((seen - weight.float()).square().sum() / weight.float().square().sum())


@pytest.mark.parametrize("dtype", DTYPES)
def test_absmax_is_the_librarys(dtype: torch.dtype) -> None:
    """The plain exponent of every block equals compressed-tensors', at both sides of each threshold and for zeros."""
    edges = torch.tensor([1.0, 1.5, 1.7421875, 1.75, 1.7578125, 1.9921875])
    powers = 2.0 ** torch.arange(-14, 15)
    blocks = torch.zeros(len(edges) * len(powers) + 1, 32)
    blocks[:-1, 3] = (edges[:, None] * powers).flatten()
    blocks = torch.cat([blocks, random_blocks(0, 1.0)]).to(dtype)
    args = preset_name_to_scheme("MXFP4", ["Linear"]).weights
    theirs, _ = calculate_qparams(blocks.float().amin(-1), blocks.float().amax(-1), args)
    ours = block_exponents(blocks, "absmax").flatten()
    assert torch.equal(2.0 ** (ours.float() - 127), theirs)


@pytest.mark.parametrize("spread", [0.0, 0.5, 1.0, 2.0])
def test_no_exponent_beats_the_sweep(spread: float) -> None:
    """Of all exponents from 2**-20 to 2**20 none has a lower squared error than the sweep's choice, in any block."""
    blocks = random_blocks(1, spread)
    chosen = error(blocks.abs().t(), block_exponents(blocks, "sweep").flatten())
    every = [error(blocks.abs().t(), torch.full((len(blocks),), k, dtype=torch.uint8)) for k in range(107, 148)]
    assert torch.equal(chosen, torch.stack(every).amin(0))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 255), min_size=32, max_size=32), st.integers(-8, 8))
def test_no_exponent_beats_the_sweep_on_blocks_made_up(codes: list[int], power: int) -> None:
    """The same for blocks of few distinct values, where ties and saturated values abound."""
    blocks = torch.tensor([codes]) * 2.0**power / 32
    chosen = error(blocks.t(), block_exponents(blocks, "sweep").flatten())
    assert all(float(error(blocks.t(), torch.tensor([k], dtype=torch.uint8))) >= float(chosen) for k in range(100, 145))


def test_the_sweep_never_loses_and_sometimes_wins() -> None:
    """Against absmax the sweep lowers the error of Gaussian weights by half a percent, of heavy tails by more."""
    gauss = torch.randn(512, 2048, generator=torch.Generator().manual_seed(2))
    assert relative_error(gauss, "sweep") == pytest.approx(0.0125, rel=0.02)
    assert relative_error(gauss, "sweep") < 0.997 * relative_error(gauss, "absmax")
    heavy = random_blocks(3, 0.7)
    assert relative_error(heavy, "sweep") < 0.98 * relative_error(heavy, "absmax")


def test_the_ends_of_the_range() -> None:
    """All-zero and vanishing blocks take the smallest exponent, the largest finite numbers one that holds them."""
    blocks = torch.zeros(5, 32)
    blocks[1, 0], blocks[2, 0], blocks[3, 0], blocks[4, 0] = 2.0**-149, 3e-38, 3.4e38, 1.7e38
    for rule in ("absmax", "sweep"):
        exponents = block_exponents(blocks, rule)
        assert exponents.flatten().tolist()[:2] == [0, 0]
        seen = mxfp4.dequantize(mxfp4.quantize(blocks, exponents))
        assert seen.isfinite().all()
        assert not seen[:2].any()
        assert torch.allclose(seen[2:, 0], blocks[2:, 0], rtol=0.26)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", ["absmax", "sweep"])
def test_shape_and_argument(dtype: torch.dtype, rule: str) -> None:
    """One exponent for 32 columns of each row, more blocks than are handled at once, the weight left as it was."""
    weight = random_blocks(4, 1.0, rows=6000).view(1000, 192).to(dtype)
    before = weight.clone()
    found = block_exponents(weight, rule)
    assert (found.dtype, tuple(found.shape)) == (torch.uint8, (1000, 6))
    assert torch.equal(weight, before)
    assert torch.equal(found[40:41], block_exponents(weight[40:41], rule))


def weighted_error(weight: Tensor, exponents: Tensor, importance: Tensor) -> Tensor:
    """sum(h d^2) of each block in fp64, of what files hold."""
    error = (mxfp4.dequantize(mxfp4.quantize(weight, exponents)) - weight).double()
    return (error.square() * importance.double()).view(len(weight), -1, 32).sum(-1)


@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0])
def test_weighted_is_the_best_of_all_exponents(spread: float) -> None:
    """Under importance no exponent above beats the choice, and those below so seldom that the whole is within 1 %."""
    weight = random_blocks(5, 1.0, rows=400).view(100, 128)
    importance = (torch.randn(128, generator=torch.Generator().manual_seed(6)) * spread).exp()
    plain = block_exponents(weight, "absmax")
    chosen = weighted_error(weight, block_exponents(weight, "weighted", importance), importance)
    every = {o: weighted_error(weight, (plain.int() + o).to(torch.uint8), importance) for o in range(-6, 5)}
    slack = 1e-6 * every[0]
    assert all((chosen <= every[offset] + slack).all() for offset in range(-3, 5))
    assert chosen.sum() <= 1.01 * torch.stack(list(every.values())).amin(0).sum()
    swept = weighted_error(weight, block_exponents(weight, "sweep"), importance)
    assert chosen.sum() < swept.sum()


def test_weighted_without_importance_is_the_sweep() -> None:
    """All features alike, two or three powers of two below the plain one never win; zero importance means alike."""
    weight = random_blocks(7, 1.5)
    sweep = block_exponents(weight, "sweep")
    assert torch.equal(block_exponents(weight, "weighted"), sweep)
    assert torch.equal(block_exponents(weight, "weighted", torch.zeros(32)), sweep)
