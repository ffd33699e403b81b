"""Linears that see their inputs as an engine would: activations quantized on the way in, under a named profile.

A profile other than "none" also gives the members of a fused group the scales that vLLM gives them, where a file's
differ; and an FP8 KV cache rounds keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from snugfit.dialects.dialect import Dialect
from snugfit.engines.fused import group_modules
from snugfit.engines.kv_cache import scale_names
from snugfit.engines.profiles import PROFILES
from snugfit.errors import UserError
from snugfit.formats import fp8, nvfp4
from snugfit.formats.grids import E2M1_MAX, E4M3_MAX
from snugfit.formats.inputs import STATIC_KINDS, InputRounding
from snugfit.formats.quantized_weight import QuantizedWeight, dequantize, dequantize_all
from snugfit.formats.spec import FP8_BLOCK, TensorFormat
from snugfit.model import experts
from snugfit.model.assemble import read_single
from snugfit.model.cache import NoCache
from snugfit.model.experts import NoHooks
from snugfit.model.layers import ExpertBuffers
from snugfit.storage.checkpoint import Checkpoint, read_tensor
from snugfit.storage.tensor_reader import ReadTensor

# values at once: what a core's cache holds; what a small GPU spares
SLICE = {"cpu": 1 << 19, "cuda": 1 << 24}
Quantizer = Callable[[Tensor], Tensor]
NO_EMULATION = "none"
CPU = torch.device("cpu")
_Projections = tuple[int, bool]  # an expert's down projection (True), or its gate and up


def input_quantizer(fmt: TensorFormat, profile: str, input_scale: Tensor | None) -> Quantizer | None:
    """What `profile` does to the inputs of a linear stored in `fmt`; None leaves them alone.

    `input_scale` is the static multiplier that `read_module` gives, where the file's request has one.
    """
    kind = PROFILES[profile].get(fmt.input_kind)
    if kind is None:
        return None
    if kind not in STATIC_KINDS:
        return InputRounding(kind, group=fmt.block[1] if fmt.block else FP8_BLOCK)
    assert input_scale is not None, f"{fmt.label()} without a scale of its inputs"
    return InputRounding(kind, input_scale)


def input_range(fmt: TensorFormat, input_scale: Tensor | None) -> Tensor | None:
    """The largest magnitude, fp32 (), that inputs keep under the file's static multiplier; None without one.

    NVFP4: that of a block whose E4M3 scale is the largest there is; FP8: the largest code's.
    """
    largest = {"nvfp4": E2M1_MAX * E4M3_MAX, "fp8-tensor": E4M3_MAX}.get(fmt.input_kind)
    return None if largest is None or input_scale is None else largest * input_scale.float().view(-1)[0]


def quantize_inputs(layer: nn.Module, quantizers: Mapping[str, Quantizer]) -> None:
    """Hook the linears named in `quantizers` (names relative to `layer`); fused partners share one rounding."""
    for group in group_modules(quantizers):
        hook = _SharedRounding(quantizers[group[0]], partners=len(group))
        for name in group:
            layer.get_submodule(name).register_forward_pre_hook(hook)


class _SharedRounding:
    """A forward pre-hook that rounds an input once for all fused partners, and drops it with the last partner."""

    rounds_inputs = True  # which hooks that watch do not

    def __init__(self, quantizer: Quantizer, *, partners: int) -> None:
        self._quantizer = quantizer
        self._partners = partners
        self._input: Tensor | None = None
        self._rounded: Tensor | None = None
        self._left = 0

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self._rounded is None or self._input is not args[0]:
            self._input, self._left = args[0], self._partners
            self._rounded = straight_through(partial(_in_slices, self._quantizer), args[0])
        rounded = self._rounded
        self._left -= 1
        if not self._left:
            self._input = self._rounded = None
        return (rounded, *args[1:])


class _StraightThrough(torch.autograd.Function):
    """Gives `rounded` in place of `exact`, and the gradient as if it had not."""

    @staticmethod
    def forward(_: Any, exact: Tensor, rounded: Tensor) -> Tensor:  # noqa: ARG004
        """The rounded values."""
        return rounded.view_as(rounded)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """The gradient as it came."""
        return gradient, None


def straight_through(quantizer: Quantizer, values: Tensor) -> Tensor:
    """`quantizer(values)`, whose gradient, where one is wanted, passes as if nothing had been rounded."""
    if not (torch.is_grad_enabled() and values.requires_grad):
        return quantizer(values)
    result: Tensor = _StraightThrough.apply(values, quantizer(values.detach()))  # type: ignore[no-untyped-call]
    return result


def _in_slices(quantizer: Quantizer, activations: Tensor) -> Tensor:
    """`quantizer` over a few tokens [..., K] at a time: its fp32 temporaries stay in the caches, or off a small GPU.

    A fused kernel has no temporaries.
    """
    if isinstance(quantizer, InputRounding) and quantizer.is_fused(activations):
        return quantizer(activations)
    tokens = activations.reshape(-1, activations.shape[-1])
    step = max(1, SLICE[activations.device.type] // tokens.shape[1])
    if len(tokens) <= step:
        return quantizer(activations)
    result = torch.empty_like(tokens)
    for start in range(0, len(tokens), step):
        result[start : start + step] = quantizer(tokens[start : start + step])
    return result.view_as(activations)


def read_module(
    checkpoint: Checkpoint,
    dialect: Dialect,
    module: str,
    fmt: TensorFormat,
    shape: tuple[int, ...],
    device: torch.device = CPU,
    read: ReadTensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """A quantized module's weight, fp32 of `shape` [N, K], and the static multiplier of its inputs, as the file says.

    Both are decoded on `device`; `read` reads tensors, by default to the CPU. The multiplier is fp32 () (with a zero
    point [2]), None where the format has none.
    """
    read = read or partial(read_tensor, checkpoint)
    member = _read_members(checkpoint, dialect, {module: module}, {module: fmt}, device, read)[module]
    return _values(checkpoint, {module: member.quantized}, {module: shape})[module], member.input_scale


def read_codes(
    checkpoint: Checkpoint, dialect: Dialect, module: str, fmt: TensorFormat, device: torch.device = CPU
) -> QuantizedWeight:
    """A quantized module's codes and scales on `device`, as the file has them."""
    read = partial(read_tensor, checkpoint)
    return _read_members(checkpoint, dialect, {module: module}, {module: fmt}, device, read)[module].quantized


