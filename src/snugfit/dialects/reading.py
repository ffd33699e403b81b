"""Functions that open a dialect anew for each call."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from snugfit.dialects.dialect import open_dialect
from snugfit.dialects.dialect import read_quant_config as read_quant_config  # noqa: PLC0414
from snugfit.dialects.headers import Headers
from snugfit.formats.spec import TensorFormat

if TYPE_CHECKING:
    from torch import Tensor

    from snugfit.formats.quantized_weight import QuantizedWeight


def read_formats(
    config: Mapping[str, Any],
    linears: Iterable[str],
    tensors: Headers,
    hf_quant_config: Mapping[str, Any] | None = None,
) -> dict[str, TensorFormat]:
    """As Dialect.read_formats."""
    return open_dialect(config, hf_quant_config).read_formats(linears, tensors)


def kv_cache_format(
    config: Mapping[str, Any], hf_quant_config: Mapping[str, Any] | None = None
) -> Literal["fp8"] | None:
    """As Dialect.kv_cache_format."""
    return open_dialect(config, hf_quant_config).kv_cache_format()


def part_names(config: Mapping[str, Any], module: str, fmt: TensorFormat, tensors: Container[str]) -> dict[str, str]:
    """As Dialect.part_names."""
    return open_dialect(config, {}).part_names(module, fmt, tensors)


def decode(
    config: Mapping[str, Any], module: str, fmt: TensorFormat, parts: Mapping[str, Tensor]
) -> tuple[QuantizedWeight, Tensor | None]:
    """As Dialect.decode."""
    return open_dialect(config, {}).decode(module, fmt, parts)


def fused_global_scale(config: Mapping[str, Any], scales: Sequence[Tensor]) -> Tensor:
    """As Dialect.fused_global_scale."""
    return open_dialect(config, {}).fused_global_scale(scales)
