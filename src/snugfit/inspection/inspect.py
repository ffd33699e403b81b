"""What is in a checkpoint, from config and headers alone: no weights are read, no torch and no transformers imported.

How large which part is, what it is stored in, what it could become and why not, which weights engines fuse, and whether
config and tensors agree.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from snugfit.engines.fused import FUSED_GROUPS
from snugfit.engines.kernels import HEAD_FORMAT
from snugfit.errors import UserError
from snugfit.formats.spec import FORMATS, INT4_GROUPS, TensorFormat, check_shape
from snugfit.inspection.contents import (
    PARTS,
    Contents,
    Weight,
    describe_layer,
    names_without_tensors,
    read_contents,
)
from snugfit.model.config_defaults import PREDICTION_KEYS
from snugfit.model.layout import NOT_CHECKED, ModelLayout, read_layout
from snugfit.model.loose import taken_note
from snugfit.model.names import role_order
from snugfit.model.positions import max_positions
from snugfit.model.support import unverified_formats
from snugfit.records.base import as_json
from snugfit.records.inspection import (
    Architecture,
    Calibrated,
    FusedGroup,
    Inspection,
    LayerRun,
    Part,
    Quantization,
)
from snugfit.records.quantize import RECORD_FILE
from snugfit.records.statistics_file import STATISTICS_FILE, load_statistics
from snugfit.report.outliers import coverage_of, outliers_of
from snugfit.storage.checkpoint import Checkpoint
from snugfit.storage.files import read_file
from snugfit.storage.other_files import is_extra_model, is_weights, notes_on_loss

# parts whose weights are listed by shape
_DETAILED = frozenset(PARTS[: PARTS.index("norms")])
_STAYS: Mapping[str, str] = {
    "router": "router",
    "embed": "embeddings",
    "norms": "no matrix",
    "vectors": "no matrix",
    "layers without text": "not run on text",
    "multi-token prediction": "not run by transformers",
    "towers": "tower",
    "other": "outside the decoder layers",
    "KV cache scales": "scales",
}
_WIDE = frozenset({"bf16", "f16", "f32"})
_HEAD = (HEAD_FORMAT,), {name: f"an output head can only be {HEAD_FORMAT}" for name in FORMATS if name != HEAD_FORMAT}
_SOURCES = ("fp8", "nvfp4", "mxfp4", "int4", "int8")
_REFUSED = "quantize refuses this model"
# blockers that are contradictions between config.json and the tensors
_CONTRADICTIONS = frozenset(
    {"config-invalid", "config-mismatch", "weights-missing", "quantization-invalid", "index-invalid"}
)


def inspect(model: str | Path) -> Inspection:
    """What is in a checkpoint: a directory, or a Hub id. Reads headers alone; UserError for damaged files."""
    layout = read_layout(model)
    checkpoint = layout.checkpoint
    contents = read_contents(layout)
    architecture = _architecture(contents)
    fused = _fused(contents)
    limits = _limits(contents)
    calibration, unread = _calibration(checkpoint)
    taken = [taken_note(layout.taken_in)] if layout.taken_in else []
    predicted = sum(w.elements for w in contents.weights if w.part == "multi-token prediction")
    total = sum(w.elements for w in contents.weights) - predicted
    return Inspection(
        model=checkpoint.name if checkpoint.remote else str(model),
        revision=checkpoint.remote.revision if checkpoint.remote else None,
        architecture=architecture,
        parameters=total,
        active_parameters=_active(contents, architecture, total),
        prediction_parameters=predicted,
        bytes=sum(tensor.bytes for tensor in checkpoint.tensors.values()),
        tensors=len(checkpoint.tensors),
        files=len(checkpoint.shards),
        parts=_parts(contents, architecture, limits),
        layers=_layer_runs(contents),
        fused=fused,
        quantization=_quantization(contents),
        problems=tuple(_problems(contents, architecture, fused)),
        other_weights=_other_weights(checkpoint.other_files),
        made_by=_made_by(checkpoint),
        calibration=calibration,
        remarks=(*limits.remarks, *unread, *taken, *notes_on_loss(checkpoint.other_files)),
    )


def _other_weights(names: Sequence[str]) -> tuple[str, ...]:
    """Files of weights that no quantized model keeps."""
    known = frozenset(names)
    indexes = ".index.json"
    weights = (name for name in names if is_weights(name) and not name.endswith(indexes))
    return tuple(name for name in weights if not is_extra_model(name, known))


@dataclass(frozen=True)
class _Limits:
    """Why `quantize` would refuse a model, whatever the recipe, and why its stacked experts; "" if it would not.

    With `refused` nothing of the model can be quantized; without, only weights that are stored quantized already.
    """

    model: str
    refused: bool
    experts: str
    remarks: tuple[str, ...]


def _limits(contents: Contents) -> _Limits:
    """What a run says of the model before it looks at a recipe."""
    layout = contents.layout
    reasons = [blocker.error for blocker in layout.blockers if blocker.error.code not in _CONTRADICTIONS]
    if layout.format_error is not None:  # reported with the quantization
        reasons = [error for error in reasons if error.code != layout.format_error.code]
    has_stacks = any(weight.single for weight in contents.weights)
    unverified = [error.what for error in unverified_formats(layout.checkpoint, ["int4"])] if has_stacks else []
    elsewhere = all(blocker.runnable for blocker in layout.blockers) and layout.format_error is None and layout.method
    refused = bool(layout.blockers) and not elsewhere
    model = _REFUSED if refused else f"{layout.method} elsewhere" if layout.blockers else ""
    remarks = [f"quantize refuses it: {what}" for what in dict.fromkeys(error.what for error in reasons)]
    remarks += unverified if layout.blockers else [*unverified, NOT_CHECKED]
    return _Limits(model, refused, "no tested engine loads them quantized" if unverified else "", tuple(remarks))


def _calibration(checkpoint: Checkpoint) -> tuple[Calibrated | None, tuple[str, ...]]:
    """What the statistics of a local checkpoint say of its calibration; if they cannot be read, the reason."""
    try:
        if checkpoint.remote or not (checkpoint.path / STATISTICS_FILE).exists():
            return None, ()
        found = load_statistics(checkpoint.path / STATISTICS_FILE)
        calibrated = Calibrated(
            model=found.model,
            sources=tuple(one.source for one in found.datasets),
            num_samples=found.num_samples,
            tokens=found.tokens,
            all_experts=found.all_experts,
            max_forced_tokens=found.max_forced_tokens,
            recipe=found.recipe,
            coverage=coverage_of(found),
            outliers=outliers_of(found),
        )
        as_json(asdict(calibrated), allow_nan=False)
    except UserError as error:
        return None, (f"{STATISTICS_FILE}: {error.what}",)
    except (ArithmeticError, OSError, TypeError, ValueError, struct.error) as error:
        return None, (f"{STATISTICS_FILE}: broken statistics ({error}).",)
    return calibrated, ()


def _architecture(contents: Contents) -> Architecture:
    layout = contents.layout
    checkpoint, config = layout.checkpoint, layout.config

    def number(*keys: str) -> int | None:
        given = (config.get(key) for key in keys)
        return next((n for n in given if isinstance(n, int) and not isinstance(n, bool)), None)

    heads, hidden = number("num_attention_heads", "n_head", "n_heads"), number("hidden_size", "n_embd", "d_model")
    rank = number("kv_lora_rank")
    given = checkpoint.config.get("architectures")
    kind = config.get("model_type") or checkpoint.config.get("model_type")
    dtype = next((c[k] for c in (config, checkpoint.config) for k in ("dtype", "torch_dtype") if c.get(k)), None)
    tied = layout.tied_embeddings
    inside = [w for w in contents.weights if w.part == "experts"]
    numbered = max((w.expert for w in inside if w.expert is not None), default=-1) + 1
    experts = numbered or next((w.shape[0] for w in inside if len(w.shape) == 3), None)
    return Architecture(
        architectures=tuple(map(str, given)) if isinstance(given, list) else (),
        model_type=None if kind is None else str(kind),
        dtype=None if dtype is None else str(dtype),
        layers=layout.num_layers,
        hidden_size=hidden,
        heads=heads,
        kv_heads=number("num_key_value_heads", "num_kv_heads", "n_head_kv") if rank is None else None,
        head_dim=number("head_dim") or (hidden // heads if hidden and heads and rank is None else None),
        latent=rank + (number("qk_rope_head_dim") or 0) if rank is not None else None,
        experts=experts,
        active_experts=number("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts") if experts else None,
        shared_experts=number("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts"),
        vocabulary=number("vocab_size"),
        context=_context(layout),
        sliding_window=number("sliding_window") if config.get("use_sliding_window", True) else None,
        prediction_layers=number(*PREDICTION_KEYS),
        tied_embeddings=tied or not any(w.part == "lm_head" for w in contents.weights),
    )


def _context(layout: ModelLayout) -> int | None:
    try:
        return max_positions(layout.checkpoint.config)
    except UserError:  # a blocker of its own
        return None


def _active(contents: Contents, architecture: Architecture, total: int) -> int | None:
    experts, active = architecture.experts, architecture.active_experts
    if not experts or not active:
        return None
    of: Counter[str] = Counter()
    for weight in contents.weights:
        of[weight.part] += weight.elements
    table = 0 if architecture.tied_embeddings else of["embed"]
    return total - table - of["towers"] - of["experts"] * (experts - min(active, experts)) // experts


def _parts(contents: Contents, architecture: Architecture, limits: _Limits) -> tuple[Part, ...]:
    groups: dict[tuple[str, tuple[int, ...], str, tuple[int, ...], str], list[Weight]] = {}
    unquantized = contents.layout.unquantized
    for weight in contents.weights:
        kept = unquantized.get(f"{weight.name}.weight", "")
        detailed = (weight.shape, weight.stored, weight.single, kept) if weight.part in _DETAILED else ((), "", (), "")
        groups.setdefault((weight.part, *detailed), []).append(weight)
    ordered = sorted(
        groups.items(), key=lambda item: (PARTS.index(item[0][0]), min(role_order(w.leaf) for w in item[1]))
    )
    return tuple(_part(key, members, architecture, limits) for key, members in ordered)


def _part(
    key: tuple[str, tuple[int, ...], str, tuple[int, ...], str],
    members: Sequence[Weight],
    architecture: Architecture,
    limits: _Limits,
) -> Part:
    part, shape, _, _, kept = key
    stored = tuple(label for label, _ in Counter(w.stored for w in members).most_common())
    single = members[0].single if part in _DETAILED else ()
    stays = "tied to the embeddings" if part == "lm_head" and architecture.tied_embeddings else _STAYS.get(part, "")
    stays = stays or kept or _stays(part, stored[0], shape, single, limits)
    can, cannot = ((), {}) if stays else _HEAD if part == "lm_head" else formats_for(single or shape)
    names = tuple(sorted(dict.fromkeys(w.leaf for w in members), key=role_order)) if part in _DETAILED else ()
    return Part(
        part=part,
        names=names,
        shape=shape,
        weights=len(members),
        parameters=sum(w.elements for w in members),
        bytes=sum(w.bytes for w in members),
        stored=stored,
        can_be=can,
        cannot_be=cannot,
        stays=stays,
        single=single,
    )


def _stays(part: str, stored: str, shape: tuple[int, ...], single: tuple[int, ...], limits: _Limits) -> str:
    """Why `quantize` cannot give a weight of this part another format; "" where it can."""
    source = stored in _WIDE or stored.startswith(_SOURCES)
    if stored not in _WIDE and (not source or (limits.model and not limits.refused)):
        return f"{stored} already"
    if limits.model:
        return limits.model
    if single:
        return limits.experts
    if part == "lm_head":
        return ""
    if len(shape) == 2:
        return ""
    return "experts in one 3-D tensor" if part == "experts" and len(shape) == 3 else "no 2-D weight"


def formats_for(shape: tuple[int, ...]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Labels of the formats that a weight of this shape could be written in; and for the others, why not."""
    can: list[str] = []
    cannot: dict[str, str] = {}
    for name in FORMATS:
        choices = [TensorFormat(name, group) for group in INT4_GROUPS] if name == "int4" else [TensorFormat(name)]
        for fmt in choices:
            try:
                check_shape(fmt, shape, where="")
            except UserError as error:
                cannot[name] = error.what
            else:
                can.append(fmt.label())
                cannot.pop(name, None)
                break
    return tuple(can), cannot


