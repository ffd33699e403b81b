"""Tensors that a model uses and that are stored narrower than 16 bits: decoded, or refused, and never cast.

The oracle is the same model with the tensor dequantized by hand in its place.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import MakeTiny
from helpers.errors import raises
from helpers.fp8_sources import as_fp8, dequantized
from helpers.tiny_families import all_tensors
from helpers.tiny_mixtures import make_mixture, rewrite
from snugfit.evaluation.evaluate import evaluate
from snugfit.evaluation.evaluated_model import open_model
from snugfit.inspection.inspect import inspect
from snugfit.planning.fit import fit
from snugfit.quantization.quantize import plan_quantization, quantize

EMBEDDINGS = "model.embed_tokens"
GROUP = {
    "targets": ["Embedding"],
    "format": "float-quantized",
    "weights": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False},
    "input_activations": None,
}


def channel_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 codes and one scale [N, 1] a row, by hand."""
    scale = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-6) / 448
    return (weight.float() / scale).to(torch.float8_e4m3fn), scale.bfloat16()


def changed(source: Path, target: Path, more: dict[str, Tensor], group: dict[str, Any] | None = None) -> Path:
    """A copy of a checkpoint with further or other tensors and, if given, a further config group."""
    shutil.copytree(source, target)
    rewrite(target, all_tensors(source) | more)
    if group is not None:
        config = json.loads((target / "config.json").read_text())
        config["quantization_config"]["config_groups"]["more"] = group
        (target / "config.json").write_text(json.dumps(config))
    return target


def perplexity(path: Path, rows: Path) -> float:
    record = evaluate([path], dataset=[rows], contexts=[48], noise_floor="none", device="cpu")
    return float(record.contexts[0].models[0].perplexity)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def fp8(request: pytest.FixtureRequest, make_tiny: MakeTiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama whose rows of embeddings have very different sizes, its linears in FP8."""
    source = make_tiny("llama", tie_word_embeddings=request.param)
    tensors = load_file(source / "model.safetensors")
    rows = torch.logspace(-1, 0.5, len(tensors[f"{EMBEDDINGS}.weight"]))[:, None]
    tensors[f"{EMBEDDINGS}.weight"] = (tensors[f"{EMBEDDINGS}.weight"] * rows).bfloat16()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    target = tmp_path_factory.mktemp("fp8") / "fp8"
    quantize(source, "fp8-dynamic", output_dir=target, device="cpu")
    return target


@pytest.fixture
def embeddings(fp8: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The embeddings in FP8 with their scale, and their dequantized values."""
    codes, scale = channel_codes(all_tensors(fp8)[f"{EMBEDDINGS}.weight"])
    stored = {f"{EMBEDDINGS}.weight": codes, f"{EMBEDDINGS}.weight_scale": scale}
    return stored, {f"{EMBEDDINGS}.weight": (codes.float() * scale.float()).bfloat16()}


def test_fp8_embeddings_are_decoded(
    fp8: Path, embeddings: tuple[dict[str, Tensor], dict[str, Tensor]], tmp_path: Path, token_rows: Path
) -> None:
    """Embeddings that a config group describes are evaluated as their values, and written in 16 bits."""
    stored, values = embeddings
    path, plain = changed(fp8, tmp_path / "codes", stored, GROUP), changed(fp8, tmp_path / "plain", values)
    assert perplexity(path, token_rows) == pytest.approx(perplexity(plain, token_rows), rel=1e-6)
    assert not inspect(path).problems
    for one in (path, plain):
        quantize(
            one,
            "nvfp4-fp8-hybrid-four-over-six",
            output_dir=tmp_path / f"{one.name}-out",
            dataset=[token_rows],
            device="cpu",
        )
    first, second = (all_tensors(tmp_path / f"{one.name}-out") for one in (path, plain))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8)) for name in first)
    assert {row.name: row.bytes for row in fit(path, "8GiB").rows if "hybrid" in row.name} == {
        row.name: row.bytes for row in fit(plain, "8GiB").rows if "hybrid" in row.name
    }


