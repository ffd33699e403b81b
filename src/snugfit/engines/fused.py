"""Which linears an engine joins into one matrix product, and under which names it looks them up.

Members of a fused group must share one format and, in NVFP4, one weight_global_scale and one input_global_scale: vLLM
takes the largest and only warns. Names are the last part of a module's name; members have the same parent module. Read
from vLLM 0.32 (`packed_modules_mapping` of its model classes); a test compares them with the release at hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

FUSED_GROUPS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)

# a file's name of a part of a decoder layer -> vLLM's name of it where it looks up the format of a linear inside: with
# the file's name alone in the target the linear stays unquantized, and loading fails (seen: granitemoehybrid, KeyError
# on mamba.in_proj.weight_scale; with (mamba|mixer) in the target it loads; lfm2: read in 0.32)
LOOKED_UP_AS: Mapping[str, str] = {"mamba": "mixer", "conv": "short_conv"}
# (part of a layer, linear in it) of models whose attention, in other layers, vLLM looks up without the name self_attn
# (jamba: read in vLLM 0.32)
BARE_ATTENTION_BESIDE: tuple[str, str] = ("mamba", "x_proj")
# linears with a few outputs a head: vLLM quantizes them if a target matches, but this saves next to nothing, and Marlin
# needs 64 outputs on each rank, which two or more ranks may not have
GATES: frozenset[str] = frozenset({"in_proj_ba", "in_proj_b", "in_proj_a"})

# linears of latent attention (MLA) whose weight vLLM recomputes by running them on unit vectors: 4-bit inputs would
# round these, and a scale measured on other inputs would clip them (read in 0.24 and 0.32)
NO_FOUR_BIT_INPUTS: frozenset[str] = frozenset({"kv_b_proj"})

_GROUP_OF = {leaf: group for group in FUSED_GROUPS for leaf in group}


def group_modules(modules: Iterable[str]) -> list[tuple[str, ...]]:
    """The module names as fused groups, in order of first appearance; a module without partners is a group of one."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for module in modules:
        parent, _, leaf = module.rpartition(".")
        groups.setdefault((parent, *_GROUP_OF.get(leaf, (leaf,))), []).append(module)
    return [tuple(members) for members in groups.values()]
