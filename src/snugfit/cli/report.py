"""`snugfit report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from snugfit.cli import options
from snugfit.cli.errors import VerbProgress, as_options, option_names, reporting
from snugfit.errors import UserError, plain


def report(
    ctx: typer.Context,
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Directories and files that other verbs wrote; the checkpoint first."),
    ],
    output_dir: options.OptionalOutputDir = None,
    base_model: Annotated[
        str | None,
        typer.Option(metavar="ORG/NAME", help="The original on the Hub. Default: the record's, if from there."),
    ] = None,
    license: Annotated[  # noqa: A002  # the Hub's name of it
        str | None,
        typer.Option(metavar="ID", help="Its license, such as apache-2.0. Default: the one in the original's card."),
    ] = None,
    quantized_by: Annotated[str | None, typer.Option(metavar="NAME", help="Your name on the Hub.")] = None,
    repo: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="The repository to publish in; commands then name it.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Make a model card, a page, tables and plots of runs.

    Everything in them comes from records; what was not measured is absent.
    """
    if output_dir is None:
        remedy = "Name a new directory."
        raise UserError("an output directory is required.", code="option-missing", where="output_dir", remedy=remedy)
    from snugfit.publishing.report import make_report as run

    record = run(
        runs,
        output_dir=output_dir,
        base_model=base_model,
        license=license,
        quantized_by=quantized_by,
        repo=repo,
        progress=VerbProgress(ctx),
    )
    with reporting(output_dir):
        if as_json:
            typer.echo(record.to_json(), nl=False)
            return
        if record.unknown:
            names = option_names(ctx.command)
            options_named = as_options(", ".join(f"`{name}`" for name in record.unknown), names)
            typer.echo(f"not in the card, since nothing states it: {options_named}", err=True)
        for name in ("README.md", "index.html"):
            if name in record.files:
                typer.echo(plain(str(output_dir / name)))
        tables = sum(name.endswith(".csv") for name in record.files)
        plots = sum(name.endswith(".png") for name in record.files)
        typer.echo(
            f"{plain(str(output_dir))}: {tables} tables, {plots} plots, from {len(record.sources)} records", err=True
        )
