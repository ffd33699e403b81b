"""The dialect of one checkpoint: the file format of its quantized weights, chosen once when the checkpoint is opened.

`open_dialect` reads the quantization config. The Dialect gives the format of each linear and the tensors that hold it,
and decodes them. It compares config and headers: a module on which they disagree is an error.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Literal, Protocol

from snugfit.dialects import compressed_tensors, huggingface_fp8, modelopt
from snugfit.dialects.headers import Headers, by_module, holds_codes, holds_weight
from snugfit.dialects.schemes import REMEDY
from snugfit.dialects.structure import check_structure
from snugfit.errors import UserError
from snugfit.formats.spec import E8M0_NAN, TensorFormat

if TYPE_CHECKING:
    from torch import Tensor

    from snugfit.formats.quantized_weight import QuantizedWeight

MODELOPT_FILE = "hf_quant_config.json"
_MISMATCH_REMEDY = "Config and weights do not belong together."
_SCALES = ("_scale", "_scale_2", "_scale_inv")
_OF_INPUTS = ("input_", "activation_")
# one number for a whole weight or input
WEIGHT_GLOBALS = ("weight_global_scale", "weight_scale_2")
INPUT_GLOBALS = ("input_global_scale", "input_scale", "activation_scale")
GLOBAL_SCALES = (*WEIGHT_GLOBALS, *INPUT_GLOBALS)


class FileFormat(Protocol):
    """What each module of a file format offers: compressed_tensors, huggingface_fp8, modelopt."""

    def formats_of(
        self, quantization: Mapping[str, Any], modules: Iterable[str], parts: Mapping[str, Headers], /, *, where: str
    ) -> dict[str, TensorFormat]:
        """Format of each quantized module; errors name the place `where`."""

    def suffixes(self, fmt: TensorFormat, parts: Container[str], /) -> tuple[str, ...]:
        """Suffixes of the tensors to read for a module in `fmt`, the codes first; `parts` are those in the file."""

    def decode(self, fmt: TensorFormat, parts: Mapping[str, Tensor], /) -> tuple[QuantizedWeight, Tensor | None]:
        """Weight and static multiplier of the inputs, from a module's tensors."""

    def input_scale(self, fmt: TensorFormat, parts: Mapping[str, Tensor], /) -> Tensor | None:
        """Static multiplier of the inputs, from those tensors alone that speak of inputs."""

    def fused_global_scale(self, scales: Sequence[Tensor], /) -> Tensor:
        """The multiplier that vLLM gives all members of a fused group."""

    def kv_cache(self, quantization: Mapping[str, Any], /) -> str | None:
        """The format of the KV cache that the config asks for."""


_FILE_FORMATS: Mapping[str, FileFormat] = {
    "compressed-tensors": compressed_tensors,
    "fp8": huggingface_fp8,
    "modelopt": modelopt,
}


