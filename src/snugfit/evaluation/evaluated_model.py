"""A checkpoint opened to be run: its last hidden states, one decoder layer in memory at a time, and its output head."""

from __future__ import annotations

import contextlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from snugfit import distributed
from snugfit.dialects.dialect import Dialect
from snugfit.dialects.headers import by_module, holds_codes
from snugfit.engines.profiles import DEFAULT_PROFILE, PROFILES
from snugfit.errors import UserError
from snugfit.evaluation.saturation import InputWatch
from snugfit.formats.spec import TensorFormat
from snugfit.machine import free_bytes
from snugfit.model import emulate, experts, forward_pass, layers, pieces, transformers_api
from snugfit.model.layer_stubs import token_embeddings
from snugfit.model.layout import read_layout
from snugfit.model.skeleton import Skeleton, build_skeleton, check_decoder, check_runs, check_shapes
from snugfit.records.evaluation import EvaluatedCheckpoint
from snugfit.storage.checkpoint import Checkpoint, header_digest
from snugfit.storage.open import is_hub_id, open_checkpoint
from snugfit.storage.tensor_reader import ReadTensor, TensorReader

TOKENS_PER_BATCH = 4096
STATES_SHARE = 8  # last hidden states stay on a GPU where they take at most this part of its free memory


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """A checkpoint under the activations of an engine profile, by its `name` in tables.

    `formats` are those of the quantized modules, `kv_cache` is the declared format of keys and values, None for the
    model's own. `notes` say where config.json and tensors disagree, and what engines take in place of missing scales.
    `experts_per_group` are the routed experts of a layer that are in memory at once, None for all.
    """

    name: str
    checkpoint: Checkpoint
    dialect: Dialect
    skeleton: Skeleton
    formats: Mapping[str, TensorFormat]
    kv_cache: str | None
    activations: str
    notes: tuple[str, ...] = ()
    experts_per_group: int | None = None

    @property
    def arithmetic(self) -> torch.dtype:
        """The dtype that it computes in."""
        dtype = self.skeleton.model.dtype
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def arithmetic_name(self) -> str:
        """The short name of that dtype."""
        return str(self.arithmetic).removeprefix("torch.")

    @property
    def description(self) -> EvaluatedCheckpoint:
        """For a record: the name, a digest of the headers, and how many modules have each format."""
        labels = Counter(fmt.label() for fmt in self.formats.values())
        return EvaluatedCheckpoint(
            name=self.name,
            header_digest=header_digest(self.checkpoint),
            bytes=sum(tensor.bytes for tensor in self.checkpoint.tensors.values()),
            arithmetic=self.arithmetic_name,
            formats=dict(labels),
            kv_cache=self.kv_cache,
        )

    @property
    def vocabulary(self) -> int:
        """The number of logits of a token."""
        return int(self.skeleton.model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]


def refuse_hub_id(model: str | Path) -> None:
    """UserError for a model that is not a local directory but looks like an id on the Hub; nothing is downloaded."""
    if is_hub_id(model):
        name = str(model).partition("@")[0]
        raise UserError(
            "not a local directory; a model on the Hub cannot be run before it is downloaded.",
            code="option-invalid",
            where=str(model),
            remedy=f"Download it (`hf download {name} --local-dir DIR`), and give that directory.",
        )


def open_model(
    path: str | Path,
    *,
    name: str | None = None,
    activations: str = DEFAULT_PROFILE,
    arithmetic: torch.dtype | None = None,
) -> EvaluatedModel:
    """Open a model directory, 16-bit or quantized; it computes in `arithmetic` (default: its config's dtype).

    `name` is what tables call it, by default its directory's. Only headers are read. UserError for an unknown profile,
    a Hub id, an unreadable format, or a broken checkpoint.
    """
    if activations not in PROFILES:
        raise UserError(
            f"unknown profile {activations!r}.",
            code="option-invalid",
            where="activations",
            remedy=f"Known: {', '.join(PROFILES)}.",
        )
    refuse_hub_id(path)
    opened = open_checkpoint(path)
    layout = read_layout(opened)
    layout.check_runnable()
    skeleton = build_skeleton(layout, arithmetic)
    check_decoder(skeleton, layout)
    check_runs(skeleton, str(path))
    if not skeleton.has_head:
        kind = ", ".join(map(str, opened.config.get("architectures") or ()))
        raise UserError(
            f"{kind} has no output head: it predicts no tokens, of which figures could be made.",
            code="architecture-unsupported",
            where=str(path),
            remedy="It can be quantized; compare what it returns with the original's in the program that uses it.",
        )
    dialect = layout.dialect
    formats = _read_formats(opened, dialect, skeleton)
    kv_cache = dialect.kv_cache_format()
    codes = {f"{module}.weight": _codes(opened, dialect, module, fmt) for module, fmt in formats.items()}
    check_shapes(skeleton, opened, codes)
    return EvaluatedModel(
        name=Path(path).resolve().name if name is None else name,
        checkpoint=opened,
        dialect=dialect,
        skeleton=skeleton,
        formats=formats,
        kv_cache=kv_cache,
        activations=activations,
        notes=(*layout.contradictions, *([f"FP8 KV cache: {bare}"] if (bare := layout.cache_without_scales) else [])),
    )


