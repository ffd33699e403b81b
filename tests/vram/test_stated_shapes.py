"""Caches whose shapes a config states under keys of one family: heads of Step-3.5, indexes of GLM-5, blocks of FP8."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.errors import raises
from snugfit.formats.spec import TensorFormat
from snugfit.vram.kv_cache_config import read_cache
from snugfit.vram.weights import split_error

# of Step-3.5-Flash's config.json, four layers of 45
STEP: dict[str, Any] = {
    "model_type": "step3p5",
    "hidden_size": 4096,
    "num_hidden_layers": 4,
    "num_attention_heads": 64,
    "num_attention_groups": 8,
    "head_dim": 128,
    "sliding_window": 512,
    "layer_types": ["full_attention", *["sliding_attention"] * 3, "full_attention"],
}
GLM: dict[str, Any] = {"model_type": "glm_moe_dsa", "num_hidden_layers": 6, "num_attention_heads": 64}
BLOCK = TensorFormat("fp8-block")


def test_step_has_groups_for_heads() -> None:
    """num_attention_groups are Step-3.5's KV heads: 8 heads of 128 keys and values, not 64."""
    cache = read_cache(STEP)
    assert [(a.kv_heads, a.key_dim, a.window) for a in cache.attention] == [(8, 128, None), *[(8, 128, 512)] * 3]
    assert cache.attention[0].bytes_per_token(fp8=False, tp=1) == 2 * 8 * 2 * 128
    assert not cache.notes


def test_layers_of_one_type_have_their_own_heads() -> None:
    """attention_other_setting states heads and their width for layers of one type (vLLM: step3p5.py)."""
    other = {
        "attention_type": "sliding_attention",
        "num_attention_heads": 96,
        "num_attention_groups": 4,
        "head_dim": 64,
    }
    cache = read_cache({**STEP, "attention_other_setting": other})
    assert [(a.kv_heads, a.key_dim) for a in cache.attention] == [(8, 128), *[(4, 64)] * 3]


@pytest.mark.parametrize(
    ("change", "indexed"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"indexer_types": ["full", "shared", "shared", "full", "shared", "full"]}, [0, 3, 5]),
        ({"index_topk_pattern": "FSFSSS"}, [0, 2]),
        ({"index_topk_freq": 4}, [0, 1, 5]),
        ({"index_topk_freq": 2, "index_skip_topk_offset": 1}, [0, 2, 4]),
    ],
)
def test_shared_indexers_keep_no_keys(change: dict[str, Any], indexed: list[int]) -> None:
    """Only layers with an indexer of their own keep its keys, by the rule of transformers' own config class."""
    from transformers import GlmMoeDsaConfig

    config = GlmMoeDsaConfig(**{k: v for k, v in {**GLM, **change}.items() if k != "model_type"})
    assert [n for n, kind in enumerate(config.indexer_types or []) if kind == "full"] == indexed
    cache = read_cache({**GLM, **change})
    assert [n for n, a in enumerate(cache.attention) if a.index_bytes] == indexed
    sizes = {a.bytes_per_token(fp8=False, tp=1) for n, a in enumerate(cache.attention) if n in indexed}
    assert sizes == {2 * (512 + 64) + 128 + 4}


def test_layers_that_share_keys_and_values_keep_none() -> None:
    """Hunyuan-Large: every second of its 64 layers keeps 8 heads of 128 keys and values, the others use those.

    The sizes are those of tencent/Tencent-Hunyuan-Large's config.json: 6400 hidden, 80 heads, attention_head_dim 128.
    """
    large: dict[str, Any] = {"model_type": "hunyuan", "num_hidden_layers": 64, "num_attention_heads": 80}
    large |= {"hidden_size": 6400, "num_key_value_heads": 8, "attention_head_dim": 128}
    large |= {"use_cla": True, "cla_share_factor": 2}
    cache = read_cache(large)
    assert [number for number, (attention, _) in enumerate(cache.layers) if attention] == list(range(0, 64, 2))
    assert cache.size(tp=1).bytes_per_token == 32 * 2 * 8 * 128 * 2
    assert cache.size(tp=8).bytes_per_token == 32 * 2 * 1 * 128 * 2
    assert any("use_cla" in note for note in cache.notes)