def _layer_runs(contents: Contents) -> tuple[LayerRun, ...]:
    layers: list[list[Weight]] = [[] for _ in range(contents.layout.num_layers)]
    for weight in contents.weights:
        if weight.layer is not None and weight.layer < contents.layout.num_layers:
            layers[weight.layer].append(weight)
    types = contents.layout.config.get("layer_types")
    known = isinstance(types, list) and len(types) == contents.layout.num_layers
    runs: dict[tuple[Any, ...], list[int]] = {}
    for number, weights in enumerate(layers):
        what = describe_layer(weights, str(types[number]) if known and types else "")
        stored = Counter[str]()
        for weight in weights:
            stored[weight.stored] += weight.bytes
        labels = tuple(label for label, _ in stored.most_common() if weights)
        key = (what, labels, sum(w.elements for w in weights), sum(w.bytes for w in weights))
        runs.setdefault(key, []).append(number)
    return tuple(LayerRun(tuple(numbers), *key) for key, numbers in runs.items())


def _fused(contents: Contents) -> tuple[FusedGroup, ...]:
    modules: dict[str, dict[str, Weight]] = {}
    for weight in contents.weights:
        if weight.layer is not None and weight.layer < contents.layout.num_layers:
            parent, _, leaf = weight.name.rpartition(".")
            modules.setdefault(parent, {})[leaf] = weight
    found = []
    for members in FUSED_GROUPS:
        here = {m: [leaf for leaf in members if leaf in leaves] for m, leaves in modules.items()}
        whole = [m for m, leaves in here.items() if len(leaves) == len(members)]
        parted = tuple(m for m, leaves in here.items() if 0 < len(leaves) < len(members))
        # an up_proj without a gate, or MLA without q_a_proj, is a family's way
        telling = parted if whole or any(len(here[m]) > 1 for m in parted) else ()
        mixed = tuple(m for m in whole if len({modules[m][leaf].stored for leaf in members}) > 1)
        shapes = {modules[m][leaf].shape for m in whole for leaf in members}
        cannot = {name for shape in shapes if len(shape) == 2 for name in formats_for(shape)[1]}
        if whole or telling:
            found.append(FusedGroup(members, len(whole), tuple(n for n in FORMATS if n in cannot), telling, mixed))
    return tuple(found)


