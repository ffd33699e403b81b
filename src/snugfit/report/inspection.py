"""The tables of `snugfit inspect`."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

from snugfit.byte_counts import size
from snugfit.formats.spec import FORMATS, FP8_BLOCK, INT4_GROUPS
from snugfit.report.terminal import make_table, print_lines, print_sheet, print_table, safe_cell

if TYPE_CHECKING:
    from rich.table import Table

    from snugfit.records.inspection import Inspection, Part


def print_inspection(found: Inspection) -> None:
    """Print what is in a checkpoint, on one screen: sums, parts, layers, and remarks."""
    print_lines(*_summary(found), "")
    print_table(_table_of_parts(found))
    legend = [f"any of: {', '.join(FORMATS)}"] if any(part.can_be for part in found.parts) else []
    print_lines(*legend, *_shape_rules(found.parts), *[""] * bool(legend))
    sizes = "parameters each", "bytes each"
    table = make_table("layers", "what", "stored", *sizes, right=sizes)
    for run in found.layers:
        cells = safe_cell(run.what), safe_cell(", ".join(run.stored)), _count(run.parameters), size(run.bytes)
        table.add_row(ranges(run.layers), *cells)
    print_table(table)
    print_lines(*_remarks(found))
    _print_calibration(found)


def _table_of_parts(found: Inspection) -> Table:
    columns = ("part", "names", "weights", "shape", "stored", "parameters", "bytes", "share", "could be")
    table = make_table(*columns, right=("weights", "parameters", "bytes", "share"))
    last = ""
    for part in _merged(found.parts):
        names = ", ".join(part.names[:4]) + (", …" if len(part.names) > 4 else "")
        stored = ", ".join(part.stored[:3]) + (", …" if len(part.stored) > 3 else "")
        shape = "x".join(map(str, part.shape)) if len(part.shape) > 1 else "many" * bool(part.names and not part.shape)
        share = f"{100 * part.bytes / max(found.bytes, 1):.1f} %"
        cells = (names, f"{part.weights:,}", shape, stored, _count(part.parameters), size(part.bytes), share)
        table.add_row(part.part if part.part != last else "", *map(safe_cell, cells), safe_cell(_prospects(part)))
        last = part.part
    return table


def _shape_rules(parts: tuple[Part, ...]) -> list[str]:
    """What the formats that some weight cannot have ask of a weight's shape."""
    missing = {name for part in parts for name in part.cannot_be or {}}
    rules = []
    for name in FORMATS:
        if name in missing:
            multiple = FORMATS[name].in_features_multiple or min(INT4_GROUPS)
            both = f"out_features divisible by {FP8_BLOCK} and " if name == "fp8-block" else ""
            rules.append(f"{name} needs {both}in_features divisible by {multiple}")
    return rules


def _print_calibration(found: Inspection) -> None:
    """Print how many tokens experts saw, and the largest outliers among inputs."""
    from snugfit.report.outliers import sheet_of_coverage, sheet_of_outliers

    if found.calibration is None:
        return
    sheets = [sheet_of_coverage(found.calibration.coverage, narrow=True)] if found.calibration.coverage else []
    for sheet in (*sheets, sheet_of_outliers(found.calibration.outliers, narrow=True)):
        print_lines("")
        print_sheet(sheet)


def _summary(found: Inspection) -> list[str]:
    a = found.architecture
    kinds = ", ".join([*a.architectures, *([a.model_type] if a.model_type else [])])
    commit = f" at commit {found.revision[:12]}" if found.revision else ""
    active = f", {_count(found.active_parameters)} active a token" if found.active_parameters else ""
    predicting = f" (and {_count(found.prediction_parameters)} of multi-token prediction)"
    more = predicting if found.prediction_parameters else ""
    bits = 8 * found.bytes / max(found.parameters + found.prediction_parameters, 1)
    where = f"{size(found.bytes)} in {found.files:,} file{'s' * (found.files > 1)}, {found.tensors:,} tensors"
    where += f", {bits:.2f} bits a parameter"
    heads = f"{a.heads} heads" if a.heads else ""
    if a.kv_heads:
        heads += f", {a.kv_heads} KV head{'s' * (a.kv_heads > 1)}"
    heads += f" of {a.head_dim}" if a.head_dim else f", {a.latent} values cached a token (MLA)" if a.latent else ""
    experts = f"{a.experts} experts" if a.experts else ""
    experts += f", {a.active_experts} a token" if a.experts and a.active_experts else ""
    experts += f", {a.shared_experts} shared" if a.experts and a.shared_experts else ""
    facts = [
        f"{a.layers} layers",
        f"hidden {a.hidden_size:,}" if a.hidden_size else "",
        *(heads, experts),
        f"vocabulary {a.vocabulary:,}" + " (tied embeddings)" * a.tied_embeddings if a.vocabulary else "",
        f"context {a.context:,}" if a.context else "",
        f"sliding window {a.sliding_window:,}" if a.sliding_window else "",
        str(a.dtype) if a.dtype else "",
    ]
    lines = [
        f"{found.model}{commit} ({kinds})",
        f"{_count(found.parameters)} parameters{active}{more}; {where}",
        "; ".join(fact for fact in facts if fact),
    ]
    return [*lines, *_quantized(found), *_calibrated(found)]


