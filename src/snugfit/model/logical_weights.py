"""A checkpoint's tensors as recipes see them: 2-D weights in 16 bits, however the file stores them. No torch.

A weight may be stored as codes beside scales (FP8, MXFP4), or as one expert's part of a 3-D tensor. This module maps
names and shapes; `model/assemble.py` reads the values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from snugfit.dialects.dialect import Dialect
from snugfit.dialects.headers import by_module, holds_codes
from snugfit.engines.mixtures import EXPERT_WIDTHS, STACKED, STACKED_BY_NAME, UNSUPPORTED_FAMILIES, Stacked
from snugfit.errors import UserError
from snugfit.formats.spec import MXFP4_BLOCK, NVFP4_BLOCK, TensorFormat
from snugfit.model.config_defaults import EXPERT_COUNTS
from snugfit.model.language_config import language_config, with_defaults
from snugfit.storage.checkpoint import Checkpoint
from snugfit.storage.safetensors_header import TensorInfo

# what may stand for 16-bit weights
SOURCE_FORMATS = frozenset({"fp8", "fp8-dynamic", "fp8-block", "nvfp4", "nvfp4a16", "mxfp4", "int4", "int8"})
# quantization methods of files whose codes are read; "mxfp4" has those of stacked experts alone
START_METHODS = frozenset({"", "fp8", "mxfp4", "compressed-tensors", "modelopt"})
MAX_EXPERTS = 100_000
_FLOATS = frozenset({"BF16", "F16", "F32"})
_EIGHT_BIT_FLOATS = frozenset({"F8_E4M3", "F8_E5M2", "F8_E8M0"})
_INTEGERS = frozenset({"U8", "I8", "I32"})
MXFP4_BLOCKS, MXFP4_SCALES = "_blocks", "_scales"
_CODES = ("weight", "weight_packed")
_SCALES_OF_WEIGHTS = (
    *("weight_scale_inv", "weight_scale", "weight_scale_2", "weight_global_scale", "weight_zero_point"),
    *("weight_shape", "input_scale", "input_global_scale", "input_zero_point", "activation_scale"),
)
_GLOBAL = frozenset({"weight_scale_2", "weight_global_scale", "input_global_scale", "input_zero_point"})
_ORDER = "weight_g_idx"
_SCALE_DTYPES = {"nvfp4": {"F8_E4M3"}, "nvfp4a16": {"F8_E4M3"}, "mxfp4": {"U8"}, "int4": _FLOATS, "int8": _FLOATS}
_AGAIN = "Config and weights do not belong together: download the checkpoint again."


@dataclass(frozen=True, slots=True)
class ExpertSlice:
    """One expert's part of a 3-D tensor [experts, outputs, inputs] (`transposed`: [experts, inputs, outputs]).

    Its outputs are those from `start` to `stop` in steps of `step`; `total` is the number of outputs of all experts.
    """

    expert: int
    total: int
    start: int
    stop: int
    step: int
    transposed: bool


@dataclass(frozen=True, slots=True)
class Origin:
    """Which tensors of the file (suffix -> name) a logical weight is made of.

    `format` is what they store, None for plain numbers; `part` is the expert's part of them where they are 3-D.
    """

    parts: Mapping[str, str]
    format: TensorFormat | None = None
    part: ExpertSlice | None = None


@dataclass(frozen=True, kw_only=True)
class LogicalWeights:
    """A checkpoint's tensors as recipes see them: 2-D weights in 16 bits, one name each, in the order of the file.

    `origins` has the weights that are no tensor of the file as it is. `stacked` maps a tensor that holds all experts
    of a layer to the logical weights in it, `stacked_headers` to its header.
    """

    checkpoint: Checkpoint
    dialect: Dialect
    tensors: Mapping[str, TensorInfo]
    origins: Mapping[str, Origin] = field(default_factory=dict)
    stacked: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    stacked_headers: Mapping[str, TensorInfo] = field(default_factory=dict)

    @property
    def formats(self) -> dict[str, TensorFormat]:
        """Format of each logical weight that the file stores as codes."""
        return {name: origin.format for name, origin in self.origins.items() if origin.format is not None}

    def parts(self, name: str) -> tuple[str, ...]:
        """Names of the file's tensors behind the logical weight `name`."""
        origin = self.origins.get(name)
        return (name,) if origin is None else tuple(origin.parts.values())

    def file_bytes(self, name: str) -> int:
        """Bytes of the file that the logical weight `name` is made of."""
        origin = self.origins.get(name)
        total = sum(self.checkpoint.tensors[part].bytes for part in self.parts(name))
        if origin is None or origin.part is None:
            return total
        return total * len(range(origin.part.start, origin.part.stop, origin.part.step)) // origin.part.total

    def restack_unquantized(self, quantized: Callable[[str], bool]) -> LogicalWeights:
        """The same, but a tensor of all experts stays whole if none of its layer's expert weights is `quantized`."""
        split = {parent(name) for names in self.stacked.values() for name in names if quantized(name)}
        stacked = {s: names for s, names in self.stacked.items() if any(parent(name) in split for name in names)}
        if len(stacked) == len(self.stacked):
            return self
        first_of = {names[0]: stack for stack, names in self.stacked.items() if stack not in stacked}
        gone = {name for stack, names in self.stacked.items() if stack not in stacked for name in names}
        tensors: dict[str, TensorInfo] = {}
        for name, info in self.tensors.items():
            if name in first_of:
                header = self.stacked_headers[first_of[name]]
                tensors[header.name] = header
            elif name not in gone:
                tensors[name] = info
        origins = {name: origin for name, origin in self.origins.items() if name not in gone}
        return replace(self, tensors=tensors, origins=origins, stacked=stacked)


