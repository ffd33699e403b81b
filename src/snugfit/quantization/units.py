"""The tensors of a model unit by unit: all outside the decoder layers, then each layer's. No torch."""

from __future__ import annotations

from collections.abc import Mapping

from snugfit.model.layout import ModelLayout
from snugfit.model.logical_weights import LogicalWeights
from snugfit.model.names import TensorName, parse_name


def names_of(layout: ModelLayout, weights: LogicalWeights) -> dict[str, TensorName]:
    """The parsed name of each of `weights`, which may be restacked ones of the layout."""
    return {
        name: layout.names[name] if name in layout.names else parse_name(name, info.shape, layout.decoder)
        for name, info in weights.tensors.items()
    }


def units_of(layout: ModelLayout, names: Mapping[str, TensorName]) -> tuple[tuple[str, ...], ...]:
    """Names of the tensors outside the decoder layers, then of each layer."""
    units: list[list[str]] = [[] for _ in range(layout.num_layers + 1)]
    for name, parsed in names.items():
        inside = parsed.layer is not None and parsed.layer < layout.num_layers and name not in layout.not_quantizable
        units[parsed.layer + 1 if inside and parsed.layer is not None else 0].append(name)
    return tuple(tuple(unit) for unit in units)
