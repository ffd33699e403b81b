"""Which linears an engine joins into one matrix product.

Members of a group must share one format and, in NVFP4, one weight_global_scale and one input_global_scale: vLLM takes
the largest and only warns. Names are the last part of a module's name; members stand in the same parent module.
"""

from __future__ import annotations

from collections.abc import Iterable

FUSED_GROUPS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)

_GROUP_OF = {leaf: group for group in FUSED_GROUPS for leaf in group}


def group_modules(modules: Iterable[str]) -> list[tuple[str, ...]]:
    """The given module names as fused groups, in order of first appearance; a module that fuses with none is alone."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for module in modules:
        parent, _, leaf = module.rpartition(".")
        groups.setdefault((parent, *_GROUP_OF.get(leaf, (leaf,))), []).append(module)
    return [tuple(members) for members in groups.values()]
