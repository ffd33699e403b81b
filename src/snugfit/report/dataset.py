"""Tables of `snugfit dataset`, from its records alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from snugfit.errors import plain
from snugfit.report.tables import Sheet
from snugfit.report.terminal import make_table, print_lines, print_sheet, print_table

if TYPE_CHECKING:
    from snugfit.records.dataset import DatasetComparison, DatasetRecord, LinearComparison, Share

_WORST = 8  # linears that are named
_MIN_TOKENS = 32  # of an expert that counts as covered


def print_sets(pairs: Sequence[tuple[str, str]]) -> None:
    """Print the names and descriptions of sets."""
    table = make_table("set", "what it holds")
    for name, description in pairs:
        table.add_row(name, description)
    print_table(table)


def print_dataset(record: DatasetRecord) -> None:
    """Print what a dataset gives a model, on one screen, then two samples."""
    print_lines(
        f"{plain(record.source)}: {record.num_samples} samples, {record.tokens:,} tokens for {plain(record.model)}",
        f"digest {record.digest}",
        "",
    )
    print_sheet(_sources(record))
    if len(record.categories) > 1:
        print_sheet(_shares("Categories", "category", record.categories))
    if len(record.languages) > 1:
        print_sheet(_shares("Languages, as the set says", "language", record.languages))
    if record.scripts:
        shown = [f"{name} {100 * share:.1f} %" for name, share in record.scripts.items() if share >= 0.0005]
        print_lines(f"Letters: {', '.join(shown)}", "")
    print_sheet(_positions(record))
    if record.repeated:
        print_lines(f"{record.repeated} samples repeat earlier ones", "")
    if record.held_out is not None:
        out = record.held_out
        share = f"{out.num_samples} samples, {out.tokens:,} tokens ({out.percent:g} % of every source)"
        print_lines(f"held out: {share}, digest {out.digest}", f"the others: digest {out.kept_digest}", "")
    for number, example in enumerate(record.examples, 1):
        print_lines(f"--- sample {number}", *(plain(line) for line in example.splitlines()), "")


def _sources(record: DatasetRecord) -> Sheet:
    rows = []
    for use in record.sources:
        name = use.dataset + (f" ({use.subset})" if use.subset else "")
        skipped = sum(use.skipped.values())
        rows.append((plain(name), str(use.samples), f"{use.tokens:,}", str(skipped) if skipped else ""))
    notes = [
        f"{plain(use.dataset)}: {count} skipped: {plain(reason)}"
        for use in record.sources
        for reason, count in use.skipped.items()
    ]
    notes += [f"{plain(use.dataset)} is at commit {use.revision}" for use in record.sources if use.revision]
    headings = ("source", "samples", "tokens", "skipped")
    return Sheet("Sources", headings, tuple(rows), note="\n".join(notes))


def _shares(title: str, name: str, shares: Sequence[Share]) -> Sheet:
    rows = tuple((plain(one.name), f"{one.samples}", f"{100 * one.share:.2f} %", f"{one.tokens:,}") for one in shares)
    return Sheet(title, (name, "samples", "share", "tokens"), rows)


def _positions(record: DatasetRecord) -> Sheet:
    rows = tuple((f"{one.first}..{one.last}", str(one.samples), f"{one.tokens:,}") for one in record.positions)
    low, quarter, half, three, high = record.lengths
    note = (
        f"Tokens of a sample: {low} to {high}, quartiles {quarter}, {half}, {three}; at most {record.max_seq_length}."
    )
    return Sheet("Positions", ("positions", "samples that reach them", "tokens"), rows, note=note)


def print_dataset_comparison(record: DatasetComparison) -> None:
    """Print what each of two datasets leaves uncovered, and what that costs the weights."""
    for letter, one in (("A", record.a), ("B", record.b)):
        print_lines(
            f"{letter} = {plain(one.source)}: {one.num_samples} samples, {one.tokens:,} tokens, {one.digest[:16]}"
        )
    if record.shared_samples:
        print_lines(f"{record.shared_samples} samples are in both")
    print_lines("")
    print_sheet(_by_kind(record))
    print_sheet(_worst(record))
    if record.experts:
        print_sheet(_experts(record))


def _by_kind(record: DatasetComparison) -> Sheet:
    kinds: dict[str, list[LinearComparison]] = {}
    for one in record.linears:
        kinds.setdefault(_kind(one.name), []).append(one)
    rows = [_row(kind, members) for kind, members in kinds.items()]
    rows.append(_row("all", record.linears))
    headings = ("linear", "B raises", "A raises", "A on A", "B on A", "B on B", "A on B")
    note = (
        "B raises: share of input channels whose largest magnitude is higher under B than under A by a quarter.\n"
        f"A on B: mean relative error of outputs, in %, on the inputs of B, of weights in {record.format} that were"
        " quantized by what A measured."
    )
    return Sheet("What each leaves uncovered", headings, tuple(rows), note=note)


def _row(name: str, members: Sequence[LinearComparison]) -> tuple[str, ...]:
    channels = max(1, sum(one.channels for one in members))
    raised = [sum(getattr(one, f"raised_by_{side}") for one in members) / channels for side in "ba"]
    errors = []
    for key in ("a_on_a", "b_on_a", "b_on_b", "a_on_b"):
        values = [value for one in members if (value := getattr(one, f"error_{key}")) is not None]
        errors.append(f"{100 * sum(values) / len(values):.3f}" if values else "")
    return (plain(name), *(f"{100 * share:.1f} %" for share in raised), *errors)


def _worst(record: DatasetComparison) -> Sheet:
    def factor(one: LinearComparison) -> float:
        return max(one.largest_raise_a, one.largest_raise_b)

    found = sorted(record.linears, key=factor, reverse=True)[:_WORST]
    rows = tuple(
        (plain(one.name), str(one.channels), f"{one.largest_raise_b:.1f}x", f"{one.largest_raise_a:.1f}x")
        for one in found
    )
    note = "By how much one dataset raises the largest magnitude of a channel above what the other saw."
    return Sheet("Channels that differ most", ("linear", "channels", "B over A", "A over B"), rows, note=note)


def _experts(record: DatasetComparison) -> Sheet:
    rows = []
    for one in record.experts:
        a, b = one.uncovered(_MIN_TOKENS)
        rows.append((plain(one.name), str(len(one.routed_a)), _numbers(a), _numbers(b)))
    note = f"Experts that a dataset sends fewer than {_MIN_TOKENS} tokens."
    return Sheet("Experts without tokens", ("experts of", "number", "A leaves", "B leaves"), tuple(rows), note=note)


def _numbers(experts: Sequence[int]) -> str:
    shown = ", ".join(map(str, experts[:6]))
    return f"{len(experts)}" + (f" ({shown}{', …' if len(experts) > 6 else ''})" if experts else "")


def _kind(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[-3:] if "*" in parts else parts[-2:])
