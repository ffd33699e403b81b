"""ModelOpt exports, made here in its layout, against compressed-tensors' own converter and by definition."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.entrypoints.convert.converters import ModelOptNvfp4Converter
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import dequantize as library_dequantize
from torch import Tensor

from helpers.errors import raises
from snugfit.dialects.dialect import open_dialect, read_quant_config
from snugfit.formats.quantized_weight import dequantize
from snugfit.formats.spec import TensorFormat
from snugfit.storage.safetensors_header import TORCH_NAMES

E4M3 = torch.float8_e4m3fn
UP, DOWN, HEAD = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj", "lm_head"
NAME_OF = {getattr(torch, name): short for short, name in TORCH_NAMES.items()}
Found = dict[str, tuple[str, tuple[int, ...]]]


def legacy(algorithm: str, **more: Any) -> dict[str, Any]:
    """hf_quant_config.json."""
    details = {"quant_algo": algorithm, "kv_cache_quant_algo": None, "group_size": 16, "exclude_modules": [HEAD]}
    return {"producer": {"name": "modelopt", "version": "0.29.0"}, "quantization": details | more}


def recent(algorithm: str, **more: Any) -> dict[str, Any]:
    """config.json with a quantization_config."""
    inputs = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    group = {"input_activations": inputs, "weights": inputs, "targets": ["Linear"]}
    given = {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": [HEAD], "config_groups": {"group_0": group}}
    return {"quantization_config": given | more}


def nvfp4_parts(rows: int = 40, columns: int = 96, *, inputs: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    packed = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=generator)
    scale = torch.randint(1, 127, (rows, columns // 16), dtype=torch.uint8, generator=generator).view(E4M3)
    parts = {"weight": packed, "weight_scale": scale, "weight_scale_2": torch.tensor(0.000137)}
    return parts | ({"input_scale": torch.tensor(0.0021)} if inputs else {})


def fp8_parts(scale: Tensor, rows: int = 40, columns: int = 96) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return {
        "weight": torch.randn(rows, columns, generator=generator).to(E4M3),
        "weight_scale": scale,
        "input_scale": torch.tensor(0.5),
    }


def headers(parts: dict[str, Tensor], module: str = UP) -> Found:
    return {f"{module}.{name}": (NAME_OF[tensor.dtype], tuple(tensor.shape)) for name, tensor in parts.items()}


def read(config: dict[str, Any], parts: dict[str, Tensor]) -> tuple[TensorFormat, Tensor, Tensor | None]:
    """Format, fp32 weight and static inputs of a file whose one module has `parts`."""
    extra = config if "quantization" in config else None
    whole = {} if extra else config
    dialect = open_dialect(whole, extra)
    fmt = dialect.read_formats([UP, HEAD], headers(parts) | {f"{HEAD}.weight": ("BF16", (8, 8))})[UP]
    names = dialect.part_names(UP, fmt, headers(parts))
    quantized, scale = dialect.decode(UP, fmt, {part: parts[part] for part in names})
    return fmt, dequantize(quantized), scale


@pytest.mark.parametrize("config", [legacy("NVFP4"), recent("NVFP4"), recent("nvfp4")])
def test_nvfp4_is_what_the_converter_makes_of_it(config: dict[str, Any]) -> None:
    """Our fp32 weight is the library's, of the file that its converter writes with divisors, to 2**-22."""
    parts = nvfp4_parts()
    fmt, ours, scale = read(config, parts)
    assert fmt == TensorFormat("nvfp4")
    assert scale is not None
    assert float(scale) == float(parts["input_scale"])
    converter = ModelOptNvfp4Converter(targets=[UP])
    made = converter.process({f"{UP}.{name}": part for name, part in copy.deepcopy(parts).items()})
    assert float(made[f"{UP}.input_global_scale"]) == pytest.approx(1 / 0.0021)
    given = preset_name_to_scheme("NVFP4", ["Linear"]).weights
    codes = unpack_fp4_from_uint8(made[f"{UP}.weight_packed"], *ours.shape, dtype=torch.float32)
    block_scale, divisor = made[f"{UP}.weight_scale"].float(), made[f"{UP}.weight_global_scale"]
    theirs = library_dequantize(codes, block_scale, args=given, global_scale=divisor)
    assert ((ours - theirs).abs() <= theirs.abs() * 2.0**-22).all()


