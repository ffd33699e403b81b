"""Will this file load, and will it tell the truth: faults of a checkpoint, from headers, values, and its base.

Headers come first and need no torch. Values are read one tensor at a time, some output features at once. Of a model on
the Hub both are read by range.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from snugfit.arguments import as_sequence
from snugfit.engines.releases import ENGINES, RELEASES, EngineRelease
from snugfit.errors import UserError
from snugfit.inspection.checks import agreement, cache, config, files, groups, hardware, places, texts
from snugfit.inspection.evidence import Evidence, read_weight_map, releases
from snugfit.model.layout import ModelLayout, read_layout
from snugfit.progress import SILENT, Progress
from snugfit.records.doctor import DoctorRecord, Finding
from snugfit.storage.lenient import open_hub_leniently, open_leniently
from snugfit.storage.open import fetch_small_files, is_hub_id, open_headers
from snugfit.vram.budget import Gpu
from snugfit.vram.request import parse_gpu

Check = Callable[[Evidence], Iterator[Finding]]
# the order of a report
CHECKS: tuple[Check, ...] = (
    files.damaged_files,
    files.wrong_index,
    files.files_beside,
    config.contradictions,
    config.unknown_fields,
    config.removed_orders,
    config.overlapping_targets,
    config.lookups,
    config.unmatched,
    agreement.undeclared,
    agreement.formats,
    agreement.scales,
    agreement.extra_scales,
    groups.fused_formats,
    groups.experts,
    groups.expert_names,
    groups.stacked_codes,
    groups.single_experts,
    places.plain_places,
    places.embeddings,
    places.output_head,
    places.prediction,
    cache.cache_scales,
    hardware.kernels,
    hardware.shapes,
    texts.tokenizer,
    texts.special_tokens,
)
# errors of opening a checkpoint that are findings: its files are there, and damaged
_DAMAGE = frozenset({"weights-missing", "header-invalid", "file-damaged", "index-invalid", "tensor-duplicate"})
# faults of a file whose tensors are not all there
_OF_ABSENCE = frozenset(
    {
        *("config-mismatch", "config-stale", "layers-missing", "experts-missing", "scale-missing", "tensor-lost"),
        *("scale-extra", "target-unmatched", "ignore-unmatched"),
    }
)
# faults that make others certain, which are then not reported
_HIDES: dict[str, frozenset[str]] = {
    "config-stale": frozenset({"scale-extra"}),
    "experts-unread": frozenset({"target-not-looked-up", "expert-scales-unread"}),
    "experts-mixed": frozenset({"fused-formats-differ", "ignore-incomplete", "target-not-looked-up"}),
    "experts-stacked": frozenset({"target-unmatched", "scale-extra"}),
    "embeddings-quantized": frozenset({"target-missing"}),
    "unquantized-by-engine": frozenset({"target-missing"}),
    "prediction-quantized": frozenset({"target-missing"}),
    "quantization-undeclared": frozenset({"scale-extra", "experts-stacked"}),
    "shard-missing": _OF_ABSENCE,
    "shard-damaged": _OF_ABSENCE,
}


def doctor(
    checkpoint: str | Path,
    *,
    base: str | Path | None = None,
    values: str | None = None,
    gpu: str | None = None,
    engine: str | Sequence[str] = (),
    tensor_parallel_size: int = 1,
    progress: Progress = SILENT,
) -> DoctorRecord:
    """Faults of a checkpoint, a directory or a Hub id, by any tool.

    Reads headers and config; with `values` "sample" or "all" also the values of some or all weights; with `base`, the
    model that it was made of, compares with that (then `values` is "all" unless it says otherwise). Only faults that
    concern one of `engine` are reported ("vllm": all its releases that are known here; default: all engines). `gpu` and
    `tensor_parallel_size` add what kernels refuse there. UserError for invalid arguments, and where there is no
    checkpoint to look at; damage is a finding.
    """
    how = _values(values, base)
    names = _engines(as_sequence(engine))
    if tensor_parallel_size < 1:
        what = f"must be >= 1, got {tensor_parallel_size}."
        raise UserError(what, code="option-invalid", where="tensor_parallel_size", remedy="The minimum is 1.")
    card = None if gpu is None else parse_gpu(gpu)
    original = None if base is None else read_layout(base)
    evidence = open_evidence(checkpoint, names, card, tensor_parallel_size)
    found = list(check_headers(evidence))
    read = compared = 0
    errors: tuple[tuple[str, int, float, float, str], ...] = ()
    if how != "none" and not evidence.torn:
        more, read = _check_values(evidence, how, progress)
        found += more
    if original is not None and not evidence.torn:
        more, compared, errors = _check_base(evidence, original, how, progress)
        found += more
    layout = evidence.layout
    return DoctorRecord(
        model=layout.checkpoint.name if layout.checkpoint.remote else str(checkpoint),
        revision=layout.checkpoint.remote.revision if layout.checkpoint.remote else None,
        method=layout.method,
        formats=dict(Counter(groups.stored_as(m) for m in evidence.modules.values() if m.stored).most_common()),
        engines=evidence.affected(),
        gpu=None if card is None else card.title,
        tensor_parallel_size=tensor_parallel_size,
        values=how,
        base=None if base is None else str(base),
        tensors=len(layout.checkpoint.tensors),
        values_read=read,
        compared=compared,
        errors=errors,
        findings=tuple(finding.listed() for finding in without_consequences(found)),
        not_checked=tuple(_not_checked(evidence, how, original)),
    )


def check_headers(evidence: Evidence) -> Iterator[Finding]:
    """Every finding that headers, config and small files give, in the order of a report."""
    for check in CHECKS:
        yield from check(evidence)


def check_files(directory: Path, *, small_files: bool = True) -> tuple[Finding, ...]:
    """What the header checks find in a directory, for all engines: `quantize` ends with this."""
    evidence = open_evidence(directory, releases([*RELEASES]), small_files=small_files)
    return tuple(without_consequences(check_headers(evidence)))


def check_layout(layout: ModelLayout) -> tuple[Finding, ...]:
    """As `check_files`, of a model whose layout is read already: `fit` ends with this."""
    index = read_weight_map(layout.checkpoint)
    evidence = Evidence(layout=layout, engines=releases([*RELEASES]), weight_map=index, small_files=False)
    return tuple(without_consequences(check_headers(evidence)))


def inverted_scales(evidence: Evidence) -> list[Finding]:
    """Global scales that are the wrong way round, where the file has NVFP4; reads these scales alone."""
    if not any(m.asked is not None and m.asked.name.startswith("nvfp4") for m in evidence.quantized.values()):
        return []
    from snugfit.inspection.checks import values

    found = values.survey(evidence, "globals")
    return [one for one in values.global_scales(evidence, found) if one.fault == "global-scale-inverted"]


def without_consequences(findings: Iterable[Finding]) -> list[Finding]:
    """The findings without those that another one makes certain."""
    found = list(findings)
    hidden: dict[str, set[str]] = {}  # fault -> engines for which another one makes it certain
    for finding in found:
        for fault in _HIDES.get(finding.fault, ()):
            hidden.setdefault(fault, set()).update(finding.affected)
    return [
        finding for finding in found if finding.fault not in hidden or set(finding.affected) - hidden[finding.fault]
    ]


def open_evidence(
    checkpoint: str | Path,
    names: tuple[EngineRelease, ...],
    gpu: Gpu | None = None,
    tp: int = 1,
    *,
    small_files: bool = True,
) -> Evidence:
    """The evidence of a directory, damaged or not, or of a model on the Hub; UserError where there is none."""
    damage: tuple[tuple[str, UserError], ...] = ()
    opened = None
    try:
        opened = open_headers(checkpoint)
    except UserError as error:
        if error.code not in _DAMAGE:
            raise
    if opened is not None:
        weight_map = read_weight_map(opened)
    else:
        of_hub = is_hub_id(checkpoint)
        leniently = open_hub_leniently(str(checkpoint)) if of_hub else open_leniently(Path(checkpoint))
        opened, damage, weight_map = leniently.checkpoint, leniently.damage, leniently.weight_map
    if small_files and opened.remote is not None:
        fetch_small_files(opened, texts.READ, limit=texts.MAX_BYTES)
    return Evidence(
        layout=read_layout(opened),
        engines=names,
        damage=damage,
        weight_map=weight_map,
        gpu=gpu,
        tensor_parallel_size=tp,
        small_files=small_files,
    )


def _values(values: str | None, base: str | Path | None) -> str:
    if values is None:
        return "none" if base is None else "all"
    if values not in ("none", "sample", "all"):
        what = f"must be none, sample or all, got {values!r}."
        raise UserError(what, code="option-invalid", where="values", remedy="Leave it out to read headers alone.")
    if values == "none" and base is not None:
        what = "a comparison with `base` reads values."
        raise UserError(what, code="option-conflict", where="values", remedy="Give `values=sample` or `values=all`.")
    return values


def _engines(asked: Sequence[str | Path]) -> tuple[EngineRelease, ...]:
    names = [str(name) for name in asked] or list(ENGINES)
    unknown = next((name for name in names if name not in ENGINES), None)
    if unknown is not None:
        remedy = f"Known engines: {', '.join(ENGINES)}."
        raise UserError(f"unknown engine {unknown!r}.", code="option-invalid", where="engine", remedy=remedy)
    return releases([release for name in names for release in ENGINES[name]])


def _check_values(evidence: Evidence, how: str, progress: Progress) -> tuple[list[Finding], int]:
    from snugfit.inspection.checks import values

    found = values.survey(evidence, how, progress)
    checks = (values.broken_scales, values.global_scales, values.shared_scales, values.cache_values)
    return [one for check in checks for one in check(evidence, found)], len(found.weights) + len(found.plain)


def _check_base(
    evidence: Evidence, original: ModelLayout, how: str, progress: Progress
) -> tuple[list[Finding], int, tuple[tuple[str, int, float, float, str], ...]]:
    from snugfit.inspection.checks import base

    found = [*base.configs(evidence, original), *base.files(evidence, original)]
    pair = base.Pair(evidence, original)
    compared = base.compare_weights(pair, how, progress)
    return [*found, *base.judged(evidence, pair, compared)], compared.count, base.summarized(compared)


def _not_checked(evidence: Evidence, how: str, base: ModelLayout | None) -> Iterator[str]:
    layout = evidence.layout
    refused = {module.refused for module in evidence.modules.values() if module.refused and module.stored}
    if layout.unreadable is not None and layout.unreadable.code == "quantization-unknown":
        yield f"scales and formats: {layout.unreadable.what}"
    yield from sorted(f"weights in a format without a reader: {what}" for what in refused)
    if how == "none":
        yield "values: `values` finds scales that are zero, NaN, defaults or upside down"
    elif how == "sample":
        yield "values of weights outside the sample"
    if evidence.torn:
        yield "values, because shards are damaged"
    if base is None:
        yield "the original: `base` compares with it"
    if evidence.gpu is None:
        yield "kernels: `gpu` says which of them run"
