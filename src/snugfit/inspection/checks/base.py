"""A checkpoint against the model that it was made of: kept tensors bit by bit, quantized ones within their format."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from snugfit.dialects.packed import is_cache_scale
from snugfit.engines.releases import EXPERT_NAMES
from snugfit.formats.spec import TensorFormat
from snugfit.inspection.checks.agreement import needed_suffixes
from snugfit.inspection.checks.groups import EXPERT_LEAVES, read_name
from snugfit.inspection.checks.texts import MAX_BYTES, TOKENIZERS, read_json
from snugfit.inspection.checks.values import sample_of
from snugfit.inspection.evidence import Evidence, finding
from snugfit.model.layout import ModelLayout
from snugfit.model.logical_weights import LogicalWeights, Origin, model_types
from snugfit.model.missing import is_buffer
from snugfit.progress import SILENT, Progress
from snugfit.records.doctor import Finding
from snugfit.storage.checkpoint import Checkpoint, are_equal
from snugfit.storage.files import read_file
from snugfit.storage.open import fetch_small_files
from snugfit.storage.safetensors_header import TensorInfo

if TYPE_CHECKING:
    from snugfit.model.weight_values import Distance, Slices

# |A - B| / |B| beyond which no sound weight of a format is. Round-to-nearest gives Gaussian weights 0.026 (fp8), 0.095
# (nvfp4), 0.12 (mxfp4, int4 in groups); GPTQ and searches give up to half as much again
LIMITS: Mapping[str, float] = {
    **dict.fromkeys(("fp8", "fp8-dynamic", "fp8-block", "int8"), 0.08),
    **dict.fromkeys(("nvfp4", "nvfp4a16"), 0.25),
    "mxfp4": 0.3,
    "int4": 0.35,
}
_ONE_SCALE_A_ROW = 0.6  # of integers of 4 bits
ROUNDED = 0.01  # of a weight that was dequantized to 16 bits
_GAIN = 0.05  # a whole weight that is further from the base's size has a wrong scale
_ANALYZED = 64  # weights far from the base that are looked for elsewhere in it
# keys of config.json that may differ without another model
_FREE_KEYS = frozenset(
    {
        *("dtype", "torch_dtype", "transformers_version", "use_cache", "_name_or_path", "quantization_config"),
        *("architectures", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "auto_map"),
        *("compression_config", "_attn_implementation_autoset", "num_nextn_predict_layers", "model_type"),
    }
)
_FILES = (
    *TOKENIZERS,
    *("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json"),
)


@dataclass
class Compared:
    """Relative errors of quantized weights by format, and weights by what is wrong with them.

    `kept` says what is wrong with plain tensors; those in `other_values` have the base's dtype and shape.
    """

    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    other_values: set[str] = field(default_factory=set)
    far: dict[str, Distance] = field(default_factory=dict)
    folded: list[str] = field(default_factory=list)
    count: int = 0


def limit_of(fmt: TensorFormat | None) -> float:
    """The largest relative error that a format explains."""
    if fmt is None:
        return ROUNDED
    whole = fmt.name == "int4" and fmt.group_size <= 0
    return _ONE_SCALE_A_ROW if whole else LIMITS[fmt.name]


class Pair:
    """A checkpoint's weights beside the base's, by the names that recipes see; experts by those of the base.

    `unread_layers` are the layers that hold weights in a format without a reader: these are not compared.
    """

    def __init__(self, evidence: Evidence, base: ModelLayout) -> None:
        mine, self.base = _readable(evidence), base.weights
        unread = {
            name: module.parsed.layer
            for name, module in evidence.modules.items()
            if module.stored and f"{name}.weight" not in mine.origins
        }
        renamed = _renamed_experts(evidence, (*mine.tensors, *(f"{name}.weight" for name in unread)), base)
        self.mine = _with_names(mine, renamed)
        self._of_file, self._own_names = mine, {new: old for old, new in renamed.items()}
        self.unread_layers = frozenset(unread.values())
        modules = {*unread, *(renamed.get(f"{name}.weight", "").rpartition(".")[0] for name in unread)}
        left_out = {n for n in (*self.mine.tensors, *self.base.tensors) if n.rpartition(".")[0] in modules}
        self.both = [name for name in self.mine.tensors if name in self.base.tensors and name not in left_out]
        copies = {*base.tied.copies, *evidence.layout.tied.copies, *left_out}
        self.lost = [
            n for n in self.base.tensors if n not in self.mine.tensors and n not in copies and not is_buffer(n)
        ]
        self.added = [
            name
            for name in self.mine.tensors
            if name not in self.base.tensors and name not in copies and not is_cache_scale(*name.rpartition(".")[::2])
        ]
        self.norms = frozenset(name for name, parsed in evidence.layout.names.items() if parsed.role == "norm")
        self.layers = {renamed.get(name, name): parsed.layer for name, parsed in evidence.layout.names.items()}

    def format_of(self, name: str) -> TensorFormat | None:
        """The format in which the checkpoint stores a weight, None for plain numbers."""
        origin = self.mine.origins.get(name)
        return None if origin is None else origin.format

    def are_files(self, name: str) -> bool:
        """Whether the weight is one plain tensor in both."""
        return name not in self.mine.origins and name not in self.base.origins

    def are_alike(self, name: str) -> bool:
        """Whether both have one dtype and shape."""
        one, other = self.mine.tensors[name], self.base.tensors[name]
        return (one.dtype, one.shape) == (other.dtype, other.shape)

    def values(self, name: str) -> Callable[[], Slices]:
        """Reads the checkpoint's weight."""
        return self._reader(self._of_file, self._own_names.get(name, name))

    def base_values(self, name: str) -> Callable[[], Slices]:
        """Reads the base's weight."""
        return self._reader(self.base, name)

    @staticmethod
    def _reader(weights: LogicalWeights, name: str) -> Callable[[], Slices]:
        from snugfit.model.weight_values import logical_slices

        return lambda: logical_slices(weights, name)


