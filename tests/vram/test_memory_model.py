"""An engine's memory: the first seed's figures, and each part of the sum."""

from __future__ import annotations

from typing import Any

import pytest

from helpers import real_configs as real
from helpers.cache_sizes import reported_tokens, used_bytes
from helpers.sparse_models import DEEPSEEK_V3, MINIMAX_M2
from snugfit.engines.memory import (
    CUDA_CONTEXT_BYTES,
    ENGINES,
    GIB,
    GRAPH_BYTES,
    GRAPH_ESTIMATE_BYTES,
    MIB,
    NON_TORCH_BYTES,
    batch_defaults,
    graph_count,
    sglang_reserve,
)
from snugfit.model.positions import max_positions, rotary_tables
from snugfit.vram.blocks import make_pool
from snugfit.vram.budget import (
    Budget,
    Gpu,
    activation_bytes,
    make_budget,
    max_num_batched_tokens,
    read_widths,
    rotary_bytes,
)
from snugfit.vram.kv_cache_config import read_cache

# the first seed: Mistral-Nemo, NVFP4 MLP and FP8 attention, on an RTX 5060 Ti 16GB
SEED_WEIGHTS = 9_737_759_680  # bytes that our plan of that recipe writes
KIB_A_TOKEN = 160
# nvidia-smi's figure, which CUDA reports on Windows and WSL 2; 15.48 GiB on Linux
WSL = Gpu(16311 * MIB, "RTX 5060 Ti 16GB", 36)


def budget_of(config: dict[str, Any], weights: int, engine: str, gpu: Gpu, **options: Any) -> Budget:
    widths = read_widths(config, read_cache(config))
    return make_budget(weights, widths, ENGINES[engine], gpu, **options)


def test_seed_under_vllm() -> None:
    """vLLM 0.19 at 0.9 of the card: 30,304 tokens and 15,415 MiB in all, within 2 %."""
    budget = budget_of(real.NEMO, SEED_WEIGHTS, "vllm-0.19", WSL, gpu_memory_utilization=0.9)
    engine = ENGINES["vllm-0.19"]
    pool = make_pool(read_cache(real.NEMO), max_num_batched_tokens=max_num_batched_tokens(engine, WSL))
    tokens = reported_tokens(pool, budget.cache_bytes, 131072) // 16 * 16
    assert tokens == pytest.approx(30304, rel=0.02)
    assert used_bytes(budget, tokens * KIB_A_TOKEN * 1024) / MIB == pytest.approx(15415, rel=0.02)


def test_seed_under_aphrodite() -> None:
    """Aphrodite in single-user mode with 32,768 tokens: 15,157 MiB in all, within 2 %."""
    budget = budget_of(real.NEMO, SEED_WEIGHTS, "aphrodite", WSL)
    assert used_bytes(budget, 32768 * KIB_A_TOKEN * 1024) / MIB == pytest.approx(15157, rel=0.02)


def test_seed_was_not_on_linux() -> None:
    """With the 15.48 GiB of Linux the first seed's vLLM would have had 8 % less: its card reported 15.93 GiB."""
    budget = budget_of(real.NEMO, SEED_WEIGHTS, "vllm-0.19", Gpu(15851 * MIB, None, 36), gpu_memory_utilization=0.9)
    assert budget.cache_bytes / (KIB_A_TOKEN * 1024) < 0.93 * 30304


def test_parts_of_the_seed() -> None:
    """The sampler's 256 rows of 131,072 logits are the peak: 14 bytes each, the batch's hidden states, 36 rows."""
    widths = read_widths(real.NEMO, read_cache(real.NEMO))
    sampler = 256 * 131072 * 14 + 2 * 2048 * 5120 + 256 * 4 * 5120 + 36 * 131072 * 4
    assert activation_bytes(widths, ENGINES["vllm-0.19"], (2048, 256), WSL.multiprocessors) == sampler
    assert rotary_bytes(widths) == 131072 * 128 * 2
    budget = budget_of(real.NEMO, SEED_WEIGHTS, "vllm-0.19", WSL)
    assert budget.share_bytes == int(0.9 * WSL.reported_bytes)
    assert budget.other_bytes == NON_TORCH_BYTES
    assert budget.outside_budget_bytes == CUDA_CONTEXT_BYTES + 86 * GRAPH_BYTES


