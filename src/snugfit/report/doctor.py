"""What `doctor` and `repair` print: findings in words, and as annotations of GitHub Actions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from snugfit.errors import plain
from snugfit.report.terminal import make_table, print_lines, print_table, safe_cell

if TYPE_CHECKING:
    from snugfit.records.doctor import DoctorRecord, Finding, RepairRecord

_WORDS = {"sound": "sound", "will not load": "it will not load", "will lie": "it loads, and computes something else"}
_LEVELS = {"will not load": "error", "will lie": "error", "note": "notice"}
_EVERY = 3  # engines by name, before they are called all


def print_diagnosis(record: DoctorRecord) -> None:
    """Print the verdict, each finding, and what was not checked."""
    formats = ", ".join(f"{count} {label}" for label, count in record.formats.items()) or "16 bits"
    method = f", {record.method}" if record.method else ""
    print_lines(f"{record.model}: {record.tensors:,} tensors, weights: {formats}{method}", "")
    for finding in record.findings:
        print_lines(*_described(finding, len(record.engines)), "")
    if record.errors:
        columns = ("weights", "median error", "largest error")
        table = make_table("format, against the base", *columns, "of", right=columns)
        for label, count, median, largest, name in record.errors:
            table.add_row(safe_cell(label), f"{count:,}", f"{median:.4f}", f"{largest:.4f}", safe_cell(name))
        print_table(table)
        print_lines("")
    print_lines(*(f"not checked: {_as_options(what)}" for what in record.not_checked))
    notes = sum(finding.severity == "note" for finding in record.findings)
    more = f" ({notes} note{'s' if notes > 1 else ''})" if notes else ""
    print_lines(f"verdict: {_WORDS[record.verdict]}{more}")


def _as_options(text: str) -> str:
    """Parameters in backticks as options of the verb."""
    for name in ("values", "base", "gpu"):
        text = text.replace(f"`{name}`", f"--{name}")
    return text


def _described(finding: Finding, engines: int) -> Iterator[str]:
    yield f"[{finding.severity}] {finding.fault}: {finding.where}{_more(finding)}"
    yield f"    {finding.what}"
    whom = "all engines" if len(finding.affected) == engines > _EVERY else ", ".join(finding.affected)
    yield f"    affected: {whom}"
    yield f"    remedy: {_remedy(finding)}"


def _more(finding: Finding) -> str:
    return f" and {finding.count - 1:,} more" if finding.count > 1 else ""


def _remedy(finding: Finding) -> str:
    text = finding.remedy.replace("`repair`", "`snugfit repair`").replace("`evaluate`", "`snugfit eval`")
    return text if finding.repairable or "repair" not in text else "`snugfit repair` cannot correct this one."


def print_annotations(record: DoctorRecord) -> None:
    """Print one workflow command of GitHub Actions for each finding, and the verdict as a line."""
    for finding in record.findings:
        title = _escaped(f"{finding.fault} ({finding.severity})", in_property=True)
        place = _escaped(finding.where, in_property=True)
        body = f"{finding.where}{_more(finding)}: {finding.what} {_remedy(finding)} [{', '.join(finding.affected)}]"
        print_lines(f"::{_LEVELS[finding.severity]} file={place},title={title}::{_escaped(body)}")
    print_lines(f"{record.model}: {record.verdict}")


def _escaped(text: str, *, in_property: bool = False) -> str:
    """Text of a workflow command: percent signs and line ends, in a property also colons and commas, are encoded."""
    found = plain(text).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return found.replace(":", "%3A").replace(",", "%2C") if in_property else found


def print_repair(record: RepairRecord) -> None:
    """Print what was corrected, what is left, and what became of the files."""
    for finding in record.repaired:
        print_lines(f"repaired: {finding.fault}: {finding.where}{_more(finding)}")
    for finding in record.left:
        print_lines(f"left: {finding.fault}: {finding.where}: {finding.what}")
    print_lines(
        f"dialect: {record.dialect or 'none'}; {record.renamed:,} tensors renamed; {len(record.rewritten)} shards "
        f"written anew, {len(record.linked)} files linked"
    )
    print_lines(*(f"not taken over: {name}" for name in record.left_out))
