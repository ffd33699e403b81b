"""The compressed-tensors layout: names, dtypes and shapes on disk, and the quantization_config that describes them.

In memory a scale always multiplies codes. NVFP4 files store its global scales as divisors; they are inverted here and
nowhere else. Facts follow compressed-tensors 0.20, the oracle of the tests, and what vLLM asks of a file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from snugfit.errors import UserError
from snugfit.formats.spec import NVFP4_BLOCK, TensorFormat

if TYPE_CHECKING:
    from torch import Tensor

    from snugfit.formats.stored import Stored

NVFP4 = "nvfp4-pack-quantized"
FLOAT = "float-quantized"
PACKED = "pack-quantized"
MIXED = "mixed-precision"
# the first release that reads per-group formats and NVFP4 beside FP8
VERSION = "0.14.0"

# names of the tensors that stand for a module's weight, by what follows the module's name
INPUT_SCALE = "input_global_scale"


def layout(fmt: TensorFormat, shape: tuple[int, ...], dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Suffix -> (safetensors dtype, shape) of all tensors that replace a weight [N, K] whose dtype is `dtype`."""
    rows, columns = shape
    if fmt.name in ("nvfp4", "nvfp4a16"):
        parts: dict[str, tuple[str, tuple[int, ...]]] = {
            "weight_packed": ("U8", (rows, columns // 2)),
            "weight_scale": ("F8_E4M3", (rows, columns // NVFP4_BLOCK)),
            "weight_global_scale": ("F32", (1,)),
        }
        return parts | ({INPUT_SCALE: ("F32", (1,))} if fmt.name == "nvfp4" else {})
    if fmt.name == "fp8-dynamic":
        return {"weight": ("F8_E4M3", (rows, columns)), "weight_scale": (dtype, (rows, 1))}
    groups = columns // fmt.group
    parts = {
        "weight_packed": ("I32", (rows, -(-columns // 8))),
        "weight_scale": (dtype, (rows, groups)),
        "weight_shape": ("I64", (2,)),
    }
    return parts | ({} if fmt.symmetric else {"weight_zero_point": ("I32", (-(-rows // 8), groups))})


def encode(stored: Stored, input_scale: Tensor | None = None) -> dict[str, Tensor]:
    """Suffix -> tensor as written; `input_scale` is NVFP4's static activation multiplier."""
    import torch

    from snugfit.formats.fp8 import FP8Weight
    from snugfit.formats.grids import pack_int4
    from snugfit.formats.nvfp4 import NVFP4Weight

    if isinstance(stored, NVFP4Weight):
        parts = {
            "weight_packed": stored.packed,
            "weight_scale": stored.block_scale,
            "weight_global_scale": stored.global_scale.reciprocal().reshape(1),
        }
        return parts | ({INPUT_SCALE: input_scale.reciprocal().reshape(1)} if input_scale is not None else {})
    if isinstance(stored, FP8Weight):
        return {"weight": stored.codes, "weight_scale": stored.scale}
    parts = {
        "weight_packed": stored.packed,
        "weight_scale": stored.scale,
        "weight_shape": torch.tensor(stored.shape, dtype=torch.int64),
    }
    if stored.zero_point is None:
        return parts
    return parts | {"weight_zero_point": pack_int4(stored.zero_point, dim=0)}


def decode(fmt: TensorFormat, parts: Mapping[str, Tensor]) -> tuple[Stored, Tensor | None]:
    """The stored weight and the activation multiplier (None where there is none) from a module's tensors."""
    from snugfit.formats.fp8 import FP8Weight
    from snugfit.formats.grids import unpack_int4
    from snugfit.formats.int4 import INT4Weight
    from snugfit.formats.nvfp4 import NVFP4Weight

    if fmt.name in ("nvfp4", "nvfp4a16"):
        weight = NVFP4Weight(
            parts["weight_packed"], parts["weight_scale"], parts["weight_global_scale"].reshape(()).reciprocal()
        )
        scale = parts.get(INPUT_SCALE)
        return weight, None if scale is None else scale.reshape(()).reciprocal()
    if fmt.name == "fp8-dynamic":
        return FP8Weight(parts["weight"], parts["weight_scale"]), None
    rows, columns = (int(side) for side in parts["weight_shape"])
    scale = parts["weight_scale"]
    zeros = parts.get("weight_zero_point")
    zero_point = None if zeros is None else unpack_int4(zeros, (rows, scale.shape[1]), dim=0)
    return INT4Weight(parts["weight_packed"], scale, zero_point, (rows, columns)), None


def quantization_config(formats: Mapping[str, TensorFormat], ignore: Sequence[str]) -> dict[str, Any]:
    """The quantization_config of config.json.

    `formats` maps module names (as in the checkpoint) to their format; `ignore` names every linear left alone.
    Targets of different groups are disjoint: engines resolve overlapping patterns differently.
    """
    by_format: dict[TensorFormat, list[str]] = {}
    for module, fmt in formats.items():
        by_format.setdefault(fmt, []).append(module)
    groups = {
        f"group_{number}": _scheme(fmt) | {"targets": _targets(modules, formats, fmt, ignore)}
        for number, (fmt, modules) in enumerate(by_format.items())
    }
    kinds = {group["format"] for group in groups.values()}
    return {
        "config_groups": groups,
        "format": kinds.pop() if len(kinds) == 1 else MIXED,
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "version": VERSION,
    }


def read_formats(config: Mapping[str, Any], modules: Iterable[str]) -> dict[str, TensorFormat]:
    """Format of each of `modules` that a quantization_config targets; the rest is unquantized."""
    quantization = config["quantization_config"]
    method = quantization.get("quant_method")
    if method != "compressed-tensors":
        raise UserError(f"quant_method {method!r} cannot be read yet.", where="config.json: quantization_config")
    ignored = quantization.get("ignore") or []
    groups = [(group["targets"], _parse_scheme(group)) for group in quantization["config_groups"].values()]
    found: dict[str, TensorFormat] = {}
    for module in modules:
        if any(_matches(module, target) for target in ignored):
            continue
        fmt = next((fmt for targets, fmt in groups if any(_matches(module, t) for t in targets)), None)
        if fmt is not None:
            found[module] = fmt
    return found


def _matches(module: str, target: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return target in (module, "Linear")


def _scheme(fmt: TensorFormat) -> dict[str, Any]:
    if fmt.name in ("nvfp4", "nvfp4a16"):
        weights = _arguments(
            num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn"
        )
        inputs = weights | {"dynamic": "local"} if fmt.name == "nvfp4" else None
        return {"format": NVFP4, "weights": weights, "input_activations": inputs, "output_activations": None}
    if fmt.name == "fp8-dynamic":
        return {
            "format": FLOAT,
            "weights": _arguments(num_bits=8, type="float", strategy="channel"),
            "input_activations": _arguments(num_bits=8, type="float", strategy="token", dynamic=True),
            "output_activations": None,
        }
    weights = _arguments(num_bits=4, type="int", strategy="group", group_size=fmt.group, symmetric=fmt.symmetric)
    return {"format": PACKED, "weights": weights, "input_activations": None, "output_activations": None}


def _arguments(**given: object) -> dict[str, object]:
    return {"dynamic": False, "symmetric": True} | given


def _parse_scheme(group: Mapping[str, Any]) -> TensorFormat:
    weights = group.get("weights") or {}
    key = (weights.get("type"), weights.get("num_bits"), weights.get("strategy"))
    inputs = group.get("input_activations")
    if key == ("float", 4, "tensor_group") and weights["group_size"] == NVFP4_BLOCK:
        return TensorFormat("nvfp4a16" if inputs is None else "nvfp4")
    if key == ("float", 8, "channel") and inputs is not None and inputs.get("dynamic") is True:
        return TensorFormat("fp8-dynamic")
    if key == ("int", 4, "group") and inputs is None:
        return TensorFormat("int4", group=weights["group_size"], symmetric=weights["symmetric"])
    raise UserError(f"no reader for weights {key} with inputs {inputs}.", where="config.json: quantization_config")


def _targets(
    modules: Sequence[str], formats: Mapping[str, TensorFormat], fmt: TensorFormat, ignore: Sequence[str]
) -> list[str]:
    """Patterns for `modules`: one for all layers where no other linear has the same ending, else one naming layers.

    Where a pattern would catch a module of another format, the modules' own names stand in its place.
    """
    others = [*ignore, *(module for module, other in formats.items() if other != fmt)]
    shared = {_ending(other)[0] for other in others}
    layers_of: dict[str, list[str]] = {}
    targets: list[str] = []
    for module in modules:
        ending, layer = _ending(module)
        if layer:
            layers_of.setdefault(ending, []).append(layer)
        else:
            targets.append(module)
    leaves_of: dict[tuple[str, str], list[str]] = {}
    for ending, layers in layers_of.items():
        parent, _, leaf = ending.rpartition(".")
        numbers = _choice(list(dict.fromkeys(layers))) if ending in shared else r"\d+"
        leaves_of.setdefault((numbers, parent), []).append(leaf)
    for (numbers, parent), leaves in leaves_of.items():
        pattern = rf"re:(.*\.)?layers\.{numbers}\.{_escape(parent)}{_choice(leaves)}$"
        clash = any(_matches(other, pattern) for other in others)
        targets += [module for module in modules if _matches(module, pattern)] if clash else [pattern]
    return targets


def _ending(module: str) -> tuple[str, str]:
    """(what stands behind the layer's number, the number); (module, "") outside the layers."""
    match = re.search(r"^.*layers\.(\d+)\.(.+)$", module)
    return (match.group(2), match.group(1)) if match else (module, "")


def _escape(parent: str) -> str:
    return re.escape(parent) + "\\." if parent else ""


def _choice(names: Sequence[str]) -> str:
    return re.escape(names[0]) if len(names) == 1 else "(" + "|".join(re.escape(name) for name in names) + ")"
