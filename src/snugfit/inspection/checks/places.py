"""Weights that are stored as codes where engines build 16 bits alone; the output head; layers of prediction."""

from __future__ import annotations

from collections.abc import Iterator

from snugfit.engines.fused import GATES
from snugfit.engines.releases import EMBEDDING_FORMATS, PREDICTION_PLAIN, ROUTERS_READ
from snugfit.inspection.evidence import Evidence, finding
from snugfit.model.anatomy import is_prediction_head
from snugfit.model.config_defaults import PREDICTION_KEYS
from snugfit.model.logical_weights import model_types
from snugfit.records.doctor import Finding


def plain_places(evidence: Evidence) -> Iterator[Finding]:
    """Routers, indexers, convolutions and other linears that engines build without a quantization config."""
    found, routers, what = [], [], ""
    for name, module in evidence.modules.items():
        if not module.stored or not evidence.is_in_layers(module):
            continue
        reason = evidence.unquantized.get(name, "")
        if reason:
            found.append(name)
            what = what or f"it is {module.packed.label}, and {reason}."
        elif module.parsed.role == "router" and name.rpartition(".")[2] not in GATES:
            routers.append(name)
    yield from finding("unquantized-by-engine", found, what, evidence.affected())
    read = not ROUTERS_READ.isdisjoint(model_types(evidence.checkpoint.config))
    readers = [release for release in evidence.engines if not (read and release.name.startswith("vllm"))]
    what = "engines build the routers of this family in 16 bits."
    yield from finding("unquantized-by-engine", routers, what, evidence.affected(readers))


def embeddings(evidence: Evidence) -> Iterator[Finding]:
    """Embeddings stored as codes that engines do not load."""
    found, what = [], ""
    for name, module in evidence.modules.items():
        if not module.stored or module.parsed.role != "embed":
            continue
        fmt = module.asked
        if fmt is None or fmt.name not in EMBEDDING_FORMATS or fmt.input_kind != "none" or fmt.group_size == 0:
            found.append(name)
            label = module.packed.label if fmt is None else fmt.label()
            what = f"the embeddings are {label}; vLLM loads integers under one scale a group or row, weight-only."
    yield from finding("embeddings-quantized", found, what, evidence.affected())


def output_head(evidence: Evidence) -> Iterator[Finding]:
    """A head of its own in a file whose config ties it to the embeddings."""
    head = evidence.layout.tied.own_head
    readers = [release for release in evidence.engines if release.drops_own_head]
    what = f"config.json ties the output head to the embeddings, and {head} differs from them: these releases drop it."
    yield from finding("head-differs", [head] * bool(head), what, evidence.affected(readers))


def prediction(evidence: Evidence) -> Iterator[Finding]:
    """Layers of multi-token prediction: stated and missing, or quantized where engines build 16 bits."""
    layout = evidence.layout
    behind = [
        name
        for name, parsed in layout.names.items()
        if is_prediction_head(name) or (parsed.layer is not None and parsed.layer >= layout.num_layers)
    ]
    stated = next((key for key in PREDICTION_KEYS if _count(layout.config.get(key))), None)
    if stated is not None and not behind:
        what = f"{stated} is {layout.config[stated]}, and the file has no such layer: speculative decoding fails."
        yield from finding("prediction-lost", [f"config.json: {stated}"], what, evidence.affected())
    found = [
        name
        for name, module in evidence.modules.items()
        if module.stored and not evidence.is_in_layers(module) and name.rpartition(".")[2] in PREDICTION_PLAIN
    ]
    what = "engines build it without a quantization config: its codes cannot be loaded."
    yield from finding("prediction-quantized", found, what, evidence.affected())


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
