"""Reads config groups of compressed-tensors: which of our formats a group's weights and inputs describe.

Defaults are the library's: integers of 8 bits, symmetric, static; without a strategy the group size decides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from snugfit.errors import UserError
from snugfit.formats.spec import FP8_BLOCK, MXFP4_BLOCK, NVFP4_BLOCK, WHOLE_ROW, InputKind, TensorFormat

REMEDY = "Evaluate the 16-bit original, or dequantize this checkpoint to BF16 first."

# (type, bits, strategy, scale made at run time, symmetric)
_INPUTS: Mapping[tuple[str, int, str, bool, bool], InputKind] = {
    ("float", 4, "tensor_group", True, True): "nvfp4",
    ("float", 4, "group", True, True): "mxfp4",
    ("float", 8, "token", True, True): "fp8-token",
    ("float", 8, "tensor", True, True): "fp8-tensor-dynamic",
    ("float", 8, "tensor", False, True): "fp8-tensor",
    ("float", 8, "group", True, True): "fp8-group",
    ("int", 8, "token", True, True): "int8-token",
    ("int", 8, "token", True, False): "int8-token-asym",
    ("int", 8, "tensor", False, True): "int8-tensor",
    ("int", 8, "tensor", False, False): "int8-tensor-asym",
}
# (bits, strategy, group size) of floats
_FOUR_BITS: Mapping[tuple[int, str, object], TensorFormat] = {
    (4, "tensor_group", NVFP4_BLOCK): TensorFormat("nvfp4"),
    (4, "group", MXFP4_BLOCK): TensorFormat("mxfp4"),
}
_GROUPS: Mapping[InputKind, int] = {"nvfp4": NVFP4_BLOCK, "mxfp4": MXFP4_BLOCK, "fp8-group": FP8_BLOCK}


def parse_scheme(group: Mapping[str, Any], *, where: str) -> TensorFormat:
    """The format that a config group describes; UserError, at the place `where`, for one that has no reader."""
    weights, inputs = group.get("weights"), group.get("input_activations")
    if group.get("output_activations"):
        raise _no_reader("quantized outputs of linears have no reader.", where)
    if not weights:
        raise _no_reader("a config group that quantizes inputs alone has no reader.", where)
    fmt = _weights(weights, where)
    kind = _inputs(inputs, fmt) if inputs else None
    if fmt is None or (inputs and kind is None):
        raise _no_reader(_described(weights, inputs), where)
    if fmt.name == "nvfp4":
        if kind not in (None, "nvfp4"):
            raise _no_reader(_described(weights, inputs), where)
        return TensorFormat("nvfp4" if kind else "nvfp4a16")
    if fmt == TensorFormat("fp8", WHOLE_ROW) and kind == "fp8-token":
        return TensorFormat("fp8-dynamic")
    if fmt.block is not None and kind == "fp8-group":
        return fp8_blocks(fmt.block)
    if fmt.name == "mxfp4" and kind in (None, "mxfp4"):
        return TensorFormat("mxfp4", inputs=None if kind else "none")
    return TensorFormat(fmt.name, fmt.group_size, fmt.symmetric, fmt.block, kind)


def fp8_blocks(block: tuple[int, int]) -> TensorFormat:
    """FP8 with one scale a block; inputs with one scale for each token and as many columns as a block has."""
    whole = block == (FP8_BLOCK, FP8_BLOCK)
    return TensorFormat("fp8-block") if whole else TensorFormat("fp8", block=block, inputs="fp8-group")


def _weights(arguments: Mapping[str, Any], where: str) -> TensorFormat | None:
    """The format without its inputs, None for one without a reader."""
    kind, bits, strategy = _key(arguments)
    size, symmetric = arguments.get("group_size"), arguments.get("symmetric", True)
    group = {"group": size, "channel": WHOLE_ROW, "tensor": 0}.get(strategy)
    if arguments.get("dynamic") or (kind == "float" and not symmetric):
        return None
    if kind == "int" and bits in (4, 8) and group is not None:
        return TensorFormat(f"int{bits}", group, symmetric)
    if (kind, bits, strategy) == ("float", 8, "block"):
        return TensorFormat("fp8", block=_block(arguments.get("block_structure"), where))
    if (kind, bits) == ("float", 8) and strategy in ("channel", "tensor"):
        return TensorFormat("fp8", group or 0)
    return _FOUR_BITS.get((bits, strategy, size)) if kind == "float" else None


def _inputs(arguments: Mapping[str, Any], fmt: TensorFormat | None) -> InputKind | None:
    """The kind of inputs that a file asks for, None for one without a reader."""
    kind, bits, strategy = _key(arguments)
    # the global scale of a tensor group is static, its blocks' scales never are
    dynamic = strategy == "tensor_group" or bool(arguments.get("dynamic"))
    found = _INPUTS.get((kind, bits, strategy, dynamic, arguments.get("symmetric", True)))
    if found is None or found not in _GROUPS:
        return found
    size = fmt.block[1] if found == "fp8-group" and fmt and fmt.block else _GROUPS[found]
    return found if arguments.get("group_size") == size else None


def _key(arguments: Mapping[str, Any]) -> tuple[str, int, str]:
    size = arguments.get("group_size")
    implied = "tensor" if size is None else "group" if size > 0 else "channel"
    strategy = str(arguments.get("strategy") or implied).lower()
    return str(arguments.get("type") or "int").lower(), arguments.get("num_bits", 8), strategy


def _block(structure: object, where: str) -> tuple[int, int]:
    """Output and input features of a block, of [128, 128] or "128x128"."""
    sides = re.findall(r"\d+", str(structure))
    if len(sides) != 2 or "0" in sides:
        what = f"block_structure must be two positive numbers, got {structure!r}."
        raise UserError(what, code="quantization-invalid", where=where, remedy="Correct the config.")
    return int(sides[0]), int(sides[1])


def _described(weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> str:
    def brief(arguments: Mapping[str, Any] | None) -> str:
        return str({key: value for key, value in (arguments or {}).items() if value is not None and value != {}})

    asked = f" with inputs {brief(inputs)}" if inputs else ""
    return f"no reader for weights {brief(weights)}{asked}."


def _no_reader(what: str, where: str) -> UserError:
    return UserError(what, code="quantization-unknown", where=where, remedy=REMEDY)