@dataclass(frozen=True)
class ExpertInputs(NoHooks):
    """Rounds the inputs of a layer's routed experts as an engine does; None leaves them alone.

    `ranges` are the largest magnitudes that static scales of the inputs of gate and up, and of down, represent.
    """

    gate_up: Quantizer | None
    down: Quantizer | None
    ranges: tuple[Tensor | None, Tensor | None] = (None, None)

    def first(self, hidden: Tensor) -> Tensor:
        """Inputs of all gate and up projections [tokens, K]."""
        return hidden if self.gate_up is None else straight_through(partial(_in_slices, self.gate_up), hidden)

    def second(self, expert: int, hidden: Tensor, tokens: Tensor, *, forced: bool) -> Tensor:  # noqa: ARG002
        """Inputs of an expert's down projection [n, K]."""
        return hidden if self.down is None else straight_through(partial(_in_slices, self.down), hidden)


def read_experts(
    checkpoint: Checkpoint,
    dialect: Dialect,
    prefix: str,
    mixture: experts.ExpertNames,
    buffers: ExpertBuffers,
    formats: Mapping[str, TensorFormat],
    profile: str,
    device: torch.device = CPU,
    read: ReadTensor | None = None,
    numbers: range | None = None,
) -> ExpertInputs:
    """Fill `buffers` with a layer's routed experts, or those of `numbers`, dequantized; the result rounds their inputs.

    Engines give all experts of a layer one scale for the inputs of gate and up and one for those of down, the largest
    multiplier in the file (engines/mixtures.py); so does this, but for profile "none", which rounds nothing. `read`
    reads tensors, by default to the CPU. UserError for an expert's tensor that is missing.
    """
    stacks, read = buffers.skeleton.stacks, read or partial(read_tensor, checkpoint)
    quantized: dict[_Projections, list[str]] = {}
    wanted = range(mixture.count) if numbers is None else numbers
    for (expert, role, parameter), name in ((key, one) for key, one in mixture.names.items() if key[0] in wanted):
        full = f"{prefix}.{name}"
        if parameter == "weight" and full.removesuffix(".weight") in formats:
            quantized.setdefault((expert, role == experts.DOWN), []).append(full)
        elif full in checkpoint.tensors:
            buffers.copy_in(full, read(full))
        elif full in stacks.tensors:
            buffers.copy_in(full, read_single(stacks, full, read))
        else:
            what = f"tensors missing: {full}."
            remedy = "Config and weights do not belong together."
            raise UserError(what, code="weights-missing", where=prefix, remedy=remedy)
    kinds: dict[bool, TensorFormat] = {}
    scales: dict[bool, list[Tensor]] = {True: [], False: []}
    sizes = {key: sum(buffers.per_expert[name].numel() for name in names) for key, names in quantized.items()}
    for some in _together(sizes, SLICE[device.type]):
        modules = {name: name.removesuffix(".weight") for key in some for name in quantized[key]}
        members = _read_members(checkpoint, dialect, modules, formats, device, read)
        if profile != NO_EMULATION:
            for key in some:
                members |= _as_one(dialect, {name: members[name] for name in quantized[key]})
        codes = {modules[name]: member.quantized for name, member in members.items()}
        shapes = {module: tuple(buffers.per_expert[name].shape) for name, module in modules.items()}
        values = _values(checkpoint, codes, shapes)
        for key in some:
            for name in quantized[key]:
                buffers.copy_in(name, values[modules[name]])
                kinds.setdefault(key[1], members[name].format)
                scale = members[name].input_scale
                scales[key[1]] += [] if scale is None else [scale]
    return _inputs_of(kinds, scales, profile)


