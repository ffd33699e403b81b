"""Faults of config.json: keys that readers forbid, targets and `ignore` that match too much or nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from snugfit.dialects.rename import COMPRESSED
from snugfit.dialects.targets import common_name
from snugfit.engines.releases import ARGUMENT_KEYS, EXPERT_NAMES, GROUP_ORDERS, LOOKED_UP, SCHEME_KEYS, EngineRelease
from snugfit.errors import UserError
from snugfit.formats.spec import TensorFormat
from snugfit.inspection.contents import names_without_tensors
from snugfit.inspection.evidence import Evidence, Module, finding
from snugfit.model.logical_weights import model_types
from snugfit.patterns import Pattern
from snugfit.records.doctor import Finding

_ARGUMENTS = ("weights", "input_activations", "output_activations")
# class names that targets may be
_CLASSES = re.compile(r"[A-Z]\w*")


def contradictions(evidence: Evidence) -> Iterator[Finding]:
    """config.json and tensors that describe different models, and a quantization config that cannot be read."""
    layout = evidence.layout
    absent = [error.what for error in evidence.missing_layers]
    known = {*absent, *(error.what for error in evidence.wrong_experts)}
    yield from finding(
        "layers-missing", [layout.decoder] * bool(absent), absent[0] if absent else "", evidence.affected()
    )
    for blocker in layout.blockers:
        error = blocker.error
        if error.code in ("config-invalid", "config-mismatch") and error.what not in known:
            yield from finding("config-mismatch", ["config.json"], error.what, evidence.affected())
    unreadable = layout.unreadable
    if unreadable is not None and unreadable.code in ("quantization-invalid", "json-invalid", "pattern-invalid"):
        yield from finding("quantization-invalid", [evidence.config_file], unreadable.what, evidence.affected())
    if layout.stale_method:
        what = f"config.json states {layout.stale_method}, and every weight is plain: engines expect codes."
        yield from finding("config-stale", [evidence.config_file], what, evidence.affected())
    yield from _vocabulary(evidence)


def _vocabulary(evidence: Evidence) -> Iterator[Finding]:
    """Embeddings with fewer rows than the vocabulary, or of another width than the model."""
    config = evidence.layout.config
    vocabulary, hidden = config.get("vocab_size"), config.get("hidden_size")
    for name, parsed in evidence.layout.names.items():
        info = evidence.layout.weights.tensors[name]
        if parsed.role != "embed" or len(info.shape) != 2 or parsed.layer is not None:
            continue
        if isinstance(vocabulary, int) and info.shape[0] < vocabulary:
            what = f"{name} has {info.shape[0]} rows, but config.json states a vocabulary of {vocabulary}."
            yield from finding("config-mismatch", [name], what, evidence.affected())
        narrow = isinstance(config.get("word_embed_proj_dim") or config.get("embedding_size"), int)
        if isinstance(hidden, int) and info.shape[1] != hidden and not narrow and name.endswith(".weight"):
            what = f"{name} is {info.shape[1]} wide, but config.json states a hidden_size of {hidden}."
            yield from finding("config-mismatch", [name], what, evidence.affected())


def unknown_fields(evidence: Evidence) -> Iterator[Finding]:
    """Keys of config groups and their arguments that compressed-tensors forbids."""
    if evidence.dialect != COMPRESSED:
        return
    scheme_keys, argument_keys = unknown_keys(evidence.quantization)
    for keys, known, readers in (
        (scheme_keys, SCHEME_KEYS, [release for release in evidence.engines if release.forbids_scheme_keys]),
        (argument_keys, ARGUMENT_KEYS, [release for release in evidence.engines if release.forbids_argument_keys]),
    ):
        names = [".".join(("config_groups", *path)) for path in keys]
        places = [f"{evidence.config_file}.{name}" for name in names]
        what = f"{', '.join(names[:3])} is no key that compressed-tensors knows there ({', '.join(sorted(known))})."
        yield from finding("field-unknown", places, what, evidence.affected(readers))


def unknown_keys(quantization: Mapping[str, Any]) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Paths below config_groups of keys that compressed-tensors forbids: those of groups, and those of arguments."""
    schemes: list[tuple[str, ...]] = []
    arguments: list[tuple[str, ...]] = []
    groups = quantization.get("config_groups")
    for name, group in groups.items() if isinstance(groups, dict) else ():
        if not isinstance(group, dict):
            continue
        schemes += [(name, key) for key in group if key not in SCHEME_KEYS]
        for part in _ARGUMENTS:
            given = group.get(part)
            if isinstance(given, dict):
                arguments += [(name, part, key) for key in given if key not in ARGUMENT_KEYS]
    return schemes, arguments


def removed_orders(evidence: Evidence) -> Iterator[Finding]:
    """Groups of columns in an order of their own, which newer releases refuse."""
    if evidence.dialect != COMPRESSED:
        return
    places = [
        f"{evidence.config_file}.config_groups.{name}.weights.actorder"
        for name, group in evidence.groups
        if isinstance(weights := group.get("weights"), dict)
        and (weights.get("actorder") is True or str(weights.get("actorder")).lower() in GROUP_ORDERS)
    ]
    readers = [release for release in evidence.engines if release.refuses_group_order]
    what = "groups of input features are in an order of their own (actorder), which these releases refuse to load."
    yield from finding("order-removed", places, what, evidence.affected(readers))