def _calibrated(found: Inspection) -> list[str]:
    from snugfit.report.outliers import coverage_words

    c = found.calibration
    if c is None:
        return []
    seen = f"{coverage_words(c.coverage)}; " if c.coverage else ""
    sources = ", ".join(c.sources[:3]) + (", …" if len(c.sources) > 3 else "")
    return [
        f"calibrated: {seen}{c.num_samples:,} sample{'s' * (c.num_samples != 1)} of {c.tokens:,} tokens ({sources})"
    ]


def _quantized(found: Inspection) -> list[str]:
    q = found.quantization
    if q is None:
        return []
    settings = ", ".join(f"{key} {value}" for key, value in q.settings.items() if key != "quant_method")
    lines = [f"quantized: {q.method or 'no method named in the config'}" + f" ({settings[:150]})" * bool(settings)]
    stored = ", ".join(f"{count:,} {label}" for label, count in q.weights.items())
    cache = f"; KV cache {q.kv_cache}" if q.kv_cache else ""
    if not q.has_reader:
        verdict = f"snugfit cannot read it: {q.refused.rstrip('.')}"
    else:
        verdict = "config and tensors " + ("disagree" if q.refused else "agree")
    return [*lines, f"matrices: {stored}{cache}; {verdict}"]


def _remarks(found: Inspection) -> list[str]:
    whole = [
        f"{' + '.join(group.members)} x {group.complete:,}"
        + f" (not {', '.join(group.cannot_be)})" * bool(group.cannot_be and group.cannot_be != tuple(FORMATS))
        for group in found.fused
        if group.complete
    ]
    lines = ["", f"fused in engines, so of one format: {'; '.join(whole)}"] if whole else []
    for group in found.fused:
        if group.incomplete:
            count = len(group.incomplete)
            modules = f"{count:,} modules: {group.incomplete[0]}, …" if count > 1 else group.incomplete[0]
            lines.append(f"of {' + '.join(group.members)} some are missing in {modules}")
    if found.architecture.prediction_layers and not found.prediction_parameters:
        count = found.architecture.prediction_layers
        lines.append(f"config.json states {count} layers of multi-token prediction, the files have none")
    if found.other_weights:
        lines.append(f"weights in other containers: {', '.join(found.other_weights[:6])}")
    if found.made_by:
        lines.append(f"made by {found.made_by}")
    return [*lines, *found.remarks, *(f"problem: {problem}" for problem in found.problems)]


def _merged(parts: tuple[Part, ...]) -> list[Part]:
    """The table's rows: weights of a part with more than six shapes share a row where their prospects are the same."""
    rows: dict[object, list[Part]] = {}
    for part in parts:
        alike = sum(p.part == part.part for p in parts)
        key = (part.part, part.stored, part.can_be, part.stays, alike > 6 or part.shape)
        rows.setdefault(key, []).append(part)
    return [row[0] if len(row) == 1 else _sum_of(row) for row in rows.values()]


def _sum_of(parts: list[Part]) -> Part:
    names = tuple(dict.fromkeys(name for part in parts for name in part.names))
    shape = parts[0].shape if len({part.shape for part in parts}) == 1 else ()
    counts = {key: sum(getattr(part, key) for part in parts) for key in ("weights", "parameters", "bytes")}
    return replace(parts[0], names=names, shape=shape, **counts)


def _prospects(part: Part) -> str:
    if part.stays:
        return f"stays: {part.stays}"
    missing = [name for name in FORMATS if name in (part.cannot_be or {})]
    group = next((label for label in part.can_be if label.startswith("int4-g") and label != "int4-g128"), "")
    if len(missing) > len(FORMATS) // 2:
        return ", ".join(part.can_be) or "nothing"
    return (
        f"any{', expert by expert' * bool(part.single)}"
        + f" but {', '.join(missing)}" * bool(missing)
        + f" ({group})" * bool(group)
    )


def ranges(numbers: tuple[int, ...]) -> str:
    """Ascending numbers in short: 0-2, 5; or 3, 7, … 47 where they are evenly spaced."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    if len(texts) <= 6:
        return ", ".join(texts)
    even = len({b[0] - a[0] for a, b in pairwise(runs)}) == 1
    return f"{texts[0]}, {texts[1]}, … {texts[-1]}" + ("" if even else f" ({len(numbers)} in all)")


def _count(number: int) -> str:
    for factor, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= factor:
            return f"{number / factor:.1f}{unit}"
    return str(number)
