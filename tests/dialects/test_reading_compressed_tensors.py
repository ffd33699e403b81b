"""Every scheme of compressed-tensors that has a reader: files made by the library's own compressors, read by us."""

from __future__ import annotations

import json
from typing import Any

import ml_dtypes
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.lifecycle.forward import dequantize as library_dequantize
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp, generate_gparam
from torch import Tensor

from snugfit.dialects.dialect import open_dialect
from snugfit.formats.quantized_weight import dequantize
from snugfit.formats.spec import WHOLE_ROW, TensorFormat
from snugfit.model.emulate import input_quantizer
from snugfit.storage.safetensors_header import TORCH_NAMES

MODULE = "model.layers.0.mlp.up_proj"
Found = dict[str, tuple[str, tuple[int, ...]]]
NAME_OF = {getattr(torch, name): short for short, name in TORCH_NAMES.items()}


def args(kind: str, bits: int, strategy: str, **more: Any) -> QuantizationArgs:
    return QuantizationArgs(type=kind, num_bits=bits, strategy=strategy, **more)


def scheme(weights: QuantizationArgs, inputs: QuantizationArgs | None = None) -> QuantizationScheme:
    return QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)


TOKEN_FP8 = args("float", 8, "token", dynamic=True)
STATIC_FP8 = args("float", 8, "tensor")
TOKEN_INT8 = args("int", 8, "token", dynamic=True)
# what a file asks for -> how we call it
SCHEMES: dict[str, tuple[QuantizationScheme, TensorFormat]] = {
    name: (preset_name_to_scheme(name, ["Linear"]), fmt)
    for name, fmt in {
        "FP8": TensorFormat("fp8", inputs="fp8-tensor"),
        "FP8_DYNAMIC": TensorFormat("fp8-dynamic"),
        "FP8_BLOCK": TensorFormat("fp8-block"),
        "W8A8": TensorFormat("int8", WHOLE_ROW, inputs="int8-token"),
        "W8A16": TensorFormat("int8", 128),
        "W4A16": TensorFormat("int4", 128),
        "W4A16_ASYM": TensorFormat("int4", 128, symmetric=False),
        "W4A8": TensorFormat("int4", 128, inputs="int8-token"),
        "W4AFP8": TensorFormat("int4", 128, inputs="fp8-token"),
        "NVFP4": TensorFormat("nvfp4"),
        "NVFP4A16": TensorFormat("nvfp4a16"),
        "MXFP4": TensorFormat("mxfp4"),
        "MXFP4A16": TensorFormat("mxfp4", inputs="none"),
        "MXFP4XFP8": TensorFormat("mxfp4", inputs="fp8-group"),
    }.items()
} | {
    "fp8 tensor, tokens": (scheme(args("float", 8, "tensor"), TOKEN_FP8), TensorFormat("fp8", inputs="fp8-token")),
    "fp8 tensor, tensor": (
        scheme(args("float", 8, "tensor"), args("float", 8, "tensor", dynamic=True)),
        TensorFormat("fp8", inputs="fp8-tensor-dynamic"),
    ),
    "fp8 channel, static": (
        scheme(args("float", 8, "channel"), STATIC_FP8),
        TensorFormat("fp8", WHOLE_ROW, inputs="fp8-tensor"),
    ),
    "fp8 channel alone": (scheme(args("float", 8, "channel")), TensorFormat("fp8", WHOLE_ROW)),
    "fp8 blocks of 32 x 64": (
        scheme(args("float", 8, "block", block_structure=[32, 64])),
        TensorFormat("fp8", block=(32, 64)),
    ),
    "fp8 blocks alone": (
        scheme(args("float", 8, "block", block_structure=[128, 128])),
        TensorFormat("fp8", block=(128, 128)),
    ),
    "int8 channel, asymmetric tokens": (
        scheme(args("int", 8, "channel"), args("int", 8, "token", dynamic=True, symmetric=False)),
        TensorFormat("int8", WHOLE_ROW, inputs="int8-token-asym"),
    ),
    "int8 tensor, static": (
        scheme(args("int", 8, "tensor"), args("int", 8, "tensor")),
        TensorFormat("int8", inputs="int8-tensor"),
    ),
    "int8 channel, asymmetric static": (
        scheme(args("int", 8, "channel"), args("int", 8, "tensor", symmetric=False)),
        TensorFormat("int8", WHOLE_ROW, inputs="int8-tensor-asym"),
    ),
    "int8 channel with zero points, tokens": (
        scheme(args("int", 8, "channel", symmetric=False), TOKEN_INT8),
        TensorFormat("int8", WHOLE_ROW, symmetric=False, inputs="int8-token"),
    ),
    "int8 channel with zero points alone": (
        scheme(args("int", 8, "channel", symmetric=False)),
        TensorFormat("int8", WHOLE_ROW, symmetric=False),
    ),
    "int8 groups with zero points alone": (
        scheme(args("int", 8, "group", group_size=64, symmetric=False)),
        TensorFormat("int8", 64, symmetric=False),
    ),
    "int4 channel alone": (scheme(args("int", 4, "channel")), TensorFormat("int4", WHOLE_ROW)),
    "int4 channel with zero points alone": (
        scheme(args("int", 4, "channel", symmetric=False)),
        TensorFormat("int4", WHOLE_ROW, symmetric=False),
    ),
}
every_scheme = pytest.mark.parametrize("name", SCHEMES)


