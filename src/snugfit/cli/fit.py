"""`snugfit fit`."""

from __future__ import annotations

from typing import Annotated

import typer

from snugfit.cli import options
from snugfit.cli.errors import reporting


def fit(
    model: options.Model,
    gpu: Annotated[
        str,
        typer.Option(metavar="NAME", help="A size as CUDA reports it (16GiB), or a card ('RTX 5060 Ti 16GB', H100)."),
    ],
    context: Annotated[
        int | None,
        typer.Option(
            parser=options.tokens(), metavar="TOKENS", help="Context that must fit, such as 32k. Default: the longest."
        ),
    ] = None,
    tensor_parallel_size: options.TensorParallelSize = 1,
    engine: Annotated[
        options.Engine,
        typer.Option(help="Engine that serves the model (aphrodite: single user)."),
    ] = "vllm",
    gpu_memory_utilization: options.GpuMemoryUtilization = None,
    max_num_seqs: options.MaxNumSeqs = 1,
    recipes: Annotated[
        list[str] | None,
        typer.Option("--recipe", "-r", metavar="NAME", help="Only these: built-in names or YAML files."),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Show which recipes make MODEL fit a GPU.

    Also how long a context each recipe leaves memory for, and which kernels run it. Reads headers only.
    """
    from snugfit.planning.fit import fit as run
    from snugfit.report.terminal import print_fit

    record = run(
        model,
        gpu,
        context=context,
        tensor_parallel_size=tensor_parallel_size,
        engine=engine,
        gpu_memory_utilization=gpu_memory_utilization,
        max_num_seqs=max_num_seqs,
        recipes=recipes or (),
    )
    with reporting():
        if as_json:
            typer.echo(record.to_json(), nl=False)
        else:
            print_fit(record)