def read_expert_inputs(
    checkpoint: Checkpoint,
    dialect: Dialect,
    prefix: str,
    mixture: experts.ExpertNames,
    formats: Mapping[str, TensorFormat],
    profile: str,
    device: torch.device = CPU,
) -> ExpertInputs:
    """What rounds the inputs of a layer's routed experts, as `read_experts` gives it; no weights are read."""
    members: dict[_Projections, list[tuple[TensorFormat, Tensor | None]]] = {}
    for (expert, role, parameter), name in mixture.names.items():
        module = f"{prefix}.{name}".removesuffix(".weight")
        if parameter == "weight" and module in formats:
            names = dialect.input_part_names(module, formats[module], checkpoint.tensors)
            parts = {suffix: read_tensor(checkpoint, part).to(device) for suffix, part in names.items()}
            one = formats[module], dialect.input_scale(module, formats[module], parts)
            members.setdefault((expert, role == experts.DOWN), []).append(one)
    kinds: dict[bool, TensorFormat] = {}
    scales: dict[bool, list[Tensor]] = {True: [], False: []}
    for (_, is_down), group in members.items():
        given = [scale for _, scale in group if scale is not None]
        kinds.setdefault(is_down, group[0][0])
        if profile != NO_EMULATION and len(group) > 1 and given and all(one == group[0][0] for one, _ in group):
            given = [_shared_input_scale(dialect, group[0][0], given)]
        scales[is_down] += given
    return _inputs_of(kinds, scales, profile)


def _inputs_of(kinds: Mapping[bool, TensorFormat], scales: Mapping[bool, list[Tensor]], profile: str) -> ExpertInputs:
    shared = {is_down: largest_scale(some) for is_down, some in scales.items()}
    quantizers = [experts_quantizer(kinds.get(is_down), shared[is_down], profile) for is_down in (False, True)]
    ranges = [
        None if (kind := kinds.get(is_down)) is None else input_range(kind, shared[is_down])
        for is_down in (False, True)
    ]
    return ExpertInputs(quantizers[0], quantizers[1], (ranges[0], ranges[1]))


def experts_quantizer(fmt: TensorFormat | None, scale: Tensor | None, profile: str) -> Quantizer | None:
    """What rounds the inputs of all experts' projections of a kind, under their `largest_scale`; None: nothing does."""
    return None if fmt is None else input_quantizer(fmt, profile, scale)


def read_layer(
    checkpoint: Checkpoint,
    dialect: Dialect,
    prefix: str,
    layer: nn.Module,
    formats: Mapping[str, TensorFormat],
    profile: str,
    names: Mapping[str, str] | None = None,
    device: torch.device = CPU,
    read: ReadTensor | None = None,
    ranges: MutableMapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Quantizer]]:
    """Weights of a decoder layer (names relative to it), dequantized, and the quantizers of its linears' inputs.

    `prefix` is the layer's name in the checkpoint, `layer` its skeleton, `formats` the quantized modules by full name.
    `names` (the file's -> the model's, relative to the layer) are given where they differ; results have the file's.
    Quantized weights are decoded on `device`; `read` reads tensors, by default to the CPU. Experts in 3-D parameters
    are `read_experts`'. `ranges` receives, for linears with a static input scale, what it represents (`input_range`).
    """
    read = read or partial(read_tensor, checkpoint)
    held_by = layer.state_dict()
    state = held_by if names is None else {name: held_by[ours] for name, ours in names.items()}
    linears = [name.removesuffix(".weight") for name in state if name.endswith(".weight")]
    quantized = [name for name in linears if f"{prefix}.{name}" in formats]
    held = {f"{name}.weight" for name in quantized}
    weights = {
        name: read(f"{prefix}.{name}")
        for name in state
        if name not in held and f"{prefix}.{name}" in checkpoint.tensors
    }
    quantizers: dict[str, Quantizer] = {}
    modules = {name: name if names is None else names[f"{name}.weight"].removesuffix(".weight") for name in quantized}
    groups = list(group_modules(quantized))
    for some in [groups] if device.type == "cuda" else [[group] for group in groups]:
        full = {name: f"{prefix}.{name}" for group in some for name in group}
        members = _read_members(checkpoint, dialect, full, formats, device, read)
        if profile != NO_EMULATION:
            for group in some:
                members |= _as_one(dialect, {name: members[name] for name in group})
        for name, member in members.items():
            empty = state[f"{name}.weight"]
            values = _values(checkpoint, {full[name]: member.quantized}, {full[name]: tuple(empty.shape)})
            weights[f"{name}.weight"] = values[full[name]].to(empty.dtype)
            if not isinstance(layer.get_submodule(modules[name]), nn.Linear):
                continue  # a router that is no linear is decoded alone
            if (quantizer := input_quantizer(member.format, profile, member.input_scale)) is not None:
                quantizers[name] = quantizer
            if ranges is not None and (largest := input_range(member.format, member.input_scale)) is not None:
                ranges[name] = largest
    return weights, quantizers


