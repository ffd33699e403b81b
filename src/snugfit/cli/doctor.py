"""`snugfit doctor` and `snugfit repair`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from snugfit.cli import options
from snugfit.cli.errors import VerbProgress, reporting

Checkpoint = Annotated[
    str,
    typer.Argument(metavar="CHECKPOINT", help="A directory of any tool's quantized weights, or a Hugging Face id."),
]


def doctor(
    ctx: typer.Context,
    checkpoint: Checkpoint,
    base: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The model that it was made of: compare every tensor with it."),
    ] = None,
    values: Annotated[
        Literal["none", "sample", "all"] | None,
        typer.Option(help="Read the values of some or all weights. Default: none, with --base all."),
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(metavar="NAME", help="Also what has no kernel on this GPU (H100, 'RTX 5090').")
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Only what concerns it, repeatable: vllm, vllm-0.24, vllm-0.32, vllm-0.33, sglang, transformers. "
            "Default: all.",
        ),
    ] = None,
    tensor_parallel_size: options.TensorParallelSize = 1,
    github: Annotated[bool, typer.Option("--github", help="Print annotations of GitHub Actions.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Say whether CHECKPOINT will load, and whether it will tell the truth.

    Exit code 0: sound. 1: it will not load, or will compute something else. 2: bad input.
    """
    from snugfit.inspection.doctor import doctor as run
    from snugfit.report.doctor import print_annotations, print_diagnosis

    record = run(
        checkpoint,
        base=base,
        values=values,
        gpu=gpu,
        engine=engine or (),
        tensor_parallel_size=tensor_parallel_size,
        progress=VerbProgress(ctx),
    )
    with reporting():
        if as_json:
            typer.echo(record.to_json(), nl=False)
        elif github:
            print_annotations(record)
        else:
            print_diagnosis(record)
    raise typer.Exit(record.exit_code)


def repair(
    ctx: typer.Context,
    checkpoint: Checkpoint,
    output_dir: options.OptionalOutputDir = None,
    dialect: Annotated[
        Literal["compressed-tensors", "modelopt"] | None,
        typer.Option(help="Write the same codes in this dialect. Default: the checkpoint's."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be corrected.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Correct what can be corrected in CHECKPOINT without loss, as a new directory.

    Shards that stay as they are share their bytes with CHECKPOINT by hard links.
    """
    from snugfit.inspection.repair import plan_repair
    from snugfit.inspection.repair import repair as run
    from snugfit.report.doctor import print_repair

    if dry_run:
        record = plan_repair(checkpoint, dialect=dialect)
    else:
        record = run(checkpoint, output_dir=options.required(output_dir), dialect=dialect, progress=VerbProgress(ctx))
    with reporting(None if dry_run else output_dir):
        if as_json:
            typer.echo(record.to_json(), nl=False)
        else:
            print_repair(record)
