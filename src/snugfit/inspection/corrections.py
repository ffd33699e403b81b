"""What `repair` changes, decided from headers: names of tensors, config.json, and files that are not taken over."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from snugfit.dialects.compressed_tensors import quantization_config
from snugfit.dialects.rename import COMPRESSED, inverted
from snugfit.engines.kv_cache import unknown_scales
from snugfit.engines.releases import EXPERT_NAMES
from snugfit.errors import UserError
from snugfit.formats.spec import FORMATS, TensorFormat
from snugfit.inspection.checks.agreement import is_whole, needed_suffixes
from snugfit.inspection.checks.cache import renamed_scales
from snugfit.inspection.checks.config import unknown_keys, unmatched_ignores, unmatched_targets
from snugfit.inspection.checks.groups import read_name
from snugfit.inspection.evidence import Evidence, Module, fits
from snugfit.model.logical_weights import model_types
from snugfit.model.tied import untied
from snugfit.records.doctor import Finding
from snugfit.storage.safetensors_header import TensorInfo

# formats whose config groups are written here; others keep their config
WRITABLE = frozenset(FORMATS) | {"fp8"}
_LISTS = ("ignore", "modules_to_not_convert", "exclude_modules", "ignored_layers")
_REWRITES_GROUPS = frozenset({"targets-overlap", "target-missing", "target-not-looked-up"})


@dataclass
class Corrections:
    """The new config, new names of tensors, tensors with other content, and files that are left out."""

    config: dict[str, Any]
    renamed: dict[str, str] = field(default_factory=dict)
    replaced: dict[str, tuple[TensorInfo, Callable[[bytes], bytes]]] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)

    @property
    def modules(self) -> dict[str, str]:
        """New names of modules whose tensors are renamed."""
        return {old.rpartition(".")[0]: new.rpartition(".")[0] for old, new in self.renamed.items()}

    def quantization(self) -> dict[str, Any]:
        """The quantization config inside the new config, {} without one."""
        found = _place(self.config).get("quantization_config")
        return found if isinstance(found, dict) else {}


def correct(evidence: Evidence, findings: Iterable[Finding]) -> Corrections:
    """What to change so that the repairable of these faults are gone, as far as that is possible without loss."""
    config = copy.deepcopy(dict(evidence.checkpoint.config))
    found = Corrections(config)
    faults = {finding.fault: finding for finding in findings if finding.repairable}
    if "files-beside" in faults:
        found.left_out.update(name for f in findings if f.fault == "files-beside" for name in f.places)
    if "config-stale" in faults:
        _drop_quantization(config)
    if "head-differs" in faults:
        found.config = config = untied(config)
    if "experts-unread" in faults:
        found.renamed |= _expert_names(evidence)
    if "kv-scale-unread" in faults:
        unread = unknown_scales(evidence.checkpoint.tensors, evidence.layout.decoder)
        found.renamed |= renamed_scales(unread, evidence)
    if "global-scale-inverted" in faults:
        _invert(evidence, (n for f in findings if f.fault == "global-scale-inverted" for n in f.places), found)
    if "field-unknown" in faults:
        _drop_keys(found.quantization())
    if _REWRITES_GROUPS & faults.keys() or (found.renamed and evidence.dialect == COMPRESSED):
        _rewrite_groups(evidence, found)
    else:
        _edit_lists(evidence, found.quantization(), faults)
    return found


def _place(config: dict[str, Any]) -> dict[str, Any]:
    """The level of a config that has the quantization config."""
    text = config.get("text_config")
    if not config.get("quantization_config") and isinstance(text, dict) and text.get("quantization_config"):
        return text
    return config


def _drop_quantization(config: dict[str, Any]) -> None:
    for level in (config, config.get("text_config")):
        if isinstance(level, dict):
            for key in ("quantization_config", "compression_config"):
                level.pop(key, None)


def _drop_keys(quantization: dict[str, Any]) -> None:
    """Remove keys that compressed-tensors forbids; their values have no reader."""
    for path in [path for paths in unknown_keys(quantization) for path in paths]:
        level: Any = quantization["config_groups"]
        for key in path[:-1]:
            level = level.get(key, {})  # the whole part may be gone
        level.pop(path[-1], None)


def _expert_names(evidence: Evidence) -> dict[str, str]:
    kind = next(kind for kind in reversed(model_types(evidence.checkpoint.config)) if kind in EXPERT_NAMES)
    renamed: dict[str, str] = {}
    for name, parts in evidence.layout.modules.items():
        new = read_name(name, kind) if ".experts." in name else name
        if new != name:
            renamed |= {tensor.name: f"{new}.{suffix}" for suffix, tensor in parts.items()}
    taken = set(evidence.checkpoint.tensors) - set(renamed)
    return {old: new for old, new in renamed.items() if new not in taken}


def _invert(evidence: Evidence, names: Iterable[str], found: Corrections) -> None:
    for name in names:
        tensor = evidence.checkpoint.tensors[name]
        if tensor.dtype == "F32":
            found.replaced[name] = TensorInfo(name, tensor.dtype, tensor.shape), inverted(tensor.dtype)


def known_formats(evidence: Evidence) -> dict[str, TensorFormat] | None:
    """The format of every weight that is stored as codes, by the headers where groups overlap; None if one is open."""
    found = {}
    for name, module in evidence.modules.items():
        if module.stored:
            fmt = _format_of(evidence, module)
            if fmt is None or fmt.name not in WRITABLE:
                return None
            found[name] = fmt
    return found


def _format_of(evidence: Evidence, module: Module) -> TensorFormat | None:
    """The one format among those that the config has that a module's tensors fit, None where that is open."""
    try:
        groups = evidence.targets.groups_of(module.name) if evidence.targets is not None else []
    except UserError:
        return None
    schemes = [evidence.schemes[id(group)] for group in groups]
    if not groups:
        schemes = list(evidence.schemes.values()) if evidence.targets is not None else [module.asked or ""]
    known = [scheme for scheme in dict.fromkeys(schemes) if isinstance(scheme, TensorFormat)]
    candidates = [scheme for scheme in known if fits(module, scheme) and is_whole(evidence, module, scheme)]
    # with the scale of inputs that only one of them has
    most = max((len(needed_suffixes(evidence.layout.dialect, module, fmt)) for fmt in candidates), default=0)
    fullest = [fmt for fmt in candidates if len(needed_suffixes(evidence.layout.dialect, module, fmt)) == most]
    return fullest[0] if len(fullest) == 1 else None


