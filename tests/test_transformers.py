"""Logits of transformers with compressed-tensors on written files, against those of the emulated forward."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.nvfp4 import base
from compressed_tensors.quantization.utils import helpers
from torch import Tensor

from conftest import MakeTiny
from helpers.run_model import figures_of, stream_logits
from helpers.tiny_mixtures import make_mixture
from snugfit.data.dataset import Dataset, load_dataset
from snugfit.data.python_docs import python_topics
from snugfit.quantization.quantize import quantize


def load(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()


def plain_logits(path: Path, rows: Dataset) -> Tensor:
    with torch.no_grad():
        result: Tensor = load(path)(input_ids=torch.tensor(rows.samples), use_cache=False).logits.float()
    return result


def our_logits(path: Path, rows: Dataset) -> Tensor:
    return torch.cat([logits.float() for _, _, logits in stream_logits(path, rows)], dim=1)


def perplexity_of(logits: Tensor, rows: Dataset) -> float:
    ids = torch.tensor(rows.samples)
    return math.exp(float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())))


@pytest.mark.parametrize(
    "recipe",
    [
        "fp8-dynamic",
        "fp8-int4-absmax",
        "int4-w4a16-absmax",
        "nvfp4a16-four-over-six",
        "nvfp4-four-over-six",
        "nvfp4-fp8-hybrid-four-over-six",
        "mxfp4-absmax",
    ],
)
def test_fp32_logits_agree(
    recipe: str, make_tiny: MakeTiny, token_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32, W4A4 included, transformers' logits equal snugfit's but for ties; MXFP4's with FlashInfer's scales."""
    unpack = base.unpack_fp4_from_uint8  # to bf16 by default, whatever the model's dtype is
    monkeypatch.setattr(base, "unpack_fp4_from_uint8", lambda p, m, n: unpack(p, m, n, dtype=torch.float32))
    monkeypatch.setattr(helpers, "generate_mx_scales", lambda x, **_: 127 + torch.ceil(torch.log2(x / 6)))
    source = make_tiny("llama", dtype=torch.float32)
    quantize(source, recipe, output_dir=tmp_path / "out", dataset=[token_rows])
    rows = load_dataset(source, [token_rows])
    expected, found = plain_logits(tmp_path / "out", rows), our_logits(tmp_path / "out", rows)
    difference = float((expected - found).abs().mean() / expected.abs().mean())
    assert difference < 1e-5
    assert perplexity_of(found, rows) == pytest.approx(perplexity_of(expected, rows), rel=1e-5)


@pytest.fixture(scope="module")
def hybrid(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model as the hybrid, calibrated on 4 x 256 tokens."""
    target = tmp_path_factory.mktemp("smollm2") / "hybrid"
    quantize(smollm2, "nvfp4-fp8-hybrid-four-over-six", output_dir=target, num_samples=4, max_seq_length=256)
    return target


@pytest.fixture(scope="module")
def rows(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """2 x 256 tokens that are not in the calibration samples."""
    text = tmp_path_factory.mktemp("text") / "evaluation.txt"
    text.write_text(python_topics("evaluation"), encoding="utf-8")
    return load_dataset(smollm2, [text], num_samples=2, max_seq_length=256)


def test_real_model_before(smollm2: Path, rows: Dataset) -> None:
    """On the real model in 16 bits, `evaluate` gives transformers' perplexity within 1e-3."""
    expected = perplexity_of(plain_logits(smollm2, rows), rows)
    assert figures_of(smollm2, rows).perplexity == pytest.approx(expected, rel=1e-3)


def test_real_hybrid_in_transformers(hybrid: Path, rows: Dataset) -> None:
    """transformers loads the real hybrid; in bf16 its perplexity differs as little as bf16 scales allow."""
    config = json.loads((hybrid / "config.json").read_text())
    assert config["quantization_config"]["format"] == "mixed-precision"
    expected, found = plain_logits(hybrid, rows), our_logits(hybrid, rows)
    difference = float((expected - found).abs().mean() / expected.abs().mean())
    # measured 0.134 and 0.78: 4-bit activations turn last bits of bf16 into whole codes, layer after layer
    assert difference < 0.2
    assert (expected.argmax(-1) == found.argmax(-1)).float().mean() > 0.7
    assert perplexity_of(found, rows) == pytest.approx(perplexity_of(expected, rows), rel=0.1)


def test_nvfp4_experts_lose_their_global_scale(token_rows: Path, tmp_path: Path) -> None:
    """transformers reads INT4 experts as they are and NVFP4 ones without their global scales, as a dry run says."""
    source = make_mixture("qwen3_moe", tmp_path / "source", num_hidden_layers=1)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    exact = load(source).get_parameter(name).float()
    ratios = {}
    for recipe in ("fp8-int4-moe-absmax", "nvfp4-moe-four-over-six"):
        out = tmp_path / recipe
        quantize(source, recipe, output_dir=out, dataset=[token_rows])
        ratios[recipe] = float(load(out).get_parameter(name).detach().float().norm() / exact.norm())
    assert ratios["fp8-int4-moe-absmax"] == pytest.approx(1, abs=0.1)
    assert ratios["nvfp4-moe-four-over-six"] > 10