def weight_of(rows: int = 200, columns: int = 384, seed: int = 0) -> Tensor:
    """fp32 rows of different sizes and of mixed signs, more positive than negative."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.randn(rows, 1, generator=generator).exp() * 0.02
    return (torch.randn(rows, columns, generator=generator) + 0.3) * size


def ranges(weight: Tensor, given: QuantizationArgs) -> tuple[Tensor, Tensor]:
    """Smallest and largest value under each scale, in the scale's shape."""
    strategy = str(given.strategy)
    if strategy == "tensor":
        return weight.min().reshape(1), weight.max().reshape(1)
    if strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if strategy == "block":
        assert given.block_structure is not None
        rows, columns = given.block_structure
        padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows))
        blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    groups = weight.unflatten(1, (-1, int(given.group_size or 0)))
    return groups.amin(-1), groups.amax(-1)


def compress(made: QuantizationScheme, weight: Tensor) -> tuple[str, dict[str, Tensor], Any]:
    """What the library writes of a weight: format, tensors, compressor. Scales in fp32, so that it computes in that."""
    assert made.weights is not None
    low, high = ranges(weight, made.weights)
    divisor = generate_gparam(weight.amin(), weight.amax()) if made.weights.strategy == "tensor_group" else None
    scale, zero_point = calculate_qparams(low, high, made.weights, global_scale=divisor)
    kind = infer_module_format(torch.nn.Linear, made).value
    given = {"weight": weight.clone(), "weight_scale": scale}
    given |= {} if made.weights.symmetric else {"weight_zero_point": zero_point}
    given |= {} if divisor is None else {"weight_global_scale": divisor}
    compressor = BaseCompressor.get_value_from_registry(kind)
    return kind, dict(compressor.compress(given, made)), compressor


def static_inputs(made: QuantizationScheme) -> dict[str, Tensor]:
    """Tensors of inputs as calibration would have left them."""
    given = made.input_activations
    if given is None or given.dynamic is True:
        return {}
    if given.dynamic == "local":
        return {"input_global_scale": torch.tensor([37.5])}
    zero_point = {} if given.symmetric else {"input_zero_point": torch.tensor([-23], dtype=torch.int8)}
    return {"input_scale": torch.tensor([0.0123], dtype=torch.bfloat16)} | zero_point


def file_of(made: QuantizationScheme, weight: Tensor) -> tuple[dict[str, Any], dict[str, Tensor], Any]:
    """config.json, a module's tensors, compressor."""
    kind, parts, compressor = compress(made, weight)
    made = made.model_copy(update={"format": kind})
    config = QuantizationConfig(config_groups={"group_0": made}, format=kind, quantization_status="compressed")
    dumped = {"quantization_config": json.loads(config.model_dump_json())}
    return dumped, parts | static_inputs(made), compressor


def headers(parts: dict[str, Tensor], module: str = MODULE) -> Found:
    return {f"{module}.{name}": (NAME_OF[tensor.dtype], tuple(tensor.shape)) for name, tensor in parts.items()}


def read(config: dict[str, Any], parts: dict[str, Tensor]) -> tuple[TensorFormat, Tensor, Tensor | None]:
    """Format, fp32 weight and static inputs as we read them."""
    dialect = open_dialect(config)
    fmt = dialect.read_formats([MODULE], headers(parts))[MODULE]
    names = dialect.part_names(MODULE, fmt, headers(parts))
    quantized, scale = dialect.decode(MODULE, fmt, {part: parts[part] for part in names})
    return fmt, dequantize(quantized), scale


@every_scheme
def test_weights_are_the_librarys(name: str) -> None:
    """The library's decompressed weight is ours, in fp32 bit for bit; 4-bit floats, which it gives in bf16, in that."""
    made, expected = SCHEMES[name]
    weight = weight_of()
    config, parts, compressor = file_of(made, weight)
    fmt, ours, _ = read(config, parts)
    assert fmt == expected
    theirs = compressor.decompress(dict(parts), made)["weight"]
    assert ours.dtype == torch.float32
    assert torch.equal(ours.to(theirs.dtype), theirs)
    assert theirs.dtype == (torch.bfloat16 if "fp4" in fmt.name else torch.float32)
    assert float((ours - weight).square().sum() / weight.square().sum()) < 0.03


