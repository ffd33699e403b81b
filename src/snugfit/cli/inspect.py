"""`snugfit inspect`."""

from __future__ import annotations

import typer

from snugfit.cli import options
from snugfit.cli.errors import reporting


def inspect(model: options.Model, as_json: options.AsJson = False) -> None:
    """Show what MODEL holds: parts, sizes and formats.

    Also the formats that each weight can take. Reads headers only: seconds for any size.
    """
    from snugfit.inspection.inspect import inspect as run
    from snugfit.report.inspection import print_inspection

    found = run(model)
    with reporting():
        if as_json:
            typer.echo(found.to_json(), nl=False)
        else:
            print_inspection(found)
