"""What a file's tensors are to a recipe: 2-D weights in 16 bits, whatever they are kept in. Headers only, no torch.

A weight may be codes beside scales (FP8, MXFP4), or one expert's part of a 3-D tensor. `single_weights` takes such
tensors apart by name and shape alone; `model/assemble.py` makes weights of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from snugfit.dialects.headers import by_module, holds_codes
from snugfit.dialects.reading import part_names, read_formats, read_quant_config
from snugfit.engines.mixtures import STACKED, Stacked
from snugfit.errors import UserError
from snugfit.formats.spec import TensorFormat
from snugfit.storage.checkpoint import Checkpoint
from snugfit.storage.safetensors_header import TensorInfo

# what may stand for 16-bit weights: all other codes have lost too much to start from
SOURCE_FORMATS = frozenset({"fp8", "fp8-dynamic", "fp8-block"})
MAX_EXPERTS = 100_000
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings")
_EIGHT_BIT_FLOATS = frozenset({"F8_E4M3", "F8_E5M2"})
MXFP4_BLOCKS, MXFP4_SCALES = "_blocks", "_scales"
_SCALES_OF_WEIGHTS = ("weight_scale_inv", "weight_scale", "input_scale", "activation_scale")
_AGAIN = "Config and weights do not belong together: download the checkpoint again."


@dataclass(frozen=True, slots=True)
class Slot:
    """One expert's part of a 3-D tensor [experts, outputs, inputs] (`transposed`: [experts, inputs, outputs]).

    Its outputs are those from `start` to `stop` in steps of `step`; `whole` is how many all experts have together.
    """

    expert: int
    whole: int
    start: int
    stop: int
    step: int
    transposed: bool


@dataclass(frozen=True, slots=True)
class Source:
    """Which tensors of the file (suffix -> name) a weight is made of.

    `format` is what they store, None for plain numbers; `slot` is the weight's part of them where they are 3-D.
    """

    parts: Mapping[str, str]
    format: TensorFormat | None = None
    slot: Slot | None = None


@dataclass(frozen=True)
class Weights:
    """A model's tensors as a recipe sees them, in the order of the file.

    `sources` has those that are no tensor of the file as it is; `stacks` leads from a tensor of all experts to what
    is taken out of it.
    """

    tensors: Mapping[str, TensorInfo]
    sources: Mapping[str, Source] = field(default_factory=dict)
    stacks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    whole: Mapping[str, TensorInfo] = field(default_factory=dict)

    @property
    def formats(self) -> dict[str, TensorFormat]:
        """Format of each tensor that the file holds as codes."""
        return {name: source.format for name, source in self.sources.items() if source.format is not None}

    def parts(self, name: str) -> tuple[str, ...]:
        """Names of the file's tensors behind `name`."""
        source = self.sources.get(name)
        return (name,) if source is None else tuple(source.parts.values())

    def bytes(self, checkpoint: Checkpoint, name: str) -> int:
        """Bytes of the file that `name` is made of."""
        source = self.sources.get(name)
        whole = sum(checkpoint.tensors[part].bytes for part in self.parts(name))
        if source is None or source.slot is None:
            return whole
        return whole * len(range(source.slot.start, source.slot.stop, source.slot.step)) // source.slot.whole

    def keep_whole(self, taken: Callable[[str], bool]) -> Weights:
        """The same, but tensors of all experts stay together where none of what is in them, or beside, is `taken`."""
        apart = {parent(name) for names in self.stacks.values() for name in names if taken(name)}
        stacks = {s: names for s, names in self.stacks.items() if any(parent(name) in apart for name in names)}
        if len(stacks) == len(self.stacks):
            return self
        whole = {names[0]: stack for stack, names in self.stacks.items() if stack not in stacks}
        gone = {name for stack, names in self.stacks.items() if stack not in stacks for name in names}
        tensors: dict[str, TensorInfo] = {}
        for name, info in self.tensors.items():
            if name in whole:
                header = self.whole[whole[name]]
                tensors[header.name] = header
            elif name not in gone:
                tensors[name] = info
        sources = {name: source for name, source in self.sources.items() if name not in gone}
        return Weights(tensors, sources, stacks, self.whole)