def test_undescribed_embeddings_are_refused(
    fp8: Path, embeddings: tuple[dict[str, Tensor], dict[str, Tensor]], tmp_path: Path, token_rows: Path
) -> None:
    """Codes that no config group describes, or that have no scale, are refused by every verb, not cast."""
    stored, _ = embeddings
    codes = {name: tensor for name, tensor in stored.items() if not name.endswith("scale")}
    cases = {"no group": (stored, None), "no scale": (codes, GROUP), "neither": (codes, None)}
    for name, (tensors, group) in cases.items():
        path = changed(fp8, tmp_path / name, tensors, group)
        with raises("quantization-invalid") as caught:
            perplexity(path, token_rows)
        assert EMBEDDINGS in str(caught.value)
        with raises("quantization-invalid"):
            plan_quantization(path, "nvfp4-fp8-hybrid-four-over-six", dataset=[token_rows])
        assert any(EMBEDDINGS in problem for problem in inspect(path).problems)
        assert any(EMBEDDINGS in note for note in fit(path, "8GiB").notes)


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale"])
@pytest.mark.parametrize("module", [EMBEDDINGS, "model.norm", "model.layers.1.input_layernorm"])
def test_a_scale_beside_plain_values_is_refused(
    module: str, suffix: str, fp8: Path, tmp_path: Path, token_rows: Path
) -> None:
    """A scale next to a tensor that needs none is no part of the model: the two do not belong together."""
    path = changed(fp8, tmp_path / "scale", {f"{module}.{suffix}": torch.ones(1)})
    for verb in (
        lambda: open_model(path),
        lambda: plan_quantization(path, "nvfp4-fp8-hybrid-four-over-six", dataset=[token_rows]),
    ):
        with raises("scale-invalid", where=path) as caught:
            verb()
        assert f"{module}.{suffix}" in caught.value.what


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("model.norm.weight", torch.float8_e4m3fn),
        ("model.layers.0.input_layernorm.weight", torch.float8_e5m2),
        ("model.layers.1.post_attention_layernorm.weight", torch.int8),
        ("model.embed_tokens.weight", torch.uint8),
        ("model.layers.0.self_attn.q_proj.bias", torch.float8_e4m3fn),
        ("model.layers.0.mlp.down_proj.bias", torch.int8),
    ],
)
def test_other_narrow_tensors_are_refused(
    name: str, dtype: torch.dtype, make_tiny: MakeTiny, tmp_path: Path, token_rows: Path
) -> None:
    """Norms, biases and embeddings in 8 bits are refused before any work, by an evaluation and by a dry run."""
    source = make_tiny("llama", attention_bias=True, mlp_bias=True)
    path = changed(source, tmp_path / "narrow", {name: all_tensors(source)[name].to(dtype)})
    for verb in (lambda: open_model(path), lambda: plan_quantization(path, "fp8-dynamic", dataset=[token_rows])):
        with pytest.raises(Exception) as caught:  # noqa: PT011 (one of several codes)
            verb()
        assert getattr(caught.value, "code", "") in ("dtype-unsupported", "quantization-invalid", "already-quantized")
        assert name.removesuffix(".weight") in str(caught.value)


@pytest.mark.parametrize("kind", ["hf-tensor", "ct-channel"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_an_fp8_router_is_decoded(family: str, kind: Any, tmp_path: Path, token_rows: Path) -> None:
    """A mixture's router in FP8 is evaluated as its values, and written in 16 bits, as vLLM builds it."""
    source = as_fp8(make_mixture(family, tmp_path / "source", wide=True), tmp_path / "plain", kind)
    tensors = all_tensors(source)
    stored: dict[str, Tensor] = {}
    for name in [name for name in tensors if name.endswith("mlp.gate.weight")]:
        codes, scale = channel_codes(tensors[name])
        if kind == "hf-tensor":
            scale = tensors[name].float().abs().max().reshape(1) / 448
            codes = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
        stored |= {name: codes, f"{name}_scale": scale}
    assert stored
    path = changed(source, tmp_path / "codes", stored)
    config = json.loads((path / "config.json").read_text())
    for key in ("ignore", "modules_to_not_convert"):
        if key in config["quantization_config"]:
            kept = [name for name in config["quantization_config"][key] if not name.endswith("mlp.gate")]
            config["quantization_config"][key] = kept
    (path / "config.json").write_text(json.dumps(config))
    values = {name: t.bfloat16() for name, t in dequantized(path).items() if name.endswith("mlp.gate.weight")}
    plain = changed(source, tmp_path / "values", values)
    assert perplexity(path, token_rows) == pytest.approx(perplexity(plain, token_rows), rel=1e-6)
    quantize(
        path,
        "fp8-int4-moe-absmax",
        output_dir=tmp_path / "out",
        dataset=[token_rows],
        device="cpu",
        allow_unverified=True,
    )
    written = all_tensors(tmp_path / "out")
    for name, tensor in values.items():
        assert torch.equal(written[name], tensor)
        assert f"{name}_scale" not in written
    assert all(
        name.removesuffix(".weight")
        in json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
        for name in values
    )