def _read_formats(checkpoint: Checkpoint, dialect: Dialect, skeleton: Skeleton) -> dict[str, TensorFormat]:
    """Format of each quantized module that runs on text, by its name in the file: linears, embeddings, routers.

    A config may use the names of the file or those of transformers' modules: whichever agree with the headers count.
    """
    headers = {name: (tensor.dtype, tensor.shape) for name, tensor in checkpoint.tensors.items()}
    parts = by_module(headers)
    others = {name: module for name, module in skeleton.with_weight().items() if holds_codes(parts.get(name, {}))}
    module_names = skeleton.linears() | others
    try:
        return dialect.read_formats(sorted(module_names), headers)
    except UserError:
        if all(name == module for name, module in module_names.items()):
            raise
        renamed = {
            f"{module_names.get(name.rpartition('.')[0], name.rpartition('.')[0])}.{name.rpartition('.')[2]}": header
            for name, header in headers.items()
        }
        with contextlib.suppress(UserError):
            formats = dialect.read_formats(sorted(module_names.values()), renamed)
            return {name: formats[module] for name, module in module_names.items() if module in formats}
        raise


def _codes(checkpoint: Checkpoint, dialect: Dialect, module: str, fmt: TensorFormat) -> tuple[str, int]:
    """The tensor with a quantized weight's codes, and how many codes one of its elements holds."""
    names = dialect.part_names(module, fmt, checkpoint.tensors)
    name = next(iter(names.values()))
    return name, fmt.spec.codes.get(checkpoint.tensors[name].dtype, 1)


@torch.no_grad()
def last_states(
    model: EvaluatedModel,
    rows: Sequence[Sequence[int]],
    positions: Sequence[Tensor],
    device: torch.device,
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    advance: Callable[[], None] = lambda: None,
    warn: Callable[[str], None] = lambda _: None,
    watch: InputWatch | None = None,
    shared: bool = False,
) -> list[Tensor]:
    """The last layer's output for each row at its `positions` (int64 [n]): [n, H] each, on the CPU or a GPU.

    One decoder layer is in memory at a time; `advance` is called after each. `warn` receives a message that names
    the first layer whose hidden states are not finite. `watch` sees the inputs of linears with static scales of these.
    Rows that are `shared` among processes have [0] in those that do not run them.
    """
    batches = pass_layers(
        model, rows, device, tokens_per_batch=tokens_per_batch, advance=advance, warn=warn, watch=watch, shared=shared
    )
    states: list[Tensor] = [torch.empty(0)] * len(rows)
    size = sum(len(wanted) for wanted in positions) * sum(batch.hidden[0, 0].nbytes for batch in batches[:1])
    home = device if device.type == "cpu" or STATES_SHARE * size <= free_bytes(device) else torch.device("cpu")
    for batch in batches:
        for index, row in enumerate(batch.rows):
            states[row] = batch.hidden[index].index_select(0, positions[row].to(device)).to(home)
        batch.hidden = torch.empty(0)
    return states


@torch.no_grad()
def pass_layers(
    model: EvaluatedModel,
    rows: Sequence[Sequence[int]],
    device: torch.device,
    *,
    tokens_per_batch: int,
    advance: Callable[[], None] = lambda: None,
    warn: Callable[[str], None] = lambda _: None,
    watch: InputWatch | None = None,
    shared: bool = False,
) -> list[forward_pass.Batch]:
    """Rows in batches, passed through all decoder layers; `warn`, `watch` and `shared` as in `last_states`."""
    batches = forward_pass.make_batches(rows, tokens_per_batch, device, pads=model.skeleton.is_causal)
    if shared:
        batches = list(distributed.mine(batches))
    prefixes = {index: f"{model.skeleton.stored_layers_name}.{index}" for index in model.skeleton.ran}
    coming = deque(prefixes.values())
    finite = _FirstNotFinite(model, warn)
    together = shared and model.experts_per_group is None  # of experts in pieces a process reads what its rows need
    reader = TensorReader(model.checkpoint, device, shared=together)
    with reader as read, bounded_attention(model.arithmetic, device):
        weights = embedding_weights(model, read)
        read.expect(*_next(coming))
        forward_pass.embed(model.skeleton, weights, batches, device)
        del weights
        finite.add("the embeddings", torch.tensor(forward_pass.nonfinite_tokens(batches)))
        for index in range(len(model.skeleton.layers)):
            if index in prefixes:
                finite.add(prefixes[index], _run_layer(model, index, batches, device, read, watch, _next(coming)))
            advance()
    finite.check()
    for batch in batches:
        batch.calls.clear()
    return batches


