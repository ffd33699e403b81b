"""The command line: one file a verb, heavy imports only when a verb runs. stdout is the result, stderr progress."""

from __future__ import annotations

from typing import Annotated

import typer

from snugfit.cli import (
    bench,
    compare,
    dataset,
    doctor,
    evaluate,
    fit,
    inspect,
    plan,
    push,
    quantize,
    recipes,
    report,
    serve,
    statistics,
    tasks,
)
from snugfit.cli.errors import Verbs
from snugfit.version import __version__

app = typer.Typer(cls=Verbs, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"snugfit {__version__}")
        raise typer.Exit


@app.callback()
def main(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Make a language model fit the GPU you have, in formats that vLLM, SGLang and transformers run."""


app.command()(inspect.inspect)
app.command()(fit.fit)
app.command()(plan.plan)
app.command()(doctor.doctor)
app.command()(doctor.repair)
app.command()(quantize.quantize)
app.command(name="eval")(evaluate.evaluate)
app.command()(tasks.tasks)
app.command()(compare.compare)
app.command()(serve.serve)
app.command()(bench.bench)
app.add_typer(dataset.app, name="dataset")
app.add_typer(statistics.app, name="statistics")
app.command()(recipes.recipes)
app.command()(report.report)
app.command()(push.push)