def _quantization(contents: Contents) -> Quantization | None:
    layout = contents.layout
    matrices = Counter(
        w.stored
        for w in contents.weights
        if _STAYS.get(w.part) not in ("no matrix", "scales") and (len(w.shape) > 1 or w.stored not in _WIDE)
    )
    if not layout.quantization and all(label in _WIDE for label in matrices):
        return None
    settings = {
        key: value
        for key, value in layout.quantization.items()
        if isinstance(value, (str, int, float, bool)) or key == "weight_block_size"
    }
    error = layout.format_error
    return Quantization(
        method=layout.method,
        settings=settings,
        weights=dict(matrices.most_common()),
        kv_cache=_kv_cache(contents),
        refused="" if error is None else error.what,
        has_reader=error is None or error.code != "quantization-unknown",
    )


def _kv_cache(contents: Contents) -> str | None:
    """The format of the KV cache that the config states, or what is wrong with it; None for the model's own."""
    cache: str | None = None
    if contents.layout.format_error is None:
        try:
            cache = contents.layout.dialect.kv_cache_format()
        except UserError as error:
            cache = error.what
    if cache is not None and contents.layout.cache_without_scales:
        return f"{cache}, {contents.layout.cache_without_scales}"
    if cache is None and any(w.part == "KV cache scales" for w in contents.weights):
        return "scales in the files, nothing in the config"
    return cache


