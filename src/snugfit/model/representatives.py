"""A layout in which one expert stands for all that are alike: a mixture of 671 billion weights in seconds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from snugfit.model.layout import ModelLayout
from snugfit.model.logical_weights import LogicalWeights
from snugfit.model.names import parse_name
from snugfit.storage.safetensors_header import TensorInfo

_EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class Representative:
    """A tensor of the file that stands for `count` alike: of experts that are alike, the first one's."""

    info: TensorInfo
    count: int = 1


def representatives(layout: ModelLayout) -> tuple[ModelLayout, dict[str, int]]:
    """The layout with one of the experts that are alike, and the number of tensors that each remaining one stands for.

    Experts are alike if their tensors in the file have the same names, dtypes and shapes.
    """
    counts = {one.info.name: one.count for one in collapse_experts(layout.checkpoint.tensors.values())}
    tensors = {name: layout.checkpoint.tensors[name] for name in counts}
    checkpoint = replace(layout.checkpoint, tensors=tensors)
    weights, stacked_counts = _first_experts(replace(layout.weights, checkpoint=checkpoint))
    kept = {n: info for n, info in weights.tensors.items() if all(part in tensors for part in weights.parts(n))}
    origins = {name: origin for name, origin in weights.origins.items() if name in kept}
    weights = replace(weights, tensors=kept, origins=origins)
    names = {
        name: layout.names[name] if name in layout.names else parse_name(name, info.shape, layout.decoder)
        for name, info in kept.items()
    }
    return replace(layout, checkpoint=checkpoint, weights=weights, names=names), counts | stacked_counts


def _first_experts(weights: LogicalWeights) -> tuple[LogicalWeights, dict[str, int]]:
    """The weights with the first expert of each 3-D tensor for all of them, and the number that each stands for."""
    counts: dict[str, int] = {}
    stacked: dict[str, tuple[str, ...]] = {}
    others: set[str] = set()
    for stack, names in weights.stacked.items():
        parts = {name: weights.origins[name].part for name in names}
        first = tuple(name for name, part in parts.items() if part is not None and part.expert == 0)
        stacked[stack] = first
        counts |= dict.fromkeys(first, len(names) // len(first))
        others.update(names[len(first) :])
    tensors = {name: info for name, info in weights.tensors.items() if name not in others}
    origins = {name: origin for name, origin in weights.origins.items() if name not in others}
    return replace(weights, tensors=tensors, origins=origins, stacked=stacked), counts


def collapse_experts(tensors: Iterable[TensorInfo]) -> list[Representative]:
    """The tensors in their order, but of a layer's experts that are alike in all of theirs only the first's."""
    given = [(tensor, _EXPERT.search(tensor.name)) for tensor in tensors]
    headers: dict[tuple[str, str], list[tuple[str, str, tuple[int, ...]]]] = {}
    for tensor, found in given:
        if found:
            rest = tensor.name[found.end() :], tensor.dtype, tensor.shape
            headers.setdefault(_owner(tensor, found), []).append(rest)
    alike: dict[object, list[tuple[str, str]]] = {}
    for owner, rests in headers.items():
        alike.setdefault((owner[0], tuple(sorted(rests))), []).append(owner)
    counts: Mapping[tuple[str, str], int] = {owners[0]: len(owners) for owners in alike.values()}
    chosen = [(tensor, counts.get(_owner(tensor, found)) if found else 1) for tensor, found in given]
    return [Representative(tensor, count) for tensor, count in chosen if count is not None]


def _owner(tensor: TensorInfo, found: re.Match[str]) -> tuple[str, str]:
    """The experts' module and the number of the expert that a tensor belongs to."""
    return tensor.name[: found.start()], found[1]
