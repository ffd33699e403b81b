"""Blocks of a paged cache against vLLM's own code: the same groups, block sizes and bytes for real models."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from helpers import real_configs as real
from helpers.sparse_models import DEEPSEEK_V3, MINIMAX_M2
from snugfit.vram.blocks import make_pool
from snugfit.vram.kv_cache import AttentionCache, ModelCache
from snugfit.vram.kv_cache_config import read_cache

pytestmark = pytest.mark.engine

MODELS: dict[str, dict[str, Any]] = {
    "Nemo": real.NEMO,
    "MiniMax-M2": MINIMAX_M2,
    "DeepSeek-V3": DEEPSEEK_V3,
    "Mistral-7B-v0.1": real.MISTRAL_7B_V01,
    "Gemma-2-9B": real.GEMMA2_9B,
    "Gemma-3-4B": real.GEMMA3_4B,
    "Gemma-3-27B": real.GEMMA3_27B,
    "Gemma-4": {"model_type": "gemma4_text", "num_hidden_layers": 30, "hidden_size": 2304},
    "Gemma-3n": real.GEMMA3N_E4B,
    "gpt-oss": real.GPT_OSS_120B,
    "Llama-4": real.LLAMA4_SCOUT,
    "Qwen3-Next": real.QWEN3_NEXT_80B,
    "Granite-4-H": real.GRANITE4_H_SMALL,
    "Jamba": real.JAMBA_MINI,
    "uneven": {**real.NEMO, "model_type": "cohere2", "num_hidden_layers": 33, "sliding_window": 4096},
}
LENGTHS = (1000, 32768, 131072)
BATCHES = (2048, 8192)

# runs where vLLM is: layers of each case -> groups, bytes of a block, bytes of one sequence
SCRIPT = """
import json, sys
from types import SimpleNamespace as Space
import torch
from vllm.v1 import kv_cache_interface as specs
from vllm.v1.core import kv_cache_utils as utils
from vllm.v1.kv_cache_layout import KVCacheLayout

