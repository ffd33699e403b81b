"""Checkpoint names: which layer a tensor belongs to, and which role it plays. Families are data, not code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

# last part of a module's name -> role
ROLES: Mapping[str, str] = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "qkv_proj": "qkv",
    "gate_proj": "gate",
    "up_proj": "up",
    "gate_up_proj": "gate_up",
    "down_proj": "down",
    "lm_head": "lm_head",
    "embed_tokens": "embed",
}

# a rule may name a set of roles
ROLE_SETS: Mapping[str, frozenset[str]] = {
    "attention": frozenset({"q", "k", "v", "o", "qkv"}),
    "mlp": frozenset({"gate", "up", "gate_up", "down"}),
}
LINEAR = "linear"  # any weight matrix of a decoder layer
KEPT_ROLES = frozenset({"lm_head", "embed", "norm", "router", "other"})

# last part of the parent's name -> role of a linear whose own name says nothing
_PARENT_ROLES: Mapping[str, str] = {
    "self_attn": "attention",
    "attn": "attention",
    "attention": "attention",
    "linear_attn": "attention",
    "mlp": "mlp",
}
DECODER = "model.layers"


@dataclass(frozen=True)
class TensorName:
    """A checkpoint name taken apart. `layer` is None outside the decoder layers."""

    full: str
    module: str
    parameter: str
    layer: int | None
    role: str


def parse_name(name: str, shape: tuple[int, ...], decoder: str = DECODER) -> TensorName:
    """The parts of a checkpoint name; `decoder` is the name of the list of decoder layers.

    Layers of other stacks (towers, multi-token-prediction heads) are none, their weights `other`. A 2-D weight of a
    decoder layer whose name says nothing is `attention` or `mlp` by its parent, else `linear`.
    """
    module, _, parameter = name.rpartition(".")
    match = re.match(re.escape(decoder) + r"\.(\d+)\.", name)
    layer = int(match.group(1)) if match else None
    return TensorName(name, module, parameter, layer, _role(module, parameter, layer, len(shape)))


def _role(module: str, parameter: str, layer: int | None, dimensions: int) -> str:
    parent, _, leaf = module.rpartition(".")
    if "norm" in leaf:
        return "norm"
    if parameter != "weight":
        return "other"
    if layer is None:
        return ROLES[leaf] if leaf in ("lm_head", "embed_tokens") else "other"
    if leaf in ("gate", "router"):
        return "router"
    if leaf in ROLES:
        return ROLES[leaf]
    return _PARENT_ROLES.get(parent.rpartition(".")[2], LINEAR) if dimensions == 2 else "other"