def _run_layer(
    model: EvaluatedModel,
    index: int,
    batches: Sequence[forward_pass.Batch],
    device: torch.device,
    read: TensorReader,
    watch: InputWatch | None,
    coming: Sequence[str],
) -> Tensor:
    """Pass batches through a layer; `coming` is the name of the next one, whose weights are read meanwhile."""
    before = None if watch is None else watch.before
    layer, cache, in_pieces = open_layer(model, index, device, read, watch)
    if in_pieces is not None:
        return pieces.run_layer(layer, index, batches, before, in_pieces, cache=cache)
    read.expect(*coming)
    return forward_pass.queue_layer(layer, index, batches, before, cache=cache)


def open_layer(
    model: EvaluatedModel,
    index: int,
    device: torch.device,
    read: ReadTensor | None = None,
    watch: InputWatch | None = None,
) -> tuple[nn.Module, emulate.FP8Cache | None, pieces.ExpertsInPieces | None]:
    """As `resident_layer`; where `experts_per_group` is fewer than the layer's experts, also what fills these."""
    mixture, size = model.skeleton.experts.get(index), model.experts_per_group
    if mixture is None or size is None or size >= mixture.count:
        return *resident_layer(model, index, device, read, watch), None
    buffers = layers.expert_buffers(model.skeleton, index, device, size)
    layer, cache = resident_layer(model, index, device, read, watch, buffers)
    prefix = f"{model.skeleton.stored_layers_name}.{index}"
    given = model.formats, model.activations, device, read

    def fill() -> Iterator[range]:
        for some in experts.in_groups(mixture.count, size):
            emulate.read_experts(
                model.checkpoint, model.dialect, prefix, mixture, buffers.of(index, some), *given, numbers=some
            )
            yield some

    scratch = pieces.ScratchMemory(device)
    return layer, cache, pieces.ExpertsInPieces(mixture.module, mixture.count, fill, scratch)


def _next(coming: deque[str]) -> tuple[str, ...]:
    return (coming.popleft(),) if coming else ()


class _FirstNotFinite:
    """Warns of the first part of a model behind which hidden states are not finite.

    A part's count is read after the next part is queued: a GPU then has work to do while this waits for it.
    """

    def __init__(self, model: EvaluatedModel, warn: Callable[[str], None]) -> None:
        self._model, self._warn = model, warn
        self._counts: deque[tuple[str, Tensor]] = deque()
        self._warned = False

    def add(self, part: str, count: Tensor) -> None:
        """The number of tokens behind `part` that are not finite, a scalar on the device."""
        self.check()
        self._counts.append((part, count))

    def check(self) -> None:
        """Read all counts that were added."""
        while self._counts:
            part, count = self._counts.popleft()
            if int(count) and not self._warned:
                self._warned = True
                self._warn(_not_finite(self._model, part))


def _not_finite(model: EvaluatedModel, first: str) -> str:
    """What a person should know of a model that computes NaN or infinite hidden states, from layer `first` on."""
    name = model.arithmetic_name
    remedy = ' float16 may have overflowed: `dtype="bfloat16"` has a wider range.' if name == "float16" else ""
    return f"warning: {model.name}: hidden states are NaN or infinite from {first} on, computed in {name}.{remedy}"


