"""`snugfit bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from snugfit.cli import options
from snugfit.cli.errors import VerbProgress, reporting, termination_as_interrupt
from snugfit.errors import UserError, plain
from snugfit.token_counts import parse_token_list


def bench(
    ctx: typer.Context,
    server: Annotated[str | None, typer.Argument(metavar="URL", help="An OpenAI-compatible server.")] = None,
    against: Annotated[
        str | None, typer.Option(metavar="URL", help="A second server, measured in turn: gives ratios.")
    ] = None,
    prefill: Annotated[
        str | None,
        typer.Option(metavar="TOKENS,...", help="Prompt lengths, or none. Default: 512 to 32k, as the server takes."),
    ] = None,
    depths: Annotated[
        str | None,
        typer.Option(metavar="TOKENS,...", help="Prompts before one user's answer, or none. Default: 128,4k,16k."),
    ] = None,
    concurrency: Annotated[
        str, typer.Option(metavar="NUMBER,...", help="Numbers of users at once, or none.")
    ] = "1,8,40,64",
    prompt_tokens: Annotated[
        int, typer.Option(parser=options.tokens(), metavar="TOKENS", help="Prompts of several users.")
    ] = 1024,
    output_tokens: Annotated[
        int, typer.Option(parser=options.tokens(2), metavar="TOKENS", help="Tokens of an answer.")
    ] = 128,
    repeats: Annotated[int, typer.Option(min=1, metavar="NUMBER", help="Repeats of each cell, after a warm-up.")] = 5,
    server_model: Annotated[str | None, typer.Option(metavar="NAME", help="Which of the server's models.")] = None,
    against_model: Annotated[str | None, typer.Option(metavar="NAME", help="Which of the second's models.")] = None,
    server_log: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Log of the server, for the size of its KV cache.")
    ] = None,
    gpu_index: Annotated[int, typer.Option(min=0, metavar="NUMBER", help="GPU of this machine that it is on.")] = 0,
    seed: Annotated[
        int | None, typer.Option(min=0, metavar="NUMBER", help="Seed of the prompts. Default: a new one.")
    ] = None,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Longest time of a request.")] = 600.0,
    max_seconds: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Stop after this time, and keep what was measured.")
    ] = None,
    import_file: Annotated[
        Path | None,
        typer.Option(
            "--import",
            metavar="FILE",
            help="Read a result of vllm bench serve, guidellm or aiperf instead of measuring.",
        ),
    ] = None,
    output_dir: options.OptionalOutputDir = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure how fast a running server is, or two in turn.

    Prompts that no cache can know; medians with spread; errors are counted. What was measured is kept if it is stopped.
    """
    from snugfit.benchmarking.bench import bench as run
    from snugfit.benchmarking.bench import write_bench
    from snugfit.benchmarking.imported import import_bench
    from snugfit.benchmarking.plan import BenchOptions
    from snugfit.storage.staging import check_stageable

    if (server is None) == (import_file is None):
        what = "give the URL of a server, or a file to import, and not both."
        raise UserError(what, code="option-conflict" if server else "option-missing", where="server")
    if output_dir is not None:
        check_stageable(output_dir, models=[])
    if import_file is not None:
        record = import_bench(import_file)
    else:
        assert server is not None
        with termination_as_interrupt():
            record = run(
                server,
                against=against,
                options=BenchOptions(
                    prefill=lengths(prefill, "prefill"),
                    depths=lengths(depths, "depths"),
                    concurrency=lengths(concurrency, "concurrency") or (),
                    prompt_tokens=prompt_tokens,
                    output_tokens=output_tokens,
                    repeats=repeats,
                ),
                server_model=server_model,
                against_model=against_model,
                server_log=server_log,
                gpu_index=gpu_index,
                seed=seed,
                timeout=timeout,
                max_seconds=max_seconds,
                progress=VerbProgress(ctx),
            )
    if output_dir is not None:
        write_bench(record, output_dir)
    with reporting(output_dir):
        from snugfit.report.bench import bench_lines, bench_sheets
        from snugfit.report.terminal import print_lines, print_sheet

        if as_json:
            typer.echo(record.to_json(), nl=False)
        else:
            for sheet in bench_sheets(record):
                print_sheet(sheet)
            print_lines(*bench_lines(record))
        if output_dir is not None:
            typer.echo(f"{plain(str(output_dir))}: bench.md, bench.json, bench.csv", err=True)
    if not record.complete:
        typer.echo(f"snugfit: stopped early ({plain(record.stopped or '')}); the result is partial.", err=True)
        raise typer.Exit(130 if record.stopped == "interrupted" else 2)


def lengths(text: str | None, where: str) -> tuple[int, ...] | None:
    """A list of numbers, () for none, None where nothing is given; UserError for other text."""
    if text is None:
        return None
    return () if text.strip() == "none" else tuple(parse_token_list(text, where=where))