def plain_linears(evidence: Evidence) -> list[str]:
    """Every linear without codes, routers too, and a head that is tied: what `ignore` names."""
    linears = [
        parsed.module
        for name, parsed in evidence.layout.names.items()
        if parsed.parameter == "weight"
        and parsed.role not in ("embed", "norm")
        and len(evidence.layout.weights.tensors[name].shape) == 2
        and (parsed.module not in evidence.modules or not evidence.modules[parsed.module].stored)
    ]
    head = [] if any(parsed.role == "lm_head" for parsed in evidence.layout.names.values()) else ["lm_head"]
    return list(dict.fromkeys([*linears, *head]))


def _rewrite_groups(evidence: Evidence, found: Corrections) -> None:
    """Config groups and `ignore` anew, of the formats that the headers show, under the new names."""
    formats = known_formats(evidence)
    quantization = found.quantization()
    if formats is None or not formats or evidence.dialect != COMPRESSED:
        return
    modules = found.modules
    named = {modules.get(name, name): fmt for name, fmt in formats.items()}
    try:
        made = quantization_config(named, [modules.get(name, name) for name in plain_linears(evidence)])
    except UserError:
        return
    quantization |= {key: made[key] for key in ("config_groups", "format", "ignore")}


def _edit_lists(evidence: Evidence, quantization: dict[str, Any], faults: Mapping[str, Finding]) -> None:
    """Entries of `ignore` that are missing or name nothing; targets that match nothing."""
    nested = quantization.get("quantization")
    details = nested if isinstance(nested, dict) else quantization
    key = next((key for key in _LISTS if isinstance(details.get(key), list)), None)
    if "ignore-incomplete" in faults:
        key = key or ("modules_to_not_convert" if evidence.dialect == "fp8" else "ignore")
        plain = [name for name, module in evidence.modules.items() if not module.stored and module.asked is not None]
        plain += [] if evidence.dialect != "fp8" else [n for n in plain_linears(evidence) if n in evidence.modules]
        given = details.get(key) or []
        details[key] = [*given, *(name for name in dict.fromkeys(plain) if name not in given)]
    if "ignore-unmatched" in faults and key is not None:
        absent = set(unmatched_ignores(evidence))
        details[key] = [entry for entry in details[key] if str(entry) not in absent]
    if "target-unmatched" in faults:
        absent = set(unmatched_targets(evidence))
        groups = quantization["config_groups"]
        for name, group in evidence.groups:
            group = groups[name]  # noqa: PLW2901  # the copy that is changed
            left = [target for target in group.get("targets") or [] if str(target) not in absent]
            if left:
                group["targets"] = left
            else:
                del groups[name]
