"""The command line of `snugfit statistics`: collect, show, merge."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from snugfit.cli.errors import calibration_of, kept_layers, plain_errors, reporting
from snugfit.data.rows import DEFAULT_LENGTH, DEFAULT_ROWS
from snugfit.errors import plain
from snugfit.records.statistics_file import FORCED_TOKENS, LEAST_TOKENS

if TYPE_CHECKING:
    from snugfit.records.statistics_file import Statistics

app = typer.Typer(help="What calibration sees: measure it, look at it, merge it.", no_args_is_help=True)


@app.command(name="collect")
def collect(
    model: Annotated[Path, typer.Argument(help="Directory with config.json and safetensors weights, or a Hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New directory for statistics, tables and plots.")],
    text: Annotated[
        list[Path] | None, typer.Option(help="Text or JSONL to walk. Default: Python's documentation.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Rows of tokens at most.")] = DEFAULT_ROWS,
    length: Annotated[int, typer.Option(help="Tokens a row at most.")] = DEFAULT_LENGTH,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda where there is one.")] = None,
    tokens_per_batch: Annotated[int | None, typer.Option(help="Tokens in one forward pass.")] = None,
    experts: Annotated[str, typer.Option(help="What experts see: all tokens, or those routed to them.")] = "all",
    forced_tokens: Annotated[
        int, typer.Option(help="Tokens at most that an expert gets beside those routed to it, a layer.")
    ] = FORCED_TOKENS,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew where a run was stopped.")] = False,
    resume_anyway: Annotated[
        bool, typer.Option("--resume-anyway", help="Go on under another machine, library version or batch.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the statistics as one JSON document.")] = False,
) -> None:
    """Measure the inputs of every linear of MODEL, and what its experts see, without a recipe."""
    with plain_errors(kept_layers(output)):
        from snugfit.quantization.collect import collect_statistics

        found = collect_statistics(
            model,
            output,
            text=text or (),
            rows=rows,
            length=length,
            device=device,
            tokens_per_batch=tokens_per_batch,
            calibration=calibration_of(experts, forced_tokens, LEAST_TOKENS),
            restart=restart,
            resume_anyway=resume_anyway,
            progress=True,
            tell=lambda words: typer.echo(words, err=True),
        )
    with reporting(output):
        _print_statistics(found, as_json=as_json)


@app.command(name="show")
def show_statistics(
    file: Annotated[Path, typer.Argument(help="A file of statistics, or a directory that has one.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="New directory for tables and plots.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the statistics as one JSON document.")] = False,
) -> None:
    """Print spikes, and what experts were calibrated on."""
    with plain_errors():
        from snugfit.records.statistics_file import load_statistics

        found = load_statistics(file)
        if output is not None:
            from snugfit.report.outliers import write_spikes
            from snugfit.storage.staging import staged

            with staged(output) as folder:
                write_spikes(found, folder)
        _print_statistics(found, as_json=as_json)


@app.command(name="merge")
def merge(
    files: Annotated[list[Path], typer.Argument(help="Files of one model, measured on different rows.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New file for all of them together.")],
) -> None:
    """Join statistics of one model, as if all rows had been walked in one run."""
    with plain_errors():
        from snugfit.records.statistics_file import load_statistics, merge_statistics, save_statistics

        found = merge_statistics([(str(file), load_statistics(file)) for file in files])
        save_statistics(found, output)
        rows = sum(one.rows for one in found.rows)
        typer.echo(f"{plain(str(output))}: {len(files)} files, {rows} rows, {found.tokens:,} tokens")


def _print_statistics(found: Statistics, *, as_json: bool) -> None:
    if as_json:
        typer.echo(found.to_json(), nl=False)
        return
    from snugfit.report.outliers import coverage_sheet, spike_sheet
    from snugfit.report.terminal import print_sheet

    if any(layer.experts for layer in found.layers.values()):
        print_sheet(coverage_sheet(found))
    print_sheet(spike_sheet(found, narrow=True))