def test_one_sequence_has_a_small_sampler() -> None:
    """With one row of logits the widest layer is the peak: gate, up and their product beside two hidden states."""
    widths = read_widths(real.NEMO, read_cache(real.NEMO))
    layer = 2 * 2048 * (2 * 5120 + 3 * 14336)
    assert activation_bytes(widths, ENGINES["aphrodite"], (2048, 1), WSL.multiprocessors) == layer
    assert activation_bytes(widths, ENGINES["aphrodite"], (2048, 1), WSL.multiprocessors, 2) == 2 * 2048 * (
        2 * 5120 + 3 * 7168
    )


def test_sorting_sampler_is_that_of_a_log() -> None:
    """The older sampler's bytes a logit give the 1.40 GiB of peak in the log that they come from (Qwen3-8B)."""
    widths = read_widths(real.QWEN3_8B, read_cache(real.QWEN3_8B))
    old = activation_bytes(widths, ENGINES["aphrodite-many"], (2048, 256), 128)
    assert (old - 128 * 151936 * 4) / GIB == pytest.approx(1.40, abs=0.01)


def test_experts_widen_a_layer() -> None:
    """Of MiniMax's 8 chosen experts each has 3,072 outputs of gate and up beside a product of 1,536."""
    widths = read_widths(MINIMAX_M2, read_cache(MINIMAX_M2))
    assert widths.layer(1) == max(8 * (3072 + 1536), 3 * 48 * 128 + 2 * 8 * 128)
    assert widths.layer(4) == 8 * (3072 + 384)  # the outputs are on every GPU


def test_latent_attention_unpacks_its_context() -> None:
    """MLA's profiling run takes 65,536 tokens of unpacked context: 128 heads of 256 numbers, shared by the GPUs."""
    widths = read_widths(DEEPSEEK_V3, read_cache(DEEPSEEK_V3))
    peak = activation_bytes(widths, ENGINES["vllm"], (8192, 256), 132, 8)
    assert peak >= 2 * 65536 * 128 * 256 // 8
    assert peak == 2 * 65536 * 128 * 256 // 8 + 2 * 8192 * (2 * 7168 + widths.layer(8))


def test_towers_and_lists_have_widths() -> None:
    """Widths come from the text model, where intermediate sizes may be a list and the vocabulary may be left out."""
    widths = read_widths(real.GEMMA3_4B, read_cache(real.GEMMA3_4B))
    assert (widths.hidden, widths.vocabulary, widths.mlp) == (2560, 262208, 3 * 10240)
    listed = {**real.NEMO, "intermediate_size": [100, 300, 200]}
    assert read_widths(listed, read_cache(listed)).mlp == 900


def test_graphs_are_inside_since_021() -> None:
    """vLLM counts its estimate of CUDA graphs against its share since 0.21; before, they were outside it."""
    old, new = (
        budget_of(real.NEMO, SEED_WEIGHTS, name, WSL, gpu_memory_utilization=0.9) for name in ("vllm-0.19", "vllm-0.24")
    )
    assert old.share_bytes == new.share_bytes
    assert new.other_bytes - old.other_bytes == 86 * GRAPH_ESTIMATE_BYTES == 86 * 8 * MIB
    assert new.outside_budget_bytes == CUDA_CONTEXT_BYTES
    assert new.cache_bytes < old.cache_bytes


def test_utilization_counts() -> None:
    """The share is the one asked for, else the engine's own: 0.92 of the card under today's vLLM."""
    assert budget_of(real.NEMO, 0, "vllm", WSL).share_bytes == int(0.92 * WSL.reported_bytes)
    assert budget_of(real.NEMO, 0, "vllm", WSL, gpu_memory_utilization=0.5).share_bytes == int(0.5 * WSL.reported_bytes)


def test_several_gpus_talk() -> None:
    """Tensor parallelism costs every GPU buffers for communication."""
    one, two = (budget_of(real.NEMO, 0, "vllm", WSL, tp=tp) for tp in (1, 2))
    assert two.other_bytes > one.other_bytes


def test_sglang_keeps_a_reserve() -> None:
    """SGLang's fraction leaves 512 + 1.5 x 2,048 + 2 x 8 + 128 MiB of a 16 GB card free of weights and cache."""
    gpu = Gpu(15851 * MIB)
    assert sglang_reserve(gpu.reported_bytes, 1) == (512 + 3072 + 16 + 128) * MIB
    budget = budget_of(real.NEMO, 0, "sglang", gpu)
    assert budget.share_bytes == int(
        (gpu.reported_bytes - CUDA_CONTEXT_BYTES) * (1 - sglang_reserve(gpu.reported_bytes, 1) / gpu.reported_bytes)
    )
    assert budget_of(real.NEMO, 0, "sglang", gpu, gpu_memory_utilization=0.8).share_bytes == int(
        (gpu.reported_bytes - CUDA_CONTEXT_BYTES) * 0.8
    )
    assert sglang_reserve(80 * GIB, 4) == (512 + 12288 + 1024 + 512) * MIB


