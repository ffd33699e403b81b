"""Activation profiles: how an engine rounds the inputs of a linear, for each kind of input that a file asks for.

A file asks for 4-bit or 8-bit activations; the engine and the GPU decide whether linears run on them. An engine ignores
a kind that its profile does not list: those linears run on 16-bit activations. Facts are vLLM 0.32's, from its kernel
lists (model_executor/kernels/linear/__init__.py) and the schemes in layers/quantization.
"""

from __future__ import annotations

from collections.abc import Mapping

from snugfit.formats.spec import InputKind

# what every NVIDIA GPU from Ada on does; vLLM makes a dynamic scale of a whole tensor one a token there. Not imitated:
# where its DeepGEMM runs (Hopper and Blackwell, bf16, N % 64 == 0, K % 128 == 0) fp8-group scales, and those of the
# weight's blocks with them, are rounded up to powers of two unless VLLM_USE_DEEP_GEMM_E8M0=0
_CUDA: Mapping[InputKind, InputKind] = {
    "fp8-token": "fp8-token",
    "fp8-tensor": "fp8-tensor",
    "fp8-tensor-dynamic": "fp8-token",
    "fp8-group": "fp8-group",
    "int8-token": "int8-token",
    "int8-token-asym": "int8-token-asym",
    "int8-tensor": "int8-tensor",
    "int8-tensor-asym": "int8-tensor-asym",
}

# profile -> kind of input that a file asks for -> kind of input that the engine runs on
PROFILES: Mapping[str, Mapping[InputKind, InputKind]] = {
    # Blackwell: W4A4 for NVFP4 and MXFP4, W8A8 for FP8. CUTLASS has no INT8 there; files that ask for it are shown
    # as other GPUs run them. Not imitated: MXFP4A16 runs W4A4, too, since 0.32 does not look at its inputs
    "vllm-blackwell": {**_CUDA, "nvfp4": "nvfp4", "mxfp4": "mxfp4"},
    # before Blackwell NVFP4 and MXFP4 run weight-only through Marlin, FP8 and INT8 through CUTLASS (Hopper, Ada)
    "marlin": _CUDA,
    # x86 with AMX but without its FP8 (Sapphire to Granite Rapids). FP8 is real under one scale a token and weight-only
    # under one a block or a tensor; INT8 is real; NVFP4 is vLLM's emulation kernel, once registered (W4A4); INT4 is
    # W4A16 with VLLM_CPU_INT4_W4A8=0; MXFP4 has no kernel. Without AMX blocks have none either (refused; seen). Not
    # imitated: keys and values of an FP8 cache are cut off towards zero (seen), where GPUs round
    "vllm-cpu": {
        "fp8-token": "fp8-token",
        "int8-token": "int8-token",
        "int8-token-asym": "int8-token-asym",
        "int8-tensor": "int8-tensor",
        "int8-tensor-asym": "int8-tensor-asym",
        "nvfp4": "nvfp4",
    },
    # every linear dequantized to 16 bits
    "none": {},
}
DEFAULT_PROFILE = "vllm-blackwell"
