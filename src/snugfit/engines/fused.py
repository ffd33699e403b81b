"""Which linears an engine joins into one matrix product, and what it calls them.

Members of a group must share one format and, in NVFP4, one weight_global_scale and one input_global_scale: vLLM takes
the largest and only warns. Names are the last part of a module's name; members stand in the same parent module. Read
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

# what a file calls a part of a decoder layer -> what vLLM calls it where it looks up the format of a linear inside: a
# target that knows the file's name alone leaves it unquantized, and loading fails (seen: granitemoehybrid, KeyError
# on mamba.in_proj.weight_scale; with (mamba|mixer) in the target it loads)
LOOKED_UP_AS: Mapping[str, str] = {"mamba": "mixer"}
# families whose layers vLLM looks up under other prefixes still: self_attn is left out (layers.0.q_proj), and mamba of
# layer i of n stands under i + n without `layers` (3.mixer.in_proj), so that no target can choose among layers
PREFIXES_DIFFER: frozenset[str] = frozenset({"falcon_h1"})
# linears with a few outputs a head: vLLM quantizes them where a target says so, but they gain next to nothing, and
# Marlin asks for 64 outputs a rank, which two or more ranks may not leave
GATES: frozenset[str] = frozenset({"in_proj_ba", "in_proj_b", "in_proj_a"})

# linears of latent attention whose weight vLLM makes anew by running it on unit vectors: 4-bit inputs would round that,
# and a scale measured on other inputs would clip it (read in 0.24 and 0.32)
NO_FOUR_BIT_INPUTS: frozenset[str] = frozenset({"kv_b_proj"})

_GROUP_OF = {leaf: group for group in FUSED_GROUPS for leaf in group}


def group_modules(modules: Iterable[str]) -> list[tuple[str, ...]]:
    """The given module names as fused groups, in order of first appearance; a module that fuses with none is alone."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for module in modules:
        parent, _, leaf = module.rpartition(".")
        groups.setdefault((parent, *_GROUP_OF.get(leaf, (leaf,))), []).append(module)
    return [tuple(members) for members in groups.values()]
