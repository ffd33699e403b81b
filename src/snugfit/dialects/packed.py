"""Which weights a module's tensors represent, in any dialect, recognized by suffixes, dtypes and shapes alone.

This names formats and counts weights, also of formats without a reader; it decodes nothing. A weight has the name of
the parameter that a 16-bit model would have: `weight`, or `gate_up_proj` of experts in one 3-D tensor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from snugfit.dialects.headers import Headers

WIDE = frozenset({"BF16", "F16", "F32", "F64"})
# tensors that belong to a weight, its inputs or a cache and are no parameters of the model
_SERVES = re.compile(
    r"weight\..+|.*_(scale|scales|scale_inv|scale_2|scale2|global_scale|zero_point|zero_points|qzeros|g_idx|shape)"
    r"|scales|qzeros|g_idx|SCB|weight_format|biases|zeros|perm|absmax|quant_map|quant_state|pre_quant_scale|scale|"
    r"zero_point|meta|W_q|suh|svh|mcg|mul1|q_groups|q_group_map|q_invperm|q_scale|q_scale_max|codebooks|SU|SV|"
    r"output_scale|weight_u|weight_v"
)
CACHE_SCALE = re.compile(r"[kvq]_scale|kv_scale|prob_scale|[kv]_zero_point")


def is_cache_scale(module: str, suffix: str) -> bool:
    """Whether a tensor scales the keys, values or queries of an FP8 cache, under any name that vLLM reads."""
    leaf = module.rpartition(".")[2]
    of_cache = suffix == "scale" and leaf in ("k_cache", "v_cache")
    return (
        of_cache or (suffix == "output_scale" and leaf in ("k_proj", "v_proj")) or bool(CACHE_SCALE.fullmatch(suffix))
    )


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight: its parameter's name, its unpacked shape, the label of its format ("" for plain numbers).

    `tensor` is the suffix of the tensor that holds it.
    """

    parameter: str
    shape: tuple[int, ...]
    label: str
    tensor: str