def test_nvfp4_scales_multiply() -> None:
    """A weight is its E2M1 value times weight_scale times weight_scale_2, all in fp32."""
    parts = nvfp4_parts()
    _, ours, _ = read(legacy("NVFP4"), parts)
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    nibbles = torch.stack((parts["weight"] & 15, parts["weight"] >> 4), -1).flatten(1).long()
    codes = table[nibbles & 7] * (1 - 2 * (nibbles >> 3))
    step = (parts["weight_scale"].float() * parts["weight_scale_2"]).repeat_interleave(16, 1)
    assert torch.equal(ours, codes * step)


@pytest.mark.parametrize(
    ("config", "inputs"),
    [
        (legacy("W4A16_NVFP4"), True),
        (legacy("W4A16_NVFP4"), False),
        (legacy("NVFP4"), False),
        (recent("NVFP4", config_groups={"group_0": {"input_activations": None, "targets": ["Linear"]}}), True),
    ],
)
def test_weight_only_nvfp4(config: dict[str, Any], *, inputs: bool) -> None:
    """Weights alone are quantized where the algorithm or the groups say so, or no module has an input_scale."""
    fmt, ours, scale = read(config, nvfp4_parts(inputs=inputs))
    assert fmt == TensorFormat("nvfp4a16")
    assert scale is None
    assert torch.equal(ours, read(legacy("NVFP4"), nvfp4_parts())[1])


def test_one_module_without_an_input_scale_is_refused() -> None:
    """Where others have 4-bit inputs, a module without input_scale would run on uninitialised memory: an error."""
    tensors = headers(nvfp4_parts()) | headers(nvfp4_parts(inputs=False), DOWN)
    with raises("quantization-invalid", "hf_quant_config.json") as caught:
        open_dialect({}, legacy("NVFP4")).read_formats([UP, DOWN], tensors)
    assert f"{DOWN}.input_scale" in caught.value.what


def test_fp8_has_one_scale_a_weight_and_one_for_inputs() -> None:
    """FP8 is codes times one multiplier, with a static multiplier of the inputs."""
    parts = fp8_parts(torch.tensor(0.003))
    fmt, ours, scale = read(legacy("FP8"), parts)
    assert fmt == TensorFormat("fp8", inputs="fp8-tensor")
    assert torch.equal(ours, parts["weight"].float() * torch.tensor(0.003))
    assert scale is not None
    assert float(scale) == 0.5


def test_fp8_by_channel_and_by_block() -> None:
    """FP8 with a scale a channel [N], and with one a block [N/128, 1, K/128, 1], edges smaller."""
    channel = fp8_parts(torch.rand(40))
    fmt, ours, _ = read(legacy("FP8_PER_CHANNEL_PER_TOKEN"), channel)
    assert fmt == TensorFormat("fp8-dynamic")
    assert torch.equal(ours, channel["weight"].float() * channel["weight_scale"].unsqueeze(1))
    block = fp8_parts(torch.rand(2, 1, 3, 1), 200, 384)
    fmt, ours, _ = read(legacy("fp8_pb_wo"), block)
    assert fmt == TensorFormat("fp8-block")
    scale = block["weight_scale"].reshape(2, 3).repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)
    assert torch.equal(ours, block["weight"].float() * scale)


@pytest.mark.parametrize("prefix", ["", "language_model."])
def test_a_mixture_gives_each_layer_its_own(prefix: str) -> None:
    """MIXED_PRECISION looks every module up in quantized_layers; the rest is in 16 bits."""
    layers = {f"{prefix}{UP}": {"quant_algo": "NVFP4", "group_size": 16}, f"{prefix}{DOWN}": {"quant_algo": "FP8"}}
    tensors = headers(nvfp4_parts()) | headers(fp8_parts(torch.tensor(0.1)), DOWN)
    tensors |= {f"{HEAD}.weight": ("BF16", (8, 8)), "model.layers.0.o_proj.weight": ("BF16", (8, 8))}
    modules = [UP, DOWN, HEAD, "model.layers.0.o_proj"]
    for config in (
        legacy("MIXED_PRECISION", quantized_layers=layers),
        recent("MIXED_PRECISION", quantized_layers=layers),
    ):
        extra = config if "quantization" in config else None
        assert open_dialect({} if extra else config, extra).read_formats(modules, tensors) == {
            UP: TensorFormat("nvfp4"),
            DOWN: TensorFormat("fp8", inputs="fp8-tensor"),
        }


