"""What became of the fold of a norm into the router and the experts that read it, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class NormFold:
    """The fold of one layer, or why there is none.

    `layer` is what the names of the layer's tensors begin with; `norm` and `readers` (routers, shared experts: what
    reads the norm beside the routed experts) are names of the file, empty where they were not found. On `tokens`
    calibration tokens the layer ran with and without the fold, and `changed_tokens` of them got other experts. `reason`
    says why the layer has no fold, and is empty if it has one, which needs `changed_tokens` to be 0.
    """

    layer: str
    norm: str = ""
    readers: tuple[str, ...] = ()
    tokens: int = 0
    changed_tokens: int = 0
    reason: str = ""


def summary(folds: Sequence[NormFold]) -> str:
    """One line: in how many layers a norm was folded, on how many tokens that was checked, why others have none."""
    made = [fold for fold in folds if not fold.reason]
    line = f"norms folded into routers and experts: {len(made)} of {len(folds)} layers with experts"
    if made:
        line += f" (the experts of {sum(fold.tokens for fold in made):,} tokens checked, unchanged)"
    reasons = {fold.reason: fold.layer for fold in reversed(folds) if fold.reason}
    return "; ".join([line, *(f"{layer}: {reason}" for reason, layer in reversed(reasons.items()))])
