"""Any quantized checkpoint: which dialect it speaks, what each of its linears is stored in, and its tensors decoded.

Everything is decided on config and headers; a module of which the two say different things is an error.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from snugfit.dialects import compressed_tensors, huggingface_fp8, modelopt
from snugfit.dialects.headers import Headers, by_module, holds_codes, holds_weight
from snugfit.dialects.schemes import REMEDY, WHERE
from snugfit.dialects.structure import check_structure
from snugfit.errors import UserError
from snugfit.formats.spec import TensorFormat

if TYPE_CHECKING:
    from torch import Tensor

    from snugfit.formats.stored import Stored

MODELOPT_FILE = "hf_quant_config.json"
_APART = "Config and weights do not belong together."
_SCALES = ("_scale", "_scale_2", "_scale_inv")
# one number for a whole weight or input
_GLOBAL_SCALES = ("weight_global_scale", "input_global_scale", "weight_scale_2", "input_scale", "activation_scale")


class Dialect(Protocol):
    """What a module of this package offers."""

    def formats_of(
        self, quantization: Mapping[str, Any], modules: Iterable[str], parts: Mapping[str, Headers], /
    ) -> dict[str, TensorFormat]:
        """Format of each quantized module."""

    def suffixes(self, fmt: TensorFormat, parts: Container[str], /) -> tuple[str, ...]:
        """What of a module to read, of all that is there."""

    def decode(self, fmt: TensorFormat, parts: Mapping[str, Tensor], /) -> tuple[Stored, Tensor | None]:
        """Weight and static multiplier of the inputs, from a module's tensors."""

    def fused_global_scale(self, scales: Sequence[Tensor], /) -> Tensor:
        """The multiplier that vLLM gives all members of a fused group."""

    def kv_cache(self, quantization: Mapping[str, Any], /) -> str | None:
        """What is asked of the KV cache."""


# dtypes that codes come in, by the name of the format
_CODES: Mapping[str, tuple[str, ...]] = {
    "nvfp4": ("U8",),
    "nvfp4a16": ("U8",),
    "mxfp4": ("U8",),
    "fp8": ("F8_E4M3",),
    "fp8-dynamic": ("F8_E4M3",),
    "fp8-block": ("F8_E4M3",),
    "int4": ("I32", "I8"),
    "int8": ("I32", "I8"),
}
_DIALECTS: Mapping[str, Dialect] = {
    "compressed-tensors": compressed_tensors,
    "fp8": huggingface_fp8,
    "modelopt": modelopt,
}


