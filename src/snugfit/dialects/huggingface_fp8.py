"""Hugging Face's own FP8 (quant_method "fp8"): DeepSeek, Qwen, Mistral releases.

A weight is E4M3 [N, K] with `weight_scale_inv`, which multiplies despite its name, one for each block of
`weight_block_size`, or with `weight_scale` for the whole weight. The headers decide which modules are quantized:
published `modules_to_not_convert` lists name modules that are not linears.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from snugfit.dialects.headers import Headers, dtype_of, is_single
from snugfit.dialects.schemes import REMEDY, fp8_blocks
from snugfit.errors import UserError
from snugfit.formats.spec import WHOLE_ROW, InputKind, TensorFormat

if TYPE_CHECKING:
    from torch import Tensor

    from snugfit.formats.quantized_weight import QuantizedWeight

# the first is the usual one
WEIGHT_SCALES = ("weight_scale_inv", "weight_scale")
INPUT_SCALES = ("input_scale", "activation_scale")
_MISMATCH_REMEDY = "Config and weights do not belong together."


def formats_of(
    quantization: Mapping[str, Any], modules: Iterable[str], parts: Mapping[str, Headers], *, where: str
) -> dict[str, TensorFormat]:
    """Format of each of `modules` whose weight is stored in E4M3."""
    static = _is_static(quantization, where)
    block = None if quantization.get("weight_block_size") is None else _block(quantization["weight_block_size"], where)
    return {
        module: _format(module, parts[module], block, static=static, where=where)
        for module in modules
        if dtype_of(parts.get(module, {}), "weight") == "F8_E4M3"
    }


def suffixes(fmt: TensorFormat, parts: Container[str]) -> tuple[str, ...]:
    """Suffixes of the tensors to read for a module in `fmt`, under the names that are in `parts`."""
    names = ("weight", _first(WEIGHT_SCALES, parts))
    return (*names, _first(INPUT_SCALES, parts)) if fmt.input_kind == "fp8-tensor" else names


def decode(fmt: TensorFormat, parts: Mapping[str, Tensor]) -> tuple[QuantizedWeight, Tensor | None]:
    """The quantized weight and the static multiplier of its inputs, fp32 () or None."""
    from snugfit.formats.fp8 import FP8Weight
    from snugfit.formats.grids import powers_of_two

    scale = parts[_first(WEIGHT_SCALES, parts)]
    if scale.itemsize == 1:  # E8M0, also as plain bytes
        scale = powers_of_two(scale)
    block = fmt.weight_block
    quantized = FP8Weight(parts["weight"], scale if block else scale.reshape(-1, 1), block)
    return quantized, input_scale(fmt, parts)


def input_scale(_fmt: TensorFormat, parts: Mapping[str, Tensor]) -> Tensor | None:
    """The static multiplier of the inputs, as `decode` gives it."""
    given = parts.get(_first(INPUT_SCALES, parts))
    return None if given is None else given.reshape(()).float()


def fused_global_scale(scales: Sequence[Tensor]) -> Tensor:
    """The largest; never called, because this dialect has no NVFP4."""
    return max(scales, key=float)


def kv_cache(_quantization: Mapping[str, Any]) -> str | None:
    """None: this dialect does not describe the KV cache."""
    return None


def _format(module: str, parts: Headers, block: tuple[int, int] | None, *, static: bool, where: str) -> TensorFormat:
    name = _first(WEIGHT_SCALES, parts)
    shape = parts[name][1] if name in parts else ()
    if len(parts["weight"][1]) != 2:
        what = f"{module}.weight is FP8 of shape {list(parts['weight'][1])}; the weight of a linear has two dimensions."
        raise UserError(what, code="quantization-invalid", where=where, remedy=_MISMATCH_REMEDY)
    both = [f"{module}.{scale}" for scale in WEIGHT_SCALES if scale in parts]
    if len(both) > 1:
        what = f"{' and '.join(both)} both scale {module}.weight: which of them counts is unknown."
        raise UserError(what, code="quantization-invalid", where=where, remedy="Remove the one that is left over.")
    out_features, in_features = parts["weight"][1]
    inputs: InputKind = "fp8-tensor" if static else "fp8-tensor-dynamic"
    if block is not None and shape == (-(-out_features // block[0]), -(-in_features // block[1])):
        return TensorFormat("fp8", block=block, inputs="fp8-tensor") if static else fp8_blocks(block)
    if name not in parts or is_single(parts, name):
        return TensorFormat("fp8", inputs=inputs)
    if shape in ((out_features,), (out_features, 1)):
        return TensorFormat("fp8", WHOLE_ROW, inputs="fp8-tensor") if static else TensorFormat("fp8-dynamic")
    raise UserError(
        f"{module}.{name} has shape {list(shape)}, which weight_block_size {block and list(block)} does not give for "
        f"a weight [{out_features}, {in_features}].",
        code="quantization-invalid",
        where=where,
        remedy=_MISMATCH_REMEDY,
    )


def _is_static(quantization: Mapping[str, Any], where: str) -> bool:
    scheme = quantization.get("activation_scheme", "dynamic")
    if scheme not in ("static", "dynamic"):
        what = f"activation_scheme {scheme!r} has no reader, only static and dynamic."
        raise UserError(what, code="quantization-unknown", where=where, remedy=REMEDY)
    return bool(scheme == "static")


def _block(given: object, where: str) -> tuple[int, int]:
    if isinstance(given, (list, tuple)) and len(given) == 2 and all(isinstance(n, int) and n > 0 for n in given):
        return given[0], given[1]
    what = f"weight_block_size must be two positive numbers such as [128, 128], got {given!r}."
    raise UserError(what, code="quantization-invalid", where=where, remedy="Correct the config.")


def _first(names: Sequence[str], parts: Container[str]) -> str:
    return next((name for name in names if name in parts), names[0])