@dataclass(frozen=True)
class FP8Cache(NoCache):
    """Takes the place of transformers' cache: keys and values are rounded to E4M3 on the way, and nothing is kept.

    `k_scale` and `v_scale` are fp32 multipliers, () for a whole layer or [H, 1, 1], one a head. States of linear
    attention and convolutions pass unchanged, as engines keep them in 16 bits.
    """

    k_scale: Tensor
    v_scale: Tensor

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: object, **_kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, T, D] as attention reads them back, in their own dtype."""
        pairs = ((key_states, self.k_scale), (value_states, self.v_scale))
        keys, values = (
            straight_through(partial(fp8.quantize_dequantize_input_static, scale=scale.to(x.device)), x)
            for x, scale in pairs
        )
        return keys, values


def fp8_cache(k_scale: Tensor, v_scale: Tensor) -> FP8Cache:
    """What an attention layer gets as `past_key_values`, to read keys and values as from an FP8 cache."""
    return FP8Cache(k_scale, v_scale)


def read_kv_scales(checkpoint: Checkpoint, prefix: str, read: ReadTensor | None = None) -> tuple[Tensor, Tensor]:
    """Multipliers (fp32, () or [H, 1, 1]) of keys and values of the decoder layer `prefix`; 1 where the file has none.

    Under any of the names that vLLM reads (engines/kv_cache.py). UserError for a scale that is not positive and finite,
    and for two names with different scales.
    """
    read = read or partial(read_tensor, checkpoint)
    return _kv_scale(checkpoint, prefix, "k", read), _kv_scale(checkpoint, prefix, "v", read)


def _kv_scale(checkpoint: Checkpoint, layer: str, which: str, read: ReadTensor) -> Tensor:
    names = [name for name in scale_names(layer, which) if name in checkpoint.tensors]
    if not names:
        return torch.ones(())
    name, *others = names
    scale = read(name).float()
    for other in others:
        if not torch.equal(read(other).float().reshape(-1), scale.reshape(-1)):
            raise UserError(
                f"{name} and {other} scale the same cache and differ.",
                code="scale-invalid",
                where=str(checkpoint.path),
                remedy="Remove the one that engines should not use.",
            )
    if not (scale.isfinite() & (scale > 0)).all():
        raise UserError(
            f"{name} holds {scale.flatten().tolist()[:4]}, so an engine would compute garbage.",
            code="scale-invalid",
            where=str(checkpoint.path),
            remedy="Quantize the model again: its calibration did not reach this layer.",
        )
    return scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1, 1, 1)


@dataclass(frozen=True)
class _Member:
    """A linear as stored, one of a fused group."""

    format: TensorFormat
    quantized: QuantizedWeight
    input_scale: Tensor | None


def _read_members(
    checkpoint: Checkpoint,
    dialect: Dialect,
    modules: Mapping[str, str],
    formats: Mapping[str, TensorFormat],
    device: torch.device,
    read: ReadTensor,
) -> dict[str, _Member]:
    """Linears under the keys of `modules`, whose values are their names in the file, decoded on the device."""
    stored: dict[str, tuple[TensorFormat, dict[str, Tensor]]] = {}
    for module in modules.values():
        names = dialect.part_names(module, formats[module], checkpoint.tensors)
        # decoded on the device: codes are a fraction of the values, and a CPU is slow at this; it needs their shape
        parts = {
            suffix: read_tensor(checkpoint, name) if suffix == "weight_shape" else read(name).to(device)
            for suffix, name in names.items()
        }
        stored[module] = formats[module], parts
    decoded = dialect.decode_all(stored)
    return {name: _Member(formats[module], *decoded[module]) for name, module in modules.items()}


def _values(
    checkpoint: Checkpoint, weights: Mapping[str, QuantizedWeight], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """fp32 of each module's weight, of its shape; UserError where a module's tensors give no such weight."""
    found: dict[str, Tensor] = {}
    with _sizes_that_do_not_fit():
        found = dict(zip(weights, dequantize_all(list(weights.values())), strict=True))
    for module, quantized in weights.items() if not found else ():
        with _sizes_that_do_not_fit():
            found[module] = dequantize(quantized)
    for module, shape in shapes.items():
        if module not in found or tuple(found[module].shape) != shape:
            raise UserError(
                f"the tensors of {module} do not make a weight {list(shape)}.",
                code="quantization-invalid",
                where=str(checkpoint.path),
                remedy="Config and weights do not belong together.",
            )
    return found


@contextmanager
def _sizes_that_do_not_fit() -> Iterator[None]:
    """Suppresses the errors of tensors whose sizes do not go together."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError, ValueError):
        return