def bounded_attention(arithmetic: torch.dtype, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """On a GPU in fp32, attention that does not hold all T x T scores."""
    bounded = device.type == "cuda" and arithmetic == torch.float32
    return transformers_api.repeated_key_heads() if bounded else contextlib.nullcontext()


@dataclass(frozen=True)
class Outer:
    """Weights outside the decoder layers by full name, and the quantizers of the inputs of quantized linears there."""

    weights: Mapping[str, Tensor]
    quantizers: Mapping[str, emulate.Quantizer]


def open_head(
    model: EvaluatedModel,
    device: torch.device,
    outer: Outer | None = None,
    *,
    gradients: bool = False,
    shared: bool = False,
) -> forward_pass.Head:
    """Final norm and output head: hidden states [B, t, H] on `device` to logits [B, t, V]; `gradients` flow to them.

    With `shared` all processes open it at the same time.
    """
    given = outer or outer_weights(model, device, shared=shared)
    head, module = forward_pass.output_head(model.skeleton, given.weights, device, gradients=gradients)
    emulate.quantize_inputs(module, given.quantizers)
    return head


def outer_weights(
    model: EvaluatedModel,
    device: torch.device,
    pool: dict[str, list[Tensor]] | None = None,
    *,
    shared: bool = False,
) -> Outer:
    """The output head's weights on `device`, dequantized; `pool` shares tensors that are equal in several models.

    With `shared` all processes read them at the same time.
    """
    with TensorReader(model.checkpoint, device, shared=shared) as read:
        decoded, quantizers = _decoded_outside(model, head=True)
        weights = layers.outer_weights(model.skeleton, model.checkpoint, head=True, decoded=decoded, read=read)
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


def embedding_weights(model: EvaluatedModel, read: ReadTensor | None = None) -> dict[str, Tensor]:
    """The weights outside the decoder layers but for the output head, by the model's names, dequantized.

    `read` reads tensors, by default to the CPU.
    """
    decoded, _ = _decoded_outside(model, head=False)
    return layers.outer_weights(model.skeleton, model.checkpoint, head=False, decoded=decoded, read=read)


def _decoded_outside(model: EvaluatedModel, *, head: bool) -> tuple[dict[str, Tensor], dict[str, emulate.Quantizer]]:
    """Quantized modules outside the decoder layers: their weights by the file's names, and quantizers of inputs.

    Those that the output head needs, or (head=False) those that the embeddings need.
    """
    decoded: dict[str, Tensor] = {}
    quantizers: dict[str, emulate.Quantizer] = {}
    linears = model.skeleton.linears()
    module_names = model.skeleton.with_weight() | linears
    output = model.skeleton.model.get_output_embeddings().weight  # type: ignore[operator]
    tokens = [module.weight for module in token_embeddings(model.skeleton.model).values()]
    for name, fmt in model.formats.items():
        if name.startswith(model.skeleton.stored_layers_name + "."):
            continue
        weight = model.skeleton.model.get_parameter(f"{module_names[name]}.weight")
        is_head, embeds = weight is output, any(weight is one for one in tokens)
        if (embeds and not is_head) if head else (is_head and not embeds):
            continue
        shape = tuple(weight.shape)
        decoded[f"{name}.weight"], scale = emulate.read_module(model.checkpoint, model.dialect, name, fmt, shape)
        quantizer = emulate.input_quantizer(fmt, model.activations, scale)
        if quantizer is not None and name in linears:
            quantizers[module_names[name]] = quantizer
    return decoded, quantizers


def resident_layer(
    model: EvaluatedModel,
    index: int,
    device: torch.device,
    read: ReadTensor | None = None,
    watch: InputWatch | None = None,
    some: layers.ExpertBuffers | None = None,
) -> tuple[nn.Module, emulate.FP8Cache | None]:
    """Decoder layer `index` on `device`, its inputs rounded as the engine does, and the cache that rounds its keys.

    `read` reads tensors, by default to the CPU. `watch` sees the inputs before they are rounded. The memory of its
    experts is `some`, to be filled, if that is given.
    """
    skeleton = model.skeleton
    prefix = f"{skeleton.stored_layers_name}.{index}"
    names = skeleton.names_of_layer(index)
    ranges: dict[str, Tensor] | None = None if watch is None else {}
    weights, quantizers = emulate.read_layer(
        model.checkpoint,
        model.dialect,
        prefix,
        skeleton.layers[index],
        model.formats,
        model.activations,
        names.parameters,
        device,
        read,
        ranges,
    )
    mixture, inputs, size = skeleton.experts.get(index), None, None
    if mixture is not None and some is not None:
        size = len(next(iter(some.stacked.values())))
        inputs = emulate.read_expert_inputs(
            model.checkpoint, model.dialect, prefix, mixture, model.formats, model.activations, device
        )
        weights |= some.stacked
    elif mixture is not None:
        buffers = layers.expert_buffers(skeleton, index, device)
        inputs = emulate.read_experts(
            model.checkpoint, model.dialect, prefix, mixture, buffers, model.formats, model.activations, device, read
        )
        weights |= buffers.stacked
    layer = layers.resident_layer(skeleton, index, weights, device, size=size)
    modules = names.modules
    if watch is not None and ranges is not None:
        watch.linears(layer, f"{prefix}.", modules, ranges)
    if mixture is not None and inputs is not None:
        hooks = inputs if watch is None else watch.experts(f"{prefix}.", mixture, inputs)
        experts.hook(layer.get_submodule(mixture.module), hooks)
    emulate.quantize_inputs(layer, {modules[name]: quantizer for name, quantizer in quantizers.items()})
    if model.kv_cache is None or model.activations == "none":
        return layer, None
    scales = emulate.read_kv_scales(model.checkpoint, prefix, read)
    return layer, emulate.fp8_cache(*(scale.to(device) for scale in scales))