def read_quant_config(directory: Path) -> Mapping[str, Any] | None:
    """ModelOpt's hf_quant_config.json of a model directory, None where there is none."""
    file = directory / MODELOPT_FILE
    if file.exists() and not file.is_file():  # a pipe would keep us waiting
        raise UserError("not a regular file.", where=str(file), remedy="Put the real file in its place.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise UserError(f"not valid JSON ({error}).", where=str(file), remedy="Download this file again.") from None
    if not isinstance(config, dict):
        raise UserError("not a JSON object.", where=str(file), remedy="Download this file again.")
    return config


def read_formats(
    config: Mapping[str, Any],
    linears: Iterable[str],
    tensors: Headers,
    hf_quant_config: Mapping[str, Any] | None = None,
) -> dict[str, TensorFormat]:
    """Format of each of `linears` that is stored quantized, {} for a 16-bit model.

    `config` is config.json, `tensors` all headers by name, `hf_quant_config` ModelOpt's file of its own. UserError for
    a method or scheme without a reader, a missing tensor, and a module that config and headers disagree on.
    """
    names, parts = list(linears), by_module(tensors)
    quantization = _quantization(config, hf_quant_config)
    formats: dict[str, TensorFormat] = {}
    if quantization is not None:
        dialect = _dialect(quantization)
        check_structure(quantization, where=WHERE)
        formats = dialect.formats_of(quantization, names, parts)
        # a head that is tied to the embeddings is not in the file
        formats = {module: fmt for module, fmt in formats.items() if holds_weight(parts.get(module, {}))}
        for module, fmt in formats.items():
            _check_stored(dialect, module, fmt, parts[module])
    for module in names:
        if module not in formats and holds_codes(parts.get(module, {})):
            what = "config.json has no quantization_config" if quantization is None else "the config leaves it alone"
            raise UserError(f"{module} is stored quantized, but {what}.", where=WHERE, remedy=_APART)
    return formats


def kv_cache_format(
    config: Mapping[str, Any], hf_quant_config: Mapping[str, Any] | None = None
) -> Literal["fp8"] | None:
    """What a checkpoint declares its KV cache to be: "fp8" (E4M3), or None for the model's own dtype."""
    quantization = _quantization(config, hf_quant_config)
    asked = None
    if quantization is not None:
        dialect = _dialect(quantization)
        check_structure(quantization, where=WHERE)
        asked = dialect.kv_cache(quantization)
    if asked not in (None, "fp8"):
        raise UserError(
            f"the KV cache is {asked}, which has no reader: FP8 with static scales has.",
            where=WHERE,
            remedy="Take the KV cache's scheme out of the config to evaluate without it.",
        )
    return "fp8" if asked else None


def part_names(config: Mapping[str, Any], module: str, fmt: TensorFormat, tensors: Container[str]) -> dict[str, str]:
    """Suffix -> name of the tensors that stand for a module's weight and inputs; UserError where one is missing."""
    suffixes = _needed(_of(config), module, fmt, _Present(module, tensors))
    return {suffix: f"{module}.{suffix}" for suffix in suffixes}


def decode(
    config: Mapping[str, Any], module: str, fmt: TensorFormat, parts: Mapping[str, Tensor]
) -> tuple[Stored, Tensor | None]:
    """A module's weight, and the static multiplier of its inputs (fp32; None where there is none), from its tensors.

    With a zero point, int8-tensor-asym, the multiplier is fp32 [2]: multiplier, zero point. UserError for a scale that
    is not finite, and for one of a whole NVFP4 weight or of inputs that is not positive either.
    """
    for suffix, tensor in parts.items():
        if not suffix.endswith(_SCALES) or not tensor.is_floating_point():
            continue
        values = tensor.float()
        sound = values.isfinite() & (values > 0) if suffix in _GLOBAL_SCALES else values.isfinite()
        if not sound.all():
            raise UserError(
                f"{module}.{suffix} holds {float(values[~sound][0])}, under which an engine gives garbage.",
                where=WHERE,
                remedy="Quantize the model again: its calibration did not reach this module.",
            )
    return _of(config).decode(fmt, parts)


def fused_global_scale(config: Mapping[str, Any], scales: Sequence[Tensor]) -> Tensor:
    """The one NVFP4 multiplier (fp32 scalar) with which vLLM runs a fused group whose members have these."""
    return _of(config).fused_global_scale(scales)


class _Present:
    """The suffixes of one module's tensors, asked for one by one."""

    def __init__(self, module: str, tensors: Container[str]) -> None:
        self.module = module
        self.tensors = tensors

    def __contains__(self, suffix: object) -> bool:
        return f"{self.module}.{suffix}" in self.tensors


def _quantization(config: Mapping[str, Any], hf_quant_config: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """What says how a checkpoint is quantized: in config.json, at its top or with the text model, else ModelOpt's."""
    text = config.get("text_config")
    for place in (config, text if isinstance(text, dict) else {}):
        given = place.get("quantization_config") or place.get("compression_config")
        if given:
            if not isinstance(given, dict):
                raise UserError("no mapping.", where=WHERE, remedy="Download config.json again.")
            # gpt-oss's: codes of 3-D tensors of experts alone, which model/sources.py takes apart
            return None if given.get("quant_method") == "mxfp4" else given
    return None if hf_quant_config is None else {"quant_method": "modelopt"} | dict(hf_quant_config)


def _dialect(quantization: Mapping[str, Any]) -> Dialect:
    method = str(quantization.get("quant_method") or ("compressed-tensors" if "config_groups" in quantization else ""))
    dialect = _DIALECTS.get("modelopt" if method.startswith("modelopt") else method)
    if dialect is None:
        raise UserError(f"quant_method {method!r} has no reader.", where=WHERE, remedy=REMEDY)
    return dialect


def _of(config: Mapping[str, Any]) -> Dialect:
    """The dialect of a checkpoint that is known to be quantized."""
    return _dialect(_quantization(config, {}) or {})


def _needed(dialect: Dialect, module: str, fmt: TensorFormat, present: Container[str]) -> tuple[str, ...]:
    """The suffixes to read, the codes first."""
    suffixes = dialect.suffixes(fmt, present)
    missing = [f"{module}.{suffix}" for suffix in suffixes if suffix not in present]
    if missing:
        raise UserError(
            f"the config makes {module} {fmt.label()}, but {', '.join(missing)} is not there.",
            where=WHERE,
            remedy=_APART,
        )
    return suffixes


def _check_stored(dialect: Dialect, module: str, fmt: TensorFormat, parts: Headers) -> None:
    codes = "weight" if not holds_codes(parts) else _needed(dialect, module, fmt, parts)[0]
    dtype = parts[codes][0]
    if dtype not in _CODES[fmt.name]:
        raise UserError(
            f"the config makes {module} {fmt.label()}, but {module}.{codes} is {dtype}.", where=WHERE, remedy=_APART
        )
