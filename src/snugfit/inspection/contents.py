"""What is in a checkpoint, weight by weight: which part of the model it is, its real shape, what it is stored in."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from snugfit.dialects.packed import Packed, is_cache_scale, serves
from snugfit.dialects.targets import common_name
from snugfit.formats.spec import TensorFormat
from snugfit.model.anatomy import is_prediction_head, is_tower, split_at_number
from snugfit.model.layout import ModelLayout
from snugfit.model.names import TensorName, parse_name
from snugfit.storage.safetensors_header import StoredTensor

# parts of a model, in the order of tables
PARTS = (
    *("attention", "linear attention", "mlp", "experts", "shared experts", "router", "layers' other"),
    *(
        "embed",
        "lm_head",
        "norms",
        "vectors",
        "layers without text",
        "multi-token prediction",
        "towers",
        "other",
        "KV cache scales",
    ),
)
_MIXERS = frozenset(
    {"linear_attn", "mamba", "mixer", "ssm", "mamba2", "recurrent", "temporal_block", "conv", "short_conv", "rglru"}
)
_MLP = frozenset({"gate", "up", "gate_up", "down", "mlp"})


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight (or a vector) of the model: `name` is its module's, `shape` that of the weight were it not packed.

    `bytes` and `tensors` count its scales too; `stored` is a format's label, or a dtype such as bf16. `single` is the
    shape of one expert's matrix in a tensor of all experts that can be split, () for other weights.
    """

    name: str
    leaf: str
    part: str
    layer: int | None
    expert: int | None
    shape: tuple[int, ...]
    bytes: int
    tensors: int
    stored: str
    single: tuple[int, ...] = ()

    @property
    def elements(self) -> int:
        """Parameters of the model."""
        return 0 if self.part == "KV cache scales" else math.prod(self.shape)


@dataclass(frozen=True)
class Contents:
    """All weights of a checkpoint, with the layout that they were read from."""

    layout: ModelLayout
    weights: tuple[Weight, ...]


def read_contents(layout: ModelLayout) -> Contents:
    """Every tensor of a checkpoint as a weight, or counted with the weight that it serves."""
    anatomy = _Anatomy(layout.decoder, layout.num_layers, layout.skipped_layers, _single_shapes(layout))
    formats, packed = layout.formats, layout.packed
    weights = [
        weight
        for module, tensors in layout.modules.items()
        for weight in _weights(module, tensors, packed[module], formats.get(module), anatomy)
    ]
    return Contents(layout, tuple(weights))


@dataclass(frozen=True)
class _Anatomy:
    decoder: str
    layers: int
    skipped: frozenset[int]
    singles: Mapping[str, tuple[int, ...]]


def _single_shapes(layout: ModelLayout) -> dict[str, tuple[int, ...]]:
    """Tensors of all experts of a layer that can be split -> the shape of one matrix in them."""
    shapes = {stack: layout.weights.tensors[names[0]].shape for stack, names in layout.weights.stacked.items()}
    return {stack: shape for stack, shape in shapes.items() if len(shape) == 2}


def _weights(
    module: str,
    tensors: Mapping[str, StoredTensor],
    packed: list[Packed],
    fmt: TensorFormat | None,
    anatomy: _Anatomy,
) -> Iterable[Weight]:
    """The weights of one module, the tensors that serve them counted with the first whose name they continue."""
    heads = {p.tensor for p in packed}
    cache = [s for s in tensors if s not in heads and is_cache_scale(module, s)]
    plain = [s for s in tensors if s not in heads and not serves(s) and s not in cache]
    serving = [s for s in tensors if s not in heads and s not in plain and s not in cache]
    for p in packed:
        mine = [s for s in serving if len(packed) == 1 or s.startswith(f"{p.parameter}_")]
        members = [tensors[p.tensor], *(tensors[s] for s in mine)]
        # bitsandbytes and others flatten their codes
        shape = (2, 2) if p.label and len(p.shape) == 1 else p.shape
        parsed = parse_name(f"{module}.{p.parameter}", shape, anatomy.decoder)
        whole = p.parameter == "weight"
        name = module if whole else f"{module}.{p.parameter}"
        label = fmt.label() if fmt is not None and whole else p.label or tensors[p.tensor].dtype.lower()
        single = anatomy.singles.get(tensors[p.tensor].name, ())
        part = _part(parsed, shape, anatomy)
        part = "experts" if single and part == "layers' other" else part
        size = sum(t.bytes for t in members)
        yield Weight(
            *(name, name.rpartition(".")[2], part, parsed.layer, parsed.expert, p.shape, size, len(members), label),
            single,
        )
    if not packed:
        plain += serving
    for suffix in (*plain, *cache):
        tensor = tensors[suffix]
        parsed = parse_name(tensor.name, tensor.shape, anatomy.decoder)
        part = "KV cache scales" if suffix in cache else _part(parsed, tensor.shape, anatomy)
        yield Weight(
            *(tensor.name, suffix, part, parsed.layer, parsed.expert, tensor.shape, tensor.bytes, 1),
            tensor.dtype.lower(),
        )