def _renamed_experts(evidence: Evidence, names: Iterable[str], base: ModelLayout) -> dict[str, str]:
    """Weights of experts that the base has under its family's other names -> the base's name."""
    kinds = [kind for kind in model_types(evidence.checkpoint.config) if kind in EXPERT_NAMES]
    found: dict[str, str] = {}
    for name in names:
        module, _, leaf = name.rpartition(".")
        if not kinds or ".experts." not in module or name in base.weights.tensors:
            continue
        likely = (read_name(module, kinds[-1], leaves) for leaves in EXPERT_LEAVES)
        other = next((f"{new}.{leaf}" for new in likely if f"{new}.{leaf}" in base.weights.tensors), None)
        if other is not None:
            found[name] = other
    return found


def _with_names(weights: LogicalWeights, renamed: Mapping[str, str]) -> LogicalWeights:
    """The same weights under other names."""
    stored = weights.checkpoint.tensors
    also = {new: stored[old] for old, new in renamed.items() if old in stored}
    return replace(
        weights,
        checkpoint=replace(weights.checkpoint, tensors={**stored, **also}),
        tensors={renamed.get(name, name): tensor for name, tensor in weights.tensors.items()},
        origins={renamed.get(name, name): origin for name, origin in weights.origins.items()},
    )


def _readable(evidence: Evidence) -> LogicalWeights:
    """The checkpoint's weights; where no recipe could start from the file, those whose format is known."""
    weights = evidence.layout.weights
    if weights.origins or not evidence.quantized:
        return weights
    tensors: dict[str, TensorInfo] = {}
    origins: dict[str, Origin] = {}
    for name, tensor in evidence.checkpoint.tensors.items():
        module = evidence.modules.get(name.rpartition(".")[0])
        if module is None or not module.stored:
            tensors[name] = tensor
        elif module.name in evidence.quantized and f"{module.name}.weight" not in tensors and module.asked is not None:
            suffixes = needed_suffixes(evidence.layout.dialect, module, module.asked)
            if all(suffix in module.parts for suffix in suffixes):
                logical = f"{module.name}.weight"
                tensors[logical] = TensorInfo(logical, "BF16", module.packed.shape)
                origins[logical] = Origin({suffix: f"{module.name}.{suffix}" for suffix in suffixes}, module.asked)
    return LogicalWeights(
        checkpoint=evidence.checkpoint, dialect=evidence.layout.dialect, tensors=tensors, origins=origins
    )


