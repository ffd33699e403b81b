"""`snugfit statistics`: collect, show, merge, import."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from snugfit.cli import options
from snugfit.cli.errors import VerbProgress, Verbs, keeping, kept_layers, reporting
from snugfit.distributed import is_main_to_be
from snugfit.errors import plain
from snugfit.records.statistics_file import MAX_FORCED_TOKENS

if TYPE_CHECKING:
    from snugfit.records.statistics_file import Statistics

app = typer.Typer(
    cls=Verbs,
    help="Collect, show, merge and import calibration statistics.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command()
def collect(
    ctx: typer.Context,
    model: options.Model,
    output_dir: Annotated[
        Path, typer.Option("--output-dir", "-o", metavar="PATH", help="New directory for statistics, tables and plots.")
    ],
    dataset: options.Dataset = None,
    num_samples: options.NumSamples = None,
    max_seq_length: options.MaxSeqLength = None,
    shuffle_seed: options.ShuffleSeed = None,
    device: options.Device = None,
    tokens_per_batch: options.TokensPerBatch = None,
    dtype: options.Dtype = None,
    moe_calibrate_all_experts: options.CalibrateAllExperts = True,
    max_forced_tokens: options.MaxForcedTokens = MAX_FORCED_TOKENS,
    experts_per_group: options.ExpertsPerGroup = None,
    restart: options.Restart = False,
    force_resume: options.ForceResume = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the statistics as one JSON document.")] = False,
) -> None:
    """Measure what the layers of MODEL see, without a recipe.

    The inputs of every linear layer, keys and values, and the tokens of every expert. The same command resumes an
    interrupted run.
    """
    with keeping(kept_layers(output_dir)):
        from snugfit.quantization.collect import collect_statistics

        found = collect_statistics(
            model,
            output_dir=output_dir,
            dataset=dataset or (),
            num_samples=num_samples,
            max_seq_length=max_seq_length,
            shuffle_seed=shuffle_seed,
            device=device,
            tokens_per_batch=tokens_per_batch,
            dtype=dtype,
            moe_calibrate_all_experts=moe_calibrate_all_experts,
            max_forced_tokens=max_forced_tokens,
            experts_per_group=experts_per_group,
            restart=restart,
            force_resume=force_resume,
            progress=VerbProgress(ctx),
        )
    if not is_main_to_be():
        return
    with reporting(output_dir):
        _print_statistics(found, as_json=as_json)


@app.command()
def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A statistics file, or a directory that has one.")],
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", "-o", metavar="PATH", help="New directory for tables and plots.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the statistics as one JSON document.")] = False,
) -> None:
    """Print outliers, and how many tokens experts saw."""
    from snugfit.records.statistics_file import load_statistics

    found = load_statistics(file)
    if output_dir is not None:
        from snugfit.report.outliers import write_outliers
        from snugfit.storage.staging import check_stageable, staged

        check_stageable(output_dir, models=[file])
        with staged(output_dir) as folder:
            write_outliers(found, folder)
    with reporting(output_dir):
        _print_statistics(found, as_json=as_json)


@app.command()
def merge(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILES", help="Statistics of one model, measured on different samples.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="PATH", help="New statistics file.")],
) -> None:
    """Join statistics of one model.

    The result is what one run over all their samples would measure.
    """
    from snugfit.records.statistics_file import load_statistics, merge_statistics, save_statistics
    from snugfit.storage.staging import check_outside

    check_outside(output, files)
    found = merge_statistics([(str(file), load_statistics(file)) for file in files])
    save_statistics(found, output)
    with reporting(output):
        typer.echo(f"{plain(str(output))}: {len(files)} files, {found.num_samples} samples, {found.tokens:,} tokens")


@app.command("import")
def import_file(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An importance matrix of llama.cpp (.gguf or .dat).")],
    model: Annotated[str, typer.Option("--model", metavar="MODEL", help="The model that it was made of.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="PATH", help="New statistics file.")],
) -> None:
    """Make statistics of an importance matrix, without running the model.

    They have E[x^2] of the inputs of each linear, and no ranges: for int4, nvfp4a16 and mxfp4 by `--statistics`.
    """
    from snugfit.quantization.import_statistics import import_statistics

    found = import_statistics(file, model, output=output, progress=VerbProgress(ctx))
    with reporting(output):
        typer.echo(f"{plain(str(output))}: {found.num_samples} chunks, {found.tokens:,} tokens of {plain(found.model)}")


def _print_statistics(found: Statistics, *, as_json: bool) -> None:
    if as_json:
        typer.echo(found.to_json(), nl=False)
        return
    from snugfit.report.outliers import coverage_sheet, outlier_sheet
    from snugfit.report.terminal import print_sheet

    if any(layer.experts for layer in found.layers.values()):
        print_sheet(coverage_sheet(found))
    if found.ranges:
        print_sheet(outlier_sheet(found, narrow=True))
    else:
        linears = sum(len(layer.inputs) for layer in found.layers.values())
        typer.echo(f"E[x^2] of {linears:,} kinds of inputs in {len(found.layers)} layers, no ranges")
