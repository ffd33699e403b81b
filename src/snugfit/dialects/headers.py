"""Facts about a module that the headers of its tensors state in every dialect."""

from __future__ import annotations

import math
from collections.abc import Mapping

Headers = Mapping[str, tuple[str, tuple[int, ...]]]  # name -> (safetensors dtype, shape)

_WIDE = frozenset({"BF16", "F16", "F32", "F64"})


def by_module(tensors: Headers) -> dict[str, Headers]:
    """Module -> suffix ("weight", "weight_scale", ...) -> header."""
    modules: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    for name, header in tensors.items():
        module, _, suffix = name.rpartition(".")
        modules.setdefault(module, {})[suffix] = header
    return dict(modules)


def holds_weight(parts: Headers) -> bool:
    """Whether the module has a weight, in any form."""
    return any(suffix in parts for suffix in ("weight", "weight_packed", "qweight"))


def holds_codes(parts: Headers) -> bool:
    """Whether this module's weight is stored quantized: packed, or in a dtype narrower than 16 bits."""
    if "weight_packed" in parts or "qweight" in parts:
        return True
    return "weight" in parts and parts["weight"][0] not in _WIDE


def dtype_of(parts: Headers, suffix: str) -> str:
    """The safetensors dtype of one tensor, "" for a missing one."""
    return parts[suffix][0] if suffix in parts else ""


def is_single(parts: Headers, suffix: str) -> bool:
    """Whether a tensor exists and holds one number."""
    return suffix in parts and math.prod(parts[suffix][1]) == 1
