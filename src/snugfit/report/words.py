"""Sentences of a model card: what a format is, and why a component has it, from the record's own numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from snugfit.byte_counts import size
from snugfit.records.quantize import DEQUANTIZED, KV_CACHE, PASSTHROUGH, QuantizeRecord
from snugfit.report.weights import LINEARS, Component

# format -> what it is; labels such as int4-g128 begin with the format's name
FORMAT_WORDS: Mapping[str, str] = {
    "nvfp4": "4-bit floats (E2M1) in blocks of 16 under an FP8 scale each and one FP32 scale a weight; inputs 4-bit "
    "too (W4A4) on GPUs that can, 16-bit (W4A16) before Blackwell",
    "nvfp4a16": "4-bit floats (E2M1) in blocks of 16 under an FP8 scale each; inputs stay 16-bit (W4A16)",
    "mxfp4": "4-bit floats (E2M1) in blocks of 32 under a power of two; inputs 4-bit too (W4A4) on GPUs that can",
    "fp8-dynamic": "8-bit floats (E4M3), one scale an output channel; inputs 8-bit, one scale a token (W8A8)",
    "fp8-block": "8-bit floats (E4M3), one scale a block of 128 x 128; inputs 8-bit (W8A8)",
    "fp8": "8-bit floats (E4M3), codes of the source bit for bit",
    "int4": "4-bit integers in groups of input features; inputs stay 16-bit (W4A16)",
    "int8": "8-bit integers of the source",
    PASSTHROUGH: "the source's own dtype and values",
    DEQUANTIZED: "16 bits, out of the source's codes",
    KV_CACHE: "calibrated scales, with which engines keep keys and values in 8-bit floats",
}
SCALE_RULE_WORDS: Mapping[str, str] = {
    "four-over-six": "Four Over Six: each block is scaled so that its largest value becomes 6 or 4, whichever has the "
    "smaller squared error",
    "absmax": "the largest magnitude of a block becomes the largest code",
    "sweep": "the best of many scales of each block",
}
# components that quantized checkpoints of this package keep unless a rule names them
_KEPT_WHY: Mapping[str, str] = {
    "norms": "vectors: their bytes do not count, and every token passes them",
    "routers": "they choose the experts, and are small",
    "embeddings": "looked up, not multiplied: 16 bits cost no time",
    "lm_head": "its error goes straight into the predictions",
}


def describe_format(label: str) -> str:
    """What the format of a label is, "" for an unknown one."""
    for name in sorted(FORMAT_WORDS, key=len, reverse=True):
        if label == name or label.startswith((f"{name}-", f"{name}+", f"{name}a16")):
            return FORMAT_WORDS[name]
    return ""


def why(component: Component, components: Sequence[Component], record: QuantizeRecord) -> str:
    """Why a component has its format: what it weighs, what its bits cost or save, beside the others."""
    part = component.bytes / max(1, record.bytes)
    if component.name not in LINEARS:
        known = _KEPT_WHY.get(component.name, "")
        weight = f"{100 * part:.1f} % of the file" if part >= 0.001 else ""
        return "; ".join(filter(None, (known, weight)))
    share = f"{100 * component.share:.0f} % of the linear weights" if component.share is not None else ""
    return "; ".join(filter(None, (share, _trade(component, components, record))))


def _trade(component: Component, components: Sequence[Component], record: QuantizeRecord) -> str:
    """What the bits of a component cost beside the narrowest of the other linears, or save beside the widest."""
    others = [one for one in components if one.name in LINEARS and abs(one.bits - component.bits) > 0.5]
    if not others:
        saved = component.source_bytes - component.bytes
        return f"saves {size(saved)} of {size(record.source_bytes)}" if saved > 0 else ""
    low, high = min(others, key=lambda one: one.bits), max(others, key=lambda one: one.bits)
    if component.bits > low.bits:
        cost = (component.bits - low.bits) * component.weights / 8
        error = _errors(component, low)
        return f"{component.bits:.2f} instead of {low.bits:.2f} bits cost {size(cost)}{error}"
    less = (high.bits - component.bits) * component.weights / 8
    return f"{component.bits:.2f} instead of {high.bits:.2f} bits save {size(less)}"


def _errors(component: Component, low: Component) -> str:
    if not component.relative_error or not low.relative_error:
        return ""
    times = low.relative_error / component.relative_error
    return f", for a weight error {times:.0f} times smaller than {low.format}'s" if times >= 2 else ""


def own_words(recipe_description: str) -> str:
    """A recipe's description as the end of a sentence."""
    return recipe_description.strip().rstrip(".")