def compare_weights(pair: Pair, values: str, progress: Progress = SILENT) -> Compared:
    """Read every weight of both, or a sample, and say how far they are apart."""
    from snugfit.model.weight_values import distance

    found = Compared()
    names = sample_of(pair.both) if values == "sample" else pair.both
    with progress.bar(len(names), "tensors of the base") as advance:
        for name in names:
            found.count += 1
            fmt = pair.format_of(name)
            if pair.are_files(name):
                wrong = differing(pair.mine.checkpoint, pair.base.checkpoint, name)
                if wrong:
                    found.kept[name] = wrong
                    if pair.are_alike(name):
                        found.other_values.add(name)
            elif pair.mine.tensors[name].shape != pair.base.tensors[name].shape:
                mine, other = (list(side.tensors[name].shape) for side in (pair.mine, pair.base))
                found.kept[name] = f"its shape is {mine}, the base's {other}."
            else:
                limit = limit_of(fmt)
                apart = distance(pair.values(name), pair.base_values(name), within=limit)
                if fmt is not None:
                    found.errors.setdefault(fmt.label(), {})[name] = apart.plain
                if not apart.plain <= limit:
                    found.far[name] = apart
            advance()
    return found


def differing(mine: Checkpoint, base: Checkpoint, name: str) -> str:
    """How a plain tensor differs from the base's, "" where their bytes are equal."""
    one, other = mine.tensors[name], base.tensors[name]
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return f"it is {one.dtype} {list(one.shape)}, the base's {other.dtype} {list(other.shape)}."
    return "" if are_equal((mine, one), (base, other)) else "its values are not the base's."


def judged(evidence: Evidence, pair: Pair, found: Compared) -> Iterator[Finding]:
    """Findings on what was compared."""
    affected = evidence.affected()
    what = f"{pair.lost[0] if pair.lost else ''} is in the base and not in the checkpoint."
    yield from finding("base-tensor-lost", pair.lost, what, affected)
    what = f"{pair.added[0] if pair.added else ''} is not in the base."
    yield from finding("base-tensor-added", pair.added, what, affected)
    folded = _folded(pair, found)
    what = f"{folded[0] if folded else ''} is the base's with gains of its features: a method folded scales into it."
    yield from finding("base-folded", folded, what, affected)
    open_norms = [] if folded else _open_norms(pair, found)
    what = "its values are not the base's; what it feeds has no reader here, so it may have taken gains from that."
    yield from finding("base-folded", open_norms, what, affected)
    explained = {*folded, *open_norms}
    kept = {name: wrong for name, wrong in found.kept.items() if name not in explained}
    yield from finding("base-kept-differs", list(kept), next(iter(kept.values()), ""), affected)
    far = {name: apart for name, apart in found.far.items() if name not in explained}
    swapped: dict[str, str] = {}
    permuted: list[str] = []
    for name in list(far)[:_ANALYZED]:
        other = _elsewhere(pair, name, far)
        if other:
            swapped[name] = other
        elif _is_permuted(pair, name):
            permuted.append(name)
    what = next((f"{name} holds the base's {other}." for name, other in swapped.items()), "")
    yield from finding("base-swapped", list(swapped), what, affected)
    what = f"rows of {permuted[0] if permuted else ''} are the base's at other places."
    yield from finding("base-permuted", permuted, what, affected)
    left = [name for name in far if name not in swapped and name not in permuted]
    if left:
        apart, fmt = far[left[0]], pair.format_of(left[0])
        label = "16 bits" if fmt is None else fmt.label()
        what = f"{left[0]} is {apart.plain:.3g} of the base's norm away from it; {label} explains {limit_of(fmt):g}"
        scaled = apart.scaled <= limit_of(fmt) and abs(apart.gain - 1) > _GAIN
        what += f": it is {apart.gain:.4g} times the base's." if scaled else "."
        yield from finding("base-weight-far", left, what, affected)


def _open_norms(pair: Pair, found: Compared) -> list[str]:
    """Norms that differ where nobody can tell whether the weights behind them took the gains."""
    layers = pair.unread_layers
    changed = [name for name in found.kept if name in found.other_values and name in pair.norms]
    return [name for name in changed if pair.layers.get(name) in layers or (pair.layers.get(name) is None and layers)]