def logical_weights(checkpoint: Checkpoint, dialect: Dialect, method: str) -> LogicalWeights:
    """The logical weights of a checkpoint, from its headers; `method` is what config.json calls its quantization.

    Raises UserError for codes that no recipe can start from, and for scales without weights.
    """
    formats = _source_formats(checkpoint, dialect, method)
    wide = _wide_dtype(checkpoint.config)
    scales = _scale_owners(checkpoint, formats)
    stacked = stacked_weights(checkpoint, dialect)
    tensors: dict[str, TensorInfo] = {}
    origins = dict(stacked.origins)
    for name, tensor in checkpoint.tensors.items():
        if name in scales:
            continue
        module, _, parameter = name.rpartition(".")
        fmt = formats.get(module) if parameter in _CODES else None
        if fmt is not None and len(tensor.shape) == 2:
            weight = f"{module}.weight"
            parts = dialect.part_names(module, fmt, checkpoint.tensors)
            if name != next(iter(parts.values())):
                what, remedy = f"{module} has both {' and '.join(_CODES)}.", "Remove one of the two tensors."
                raise UserError(what, code="tensor-duplicate", where=str(checkpoint.path), remedy=remedy)
            tensors[weight] = TensorInfo(weight, wide, weight_shape(checkpoint, fmt, parts))
            origins[weight] = Origin(parts, fmt)
        elif name in stacked.stacked:
            tensors |= {single: stacked.tensors[single] for single in stacked.stacked[name]}
        elif tensor.dtype in _EIGHT_BIT_FLOATS or (tensor.dtype in _INTEGERS and _holds_experts(tensor)):
            raise _misplaced(checkpoint, tensor)
        elif (
            not name.endswith(MXFP4_SCALES) or f"{name.removesuffix(MXFP4_SCALES)}{MXFP4_BLOCKS}" not in stacked.stacked
        ):
            tensors[name] = TensorInfo(name, tensor.dtype, tensor.shape)
    return replace(stacked, tensors=tensors, origins=origins)


def plain_weights(checkpoint: Checkpoint, dialect: Dialect) -> LogicalWeights:
    """The tensors of the file as they are, for a checkpoint that no recipe can start from."""
    tensors = {name: TensorInfo(name, tensor.dtype, tensor.shape) for name, tensor in checkpoint.tensors.items()}
    return LogicalWeights(checkpoint=checkpoint, dialect=dialect, tensors=tensors)


def stacked_weights(checkpoint: Checkpoint, dialect: Dialect) -> LogicalWeights:
    """The experts' weights in the tensors that hold all experts of a layer, and nothing else."""
    row, wide = _stacked(checkpoint.config), _wide_dtype(checkpoint.config)
    sizes = ExpertSizes.read(checkpoint.config)
    supported = UNSUPPORTED_FAMILIES.keys().isdisjoint(model_types(checkpoint.config))
    layouts = (row,) if row is not None else STACKED_BY_NAME if supported else ()
    found = {
        name: single
        for name, tensor in checkpoint.tensors.items()
        if (layout := _layout_of(checkpoint, tensor, layouts, sizes) or row) is not None
        and (single := _experts_of(checkpoint, tensor, layout, wide))
    }
    pairs = [pair for single in found.values() for pair in single]
    return LogicalWeights(
        checkpoint=checkpoint,
        dialect=dialect,
        tensors={info.name: info for info, _ in pairs},
        origins={info.name: origin for info, origin in pairs},
        stacked={name: tuple(info.name for info, _ in single) for name, single in found.items()},
        stacked_headers={
            name: TensorInfo(name, t.dtype, t.shape) for name in found for t in (checkpoint.tensors[name],)
        },
    )


