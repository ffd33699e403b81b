"""Linears that see their inputs as an engine would: activations quantized on the way in, under a named profile."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from snugfit.dialects import compressed_tensors as dialect
from snugfit.engines.fused import group_modules
from snugfit.engines.profiles import PROFILES
from snugfit.errors import UserError
from snugfit.formats import fp8, nvfp4
from snugfit.formats.spec import TensorFormat
from snugfit.formats.stored import Stored, dequantize
from snugfit.model.checkpoint import Checkpoint, read_tensor

Quantizer = Callable[[Tensor], Tensor]


def input_quantizer(fmt: TensorFormat, profile: str, input_scale: Tensor | None) -> Quantizer | None:
    """What `profile` does to the inputs of a linear stored in `fmt`; None leaves them alone."""
    kind = fmt.spec.inputs
    if kind == "none" or kind not in PROFILES[profile]:
        return None
    if kind == "fp8-token":
        return fp8.quantize_dequantize_input
    assert input_scale is not None, "an NVFP4 file without input_global_scale"
    return lambda activations: nvfp4.quantize_dequantize_input(activations, input_scale.to(activations.device))


def quantize_inputs(layer: nn.Module, quantizers: Mapping[str, Quantizer]) -> None:
    """Hook the linears named in `quantizers` (names relative to `layer`); fused partners share one rounding."""
    for group in group_modules(quantizers):
        hook = _shared_hook(quantizers[group[0]])
        for name in group:
            layer.get_submodule(name).register_forward_pre_hook(hook)


def _shared_hook(quantizer: Quantizer) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """A forward pre-hook that remembers its last input, which fused partners receive in turn."""
    last: list[tuple[Tensor, Tensor]] = []

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not last or last[0][0] is not args[0]:
            last[:] = [(args[0], quantizer(args[0]))]
        return (last[0][1], *args[1:])

    return hook


def read_module(
    checkpoint: Checkpoint, module: str, fmt: TensorFormat, shape: tuple[int, ...]
) -> tuple[Stored, Tensor | None]:
    """A quantized module's weight and activation multiplier from disk; `shape` is the weight's [N, K]."""
    names = {part: f"{module}.{part}" for part in dialect.layout(fmt, shape, "BF16")}
    missing = [name for name in names.values() if name not in checkpoint.tensors]
    if missing:
        raise UserError(
            f"quantization_config makes {module} {fmt.label()}, but {', '.join(missing)} is not there.",
            where=str(checkpoint.path),
            remedy="Config and weights do not belong together.",
        )
    return dialect.decode(fmt, {part: read_tensor(checkpoint, name) for part, name in names.items()})


def read_layer(
    checkpoint: Checkpoint, prefix: str, layer: nn.Module, formats: Mapping[str, TensorFormat], profile: str
) -> tuple[dict[str, Tensor], dict[str, Quantizer]]:
    """Weights of a decoder layer (names relative to it), dequantized, and the quantizers of its linears' inputs.

    `prefix` is the layer's name in the checkpoint, `layer` its skeleton, `formats` the quantized modules by full name.
    """
    weights: dict[str, Tensor] = {}
    quantizers: dict[str, Quantizer] = {}
    for name, empty in layer.state_dict().items():
        module, _, parameter = name.rpartition(".")
        fmt = formats.get(f"{prefix}.{module}") if parameter == "weight" else None
        if fmt is None:
            if f"{prefix}.{name}" in checkpoint.tensors:
                weights[name] = read_tensor(checkpoint, f"{prefix}.{name}")
            continue
        stored, input_scale = read_module(checkpoint, f"{prefix}.{module}", fmt, tuple(empty.shape))
        weights[name] = dequantize(stored).to(empty.dtype)
        quantizer = input_quantizer(fmt, profile, input_scale)
        if quantizer is not None:
            quantizers[module] = quantizer
    return weights, quantizers
