"""Linears of decoder layers that engines build without a quantization config: codes of them cannot be loaded.

vLLM's loader stops at their scales (KeyError), or takes the codes for numbers. They stay in 16 bits, whatever the
recipe. Read from vLLM 0.24 and 0.32 (`quant_config` of each linear); `tests/engine/test_unquantized.py` compares the
release at hand. Routers are not listed: their role says it (model/names.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Unquantized:
    """Linears that stay in 16 bits: `leaves` below a module called one of `parents` (any, if empty), and the reason.

    With `beside` only where the parent also has a linear of that name. A leaf that begins with "*" is an ending.
    """

    leaves: tuple[str, ...]
    parents: tuple[str, ...]
    reason: str
    beside: str = ""


UNQUANTIZED: tuple[Unquantized, ...] = (
    # deepseek_v32, glm_moe_dsa; vLLM 0.32 dequantizes an FP8 wk, 0.24 does not
    Unquantized(("wk", "weights_proj"), ("indexer",), "vLLM joins wk and weights_proj of an indexer in 16 bits"),
    # jamba, mamba, falcon_mamba: x_proj tells Mamba 1 from Mamba 2, whose in_proj and out_proj are quantized
    Unquantized(
        ("in_proj", "x_proj", "dt_proj", "out_proj"),
        ("mamba", "mixer"),
        "vLLM builds the linears of Mamba 1 without a quantization config",
        beside="x_proj",
    ),
    # hy_v4; kimi_k3
    Unquantized(("hc_fn",), (), "engines mix the streams of hyper-connections in 16 bits"),
    Unquantized(("*_res_proj",), (), "engines build projections of residuals without a quantization config"),
)


def unquantized(modules: Iterable[str]) -> dict[str, str]:
    """Those of `modules` (all linears of a model's layers) that no engine loads quantized -> the reason."""
    places = {module: module.rpartition(".") for module in modules}
    leaves: dict[str, set[str]] = {}
    for parent, _, leaf in places.values():
        leaves.setdefault(parent, set()).add(leaf)
    found: dict[str, str] = {}
    for module, (parent, _, leaf) in places.items():
        for row in UNQUANTIZED:
            above = not row.parents or parent.rpartition(".")[2] in row.parents
            if above and _names(row, leaf) and (not row.beside or row.beside in leaves[parent]):
                found[module] = row.reason
    return found


def _names(row: Unquantized, leaf: str) -> bool:
    return any(leaf.endswith(name[1:]) if name.startswith("*") else leaf == name for name in row.leaves)