def quantization_of(config: Mapping[str, Any], hf_quant_config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The quantization config of a checkpoint, {} for one without."""
    text = config.get("text_config")
    for place in (config, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config", "quantization"):
            given = place.get(key)
            if isinstance(given, dict) and given:
                return given
    return {} if hf_quant_config is None else {"quant_method": "modelopt", **hf_quant_config}


def method_of(quantization: Mapping[str, Any]) -> str:
    """The method's name; "" for an unquantized checkpoint."""
    implied = "compressed-tensors" if "config_groups" in quantization else "mlx" if "bits" in quantization else ""
    if quantization.get("load_in_4bit") or quantization.get("load_in_8bit"):
        implied = "bitsandbytes"
    return str(quantization.get("quant_method") or (implied if quantization else ""))


def bits_of(quantization: Mapping[str, Any]) -> int | None:
    """Bits of a weight, if the config states them as one number."""
    for key in ("bits", "w_bit", "num_bits", "nbits", "weight_bits", "weights"):
        given = quantization.get(key)
        digits = re.fullmatch(r"q?(?:u?int|float)?(\d{1,2})", str(given)) if isinstance(given, (int, str)) else None
        if digits and 1 <= int(digits[1]) <= 16:
            return int(digits[1])
    return None


def split_name(name: str) -> tuple[str, str]:
    """Module and suffix of a tensor; bitsandbytes and quanto have suffixes such as weight.absmax."""
    module, dot, suffix = name.partition(".weight.")
    if dot:
        return module, f"weight.{suffix}"
    module, _, suffix = name.rpartition(".")
    return module, suffix


def serves(suffix: str) -> bool:
    """Whether a tensor belongs to a weight and is no parameter of the model: a scale, a zero point, a column order."""
    return _SERVES.fullmatch(suffix) is not None


def weights_of(parts: Headers, bits: int | None) -> list[Packed]:
    """The weights that a module's tensors represent; `bits` is the config's width of integer codes."""
    if "weight_packed" in parts:
        return [_compressed(parts, bits or 4)]
    if "qweight" in parts:
        return [_qweight(parts, bits)]
    if "weight" in parts:
        return [_weight(parts, bits or 4)]
    named = [_foreign(parts, suffix, bits or 4) for suffix in _FOREIGN if suffix in parts]
    blocks = [
        Packed(base, (*shape[:-2], shape[-2] * shape[-1] * 2), "mxfp4", suffix)
        for suffix, (_, shape) in parts.items()
        if (base := suffix.removesuffix("_blocks")) != suffix and f"{base}_scales" in parts and len(shape) > 2
    ]
    if named or blocks:
        return named or blocks
    return [
        Packed(suffix, shape, "" if dtype in WIDE else _plain_codes(dtype, f"{suffix}_scale" in parts), suffix)
        for suffix, (dtype, shape) in parts.items()
        if len(shape) == 3 and not serves(suffix)
    ]


# suffix of another tool's codes -> its name
_FOREIGN: Mapping[str, str] = {
    "W_q": "hqq",
    "weight._data": "quanto",
    "weight_qdata": "torchao",
    "weight:qdata": "torchao",
    "q_weight": "exl2",
    "trellis": "exl3",
    "Qidxs": "quip",
    "codes": "aqlm",
    "indices": "vptq",
    "qdata": "torchao",
}


def _compressed(parts: Headers, bits: int) -> Packed:
    dtype, shape = parts["weight_packed"]
    per_element = 2 if dtype == "U8" else 32 // bits
    label = f"int{bits}"
    if dtype == "U8":
        label = "nvfp4" if "weight_global_scale" in parts else "mxfp4"
    return Packed("weight", _wider(shape, per_element), label, "weight_packed")


def _qweight(parts: Headers, bits: int | None) -> Packed:
    """GPTQ packs along the inputs, AWQ along the outputs; both store [inputs, outputs]."""
    shape = parts["qweight"][1]
    scales = parts["scales"][1] if "scales" in parts else ()
    if len(shape) != 2 or len(scales) != 2 or not math.prod((*shape, *scales)):
        return Packed("weight", shape, "qweight", "qweight")
    if scales[1] == shape[1]:
        in_features = math.prod(parts["g_idx"][1]) if "g_idx" in parts else shape[0] * 32 // (bits or 4)
        out_features, name, found = shape[1], "gptq", 32 * shape[0] // max(in_features, 1)
    else:
        out_features, in_features, name, found = scales[1], shape[0], "awq", 32 * shape[1] // scales[1]
    return Packed("weight", (out_features, in_features), f"{name}-int{found}-g{in_features // scales[0]}", "qweight")


def _weight(parts: Headers, bits: int) -> Packed:
    dtype, shape = parts["weight"]
    state = next((s.rpartition("__")[2] for s in parts if s.startswith("weight.quant_state.")), None)
    if state is not None:
        return Packed("weight", (2 * math.prod(shape),), f"bnb-{state}", "weight")
    if dtype in WIDE:
        return Packed("weight", shape, "", "weight")
    if "SCB" in parts:
        return Packed("weight", shape, "bnb-int8", "weight")
    scale = parts.get("weight_scale", ("", ()))
    if dtype == "U8" and "weight_scale" in parts:
        return Packed("weight", _wider(shape, 2), "nvfp4" if scale[0] == "F8_E4M3" else "4-bit", "weight")
    if dtype == "U32" and "scales" in parts:
        return Packed("weight", _wider(shape, 32, bits), f"mlx-int{bits}", "weight")
    scaled = any(s.startswith(("weight_scale", "weight_scales")) for s in parts)
    return Packed("weight", shape, _plain_codes(dtype, scaled), "weight")


def _wider(shape: tuple[int, ...], factor: int, divisor: int = 1) -> tuple[int, ...]:
    """A shape with its last dimension unpacked."""
    return (*shape[:-1], shape[-1] * factor // divisor) if shape else shape


def _plain_codes(dtype: str, scaled: bool) -> str:
    known = {"F8_E4M3": "fp8", "F8_E5M2": "fp8-e5m2", "I8": "int8"}
    return known.get(dtype, dtype.lower()) if scaled or dtype.startswith("F8") else dtype.lower()


def _foreign(parts: Headers, suffix: str, bits: int) -> Packed:
    """Counted by the config's bits; the shape is unknown."""
    dtype, shape = parts[suffix]
    size = {"U8": 8, "I8": 8, "I16": 16, "I32": 32, "U32": 32}.get(dtype, 8)
    return Packed("weight", (math.prod(shape) * size // bits,), f"{_FOREIGN[suffix]}-{bits}bit", suffix)
