"""`make_report`: from the records of runs to tables, plots, a model card and a page, in a new directory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from snugfit.arguments import as_sequence
from snugfit.progress import SILENT, Progress
from snugfit.publishing.benchmarks import write_hub_results
from snugfit.publishing.collect import collect
from snugfit.publishing.metadata import hub_metadata, unknown_metadata
from snugfit.records.report import REPORT_FILE, ReportRecord, ReportSource
from snugfit.report.card import PAGE, card
from snugfit.report.collection import Collection
from snugfit.report.figures import figures_of
from snugfit.report.page import page
from snugfit.report.plots import Plot, draw
from snugfit.report.report_tables import tables_of
from snugfit.report.table import Table
from snugfit.storage.model_card import CARD
from snugfit.storage.shards import file_digests
from snugfit.storage.staging import LOCK_NAME, check_stageable, staged
from snugfit.version import __version__


def make_report(
    runs: str | Path | Sequence[str | Path],
    *,
    output_dir: str | Path,
    base_model: str | None = None,
    license: str | None = None,  # noqa: A002  # the Hub's name of it
    quantized_by: str | None = None,
    repo: str | None = None,
    progress: Progress = SILENT,
) -> ReportRecord:
    """Make tables, plots, a model card and a page of the records in `runs`, in the new directory `output_dir`.

    `runs` are directories and files that `quantize`, `evaluate`, `run_tasks`, `compare`, `bench`, `serve`, `fit` and
    `collect_statistics` wrote; all must be of one original model. The first checkpoint is the one whose card it is;
    without a record of `quantize` there is no card. `base_model` is the original's id on the Hub, `license` the id of
    its license, `quantized_by` a name on the Hub, `repo` the repository to publish in, whose name commands then have;
    what neither these nor a record state is left out of the card, and listed in the result's `unknown`.

    The directory appears whole or not at all. UserError for records that are damaged, changed after they were
    written, of another version, or of different models.
    """
    places = as_sequence(runs)
    check_stageable(Path(output_dir), models=places)
    found = collect(places)
    given = {"base_model": base_model, "license": license, "quantized_by": quantized_by, "repo": repo}
    hub = hub_metadata(found, base_model=base_model, license_id=license, quantized_by=quantized_by, repo=repo)
    found = replace(found, hub=hub)
    tables, plots = tables_of(found), figures_of(found)
    with staged(Path(output_dir)) as folder:
        _write(found, tables, plots, folder, progress)
        names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
        one = found.checkpoint
        record = ReportRecord(
            snugfit=__version__,
            arguments={"runs": [str(place) for place in places], **given},
            model=found.title,
            checkpoint_digest=next((s.digest for s in found.sources if s.schema.startswith("snugfit.quantize/")), None)
            if one is not None
            else None,
            sources=tuple(ReportSource(file=s.file, schema=s.schema, digest=s.digest) for s in found.sources),
            files=file_digests(folder, [name for name in names if name != LOCK_NAME]),
            unknown=unknown_metadata(hub) if one is not None else (),
        )
        (folder / REPORT_FILE).write_text(record.to_json(), encoding="utf-8")
    return record


def _write(found: Collection, tables: Sequence[Table], plots: Sequence[Plot], folder: Path, progress: Progress) -> None:
    """Every file of the report but its record."""
    for name in ("tables", "plots"):
        (folder / name).mkdir()
    for table in tables:
        for ending, text in _texts(table):
            (folder / "tables" / f"{table.name}.{ending}").write_text(text, encoding="utf-8")
    with progress.bar(len(plots), "plots") as advance:
        for plot in plots:
            draw(plot, folder / "plots")
            advance()
    (folder / PAGE).write_text(page(found, tables, plots), encoding="utf-8")
    if found.checkpoint is None:
        progress.message("no model card: none of the runs has a record of `quantize`")
        return
    (folder / CARD).write_text(card(found, tables, plots), encoding="utf-8")
    write_hub_results(found, folder)


def _texts(table: Table) -> Iterator[tuple[str, str]]:
    """Endings of a table's files, and their texts."""
    yield "md", f"# {table.title}\n\n{table.to_markdown()}\n\n{table.note}".rstrip() + "\n"
    yield "csv", table.to_csv()
    yield "json", json.dumps(table.to_document(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
