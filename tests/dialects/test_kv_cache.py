"""Scales of an FP8 KV cache: which modules have them, how they are written, and that reading gives them back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import TINY, MakeTiny
from helpers.errors import raises
from snugfit.dialects.compressed_tensors import kv_encode, kv_layout, quantization_config
from snugfit.dialects.dialect import open_dialect
from snugfit.engines.kv_cache import attention_modules
from snugfit.formats.spec import TensorFormat
from snugfit.model import emulate
from snugfit.storage.open import open_checkpoint

ATTENTION = "model.layers.0.self_attn"
UP = {"model.layers.0.mlp.up_proj": TensorFormat("fp8-dynamic")}


def names_of(kind: str, **config: Any) -> list[list[str]]:
    """Names of the tensors of each decoder layer of a family, as transformers has them."""
    settings = AutoConfig.for_model(kind, **{**TINY, "num_hidden_layers": 2, "pad_token_id": 0, **config})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings)
    names = list(model.state_dict())
    return [[name for name in names if name.startswith(f"model.layers.{k}.")] for k in range(2)]


# which modules


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma3_text", "phi3", "glm4", "glm", "olmo2", "mixtral"])
def test_every_attention_has_a_cache(kind: str) -> None:
    """Plain and fused projections stand for keys and values, in dense models and in mixtures."""
    more = {"head_dim": 16} if kind in ("qwen3", "gemma3_text", "glm4", "glm") else {}
    found = attention_modules(names_of(kind, **more), {}, where="here")
    assert found == ["model.layers.0.self_attn", "model.layers.1.self_attn"]


def test_linear_attention_has_none() -> None:
    """A layer of Qwen3-Next's linear attention keeps no keys, the one of full attention does."""
    found = attention_modules(names_of("qwen3_next", layer_types=["linear_attention", "full_attention"]), {}, where="")
    assert found == [None, "model.layers.1.self_attn"]


@pytest.mark.parametrize("sibling", ["A_log", "k_conv1d.weight", "conv1d.weight", "output_gate.weight", "dt_bias"])
def test_projections_of_a_recurrent_state_are_no_keys(sibling: str) -> None:
    """k_proj or qkv_proj beside what only linear attention has is not taken for a cache."""
    names = [f"{ATTENTION}.{name}" for name in ("k_proj.weight", "qkv_proj.weight", sibling)]
    assert attention_modules([names, ["model.layers.1.mamba.in_proj.weight"]], {}, where="") == [None, None]


@pytest.mark.parametrize(
    ("names", "config", "named"),
    [
        (["self_attn.kv_a_proj_with_mqa.weight", "self_attn.kv_b_proj.weight"], {}, "latent (MLA)"),
        (["attention.query_key_value.weight"], {}, "not named self_attn"),
        (["self_attn.k_proj.weight", "cross_attn.self_attn.k_proj.weight"], {}, "in one layer"),
        (["self_attn.k_proj.weight"], {"num_kv_shared_layers": 1}, "share keys"),
    ],
)
def test_where_vllm_would_lose_scales_the_recipe_is_refused(
    names: list[str], config: dict[str, Any], named: str
) -> None:
    """Caches whose scales vLLM looks for under other names are an error with a remedy, not scales of 1 at run time."""
    with raises("format-unverified", "here") as caught:
        attention_modules([[f"model.layers.0.{name}" for name in names]], config, where="here")
    assert named in caught.value.what
    assert "`kv_cache`" in caught.value.remedy


# what is written


@pytest.mark.parametrize(("dtype", "written"), [("BF16", "BF16"), ("F16", "F32"), ("F32", "F32")])
def test_scales_are_those_of_the_library(dtype: str, written: str) -> None:
    """Two scales [1] a layer, the library's amax / 448 in the model's dtype; fp16 models get fp32 ones."""
    names = [f"{ATTENTION}.k_scale", f"{ATTENTION}.v_scale"]
    assert kv_layout(ATTENTION, dtype) == dict.fromkeys(names, (written, (1,)))
    scales = kv_encode(ATTENTION, (18.625, 3e-3), dtype)
    assert list(scales) == names
    args = QuantizationConfig.model_validate(quantization_config(UP, [], "fp8")).kv_cache_scheme
    for scale, amax in zip(scales.values(), (18.625, 3e-3), strict=True):
        assert (scale.dtype, scale.shape) == (torch.bfloat16 if written == "BF16" else torch.float32, (1,))
        high = torch.tensor([amax]).to(scale.dtype)
        theirs, _ = calculate_qparams(-high, high, args)
        assert torch.allclose(theirs.float(), scale.float(), rtol=2.0**-8 if written == "BF16" else 1e-6)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf"), 1e-44])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_no_scale_is_made_of_nothing(bad: float, dtype: str) -> None:
    """Zero, NaN, infinite and vanishing magnitudes of keys or values are errors that name the tensor."""
    with raises("amax-invalid", f"{ATTENTION}.k_scale"):
        kv_encode(ATTENTION, (bad, 1.0), dtype)
    with raises("amax-invalid", f"{ATTENTION}.v_scale"):
        kv_encode(ATTENTION, (1.0, bad), dtype)


def test_the_config_asks_for_it() -> None:
    """kv_cache_scheme is the library's: one static symmetric scale in E4M3; without it the config asks for nothing."""
    config = json.loads(json.dumps(quantization_config(UP, ["lm_head"], "fp8")))
    expected = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    assert config["kv_cache_scheme"] == expected
    read = QuantizationConfig.model_validate(config).kv_cache_scheme
    assert (read.num_bits, read.type, read.strategy, read.dynamic) == (8, "float", "tensor", False)
    assert open_dialect({"quantization_config": config}).kv_cache_format() == "fp8"
    assert quantization_config(UP, ["lm_head"]) == config | {"kv_cache_scheme": None}


def test_reading_gives_what_was_written(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """The multipliers that the evaluation reads are those that were written, for every layer."""
    source = make_tiny("llama")
    tensors = load_file(source / "model.safetensors")
    written = {k: kv_encode(f"model.layers.{k}.self_attn", (1.0 + k, 0.5 + k), "BF16") for k in range(3)}
    for scales in written.values():
        tensors |= scales
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    opened = open_checkpoint(tmp_path)
    for k, scales in written.items():
        found = emulate.read_kv_scales(opened, f"model.layers.{k}")
        assert [float(scale) for scale in found] == [float(scale) for scale in scales.values()]