def single_weights(checkpoint: Checkpoint) -> Weights:
    """Take a checkpoint's tensors apart; UserError for codes that no run can start from, and scales without weights."""
    formats = _source_formats(checkpoint)
    wide = _wide_dtype(checkpoint.config)
    scales = _scale_owners(checkpoint, formats)
    stacked = stacked_weights(checkpoint)
    tensors: dict[str, TensorInfo] = {}
    sources = dict(stacked.sources)
    for name, tensor in checkpoint.tensors.items():
        if name in scales:
            continue
        module, _, parameter = name.rpartition(".")
        fmt = formats.get(module) if parameter == "weight" else None
        if fmt is not None and len(tensor.shape) == 2 and not module.endswith(_EMBEDDINGS):
            tensors[name] = TensorInfo(name, wide, tensor.shape)
            parts = part_names(checkpoint.config, module, fmt, checkpoint.tensors)
            _check_scale(checkpoint, fmt, parts)
            sources[name] = Source(parts, fmt)
        elif name in stacked.stacks:
            tensors |= {single: stacked.tensors[single] for single in stacked.stacks[name]}
        elif tensor.dtype in _EIGHT_BIT_FLOATS:
            raise _misplaced(checkpoint, tensor)
        elif (
            not name.endswith(MXFP4_SCALES) or f"{name.removesuffix(MXFP4_SCALES)}{MXFP4_BLOCKS}" not in stacked.stacks
        ):
            tensors[name] = TensorInfo(name, tensor.dtype, tensor.shape)
    return Weights(tensors, sources, stacked.stacks, stacked.whole)


def stacked_weights(checkpoint: Checkpoint) -> Weights:
    """Single experts of the tensors that hold all of a layer's, and nothing else."""
    layout, wide = _stacked(checkpoint.config), _wide_dtype(checkpoint.config)
    if layout is None:
        return Weights({})
    found = {
        name: single
        for name, tensor in checkpoint.tensors.items()
        if (single := _experts_of(checkpoint, tensor, layout, wide))
    }
    pairs = [pair for single in found.values() for pair in single]
    return Weights(
        {info.name: info for info, _ in pairs},
        {info.name: source for info, source in pairs},
        {name: tuple(info.name for info, _ in single) for name, single in found.items()},
        {name: TensorInfo(name, t.dtype, t.shape) for name in found for t in (checkpoint.tensors[name],)},
    )


def _misplaced(checkpoint: Checkpoint, tensor: TensorInfo) -> UserError:
    return UserError(
        f"{tensor.name} is {tensor.dtype}, which only 2-D weights of linears may be.",
        where=str(checkpoint.path),
        remedy="Start from the original BF16, FP16 or FP32 checkpoint.",
    )


