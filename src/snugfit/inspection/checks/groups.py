"""Faults of weights that engines run together: fused groups, and the experts of a layer."""

from __future__ import annotations

from collections.abc import Iterator

from snugfit.dialects.rename import COMPRESSED
from snugfit.engines.fused import group_modules
from snugfit.engines.releases import EXPERT_NAMES
from snugfit.formats.spec import NVFP4_FORMATS
from snugfit.inspection.evidence import Evidence, Module, finding
from snugfit.model.anatomy import is_tower
from snugfit.model.logical_weights import MXFP4_BLOCKS, model_types
from snugfit.records.doctor import Finding, Severity


def stored_as(module: Module) -> str:
    """The format of a module's weight in words, "" for plain numbers."""
    if not module.stored:
        return ""
    return module.asked.label() if module.asked is not None else module.packed.label


def fused_formats(evidence: Evidence) -> Iterator[Finding]:
    """Members of a fused group that are stored in different formats, or some of them plain."""
    inside = [name for name, module in evidence.modules.items() if evidence.is_in_layers(module) and not is_tower(name)]
    found, what = [], ""
    for group in group_modules(inside):
        kinds = {name: stored_as(evidence.modules[name]) for name in group}
        # experts are one format a layer, and are looked at as such
        if len(set(kinds.values())) > 1 and not any(evidence.modules[name].parsed.routed for name in group):
            found.append(group[0])
            leaves = ", ".join(f"{name.rpartition('.')[2]} is {kind or 'plain'}" for name, kind in kinds.items())
            what = what or f"engines run these as one product: {leaves}."
    yield from finding("fused-formats-differ", found, what, evidence.affected())


def experts(evidence: Evidence) -> Iterator[Finding]:
    """Experts of one layer that are stored in different formats, and experts that are missing."""
    layers: dict[str, dict[str, list[str]]] = {}
    for name, module in evidence.modules.items():
        if module.parsed.expert is not None and evidence.is_in_layers(module):
            above = name.partition(".experts.")[0]
            layers.setdefault(above, {}).setdefault(stored_as(module), []).append(name)
    mixed, what = [], ""
    for above, kinds in layers.items():
        if len(kinds) > 1:
            mixed.append(f"{above}.experts")
            shown = ", ".join(
                f"{names[0].removeprefix(above + '.')} is {kind or 'plain'}" for kind, names in kinds.items()
            )
            what = what or f"engines take the format of expert 0 for all of a layer: {shown}."
    yield from finding("experts-mixed", mixed, what, evidence.affected())
    for error in evidence.wrong_experts:
        yield from finding("experts-missing", [evidence.layout.decoder], error.what, evidence.affected())


def expert_names(evidence: Evidence) -> Iterator[Finding]:
    """Experts one by one under names that engines do not read for this family."""
    kind = next((kind for kind in reversed(model_types(evidence.checkpoint.config)) if kind in EXPERT_NAMES), None)
    if kind is None:
        return
    wrong = [
        name
        for name, module in evidence.modules.items()
        if module.parsed.expert is not None and evidence.is_in_layers(module) and read_name(name, kind) != name
    ]
    above, leaves = EXPERT_NAMES[kind]
    also = {read_name(name, kind, _ALSO_READ) for name in wrong} == set(wrong)
    readers = [release for release in evidence.engines if not (also and kind in release.renames_experts)]
    refusing = [release for release in readers if release.refuses_unknown_experts]
    silent = [release for release in readers if not release.refuses_unknown_experts]
    for some, does in ((refusing, "refuses the file"), (silent, "may pass over them without a word")):
        names = f"{above}.experts.N.{{{','.join(leaves)}}}"
        what = f"experts of {kind} are read under the names {names}; with others, this engine {does}."
        yield from finding("experts-unread", wrong, what, evidence.affected(some))


# leaf -> its place among gate, down and up
_LEAVES = {"gate_proj": 0, "down_proj": 1, "up_proj": 2, "w1": 0, "w2": 1, "w3": 2}
# what some releases read in families whose experts have other names
_ALSO_READ = ("gate_proj", "down_proj", "up_proj")
# all names of gate, down and up that files have
EXPERT_LEAVES = (_ALSO_READ, ("w1", "w2", "w3"))


def read_name(name: str, kind: str, leaves: tuple[str, str, str] | None = None) -> str:
    """The name under which engines read the module of a routed expert of the family `kind`, or with other `leaves`."""
    above, usual = EXPERT_NAMES[kind]
    leaves = leaves or usual
    head, _, tail = name.partition(".experts.")
    stem, _, _ = head.rpartition(".")
    number, _, leaf = tail.partition(".")
    place = _LEAVES.get(leaf)
    return name if place is None or not stem else f"{stem}.{above}.experts.{number}.{leaves[place]}"


def stacked_codes(evidence: Evidence) -> Iterator[Finding]:
    """Codes of all experts of a layer in one tensor, in a dialect whose readers want them one by one."""
    if evidence.layout.method == "mxfp4" or not evidence.quantization:
        return
    found = [
        name
        for name, tensor in evidence.checkpoint.tensors.items()
        if len(tensor.shape) > 2
        and tensor.dtype in ("U8", "I8", "I32", "F8_E4M3", "F8_E5M2")
        and "experts" in name.split(".")
        and not name.endswith((MXFP4_BLOCKS, "_scales", "_scale", "_scale_inv"))
    ]
    what = f"{found[0] if found else ''} holds codes of all experts of a layer; engines read them one by one."
    yield from finding("experts-stacked", found, what, evidence.affected())


def single_experts(evidence: Evidence) -> Iterator[Finding]:
    """Experts one by one that an engine does not find, or reads in NVFP4 without their global scales.

    No file is at fault: it is a note, unless those engines alone are asked for.
    """
    stored = [
        module
        for module in evidence.modules.values()
        if module.stored and module.parsed.expert is not None and evidence.is_in_layers(module)
    ]
    if evidence.dialect != COMPRESSED or not stored:
        return
    kinds = model_types(evidence.checkpoint.config)
    four_bits = [module.name for module in stored if module.asked is not None and module.asked.name in NVFP4_FORMATS]
    without = [release for release in evidence.engines if not release.stacked_experts.isdisjoint(kinds)]
    losing = [release for release in evidence.engines if not release.experts_without_global.isdisjoint(kinds)]
    single = "experts are stored one by one, and it looks for stacks alone: it makes random ones, as its report says."
    scales = "it leaves out the global scales of experts in NVFP4 without a word: what it computes is nonsense."
    for fault, places, some, what in (
        ("experts-not-stacked", [module.name for module in stored], without, single),
        ("expert-scales-unread", four_bits, losing, scales),
    ):
        severity: Severity = "will lie" if len(some) == len(evidence.engines) else "note"
        yield from finding(fault, places, f"of this family {what}", evidence.affected(some), severity=severity)