@dataclass(frozen=True)
class Dialect:
    """How one checkpoint stores its quantized weights. `file_format` is None for a 16-bit checkpoint.

    `quantization` is the quantization config, `where` the file and key that it was read from.
    """

    file_format: FileFormat | None
    quantization: Mapping[str, Any]
    where: str

    def read_formats(self, linears: Iterable[str], tensors: Headers) -> dict[str, TensorFormat]:
        """Format of each of `linears` that is stored quantized, {} for a 16-bit model.

        `tensors` are all headers by name. UserError for a scheme without a reader, a missing tensor, and a module that
        config and headers disagree on.
        """
        names, parts = list(linears), by_module(tensors)
        formats: dict[str, TensorFormat] = {}
        if self.file_format is not None:
            formats = self.file_format.formats_of(self.quantization, names, parts, where=self.where)
            # a head that is tied to the embeddings is not in the file
            formats = {module: fmt for module, fmt in formats.items() if holds_weight(parts.get(module, {}))}
            for module, fmt in formats.items():
                self._check_codes(module, fmt, parts[module])
        for module in names:
            if module not in formats and holds_codes(parts.get(module, {})):
                reason = "the config has no quantization_config" if self.file_format is None else "the config omits it"
                what = f"{module} is stored quantized, but {reason}."
                raise UserError(what, code="quantization-invalid", where=self.where, remedy=_MISMATCH_REMEDY)
        return formats

    def kv_cache_format(self) -> Literal["fp8"] | None:
        """The declared format of the KV cache: "fp8" (E4M3), or None for the model's own dtype."""
        asked = None if self.file_format is None else self.file_format.kv_cache(self.quantization)
        if asked not in (None, "fp8"):
            raise UserError(
                f"no reader for a KV cache in {asked}, only for FP8 with static scales.",
                code="quantization-unknown",
                where=self.where,
                remedy="Remove the KV cache's scheme from the config to evaluate without it.",
            )
        return "fp8" if asked else None

    def part_names(self, module: str, fmt: TensorFormat, tensors: Container[str]) -> dict[str, str]:
        """Suffix -> name of the tensors that hold a module's weight and input scale; UserError for a missing one."""
        suffixes = self._needed(module, fmt, _SuffixesOf(module, tensors))
        return {suffix: f"{module}.{suffix}" for suffix in suffixes}

    def input_part_names(self, module: str, fmt: TensorFormat, tensors: Container[str]) -> dict[str, str]:
        """Those of `part_names` that speak of the module's inputs."""
        names = self.part_names(module, fmt, tensors)
        return {suffix: name for suffix, name in names.items() if suffix.startswith(_OF_INPUTS)}

    def input_scale(self, module: str, fmt: TensorFormat, parts: Mapping[str, Tensor]) -> Tensor | None:
        """The static multiplier that `decode` gives, from the tensors of `input_part_names`; the same errors."""
        assert self.file_format is not None, "a 16-bit checkpoint has no codes"
        self._check_scales(module, fmt, parts)
        return self.file_format.input_scale(fmt, parts)

    def decode(
        self, module: str, fmt: TensorFormat, parts: Mapping[str, Tensor]
    ) -> tuple[QuantizedWeight, Tensor | None]:
        """A module's weight, and the static multiplier of its inputs (fp32, None for inputs without one).

        With a zero point, int8-tensor-asym, the multiplier is fp32 [2]: multiplier, zero point. UserError for a scale
        that is not finite, and for one of a whole NVFP4 weight or of inputs that is not positive either.
        """
        return self.decode_all({module: (fmt, parts)})[module]

    def decode_all(
        self, modules: Mapping[str, tuple[TensorFormat, Mapping[str, Tensor]]]
    ) -> dict[str, tuple[QuantizedWeight, Tensor | None]]:
        """As `decode`, of several modules on one device: a GPU is waited for once. Nothing for none, of any file."""
        if not modules:
            return {}
        if not _have_sound_scales(modules.values()):
            for module, (fmt, parts) in modules.items():
                self._check_scales(module, fmt, parts)
        assert self.file_format is not None, "a 16-bit checkpoint has no codes"
        found = {}
        for module, (fmt, parts) in modules.items():
            self._check_stated_shape(module, fmt, parts)
            found[module] = self.file_format.decode(fmt, parts)
        return found

    def _check_scales(self, module: str, fmt: TensorFormat, parts: Mapping[str, Tensor]) -> None:
        """UserError for a scale that is not finite or not positive, as `decode` says."""
        import torch

        for suffix, tensor in parts.items():
            if not suffix.endswith(_SCALES) or not tensor.is_floating_point():
                continue
            values = tensor.float()
            sound = values.isfinite() & (values > 0) if suffix in GLOBAL_SCALES else values.isfinite()
            if not sound.all():
                raise UserError(
                    f"{module}.{suffix} holds {float(values[~sound][0])}, so an engine would compute garbage.",
                    code="scale-invalid",
                    where=self.where,
                    remedy="Quantize the model again: its calibration did not reach this module.",
                )
        if (
            fmt.name == "mxfp4"
            and "weight_scale" in parts
            and bool((parts["weight_scale"].view(torch.uint8) == E8M0_NAN).any())
        ):
            raise UserError(
                f"{module}.weight_scale holds NaN scales.",
                code="scale-invalid",
                where=self.where,
                remedy="The source is damaged: download it again.",
            )

    def _check_stated_shape(self, module: str, fmt: TensorFormat, parts: Mapping[str, Tensor]) -> None:
        """UserError where `weight_shape` is not that of the packed integers beside it."""
        if "weight_shape" not in parts:
            return
        stated, codes = parts["weight_shape"].flatten().tolist(), parts["weight_packed"]
        per_element = 32 // int(fmt.name.removeprefix("int"))
        fits = len(stated) == 2 and (stated[0], -(-stated[1] // per_element)) == tuple(codes.shape)
        if not fits or (fmt.group_size > 0 and -(-stated[1] // fmt.group_size) != parts["weight_scale"].shape[-1]):
            raise UserError(
                f"{module}.weight_shape is {stated}, but {module}.weight_packed is {list(codes.shape)}.",
                code="quantization-invalid",
                where=self.where,
                remedy=_MISMATCH_REMEDY,
            )

    def fused_global_scale(self, scales: Sequence[Tensor]) -> Tensor:
        """The one NVFP4 multiplier (fp32 scalar) with which vLLM runs a fused group whose members have these."""
        assert self.file_format is not None, "a 16-bit checkpoint has no scales"
        return self.file_format.fused_global_scale(scales)

    def _needed(self, module: str, fmt: TensorFormat, present: Container[str]) -> tuple[str, ...]:
        """The suffixes to read, the codes first."""
        assert self.file_format is not None, "a 16-bit checkpoint has no codes"
        suffixes = self.file_format.suffixes(fmt, present)
        missing = [f"{module}.{suffix}" for suffix in suffixes if suffix not in present]
        if missing:
            raise UserError(
                f"the config makes {module} {fmt.label()}, but {', '.join(missing)} is missing.",
                code="quantization-invalid",
                where=self.where,
                remedy=_MISMATCH_REMEDY,
            )
        return suffixes

    def _check_codes(self, module: str, fmt: TensorFormat, parts: Headers) -> None:
        codes = "weight" if not holds_codes(parts) else self._needed(module, fmt, parts)[0]
        dtype = parts[codes][0]
        if dtype not in fmt.spec.codes:
            what = f"the config makes {module} {fmt.label()}, but {module}.{codes} is {dtype}."
            raise UserError(what, code="quantization-invalid", where=self.where, remedy=_MISMATCH_REMEDY)


def _have_sound_scales(modules: Iterable[tuple[TensorFormat, Mapping[str, Tensor]]]) -> bool:
    """Whether no scale of these modules is one that `_check_scales` refuses."""
    import torch

    alike: dict[tuple[str, torch.dtype], list[Tensor]] = {}
    for fmt, parts in modules:
        for suffix, tensor in parts.items():
            if suffix.endswith(_SCALES) and tensor.is_floating_point():
                kind = "global" if suffix in GLOBAL_SCALES else "scale"
                alike.setdefault((kind, tensor.dtype), []).append(tensor.reshape(-1).view(torch.uint8))
            elif fmt.name == "mxfp4" and suffix == "weight_scale":
                alike.setdefault(("exponent", torch.uint8), []).append(tensor.reshape(-1).view(torch.uint8))
    sound = []
    for (kind, dtype), tensors in alike.items():
        stored = torch.cat(tensors)
        if kind == "exponent":
            sound.append((stored != E8M0_NAN).all())
            continue
        values = stored.view(dtype).float()
        sound.append((values.isfinite() & (values > 0) if kind == "global" else values.isfinite()).all())
    return not sound or bool(torch.stack(sound).all())


class _SuffixesOf:
    """Says which suffixes a module's tensors have, without a list of them."""

    def __init__(self, module: str, tensors: Container[str]) -> None:
        self.module = module
        self.tensors = tensors

    def __contains__(self, suffix: object) -> bool:
        return f"{self.module}.{suffix}" in self.tensors


def open_dialect(
    config: Mapping[str, Any], hf_quant_config: Mapping[str, Any] | None = None, *, where: str = "config.json"
) -> Dialect:
    """The dialect that config.json (`config`) or else ModelOpt's own file names; `where` is the path of config.json.

    UserError for a quantization config of a wrong structure, and for a method without a reader.
    """
    place = f"{where}: quantization_config"
    quantization = _declared(config, place)
    if quantization is None and hf_quant_config is not None:
        place = str(PurePath(where).with_name(MODELOPT_FILE))
        quantization = {"quant_method": "modelopt"} | dict(hf_quant_config)
    # gpt-oss's "mxfp4": codes of 3-D tensors of experts alone, which model/logical_weights.py splits
    if quantization is None or quantization.get("quant_method") == "mxfp4":
        return Dialect(None, {}, place)
    method = str(quantization.get("quant_method") or ("compressed-tensors" if "config_groups" in quantization else ""))
    file_format = _FILE_FORMATS.get("modelopt" if method.startswith("modelopt") else method)
    if file_format is None:
        what = f"quant_method {method!r} has no reader."
        raise UserError(what, code="quantization-unknown", where=place, remedy=REMEDY)
    check_structure(quantization, where=place)
    return Dialect(file_format, quantization, place)


def read_quant_config(directory: Path) -> Mapping[str, Any] | None:
    """ModelOpt's hf_quant_config.json of a model directory, None without that file."""
    file = directory / MODELOPT_FILE
    if file.exists() and not file.is_file():  # a pipe would block the reader
        raise UserError(
            "not a regular file.", code="file-unreadable", where=str(file), remedy="Put the real file in its place."
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        what = f"not valid JSON ({error})."
        raise UserError(what, code="json-invalid", where=str(file), remedy="Download this file again.") from None
    except OSError as error:
        what = f"cannot be read ({error.strerror or error})."
        raise UserError(what, code="file-unreadable", where=str(file), remedy="Check its permissions.") from None
    if not isinstance(config, dict):
        raise UserError("not a JSON object.", code="json-invalid", where=str(file), remedy="Download this file again.")
    return config


def _declared(config: Mapping[str, Any], where: str) -> Mapping[str, Any] | None:
    """The quantization config in config.json, at its top or with the text model; None without one."""
    text = config.get("text_config")
    for level in (config, text if isinstance(text, dict) else {}):
        given = level.get("quantization_config") or level.get("compression_config")
        if given:
            if not isinstance(given, dict):
                what = f"must be a mapping, got {str(given)[:100]!r}."
                raise UserError(what, code="quantization-invalid", where=where, remedy="Download config.json again.")
            return given
    return None
