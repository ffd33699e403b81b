"""What the command line makes of errors, and of options that several verbs share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from snugfit.errors import UserError, plain
from snugfit.records.statistics_file import Calibration


@contextmanager
def plain_errors(kept: Callable[[], str] = lambda: "") -> Iterator[None]:
    """UserError -> one message and exit code 2; Ctrl-C -> exit code 130. `kept` says what there is to go on from."""
    try:
        yield
    except UserError as error:
        typer.echo(f"snugfit: {error}", err=True)
        raise typer.Exit(2) from None
    except OSError as error:
        place = f"{plain(str(error.filename))}: " if error.filename else ""
        left = f"{kept()}. Then run the same command to go on." if kept() else "Nothing was written."
        typer.echo(f"snugfit: {place}{error.strerror or error}. {left}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        left = f"{kept()}. Run the same command to go on." if kept() else "nothing was written."
        typer.echo(f"snugfit: stopped; {left}", err=True)
        raise typer.Exit(130) from None


def kept_layers(output: Path | None) -> Callable[[], str]:
    """What an unfinished quantize run has kept."""

    def kept() -> str:
        from snugfit.storage.staging import units_done

        partial = None if output is None else output.with_name(output.name + ".partial")
        done = 0 if partial is None else units_done(partial)
        if not done:
            return ""
        return f"{partial} keeps {done - 1} {'layer' if done == 2 else 'layers'}"

    return kept


@contextmanager
def reporting(output: Path | None) -> Iterator[None]:
    """The result stands, whatever happens to its report: exit code 1."""
    what = "its report is not written" if output is None else f"{output} is written and whole; its report is not"
    try:
        yield
    except OSError as error:
        typer.echo(f"snugfit: {what} ({error.strerror or error}).", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo(f"snugfit: stopped; {what}.", err=True)
        raise typer.Exit(130) from None


def calibration_of(experts: str, forced_tokens: int, least_tokens: int) -> Calibration:
    """What --experts, --forced-tokens and --least-tokens ask for; UserError for what they cannot be."""
    if experts not in ("all", "routed"):
        raise UserError(f"--experts {experts!r} is neither all nor routed.", remedy="all is the default.")
    for name, value in (("--forced-tokens", forced_tokens), ("--least-tokens", least_tokens)):
        if value < 0:
            raise UserError(f"{name} {value} is no number of tokens.", remedy="Give 0 or more.")
    return Calibration(experts, forced_tokens, least_tokens)
