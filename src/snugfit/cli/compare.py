"""`snugfit compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from snugfit.cli import options
from snugfit.cli.errors import reporting


def compare(
    a: Annotated[
        Path, typer.Argument(metavar="A", help="A result of `snugfit eval` or `snugfit tasks`: its directory or JSON.")
    ],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another result, on the same texts or tasks.")],
    model_a: Annotated[str | None, typer.Option(metavar="NAME", help="Which model of A, if it holds several.")] = None,
    model_b: Annotated[str | None, typer.Option(metavar="NAME", help="Which model of B, if it holds several.")] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option("--output-dir", "-o", metavar="PATH", help="New directory for compare.json, .csv and .md."),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Test whether two results differ.

    Paired, item by item and chunk by chunk; p values are corrected for their number.
    """
    from snugfit.evaluation.compare import compare as run
    from snugfit.evaluation.compare import write_comparison
    from snugfit.report.comparison import comparison_markdown
    from snugfit.storage.staging import check_stageable

    if output_dir is not None:
        check_stageable(output_dir)
    record = run(a, b, model_a=model_a, model_b=model_b)
    if output_dir is not None:
        write_comparison(record, output_dir)
    with reporting(output_dir):
        typer.echo(record.to_json() if as_json else comparison_markdown(record), nl=False)
