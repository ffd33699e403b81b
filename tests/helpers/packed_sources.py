"""Checkpoints in 4 and 8 bits as other tools release them, made of tiny 16-bit ones, and their dequantized values.

compressed-tensors' own compressors pack what they can; ModelOpt's files are written by its formulas (weight = code *
weight_scale * weight_scale_2). Nothing here uses snugfit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor

from helpers.fp8_sources import _is_linear, _write
from helpers.tiny_families import all_tensors

Kind = Literal["modelopt-fp8", "modelopt-nvfp4", "ct-nvfp4", "ct-int4", "ct-int4-asym", "ct-int4-channel", "ct-int8"]
KINDS: tuple[Kind, ...] = (
    "modelopt-fp8",
    "modelopt-nvfp4",
    "ct-nvfp4",
    "ct-int4",
    "ct-int4-asym",
    "ct-int4-channel",
    "ct-int8",
)
GROUP = 32  # of INT4, as in Kimi K2's releases
INPUT_AMAX = 7.5
_GRID = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_E4M3 = torch.float8_e4m3fn


def as_packed(
    source: Path, target: Path, kind: Kind, keep: Callable[[str], bool] | None = None, ignore: list[str] | None = None
) -> Path:
    """Write the 16-bit checkpoint of `source` to `target` with its linears in a format, and give `target`.

    Weights for whose name `keep` is true stay; `ignore` is what the config says of them, by default their names.
    """
    tensors = all_tensors(source)
    chosen = [name for name, tensor in tensors.items() if _is_linear(name, tensor) and not (keep and keep(name))]
    assert chosen, "nothing to quantize"
    made = {name: tensor for name, tensor in tensors.items() if name not in set(chosen)}
    largest: dict[str, Tensor] = {}  # fused linears share a global scale: here all below one parent do
    for name in chosen:
        parent = name.rsplit(".", 2)[0]
        largest[parent] = torch.maximum(largest.get(parent, torch.zeros(())), tensors[name].float().abs().amax())
    for name in chosen:
        module, parent = name.removesuffix(".weight"), name.rsplit(".", 2)[0]
        made |= {f"{module}.{s}": t for s, t in _quantize(tensors[name], kind, largest[parent]).items()}
    kept = [
        n.removesuffix(".weight") for n, t in made.items() if n.endswith(".weight") and n in tensors and t.dim() == 2
    ]
    names = sorted(module for module in kept if "embed" not in module and f"{module}.weight" not in chosen)
    return _write(source, target, made, _config(kind, ignore or names), "5GB")


def dequantized(target: Path, kind: Kind) -> dict[str, Tensor]:
    """The values of a checkpoint of `as_packed`, fp32, by the names of its 16-bit source."""
    tensors = all_tensors(target)
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        scale = tensors.get(f"{module}.weight_scale")
        if leaf not in ("weight", "weight_packed"):
            if scale is None:
                found[name] = tensor.float()
        elif scale is None:
            found[name] = tensor.float()
        else:
            parts = {s: tensors[n] for s in _PARTS if (n := f"{module}.{s}") in tensors}
            found[f"{module}.weight"] = _values(parts, kind)
    return found


_PARTS = (
    *("weight", "weight_packed", "weight_scale", "weight_scale_2", "weight_global_scale", "weight_shape"),
    "weight_zero_point",
)


def scheme_of(kind: Kind) -> QuantizationScheme:
    """The library's scheme of a kind of compressed-tensors."""
    found: QuantizationScheme = QuantizationScheme.model_validate(_group(kind))
    return found


