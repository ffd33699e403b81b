"""Errors and messages of Python functions in the words of the command line."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import typer
import typer.main
from typer.testing import CliRunner

from helpers.errors import failed_with
from snugfit.cli.app import app
from snugfit.cli.errors import VERBS, VerbProgress, Verbs, as_options, describe, keeping, option_names, reporting
from snugfit.errors import UserError


def names_of(*verbs: str) -> dict[str, tuple[str, str]]:
    command: Any = typer.main.get_command(app)
    for verb in verbs:
        command = command.commands[verb]
    return option_names(command)


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("Lower `tokens_per_batch`.", "Lower `--tokens-per-batch`."),
        ("Set `device=cpu` or `device='cuda:0'`.", "Set `--device cpu` or `--device cuda:0`."),
        ("Pass `restart=True`.", "Pass `--restart`."),
        ("Pass `moe_calibrate_all_experts=False`.", "Pass `--no-moe-calibrate-all-experts`."),
        ("`model` and `recipe` do not match.", "`MODEL` and `--recipe` do not match."),
        ("Run `collect_statistics` again.", "Run `snugfit statistics collect` again."),
        ("`quantize`, `evaluate()`, `list_recipes`", "`snugfit quantize`, `snugfit eval`, `snugfit recipes`"),
        (
            "`requantize: true` in a rule, `kv_cache`, `contexts`",
            "`requantize: true` in a rule, `kv_cache`, `contexts`",
        ),
        ("max_seq_length without backticks", "max_seq_length without backticks"),
    ],
)
def test_parameters_become_options_and_functions_verbs(message: str, shown: str) -> None:
    """In backticks, a parameter of the verb becomes its option and a function its verb; all else stays."""
    assert as_options(message, names_of("quantize")) == shown


def test_options_are_those_of_the_verb() -> None:
    """A parameter whose option has another name is shown as that option; one of another verb stays as it is."""
    assert as_options("`contexts`, `recipe`", names_of("eval")) == "`--context`, `recipe`"
    assert as_options("`recipes`, `tensor_parallel_size`", names_of("fit")) == "`--recipe`, `--tensor-parallel-size`"
    assert as_options("`file`", names_of("statistics", "show")) == "`FILE`"


@pytest.mark.parametrize(
    ("where", "shown"),
    [
        ("max_seq_length", "--max-seq-length: "),
        ("model", "MODEL: "),
        ("recipe.yaml: rules[0]", "recipe.yaml: rules[0]: "),
        ("", ""),
    ],
)
def test_a_place_that_is_a_parameter_becomes_its_option(where: str, shown: str) -> None:
    """The line is WHERE: WHAT REMEDY [code]."""
    error = UserError("is wrong.", code="option-invalid", where=where, remedy="Lower `num_samples`.")
    assert describe(error, names_of("quantize")) == f"{shown}is wrong. Lower `--num-samples`. [option-invalid]"


def test_every_function_is_a_verb() -> None:
    """The table names verbs and options that there are."""
    for verb in VERBS.values():
        words = verb.split()
        names = names_of(*(word for word in words if not word.startswith("--")))
        assert all(word in {option for option, _ in names.values()} for word in words if word.startswith("--"))


# --- a verb that fails


def failing(error: BaseException) -> typer.Typer:
    """A command line with one verb, which fails so."""
    group = typer.Typer(cls=Verbs, rich_markup_mode=None)

    @group.command()
    def verb(ctx: typer.Context, num_samples: int = 1) -> None:
        VerbProgress(ctx).message("`num_samples` are \x1b[2J read")
        raise error

    @group.command()
    def other() -> None:
        """A second verb makes it a group."""

    return group


def test_a_user_error_is_one_line_and_exit_code_2() -> None:
    """Bad input prints its place, reason, remedy and code; nothing on stdout, no traceback."""
    error = UserError("is wrong.", code="option-invalid", where="num_samples", remedy="Lower it.")
    result = CliRunner().invoke(failing(error), ["verb"])
    assert failed_with(result, "option-invalid", "--num-samples")
    assert result.stdout == ""
    assert result.stderr.splitlines()[1:] == ["snugfit: --num-samples: is wrong. Lower it. [option-invalid]"]


def test_progress_speaks_of_options_and_shows_no_control_characters() -> None:
    """Messages name options, and text out of files cannot move the cursor."""
    result = CliRunner().invoke(failing(UserError("x", code="option-invalid")), ["verb"])
    assert result.stderr.splitlines()[0] == r"`--num-samples` are \x1b[2J read"


def test_an_error_of_the_system_has_the_same_form() -> None:
    """A full disk is no traceback: the file, the reason, and that nothing was written."""
    result = CliRunner().invoke(failing(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "place")), ["verb"])
    assert failed_with(result, "system-error", "place", os.strerror(errno.ENOSPC))


def test_ctrl_c_is_exit_code_130() -> None:
    """A stop by the user is no error of the input."""
    result = CliRunner().invoke(failing(KeyboardInterrupt()), ["verb"])
    assert (result.exit_code, result.stdout) == (130, "")


@pytest.mark.parametrize("value", ["many", "1.5"])
def test_a_value_that_cannot_be_is_shown_as_every_error(value: str) -> None:
    """A value that typer refuses has the form and the code of one that a function refuses."""
    result = CliRunner().invoke(failing(SystemError()), ["verb", "--num-samples", value])
    assert failed_with(result, "option-invalid", "--num-samples")
    assert len(result.stderr.splitlines()) == 1


def test_a_stopped_run_says_what_it_keeps(capsys: pytest.CaptureFixture[str]) -> None:
    """After an error of the system or Ctrl-C the message names what the same command resumes from."""
    kept = "OUT.partial keeps 3 layers"
    with pytest.raises(UserError) as caught, keeping(lambda: kept):
        raise OSError(errno.EIO, "broken")
    assert (caught.value.code, kept in caught.value.remedy) == ("system-error", True)
    with pytest.raises(typer.Exit) as stopped, keeping(lambda: kept):
        raise KeyboardInterrupt
    assert stopped.value.exit_code == 130
    assert kept in capsys.readouterr().err


def test_a_run_that_kept_nothing_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """Before the first layer is done there is nothing to resume from."""
    with pytest.raises(UserError) as caught, keeping(lambda: ""):
        raise OSError(errno.EIO, "broken")
    assert "resume" not in caught.value.remedy
    with pytest.raises(KeyboardInterrupt), keeping(lambda: ""):
        raise KeyboardInterrupt
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("output", [None, Path("OUT")])
def test_a_report_that_cannot_be_printed_is_exit_code_1(
    output: Path | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """The result is complete: a closed pipe is reported as such, with the name of the result."""
    with pytest.raises(typer.Exit) as caught, reporting(output):
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
    assert caught.value.exit_code == 1
    assert str(output or "") in capsys.readouterr().err
