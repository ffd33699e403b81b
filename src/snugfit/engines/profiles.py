"""Activation profiles: what an engine does to the inputs of a linear, for each format's request.

A file asks for 4-bit or 8-bit activations; whether it gets them depends on the engine and the GPU.
"""

from __future__ import annotations

from collections.abc import Mapping

from snugfit.formats.spec import InputKind

PROFILES: Mapping[str, frozenset[InputKind]] = {
    # Blackwell: W4A4 for NVFP4, W8A8 for FP8
    "vllm-blackwell": frozenset({"nvfp4", "fp8-token"}),
    # before Blackwell NVFP4 runs weight-only through Marlin, FP8 through CUTLASS (Hopper, Ada)
    "marlin": frozenset({"fp8-token"}),
    # every linear dequantized to 16 bits
    "none": frozenset(),
}
DEFAULT_PROFILE = "vllm-blackwell"
