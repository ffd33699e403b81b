"""The same codes in the other dialect: names, shapes and scales of a compressed-tensors file as ModelOpt's, and back.

Codes and block scales are the same bytes. A global scale is inverted in fp32: the divisor of one is the multiplier of
the other, and what engines compute from it stays the same up to its last bit.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from snugfit.dialects.headers import Headers
from snugfit.dialects.modelopt import FORMATS
from snugfit.errors import UserError
from snugfit.formats.spec import TensorFormat

COMPRESSED, MODELOPT = "compressed-tensors", "modelopt"
Convert = Callable[[bytes], bytes]
_SINGLE = "<f"
_ALGORITHMS: Mapping[TensorFormat, str] = {fmt: name for name, fmt in FORMATS.items()}


@dataclass(frozen=True)
class Part:
    """A tensor in the other dialect: its suffix, dtype, shape, and what becomes of its bytes (None: nothing)."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]
    convert: Convert | None = None


def translated(fmt: TensorFormat, parts: Headers, to: str, *, where: str) -> dict[str, Part]:
    """Suffix of each of a module's tensors -> the tensor in the dialect `to`; UserError where that has no such format.

    `parts` are those that the format needs.
    """
    if fmt not in _ALGORITHMS:
        raise UserError(
            f"ModelOpt's dialect has no {fmt.label()}.",
            code="quantization-unknown",
            where=where,
            remedy="Keep the dialect, or quantize this weight in another format.",
        )
    found = {}
    for suffix, (dtype, shape) in parts.items():
        found[suffix] = _to_modelopt(suffix, dtype, shape, fmt) if to == MODELOPT else _to_ct(suffix, dtype, shape, fmt)
    return found


def _to_modelopt(suffix: str, dtype: str, shape: tuple[int, ...], fmt: TensorFormat) -> Part:
    if suffix == "weight_packed":
        return Part("weight", dtype, shape)
    if suffix in ("weight_global_scale", "input_global_scale"):
        name = "weight_scale_2" if suffix.startswith("weight") else "input_scale"
        return Part(name, "F32", (), inverted(dtype))
    if suffix == "weight_scale" and fmt.name.startswith("fp8"):
        side = math.prod(shape)
        new = (shape[0], 1, shape[1], 1) if fmt.weight_block is not None else () if side == 1 else (side,)
        return Part(suffix, "F32", new, widened(dtype))
    return Part(suffix, "F32", (), widened(dtype)) if suffix == "input_scale" else Part(suffix, dtype, shape)


def _to_ct(suffix: str, dtype: str, shape: tuple[int, ...], fmt: TensorFormat) -> Part:
    nvfp4 = fmt.name.startswith("nvfp4")
    if nvfp4 and suffix == "weight":
        return Part("weight_packed", dtype, shape)
    if nvfp4 and suffix in ("weight_scale_2", "input_scale"):
        name = "weight_global_scale" if suffix == "weight_scale_2" else "input_global_scale"
        return Part(name, "F32", (1,), inverted(dtype))
    if suffix == "weight_scale" and not nvfp4:
        new: tuple[int, ...] = (1,) if fmt.name == "fp8" else (math.prod(shape), 1)
        if fmt.weight_block is not None:
            new = (shape[0], shape[2]) if len(shape) == 4 else shape
        return Part(suffix, "F32", new, widened(dtype))
    return Part(suffix, "F32", (1,), widened(dtype)) if suffix == "input_scale" else Part(suffix, dtype, shape)


def widened(dtype: str) -> Convert | None:
    """The bytes of 16-bit floats as fp32, None for fp32."""
    if dtype == "F32":
        return None
    return lambda raw: struct.pack(f"<{len(raw) // 2}f", *_floats(raw, dtype))


def inverted(dtype: str) -> Convert:
    """The bytes of floats as their reciprocals in fp32."""

    def convert(raw: bytes) -> bytes:
        return b"".join(reciprocal(value) for value in _floats(raw, dtype))

    return convert


def reciprocal(value: float) -> bytes:
    """1 / value rounded to fp32; 1 / 0 is infinite, as in fp32."""
    if value == 0:
        return struct.pack(_SINGLE, math.copysign(math.inf, value))
    try:
        return struct.pack(_SINGLE, 1.0 / value)
    except OverflowError:
        return struct.pack(_SINGLE, math.copysign(math.inf, value))


def _floats(raw: bytes, dtype: str) -> Sequence[float]:
    count = len(raw) // (4 if dtype == "F32" else 2)
    if dtype == "BF16":
        return struct.unpack(f"<{count}f", b"".join(b"\0\0" + raw[2 * n : 2 * n + 2] for n in range(count)))
    return struct.unpack(f"<{count}{'f' if dtype == 'F32' else 'e'}", raw)


def modelopt_config(
    formats: Mapping[str, TensorFormat], ignore: Iterable[str], kv_cache: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """ModelOpt's quantization_config of config.json, and its file hf_quant_config.json."""
    algorithms = {module: _ALGORITHMS[fmt] for module, fmt in formats.items()}
    kinds = set(algorithms.values())
    details: dict[str, Any] = {"quant_algo": kinds.pop() if len(kinds) == 1 else "MIXED_PRECISION"}
    if details["quant_algo"] == "MIXED_PRECISION":
        details["quantized_layers"] = {module: _layer(name) for module, name in algorithms.items()}
    if any("NVFP4" in name for name in algorithms.values()):
        details["group_size"] = 16
    left = list(ignore)
    cache = {"dynamic": False, "num_bits": 8, "type": "float"} if kv_cache else None
    config = {**details, "quant_method": MODELOPT, "ignore": left} | ({"kv_cache_scheme": cache} if cache else {})
    nested = details | {"kv_cache_quant_algo": "FP8" if kv_cache else None, "exclude_modules": left}
    return config, {"producer": {"name": "modelopt"}, "quantization": nested}


def _layer(algorithm: str) -> dict[str, Any]:
    return {"quant_algo": algorithm} | ({"group_size": 16} if "NVFP4" in algorithm else {})
