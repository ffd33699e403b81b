"""Hugging Face FP8 files, made here, against transformers' own dequantization and compressed-tensors' converter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.entrypoints.convert.converters import FP8BlockDequantizer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from conftest import MakeTiny
from helpers.errors import raises
from snugfit.dialects.dialect import open_dialect
from snugfit.formats.quantized_weight import dequantize
from snugfit.formats.spec import WHOLE_ROW, TensorFormat
from snugfit.model import emulate
from snugfit.model.layout import read_layout
from snugfit.model.skeleton import build_skeleton
from snugfit.storage.safetensors_header import TORCH_NAMES

E4M3 = torch.float8_e4m3fn
MODULE = "model.layers.0.mlp.up_proj"
NAME_OF = {getattr(torch, name): short for short, name in TORCH_NAMES.items()}


def config_of(block: list[int] | None = None, **more: Any) -> dict[str, Any]:
    given = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block}
    return {"quantization_config": given | more}


def read(config: dict[str, Any], parts: dict[str, Tensor]) -> tuple[TensorFormat, Tensor, Tensor | None]:
    headers = {f"{MODULE}.{name}": (NAME_OF[tensor.dtype], tuple(tensor.shape)) for name, tensor in parts.items()}
    dialect = open_dialect(config)
    fmt = dialect.read_formats([MODULE], headers)[MODULE]
    names = dialect.part_names(MODULE, fmt, headers)
    weight, scale = dialect.decode(MODULE, fmt, {part: parts[part] for part in names})
    return fmt, dequantize(weight), scale


def quantized(weight: Tensor, block: tuple[int, int]) -> dict[str, Tensor]:
    """A weight in E4M3 and the fp32 scales of its blocks, those at the edges padded."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % block[1], 0, -rows % block[0]))
    blocks = padded.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))
    scale = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scale[:, None, :, None]).flatten(2).flatten(0, 1)[:rows, :columns]
    return {"weight": codes.to(E4M3), "weight_scale_inv": scale}


def weight_of(rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, columns, generator=generator) * torch.randn(rows, 1, generator=generator).exp() * 0.02


@pytest.mark.parametrize("block", [(128, 128), (64, 32)])
def test_blocks_are_those_of_transformers(block: tuple[int, int]) -> None:
    """Whole blocks dequantize in fp32 to what transformers gives, and inputs are asked for in groups of columns."""
    parts = quantized(weight_of(256, 384), block)
    fmt, ours, scale = read(config_of(list(block)), parts)
    whole = block == (128, 128)
    assert fmt == TensorFormat("fp8-block") if whole else TensorFormat("fp8", block=block, inputs="fp8-group")
    assert scale is None
    theirs = Fp8Dequantize(None)._dequantize_one(parts["weight"], parts["weight_scale_inv"], torch.float32)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", [(200, 320), (130, 129), (64, 100)])
