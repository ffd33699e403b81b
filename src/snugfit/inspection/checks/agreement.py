"""Config and headers, weight by weight: what is asked, what is stored, and whether its scales are there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from snugfit.dialects.dialect import Dialect
from snugfit.dialects.packed import is_cache_scale
from snugfit.errors import UserError
from snugfit.formats.spec import TensorFormat
from snugfit.inspection.evidence import HUGGING_FACE, READ, Evidence, Module, finding, fits
from snugfit.model.logical_weights import weight_shape
from snugfit.model.names import KEPT_ROLES
from snugfit.records.doctor import Finding
from snugfit.storage.safetensors_header import StoredTensor

_OF_WEIGHTS = (
    *("weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale", "weight_zero_point"),
    *("weight_shape", "weight_g_idx", "input_scale", "input_global_scale", "input_zero_point", "activation_scale"),
)


def undeclared(evidence: Evidence) -> Iterator[Finding]:
    """Codes in a file whose configs say nothing of a quantization."""
    if evidence.quantization or evidence.layout.unreadable is not None:
        return
    names = [name for name, module in evidence.modules.items() if module.stored]
    what = "weights are stored as codes, and neither config.json nor hf_quant_config.json says how."
    yield from finding("quantization-undeclared", names, what, evidence.affected())


def formats(evidence: Evidence) -> Iterator[Finding]:
    """Plain weights that the config targets, codes that it does not, and codes of another format than it says."""
    if evidence.dialect not in READ[1:] or evidence.layout.unreadable is not None:
        return
    plain: list[str] = []
    heads: list[str] = []  # plain, and under a target that is a class
    untargeted, other = [], []
    for name, module in evidence.modules.items():
        if module.refused and module.stored:
            continue
        if not module.stored:
            if module.asked is not None or _left_out_of_list(module, evidence):
                classed = evidence.targets is not None and not evidence.targets.names(name)
                (heads if classed and module.parsed.role == "lm_head" else plain).append(name)
        elif module.asked is None:
            untargeted.append(name)
        elif not fits(module, module.asked):
            other.append(name)
    by_class = [release for release in evidence.engines if not release.head_by_name]
    for places, affected in ((plain, evidence.affected()), (heads, evidence.affected(by_class))):
        fmt = evidence.modules[places[0]].asked if places else None
        what = f"its weight is plain, and the config makes it {fmt.label() if fmt else evidence.dialect}."
        yield from finding("ignore-incomplete", places, what, affected)
    what = "its weight is stored as codes, and no target of the config names it, or `ignore` does."
    yield from finding("target-missing", untargeted, what, evidence.affected())
    if other:
        module = evidence.modules[other[0]]
        assert module.asked is not None
        stored = module.parts[module.packed.tensor].dtype
        what = f"the config makes it {module.asked.label()}, but its codes are {stored} ({module.packed.label})."
        yield from finding("format-mismatch", other, what, evidence.affected())


def _left_out_of_list(module: Module, evidence: Evidence) -> bool:
    """Whether a plain linear of Hugging Face's FP8 is none of those that its config leaves out."""
    if evidence.dialect != HUGGING_FACE or not evidence.is_in_layers(module) or module.parsed.role in KEPT_ROLES:
        return False
    if f"{module.name}.weight" in evidence.layout.unquantized:
        return False
    given = evidence.quantization.get("modules_to_not_convert") or evidence.quantization.get("ignored_layers") or []
    return not any(isinstance(entry, str) and entry in module.name for entry in given)


def scales(evidence: Evidence) -> Iterator[Finding]:
    """Scales that codes need and the file does not have, and scales of a shape that does not fit."""
    missing: list[str] = []
    wrong: list[tuple[str, str]] = []
    for name, module in evidence.quantized.items():
        assert module.asked is not None
        needed = needed_suffixes(evidence.layout.dialect, module, module.asked)
        absent = [f"{name}.{suffix}" for suffix in needed if suffix not in module.parts]
        missing += absent
        if absent:
            continue
        try:
            parts = {suffix: f"{name}.{suffix}" for suffix in needed}
            weight_shape(evidence.checkpoint, module.asked, parts)
        except UserError as error:
            wrong.append((name, error.what))
    what = f"{missing[0] if missing else ''} is not in the file: engines allocate it without writing to it."
    yield from finding("scale-missing", missing, what, evidence.affected())
    yield from finding("scale-shape", [name for name, _ in wrong], wrong[0][1] if wrong else "", evidence.affected())


def needed_suffixes(dialect: Dialect, module: Module, fmt: TensorFormat) -> tuple[str, ...]:
    """The suffixes of the tensors that a module's format needs, the codes first."""
    assert dialect.file_format is not None
    return dialect.file_format.suffixes(fmt, module.parts)


def is_whole(evidence: Evidence, module: Module, fmt: TensorFormat) -> bool:
    """Whether all tensors that `fmt` needs of a module are in the file, in shapes that fit."""
    needed = needed_suffixes(evidence.layout.dialect, module, fmt)
    if any(suffix not in module.parts for suffix in needed):
        return False
    try:
        weight_shape(evidence.checkpoint, fmt, {suffix: f"{module.name}.{suffix}" for suffix in needed})
    except UserError:
        return False
    return True


def extra_scales(evidence: Evidence) -> Iterator[Finding]:
    """Scales whose weight is plain or missing."""
    if evidence.layout.unreadable is not None or evidence.dialect not in READ:
        return
    found = []
    for name, parts in evidence.layout.modules.items():
        left = [suffix for suffix in parts if suffix in _OF_WEIGHTS and not is_cache_scale(name, suffix)]
        module = evidence.modules.get(name)
        if left and (module is None or not module.stored) and not _stacked(parts):
            found += [f"{name}.{suffix}" for suffix in left]
    what = f"{found[0] if found else ''} is the scale of a weight that is plain or not in the file."
    yield from finding("scale-extra", found, what, evidence.affected())


def _stacked(parts: Mapping[str, StoredTensor]) -> bool:
    """Whether a module holds codes of several experts, whose scales are counted elsewhere."""
    return any(len(tensor.shape) > 2 for tensor in parts.values())
