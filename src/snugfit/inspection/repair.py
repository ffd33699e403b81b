"""Corrects the faults of a checkpoint that can be corrected without loss, as a new directory.

Codes stay as they are: names, config.json and index change. What is to be gone is looked for again in the result before
it appears, so that a record never promises what was not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from snugfit.dialects.compressed_tensors import quantization_config
from snugfit.dialects.dialect import MODELOPT_FILE, read_quant_config
from snugfit.dialects.rename import COMPRESSED, MODELOPT, modelopt_config, translated
from snugfit.engines.releases import RELEASES
from snugfit.errors import UserError
from snugfit.inspection.checks.agreement import needed_suffixes
from snugfit.inspection.corrections import Corrections, correct, known_formats, plain_linears
from snugfit.inspection.doctor import check_headers, inverted_scales, open_evidence, without_consequences
from snugfit.inspection.evidence import Evidence, releases
from snugfit.model.layout import headers_of, read_layout
from snugfit.progress import SILENT, Progress
from snugfit.records.base import as_json
from snugfit.records.doctor import Finding, RepairRecord
from snugfit.storage.checkpoint import INDEX_NAME, SINGLE_NAME
from snugfit.storage.open import is_hub_id
from snugfit.storage.rewrite import Changes, changed_tensors, link_or_copy, rewrite_shards
from snugfit.storage.safetensors_header import TensorInfo
from snugfit.storage.shards import index_text
from snugfit.storage.staging import check_stageable, staged


@dataclass(frozen=True, kw_only=True)
class _Plan:
    evidence: Evidence
    changes: Changes
    config: Mapping[str, Any]
    hf_quant_config: Mapping[str, Any] | None
    left_out: tuple[str, ...]
    dialect: str
    before: tuple[Finding, ...]
    after: tuple[Finding, ...]


def repair(
    checkpoint: str | Path,
    *,
    output_dir: str | Path,
    dialect: str | None = None,
    progress: Progress = SILENT,
) -> RepairRecord:
    """Write `checkpoint`, a directory, into the new directory `output_dir` with its lossless faults corrected.

    `dialect`, "compressed-tensors" or "modelopt", writes the same codes in that dialect. Shards without a change are
    hard links to the source's, so neither may be changed in place later. `output_dir` appears whole or not at all, and
    the source is only read. What is left is in the record. UserError for damage that no change of names corrects.
    """
    target = Path(output_dir)
    check_stageable(target, models=[checkpoint])
    plan = _plan(checkpoint, dialect)
    source = plan.evidence.checkpoint
    with staged(target) as directory:
        progress.message(f"{len(source.shards)} shards, {len(plan.changes.renamed)} tensors renamed")
        rewritten, linked = rewrite_shards(source, directory, plan.changes)
        for name in source.other_files:
            if name not in plan.left_out and name != MODELOPT_FILE:
                link_or_copy(source.path, name, directory)
                linked.append(name)
        (directory / "config.json").write_text(as_json(plan.config), encoding="utf-8")
        if plan.hf_quant_config is not None:
            (directory / MODELOPT_FILE).write_text(as_json(plan.hf_quant_config), encoding="utf-8")
        _write_index(plan, directory)
    return _record(plan, str(checkpoint), tuple(rewritten), tuple(linked))


def plan_repair(checkpoint: str | Path, *, dialect: str | None = None) -> RepairRecord:
    """What `repair` would do, without writing anything."""
    plan = _plan(checkpoint, dialect)
    source, changes = plan.evidence.checkpoint, plan.changes
    touched = {tensor.file for tensor in source.tensors.values() if changes.touches(tensor.name)}
    rewritten = tuple(shard for shard in source.shards if shard in touched)
    others = [name for name in source.other_files if name not in plan.left_out and name != MODELOPT_FILE]
    linked = (*(shard for shard in source.shards if shard not in touched), *others)
    return _record(plan, str(checkpoint), rewritten, linked)


def _record(plan: _Plan, model: str, rewritten: tuple[str, ...], linked: tuple[str, ...]) -> RepairRecord:
    left = {(finding.fault, finding.where) for finding in plan.after}
    return RepairRecord(
        model=model,
        repaired=tuple(f.listed() for f in plan.before if (f.fault, f.where) not in left and f.repairable),
        left=tuple(finding.listed() for finding in plan.after),
        dialect=plan.dialect,
        renamed=len(plan.changes.renamed),
        rewritten=rewritten,
        linked=linked,
        left_out=plan.left_out,
    )


def _plan(checkpoint: str | Path, dialect: str | None) -> _Plan:
    """Everything that is decided before the first file is written."""
    if is_hub_id(checkpoint):
        what = "a model on the Hub cannot be repaired in place."
        remedy = "Download it first (hf download), and give its directory."
        raise UserError(what, code="model-not-found", where=str(checkpoint), remedy=remedy)
    evidence = open_evidence(checkpoint, releases([*RELEASES]))
    for error in evidence.torn:
        raise error
    inverted = inverted_scales(evidence)
    before = without_consequences([*check_headers(evidence), *inverted])
    found = correct(evidence, before)
    hf_quant_config = read_quant_config(evidence.checkpoint.path)
    if dialect is not None and evidence.dialect != dialect:
        config, hf_quant_config = _translate(evidence, dialect, found)
    else:
        config = found.config
    changes = Changes(renamed=found.renamed, replaced=found.replaced)
    tensors = changed_tensors(evidence.checkpoint, changes)
    if len(tensors) < len(evidence.checkpoint.tensors):
        what = "two tensors would have one name."
        raise UserError(what, code="tensor-duplicate", where=str(checkpoint), remedy="Rename them by hand.")
    others = tuple(name for name in evidence.checkpoint.other_files if name not in found.left_out)
    after = replace(
        evidence,
        layout=read_layout(
            replace(evidence.checkpoint, config=config, tensors=tensors, other_files=others, missing={})
        ),
        damage=(),
        weight_map=None if evidence.weight_map is None else {name: tensor.file for name, tensor in tensors.items()},
    )
    values = [finding for finding in inverted if not found.replaced.keys() >= {*finding.places}]
    return _Plan(
        evidence=evidence,
        changes=changes,
        config=config,
        hf_quant_config=hf_quant_config,
        left_out=tuple(sorted(found.left_out)),
        dialect=after.dialect or evidence.dialect,
        before=tuple(before),
        after=tuple(without_consequences([*check_headers(after), *values])),
    )


def _translate(evidence: Evidence, dialect: str, found: Corrections) -> tuple[dict[str, Any], Mapping[str, Any] | None]:
    """Write the tensors' names and the config of the other dialect into `found`: the config, and ModelOpt's file."""
    if dialect not in (COMPRESSED, MODELOPT):
        what = f"must be {COMPRESSED} or {MODELOPT}, got {dialect!r}."
        raise UserError(what, code="option-invalid", where="dialect", remedy="Leave it out to keep the dialect.")
    if evidence.dialect not in (COMPRESSED, MODELOPT):
        what = f"the codes of {evidence.dialect or 'a 16-bit checkpoint'} have no form in the dialect {dialect}."
        raise UserError(what, code="option-conflict", where="dialect", remedy="Leave it out.")
    formats = known_formats(evidence)
    if not formats:
        what = "the format of some weight is open, so it cannot be written in another dialect."
        raise UserError(what, code="quantization-invalid", where=str(evidence.checkpoint.path), remedy="See `doctor`.")
    modules = found.modules
    for name, fmt in formats.items():
        module = evidence.modules[name]
        suffixes = needed_suffixes(evidence.layout.dialect, module, fmt)
        headers = headers_of({suffix: module.parts[suffix] for suffix in suffixes})
        for suffix, part in translated(fmt, headers, dialect, where=name).items():
            old = f"{name}.{suffix}"
            new = f"{modules.get(name, name)}.{part.suffix}"
            convert = _both(found.replaced.get(old), part.convert)
            if convert is None and (part.dtype, part.shape) == headers[suffix]:
                if new != old:
                    found.renamed[old] = new
            else:
                found.renamed.pop(old, None)
                found.replaced[old] = TensorInfo(new, part.dtype, part.shape), convert or _same
    named = {modules.get(name, name): fmt for name, fmt in formats.items()}
    ignore = [modules.get(name, name) for name in plain_linears(evidence)]
    cache = evidence.layout.dialect.kv_cache_format() is not None
    config = {key: value for key, value in found.config.items() if key not in ("compression_config", "quantization")}
    if dialect == MODELOPT:
        made, own = modelopt_config(named, ignore, cache)
        return config | {"quantization_config": made}, own
    return config | {"quantization_config": quantization_config(named, ignore, "fp8" if cache else None)}, None


def _same(raw: bytes) -> bytes:
    return raw


def _both(
    first: tuple[TensorInfo, Callable[[bytes], bytes]] | None, second: Callable[[bytes], bytes] | None
) -> Callable[[bytes], bytes] | None:
    """Both changes of a tensor's bytes, one after the other."""
    if first is None:
        return second
    once = first[1]
    return once if second is None else lambda raw: second(once(raw))


def _write_index(plan: _Plan, directory: Path) -> None:
    """The index of the new tensors, where the source had one or has several shards."""
    source = plan.evidence.checkpoint
    tensors = changed_tensors(source, plan.changes)
    names = {tensor.file for tensor in tensors.values()}
    if names == {SINGLE_NAME} and plan.evidence.weight_map is None:
        return
    text = index_text((tensor.file, tensor) for tensor in tensors.values())
    (directory / INDEX_NAME).write_text(text, encoding="utf-8")