@pytest.mark.parametrize(
    "excluded", [["model.layers.0.mlp.down_proj"], ["model.layers.0.mlp.down*"], ["*.down_proj", "x"], ["down_proj"]]
)
def test_excluded_modules_are_wildcards(excluded: list[str]) -> None:
    """exclude_modules and ignore are names, wildcards, or parts of names as old exports have them."""
    tensors = headers(nvfp4_parts()) | {f"{DOWN}.weight": ("BF16", (8, 8))}
    for extra, config in (
        (legacy("NVFP4", exclude_modules=excluded), {}),
        (None, recent("NVFP4", ignore=excluded)),
    ):
        assert set(open_dialect(config, extra).read_formats([UP, DOWN], tensors)) == {UP}


@pytest.mark.parametrize(
    ("config", "parts", "code", "named"),
    [
        (legacy("W4A8_AWQ"), nvfp4_parts(), "quantization-unknown", "'W4A8_AWQ'"),
        (legacy("MXFP8"), nvfp4_parts(), "quantization-unknown", "'MXFP8'"),
        (
            legacy("NVFP4"),
            nvfp4_parts() | {"pre_quant_scale": torch.ones(96)},
            "quantization-unknown",
            "pre_quant_scale",
        ),
        (legacy("NVFP4"), fp8_parts(torch.tensor(1.0)), "quantization-invalid", "weight_scale_2"),
        (legacy("FP8"), nvfp4_parts(), "quantization-invalid", "weight is U8"),
        (legacy("FP8"), {"weight": torch.ones(8, 8)}, "quantization-invalid", "weight is F32"),
        (
            legacy("FP8", exclude_modules=["*mlp*", HEAD]),
            fp8_parts(torch.tensor(1.0)),
            "quantization-invalid",
            UP,
        ),
        (
            legacy("NVFP4"),
            nvfp4_parts() | {"weight_scale_2": torch.tensor(0.0)},
            "scale-invalid",
            f"{UP}.weight_scale_2",
        ),
        (
            legacy("NVFP4"),
            nvfp4_parts() | {"input_scale": torch.tensor(float("nan"))},
            "scale-invalid",
            f"{UP}.input_scale",
        ),
        (
            legacy("FP8"),
            fp8_parts(torch.tensor(1.0)) | {"input_scale": torch.tensor(0.0)},
            "scale-invalid",
            f"{UP}.input_scale",
        ),
    ],
)
def test_what_has_no_reader_or_does_not_fit_is_refused(
    config: dict[str, Any], parts: dict[str, Tensor], code: str, named: str
) -> None:
    """Other algorithms, tensors that do not match the algorithm, and useless scales are errors that name them."""
    with raises(code, "hf_quant_config.json") as caught:
        read(config, parts)
    assert named in caught.value.what
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("extra", "config", "expected"),
    [
        (legacy("NVFP4", kv_cache_quant_algo="FP8"), {}, "fp8"),
        (legacy("NVFP4"), {}, None),
        (legacy("NVFP4", kv_cache_quant_algo="NVFP4"), {}, "error"),
        (None, recent("FP8", kv_cache_scheme={"dynamic": False, "num_bits": 8, "type": "float"}), "fp8"),
        (None, recent("FP8", kv_cache_scheme="NVFP4"), "error"),
        (legacy("NVFP4", kv_cache_quant_algo="FP8"), recent("FP8"), None),
    ],
)
def test_the_kv_cache(extra: dict[str, Any] | None, config: dict[str, Any], expected: str | None) -> None:
    """FP8 is read from either file, config.json's word first; an NVFP4 cache is refused."""
    if expected == "error":
        with raises("quantization-unknown", "hf_quant_config.json" if extra else "quantization_config") as caught:
            open_dialect(config, extra).kv_cache_format()
        assert "NVFP4" in caught.value.what
    else:
        assert open_dialect(config, extra).kv_cache_format() == expected


def test_the_file_of_its_own(tmp_path: Path) -> None:
    """hf_quant_config.json is read if it exists; a file that is not a JSON object is an error."""
    assert read_quant_config(tmp_path) is None
    file = tmp_path / "hf_quant_config.json"
    file.write_text(json.dumps(legacy("FP8")))
    assert read_quant_config(tmp_path) == legacy("FP8")
    for text in ("{", "[]"):
        file.write_text(text)
        with raises("json-invalid", file):
            read_quant_config(tmp_path)