def _folded(pair: Pair, found: Compared) -> list[str]:
    """Weights that differ by gains of features, in layers where something else took the gains; and these norms."""
    from snugfit.model.weight_values import distance

    columns: dict[str, int | None] = {}
    rows: dict[str, int | None] = {}
    plain = [name for name in found.kept if name in found.other_values and name in pair.norms]
    far = dict(found.far)
    for name in found.kept:  # 16-bit weights that took gains
        if name in found.other_values and len(pair.mine.tensors[name].shape) == 2:
            far[name] = distance(pair.values(name), pair.base_values(name), within=0.0)
    for name, apart in far.items():
        limit = limit_of(pair.format_of(name))
        if apart.scaled <= limit and abs(apart.gain - 1) > _GAIN:
            continue  # one number for all is a wrong scale
        if apart.columns <= limit:
            columns[name] = pair.layers.get(name)
        elif apart.rows <= limit or apart.both <= limit:
            rows[name] = pair.layers.get(name)
    norms = {pair.layers.get(name) for name in plain}
    sources = {*norms, *rows.values()}
    taken = [name for name, layer in columns.items() if layer in sources or None in norms]
    layers = {columns[name] for name in taken}
    given = [name for name, layer in rows.items() if layer in layers or layer in norms]
    changed = [name for name in plain if pair.layers.get(name) in layers]
    return [*taken, *given, *changed]


def _elsewhere(pair: Pair, name: str, far: Mapping[str, Distance]) -> str:
    """The weight of the base that this one is, "" where none of the likely ones is."""
    from snugfit.model.weight_values import distance

    shape, limit = pair.base.tensors[name].shape, limit_of(pair.format_of(name))
    parent = name.removesuffix(".weight").rpartition(".")[0]
    siblings = [other for other in pair.base.tensors if other.startswith(f"{parent}.") and other != name]
    likely = [other for other in (*far, *siblings) if other != name and pair.base.tensors[other].shape == shape]
    for other in list(dict.fromkeys(likely))[:_ANALYZED]:
        if distance(pair.values(name), pair.base_values(other), within=limit).plain <= limit:
            return other
    return ""


def _is_permuted(pair: Pair, name: str) -> bool:
    from snugfit.model.weight_values import permuted_rows

    return len(pair.mine.tensors[name].shape) == 2 and permuted_rows(pair.values(name)(), pair.base_values(name)())


def summarized(found: Compared) -> tuple[tuple[str, int, float, float, str], ...]:
    """(format, weights, median error, largest error, its weight) of what was compared."""
    rows = []
    for label, errors in found.errors.items():
        worst = max(errors, key=lambda name: errors[name])
        rows.append((label, len(errors), statistics.median(errors.values()), errors[worst], worst))
    return tuple(rows)


def configs(evidence: Evidence, base: ModelLayout) -> Iterator[Finding]:
    """Keys of config.json by which the two are different models."""
    mine, other = evidence.layout.config, base.config
    keys = [key for key in mine if key in other and key not in _FREE_KEYS and not key.startswith("_")]
    differing_keys = [key for key in keys if _plain(mine[key]) != _plain(other[key])]
    places = [f"config.json: {key}" for key in differing_keys]
    what = next((f"{key} is {_shown(mine[key])}, the base's {_shown(other[key])}." for key in differing_keys), "")
    yield from finding("base-config-differs", places, what, evidence.affected())


def _plain(value: Any) -> Any:
    """Numbers as numbers, so that 10000 and 10000.0 are one."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53 else value


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)[:100]


def files(evidence: Evidence, base: ModelLayout) -> Iterator[Finding]:
    """Tokenizer files, chat template and generation config that are missing or not the base's."""
    if not evidence.small_files:
        return
    for checkpoint in (evidence.checkpoint, base.checkpoint):
        fetch_small_files(checkpoint, _FILES, limit=MAX_BYTES)
    names = [name for name in _FILES if name in base.checkpoint.other_files]
    lost = [name for name in names if name not in evidence.checkpoint.other_files]
    other = [name for name in names if name not in lost and not _same_file(evidence.checkpoint, base.checkpoint, name)]
    yield from finding("base-file-differs", lost, f"{', '.join(lost)} is in the base alone.", evidence.affected())
    what = f"{', '.join(other)} is not the base's."
    yield from finding("base-file-differs", other, what, evidence.affected())


def _same_file(mine: Checkpoint, base: Checkpoint, name: str) -> bool:
    try:
        one, other = read_file(mine.path, name), read_file(base.path, name)
    except FileNotFoundError:  # on the Hub, and too large to download
        return True
    if one == other:
        return True
    return name.endswith(".json") and bool(found := read_json(mine, name)) and found == read_json(base, name)
