"""Kernels read out of engine logs: lines as vLLM 0.15 to 0.32 writes them, prefixes and all."""

from __future__ import annotations

import pytest

from snugfit.records.evaluation import KernelReport
from snugfit.serving.engine_log import kernels_from_log

# vLLM 0.32 on a CPU, an FP8 and INT4 checkpoint, shortened
CPU = """\
(APIServer pid=598) INFO 11-22 05:10:07 [api_utils.py:347]  ▄▄ ▄█ █     █     █ ▀▄▀ █  version 0.32.0
(APIServer pid=598) INFO 11-22 05:10:07 [model.py:2152] Using max model len 512
(EngineCore pid=702) INFO 11-22 05:10:17 [core.py:133] Initializing a V1 LLM engine (v0.32.0) with config: \
model='/models/fp8-int4', speculative_config=None, dtype=torch.bfloat16, quantization=compressed-tensors, \
quantization_config=None, enforce_eager=True, kv_cache_dtype=auto, device_config=cpu, seed=0
(Worker pid=711) INFO 11-22 05:10:26 [__init__.py:797] Selected ChannelWiseTorchFP8ScaledMMLinearKernel for \
CompressedTensorsW8A8Fp8
(Worker pid=711) INFO 11-22 05:10:26 [__init__.py:923] Using CPUWNA16LinearKernel for mixed-precision linear
(Worker pid=711) INFO 11-22 05:10:26 [compressed_tensors_wNa16.py:138] Using CPUWNA16LinearKernel for \
CompressedTensorsWNA16
(EngineCore pid=702) INFO 11-22 05:10:30 [utils.py:347] Using LBHNC KV cache layout.
INFO:     127.0.0.1:55988 - "POST /v1/completions HTTP/1.1" 200 OK
"""
# 0.19 and later on a GPU, through docker; an NVFP4 mixture of experts with an FP8 cache
BLACKWELL = """\
2026-05-01 20:55:00.1 | (APIServer pid=1) INFO 05-01 18:55:00 [cache.py:247] Using fp8_e4m3 data type to store kv \
cache. It reduces the GPU memory footprint and boosts the performance.
2026-05-01 20:55:02.1 | (EngineCore pid=187) INFO 05-01 18:55:02 [core.py:109] Initializing a V1 LLM engine \
(v0.20.1rc1.dev3+g1a2b3c) with config: model='m', quantization=compressed-tensors, kv_cache_dtype=fp8_e4m3
2026-05-01 20:55:06.2 | (EngineCore pid=187) INFO 05-01 18:55:06 [__init__.py:683] Using \
FlashInferCutlassNvFp4LinearKernel for NVFP4 GEMM
2026-05-01 20:55:06.2 | (EngineCore pid=187) INFO 05-01 18:55:06 [nvfp4.py:209] Using 'MARLIN' NvFp4 MoE backend out \
of potential backends: ['FLASHINFER_TRTLLM', 'FLASHINFER_CUTEDSL', 'VLLM_CUTLASS', 'MARLIN', 'EMULATION'].
2026-05-01 20:55:06.3 | (EngineCore pid=187) INFO 05-01 18:55:06 [nvfp4.py:629] Using MarlinExperts
2026-05-01 20:55:06.9 | (EngineCore pid=187) INFO 05-01 18:55:06 [cuda.py:368] Using FLASHINFER attention backend out \
of potential backends: ['FLASHINFER', 'TRITON_ATTN'].
2026-05-01 20:55:07.9 | (EngineCore pid=187) INFO 05-01 18:55:07 [cuda.py:368] Using FLASHINFER attention backend out \
of potential backends: ['FLASHINFER', 'TRITON_ATTN'].
"""


def test_a_log_of_a_cpu_is_read() -> None:
    """Version, quantization, cache type and linear kernels; attention, which is not logged there, is not made up."""
    assert kernels_from_log(CPU) == KernelReport(
        engine_version="0.32.0",
        quantization="compressed-tensors",
        kv_cache_dtype="auto",
        linear=(
            "ChannelWiseTorchFP8ScaledMMLinearKernel for CompressedTensorsW8A8Fp8",
            "CPUWNA16LinearKernel for CompressedTensorsWNA16",
        ),
    )


def test_a_log_of_a_gpu_is_read() -> None:
    """Every kind is found behind docker's prefix, once each."""
    assert kernels_from_log(BLACKWELL) == KernelReport(
        engine_version="0.20.1rc1.dev3+g1a2b3c",
        quantization="compressed-tensors",
        kv_cache_dtype="fp8_e4m3",
        attention=("FLASHINFER",),
        linear=("FlashInferCutlassNvFp4LinearKernel for NVFP4 GEMM",),
        moe=("MARLIN NvFp4", "MarlinExperts"),
    )