@pytest.mark.parametrize(
    ("change", "keeping"),
    [
        ({"cla_share_factor": 2}, [0, 2, 4]),
        ({"cla_share_factor": 3}, [0, 3]),
        ({"cla_share_factor": 4}, [0, 4]),
        ({"cla_share_factor": 1}, [0, 1, 2, 3, 4]),
        ({}, [0, 1, 2, 3, 4]),  # vLLM's default for the factor is 1
        ({"use_cla": False, "cla_share_factor": 2}, [0, 1, 2, 3, 4]),
    ],
)
def test_which_layers_share(change: dict[str, Any], keeping: list[int]) -> None:
    """The layers with keys and values are those whose number the factor divides (vLLM: hunyuan_v1.py)."""
    hunyuan: dict[str, Any] = {"model_type": "hunyuan_v1_moe", "num_hidden_layers": 5, "num_attention_heads": 4}
    cache = read_cache({**hunyuan, "hidden_size": 64, "use_cla": True, **change})
    assert [number for number, (attention, _) in enumerate(cache.layers) if attention] == keeping
    assert any("use_cla" in note for note in cache.notes) == (len(keeping) < 5)


def test_a_factor_that_is_no_number_is_refused() -> None:
    """A cla_share_factor that is no whole number is an error of the config."""
    with raises("config-invalid"):
        read_cache({"model_type": "hunyuan", "num_hidden_layers": 4, "use_cla": True, "cla_share_factor": "2"})


@pytest.mark.parametrize(
    ("name", "rows", "tp", "refused"),
    [
        ("model.layers.0.mlp.experts.0.gate_proj.weight", 192, 1, True),
        ("model.layers.0.mlp.experts.0.up_proj.weight", 192, 1, True),
        ("model.layers.0.block_sparse_moe.experts.0.w1.weight", 192, 1, True),
        ("model.layers.0.mlp.experts.0.gate_proj.weight", 256, 1, False),
        ("model.layers.0.mlp.experts.0.gate_proj.weight", 384, 2, True),
        ("model.layers.0.mlp.gate_proj.weight", 192, 1, True),
        ("model.layers.0.mlp.up_proj.weight", 192, 1, False),  # the last of a joined matrix may end within a block
        ("model.layers.0.self_attn.q_proj.weight", 192, 1, True),
        ("model.layers.0.self_attn.q_a_proj.weight", 192, 1, True),
        ("model.layers.0.self_attn.o_proj.weight", 192, 1, False),
        ("model.visual.blocks.0.mlp.gate_proj.weight", 192, 1, False),
    ],
)
def test_fp8_blocks_that_engines_join(name: str, rows: int, tp: int, *, refused: bool) -> None:
    """vLLM joins gate and up, q and k, on one GPU too, and refuses blocks that end in the next one (fp8_utils.py)."""
    assert (split_error(name, (rows, 256), BLOCK, tp) is not None) is refused
    assert split_error(name, (rows, 256), TensorFormat("fp8-dynamic"), 1) is None


@pytest.mark.parametrize("leaf", ["k_proj", "v_proj"])
@pytest.mark.parametrize(
    ("head", "kv_heads", "tp", "refused"),
    [
        (64, 8, 1, False),
        (64, 8, 2, False),
        (64, 8, 4, False),
        (64, 8, 8, True),  # one head of 64 a GPU
        (64, 2, 4, True),  # the same, a copy on two GPUs each
        (128, 8, 8, False),
        (128, 2, 8, False),
        (192, 4, 2, False),
        (192, 4, 4, True),
    ],
)
def test_fp8_blocks_of_keys_and_values(leaf: str, head: int, kv_heads: int, tp: int, *, refused: bool) -> None:
    """Split over GPUs, keys and values of each GPU must be whole blocks too (fp8_utils.py: is_tp_split)."""
    name, shape = f"model.layers.0.self_attn.{leaf}.weight", (kv_heads * head, 256)
    assert (split_error(name, shape, BLOCK, tp, kv_heads) is not None) is refused
    assert split_error(name, shape, TensorFormat("fp8-dynamic"), tp, kv_heads) is None
    assert split_error(name, shape, None, tp, kv_heads) is None