def _problems(contents: Contents, architecture: Architecture, fused: Sequence[FusedGroup]) -> Iterable[str]:
    """Contradictions between config and tensors."""
    layout = contents.layout
    errors = [blocker.error for blocker in layout.blockers if blocker.error.code in _CONTRADICTIONS]
    if layout.format_error is not None and layout.format_error.code != "quantization-unknown":
        errors.append(layout.format_error)
    yield from dict.fromkeys(error.what for error in errors)
    yield from layout.contradictions
    for weight in contents.weights:
        rows = weight.shape[0] if weight.part == "embed" and len(weight.shape) == 2 else None
        if rows is not None and architecture.vocabulary and rows < architecture.vocabulary:
            yield f"{weight.name} has {rows} rows, but config.json states a vocabulary of {architecture.vocabulary}"
    for group in fused:
        if group.mixed:
            more = f" and {len(group.mixed) - 1} more" if len(group.mixed) > 1 else ""
            yield f"{', '.join(group.members)} of {group.mixed[0]}{more} are stored differently; engines fuse them"
    absent = names_without_tensors(contents.layout, contents)
    if absent:
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        yield f"the quantization config leaves out {', '.join(absent[:3])}{more}, which no tensor belongs to"


def _made_by(checkpoint: Checkpoint) -> str | None:
    try:
        record = json.loads(read_file(checkpoint.path, RECORD_FILE))
        return f"snugfit {record['snugfit']}, recipe {record['recipe']}"
    except (OSError, UserError, ValueError, KeyError, TypeError, RecursionError):
        return None
