"""Checkpoint names: which layer a tensor belongs to, and which role it plays. Families are data, not code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from snugfit.engines.fused import GATES

# last part of a module's name -> role
ROLES: Mapping[str, str] = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "qkv_proj": "qkv",
    "query_key_value": "qkv",
    "gate_proj": "gate",
    "up_proj": "up",
    "gate_up_proj": "gate_up",
    "down_proj": "down",
    "w1": "gate",  # Mixtral's names
    "w2": "down",
    "w3": "up",
    "lm_head": "lm_head",
    "embed_tokens": "embed",
}
# the same outside the decoder layers; other names have no role there
_OUTSIDE: Mapping[str, str] = {
    "lm_head": "lm_head",
    "embed_out": "lm_head",
    "embed_tokens": "embed",
    "wte": "embed",
    "word_embeddings": "embed",
    "tok_embeddings": "embed",
    "embed_in": "embed",
    "embeddings": "embed",
}
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})

# a rule may name a set of roles
ROLE_SETS: Mapping[str, frozenset[str]] = {
    "attention": frozenset({"q", "k", "v", "o", "qkv"}),
    "mlp": frozenset({"gate", "up", "gate_up", "down"}),
}
# a rule may name these, too: weights of routed experts, and of experts that every token passes
EXPERTS, SHARED_EXPERTS = "experts", "shared_experts"
LINEAR = "linear"  # any weight matrix of a decoder layer
KEPT_ROLES = frozenset({"lm_head", "embed", "norm", "router", "other"})

# last part of the parent's name -> role of a linear whose own name says nothing
_PARENT_ROLES: Mapping[str, str] = {
    "self_attn": "attention",
    "attn": "attention",
    "attention": "attention",
    "self_attention": "attention",
    "linear_attn": "attention",
    "mlp": "mlp",
    "shared_mlp": "mlp",
    "feed_forward": "mlp",
}
DECODER = "model.layers"
_EXPERT = re.compile(r"\.experts\.(\d{1,9})\.")


@dataclass(frozen=True, slots=True)
class TensorName:
    """A checkpoint name taken apart. `layer` is None outside the decoder layers, `expert` but for routed experts."""

    full: str
    module: str
    parameter: str
    layer: int | None
    role: str
    expert: int | None = None

    @property
    def routed(self) -> bool:
        """Whether it belongs to experts among which a router chooses."""
        return self.expert is not None or (self.layer is not None and "experts" in self.full.split("."))

    @property
    def shared(self) -> bool:
        """Whether it belongs to experts that every token passes."""
        if self.layer is None:
            return False
        return any(part.startswith("shared_expert") or part == "shared_mlp" for part in self.module.split("."))


def parse_name(name: str, shape: tuple[int, ...], decoder: str = DECODER) -> TensorName:
    """The parts of a checkpoint name; `decoder` is the name of the list of decoder layers.

    Tensors of other stacks (towers, multi-token-prediction heads) have no layer and the role `other`. A 2-D weight of a
    decoder layer whose name says nothing is `attention` or `mlp` by its parent, else `linear`. Experts that stand in
    one 3-D tensor have the role of one of them and no number.
    """
    module, _, parameter = name.rpartition(".")
    layer = layer_of(name, decoder)
    numbered = _EXPERT.search(name) if layer is not None else None
    expert = int(numbered.group(1)) if numbered else None
    return TensorName(name, module, parameter, layer, _role(module, parameter, layer, len(shape)), expert)


def layer_of(name: str, decoder: str = DECODER) -> int | None:
    """The number of the decoder layer that a name belongs to, None outside of them; `decoder` as in `parse_name`."""
    if not name.startswith(decoder) or name[len(decoder) : len(decoder) + 1] != ".":
        return None
    number, dot, _ = name[len(decoder) + 1 :].partition(".")
    return int(number) if dot and number.isascii() and number.isdecimal() and len(number) < 10 else None


def may_be_infinite(name: str) -> bool:
    """Whether a tensor may hold infinite values: masks, clipping bounds and biases may, weights and scales may not."""
    leaf = name.rpartition(".")[2]
    if "bias" in leaf or "mask" in leaf:
        return True
    weight = leaf.startswith("weight") or leaf in ROLES or "proj" in leaf or leaf.endswith(("_blocks", "embedding"))
    return not weight and "scale" not in leaf


def role_order(leaf: str) -> int:
    """The place of a weight in tables, by the last part of its name: q, k, v, what has no role, o; gate, up, down."""
    places = {"q": 0, "qkv": 0, "gate": 0, "gate_up": 0, "k": 1, "up": 1, "v": 2, "o": 4, "down": 4}
    return places.get(ROLES.get(leaf, ""), 3)


def _role(module: str, parameter: str, layer: int | None, dimensions: int) -> str:
    parent, _, leaf = module.rpartition(".")
    if "norm" in leaf:
        return "norm"
    if layer is not None and leaf == "experts" and dimensions == 3:
        return ROLES.get(parameter, "other")
    if parameter != "weight":
        return "other"
    return _OUTSIDE.get(leaf, "other") if layer is None else _role_in_layer(parent, leaf, dimensions)


def _role_in_layer(parent: str, leaf: str, dimensions: int) -> str:
    above = parent.rpartition(".")[2]
    if leaf in _ROUTERS or leaf in GATES or above == "gate" or any("router" in part for part in (leaf, above)):
        return "router"
    if leaf in ROLES:
        return ROLES[leaf]
    linear = dimensions == 2 and "conv" not in leaf
    return _PARENT_ROLES.get(above, LINEAR) if linear else "other"
