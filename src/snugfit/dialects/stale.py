"""Finds a quantization config that no longer describes the file: it asks for codes, and every weight is plain.

Such a config stays behind when adapters are merged into a dequantized model. The headers decide.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from snugfit.dialects.headers import Headers
from snugfit.dialects.packed import WIDE, bits_of, is_cache_scale, split_name, weights_of

# tensors that only quantized weights, their inputs or an FP8 cache have
_SERVING = re.compile(
    r"weight\..+|(weight|input|output|activation)_(scale|scale_inv|scale_2|global_scale|zero_point|g_idx|shape)"
    r"|.*_(blocks|scales)|qzeros|scales|g_idx|SCB|absmax|quant_map|pre_quant_scale|weight_format"
)
# dtypes of masks, positions and counters, which 16-bit files have too
_COUNTERS = frozenset({"BOOL", "I64", "U8", "I32"})


def is_stale(quantization: Mapping[str, Any], tensors: Headers) -> bool:
    """Whether a quantization config asks for quantized weights, and the headers have plain ones alone."""
    if not quantization or not _asks_for_codes(quantization):
        return False
    modules: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    for name, header in tensors.items():
        module, suffix = split_name(name)
        modules.setdefault(module, {})[suffix] = header
        if _SERVING.fullmatch(suffix) or is_cache_scale(module, suffix):
            return False
        if header[0] not in WIDE and (header[0] not in _COUNTERS or suffix == "weight"):
            return False
    bits = bits_of(quantization)
    return not any(packed.label for parts in modules.values() for packed in weights_of(parts, bits))


def _asks_for_codes(quantization: Mapping[str, Any]) -> bool:
    """Whether weights are to be quantized, and not only a KV cache."""
    nested = quantization.get("quantization")
    details = nested if isinstance(nested, dict) else quantization
    if "config_groups" in quantization and not quantization["config_groups"]:
        return False
    modelopt = str(quantization.get("quant_method") or "").startswith("modelopt")
    return not modelopt or bool(details.get("quant_algo") or details.get("config_groups"))