@pytest.mark.parametrize("shape", [(200, 320), (64, 100), (130, 129), (1, 1)])
@pytest.mark.parametrize("block", [(128, 128), (32, 64), (64, 48)])
def test_blocks_at_the_edges_are_smaller(shape: tuple[int, int], block: tuple[int, int]) -> None:
    """FP8 blocks that do not divide the weight take the rows and columns that are left, as the library cuts them."""
    made = scheme(args("float", 8, "block", block_structure=list(block)))
    config, parts, compressor = file_of(made, weight_of(*shape))
    fmt, ours, _ = read(config, parts)
    assert fmt.block == block
    assert ours.shape == shape
    assert torch.equal(ours, compressor.decompress(dict(parts), made)["weight"])


@every_scheme
def test_labels_tell_schemes_apart(name: str) -> None:
    """No two schemes share a label, and a label says weights and, after a plus, inputs; a16 says there are none."""
    fmt = SCHEMES[name][1]
    assert [other for _, other in SCHEMES.values() if other.label() == fmt.label()] == [fmt]
    assert fmt.label().partition("+")[2] == ("" if fmt.inputs in (None, "none") else fmt.inputs)
    assert hash(fmt) == hash(SCHEMES[name][1])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_activation_order_gives_each_column_its_group(bits: int, *, symmetric: bool) -> None:
    """weight_g_idx names each column's group; -1 in it means neighbours, as without it."""
    made = scheme(args("int", bits, "group", group_size=32, symmetric=symmetric))
    weight = weight_of(24, 128)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(5))
    # GPTQ: neighbours in the permuted weight form a group, and codes are stored in the original order
    config, permuted, _ = file_of(made, weight[:, order])
    _, expected, _ = read(config, permuted)
    inverse = torch.argsort(order)
    unpacked = unpack_from_int32(permuted["weight_packed"], bits, torch.Size(weight.shape))
    parts = permuted | {"weight_packed": pack_to_int32(unpacked[:, inverse].contiguous(), bits)}
    parts["weight_g_idx"] = (inverse // 32).to(torch.int32)
    _, ours, _ = read(config, parts)
    assert torch.equal(ours, expected[:, inverse])
    _, plain, _ = read(config, permuted | {"weight_g_idx": torch.full((128,), -1, dtype=torch.int32)})
    assert torch.equal(plain, expected)


def test_integers_of_four_bits_may_be_stored_in_bytes() -> None:
    """W4A8 in the int-quantized layout has a plain int8 weight of small numbers, which reads like the packed one."""
    made = preset_name_to_scheme("W4A8", ["Linear"])
    assert made.weights is not None
    weight = weight_of()
    config, packed, _ = file_of(made, weight)
    compressor = BaseCompressor.get_value_from_registry("int-quantized")
    parts = compressor.compress({"weight": weight.clone(), "weight_scale": packed["weight_scale"]}, made)
    assert parts["weight"].dtype == torch.int8
    assert torch.equal(read(config, dict(parts))[1], read(config, packed)[1])


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_scale_has_any_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """A scale of a whole weight or of static inputs is a scalar or a list of one, of any float dtype."""
    config, parts, _ = file_of(SCHEMES["FP8"][0], weight_of())
    parts |= {name: parts[name].reshape(shape).to(dtype) for name in ("weight_scale", "input_scale")}
    fmt, ours, scale = read(config, parts)
    assert fmt.label() == "fp8-tensor+fp8-tensor"
    assert torch.equal(ours, parts["weight"].float() * parts["weight_scale"].float())
    assert scale is not None
    assert scale.shape == ()
    assert float(scale) == float(parts["input_scale"])


def activations(seed: int = 0) -> Tensor:
    """fp32 [3, 7, 384], sizes spread log-normally, more positive than negative."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.randn(3, 7, 384, generator=generator).exp()
    return (torch.randn(3, 7, 384, generator=generator) + 0.5) * size


def library_inputs(values: Tensor, given: QuantizationArgs, parts: dict[str, Tensor]) -> Tensor:
    """Activations as the library quantizes and dequantizes them before a linear."""
    divisor = parts.get("input_global_scale")
    if given.dynamic:
        scale, zero_point = compute_dynamic_scales_and_zp(values, given, torch.nn.Identity(), global_scale=divisor)
    else:
        scale, zero_point = parts["input_scale"].float(), parts.get("input_zero_point")
    result = fake_quantize(values, scale, zero_point, given, global_scale=divisor)
    assert isinstance(result, Tensor)
    return result


@pytest.mark.parametrize(
    "name", [n for n, (_, fmt) in SCHEMES.items() if fmt.input_kind in ("fp8-tensor", "fp8-token", "fp8-group")]
)
def test_fp8_inputs_are_the_librarys(name: str) -> None:
    """FP8 inputs, static, a token or a group of columns, equal the library's in fp32."""
    made, _ = SCHEMES[name]
    config, parts, _ = file_of(made, weight_of())
    fmt, _, scale = read(config, parts)
    quantizer = input_quantizer(fmt, "vllm-blackwell", scale)
    values = activations()
    assert quantizer is not None
    assert made.input_activations is not None
    assert torch.equal(quantizer(values.clone()), library_inputs(values, made.input_activations, parts))


def test_a_dynamic_tensor_becomes_dynamic_tokens() -> None:
    """A file that asks for one dynamic scale a tensor gets one a token on NVIDIA GPUs, and 16 bits on the CPU."""
    fmt = SCHEMES["fp8 tensor, tensor"][1]
    values = activations()
    on_cuda = [input_quantizer(fmt, profile, None) for profile in ("vllm-blackwell", "marlin")]
    expected = library_inputs(values, TOKEN_FP8, {})
    assert all(quantizer is not None and torch.equal(quantizer(values), expected) for quantizer in on_cuda)
    assert input_quantizer(fmt, "vllm-cpu", None) is None


@pytest.mark.parametrize("name", ["int8 tensor, static", "int8 channel, asymmetric static"])
def test_static_int8_inputs_are_the_librarys(name: str) -> None:
    """INT8 inputs under the file's scale and zero point equal the library's in fp32, but for ties."""
    made, _ = SCHEMES[name]
    config, parts, _ = file_of(made, weight_of())
    fmt, _, scale = read(config, parts)
    quantizer = input_quantizer(fmt, "marlin", scale)
    values = activations()
    assert quantizer is not None
    assert made.input_activations is not None
    # the library adds the zero point before it rounds, engines after: ties go elsewhere
    theirs = library_inputs(values, made.input_activations, parts)
    assert float((quantizer(values) != theirs).double().mean()) < 1e-3


@pytest.mark.parametrize("symmetric", [True, False])
def test_dynamic_int8_inputs_are_the_librarys_under_vllms_scale(*, symmetric: bool) -> None:
    """INT8 inputs a token are the library's fake quantization under vLLM's scales, amax / 127 or range / 255."""
    fmt = TensorFormat("int8", WHOLE_ROW, inputs="int8-token" if symmetric else "int8-token-asym")
    given = args("int", 8, "token", dynamic=True, symmetric=symmetric)
    values = activations()
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    scale = values.abs().amax(-1, keepdim=True) / 127 if symmetric else (high - low) / 255
    zero_point = None if symmetric else (-128 - low / scale).round()
    quantizer = input_quantizer(fmt, "vllm-cpu", None)
    assert quantizer is not None
    theirs = fake_quantize(values, scale, zero_point, given)
    assert isinstance(theirs, Tensor)
    assert float((quantizer(values) != theirs).double().mean()) < 1e-3


def test_mxfp4_inputs_are_the_librarys_outside_one_quarter() -> None:
    """MXFP4 inputs equal the library's unless amax is 6 to 7 of its steps: there our step is twice as large."""
    values = activations()
    quantizer = input_quantizer(TensorFormat("mxfp4"), "vllm-blackwell", None)
    given = SCHEMES["MXFP4"][0].input_activations
    assert quantizer is not None
    assert given is not None
    ours = quantizer(values).unflatten(-1, (-1, 32))
    theirs = library_inputs(values, given, {}).unflatten(-1, (-1, 32))
    blocks = values.unflatten(-1, (-1, 32))
    fraction, exponent = torch.frexp(blocks.abs().amax(-1))
    between = (fraction > 0.75) & (fraction < 0.875)
    assert 0.05 < float(between.double().mean()) < 0.5
    assert torch.equal(ours[~between], theirs[~between])
    step = torch.ldexp(torch.ones_like(fraction), exponent - 2)[between].unsqueeze(-1)
    codes = (blocks[between] / step).numpy().astype(ml_dtypes.float4_e2m1fn).astype("float32")
    assert torch.equal(ours[between], torch.from_numpy(codes) * step)


def test_nvfp4_dequantizes_in_fp32_as_the_library_would() -> None:
    """NVFP4's values are code * scale / divisor in fp32 to 2**-22."""
    made, _ = SCHEMES["NVFP4A16"]
    config, parts, _ = file_of(made, weight_of())
    _, ours, _ = read(config, parts)
    codes = unpack_fp4_from_uint8(parts["weight_packed"], *ours.shape, dtype=torch.float32)
    scale, divisor = parts["weight_scale"].float(), parts["weight_global_scale"]
    theirs = library_dequantize(codes, scale, args=made.weights, global_scale=divisor)
    assert ((ours - theirs).abs() <= theirs.abs() * 2.0**-22).all()
