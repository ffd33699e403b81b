"""Checks the structure of a quantization config before its values are used: which key holds which kind of value.

Keys that no reader uses may hold anything; null counts as a missing key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from snugfit.errors import UserError

_WORDS: Mapping[type, str] = {
    dict: "a mapping",
    list: "a list",
    str: "text",
    int: "a whole number",
    bool: "true or false",
}
# a type, a tuple of types, a list of one kind, a mapping of known keys, or {"*": ...}, a mapping whose keys are names
_ARGUMENTS: Mapping[str, Any] = {
    "num_bits": int,
    "type": str,
    "strategy": str,
    "group_size": int,
    "symmetric": bool,
    "dynamic": (bool, str),
    "block_structure": (list, str),
}
_GROUP: Mapping[str, Any] = {
    "targets": [str],
    "weights": _ARGUMENTS,
    "input_activations": _ARGUMENTS,
    "output_activations": dict,
    "format": str,
}
_DETAILS: Mapping[str, Any] = {
    "quant_algo": str,
    "kv_cache_quant_algo": (str, dict),
    "kv_cache_scheme": (str, dict),
    "exclude_modules": [str],
    "ignore": [str],
    "quantized_layers": {"*": {"quant_algo": str}},
}
_QUANTIZATION: Mapping[str, Any] = {
    **_DETAILS,
    "config_groups": {"*": (_GROUP, list)},
    "format": str,
    "sparsity_config": {"format": str},
    "transform_config": {"config_groups": {"*": {"apply": [{"location": str}]}}},
    "activation_scheme": str,
    "weight_block_size": list,
    "quantization": _DETAILS,
}


def check_structure(quantization: Mapping[str, Any], *, where: str) -> None:
    """UserError, with the key, for a value of another kind than the readers expect."""
    _check(quantization, _QUANTIZATION, "", where)


def _check(value: Any, kind: Any, path: str, where: str) -> None:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    fitting = next((one for one in kinds if _fits(value, one)), None)
    if fitting is None:
        known = " or ".join(_WORDS[_type_of(one)] for one in kinds)
        what = f"{path.lstrip('.')} must be {known}, got {str(value)[:100]!r}."
        remedy = "Correct the config, or download it again."
        raise UserError(what, code="quantization-invalid", where=where, remedy=remedy)
    if isinstance(fitting, list):
        for number, entry in enumerate(value):
            _check(entry, fitting[0], f"{path}[{number}]", where)
    elif isinstance(fitting, Mapping):
        for key, entry in value.items():
            if "*" in fitting:
                _check(entry, fitting["*"], f"{path}.{key}", where)
            elif key in fitting and entry is not None:
                _check(entry, fitting[key], f"{path}.{key}", where)


def _fits(value: Any, kind: Any) -> bool:
    wanted = _type_of(kind)
    return isinstance(value, wanted) and not (wanted is int and isinstance(value, bool))


def _type_of(kind: Any) -> type:
    return kind if isinstance(kind, type) else dict if isinstance(kind, Mapping) else list
