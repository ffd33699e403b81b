"""The compressed-tensors layout: names, dtypes and shapes on disk, and the quantization_config that describes them.

In memory a scale always multiplies codes. NVFP4 files store global scales as divisors; this module alone inverts them.
Facts follow compressed-tensors 0.20, the oracle of the tests, and what vLLM needs in a file.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from snugfit.dialects.headers import Headers
from snugfit.dialects.schemes import REMEDY, parse_scheme
from snugfit.dialects.targets import Targets, write_targets
from snugfit.errors import UserError
from snugfit.formats.spec import FP8_BLOCK, MXFP4_BLOCK, NVFP4_BLOCK, WHOLE_ROW, TensorFormat

if TYPE_CHECKING:
    from torch import Tensor

    from snugfit.formats.quantized_weight import QuantizedWeight

NVFP4 = "nvfp4-pack-quantized"
FLOAT = "float-quantized"
MXFP4 = "mxfp4-pack-quantized"
PACKED = "pack-quantized"
MIXED = "mixed-precision"
# the first release that reads per-group formats and NVFP4 beside FP8
VERSION = "0.14.0"

_FLOATS = frozenset({"BF16", "F16", "F32"})
_PLAIN = _FLOATS | {"F64"}

INPUT_SCALE = "input_global_scale"


def layout(fmt: TensorFormat, shape: tuple[int, ...], dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Suffix -> (safetensors dtype, shape) of all tensors that replace a weight [N, K] of this shape and dtype."""
    out_features, in_features = shape
    if fmt.name in ("nvfp4", "nvfp4a16"):
        parts: dict[str, tuple[str, tuple[int, ...]]] = {
            "weight_packed": ("U8", (out_features, in_features // 2)),
            "weight_scale": ("F8_E4M3", (out_features, in_features // NVFP4_BLOCK)),
            "weight_global_scale": ("F32", (1,)),
        }
        return parts | ({INPUT_SCALE: ("F32", (1,))} if fmt.name == "nvfp4" else {})
    if fmt.name == "fp8-dynamic":
        return {"weight": ("F8_E4M3", (out_features, in_features)), "weight_scale": (dtype, (out_features, 1))}
    if fmt.name == "fp8-block":
        blocks = -(-out_features // FP8_BLOCK), -(-in_features // FP8_BLOCK)
        return {"weight": ("F8_E4M3", (out_features, in_features)), "weight_scale": (dtype, blocks)}
    if fmt.name == "mxfp4":
        return {
            "weight_packed": ("U8", (out_features, in_features // 2)),
            "weight_scale": ("U8", (out_features, in_features // MXFP4_BLOCK)),
        }
    groups = in_features // fmt.group_size if fmt.group_size > 0 else 1
    parts = {
        "weight_packed": ("I32", (out_features, -(-in_features // 8))),
        "weight_scale": (dtype, (out_features, groups)),
        "weight_shape": ("I64", (2,)),
    }
    return parts | ({} if fmt.symmetric else {"weight_zero_point": ("I32", (-(-out_features // 8), groups))})


def copied_layout(fmt: TensorFormat, parts: Headers, weight: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """As `layout`, for a weight of shape `weight` whose codes are copied; `parts` are its headers, in any dialect.

    Scales keep their dtype, except that E8M0 scales, which this layout does not have, become F32.
    """
    out_features, in_features = weight
    if not fmt.name.startswith("fp8"):
        dtype = parts["weight_scale"][0]
        found = layout(fmt, weight, dtype)
        return {
            suffix: parts[suffix] if suffix == "weight_shape" and suffix in parts else found[suffix] for suffix in found
        }
    scale = next(dtype for suffix, (dtype, _) in parts.items() if suffix.startswith("weight_scale"))
    if fmt.weight_block is not None:
        shape: tuple[int, ...] = -(-out_features // FP8_BLOCK), -(-in_features // FP8_BLOCK)
    else:
        shape = (1,) if fmt.name == "fp8" and fmt.group_size == 0 else (out_features, 1)
    dtype = scale if scale in _FLOATS else "F32"
    found = {
        "weight": ("F8_E4M3", (out_features, in_features)),
        "weight_scale": (dtype, shape),
    }
    return found | ({"input_scale": ("F32", (1,))} if fmt.input_kind == "fp8-tensor" else {})


def encode(quantized: QuantizedWeight, input_scale: Tensor | None = None) -> dict[str, Tensor]:
    """Suffix -> tensor as written; `input_scale` is the static multiplier of NVFP4 or FP8 activations."""
    import torch

    from snugfit.formats.fp8 import FP8Weight
    from snugfit.formats.grids import pack_int4
    from snugfit.formats.int4 import INT4Weight
    from snugfit.formats.integer import IntegerWeight
    from snugfit.formats.mxfp4 import MXFP4Weight
    from snugfit.formats.nvfp4 import NVFP4Weight

    if isinstance(quantized, NVFP4Weight):
        parts = {
            "weight_packed": quantized.packed,
            "weight_scale": quantized.block_scale,
            "weight_global_scale": quantized.global_scale.reciprocal().reshape(1),
        }
        return parts | ({} if input_scale is None else encode_input_scale(input_scale))
    if isinstance(quantized, FP8Weight):
        inputs = {} if input_scale is None else {"input_scale": input_scale.reshape(1).float()}
        return {"weight": quantized.codes, "weight_scale": quantized.scale} | inputs
    if isinstance(quantized, MXFP4Weight):
        return {"weight_packed": quantized.packed, "weight_scale": quantized.exponent}
    if isinstance(quantized, IntegerWeight):  # copied codes of four bits in a byte each
        shape = quantized.codes.shape[0], quantized.codes.shape[1]
        quantized = INT4Weight(pack_int4(quantized.codes), quantized.scale, quantized.zero_point, shape)
    parts = {
        "weight_packed": quantized.packed,
        "weight_scale": quantized.scale,
        "weight_shape": torch.tensor(quantized.shape, dtype=torch.int64),
    }
    if quantized.zero_point is None:
        return parts
    return parts | {"weight_zero_point": pack_int4(quantized.zero_point, dim=0)}


def encode_input_scale(multiplier: Tensor) -> dict[str, Tensor]:
    """Suffix -> tensor as written, of the static multiplier of NVFP4 activations."""
    return {INPUT_SCALE: multiplier.reciprocal().reshape(1)}


def suffixes(fmt: TensorFormat, parts: Container[str]) -> tuple[str, ...]:
    """Suffixes of the tensors to read for a module in `fmt`, with the optional ones that are in `parts`."""
    if fmt.name in ("nvfp4", "nvfp4a16"):
        names = ["weight_packed", "weight_scale", "weight_global_scale"]
        return (*names, INPUT_SCALE) if fmt.input_kind == "nvfp4" else tuple(names)
    if fmt.name == "mxfp4":
        return ("weight_packed", "weight_scale")
    names = ["weight", "weight_scale"]
    if fmt.name in ("int4", "int8"):
        if "weight" not in parts:
            names = ["weight_packed", "weight_scale", "weight_shape"]
        names += ["weight_g_idx"] if "weight_g_idx" in parts else []
        names += [] if fmt.symmetric else ["weight_zero_point"]
    if fmt.input_kind in ("fp8-tensor", "int8-tensor", "int8-tensor-asym"):
        names.append("input_scale")
    if fmt.input_kind == "int8-tensor-asym":
        names.append("input_zero_point")
    return tuple(names)


def decode(fmt: TensorFormat, parts: Mapping[str, Tensor]) -> tuple[QuantizedWeight, Tensor | None]:
    """The quantized weight and the static multiplier of its inputs, from a module's tensors.

    The multiplier is fp32 (), None for inputs without one; with a zero point, int8-tensor-asym, it is fp32 [2]:
    multiplier, zero point.
    """
    from snugfit.formats.fp8 import FP8Weight
    from snugfit.formats.mxfp4 import MXFP4Weight
    from snugfit.formats.nvfp4 import NVFP4Weight

    if fmt.name in ("nvfp4", "nvfp4a16"):
        weight = NVFP4Weight(
            parts["weight_packed"], parts["weight_scale"], parts["weight_global_scale"].reshape(()).reciprocal()
        )
        return weight, input_scale(fmt, parts)
    if fmt.name == "mxfp4":
        return MXFP4Weight(parts["weight_packed"], parts["weight_scale"]), None
    if fmt.name in ("fp8", "fp8-dynamic", "fp8-block"):
        scale, block = parts["weight_scale"], fmt.weight_block
        quantized = FP8Weight(parts["weight"], scale if block else scale.reshape(-1, 1), block)
        return quantized, input_scale(fmt, parts)
    return _decode_integers(fmt, parts), input_scale(fmt, parts)


def _decode_integers(fmt: TensorFormat, parts: Mapping[str, Tensor]) -> QuantizedWeight:
    from snugfit.formats.grids import unpack_integers
    from snugfit.formats.int4 import INT4Weight
    from snugfit.formats.integer import IntegerWeight

    bits = int(fmt.name.removeprefix("int"))
    scale = parts["weight_scale"] if fmt.group_size > 0 else parts["weight_scale"].reshape(-1, 1)
    zeros, group_index = parts.get("weight_zero_point"), parts.get("weight_g_idx")
    if group_index is not None and bool((group_index < 0).any()):
        group_index = None  # -1: not initialized, the input features are in order
    if "weight" in parts:
        return IntegerWeight(parts["weight"], scale, None if zeros is None else zeros.reshape(scale.shape), group_index)
    shape = (int(parts["weight_shape"][0]), int(parts["weight_shape"][1]))
    zero_point = None
    if zeros is not None:
        # the library does not pack a whole weight's single zero point
        packed = fmt.group_size != 0
        groups = (shape[0], scale.shape[1])
        zero_point = unpack_integers(zeros, groups, bits=bits, dim=0) if packed else zeros.reshape(scale.shape)
    if bits == 4 and group_index is None:
        return INT4Weight(parts["weight_packed"], scale, zero_point, shape)
    return IntegerWeight(unpack_integers(parts["weight_packed"], shape, bits=bits), scale, zero_point, group_index)


def input_scale(fmt: TensorFormat, parts: Mapping[str, Tensor]) -> Tensor | None:
    """The static multiplier of the inputs, as `decode` gives it."""
    import torch

    if fmt.name in ("nvfp4", "nvfp4a16"):
        divisor = parts.get(INPUT_SCALE)
        return None if divisor is None else divisor.reshape(()).reciprocal()
    if fmt.name == "mxfp4" or "input_scale" not in parts:
        return None
    scale = parts["input_scale"].reshape(()).float()
    zero_point = parts.get("input_zero_point")
    return scale if zero_point is None else torch.stack((scale, zero_point.reshape(()).float()))


def fused_global_scale(scales: Sequence[Tensor]) -> Tensor:
    """The multiplier that vLLM gives a fused NVFP4 group: it takes the largest divisor, so this is the smallest."""
    import torch

    return torch.stack(list(scales)).amin()  # a GPU would be waited for once a scale by min()


def kv_layout(attention: str, dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (safetensors dtype, shape) of the scales of an attention module's FP8 cache; `dtype` is the model's."""
    return {f"{attention}.{which}_scale": (_kv_dtype(dtype), (1,)) for which in ("k", "v")}


def kv_encode(attention: str, amax: tuple[float, float], dtype: str) -> dict[str, Tensor]:
    """Name -> scale as written: the multiplier amax / 448 for the largest calibrated |key| and |value|.

    UserError for magnitudes that give no positive finite scale: an engine would fill its cache with zeros, infinities
    or NaN.
    """
    import torch

    from snugfit.formats.grids import E4M3_MAX

    as_torch = torch.bfloat16 if _kv_dtype(dtype) == "BF16" else torch.float32
    scales: dict[str, Tensor] = {}
    for name, largest in zip(kv_layout(attention, dtype), amax, strict=True):
        scale = torch.tensor([largest / E4M3_MAX], dtype=as_torch)
        if not (scale.isfinite() & (scale > 0)).all():
            raise UserError(
                f"calibrated keys or values have largest magnitude {largest}, which gives no scale.",
                code="amax-invalid",
                where=name,
                remedy="Check the source's weights, or remove `kv_cache` from the recipe.",
            )
        scales[name] = scale
    return scales


def _kv_dtype(dtype: str) -> str:
    """The model's dtype, as in llm-compressor, except fp16, which has too few small numbers for a scale."""
    return "BF16" if dtype == "BF16" else "F32"


def quantization_config(
    formats: Mapping[str, TensorFormat], ignore: Sequence[str], kv_cache: Literal["fp8"] | None = None
) -> dict[str, Any]:
    """The quantization_config of config.json.

    `formats` maps module names (as in the checkpoint) to their format; `ignore` names every unquantized linear;
    `kv_cache` "fp8" asks for an FP8 cache under the scales of `kv_layout`. Targets of different groups are disjoint,
    because engines resolve overlapping patterns differently. UserError for formats that no target can express.
    """
    groups = {
        f"group_{number}": _scheme(fmt) | {"targets": targets}
        for number, (fmt, targets) in enumerate(write_targets(formats, ignore).items())
    }
    kinds = {group["format"] for group in groups.values()}
    return {
        "config_groups": groups,
        "format": kinds.pop() if len(kinds) == 1 else MIXED,
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "kv_cache_scheme": None if kv_cache is None else _arguments(num_bits=8, type="float", strategy="tensor"),
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "version": VERSION,
    }


def formats_of(
    quantization: Mapping[str, Any], modules: Iterable[str], parts: Mapping[str, Headers], *, where: str
) -> dict[str, TensorFormat]:
    """Format of each of `modules` that a quantization_config targets; the others are unquantized."""
    _check_features(quantization, where)
    groups = list((quantization.get("config_groups") or {}).values())
    if not all(isinstance(group, dict) for group in groups):
        what = "config_groups that name presets have no reader."
        raise UserError(what, code="quantization-unknown", where=where, remedy=REMEDY)
    targets = Targets(groups, quantization.get("ignore") or [], where=where)
    found: dict[str, TensorFormat] = {}
    for module in modules:
        group = targets.group_of(module)
        plain = parts.get(module, {}).get("weight", ("",))[0] in _PLAIN
        if group is not None and not (plain and targets.leaves_plain(module)):
            found[module] = parse_scheme(group, where=where)
    return found


def kv_cache(quantization: Mapping[str, Any]) -> str | None:
    """The requested format of the KV cache: "fp8", None for the model's dtype, or the text of any other scheme."""
    scheme = quantization.get("kv_cache_scheme")
    if not scheme:
        return None
    known = isinstance(scheme, dict) and (
        scheme.get("type"),
        scheme.get("num_bits"),
        scheme.get("symmetric", True),
    ) == ("float", 8, True)
    return "fp8" if known and scheme.get("strategy", "tensor") in ("tensor", "attn_head") else str(scheme)


def _check_features(quantization: Mapping[str, Any], where: str) -> None:
    """UserError for features without a reader that concern a whole file: sparse layouts, rotations at run time."""
    sparse = (quantization.get("sparsity_config") or {}).get("format", "dense")
    groups = [group for group in (quantization.get("config_groups") or {}).values() if isinstance(group, dict)]
    kinds = {str(kind) for kind in (sparse, quantization.get("format"), *(group.get("format") for group in groups))}
    for kind in sorted(kinds):
        if kind.startswith(("sparse", "marlin")):
            what = f"format {kind!r} has no reader."
            raise UserError(what, code="quantization-unknown", where=where, remedy=REMEDY)
    schemes = (quantization.get("transform_config") or {}).get("config_groups") or {}
    for name, scheme in schemes.items():
        places = {str(apply.get("location")) for apply in scheme.get("apply") or []}
        # transforms at weight_input and weight_output are already applied to the weights
        online = sorted(place for place in places if not place.startswith("weight_"))
        if online:
            raise UserError(
                f"transform_config: {name} rotates activations at run time ({', '.join(online)}), which has no reader.",
                code="quantization-unknown",
                where=where,
                remedy=REMEDY,
            )


def _scheme(fmt: TensorFormat) -> dict[str, Any]:
    if fmt.name in ("nvfp4", "nvfp4a16"):
        weights = _arguments(
            num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn"
        )
        inputs = weights | {"dynamic": "local"} if fmt.name == "nvfp4" else None
        return {"format": NVFP4, "weights": weights, "input_activations": inputs, "output_activations": None}
    if fmt.name in ("fp8-dynamic", "fp8"):  # one scale an output channel; of a copied weight also one for the whole
        inputs = _arguments(num_bits=8, type="float", strategy="token", dynamic=True)
        if fmt.input_kind == "fp8-tensor":
            inputs = _arguments(num_bits=8, type="float", strategy="tensor")
        strategy = "tensor" if fmt.name == "fp8" and fmt.group_size == 0 else "channel"
        return {
            "format": FLOAT,
            "weights": _arguments(num_bits=8, type="float", strategy=strategy),
            "input_activations": None if fmt.input_kind == "none" else inputs,
            "output_activations": None,
        }
    if fmt.name == "fp8-block":
        block = [FP8_BLOCK, FP8_BLOCK]
        return {
            "format": FLOAT,
            "weights": _arguments(num_bits=8, type="float", strategy="block", block_structure=block),
            "input_activations": _arguments(
                num_bits=8, type="float", strategy="group", group_size=FP8_BLOCK, dynamic=True
            ),
            "output_activations": None,
        }
    if fmt.name == "mxfp4":
        weights = _arguments(
            num_bits=4, type="float", strategy="group", group_size=MXFP4_BLOCK, scale_dtype="torch.uint8"
        )
        inputs = weights | {"dynamic": True} if fmt.input_kind == "mxfp4" else None
        return {"format": MXFP4, "weights": weights, "input_activations": inputs, "output_activations": None}
    weights = _arguments(num_bits=4, type="int", strategy="group", group_size=fmt.group_size, symmetric=fmt.symmetric)
    if fmt.group_size == WHOLE_ROW:  # of a copied weight
        weights = _arguments(num_bits=4, type="int", strategy="channel", symmetric=fmt.symmetric)
    return {"format": PACKED, "weights": weights, "input_activations": None, "output_activations": None}


def _arguments(**given: object) -> dict[str, object]:
    return {"dynamic": False, "symmetric": True} | given
