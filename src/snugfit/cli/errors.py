"""Errors and messages in the words of the command line.

Functions name their parameters and each other in backticks: "lower `tokens_per_batch`", "run `collect_statistics`". A
person at a terminal knows neither name, so both are replaced by the options of the running verb and by verbs. Every
error is one line on stderr, `snugfit: WHERE: WHAT REMEDY [code]`, with exit code 2.
"""

from __future__ import annotations

import re
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from snugfit.distributed import OtherRankError, is_main_to_be, rank_prefix, tell_reported, wait_until_reported
from snugfit.errors import UserError, plain
from snugfit.progress import SILENT, TerminalProgress

# function of the Python API -> verb
VERBS: Mapping[str, str] = {
    "quantize": "quantize",
    "plan_quantization": "quantize --dry-run",
    "plan": "plan",
    "read_recipe": "plan --from",
    "diff_plans": "plan --diff",
    "collect_statistics": "statistics collect",
    "import_statistics": "statistics import",
    "load_statistics": "statistics show",
    "merge_statistics": "statistics merge",
    "inspect": "inspect",
    "doctor": "doctor",
    "repair": "repair",
    "plan_repair": "repair --dry-run",
    "fit": "fit",
    "evaluate": "eval",
    "run_tasks": "tasks",
    "compare": "compare",
    "make_report": "report",
    "push": "push",
    "bench": "bench",
    "import_bench": "bench --import",
    "serve": "serve",
    "describe_dataset": "dataset",
    "compare_datasets": "dataset compare",
    "list_recipes": "recipes",
}
_QUOTED = re.compile(r"`(\w+)(?:=([^`]*)|\(\))?`")  # `name`, `name=value`, `name()`


class Verbs(TyperGroup):
    """A group of verbs that shows the errors of the verb it runs."""

    def invoke(self, ctx: Any) -> Any:
        """Run a verb. Bad input: one line, exit code 2. Ctrl-C: exit code 130."""
        warnings.filterwarnings("ignore", message="Attempting to run cuBLAS")  # torch's, in the thread of gradients
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            if type(error) is not typer.BadParameter or error.param is None:
                raise  # a missing option: the usage is the better answer
            message = error.message.removeprefix("Value error, ")
            shown = UserError(message, code="option-invalid", where=error.param.name or "")
        except OtherRankError:
            wait_until_reported()
            raise typer.Exit(2) from None
        except UserError as error:
            shown = error
        except OSError as error:
            shown = _system_error(error, "Nothing was written.")
        except KeyboardInterrupt:
            typer.echo("snugfit: stopped; nothing was written.", err=True)
            raise typer.Exit(130) from None
        names = option_names(self.commands[ctx.invoked_subcommand])
        prefix = "" if shown.code == "rank-lost" else rank_prefix()  # its place is the rank
        typer.echo(f"snugfit: {prefix}{describe(shown, names)}", err=True)
        tell_reported()
        raise typer.Exit(2)


class VerbProgress(TerminalProgress):
    """Progress on stderr, its messages in the words of the running verb."""

    def __init__(self, ctx: typer.Context) -> None:
        self._names = option_names(ctx.command)

    def message(self, text: str) -> None:
        """Print one line to stderr."""
        if is_main_to_be():
            typer.echo(plain(as_options(text, self._names)), err=True)

    @contextmanager
    def bar(self, total: int, description: str) -> Iterator[Callable[[], None]]:
        """A bar of the main process."""
        with (super().bar if is_main_to_be() else SILENT.bar)(total, description) as advance:
            yield advance


def option_names(command: Any) -> dict[str, tuple[str, str]]:
    """Parameter of a verb -> its option, and for a switch the option that turns it off; arguments in capitals."""
    names = {}
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            names[parameter.name] = parameter.metavar or parameter.name.upper(), ""
        else:
            long = next((option for option in parameter.opts if option.startswith("--")), parameter.opts[0])
            names[parameter.name] = long, next(iter(parameter.secondary_opts), "")
    return names


def as_options(text: str, names: Mapping[str, tuple[str, str]]) -> str:
    """`text` with parameters in backticks as options, and functions in backticks as verbs."""

    def replaced(match: re.Match[str]) -> str:
        name, value = match[1], match[2]
        if name in names:
            return f"`{_with_value(*names[name], value)}`"
        return f"`snugfit {VERBS[name]}`" if name in VERBS and value is None else match[0]

    return _QUOTED.sub(replaced, text)


def _with_value(option: str, negative: str, value: str | None) -> str:
    if value is None or value == "True":
        return option
    if value == "False":
        return negative or f"no {option}"
    return f"{option} {value.strip(chr(34) + chr(39))}"


def describe(error: UserError, names: Mapping[str, tuple[str, str]]) -> str:
    """WHERE: WHAT REMEDY [code], in the words of the verb."""
    where = names[error.where][0] if error.where in names else as_options(error.where, names)
    place = f"{where}: " if where else ""
    remedy = f" {as_options(error.remedy, names)}" if error.remedy else ""
    return f"{place}{as_options(error.what, names)}{remedy} [{error.code}]"


@contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end a run as Ctrl-C does: what was measured is kept, and what was started is stopped."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def keeping(kept: Callable[[], str]) -> Iterator[None]:
    """The errors of a run that can be resumed say what `kept` names; "" where there is nothing yet."""
    try:
        yield
    except OSError as error:
        left = kept()
        remedy = f"{left}. Run the same command to resume." if left else "Nothing was written."
        raise _system_error(error, remedy) from None
    except KeyboardInterrupt:
        left = kept()
        if not left:
            raise
        typer.echo(f"snugfit: stopped; {left}. Run the same command to resume.", err=True)
        raise typer.Exit(130) from None


def kept_layers(output_dir: Path | None) -> Callable[[], str]:
    """What an unfinished run of `quantize` or `collect_statistics` has kept."""

    def kept() -> str:
        from snugfit.storage.staging import units_done

        partial = None if output_dir is None else output_dir.with_name(output_dir.name + ".partial")
        done = 0 if partial is None else units_done(partial)
        if not done:
            return ""
        return f"{partial} keeps {done - 1} {'layer' if done == 2 else 'layers'}"

    return kept


@contextmanager
def reporting(output_dir: Path | None = None) -> Iterator[None]:
    """The result is complete, whatever happens while it is printed: exit code 1."""
    what = "the report is not printed" if output_dir is None else f"{output_dir} is complete; the report is not printed"
    try:
        yield
    except OSError as error:
        typer.echo(f"snugfit: {plain(what)} ({error.strerror or error}).", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo(f"snugfit: stopped; {plain(what)}.", err=True)
        raise typer.Exit(130) from None


def _system_error(error: OSError, remedy: str) -> UserError:
    what = f"{error.strerror or error}."
    return UserError(what, code="system-error", where=str(error.filename or ""), remedy=remedy)
