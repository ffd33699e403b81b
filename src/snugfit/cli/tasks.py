"""`snugfit tasks`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from snugfit.cli import options
from snugfit.cli.errors import VerbProgress, reporting
from snugfit.errors import plain


def tasks(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model directory; with --server the one of its tokenizer.")
    ],
    tasks: Annotated[str, typer.Option(metavar="NAME,...", help="Names of lm_eval tasks, such as piqa,hellaswag.")],
    task_folder: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Folder of further YAML tasks (as `lm_eval --include_path`).")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="NUMBER", help="Items of each task at most.")] = None,
    activations: Annotated[
        options.Profile | None,
        typer.Option(help="What the engine does to the inputs of linear layers. Default: vllm-blackwell."),
    ] = None,
    server: Annotated[str | None, typer.Option(metavar="URL", help="URL of a vLLM server that runs the tasks.")] = None,
    server_model: Annotated[str | None, typer.Option(metavar="NAME", help="Which of the server's models.")] = None,
    output_dir: options.OptionalOutputDir = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.AsJson = False,
) -> None:
    """Run lm_eval tasks on MODEL.

    The result keeps the score of every item, for `snugfit compare`.
    """
    from snugfit.evaluation.tasks import run_tasks, write_tasks
    from snugfit.report.tables import task_sheet
    from snugfit.report.terminal import print_sheet
    from snugfit.storage.staging import check_stageable

    if output_dir is not None:
        check_stageable(output_dir, models=[model])
    run = run_tasks(
        model,
        [name.strip() for name in tasks.split(",") if name.strip()],
        activations=activations,
        limit=limit,
        device=device,
        dtype=dtype,
        server=server,
        server_model=server_model,
        task_folder=task_folder,
        progress=VerbProgress(ctx),
    )
    if output_dir is not None:
        write_tasks(run, output_dir)
    with reporting(output_dir):
        if as_json:
            typer.echo(run.record.to_json(), nl=False)
        else:
            print_sheet(task_sheet(run.record))
        if output_dir is not None:
            typer.echo(f"{plain(str(output_dir))}: tasks.json, samples.jsonl, lm_eval.json", err=True)