def test_blocks_at_the_edges_are_those_of_the_converter(shape: tuple[int, int]) -> None:
    """Blocks of which the weight fills a part dequantize to what compressed-tensors' converter gives."""
    parts = quantized(weight_of(*shape), (128, 128))
    _, ours, _ = read(config_of([128, 128]), parts)
    converter = FP8BlockDequantizer(targets=[MODULE], dtype=torch.float32)
    theirs = converter._create_dequantized_weight(parts["weight"], parts["weight_scale_inv"])
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("as_bytes", [True, False])
def test_scales_may_be_powers_of_two(*, as_bytes: bool) -> None:
    """Scales in E8M0, under their own dtype or as plain bytes, are what transformers makes of them."""
    parts = quantized(weight_of(256, 256), (128, 128))
    exponents = (parts["weight_scale_inv"].log2().ceil() + 127).to(torch.uint8)
    parts["weight_scale_inv"] = exponents if as_bytes else exponents.view(torch.float8_e8m0fnu)
    _, ours, _ = read(config_of([128, 128], scale_fmt="ue8m0"), parts)
    theirs = Fp8Dequantize(None)._dequantize_one(parts["weight"], exponents, torch.float32)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("weight_scale", ["weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("input_scale", ["input_scale", "activation_scale"])
def test_one_scale_a_weight_under_either_name(weight_scale: str, input_scale: str) -> None:
    """A scale of a whole weight, and a static one of its inputs, multiply under both names that releases give them."""
    codes = (weight_of(64, 96) / 0.001).clamp(-448, 448).to(E4M3)
    parts = {"weight": codes, weight_scale: torch.tensor(0.001), input_scale: torch.tensor([0.25])}
    fmt, ours, scale = read(config_of(activation_scheme="static"), parts)
    assert fmt == TensorFormat("fp8", inputs="fp8-tensor")
    assert torch.equal(ours, codes.float() * torch.tensor(0.001))
    assert scale is not None
    assert float(scale) == 0.25
    fmt, _, scale = read(config_of(), parts)
    assert fmt == TensorFormat("fp8", inputs="fp8-tensor-dynamic")
    assert scale is None


def test_two_scales_of_one_weight_are_refused() -> None:
    """A weight under weight_scale and weight_scale_inv is refused: which of them engines take is their choice."""
    parts = {**quantized(weight_of(128, 128), (128, 128)), "weight_scale": torch.tensor(0.001)}
    with raises("quantization-invalid") as caught:
        read(config_of([128, 128]), parts)
    assert f"{MODULE}.weight_scale_inv" in caught.value.what


@pytest.mark.parametrize("shape", [(64,), (64, 1)])
def test_one_scale_a_row(shape: tuple[int, ...]) -> None:
    """Scales of output channels are recognized by their number."""
    parts = {"weight": weight_of(64, 96).to(E4M3), "weight_scale": torch.rand(64).reshape(shape)}
    fmt, ours, _ = read(config_of(), parts)
    assert fmt == TensorFormat("fp8-dynamic")
    assert torch.equal(ours, parts["weight"].float() * parts["weight_scale"].reshape(64, 1))
    static = parts | {"input_scale": torch.tensor(1.0)}
    assert read(config_of(activation_scheme="static"), static)[0] == TensorFormat("fp8", WHOLE_ROW, inputs="fp8-tensor")


def test_headers_decide_what_is_quantized() -> None:
    """What is stored in 16 bits is not quantized, whether or not modules_to_not_convert names it."""
    headers: dict[str, tuple[str, tuple[int, ...]]] = {
        "a.weight": ("F8_E4M3", (128, 128)),
        "a.weight_scale_inv": ("F32", (1, 1)),
        "b.weight": ("BF16", (128, 128)),
    }
    for more in ({}, {"modules_to_not_convert": ["b"]}, {"modules_to_not_convert": ["a"]}):
        found = open_dialect(config_of([128, 128], **more)).read_formats(["a", "b", "lm_head"], headers)
        assert found == {"a": TensorFormat("fp8-block")}


@pytest.mark.parametrize(
    ("config", "change", "code", "named"),
    [
        (config_of([128, 128]), {"weight_scale_inv": torch.ones(3, 3)}, "quantization-invalid", "[3, 3]"),
        (config_of(), {}, "quantization-invalid", "weight_block_size None"),
        (config_of([128]), {}, "quantization-invalid", "weight_block_size"),
        (config_of([128, 128], activation_scheme="sometimes"), {}, "quantization-unknown", "'sometimes'"),
        (config_of([128, 128]), {"weight_scale_inv": None}, "quantization-invalid", f"{MODULE}.weight_scale_inv"),
        (config_of([128, 128], activation_scheme="static"), {}, "quantization-invalid", f"{MODULE}.input_scale"),
        (config_of([128, 128]), {"weight": torch.zeros(256, 256, dtype=torch.int8)}, "quantization-invalid", MODULE),
        (config_of([128, 128]), {"weight_scale_inv": torch.full((2, 2), torch.nan)}, "scale-invalid", "nan"),
        (config_of([128, 128]), {"weight_scale_inv": torch.full((2, 2), torch.inf)}, "scale-invalid", "inf"),
    ],
)
def test_what_does_not_fit_is_refused(
    config: dict[str, Any], change: dict[str, Tensor | None], code: str, named: str
) -> None:
    """Scales of a wrong grid, without a block size, missing or not finite are errors that name the tensor."""
    parts = quantized(weight_of(256, 256), (128, 128)) | change
    with raises(code, "config.json: quantization_config") as caught:
        read(config, {name: part for name, part in parts.items() if part is not None})
    assert named in caught.value.what


def test_a_whole_model_is_the_one_that_transformers_loads(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """Each layer of a block-FP8 model reads as the 16-bit weights into which transformers dequantizes it on a CPU."""
    from transformers import AutoModelForCausalLM

    source = make_tiny("llama", tie_word_embeddings=True)
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if "proj" in name]:
        made = quantized(tensors.pop(name), (32, 32))
        tensors |= {name.removesuffix("weight") + suffix: part for suffix, part in made.items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | config_of([32, 32])))
    layout = read_layout(tmp_path)
    skeleton, formats = build_skeleton(layout), layout.formats
    assert len(formats) == 21
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    for index, layer in enumerate(skeleton.layers):
        prefix = f"model.layers.{index}"
        weights, quantizers = emulate.read_layer(
            layout.checkpoint, layout.dialect, prefix, layer, formats, "vllm-blackwell"
        )
        assert len(quantizers) == 7
        for name, weight in weights.items():
            assert torch.equal(weight, theirs[f"{prefix}.{name}"]), name
