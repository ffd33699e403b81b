"""Which kernel of which engine runs a format on which GPU, and in what arithmetic, as data.

vLLM's facts are read from its priority lists and from each kernel's own `is_supported`, versions 0.24 and 0.32
(model_executor/kernels/linear/__init__.py and below, layers/fused_moe/oracle/, platforms/cuda.py), for the kernels in
its CUDA wheel (CUTLASS, Marlin, FlashInfer, DeepGEMM), without b12x and Humming, which are separate packages. `seen`
marks a kernel that this project saw running. SGLang's facts are read in its release 0.5.23 (srt/layers/quantization/:
compressed_tensors/compressed_tensors.py and schemes/, fp4_utils.py, fp8_utils.py). Aphrodite 0.10 and later is vLLM's
code under another name; where the lists of its release 0.24.1 choose otherwise than vLLM 0.32's is below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from snugfit.engines.gpus import Generation

Arithmetic = Literal["W4A4", "W4A16", "W4A8", "W8A8", "W8A16", "W16A16"]


@dataclass(frozen=True)
class Linear:
    """What a GPU has of a linear, fused partners as one: its features, and those under one scale (-1: all of a row)."""

    out_features: int
    in_features: int
    group_size: int


@dataclass(frozen=True)
class Blocks:
    """What a kernel takes: features in whole blocks, and sizes of groups. `otherwise` is the kernel of the rest."""

    out_features: int
    in_features: int
    group_sizes: tuple[int, ...]
    otherwise: Kernel

    def takes(self, linear: Linear) -> bool:
        """Whether a linear is one of these."""
        even = linear.out_features % self.out_features == 0 == linear.in_features % self.in_features
        return even and linear.group_size in self.group_sizes


@dataclass(frozen=True)
class Kernel:
    """A kernel and its arithmetic: bits of weights and of activations. `seen`: this project saw an engine choose it.

    `blocks` says which linears it takes, None: all.
    """

    name: str
    arithmetic: Arithmetic
    seen: bool = False
    blocks: Blocks | None = None


_MARLIN4 = Kernel("Marlin", "W4A16")
_MARLIN8 = Kernel("Marlin", "W8A16")
_CUTLASS8 = Kernel("CUTLASS", "W8A8")
_BF16 = Kernel("cuBLAS", "W16A16")
_FLASHINFER4 = Kernel("FlashInfer CUTLASS", "W4A4")

# format -> generation -> kernel of a linear layer. The formats are those of the file: "fp8-channel" has one scale an
# output channel or one a weight, "fp8-block" one a 128 x 128 block
_VLLM_LINEAR: Mapping[str, Mapping[Generation, Kernel]] = {
    "bf16": dict.fromkeys(("ampere", "ada", "hopper", "blackwell", "blackwell-consumer"), _BF16),
    # _POSSIBLE_NVFP4_KERNELS: CuTe DSL asks for sm10x, FlashInfer CUTLASS for >= sm100, Marlin takes the rest
    "nvfp4": {
        "ampere": _MARLIN4,
        "ada": _MARLIN4,
        "hopper": Kernel("Marlin", "W4A16", seen=True),  # 0.24 on an H100: docs/engines.md
        "blackwell": Kernel("FlashInfer CuTe DSL", "W4A4"),
        "blackwell-consumer": _FLASHINFER4,
    },
    # init_nvfp4_linear_kernel with use_a16: Marlin, on sm10x CuTe DSL (0.32; Marlin in 0.24)
    "nvfp4a16": {
        "ampere": _MARLIN4,
        "ada": _MARLIN4,
        "hopper": _MARLIN4,
        "blackwell": Kernel("FlashInfer CuTe DSL", "W4A16"),
        "blackwell-consumer": _MARLIN4,
    },
    # _POSSIBLE_FP8_KERNELS: FlashInfer asks for one scale a weight, so CUTLASS from sm89 on, Marlin before
    "fp8-channel": {
        "ampere": _MARLIN8,
        "ada": _CUTLASS8,
        "hopper": Kernel("CUTLASS", "W8A8", seen=True),  # 0.24 on an H100: docs/engines.md
        "blackwell": _CUTLASS8,
        "blackwell-consumer": _CUTLASS8,
    },
    # _POSSIBLE_FP8_BLOCK_KERNELS: DeepGEMM on sm90 and sm10x, CUTLASS's block kernel from sm90 on; on sm89 Triton in
    # 0.24, where Marlin refuses it (in 0.32 Marlin accepts it and comes before Triton: W8A16)
    "fp8-block": {
        "ampere": _MARLIN8,
        "ada": Kernel("Triton", "W8A8"),
        # 0.24 on an H100 ran CUTLASS's block kernel, in a build without DeepGEMM: docs/serving.md
        "hopper": Kernel("DeepGEMM", "W8A8"),
        "blackwell": Kernel("DeepGEMM", "W8A8"),
        "blackwell-consumer": _CUTLASS8,
    },
    # _POSSIBLE_KERNELS: Machete needs sm90 and whole blocks (machete_utils.py), Marlin runs everywhere, and pads
    "int4": {
        "ampere": _MARLIN4,
        "ada": _MARLIN4,
        # 0.24 on an H100: docs/engines.md
        "hopper": Kernel("Machete", "W4A16", seen=True, blocks=Blocks(128, 64, (-1, 64, 128), _MARLIN4)),
        "blackwell": _MARLIN4,
        "blackwell-consumer": _MARLIN4,
    },
    # CUTLASS's int8 is not built for Blackwell: Triton (activation bits as the file asks)
    "int8": {
        "ampere": _CUTLASS8,
        "ada": _CUTLASS8,
        "hopper": _CUTLASS8,
        "blackwell": Kernel("Triton", "W8A8"),
        "blackwell-consumer": Kernel("Triton", "W8A8"),
    },
    # _POSSIBLE_MXFP4_KERNELS: FlashInfer's CuTe DSL from sm100 on, Marlin before
    "mxfp4": {
        "ampere": _MARLIN4,
        "ada": _MARLIN4,
        "hopper": _MARLIN4,
        "blackwell": Kernel("FlashInfer CuTe DSL", "W4A4"),
        "blackwell-consumer": Kernel("FlashInfer CuTe DSL", "W4A4"),
    },
}
# experts, where they differ from linear layers (layers/fused_moe/oracle/: nvfp4.py, fp8.py, int_wna16.py, mxfp4.py)
_VLLM_EXPERTS: Mapping[str, Mapping[Generation, Kernel]] = {
    "bf16": dict.fromkeys(("ampere", "ada", "hopper", "blackwell", "blackwell-consumer"), Kernel("Triton", "W16A16")),
    "nvfp4": {"blackwell": Kernel("FlashInfer TRTLLM", "W4A4"), "blackwell-consumer": _FLASHINFER4},
    "fp8-channel": {"ada": Kernel("Triton", "W8A8"), "blackwell-consumer": Kernel("Triton", "W8A8")},
    "fp8-block": {
        "blackwell": Kernel("FlashInfer TRTLLM", "W8A8"),
        "blackwell-consumer": Kernel("Triton", "W8A8"),
    },
    "int4": {"hopper": Kernel("Marlin", "W4A16", seen=True)},
    # gpt-oss has a separate list: Triton's kernels on Hopper
    "mxfp4": {"blackwell": Kernel("FlashInfer TRTLLM", "W4A8"), "blackwell-consumer": _MARLIN4},
}
# 0.24.1 has FlashInfer's weight-only kernel before CUTLASS's, and a kernel of sm100 for INT4 before Marlin
_APHRODITE_LINEAR: Mapping[str, Mapping[Generation, Kernel]] = {
    **_VLLM_LINEAR,
    "nvfp4": {**_VLLM_LINEAR["nvfp4"], "blackwell-consumer": Kernel("FlashInfer CuTe DSL", "W4A16")},
    "int4": {**_VLLM_LINEAR["int4"], "blackwell": Kernel("Swordfish", "W4A16")},
}
# SGLang 0.5.23, --fp8-gemm-backend and --fp4-gemm-backend "auto". It has no scheme for mxfp4-pack-quantized
_SGLANG_LINEAR: Mapping[str, Mapping[Generation, Kernel]] = {
    "bf16": _VLLM_LINEAR["bf16"],
    # CompressedTensorsW4A4Fp4 asks for sm100; older GPUs run its files as CompressedTensorsW4A16Fp4, from 0.5.22 on
    "nvfp4": {
        "ampere": _MARLIN4,
        "ada": _MARLIN4,
        "hopper": _MARLIN4,
        "blackwell": Kernel("FlashInfer CuTe DSL", "W4A4"),
        "blackwell-consumer": _FLASHINFER4,
    },
    # from 0.5.22 on; FlashInfer has no such kernel in its CUTLASS back end, the default on sm120
    "nvfp4a16": {
        "ampere": _MARLIN4,
        "ada": _MARLIN4,
        "hopper": _MARLIN4,
        "blackwell": Kernel("FlashInfer CuTe DSL", "W4A16"),
        "blackwell-consumer": _MARLIN4,
    },
    "fp8-channel": {
        "ampere": _MARLIN8,
        "ada": _CUTLASS8,
        "hopper": _CUTLASS8,
        "blackwell": _CUTLASS8,
        "blackwell-consumer": _CUTLASS8,
    },
    # before sm89 CompressedTensorsW8A16Fp8 takes over, which refuses scales of blocks
    "fp8-block": {
        "ada": Kernel("Triton", "W8A8"),
        "hopper": Kernel("DeepGEMM", "W8A8"),
        "blackwell": Kernel("DeepGEMM", "W8A8"),
        "blackwell-consumer": _CUTLASS8,
    },
    "int4": dict.fromkeys(("ampere", "ada", "hopper", "blackwell", "blackwell-consumer"), _MARLIN4),
}
LINEAR: Mapping[str, Mapping[str, Mapping[Generation, Kernel]]] = {
    "vllm": _VLLM_LINEAR,
    "aphrodite": _APHRODITE_LINEAR,
    "sglang": _SGLANG_LINEAR,
}
EXPERTS: Mapping[str, Mapping[str, Mapping[Generation, Kernel]]] = {
    "vllm": _VLLM_EXPERTS,
    "aphrodite": _VLLM_EXPERTS,
    "sglang": {},
}

# the only format of an output head that is written
HEAD_FORMAT = "fp8-dynamic"
# vLLM: CompressedTensorsConfig.get_quant_method gives a scheme to ParallelLMHead; 0.32's CPU build was seen to load it
HEAD_ENGINES = "vLLM 0.32 loads a quantized output head; earlier releases and other engines were not tried"

# attention over a 16-bit and an FP8 cache: platforms/cuda.py's order, each back end's supported_kv_cache_dtypes.
# FlashAttention reads FP8 in its version 3 (sm90) alone
_VLLM_ATTENTION: Mapping[Generation, tuple[str, str]] = {
    "ampere": ("FlashAttention 2", "FlashInfer"),
    "ada": ("FlashAttention 2", "FlashInfer"),
    "hopper": ("FlashAttention 3", "FlashAttention 3"),
    "blackwell": ("FlashInfer TRTLLM", "FlashInfer TRTLLM"),
    "blackwell-consumer": ("FlashAttention 2", "FlashInfer"),
}
_VLLM_LATENT: Mapping[Generation, tuple[str, str]] = {
    "ampere": ("Triton MLA", "Triton MLA"),
    "ada": ("Triton MLA", "Triton MLA"),
    "hopper": ("FlashAttention MLA", "FlashMLA"),
    "blackwell": ("FlashInfer MLA", "FlashInfer MLA"),
    "blackwell-consumer": ("Triton MLA", "Triton MLA"),
}
# SGLang's defaults from memory, not looked up: FlashAttention 3 on Hopper, TRTLLM on sm100, FlashInfer elsewhere
_SGLANG_ATTENTION: Mapping[Generation, tuple[str, str]] = {
    "ampere": ("FlashInfer", "FlashInfer"),
    "ada": ("FlashInfer", "FlashInfer"),
    "hopper": ("FlashAttention 3", "FlashAttention 3"),
    "blackwell": ("TRTLLM", "TRTLLM"),
    "blackwell-consumer": ("FlashInfer", "FlashInfer"),
}
_SGLANG_LATENT: Mapping[Generation, tuple[str, str]] = {
    "ampere": ("Triton", "Triton"),
    "ada": ("Triton", "Triton"),
    "hopper": ("FlashAttention 3", "FlashAttention 3"),
    "blackwell": ("TRTLLM MLA", "TRTLLM MLA"),
    "blackwell-consumer": ("Triton", "Triton"),
}
_ATTENTION = {"vllm": _VLLM_ATTENTION, "aphrodite": _VLLM_ATTENTION, "sglang": _SGLANG_ATTENTION}
_LATENT = {"vllm": _VLLM_LATENT, "aphrodite": _VLLM_LATENT, "sglang": _SGLANG_LATENT}


def linear_kernel(
    engine: str, fmt: str, generation: Generation, *, experts: bool = False, linear: Linear | None = None
) -> Kernel | None:
    """The kernel for a weight of that format; None where the engine has none (or its docs do not say).

    Without a `linear` it is the one that the engine prefers.
    """
    of_experts = EXPERTS[engine].get(fmt, {}).get(generation) if experts else None
    found = of_experts or LINEAR[engine].get(fmt, {}).get(generation)
    blocks = found.blocks if found else None
    return found if blocks is None or linear is None or blocks.takes(linear) else blocks.otherwise


def attention_kernel(engine: str, generation: Generation, *, fp8: bool, latent: bool = False) -> str:
    """The kernel that reads the KV cache; `latent` for multi-head latent attention."""
    return (_LATENT if latent else _ATTENTION)[engine][generation][fp8]