def overlapping_targets(evidence: Evidence) -> Iterator[Finding]:
    """Weights that targets of two config groups match, where the groups' formats differ."""
    targets = evidence.targets
    if targets is None:
        return
    found: list[str] = []
    formats: list[TensorFormat | str] = []
    for name, module in evidence.modules.items():
        if not module.stored:
            continue
        try:
            schemes = [evidence.schemes[id(group)] for group in targets.groups_of(name)]
        except UserError:
            return
        if len(set(schemes)) > 1:
            found.append(name)
            formats = formats or list(dict.fromkeys(schemes))
    if found:
        labels = " and ".join(fmt if isinstance(fmt, str) else fmt.label() for fmt in formats[:2])
        what = (
            f"groups of {labels} both target it: vLLM takes the first target in the file's order, compressed-tensors "
            "sorts them by name."
        )
        yield from finding("targets-overlap", found, what, evidence.affected())


def lookups(evidence: Evidence) -> Iterator[Finding]:
    """Targets that match a weight's name in the file, and not the name under which an engine looks up its format."""
    targets = evidence.targets
    if targets is None:
        return
    kinds = model_types(evidence.checkpoint.config)
    for release in evidence.engines:
        if not release.kernels:
            continue
        lost = {}
        for name, module in evidence.quantized.items():
            alias = _looked_up(module, release, kinds)
            try:
                same = alias == name or targets.group_of(alias) is not None
            except UserError:
                return
            if not same and evidence.is_in_layers(module):
                lost[name] = alias
        if lost:
            alias = next(iter(lost.values()))
            does = "builds it in 16 bits" if release.kernels == "vllm" else "stops"
            what = f"{release.title} looks up its format as {alias}, which no target matches, and {does}."
            yield from finding("target-not-looked-up", list(lost), what, [release.title])
    readers = [release for release in evidence.engines if release.head_by_name]
    heads = [
        name
        for name, module in evidence.quantized.items()
        if module.parsed.role == "lm_head" and not targets.names(name)
    ]
    what = "it is stored as codes under the target Linear; these engines look for one of its name, and build 16 bits."
    yield from finding("target-not-looked-up", heads, what, evidence.affected(readers))


def _looked_up(module: Module, release: EngineRelease, kinds: Sequence[str]) -> str:
    """The name under which a release looks up the format of a linear of a model of these types."""
    vllm = release.kernels == "vllm"
    aliases = {part: name for kind in kinds if vllm for part, name in LOOKED_UP.get(kind, {}).items()}
    leaves = release.expert_leaves
    own = next((kind for kind in kinds if kind in release.renames_experts), None)
    if own is not None:
        gate, down, up = EXPERT_NAMES[own][1]
        leaves = (gate, up, down)
    return looked_up_as(module.name, module.parsed.role, aliases, leaves)


def looked_up_as(name: str, role: str, aliases: Mapping[str, str], expert_leaves: tuple[str, ...]) -> str:
    """The name under which vLLM looks up the format of a linear; experts are looked up on expert 0."""
    parts = [aliases.get(part, part) for part in name.split(".")]
    if "experts" in parts[:-2] and parts[parts.index("experts") + 1].isdecimal():
        parts[parts.index("experts") + 1] = "0"
        place = {"gate": 0, "up": 1, "down": 2}.get(role)
        if expert_leaves and place is not None:
            parts[-1] = expert_leaves[place]
    return ".".join(parts)


def unmatched(evidence: Evidence) -> Iterator[Finding]:
    """Entries of `ignore` and targets that match nothing in the file."""
    layout = evidence.layout
    if not evidence.quantization or layout.unreadable is not None:
        return
    names = unmatched_ignores(evidence)
    what = f"the quantization config leaves out {', '.join(names[:3])}, which no tensor belongs to."
    yield from finding("ignore-unmatched", [f"{evidence.config_file}.ignore"] * bool(names), what, evidence.affected())
    absent = unmatched_targets(evidence)
    what = f"the target {', '.join(absent[:3])} matches no weight of the file."
    place = f"{evidence.config_file}.config_groups"
    yield from finding("target-unmatched", [place] * bool(absent), what, evidence.affected())


def unmatched_ignores(evidence: Evidence) -> list[str]:
    """Entries of `ignore` that name nothing in the file."""
    return [*names_without_tensors(evidence.layout), *_unmatched_patterns(evidence)]


def _unmatched_patterns(evidence: Evidence) -> list[str]:
    """Patterns of `ignore` that match no module, under any name that files, transformers and vLLM have."""
    ignore = evidence.quantization.get("ignore")
    if evidence.dialect != COMPRESSED or not isinstance(ignore, list):
        return []
    return [str(entry) for entry in ignore if str(entry).startswith("re:") and not _matches(str(entry), evidence)]


def unmatched_targets(evidence: Evidence) -> list[str]:
    """Targets that match nothing in the file."""
    if evidence.dialect != COMPRESSED:
        return []
    found = []
    for _, group in evidence.groups:
        targets = group.get("targets")
        for target in targets if isinstance(targets, list) else []:
            text = str(target)
            named = text in evidence.layout.modules or common_name(text) in evidence.known_names
            if not (named or _CLASSES.fullmatch(text) or (text.startswith("re:") and _matches(text, evidence))):
                found.append(text)
    return found


def _matches(entry: str, evidence: Evidence) -> bool:
    try:
        pattern = Pattern(entry.removeprefix("re:"))
        names = (*evidence.layout.modules, "lm_head")
        if any(pattern.begins(name) for name in names):
            return True
        # names of modules above the weights, and of transformers' own modules
        above = {
            ".".join(parts[:end]) for name in names for parts in (name.split("."),) for end in range(1, len(parts))
        }
        return any(pattern.begins(name) for name in above) or any(pattern.begins(n) for n in evidence.known_names)
    except (ValueError, UserError):
        return True  # a pattern that cannot be tried is reported with the config