def _values(parts: Mapping[str, Tensor], kind: Kind) -> Tensor:
    if kind == "modelopt-fp8":
        return parts["weight"].float() * parts["weight_scale"].float()
    if kind.endswith("nvfp4"):
        packed = parts["weight"] if kind.startswith("modelopt") else parts["weight_packed"]
        codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2).long()
        values = _GRID[codes & 7] * (1 - 2 * (codes >> 3))
        whole = parts["weight_scale_2"] if kind.startswith("modelopt") else 1 / parts["weight_global_scale"]
        return values * (parts["weight_scale"].float() * whole.float()).repeat_interleave(16, 1)
    scheme = scheme_of(kind)
    scales = {s: t.float() if s == "weight_scale" else t for s, t in parts.items()}  # the library computes in its dtype
    found = BaseCompressor.get_value_from_registry(str(scheme.format)).decompress(scales, scheme)["weight"]
    assert isinstance(found, Tensor)
    return found.float()


def _quantize(weight: Tensor, kind: Kind, largest: Tensor) -> dict[str, Tensor]:
    """The tensors in place of a weight [N, K]; `largest` is the amax of all weights that share a global scale."""
    exact = weight.float()
    if kind == "modelopt-fp8":
        scale = exact.abs().amax() / 448
        codes = (exact / scale).clamp(-448, 448).to(_E4M3)
        return {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(INPUT_AMAX / 448)}
    if kind.endswith("nvfp4"):
        whole = largest / (6 * 448)
        blocks = exact.unflatten(1, (-1, 16))
        scale = (blocks.abs().amax(-1) / (6 * whole)).clamp(min=2.0**-9).to(_E4M3)
        ratio = blocks / (scale.float() * whole).unsqueeze(-1)
        codes = (ratio.abs().clamp(max=6).unsqueeze(-1) - _GRID).abs().argmin(-1) + 8 * ratio.signbit()
        codes = codes.flatten(1).to(torch.uint8)
        packed, inputs = codes[:, 0::2] | codes[:, 1::2] << 4, torch.tensor(INPUT_AMAX / (6 * 448))
        if kind == "modelopt-nvfp4":
            return {"weight": packed, "weight_scale": scale, "weight_scale_2": whole, "input_scale": inputs}
        divisors = {"weight_global_scale": (1 / whole).reshape(1), "input_global_scale": (1 / inputs).reshape(1)}
        return {"weight_packed": packed, "weight_scale": scale, **divisors}
    scheme = scheme_of(kind)
    whole_row = kind in ("ct-int4-channel", "ct-int8")
    groups = exact.unflatten(1, (-1, exact.shape[1] if whole_row else GROUP))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    given = {"weight": weight}
    if kind == "ct-int4-asym":
        scale = ((high - low) / 15).to(weight.dtype)
        given["weight_zero_point"] = (-8 - low / scale.float()).round().clamp(-8, 7).to(torch.int8)
    else:
        scale = (torch.maximum(high, -low) / (127.5 if kind == "ct-int8" else 7.5)).to(weight.dtype)
        given["weight_zero_point"] = torch.zeros(scale.shape, dtype=torch.int8)
    given["weight_scale"] = scale
    made = BaseCompressor.get_value_from_registry(str(scheme.format)).compress(given, scheme)
    return {name: tensor for name, tensor in made.items() if tensor is not None}


def _group(kind: Kind) -> dict[str, Any]:
    inputs = None
    if kind == "ct-nvfp4":
        weights: dict[str, Any] = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
        inputs, form = {**weights, "dynamic": "local"}, "nvfp4-pack-quantized"
    else:
        weights = {"num_bits": 8 if kind == "ct-int8" else 4, "type": "int", "symmetric": kind != "ct-int4-asym"}
        whole_row = kind in ("ct-int4-channel", "ct-int8")
        weights |= {"strategy": "channel"} if whole_row else {"strategy": "group", "group_size": GROUP}
        form = "pack-quantized"
    return {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "format": form}


def _config(kind: Kind, kept: list[str]) -> dict[str, Any]:
    if kind.startswith("modelopt"):
        algorithm = "FP8" if kind == "modelopt-fp8" else "NVFP4"
        return {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": kept, "producer": {"name": "modelopt"}}
    group = _group(kind)
    return {
        "config_groups": {"group_0": group},
        "format": group["format"],
        "ignore": kept,
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }
