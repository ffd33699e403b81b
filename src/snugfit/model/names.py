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

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True)
class TensorName:
    """A checkpoint name taken apart. `layer` is None outside the decoder layers."""

    full: str
    module: str
    parameter: str
    layer: int | None
    role: str


def parse_name(name: str, shape: tuple[int, ...]) -> TensorName:
    """The parts of a checkpoint name; the role of an unknown 2-D layer weight is `linear`, of anything else `other`."""
    module, _, parameter = name.rpartition(".")
    match = _LAYER.search(name)
    layer = int(match.group(1)) if match else None
    leaf = module.rpartition(".")[2]
    return TensorName(name, module, parameter, layer, _role(leaf, parameter, layer, len(shape)))


def _role(leaf: str, parameter: str, layer: int | None, dimensions: int) -> str:
    if "norm" in leaf:
        return "norm"
    if parameter != "weight":
        return "other"
    if leaf in ROLES:
        return ROLES[leaf]
    if leaf in ("gate", "router"):
        return "router"
    return LINEAR if layer is not None and dimensions == 2 else "other"