@pytest.mark.parametrize(
    ("line", "kind", "found"),
    [
        ("Using FLASH_ATTN attention backend out of potential backends: ['FLASH_ATTN'].", "attention", "FLASH_ATTN"),
        ("Using FLASH_ATTN attention backend out of potential backends: ('FLASH_ATTN').", "attention", "FLASH_ATTN"),
        ("Using AttentionBackendEnum.TRITON_ATTN backend.", "attention", "TRITON_ATTN"),
        ("Using CPU_MLA backend.", "attention", "CPU_MLA"),
        ("Using Flash Attention backend.", "attention", "Flash Attention"),
        ("Using TurboQuant attention backend.", "attention", "TurboQuant"),
        ("Using FLASH_ATTN MLA prefill backend.", "attention", "FLASH_ATTN MLA prefill"),
        ("Using FlashAttention version 3", "attention", "FlashAttention version 3"),
        ("Using TRTLLM decode attention (auto-detected).", "attention", "TRTLLM decode attention"),
        (
            "Using Triton/FLA GDN prefill kernel (requested=auto, head_k_dim=128).",
            "attention",
            "Triton/FLA GDN prefill kernel",
        ),
        (
            "Selected CutlassFP8ScaledMMLinearKernel for CompressedTensorsW8A8Fp8",
            "linear",
            "CutlassFP8ScaledMMLinearKernel for CompressedTensorsW8A8Fp8",
        ),
        ("Using NvFp4LinearBackend.MARLIN for NVFP4 GEMM", "linear", "MARLIN for NVFP4 GEMM"),
        ("Using flashinfer-cutlass for NVFP4 GEMM", "linear", "flashinfer-cutlass for NVFP4 GEMM"),
        ("Using MarlinMxFp4LinearKernel for MXFP4 GEMM", "linear", "MarlinMxFp4LinearKernel for MXFP4 GEMM"),
        (
            "Using MarlinLinearKernel for GPTQMarlinLinearMethod",
            "linear",
            "MarlinLinearKernel for GPTQMarlinLinearMethod",
        ),
        (
            "Using ExllamaLinearKernel for mixed-precision linear",
            "linear",
            "ExllamaLinearKernel for mixed-precision linear",
        ),
        (
            "Using FLASHINFER_TRTLLM Fp8 MoE backend out of potential backends: ['AITER'].",
            "moe",
            "FLASHINFER_TRTLLM Fp8",
        ),
        (
            "Using FlashInfer TRTLLM Unquantized MoE backend out of potential backends: ['TRITON'].",
            "moe",
            "FlashInfer TRTLLM Unquantized",
        ),
        ("Using CPU W4A8 Int8 MoE backend out of potential backends: ['CPU'].", "moe", "CPU W4A8 Int8"),
        ("Using 'MARLIN' WNA16 MoE backend.", "moe", "MARLIN WNA16"),
        ("Using TritonExperts MoE backend", "moe", "TritonExperts"),
        (
            "Using Nvfp4QuantizationEmulationTritonExperts MOE backend. This will dequantize",
            "moe",
            "Nvfp4QuantizationEmulationTritonExperts",
        ),
        ("Using CutlassExpertsMxfp4 for MXFP4 MoE", "moe", "CutlassExpertsMxfp4 for MXFP4"),
        ("Using CompressedTensorsWNA16MoEMethod", "moe", "CompressedTensorsWNA16MoEMethod"),
    ],
)
def test_every_wording_is_known(line: str, kind: str, found: str) -> None:
    """A choice lands in its own kind and in no other, alone on its line or behind vLLM's prefix, coloured or not."""
    for prefix in ("", "(EngineCore pid=1) INFO 05-01 18:55:06 [a.py:1] ", "\x1b[32mINFO\x1b[0m 05-01 [a.py:1] "):
        report = kernels_from_log(prefix + line)
        kinds = {"attention": report.attention, "linear": report.linear, "moe": report.moe}
        assert kinds == {"attention": (), "linear": (), "moe": (), kind: (found,)}
        assert report


@pytest.mark.parametrize(
    "line",
    [
        "Using max model len 32768",
        "Using LBHNC KV cache layout.",
        "Using backend FLASH_ATTN for vit attention",
        "Using Transformers modeling backend.",
        "Using flashinfer ReplaySSM backend.",
        "Using V2 Model Runner",
        "Using configuration from /a/E=8,N=64.json for MoE layer.",
        "Using default MoE config. Performance might be sub-optimal!",
        "Using MoEPrepareAndFinalizeNoDPEPModular",
        "Selected backend TRITON_ATTN is incompatible with this layer",
        "Cannot use FA version 3 on Blackwell platform, defaulting to FA version 4 if supported, otherwise FA2.",
        "The server selected a kernel for me",
    ],
)
def test_other_lines_are_passed_over(line: str) -> None:
    """Lines that only resemble a choice say nothing, and a report without any is false."""
    report = kernels_from_log(f"(EngineCore pid=1) INFO 05-01 18:55:06 [a.py:1] {line}\n")
    assert report == KernelReport()
    assert not report


def test_no_quantization_is_none() -> None:
    """The word None in a configuration is None, and of two mentions in one configuration the first holds."""
    report = kernels_from_log(
        "Initializing a V1 LLM engine (v0.25.0) with config: model='m', quantization=None, "
        "kv_cache_dtype=auto, compilation_config={'quantization=fp8, kv_cache_dtype=fp8'}"
    )
    assert (report.engine_version, report.quantization, report.kv_cache_dtype) == ("0.25.0", None, "auto")


def test_a_cache_type_that_is_logged_apart_wins() -> None:
    """Where the configuration says auto and the cache says its type, the type is told."""
    report = kernels_from_log(
        "Initializing a V1 LLM engine (v0.24.0) with config: quantization=None, kv_cache_dtype=auto\n"
        "Using fp8 data type to store kv cache. It reduces the GPU memory footprint.\n"
    )
    assert report.kv_cache_dtype == "fp8"


def test_an_empty_log_tells_nothing() -> None:
    """No log, no report."""
    assert kernels_from_log("") == KernelReport()
