"""`snugfit dataset`: what a dataset gives a model, the sets of this package, and two datasets compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from snugfit.cli import options
from snugfit.cli.errors import VerbProgress, Verbs, reporting
from snugfit.errors import UserError

_SHOW = "show"


class _Verbs(Verbs):
    """Verbs of which `show` need not be written."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The arguments, `show` before them where no verb is."""
        if not args or args[0] not in (*self.commands, "--help"):
            args = [_SHOW, *args]
        return list(super().parse_args(ctx, args))


app = typer.Typer(
    cls=_Verbs,
    help="Show what a dataset gives a model, list and print sets, compare datasets.\n\n"
    "`snugfit dataset SET` is short for `snugfit dataset show SET`.",
    rich_markup_mode=None,
)


@app.command()
def show(
    dataset: Annotated[
        list[Path] | None, typer.Argument(metavar="SET", help="A set (YAML or a name), or files of text or rows.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", metavar="MODEL", help="A directory with a tokenizer, or a Hugging Face id (org/name)."
        ),
    ] = None,
    num_samples: options.NumSamples = None,
    max_seq_length: options.MaxSeqLength = None,
    shuffle_seed: options.ShuffleSeed = None,
    held_out: Annotated[
        str | None,
        typer.Option("--held-out", metavar="PERCENT", help="Hold out so much of every source, such as 10%."),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option("--output-dir", "-o", metavar="PATH", help="New directory for the samples as rows of token ids."),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Show the samples that SET gives MODEL: counts, tokens, categories, languages, lengths, positions, examples.

    Without MODEL print the YAML of a set; without SET list the sets that come with snugfit.
    """
    from snugfit.report.dataset import print_dataset

    if model is None:
        for name, value in (
            ("held_out", held_out),
            ("output_dir", output_dir),
            ("num_samples", num_samples),
            ("max_seq_length", max_seq_length),
            ("shuffle_seed", shuffle_seed),
        ):
            if value is not None:
                raise UserError("has no effect without `model`.", code="option-conflict", where=name)
        _print_sets(dataset or [], as_json=as_json)
        return
    from snugfit.data.describe import describe_dataset

    record = describe_dataset(
        dataset or (),
        model,
        num_samples=num_samples,
        max_seq_length=max_seq_length,
        shuffle_seed=shuffle_seed,
        held_out=held_out,
        output_dir=output_dir,
    )
    with reporting(output_dir):
        if as_json:
            typer.echo(record.to_json(), nl=False)
        else:
            print_dataset(record)


def _print_sets(datasets: list[Path], *, as_json: bool) -> None:
    from snugfit.data.describe import describe_sets
    from snugfit.data.sets import is_set, load_set
    from snugfit.report.dataset import print_sets

    if datasets:
        one = datasets[0]
        if len(datasets) > 1 or not is_set(one):
            if len(datasets) == 1 and not one.exists():
                load_set(one)  # suggests similar names
            what = "counting samples needs a tokenizer."
            raise UserError(what, code="option-missing", where="model", remedy="Name a directory that has one.")
        loaded = load_set(one)
        with reporting():
            if as_json:
                typer.echo(json.dumps(loaded.set.model_dump(mode="json", exclude_none=True), indent=2))
            else:
                typer.echo(loaded.text, nl=False)
        return
    found = describe_sets()
    with reporting():
        if as_json:
            typer.echo(json.dumps([{"name": name, **content} for name, _, content in found], indent=2))
        else:
            print_sets([(name, description) for name, description, _ in found])


@app.command()
def compare(
    ctx: typer.Context,
    a: Annotated[Path, typer.Argument(metavar="A", help="A set, or a file of text or rows.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="MODEL", help="A model that can be quantized, whose layers are run.")
    ],
    num_samples: options.NumSamples = None,
    max_seq_length: options.MaxSeqLength = None,
    shuffle_seed: options.ShuffleSeed = None,
    format: Annotated[  # noqa: A002  # the word of recipes
        str, typer.Option("--format", metavar="FORMAT", help="The format of the weights whose error is measured.")
    ] = "int4",
    device: options.Device = None,
    tokens_per_batch: options.TokensPerBatch = None,
    dtype: options.Dtype = None,
    as_json: options.AsJson = False,
) -> None:
    """Run MODEL on two datasets and show what each leaves uncovered.

    Experts without tokens, input channels whose range the other raises, and the error on the rows of one of weights
    that were quantized by the other.
    """
    from snugfit.quantization.compare_datasets import compare_datasets
    from snugfit.report.dataset import print_dataset_comparison

    record = compare_datasets(
        a,
        b,
        model=model,
        num_samples=num_samples,
        max_seq_length=max_seq_length,
        shuffle_seed=shuffle_seed,
        format=format,
        device=device,
        tokens_per_batch=tokens_per_batch,
        dtype=dtype,
        progress=VerbProgress(ctx),
    )
    with reporting():
        if as_json:
            typer.echo(record.to_json(), nl=False)
        else:
            print_dataset_comparison(record)