def _together(sizes: Mapping[_Projections, int], limit: int) -> Iterator[list[_Projections]]:
    """Keys in order, in lists whose sizes add up to at most `limit`; a larger one is alone."""
    some: list[_Projections] = []
    held = 0
    for key, size in sizes.items():
        if some and held + size > limit:
            yield some
            some, held = [], 0
        some.append(key)
        held += size
    if some:
        yield some


def largest_scale(scales: Sequence[Tensor]) -> Tensor | None:
    """The largest of multipliers (the first number of each tensor), without waiting for a GPU; None of none."""
    if not scales:
        return None
    stacked = torch.stack(list(scales))
    return stacked.index_select(0, stacked.view(len(stacked), -1)[:, 0].argmax().view(1))[0]


def _as_one(dialect: Dialect, members: Mapping[str, _Member]) -> Mapping[str, _Member]:
    """Members of a fused group under the scales that vLLM gives them where a file's differ.

    NVFP4: one global scale for weights and one for inputs, the largest of the stored numbers, while codes and block
    scales stay. FP8 with one scale a weight and 8-bit inputs: codes made anew under the largest scale. Static scales
    of FP8 inputs: the largest. Of INT8 inputs: those of the member read last.
    """
    fmt = next(iter(members.values())).format
    if len(members) == 1 or any(member.format != fmt for member in members.values()):
        return members
    inputs = [member.input_scale for member in members.values() if member.input_scale is not None]
    if inputs:
        shared = _shared_input_scale(dialect, fmt, inputs)
        members = {name: replace(member, input_scale=shared) for name, member in members.items()}
    if fmt.name in ("nvfp4", "nvfp4a16"):
        return _under_one_global_scale(dialect, members)
    whole = fmt.name == "fp8" and fmt.group_size == 0 and fmt.block is None
    return _under_one_scale(members) if whole and fmt.input_kind != "none" else members


def _shared_input_scale(dialect: Dialect, fmt: TensorFormat, scales: Sequence[Tensor]) -> Tensor:
    """The multiplier of the inputs of a fused group whose members have `scales`."""
    if fmt.input_kind == "nvfp4":
        return dialect.fused_global_scale(scales)
    largest = largest_scale(scales) if fmt.input_kind == "fp8-tensor" else scales[-1]
    assert largest is not None
    return largest


def _under_one_global_scale(dialect: Dialect, members: Mapping[str, _Member]) -> Mapping[str, _Member]:
    weights = {name: m.quantized for name, m in members.items() if isinstance(m.quantized, nvfp4.NVFP4Weight)}
    one = dialect.fused_global_scale([weight.global_scale for weight in weights.values()])
    return {name: replace(members[name], quantized=replace(w, global_scale=one)) for name, w in weights.items()}


def _under_one_scale(members: Mapping[str, _Member]) -> Mapping[str, _Member]:
    weights = {name: m.quantized for name, m in members.items() if isinstance(m.quantized, fp8.FP8Weight)}
    scales = torch.stack([weight.scale.float().view(()) for weight in weights.values()])
    largest = scales.amax()
    same = dict(zip(weights, (scales == largest).tolist(), strict=True))
    return {
        name: replace(members[name], quantized=weight if same[name] else fp8.requantize(weight, largest))
        for name, weight in weights.items()
    }