def _misplaced(checkpoint: Checkpoint, tensor: TensorInfo) -> UserError:
    return UserError(
        f"{tensor.name} is {tensor.dtype}, but only 2-D weights may be stored quantized.",
        code="dtype-unsupported",
        where=str(checkpoint.path),
        remedy="Start from the original BF16, FP16 or FP32 checkpoint.",
    )


def _holds_experts(tensor: TensorInfo) -> bool:
    """Whether a tensor holds codes of all experts of a layer, in a way that nothing here reads."""
    stacked = len(tensor.shape) > 2 and "experts" in tensor.name.split(".")
    return stacked and not tensor.name.endswith((MXFP4_BLOCKS, MXFP4_SCALES))


def parent(name: str) -> str:
    """The module that holds the experts of which `name`, ...experts.N.gate_proj.weight, is one's."""
    return name.rpartition(".experts.")[0]


def language_configs(config: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    """A config, and its part on the language model where that is nested."""
    yield config
    language = language_config(config)
    if language is not config:
        yield language


def model_types(config: Mapping[str, Any]) -> list[str]:
    """The model_type of a config, and that of its language model."""
    return list(dict.fromkeys(str(given.get("model_type")) for given in language_configs(config)))


def _wide_dtype(config: Mapping[str, Any]) -> str:
    """The 16-bit dtype that quantized weights count as."""
    names = (given.get(key) for given in language_configs(config) for key in ("dtype", "torch_dtype"))
    return next(("F16" for name in names if name in ("float16", "half")), "BF16")


def _source_formats(checkpoint: Checkpoint, dialect: Dialect, method: str) -> dict[str, TensorFormat]:
    """Format of each module that the file stores as codes; UserError where no recipe can start from them."""
    headers = {name: (tensor.dtype, tensor.shape) for name, tensor in checkpoint.tensors.items()}
    parts_of = by_module(headers)
    modules = [module for module, parts in parts_of.items() if holds_codes(parts)]
    method = "modelopt" if method.startswith("modelopt") else method
    if not modules and method in START_METHODS:
        _check_blocks(checkpoint)
        return {}
    evidence = f"quant_method {method!r} in config.json"
    if not method:
        suffix = next(s for s in ("weight_packed", "qweight", "weight") if f"{modules[0]}.{s}" in headers)
        evidence = f"tensor {modules[0]}.{suffix}"
    if method not in START_METHODS - {"", "mxfp4"}:
        raise already_quantized(evidence, where=str(checkpoint.path))
    formats = dialect.read_formats(modules, headers)
    other = next((fmt for fmt in formats.values() if fmt.name not in SOURCE_FORMATS), None)
    if other is not None:
        raise already_quantized(f"{evidence}: {other.label()}", where=str(checkpoint.path))
    ordered = next((module for module in formats if _ORDER in parts_of[module]), None)
    if ordered is not None:
        what = f"{evidence}: {ordered}.{_ORDER} gives its groups an order of their own"
        raise already_quantized(what, where=str(checkpoint.path))
    return formats


def already_quantized(evidence: str, *, where: str) -> UserError:
    """The error for a checkpoint whose codes cannot be started from."""
    return UserError(
        f"already quantized ({evidence}).",
        code="already-quantized",
        where=where,
        remedy="Start from the original BF16, FP16 or FP32 checkpoint, or from one in a format that `quantize` reads.",
    )


def _check_blocks(checkpoint: Checkpoint) -> None:
    """UserError for MXFP4 codes in an order that is not known."""
    if _stacked(checkpoint.config) is None and any(name.endswith(MXFP4_BLOCKS) for name in checkpoint.tensors):
        what = f"the layout of MXFP4 experts of model_type {checkpoint.config.get('model_type')!r} is unknown."
        remedy = "The family needs a row in engines/mixtures.py."
        raise UserError(what, code="already-quantized", where=str(checkpoint.path), remedy=remedy)


def _scale_owners(checkpoint: Checkpoint, formats: Mapping[str, TensorFormat]) -> dict[str, str]:
    """Tensors that belong to the codes of weights -> the weight; UserError for a scale whose weight is missing."""
    owners = {}
    for name in checkpoint.tensors:
        module, _, suffix = name.rpartition(".")
        if suffix not in _SCALES_OF_WEIGHTS:
            continue
        weight = next((n for s in _CODES if (n := f"{module}.{s}") in checkpoint.tensors), f"{module}.weight")
        if weight not in checkpoint.tensors:
            what = f"{name} is a scale of {weight}, which is missing."
            raise UserError(what, code="weights-missing", where=str(checkpoint.path), remedy=_AGAIN)
        if module not in formats:
            dtype = checkpoint.tensors[weight].dtype
            what = f"{name} is a scale, but {weight} is {dtype} and needs none."
            raise UserError(what, code="scale-invalid", where=str(checkpoint.path), remedy=_AGAIN)
        owners[name] = weight
    return owners


def weight_shape(checkpoint: Checkpoint, fmt: TensorFormat, parts: Mapping[str, str]) -> tuple[int, int]:
    """The shape of the weight that these tensors hold; UserError where a scale does not fit the codes."""
    codes, *others = (checkpoint.tensors[part] for part in parts.values())
    scale = next(tensor for tensor in others if tensor.name.rpartition(".")[2].startswith("weight_scale"))
    per_element = fmt.spec.codes[codes.dtype]
    rows, columns = codes.shape[0], codes.shape[1] * per_element
    if per_element > 1 and len(scale.shape) == 2 and fmt.group_size > 0:  # the last element may hold fewer
        grouped = scale.shape[1] * fmt.group_size
        columns = grouped if -(-grouped // per_element) == codes.shape[1] else columns
    allowed = _scale_shapes(fmt, rows, columns)
    dtypes = _SCALE_DTYPES.get(fmt.name, _FLOATS | {"F8_E8M0", "U8"})
    if scale.shape not in allowed or scale.dtype not in dtypes:
        what = (
            f"{scale.name} is {scale.dtype} {list(scale.shape)}, but a weight {[rows, columns]} in {fmt.label()} needs "
        )
        raise UserError(f"{what}{list(allowed[0])}.", code="scale-invalid", where=str(checkpoint.path), remedy=_AGAIN)
    _check_small_parts(checkpoint, parts, (-(-rows // per_element), *scale.shape[1:]), scale.shape)
    return rows, columns


def _check_small_parts(checkpoint: Checkpoint, parts: Mapping[str, str], *zero_points: tuple[int, ...]) -> None:
    """UserError for a global scale, a stated shape or zero points of another shape than codes and scales have."""
    for suffix, name in parts.items():
        shape = checkpoint.tensors[name].shape
        fits = suffix not in _GLOBAL or checkpoint.tensors[name].elements == 1
        fits = fits and (suffix != "weight_shape" or shape == (2,))
        if not fits or (suffix == "weight_zero_point" and shape not in zero_points):
            what = f"{name} has shape {list(shape)}, which does not fit the codes beside it."
            raise UserError(what, code="scale-invalid", where=str(checkpoint.path), remedy=_AGAIN)


def _scale_shapes(fmt: TensorFormat, rows: int, columns: int) -> list[tuple[int, ...]]:
    """The shapes that the scales of a weight of this shape and format may have, the usual one first."""
    if fmt.weight_block is not None:
        blocks = -(-rows // fmt.weight_block[0]), -(-columns // fmt.weight_block[1])
        return [blocks, (blocks[0], 1, blocks[1], 1)]  # the latter is ModelOpt's
    size = {"nvfp4": NVFP4_BLOCK, "nvfp4a16": NVFP4_BLOCK, "mxfp4": MXFP4_BLOCK}.get(fmt.name, fmt.group_size)
    if size > 0:
        return [(rows, columns // size)] if columns % size == 0 else [(rows, -(-columns // size))]
    if size == 0 and fmt.name != "fp8-dynamic":
        return [(1,), (), (1, 1)]
    return [(rows, 1), (rows,)]


def _stacked(config: Mapping[str, Any]) -> Stacked | None:
    return next((STACKED[kind] for kind in reversed(model_types(config)) if kind in STACKED), None)


@dataclass(frozen=True)
class ExpertSizes:
    """What config.json states of experts: the hidden size (0 if unknown), widths of one expert, and their number."""

    hidden: int
    widths: frozenset[int]
    counts: frozenset[int]

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> ExpertSizes:
        """The sizes that a config states; a key without a possible value counts as absent."""
        try:
            text: Mapping[str, Any] = with_defaults(config)
        except UserError:  # a blocker of its own
            text = {}
        hidden = _numbers(text.get("hidden_size"))
        widths = frozenset(number for key in EXPERT_WIDTHS for number in _numbers(text.get(key)))
        counts = frozenset(number for key in EXPERT_COUNTS for number in _numbers(text.get(key)))
        return cls(next(iter(hidden), 0), widths, counts)

    def is_transposed(self, gate_up: tuple[int, ...], down: tuple[int, ...]) -> bool | None:
        """Whether stacks of these shapes are [experts, inputs, outputs]; None where they do not fit the sizes.

        At most one order fits: with both, an expert would be as wide as the hidden size and half as wide.
        """
        if len(gate_up) != 3 or len(down) != 3 or gate_up[0] != down[0] or gate_up[0] not in self.counts:
            return None
        for width in self.widths:
            if gate_up[1:] == (2 * width, self.hidden) and down[1:] == (self.hidden, width):
                return False
            if gate_up[1:] == (self.hidden, 2 * width) and down[1:] == (width, self.hidden):
                return True
        return None


def _numbers(value: object) -> tuple[int, ...]:
    """The whole numbers above 0 that a key of a config holds, alone or in a list."""
    given = value if isinstance(value, list) else [value]
    return tuple(number for number in given if isinstance(number, int) and not isinstance(number, bool) and number > 0)


def _layout_of(
    checkpoint: Checkpoint, tensor: TensorInfo, layouts: Sequence[Stacked], sizes: ExpertSizes
) -> Stacked | None:
    """Which of `layouts` a tensor of all experts has, by its name and shapes that fit config.json; None if none fits.

    The shapes decide on the order of the axes: transformers 5 saves some families in another order than their releases
    have.
    """
    for layout in layouts:
        ending = next((e for e in (layout.gate_up, layout.down) if tensor.name.endswith(f".{e}")), None)
        if ending is None or layout.biased:
            continue
        stem = tensor.name.removesuffix(ending)
        pair = [checkpoint.tensors.get(f"{stem}{name}") for name in (layout.gate_up, layout.down)]
        biased = any(f"{stem}{name}_bias" in checkpoint.tensors for name in (layout.gate_up, layout.down))
        whole = [info.shape for info in pair if info is not None and info.dtype in _FLOATS]
        transposed = sizes.is_transposed(*whole) if len(whole) == 2 and not biased else None
        if transposed is not None:
            return replace(layout, transposed=transposed)
    return None


def _experts_of(
    checkpoint: Checkpoint, tensor: TensorInfo, layout: Stacked, wide: str
) -> list[tuple[TensorInfo, Origin]]:
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
                raise UserError(what, code="weights-missing", where=str(checkpoint.path), remedy=_AGAIN)
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
                part = ExpertSlice(expert, experts * outputs, *rows, transposed)
                found.append((TensorInfo(name, dtype, (count, *inputs)), Origin(parts, fmt, part)))
        twice = next((info.name for info, _ in found if info.name in checkpoint.tensors), None)
        if twice is not None:
            what = f"{twice} is also in {tensor.name}."
            raise UserError(
                what, code="tensor-duplicate", where=str(checkpoint.path), remedy="Remove one of the two tensors."
            )
        return found
    return []


def _check_stack(checkpoint: Checkpoint, tensor: TensorInfo, shape: tuple[int, ...], experts: int, left: int) -> None:
    """UserError for a tensor of all experts that holds none, or `left` rows that its projections cannot share."""
    if 0 in shape or experts > MAX_EXPERTS:
        what = f"{tensor.name} {list(tensor.shape)} holds no experts, or more than any model has."
        raise UserError(what, code="config-mismatch", where=str(checkpoint.path), remedy=_AGAIN)
    if left:
        what = f"{tensor.name} {list(tensor.shape)}: gate and up cannot share its out_features evenly."
        raise UserError(what, code="config-mismatch", where=str(checkpoint.path), remedy=_AGAIN)


def _rows(outputs: int, number: int, of: int, *, interleaved: bool) -> tuple[int, int, int]:
    """Start, stop and step of the outputs of one of several projections that stand in one tensor."""
    if interleaved and of > 1:
        return number, outputs, of
    size = outputs // of
    return number * size, (number + 1) * size, 1
