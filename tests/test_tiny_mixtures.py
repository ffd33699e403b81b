"""Tests of the helpers: tiny mixtures load and route, and transformers reads the FP8 and MXFP4 made of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import MakeTiny
from helpers.fp8_sources import KINDS, Kind, as_fp8, as_mxfp4, dequantized
from helpers.tiny_families import all_tensors, load, random_rows, same
from helpers.tiny_mixtures import MIXTURES, make_mixture

# experts of these are a stack in one tensor of a file, [E, ...] or E blocks of rows
EXPERT_STACKS = re.compile(r"\.(input_linear\.weight|output_linear\.weight|gate_up_proj|down_proj|[wv][12])$")


def loaded(path: Path) -> tuple[Any, dict[str, Any]]:
    """A model directory as transformers loads it, and its report on keys."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(path)
    auto = AutoModelForCausalLM if config.get_text_config() is config else AutoModelForImageTextToText
    model, keys = auto.from_pretrained(path, dtype="auto", output_loading_info=True)
    return model.eval(), keys


@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
@pytest.mark.parametrize("family", MIXTURES)
@torch.no_grad()
def test_mixture_loads_in_transformers(family: str, wide: bool, tmp_path: Path) -> None:
    """Every tensor of the files has its place, and finite logits follow the input."""
    model, keys = loaded(make_mixture(family, tmp_path, wide=wide))
    layers = model.config.get_text_config().num_hidden_layers
    unexpected = [key for key in keys["unexpected_keys"] if not key.startswith(f"model.layers.{layers}.")]
    assert not unexpected
    assert bool(keys["unexpected_keys"]) == (family == "deepseek_v3")
    assert not keys["missing_keys"]
    assert not keys["mismatched_keys"]
    first, second = model(input_ids=torch.tensor(random_rows([24, 24])), use_cache=False).logits
    assert torch.isfinite(first).all()
    assert 0.05 < float(first.float().std()) < 5
    assert (first - second).abs().max() > 0.5


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_differ(family: str, tmp_path: Path) -> None:
    """No two experts of a file have the same weights."""
    tensors = all_tensors(make_mixture(family, tmp_path))
    experts = [tensor for name, tensor in tensors.items() if re.search(r"\.experts\.\d+\.", name)]
    for name, tensor in tensors.items():
        if re.search(r"moe|experts|mlp\.(in|out)put_linear", name) and EXPERT_STACKS.search(name):
            experts += tensor if tensor.dim() == 3 else tensor.chunk(4)
    assert len(experts) >= 2 * 4 * 2
    assert len({tuple(expert.flatten()[:64].tolist()) for expert in experts}) == len(experts)


def test_options_of_make_mixture(tmp_path: Path) -> None:
    """Width of experts, shard size, seed and settings of the config have the effect that they should."""
    path = make_mixture("qwen3_moe", tmp_path / "a", inner=192, max_shard_size="200KB", seed=1, num_experts=5)
    assert len(list(path.glob("*.safetensors"))) > 1
    tensors = all_tensors(path)
    assert tensors["model.layers.1.mlp.experts.4.down_proj.weight"].shape == (64, 192)
    assert "model.layers.1.mlp.experts.5.down_proj.weight" not in tensors
    again = all_tensors(make_mixture("qwen3_moe", tmp_path / "b", inner=192, seed=1, num_experts=5))
    assert all(same(tensors[name], again[name]) for name in tensors)
    other = all_tensors(make_mixture("qwen3_moe", tmp_path / "c", inner=192, num_experts=5))
    assert not same(other["lm_head.weight"], tensors["lm_head.weight"])


