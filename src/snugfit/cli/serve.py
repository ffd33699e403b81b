"""`snugfit serve`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from snugfit.cli import options
from snugfit.cli.bench import lengths
from snugfit.cli.errors import VerbProgress, reporting, termination_as_interrupt
from snugfit.errors import UserError, plain
from snugfit.token_counts import parse_token_list

if TYPE_CHECKING:
    from snugfit.benchmarking.plan import BenchOptions


def serve(
    ctx: typer.Context,
    model: options.Model,
    extra: Annotated[
        list[str] | None, typer.Argument(metavar="-- OPTIONS", help="Options for the engine, which replace its flags.")
    ] = None,
    engine: Annotated[options.Engine, typer.Option(help="The engine.")] = "vllm",
    python: Annotated[
        str | None, typer.Option(metavar="PATH", help="Interpreter of the environment that has the engine.")
    ] = None,
    command: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What starts the engine instead, such as 'vllm serve'.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(metavar="NAME", help="GPU, as for fit. Default: what the driver names.")
    ] = None,
    gpu_index: Annotated[int, typer.Option(min=0, metavar="NUMBER", help="GPU of this machine.")] = 0,
    context: Annotated[
        int | None,
        typer.Option(parser=options.tokens(), metavar="TOKENS", help="Context. Default: the longest that fits."),
    ] = None,
    tensor_parallel_size: options.TensorParallelSize = 1,
    gpu_memory_utilization: options.GpuMemoryUtilization = None,
    max_num_seqs: Annotated[
        int | None, typer.Option(min=1, metavar="NUMBER", help="Sequences at once. Default: the engine's own.")
    ] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, metavar="NUMBER", help="Default: a free one.")] = None,
    start_seconds: Annotated[float, typer.Option(metavar="SECONDS", help="Longest wait for the engine.")] = 1200.0,
    language: Annotated[
        str | None, typer.Option(metavar="CODE", help="Language of the questions. Default: the model card's, or en.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep it running until Ctrl-C.")] = False,
    bench: Annotated[bool, typer.Option("--bench", help="Measure its speed, as `snugfit bench`.")] = False,
    prefill: Annotated[str | None, typer.Option(metavar="TOKENS,...", help="With --bench: prompt lengths.")] = None,
    depths: Annotated[str | None, typer.Option(metavar="TOKENS,...", help="With --bench: depths.")] = None,
    concurrency: Annotated[str | None, typer.Option(metavar="NUMBER,...", help="With --bench: users.")] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(parser=options.tokens(), metavar="TOKENS", help="With --bench: prompts of several users."),
    ] = None,
    output_tokens: Annotated[
        int | None, typer.Option(parser=options.tokens(2), metavar="TOKENS", help="With --bench: tokens of an answer.")
    ] = None,
    repeats: Annotated[int | None, typer.Option(min=1, metavar="NUMBER", help="With --bench: repeats.")] = None,
    reference: Annotated[
        Path | None, typer.Option(metavar="PATH", help="The original: evaluate the server against it.")
    ] = None,
    dataset: options.Dataset = None,
    contexts: Annotated[
        str, typer.Option("--eval-context", metavar="TOKENS,...", help="With --reference: context lengths.")
    ] = "2048",
    max_chunks: Annotated[
        int | None, typer.Option(min=1, metavar="NUMBER", help="With --reference: chunks at most.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(metavar="NAME,...", help="lm_eval tasks to run on the server.")] = None,
    output_dir: options.OptionalOutputDir = None,
    as_json: options.AsJson = False,
) -> None:
    """Start an engine on MODEL, see what it answers, measure it, and stop it.

    Flags are those that this file, GPU and context need. An engine that refuses the file is explained in plain words.
    """
    from snugfit.hosting.request import Measures, ServeOptions
    from snugfit.hosting.serve import serve as run
    from snugfit.storage.staging import check_stageable

    if output_dir is not None:
        check_stageable(output_dir, models=[model, reference])
    with termination_as_interrupt():
        record = run(
            model,
            output_dir=output_dir,
            options=ServeOptions(
                engine=engine,
                python=python,
                command=command,
                gpu=gpu,
                gpu_index=gpu_index,
                context=context,
                tensor_parallel_size=tensor_parallel_size,
                gpu_memory_utilization=gpu_memory_utilization,
                max_num_seqs=max_num_seqs,
                port=port,
                start_seconds=start_seconds,
                language=language,
                extra=extra or (),
            ),
            measures=Measures(
                bench=_bench_options(
                    bench,
                    {"prefill": prefill, "depths": depths, "concurrency": concurrency},
                    {"prompt_tokens": prompt_tokens, "output_tokens": output_tokens, "repeats": repeats},
                ),
                reference=reference,
                dataset=dataset or (),
                contexts=parse_token_list(contexts, where="contexts"),
                max_chunks=max_chunks,
                tasks=[name.strip() for name in (tasks or "").split(",") if name.strip()],
            ),
            hold=_hold if keep else None,
            progress=VerbProgress(ctx),
        )
    with reporting(output_dir):
        from snugfit.report.serve import serve_lines, serve_sheets
        from snugfit.report.terminal import print_lines, print_sheet

        if as_json:
            typer.echo(record.to_json(), nl=False)
        else:
            for sheet in serve_sheets(record):
                print_sheet(sheet)
            print_lines(*serve_lines(record))
        if output_dir is not None:
            typer.echo(f"{plain(str(output_dir))}: serve.md, serve.json, engine.log", err=True)
    if record.refusal is not None or record.stopped is not None:
        raise typer.Exit(130 if record.stopped == "interrupted" else 2)


def _hold(url: str) -> None:
    typer.echo(f"{url} serves until Ctrl-C", err=True)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        typer.echo("stopping", err=True)


def _bench_options(
    bench: bool, lists: Mapping[str, str | None], numbers: Mapping[str, int | None]
) -> BenchOptions | None:
    """The options of `bench` that are given, None without it; UserError for those that then have no effect."""
    from snugfit.benchmarking.plan import BenchOptions

    given = {name: lengths(text, name) for name, text in lists.items() if text is not None}
    chosen = {name: number for name, number in numbers.items() if number is not None}
    if not bench:
        for name in (*given, *chosen):
            raise UserError("has no effect without `bench`.", code="option-conflict", where=name)
        return None
    default = BenchOptions()
    users = given.get("concurrency")
    return BenchOptions(
        prefill=given.get("prefill"),
        depths=given.get("depths"),
        concurrency=default.concurrency if users is None else users,
        prompt_tokens=chosen.get("prompt_tokens", default.prompt_tokens),
        output_tokens=chosen.get("output_tokens", default.output_tokens),
        repeats=chosen.get("repeats", default.repeats),
    )