@pytest.mark.parametrize(
    ("gib", "card", "batch"),
    [(15.48, None, (2048, 256)), (79.2, "H100", (8192, 1024)), (79.1, "A100 80GB", (2048, 256))],
)
def test_batches_follow_the_card(gib: float, card: str | None, batch: tuple[int, int]) -> None:
    """From 70 GiB on vLLM serves larger batches, but not on an A100."""
    assert batch_defaults(int(gib * GIB), card) == batch


@pytest.mark.parametrize(("sequences", "graphs"), [(256, 51 + 35), (1024, 51 + 51), (128, 35 + 19), (1, 2 + 1)])
def test_graphs_are_counted_as_in_logs(sequences: int, graphs: int) -> None:
    """vLLM's logs: PIECEWISE=51 (largest=512), FULL=35 (largest=256); PIECEWISE=35, FULL=19 for 128 sequences."""
    assert graph_count(sequences, 2048) == graphs


YARN: dict[str, Any] = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LINEAR: dict[str, Any] = {"rope_type": "linear", "factor": 8.0}
POSITIONS: list[tuple[dict[str, Any], int | None]] = [
    ({"max_position_embeddings": 4096}, 4096),
    ({"max_position_embeddings": None}, None),
    (
        {
            "max_position_embeddings": 40960,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        },
        131072,
    ),
    ({"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 131072),
    ({"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "longrope", "factor": 32.0}}, 131072),
    ({"max_position_embeddings": 4096, "rope_scaling": LINEAR}, 32768),
    ({"max_position_embeddings": 4096, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, 8192),
    ({"max_position_embeddings": 4096, "rope_parameters": {"full_attention": LINEAR}}, 32768),
    ({"max_position_embeddings": 40960, "rope_parameters": {"full_attention": YARN}}, 131072),
    ({"max_position_embeddings": 4096, "rope_scaling": {"rope_type": "linear", "factor": None}}, 4096),
    ({"max_position_embeddings": 131072, "model_type": "gemma3_text", "rope_scaling": LINEAR}, 131072),
]


@pytest.mark.parametrize(("change", "positions"), POSITIONS)
def test_positions(change: dict[str, Any], positions: int | None) -> None:
    """The longest context is the config's, or what YaRN, linear or dynamic scaling make of it, as in vLLM."""
    assert max_positions({**real.QWEN3_32B, **change}) == positions


TABLES: list[tuple[dict[str, Any], int]] = [
    (real.NEMO, 1),
    (real.GEMMA3_27B, 2),
    (real.NEMO | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 1),
    (real.NEMO | {"rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_theta": 1e4}}}, 2),
    (real.NEMO | {"rope_parameters": {"full_attention": YARN, "sliding_attention": YARN}}, 1),
    (
        real.NEMO
        | {
            "rope_parameters": {"full_attention": YARN, "sliding_attention": {}},
            "layer_types": ["full_attention"] * 40,
        },
        1,
    ),
]


@pytest.mark.parametrize(("config", "tables"), TABLES)
def test_a_table_for_each_setting_of_rotary_embeddings(config: dict[str, Any], tables: int) -> None:
    """Types of layers with other rotary settings have tables of their own; vLLM 0.24 loaded Gemma 3's two."""
    assert rotary_tables(config) == tables
    widths = read_widths(config, read_cache(config))
    assert rotary_bytes(widths) == tables * 2 * widths.positions * widths.rotary


def test_weights_of_gemma_as_they_were_served() -> None:
    """Gemma 3 270M in FP8 blocks: vLLM 0.24 on an H100 took 0.44 GiB, in two digits, for weights and tables."""
    gemma = real.GEMMA3_27B["text_config"] | {"head_dim": 256, "max_position_embeddings": 32768}
    widths = read_widths(gemma, read_cache(gemma))
    assert 435_938_512 + rotary_bytes(widths) == pytest.approx(0.44 * 2**30, abs=0.005 * 2**30)