def test_prediction_layer(tmp_path: Path) -> None:
    """DeepSeek's layer of multi-token prediction is a layer of experts with norms, projection, embeddings and head."""
    path = make_mixture("deepseek_v3", tmp_path)
    assert json.loads((path / "config.json").read_text())["num_nextn_predict_layers"] == 1
    tensors = all_tensors(path)
    leaves = {
        layer: {name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
        for layer, prefix in ((layer, f"model.layers.{layer}.") for layer in (1, 2))
    }
    assert leaves[2] - leaves[1] == {
        f"{leaf}.weight"
        for leaf in ("enorm", "hnorm", "eh_proj", "embed_tokens", "shared_head.norm", "shared_head.head")
    }
    assert leaves[1] <= leaves[2]
    assert same(tensors["model.layers.2.shared_head.head.weight"], tensors["lm_head.weight"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "mixtral", "deepseek_v3"])
def test_fp8_is_near_its_source(family: str, kind: Kind, tmp_path: Path, make_tiny: MakeTiny) -> None:
    """Each weight in FP8 is within half a step of the 16-bit one, and all others are those of the source."""
    source = make_tiny(family) if family == "llama" else make_mixture(family, tmp_path / "source", wide=True, inner=192)
    target = as_fp8(source, tmp_path / "target", kind)
    given, stored, meant = all_tensors(source), all_tensors(target), dequantized(target)
    assert meant.keys() == given.keys()
    quantized = {name for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn}
    for name, tensor in given.items():
        if name not in quantized:
            assert same(stored[name], tensor)
            continue
        scale = stored.get(name + "_scale", stored.get(name + "_scale_inv"))
        assert scale is not None
        # three bits of mantissa; half of the smallest step; what a rounded scale clips
        clipped = 448 * 2.0**-8 if scale.dtype == torch.bfloat16 else 0.0
        bound = torch.maximum(tensor.float().abs() * 2.0**-4, scale.float().max() * max(2.0**-10, clipped))
        assert ((meant[name] - tensor.float()).abs() <= bound * 1.0001).all()
        assert float(stored[name].float().abs().max()) > 400
    linears = {name for name, tensor in given.items() if tensor.dim() == 2 and ".layers." in name}
    outside = {name for name in linears - quantized if not re.search(r"gate\.|embed|eh_proj|shared_head", name)}
    assert not outside
    assert not [name for name in quantized if re.search(r"\.gate\.|lm_head|embed|eh_proj", name)]


def test_fp8_with_kept_weights(tmp_path: Path) -> None:
    """A weight for which `keep` is true stays in 16 bits, and the config lists it."""
    source = make_mixture("qwen3_moe", tmp_path / "source")
    kept = "model.layers.0.self_attn.q_proj"
    target = as_fp8(source, tmp_path / "target", "hf-block", lambda name: name == f"{kept}.weight")
    assert all_tensors(target)[f"{kept}.weight"].dtype == torch.bfloat16
    config = json.loads((target / "config.json").read_text())["quantization_config"]
    assert {kept, "lm_head", "model.layers.0.mlp.gate"} <= set(config["modules_to_not_convert"])
    assert "model.layers.0.self_attn.k_proj" not in config["modules_to_not_convert"]


@pytest.mark.parametrize("kind", ["hf-block", "hf-block-bf16", "hf-tensor-inv"])
@torch.no_grad()
def test_transformers_reads_fp8(kind: Kind, tmp_path: Path) -> None:
    """transformers' model of an FP8 file has the weights that `dequantized` gives, in its 16 bits."""
    target = as_fp8(make_mixture("qwen3_moe", tmp_path / "source", wide=True), tmp_path / "target", kind)
    model, keys = loaded(target)
    assert not keys["missing_keys"]
    assert not keys["unexpected_keys"]
    meant, weights = dequantized(target), dict(model.named_parameters())
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(weights[name], meant[name].bfloat16())
    experts = "model.layers.1.mlp.experts"
    both = torch.cat([meant[f"{experts}.3.{leaf}_proj.weight"] for leaf in ("gate", "up")])
    assert torch.equal(weights[f"{experts}.gate_up_proj"][3], both.bfloat16())


@pytest.mark.parametrize("kind", ["ct-channel", "ct-tensor-static", "ct-block"])
@torch.no_grad()
def test_compressed_tensors_reads_fp8(kind: Kind, tmp_path: Path, make_tiny: MakeTiny) -> None:
    """The library's own decompression of an FP8 file gives what `dequantized` gives, in 16 bits."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    target = as_fp8(make_tiny("llama", hidden_size=128), tmp_path, kind)
    settings = CompressedTensorsConfig(run_compressed=False)
    model = AutoModelForCausalLM.from_pretrained(target, dtype="auto", quantization_config=settings)
    meant, weights = dequantized(target), dict(model.named_parameters())
    for leaf in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"):
        name = f"model.layers.1.{leaf}.weight"
        assert torch.allclose(weights[name].float(), meant[name], rtol=2.0**-7, atol=0)


@torch.no_grad()
def test_mxfp4_is_as_transformers_reads_it(tmp_path: Path) -> None:
    """Blocks and scales have the shapes of the release, and transformers unpacks them to the same values."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    source = make_mixture("gpt_oss", tmp_path / "source")
    target = as_mxfp4(source, tmp_path / "target")
    given, stored, meant = all_tensors(source), all_tensors(target), dequantized(target)
    assert meant.keys() == given.keys()
    experts = "model.layers.1.mlp.experts"
    assert stored[f"{experts}.gate_up_proj_blocks"].shape == (4, 256, 2, 16)
    assert stored[f"{experts}.gate_up_proj_scales"].shape == (4, 256, 2)
    assert stored[f"{experts}.down_proj_blocks"].shape == (4, 64, 4, 16)
    for leaf in ("gate_up_proj", "down_proj"):
        name = f"{experts}.{leaf}"
        blocks, scales = stored[f"{name}_blocks"], stored[f"{name}_scales"]
        assert blocks.dtype == scales.dtype == torch.uint8
        unpacked = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        assert torch.equal(unpacked, meant[name])
        assert same(stored[f"{name}_bias"], given[f"{name}_bias"])
        error = (meant[name] - given[name].float()).norm() / given[name].float().norm()
        assert 0.05 < float(error) < 0.15
    model = load(target)
    assert torch.equal(
        dict(model.named_parameters())[f"{experts}.gate_up_proj"], meant[f"{experts}.gate_up_proj"].bfloat16()
    )
