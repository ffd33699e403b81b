"""Experts that are alike are represented by one of them."""

from __future__ import annotations

from snugfit.model.representatives import collapse_experts
from snugfit.storage.safetensors_header import TensorInfo

LAYER = "model.layers.0"


def test_experts_are_one() -> None:
    """Experts that are alike in all their tensors are counted, not listed; one that differs in any is listed whole."""
    names = [f"{LAYER}.mlp.experts.{k}.{leaf}.weight" for k in range(256) for leaf in ("w1", "w2")]
    tensors = [TensorInfo(name, "BF16", (8, 4)) for name in names]
    tensors[257] = TensorInfo(tensors[257].name, "F8_E4M3", (8, 4))  # w2 of expert 128
    found = [(w.info.name, w.info.dtype, w.count) for w in collapse_experts([*tensors, TensorInfo("a", "BF16", (2,))])]
    experts = f"{LAYER}.mlp.experts"
    assert found == [
        (f"{experts}.0.w1.weight", "BF16", 255),
        (f"{experts}.0.w2.weight", "BF16", 255),
        (f"{experts}.128.w1.weight", "BF16", 1),
        (f"{experts}.128.w2.weight", "F8_E4M3", 1),
        ("a", "BF16", 1),
    ]
