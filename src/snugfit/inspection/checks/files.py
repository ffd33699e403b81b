"""Faults of a checkpoint's files: index and shards, and files that engines would load beside the weights."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from snugfit.engines.releases import CONSOLIDATED
from snugfit.inspection.evidence import Evidence, file_name, finding
from snugfit.records.doctor import Finding
from snugfit.storage.checkpoint import INDEX_NAME
from snugfit.storage.other_files import ADAPTER_CONFIG

_KINDS = {"missing": "shard-missing", "shard": "shard-damaged", "twice": "tensor-twice"}


def damaged_files(evidence: Evidence) -> Iterator[Finding]:
    """Shards that are missing or cut off, tensors stored twice, and an index that cannot be read."""
    remote = evidence.checkpoint.remote
    root = evidence.checkpoint.path if remote is None else Path(remote.name)
    for kind, error in evidence.damage:
        fault = _KINDS.get(kind)
        where = file_name(error.where, root)
        if fault is not None:
            yield from finding(fault, [where], error.what, evidence.affected())
        else:
            yield from finding("index-wrong", [where], error.what, evidence.affected())


def wrong_index(evidence: Evidence) -> Iterator[Finding]:
    """An index that sends tensors to files that do not hold them, or does not name tensors of its shards."""
    if evidence.weight_map is None:
        return
    damaged = {kind for kind, _ in evidence.damage} & {"missing", "shard"}
    sent = [name for name, t in evidence.checkpoint.tensors.items() if evidence.weight_map.get(name, t.file) != t.file]
    # a file of prediction layers that no index names was taken in: engines pass it over as before
    taken = set(evidence.layout.taken_in)
    absent = [
        name
        for name, tensor in evidence.checkpoint.tensors.items()
        if name not in evidence.weight_map and tensor.file not in taken
    ]
    readers = evidence.affected(release for release in evidence.engines if release.follows_index)
    if sent:
        what = f"the index sends {sent[0]} to {evidence.weight_map[sent[0]]}, but another shard holds it."
        yield from finding("index-wrong", sent, what, readers)
    if absent:
        what = f"the index does not name {absent[0]}, which a shard holds: readers that follow the index lose it."
        yield from finding("index-wrong", absent, what, readers)
    needless = set(evidence.layout.not_needed)
    lost = [] if damaged else [name for name in evidence.checkpoint.missing if name not in needless]
    if lost:
        what = f"the index names {lost[0]} in {evidence.checkpoint.missing[lost[0]]}, which does not hold it."
        yield from finding("tensor-lost", lost, what, evidence.affected())


def files_beside(evidence: Evidence) -> Iterator[Finding]:
    """Other weights at the top that an engine loads in place of the quantized ones, or beside them."""
    if not evidence.layout.method:
        return
    names = evidence.checkpoint.other_files
    consolidated = [name for name in names if fnmatchcase(name, f"{CONSOLIDATED}*.safetensors")]
    if consolidated:
        readers = [release for release in evidence.engines if release.loads_consolidated]
        what = f"{consolidated[0]} takes the place of the quantized weights: these engines look for this name first."
        yield from finding("files-beside", consolidated, what, evidence.affected(readers))
    loose = [
        name
        for name in names
        if re.fullmatch(r"[^/]+\.safetensors", name) and name not in consolidated and evidence.weight_map is None
    ]
    if not loose and evidence.weight_map is None and consolidated not in ([], [f"{CONSOLIDATED}.safetensors"]):
        # a reader that passes over consolidated.safetensors alone takes its shards for weights of the model
        loose = consolidated
    if loose:
        taken = loose is consolidated
        readers = [r for r in evidence.engines if r.loads_loose and not (taken and r.loads_consolidated)]
        what = f"no {INDEX_NAME} says which files belong to the model, so {loose[0]} is loaded beside its weights."
        yield from finding("files-beside", loose, what, evidence.affected(readers))
    if ADAPTER_CONFIG in names:
        readers = [release for release in evidence.engines if release.name == "transformers"]
        what = f"{ADAPTER_CONFIG} at the top names another model: transformers loads that one, with the adapter."
        yield from finding("files-beside", [ADAPTER_CONFIG], what, evidence.affected(readers))