def spec(layer, case):
    block, half = case["block"], torch.bfloat16
    if layer["kind"] == "state":
        block = case["length"] if case["mode"] == "none" else block
        return specs.MambaSpec(block_size=block, shapes=((layer["bytes"] // 2,),), dtypes=(half,),
                               page_size_padded=layer["page"], mamba_cache_mode=case["mode"])
    shape = dict(block_size=block, num_kv_heads=layer["heads"], head_size=layer["width"], dtype=half)
    if layer["kind"] == "window":
        return specs.SlidingWindowSpec(**shape, sliding_window=layer["window"])
    if layer["kind"] == "chunk":
        return specs.ChunkedLocalAttentionSpec(**shape, attention_chunk_size=layer["window"])
    return (specs.MLAAttentionSpec if layer["kind"] == "latent" else specs.FullAttentionSpec)(**shape)

found = []
for case in json.load(open(sys.argv[1])):
    config = Space(
        scheduler_config=Space(disable_hybrid_kv_cache_manager=False), max_in_flight_tokens=case["batch"],
        cache_config=Space(get_resolved_kv_cache_layout=lambda: KVCacheLayout["LBNHC"], mamba_cache_mode=case["mode"],
                           num_gpu_blocks_override=None),
        model_config=Space(max_model_len=case["length"]), attention_config=Space(hisparse_config=None),
        parallel_config=Space(decode_context_parallel_size=1, tensor_parallel_size=1), speculative_config=None)
    groups = utils.get_kv_cache_groups(config, {f"layer.{i}": spec(l, case) for i, l in enumerate(case["layers"])})
    found.append([len(groups), utils._pool_bytes_per_block(config, groups),
                  utils._max_memory_usage_bytes_from_groups(config, groups)])
json.dump(found, open(sys.argv[2], "w"))
"""


def described(attention: AttentionCache) -> dict[str, Any]:
    """A layer's attention as the script takes it."""
    kind = "latent" if attention.latent else "full" if attention.window is None else "window"
    kind = "chunk" if attention.chunked else kind
    return {"kind": kind, "heads": attention.kv_heads, "width": attention.key_dim, "window": attention.window}


def layers_of(cache: ModelCache, page: int) -> list[dict[str, Any]]:
    """All layers as the script takes them, states padded to a page."""
    found = []
    for attention, state in cache.layers:
        found += [described(attention)] if attention else []
        found += [{"kind": "state", "bytes": state.bytes(), "page": page}] if state else []
    return found


def test_blocks_are_those_of_vllm(tmp_path: Path) -> None:
    """For windows, chunks, latents, states and mixes vLLM forms the same groups and needs the same bytes, exactly."""
    python = os.environ.get("SNUGFIT_VLLM_PYTHON")
    assert python, "SNUGFIT_VLLM_PYTHON names a Python with vLLM: run `make engine`"
    cases, computed, names = [], [], []
    for name, config in MODELS.items():
        cache = read_cache(config)
        for batch in BATCHES:
            for mode, copies in (("none", 1), ("align", 2)) if cache.states else (("none", 1),):
                pool = make_pool(cache, max_num_batched_tokens=batch, state_blocks=copies)
                # with states the first group is attention's, whose blocks were made long
                block = pool.groups[0].block_tokens if cache.states else 16
                page = block * cache.attention[0].bytes_per_token()
                for length in LENGTHS:
                    case = {"layers": layers_of(cache, page), "block": block, "batch": batch}
                    cases.append({**case, "mode": mode, "length": length})
                    computed.append([len(pool.groups), pool.block_bytes, pool.blocks(length) * pool.block_bytes])
                    names.append(f"{name}, {length} tokens, batch {batch}, {mode}")
    (tmp_path / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    command = [python, str(tmp_path / "script.py"), str(tmp_path / "cases.json"), str(tmp_path / "found.json")]
    subprocess.run(command, check=True, capture_output=True)
    in_vllm = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert dict(zip(names, computed, strict=True)) == dict(zip(names, in_vllm, strict=True))


# runs where vLLM is: layers, kept layers, heads, width -> tokens and bytes of a block, bytes of one sequence
MIXED = """
import contextlib, json, sys
from types import SimpleNamespace as Space
import torch
import vllm.config.vllm as vllm_config
from vllm.platforms.interface import Platform
from vllm.v1 import kv_cache_interface as specs
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.core import kv_cache_utils as utils
from vllm.v1.kv_cache_layout import KVCacheLayout

vllm_config.set_current_vllm_config = lambda *_, **__: contextlib.nullcontext()
backend = Space(get_supported_kernel_block_sizes=lambda: [MultipleOf(16)], customize_spec=lambda spec: spec)
found = []
for case in json.load(open(sys.argv[1])):
    cache = Space(cache_dtype="fp8", kv_cache_dtype_skip_layers=list(map(str, case["kept"])), block_size=16,
                  mamba_page_size_padded=None, skip_page_size_padded=None, mamba_cache_mode="none",
                  get_resolved_kv_cache_layout=lambda: KVCacheLayout["LBNHC"], num_gpu_blocks_override=None)
    model = Space(dtype=torch.bfloat16, get_num_kv_heads=lambda _: case["heads"], get_head_size=lambda: case["width"],
                  max_model_len=case["length"])
    config = Space(
        scheduler_config=Space(disable_hybrid_kv_cache_manager=False), max_in_flight_tokens=2048, cache_config=cache,
        model_config=model, attention_config=Space(hisparse_config=None), speculative_config=None,
        parallel_config=Space(decode_context_parallel_size=1, tensor_parallel_size=1))
    Platform._align_heterogeneous_kv_block_size(config, backend)
    layers = {
        f"layer.{i}": specs.FullAttentionSpec(
            block_size=cache.block_size, num_kv_heads=case["heads"], head_size=case["width"],
            dtype=torch.bfloat16 if i in case["kept"] else torch.uint8)
        for i in range(case["layers"])
    }
    groups = utils.get_kv_cache_groups(config, layers)
    found.append([len(groups), cache.block_size, utils._pool_bytes_per_block(config, groups),
                  utils._max_memory_usage_bytes_from_groups(config, groups)])
json.dump(found, open(sys.argv[2], "w"))
"""


def test_layers_that_keep_16_bits_are_those_of_vllm(tmp_path: Path) -> None:
    """With `--kv-cache-dtype-skip-layers` beside an FP8 cache vLLM makes the same blocks and needs the same bytes."""
    python = os.environ.get("SNUGFIT_VLLM_PYTHON")
    assert python, "SNUGFIT_VLLM_PYTHON names a Python with vLLM: run `make engine`"
    cases: list[dict[str, Any]] = []
    computed = []
    for config in (real.NEMO, real.LLAMA_8B, real.LLAMA_70B):
        cache = read_cache(config)
        one = cache.attention[0]
        for kept in ([0], [0, 5, 7], list(range(len(cache.layers) // 2))):
            pool = make_pool(cache, max_num_batched_tokens=2048, fp8=True, kept_layers=kept)
            for length in LENGTHS:
                shape = {"layers": len(cache.layers), "heads": one.kv_heads, "width": one.key_dim}
                cases.append({**shape, "kept": kept, "length": length})
                block = pool.groups[0].block_tokens
                computed.append([1, block, pool.block_bytes, pool.blocks(length) * pool.block_bytes])
    (tmp_path / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    (tmp_path / "script.py").write_text(MIXED, encoding="utf-8")
    command = [python, str(tmp_path / "script.py"), str(tmp_path / "cases.json"), str(tmp_path / "found.json")]
    subprocess.run(command, check=True, capture_output=True)
    assert json.loads((tmp_path / "found.json").read_text(encoding="utf-8")) == computed