def parent(name: str) -> str:
    """The module that holds the experts of which `name`, ...experts.N.gate_proj.weight, is one's."""
    return name.rpartition(".experts.")[0]


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def language_configs(config: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    """A config and the part of it that describes a language model, if it is apart."""
    yield config
    if text_config(config) is not config:
        yield text_config(config)


def _wide_dtype(config: Mapping[str, Any]) -> str:
    """The 16-bit dtype that quantized weights count as."""
    names = (given.get(key) for given in language_configs(config) for key in ("dtype", "torch_dtype"))
    return next(("F16" for name in names if name in ("float16", "half")), "BF16")


def _source_formats(checkpoint: Checkpoint) -> dict[str, TensorFormat]:
    """Format of each module with codes; UserError where a run cannot start from them."""
    headers = {name: (tensor.dtype, tensor.shape) for name, tensor in checkpoint.tensors.items()}
    modules = [module for module, parts in by_module(headers).items() if holds_codes(parts)]
    config = next(
        (c["quantization_config"] for c in language_configs(checkpoint.config) if c.get("quantization_config")), None
    )
    method = config.get("quant_method", "unknown") if isinstance(config, dict) else "unknown" if config else None
    if not modules and method in (None, "fp8", "mxfp4", "compressed-tensors"):
        _check_blocks(checkpoint)
        return {}
    evidence = f"quant_method {method!r} in config.json"
    if method is None:
        suffix = next(
            suffix for suffix in ("weight_packed", "qweight", "weight") if f"{modules[0]}.{suffix}" in headers
        )
        evidence = f"tensor {modules[0]}.{suffix}"
    remedy = "Start from the original BF16, FP16 or FP32 checkpoint, or from an FP8 one."
    if method not in ("fp8", "compressed-tensors"):
        raise UserError(f"already quantized ({evidence}).", where=str(checkpoint.path), remedy=remedy)
    extra = None if checkpoint.remote else read_quant_config(Path(checkpoint.path))
    try:
        formats = read_formats(checkpoint.config, modules, headers, extra)
    except UserError as error:
        where = error.where if not error.where.startswith("config.json") else str(checkpoint.path / error.where)
        raise UserError(error.what, where=where, remedy=error.remedy) from None
    other = next((fmt for fmt in formats.values() if fmt.name not in SOURCE_FORMATS), None)
    if other is not None:
        what = f"already quantized ({evidence}: {other.label()})."
        raise UserError(what, where=str(checkpoint.path), remedy=remedy)
    return formats


def _check_blocks(checkpoint: Checkpoint) -> None:
    """UserError for MXFP4 codes in an order that is not known."""
    if _stacked(checkpoint.config) is None and any(name.endswith(MXFP4_BLOCKS) for name in checkpoint.tensors):
        what = f"MXFP4 experts of a family ({checkpoint.config.get('model_type')!r}) whose layout is not known."
        raise UserError(what, where=str(checkpoint.path), remedy="It needs a row in engines/mixtures.py.")


def _scale_owners(checkpoint: Checkpoint, formats: Mapping[str, TensorFormat]) -> dict[str, str]:
    """Scales beside FP8 weights -> the weight; UserError for a scale whose weight is missing."""
    owners = {}
    for name in checkpoint.tensors:
        module, _, suffix = name.rpartition(".")
        if suffix not in _SCALES_OF_WEIGHTS:
            continue
        weight = f"{module}.weight"
        if weight not in checkpoint.tensors:
            raise UserError(
                f"{name} is a scale of {weight}, which is missing.", where=str(checkpoint.path), remedy=_AGAIN
            )
        if module not in formats:
            dtype = checkpoint.tensors[weight].dtype
            what = f"{name} is a scale, but {weight} is {dtype}, which has none."
            raise UserError(what, where=str(checkpoint.path), remedy=_AGAIN)
        owners[name] = weight
    return owners


def _check_scale(checkpoint: Checkpoint, fmt: TensorFormat, parts: Mapping[str, str]) -> None:
    """UserError where the scale of FP8 codes has another shape than their format gives."""
    weight = checkpoint.tensors[parts["weight"]]
    scale = next(checkpoint.tensors[part] for suffix, part in parts.items() if suffix.startswith("weight_scale"))
    rows, columns = weight.shape
    if fmt.weight_block is not None:
        allowed: list[tuple[int, ...]] = [(-(-rows // fmt.weight_block[0]), -(-columns // fmt.weight_block[1]))]
    elif fmt.name == "fp8" and fmt.group == 0:
        allowed = [(1,), (), (1, 1)]
    else:
        allowed = [(rows, 1), (rows,)]
    if scale.shape not in allowed:
        what = f"{scale.name} has shape {list(scale.shape)}, a weight {list(weight.shape)} in {fmt.label()} has "
        raise UserError(f"{what}{list(allowed[0])}.", where=str(checkpoint.path), remedy=_AGAIN)


def _stacked(config: Mapping[str, Any]) -> Stacked | None:
    kinds = [given.get("model_type") for given in language_configs(config)]
    return next((STACKED[kind] for kind in reversed(kinds) if isinstance(kind, str) and kind in STACKED), None)


def _experts_of(
    checkpoint: Checkpoint, tensor: TensorInfo, layout: Stacked, wide: str
) -> list[tuple[TensorInfo, Source]]:
    """The weights (and biases) of single experts in a tensor that has all of a layer's; nothing for other tensors."""
    packed = tensor.name.endswith(MXFP4_BLOCKS)
    bare = tensor.name.removesuffix(MXFP4_BLOCKS)
    for (suffix, kind), (names, bias) in layout.suffixes().items():
        if not bare.endswith(f".{suffix}") or (packed and bias):
            continue
        parent = bare.removesuffix(f".{suffix}")
        shape = tensor.shape
        parts = {"weight": tensor.name}
        if packed:
            scales = f"{bare}{MXFP4_SCALES}"
            if scales not in checkpoint.tensors or len(shape) != 4 or checkpoint.tensors[scales].shape != shape[:3]:
                what = f"{tensor.name} {list(shape)} has no {scales} {list(shape[:3])}."
                raise UserError(what, where=str(checkpoint.path), remedy=_AGAIN)
            parts = {"blocks": tensor.name, "scales": scales}
            shape = (shape[0], shape[1], shape[2] * shape[3] * 2)
        if len(shape) != (2 if bias else 3):
            return []
        if tensor.dtype in _EIGHT_BIT_FLOATS:
            raise _misplaced(checkpoint, tensor)
        transposed = layout.transposed and not packed and not bias
        experts, outputs = shape[0], shape[2] if transposed else shape[1]
        _check_stack(checkpoint, tensor, shape, experts, outputs % len(names))
        inputs = () if bias else (shape[1] if transposed else shape[2],)
        fmt = TensorFormat("mxfp4", inputs="none") if packed else None
        found = []
        for expert in range(experts):
            for number, leaf in enumerate(names):
                rows = _rows(outputs, number, len(names), interleaved=layout.interleaved)
                name = f"{parent}.{layout.expert.format(expert)}.{leaf}.{kind}"
                count = len(range(*rows))
                dtype = wide if packed else tensor.dtype
                slot = Slot(expert, experts * outputs, *rows, transposed)
                found.append((TensorInfo(name, dtype, (count, *inputs)), Source(parts, fmt, slot)))
        twice = next((info.name for info, _ in found if info.name in checkpoint.tensors), None)
        if twice is not None:
            what = f"{twice} is also in {tensor.name}."
            raise UserError(what, where=str(checkpoint.path), remedy="Remove one of them.")
        return found
    return []


def _check_stack(checkpoint: Checkpoint, tensor: TensorInfo, shape: tuple[int, ...], experts: int, left: int) -> None:
    """UserError for a tensor of all experts that holds none, or `left` rows that its projections cannot share."""
    if 0 in shape or experts > MAX_EXPERTS:
        what = f"{tensor.name} {list(tensor.shape)} holds no experts, or more than any model has."
        raise UserError(what, where=str(checkpoint.path), remedy=_AGAIN)
    if left:
        what = f"{tensor.name} {list(tensor.shape)} holds rows of an expert that gate and up cannot share."
        raise UserError(what, where=str(checkpoint.path), remedy=_AGAIN)


def _rows(outputs: int, number: int, of: int, *, interleaved: bool) -> tuple[int, int, int]:
    """Start, stop and step of the outputs of one of several projections that stand in one tensor."""
    if interleaved and of > 1:
        return number, outputs, of
    size = outputs // of
    return number * size, (number + 1) * size, 1
