"""`snugfit push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from snugfit.cli import options
from snugfit.cli.errors import VerbProgress, reporting
from snugfit.errors import plain


def push(
    ctx: typer.Context,
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A directory of `snugfit quantize` or `snugfit report`.")
    ],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="A repository on the Hub: org/name.")],
    report: Annotated[
        Path | None, typer.Option(metavar="PATH", help="The report of this checkpoint, with its card.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private/--public", help="What a new repository is; a public one is refused otherwise.")
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and list files and sizes; upload nothing.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Upload a finished run to the Hub.

    Only the files that its record lists, each compared with its digest, in one commit. The same command resumes.
    """
    from snugfit.byte_counts import size
    from snugfit.publishing.push import push as run

    plan = run(directory, repo, report=report, private=private, dry_run=dry_run, progress=VerbProgress(ctx))
    with reporting():
        if as_json:
            typer.echo(plan.to_json(), nl=False)
            return
        for file in plan.files:
            typer.echo(f"{size(file.bytes):>12}  {plain(file.name)}")
        for name in plan.left_out:
            typer.echo(f"left out: {plain(name)}", err=True)
        kind = "private" if plan.private else "public"
        there = "exists" if plan.exists else f"is new, {kind}"
        done = f"would upload to {plan.repo}, which {there}" if plan.url is None else f"uploaded to {plan.url}"
        typer.echo(f"{len(plan.files)} files, {size(plan.bytes)}: {done}")
