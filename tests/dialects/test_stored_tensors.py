"""Tensors as written: names, dtypes, shapes and bytes are those announced, and reading them back changes nothing."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from helpers.rounding import bytes_for, round_group
from snugfit.dialects.compressed_tensors import INPUT_SCALE, decode, encode, layout
from snugfit.formats import nvfp4
from snugfit.formats.quantized_weight import dequantize
from snugfit.formats.spec import FORMATS, INT4_GROUPS, TensorFormat

INT4 = [TensorFormat("int4", group, symmetric) for group in INT4_GROUPS for symmetric in (True, False)]
NAMES = ("nvfp4", "nvfp4a16", "fp8-dynamic", "fp8-block", "mxfp4")
EVERY_FORMAT = [*map(TensorFormat, NAMES), *INT4]
every_format = pytest.mark.parametrize("fmt", EVERY_FORMAT, ids=TensorFormat.label)
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# safetensors' names
BYTES = {"U8": 1, "F8_E4M3": 1, "BF16": 2, "F16": 2, "F32": 4, "I32": 4, "I64": 8}


def some_weight(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) * 0.05).to(dtype)


def encoded(fmt: TensorFormat, weight: Tensor) -> dict[str, Tensor]:
    """A weight's tensors on disk, with an activation scale where the format has one."""
    quantized = round_group({"weight": weight}, fmt, "absmax", "mse")["weight"]
    return encode(quantized, nvfp4.input_global_scale(2.5) if fmt.spec.calibrated else None)


def header(parts: dict[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) as a safetensors file of those tensors says."""
    data = save(parts)
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    return {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items() if name != "__metadata__"}


@every_format
@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 20_000), blocks=st.integers(1, 500), dtype=st.sampled_from(sorted(DTYPES)))
def test_bytes_are_those_of_the_layout(fmt: TensorFormat, rows: int, blocks: int, dtype: str) -> None:
    """The layout has as many bytes as the format's formula, and four more for an activation scale."""
    shape = (rows, blocks * 128)
    parts = layout(fmt, shape, dtype)
    total = sum(BYTES[kind] * math.prod(sides) for kind, sides in parts.values())
    assert total == bytes_for(fmt, shape, BYTES[dtype]) + (4 if fmt.name == "nvfp4" else 0)
    assert (INPUT_SCALE in parts) == fmt.spec.calibrated


@every_format
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 128), (8, 128), (13, 384), (50, 256)])
def test_written_tensors_are_those_of_the_layout(fmt: TensorFormat, dtype: str, shape: tuple[int, int]) -> None:
    """A safetensors file of encode()'s tensors has exactly the names, dtypes and shapes of layout()."""
    parts = encoded(fmt, some_weight(*shape, dtype=DTYPES[dtype]))
    assert header(parts) == layout(fmt, shape, dtype)
    assert all(part.is_contiguous() for part in parts.values())


@pytest.mark.parametrize(
    ("fmt", "columns"),
    [
        (TensorFormat("nvfp4"), 48),
        (TensorFormat("mxfp4"), 96),
        (TensorFormat("fp8-dynamic"), 37),
        (TensorFormat("int4", 32), 96),
    ],
    ids=lambda given: given.label() if isinstance(given, TensorFormat) else str(given),
)
def test_columns_need_no_more_than_the_format_asks(fmt: TensorFormat, columns: int) -> None:
    """The smallest multiple that a format allows is written as announced, odd columns in FP8 among them."""
    weight = some_weight(5, columns)
    parts = encoded(fmt, weight)
    assert header(parts) == layout(fmt, (5, columns), "BF16")
    assert dequantize(decode(fmt, parts)[0]).shape == weight.shape


@every_format
@pytest.mark.parametrize("rows", [1, 8, 13])
def test_reading_back_changes_nothing(fmt: TensorFormat, rows: int) -> None:
    """Decoding encoded tensors gives the same weight and activation scale, bit for bit."""
    weight = some_weight(rows, 256, seed=rows)
    quantized = round_group({"weight": weight}, fmt, "absmax", "mse")["weight"]
    scale = nvfp4.input_global_scale(2.5) if fmt.spec.calibrated else None
    read, input_scale = decode(fmt, encode(quantized, scale))
    assert type(read) is type(quantized)
    assert torch.equal(dequantize(read), dequantize(quantized))
    assert (input_scale is None) == (scale is None)
    if scale is not None and input_scale is not None:
        assert torch.equal(input_scale, scale)
    again, first = encode(read, input_scale), encode(quantized, scale)
    assert {name: part.view(torch.uint8).tolist() for name, part in again.items()} == {
        name: part.view(torch.uint8).tolist() for name, part in first.items()
    }


@pytest.mark.parametrize("amax", [1e-30, 3e-5, 1.0, 0.7, 448.0, 6e4, 1e30])
def test_divisors_are_6_times_448_over_amax(amax: float) -> None:
    """Global scales stand in the file as divisors, 6 * 448 / amax, and read back as the multiplier that was meant."""
    weight = torch.full((2, 16), amax)
    quantized = round_group({"weight": weight}, TensorFormat("nvfp4"), "absmax", "mse")["weight"]
    parts = encode(quantized, nvfp4.input_global_scale(amax))
    for name in ("weight_global_scale", INPUT_SCALE):
        assert parts[name].shape == (1,)
        assert float(parts[name]) == pytest.approx(6 * 448 / amax, rel=2e-7)
    read, input_scale = decode(TensorFormat("nvfp4"), parts)
    assert isinstance(read, nvfp4.NVFP4Weight)
    assert isinstance(quantized, nvfp4.NVFP4Weight)
    assert torch.equal(read.global_scale, quantized.global_scale)
    assert input_scale is not None
    assert torch.equal(input_scale, nvfp4.input_global_scale(amax))


def test_weight_only_nvfp4_has_no_activation_scale() -> None:
    """NVFP4A16 neither announces, nor writes, nor reads an input_global_scale."""
    fmt = TensorFormat("nvfp4a16")
    parts = encoded(fmt, some_weight(4, 32))
    assert INPUT_SCALE not in layout(fmt, (4, 32), "BF16")
    assert INPUT_SCALE not in parts
    assert decode(fmt, parts)[1] is None


def test_every_format_of_the_table_is_covered() -> None:
    """The cases of this file name every format there is."""
    assert {fmt.name for fmt in EVERY_FORMAT} == set(FORMATS)