def _part(parsed: TensorName, shape: tuple[int, ...], anatomy: _Anatomy) -> str:
    if parsed.layer is None:
        return _part_outside(parsed, shape)
    if parsed.layer >= anatomy.layers:
        return "multi-token prediction"
    if parsed.layer in anatomy.skipped:
        return "layers without text"
    path = parsed.module.split(".")
    flat = len(shape) < 2 or (len(shape) == 2 and 1 in shape) or parsed.parameter.endswith("bias")
    mixes = parsed.role in ("q", "k", "v", "o", "qkv")
    choices = (
        ("norms", parsed.role == "norm"),
        ("router", parsed.role == "router" and len(shape) > 1),
        ("vectors", flat),
        ("shared experts", any(part.startswith("shared_expert") or part == "shared_mlp" for part in path)),
        ("experts", "experts" in path),
        ("linear attention", not mixes and parsed.role not in _MLP and not _MIXERS.isdisjoint(path)),
        ("attention", mixes or parsed.role == "attention"),
        ("mlp", parsed.role in _MLP),
    )
    return next((part for part, holds in choices if holds), "layers' other")


def _part_outside(parsed: TensorName, shape: tuple[int, ...]) -> str:
    if is_prediction_head(parsed.full):
        return "multi-token prediction"
    if is_tower(parsed.full):
        return "towers"
    if parsed.role in ("embed", "lm_head"):
        return parsed.role
    leaf = parsed.module.rpartition(".")[2]
    if parsed.role == "norm" or leaf in ("ln_f", "norm_f"):
        return "norms"
    return "vectors" if len(shape) < 2 or parsed.parameter.endswith("bias") else "other"


def describe_layer(weights: Iterable[Weight], kind: str) -> str:
    """What a layer with these weights is made of, in words; `kind` is what config.json calls it ("" for nothing)."""
    members: dict[str, list[Weight]] = {}
    for weight in weights:
        members.setdefault(weight.part, []).append(weight)
    words = [f"{kind.removesuffix('_attention')} attention" if kind.endswith("_attention") else kind] if kind else []
    attends = [part for part in ("attention", "linear attention") if part in members]
    if attends and not any("attention" in word for word in words):
        latent = any(w.leaf == "kv_b_proj" for w in members.get("attention", ()))
        words += ["latent attention (MLA)" if part == "attention" and latent else part for part in attends]
    words += ["dense MLP"] if "mlp" in members else []
    if "experts" in members:
        numbers = {w.expert for w in members["experts"]}
        count = len(numbers) if None not in numbers else max(w.shape[0] for w in members["experts"])
        words.append(f"{count} experts")
    words += ["not run on text"] if "layers without text" in members else []
    words += ["shared experts"] if "shared experts" in members else []
    return " + ".join(words) or ("nothing" if not members else "other weights")


def names_without_tensors(layout: ModelLayout, contents: Contents | None = None) -> list[str]:
    """Modules that the quantization config leaves out by name, and that no tensor belongs to.

    `contents` are read where they are not given and names of modules alone do not decide.
    """
    lists = [layout.quantization.get(key) for key in ("ignore", "modules_to_not_convert", "exclude_modules")]
    names = [str(entry) for given in lists if isinstance(given, list) for entry in given]
    names = [name for name in names if not (name.startswith("re:") or any(mark in name for mark in "*?["))]
    names = _not_modules(layout, names)
    if not names:
        return []
    contents = contents or read_contents(layout)
    known: set[str] = {"lm_head"}  # a tied one has no tensor
    tails: set[str] = set()  # of modules in towers, whose prefixes differ between files and transformers' modules
    for weight in contents.weights:
        for name in dict.fromkeys((weight.name, common_name(weight.name))):
            parts = name.split(".")
            known.update(parts)
            known.update(".".join(parts[:end]) for end in range(1, len(parts) + 1))
        tails.update(_tail(weight.name))
    unknown = [name for name in names if name not in known and common_name(name) not in known]
    return [n for n in unknown if tails.isdisjoint(_tail(n)) and not any(n in w.name for w in contents.weights)]


def _not_modules(layout: ModelLayout, names: Sequence[str]) -> list[str]:
    """The names that are no module, no part of a module's name, and no parameter but weights."""
    modules = sorted(layout.modules)
    suffixes = {suffix for tensors in layout.modules.values() for suffix in tensors}
    parts = {part for module in modules for part in module.split(".")} | {"lm_head"}
    parts |= {suffix for suffix in suffixes if "weight" not in suffix and not serves(suffix)}

    def is_known(name: str) -> bool:
        above = bisect_left(modules, f"{name}.")
        holds = above < len(modules) and modules[above].startswith(f"{name}.")
        return holds or name in parts or name in layout.modules

    return [name for name in names if not is_known(name)]


def _tail(name: str) -> tuple[str, ...]:
    """What follows the first number in the name of a tower's module; nothing for other modules."""
    _, number, rest = split_at_number(name)
    return (f"{number}.{rest}",) if number is not None and is_tower(name) else ()
