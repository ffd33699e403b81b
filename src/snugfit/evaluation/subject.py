"""A checkpoint opened for evaluation: its last hidden states, one decoder layer in memory at a time, and its head."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snugfit.dialects import reading
from snugfit.engines.profiles import DEFAULT_PROFILE, PROFILES
from snugfit.errors import UserError
from snugfit.formats.spec import TensorFormat
from snugfit.model import emulate, experts, forward_pass, layers
from snugfit.storage.checkpoint import Checkpoint
from snugfit.storage.open import open_checkpoint

TOKENS_PER_BATCH = 4096
# codes in one element, by format and dtype; 1 of others
PACKED: Mapping[tuple[str, str], int] = {
    ("nvfp4", "U8"): 2,
    ("nvfp4a16", "U8"): 2,
    ("mxfp4", "U8"): 2,
    ("int4", "I32"): 8,
    ("int8", "I32"): 4,
}


@dataclass(frozen=True)
class Subject:
    """A model under evaluation: what is stored how (`formats` by module), and what an engine would do to activations.

    `kv` is the format that its KV cache declares, None for the model's own.
    """

    checkpoint: Checkpoint
    skeleton: layers.Skeleton
    formats: Mapping[str, TensorFormat]
    kv: str | None
    activations: str

    @property
    def arithmetic(self) -> torch.dtype:
        """What it computes in."""
        dtype = self.skeleton.model.dtype
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def vocabulary(self) -> int:
        """Number of logits a token."""
        return int(self.skeleton.model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]


def open_subject(
    path: str | Path, *, activations: str = DEFAULT_PROFILE, arithmetic: torch.dtype | None = None
) -> Subject:
    """Open a model directory, 16-bit or quantized; it computes in `arithmetic` (default: its config's dtype).

    Reads headers alone. UserError for an unknown profile, an unreadable format, or a broken checkpoint.
    """
    if activations not in PROFILES:
        raise UserError(f"unknown activation profile {activations!r}.", remedy=f"Known: {', '.join(PROFILES)}.")
    opened = open_checkpoint(path)
    skeleton = layers.build_skeleton(opened, arithmetic)
    extra = reading.read_quant_config(opened.path)
    with _naming(opened):
        formats = _read_formats(opened, skeleton, extra)
        kv = reading.kv_cache_format(opened.config, extra)
        codes = {f"{module}.weight": _codes(opened, module, fmt) for module, fmt in formats.items()}
    layers.check_shapes(skeleton, opened, codes)
    return Subject(opened, skeleton, formats, kv, activations)


def _read_formats(
    checkpoint: Checkpoint, skeleton: layers.Skeleton, extra: Mapping[str, Any] | None
) -> dict[str, TensorFormat]:
    """Format of each quantized module that runs on text, by its name in the file.

    A config may say names as the file does, or as transformers' modules are called: whichever agrees with the headers.
    """
    ours = layers.linear_names(skeleton)
    headers = {name: (tensor.dtype, tensor.shape) for name, tensor in checkpoint.tensors.items()}
    try:
        return reading.read_formats(checkpoint.config, sorted(ours), headers, extra)
    except UserError:
        if all(name == module for name, module in ours.items()):
            raise
        called = {
            f"{ours.get(name.rpartition('.')[0], name.rpartition('.')[0])}.{name.rpartition('.')[2]}": header
            for name, header in headers.items()
        }
        with contextlib.suppress(UserError):
            formats = reading.read_formats(checkpoint.config, sorted(ours.values()), called, extra)
            return {name: formats[module] for name, module in ours.items() if module in formats}
        raise


@contextlib.contextmanager
def _naming(checkpoint: Checkpoint) -> Iterator[None]:
    """What is wrong with the quantization in a config.json is said of this checkpoint's."""
    try:
        yield
    except UserError as error:
        if not error.where.startswith("config.json"):
            raise
        raise UserError(error.what, where=str(checkpoint.path / error.where), remedy=error.remedy) from None


def _codes(checkpoint: Checkpoint, module: str, fmt: TensorFormat) -> tuple[str, int]:
    """The tensor that holds a quantized weight's codes, and how many of them an element of it holds."""
    names = reading.part_names(checkpoint.config, module, fmt, checkpoint.tensors)
    name = next(iter(names.values()))
    return name, PACKED.get((fmt.name, checkpoint.tensors[name].dtype), 1)


@torch.no_grad()
def last_states(
    subject: Subject,
    rows: Sequence[Sequence[int]],
    places: Sequence[Tensor],
    device: torch.device,
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    tick: Callable[[], None] = lambda: None,
) -> list[Tensor]:
    """What the last layer gives for each row at its `places` (positions, int64): [places, H] each, on the CPU.

    One decoder layer is resident at a time; `tick` is called after each.
    """
    batches = pass_layers(subject, rows, device, tokens_per_batch=tokens_per_batch, tick=tick)
    states: list[Tensor] = [torch.empty(0)] * len(rows)
    for batch in batches:
        for place, row in enumerate(batch.rows):
            states[row] = batch.hidden[place].index_select(0, places[row].to(device)).cpu()
        batch.hidden = torch.empty(0)
    return states


@torch.no_grad()
def pass_layers(
    subject: Subject,
    rows: Sequence[Sequence[int]],
    device: torch.device,
    *,
    tokens_per_batch: int,
    tick: Callable[[], None] = lambda: None,
) -> list[forward_pass.Batch]:
    """Rows in batches, passed through all decoder layers."""
    batches = forward_pass.make_batches(rows, tokens_per_batch, device)
    weights = layers.outer_weights(subject.skeleton, subject.checkpoint, head=False)
    forward_pass.embed(subject.skeleton, weights, batches, device)
    with _bounded_attention(subject.arithmetic, device):
        for index in range(len(subject.skeleton.layers)):
            layer, cache = resident_layer(subject, index, device)
            forward_pass.run_layer(layer, index, batches, cache=cache)
            del layer  # before the next is read
            tick()
    for batch in batches:
        batch.calls.clear()
    return batches


@contextlib.contextmanager
def _bounded_attention(arithmetic: torch.dtype, device: torch.device) -> Iterator[None]:
    """On a GPU in fp32, transformers repeats shared key heads: torch's only kernel for these holds all T x T scores."""
    from transformers.integrations import sdpa_attention

    if device.type != "cuda" or arithmetic != torch.float32 or not hasattr(sdpa_attention, "use_gqa_in_sdpa"):
        yield
        return
    original = sdpa_attention.use_gqa_in_sdpa
    sdpa_attention.use_gqa_in_sdpa = lambda *_, **__: False
    try:
        yield
    finally:
        sdpa_attention.use_gqa_in_sdpa = original


@dataclass(frozen=True)
class Outer:
    """Weights outside the decoder layers by full name, and what happens to the inputs of quantized linears there."""

    weights: Mapping[str, Tensor]
    quantizers: Mapping[str, emulate.Quantizer]


def open_head(subject: Subject, device: torch.device, outer: Outer | None = None) -> forward_pass.Head:
    """Final norm and output head: hidden states [B, t, H] on `device` to logits [B, t, V]."""
    given = outer or outer_weights(subject, device)
    head, model = forward_pass.output_head(subject.skeleton, given.weights, device)
    emulate.quantize_inputs(model, given.quantizers)
    return head


def outer_weights(subject: Subject, device: torch.device, pool: dict[str, list[Tensor]] | None = None) -> Outer:
    """What the output head needs, on `device`, dequantized; tensors equal to one in `pool` are taken from there."""
    decoded, quantizers = _decoded_head(subject)
    weights = layers.outer_weights(subject.skeleton, subject.checkpoint, head=True, decoded=decoded)
    placed: dict[int, Tensor] = {}
    for name, tensor in weights.items():
        if id(tensor) not in placed:
            placed[id(tensor)] = _shared(name, tensor.to(device), {} if pool is None else pool)
    return Outer({name: placed[id(tensor)] for name, tensor in weights.items()}, quantizers)


def _shared(name: str, tensor: Tensor, pool: dict[str, list[Tensor]]) -> Tensor:
    for known in pool.setdefault(name, []):
        if known.dtype == tensor.dtype and known.shape == tensor.shape and torch.equal(known, tensor):
            return known
    pool[name].append(tensor)
    return tensor


def _decoded_head(subject: Subject) -> tuple[dict[str, Tensor], dict[str, emulate.Quantizer]]:
    """Quantized linears outside the decoder layers: their weights, and what happens to their inputs."""
    decoded: dict[str, Tensor] = {}
    quantizers: dict[str, emulate.Quantizer] = {}
    ours = layers.linear_names(subject.skeleton)
    for module, fmt in subject.formats.items():
        if module.startswith(subject.skeleton.stored_layers_name + "."):
            continue
        weight = subject.skeleton.model.get_parameter(f"{ours[module]}.weight")
        shape = tuple(weight.shape)
        with _naming(subject.checkpoint):
            decoded[f"{module}.weight"], scale = emulate.read_module(subject.checkpoint, module, fmt, shape)
        quantizer = emulate.input_quantizer(fmt, subject.activations, scale)
        if quantizer is not None:
            quantizers[ours[module]] = quantizer
    return decoded, quantizers


def resident_layer(subject: Subject, index: int, device: torch.device) -> tuple[nn.Module, emulate.FP8Cache | None]:
    """Decoder layer `index` on `device`, its inputs as the engine rounds them, and what happens to its KV cache."""
    skeleton = subject.skeleton
    prefix = f"{skeleton.stored_layers_name}.{index}"
    with _naming(subject.checkpoint):
        weights, quantizers = emulate.read_layer(
            subject.checkpoint,
            prefix,
            skeleton.layers[index],
            subject.formats,
            subject.activations,
            layers.layer_names(skeleton, index),
        )
        mixture, inputs = skeleton.experts.get(index), None
        if mixture is not None:
            room = layers.expert_storage(skeleton, index, torch.device("cpu"))
            inputs = emulate.read_experts(
                *(subject.checkpoint, prefix, mixture, room, subject.formats, subject.activations)
            )
            weights |= room.whole
    layer = layers.resident_layer(skeleton, index, weights, device)
    if mixture is not None and inputs is not None:
        experts.hook(layer.get_submodule(mixture.module), inputs)
    modules = layers.module_names(skeleton, index)
    emulate.quantize_inputs(layer, {modules[name]: quantizer for name, quantizer in quantizers.items()})
    if subject.kv is None or subject.activations == "none":
        return layer, None
    return layer, emulate.fp8_cache(*emulate.read_kv_scales(subject.checkpoint, prefix))
