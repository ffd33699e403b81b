"""NVIDIA ModelOpt's export: quant_method "modelopt" in config.json, or a separate file hf_quant_config.json.

All its scales multiply. NVFP4 is `weight` (packed, uint8), `weight_scale` (E4M3), `weight_scale_2` and, with 4-bit
activations, `input_scale` (fp32 scalars); FP8 is `weight` (E4M3), `weight_scale`, `input_scale`. The headers decide
what the config leaves open.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from snugfit.dialects.headers import Headers, holds_codes
from snugfit.dialects.schemes import REMEDY
from snugfit.errors import UserError
from snugfit.formats.spec import TensorFormat

if TYPE_CHECKING:
    from torch import Tensor

    from snugfit.formats.quantized_weight import QuantizedWeight

FORMATS: Mapping[str, TensorFormat] = {
    "NVFP4": TensorFormat("nvfp4"),
    "W4A16_NVFP4": TensorFormat("nvfp4a16"),
    "FP8": TensorFormat("fp8", inputs="fp8-tensor"),
    "FP8_PER_CHANNEL_PER_TOKEN": TensorFormat("fp8-dynamic"),
    # "weight only" by its name, but vLLM quantizes the inputs too
    "FP8_PB_WO": TensorFormat("fp8-block"),
}


def formats_of(
    quantization: Mapping[str, Any], modules: Iterable[str], parts: Mapping[str, Headers], *, where: str
) -> dict[str, TensorFormat]:
    """Format of each of `modules` that is neither excluded nor missing from `quantized_layers`."""
    details = _details(quantization)
    excluded = [str(name) for name in details.get("exclude_modules") or details.get("ignore") or []]
    layers = details.get("quantized_layers") or {}
    algorithm = str(details.get("quant_algo") or "").upper()
    found: dict[str, TensorFormat] = {}
    for module in modules:
        if any(fnmatchcase(module, pattern) or pattern in module for pattern in excluded):
            continue
        if algorithm == "MIXED_PRECISION":
            given = next((layers[name] for name in _spellings(module) if name in layers), None)
            if given is not None:
                found[module] = _format(str(given.get("quant_algo") or ""), module, parts.get(module, {}), where)
        elif algorithm:
            found[module] = _format(algorithm, module, parts.get(module, {}), where)
    return _weight_only(details, found, parts)


def suffixes(fmt: TensorFormat, _parts: Container[str]) -> tuple[str, ...]:
    """Suffixes of the tensors to read for a module in `fmt`."""
    names = ["weight", "weight_scale"]
    if fmt.name in ("nvfp4", "nvfp4a16"):
        names.append("weight_scale_2")
    if fmt.input_kind in ("nvfp4", "fp8-tensor"):
        names.append("input_scale")
    return tuple(names)


def decode(fmt: TensorFormat, parts: Mapping[str, Tensor]) -> tuple[QuantizedWeight, Tensor | None]:
    """The quantized weight and the static multiplier of its inputs, fp32 () or None."""
    from snugfit.formats.fp8 import FP8Weight
    from snugfit.formats.nvfp4 import NVFP4Weight

    inputs, scale = input_scale(fmt, parts), parts["weight_scale"]
    if fmt.name in ("nvfp4", "nvfp4a16"):
        return NVFP4Weight(parts["weight"], scale, parts["weight_scale_2"].reshape(()).float()), inputs
    if fmt.weight_block is not None:
        # exported as [N/128, 1, K/128, 1]
        grid = scale.reshape(-(-parts["weight"].shape[0] // fmt.weight_block[0]), -1)
        return FP8Weight(parts["weight"], grid, fmt.weight_block), inputs
    return FP8Weight(parts["weight"], scale.reshape(-1, 1)), inputs


def input_scale(_fmt: TensorFormat, parts: Mapping[str, Tensor]) -> Tensor | None:
    """The static multiplier of the inputs, as `decode` gives it."""
    given = parts.get("input_scale")
    return None if given is None else given.reshape(()).float()


def fused_global_scale(scales: Sequence[Tensor]) -> Tensor:
    """The multiplier that vLLM gives a fused NVFP4 group: the largest."""
    import torch

    return torch.stack(list(scales)).amax()  # a GPU would be waited for once a scale by max()


def kv_cache(quantization: Mapping[str, Any]) -> str | None:
    """The requested format of the KV cache: "fp8", None for the model's dtype, or the name of another."""
    details = _details(quantization)
    scheme = details.get("kv_cache_quant_algo") or details.get("kv_cache_scheme")
    if not scheme:
        return None
    if isinstance(scheme, dict):
        return "fp8" if (scheme.get("type"), scheme.get("num_bits")) == ("float", 8) else str(scheme)
    return "fp8" if str(scheme).upper() == "FP8" else str(scheme)


def _details(quantization: Mapping[str, Any]) -> Mapping[str, Any]:
    """The mapping with the algorithm: hf_quant_config.json has it one level deeper."""
    nested = quantization.get("quantization")
    return nested if isinstance(nested, dict) else quantization


def _format(algorithm: str, module: str, parts: Headers, where: str) -> TensorFormat:
    fmt = FORMATS.get(algorithm.upper())
    if fmt is None:
        what = f"quant_algo {algorithm!r} ({module}) has no reader."
        raise UserError(what, code="quantization-unknown", where=where, remedy=REMEDY)
    if "pre_quant_scale" in parts:
        what = f"{module} scales its inputs (pre_quant_scale), which has no reader."
        raise UserError(what, code="quantization-unknown", where=where, remedy=REMEDY)
    return fmt


def _weight_only(
    details: Mapping[str, Any], found: dict[str, TensorFormat], parts: Mapping[str, Headers]
) -> dict[str, TensorFormat]:
    """The formats, NVFP4 without 4-bit inputs if no module has an input_scale or no config group quantizes inputs."""
    groups = details.get("config_groups")
    asked: list[Any] = [True]
    if isinstance(groups, dict):
        asked = [group.get("input_activations") for group in groups.values() if isinstance(group, dict)]
    w4a4 = [m for m, fmt in found.items() if fmt.name == "nvfp4" and holds_codes(parts.get(m, {}))]
    if any(asked) and any("input_scale" in parts[module] for module in w4a4):
        return found
    return {m: TensorFormat("nvfp4a16") if fmt.name == "nvfp4" else fmt for m, fmt in found.items()}


def _spellings(module: str) -> tuple[str, ...]:
    """Names under which `quantized_layers` may list a module, with and without the prefixes of multimodal models."""
    swapped = module.replace("model.language_model.", "language_model.model.", 1)
    return (module, swapped, f"language_model.{module}", module.replace("model.", "model.language_model.", 1))
