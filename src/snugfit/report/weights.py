"""The tensors of a quantize record by component and by layer: formats, bits and errors, and why the bytes are there."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from snugfit.model.names import ROLE_SETS, ROLES, parse_name, role_order
from snugfit.records.quantize import KV_CACHE, QuantizeRecord, TensorRecord

_NUMBERED = re.compile(r"^(.+?)\.\d{1,9}\.")
_EXPERT = re.compile(r"\bexperts\.\d+\.")
_COMPONENTS = {
    **dict.fromkeys(("q", "k", "v", "o", "qkv", "attention"), "attention"),
    **dict.fromkeys(("gate", "up", "down", "gate_up", "mlp"), "MLP"),
    "lm_head": "lm_head",
    "embed": "embeddings",
    "norm": "norms",
    "router": "routers",
    "linear": "other linears",
}
ORDER = (
    *("attention", "MLP", "routed experts", "shared experts", "other linears", "lm_head", "embeddings", "routers"),
    *("norms", "KV cache", "other tensors"),
)
LINEARS = ("attention", "MLP", "routed experts", "shared experts", "other linears")


@dataclass(frozen=True, kw_only=True)
class Component:
    """Tensors of one component in one format: the names of their projections, numbers of layers (if not all), sums.

    `share` is their part of the weights of all linears of decoder layers, None outside; `relative_error` the mean over
    their weights, None where nothing was measured.
    """

    name: str
    format: str
    scale_rules: tuple[str, ...]
    projections: tuple[str, ...]
    layers: tuple[int, ...]
    all_layers: bool
    tensors: int
    weights: int
    bytes: int
    source_bytes: int
    share: float | None
    relative_error: float | None

    @property
    def bits(self) -> float:
        """Bits on disk a weight, scales included."""
        return 8 * self.bytes / max(1, self.weights)


@dataclass(frozen=True, kw_only=True)
class LayerWeight:
    """One projection of one layer (all experts of the layer together): format, bits a weight, relative error."""

    layer: int
    projection: str
    format: str
    weights: int
    bits: float
    relative_error: float | None
    input_amax: float | None


def decoder_of(names: Iterable[str]) -> str:
    """The name of the list of decoder layers: the numbered prefix with most tensors."""
    counts = Counter(match[1] for name in names if (match := _NUMBERED.match(name)))
    return counts.most_common(1)[0][0] if counts else "model.layers"


def components_of(record: QuantizeRecord) -> list[Component]:
    """What is stored how: one row for each component and format, linears first."""
    decoder = decoder_of(tensor.name for tensor in record.tensors)
    groups: dict[tuple[str, str], list[tuple[TensorRecord, int | None, str]]] = {}
    for tensor in record.tensors:
        name, layer, projection = _placed(tensor, decoder)
        groups.setdefault((name, tensor.format), []).append((tensor, layer, projection))
    layers = {layer for members in groups.values() for _, layer, _ in members if layer is not None}
    linear = sum(_weights(t) for (name, _), members in groups.items() if name in LINEARS for t, _, _ in members)
    found = [_component(name, fmt, members, layers, linear) for (name, fmt), members in groups.items()]
    return sorted(found, key=lambda one: (ORDER.index(one.name), one.bits))


def _placed(tensor: TensorRecord, decoder: str) -> tuple[str, int | None, str]:
    """Component, layer and projection of a tensor."""
    parsed = parse_name(tensor.name, tensor.shape, decoder)
    name = _COMPONENTS.get(parsed.role, "other tensors")
    if tensor.format == KV_CACHE:
        name = "KV cache"
    elif name == "MLP" and parsed.routed:
        name = "routed experts"
    elif name == "MLP" and parsed.shared:
        name = "shared experts"
    leaf = parsed.module.rpartition(".")[2] if parsed.parameter in ("weight", "bias") else parsed.parameter
    return name, parsed.layer, leaf


def _component(
    name: str,
    fmt: str,
    members: Sequence[tuple[TensorRecord, int | None, str]],
    layers: set[int],
    linear: int,
) -> Component:
    tensors = [tensor for tensor, _, _ in members]
    weights = sum(map(_weights, tensors))
    own = sorted({layer for _, layer, _ in members if layer is not None})
    return Component(
        name=name,
        format=fmt,
        scale_rules=tuple(dict.fromkeys(t.scale_rule for t in tensors if t.scale_rule)),
        projections=tuple(sorted({projection for _, _, projection in members}, key=_order)),
        layers=tuple(own),
        all_layers=set(own) == layers,
        tensors=len(tensors),
        weights=weights,
        bytes=sum(t.bytes for t in tensors),
        source_bytes=sum(t.source_bytes for t in tensors),
        share=weights / linear if name in LINEARS and linear else None,
        relative_error=_mean_error(tensors),
    )


def _weights(tensor: TensorRecord) -> int:
    return math.prod(tensor.shape)


def _mean_error(tensors: Sequence[TensorRecord]) -> float | None:
    known = [(t.relative_error, _weights(t)) for t in tensors if t.relative_error is not None]
    total = sum(weights for _, weights in known)
    return math.fsum(error * weights for error, weights in known) / total if total else None


def layers_of(record: QuantizeRecord) -> list[LayerWeight]:
    """Every linear of the decoder layers by layer and projection, experts of a layer together."""
    decoder = decoder_of(tensor.name for tensor in record.tensors)
    groups: dict[tuple[int, str], list[TensorRecord]] = {}
    for tensor in record.tensors:
        name, layer, _ = _placed(tensor, decoder)
        if layer is None or name not in LINEARS:
            continue
        inside = tensor.name.removeprefix(f"{decoder}.{layer}.").removesuffix(".weight")
        projection = _EXPERT.sub("experts.", inside)
        projection = projection.rpartition(".")[2] if "expert" not in projection else _short(projection)
        groups.setdefault((layer, projection), []).append(tensor)
    return [
        LayerWeight(
            layer=layer,
            projection=projection,
            format=", ".join(dict.fromkeys(tensor.format for tensor in tensors)),
            weights=sum(map(_weights, tensors)),
            bits=8 * sum(t.bytes for t in tensors) / max(1, sum(map(_weights, tensors))),
            relative_error=_mean_error(tensors),
            input_amax=max((t.input_amax for t in tensors if t.input_amax is not None), default=None),
        )
        for (layer, projection), tensors in sorted(groups.items(), key=lambda item: (item[0][0], _order(item[0][1])))
    ]


def _order(projection: str) -> tuple[bool, int, str]:
    """Sort key of projections: attention before MLP, each in the order of its computation."""
    leaf = projection.rpartition(".")[2]
    return ROLES.get(leaf, "") in ROLE_SETS["mlp"], role_order(leaf), projection


def _short(name: str) -> str:
    """The last two parts of a name: experts.gate_proj."""
    return ".".join(name.split(".")[-2:])


def spans(numbers: Sequence[int]) -> str:
    """Numbers in order as ranges: 0-2, 5, 8-9."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)
