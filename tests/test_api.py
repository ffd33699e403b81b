"""The Python API: what `import snugfit` offers and costs, and that the example of the docs runs."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.main

import snugfit
from conftest import MakeTiny
from helpers.tiny_families import random_rows, write_rows
from snugfit.cli.app import app
from snugfit.cli.errors import VERBS

ROOT = Path(__file__).parent.parent

# verb -> its function, options that are no parameter of it, and parameters that are no option
VERBS_OF: dict[str, tuple[Callable[..., Any], set[str], set[str]]] = {
    "quantize": (snugfit.quantize, {"dry_run", "as_json"}, set()),
    "statistics collect": (snugfit.collect_statistics, {"as_json"}, set()),
    "statistics import": (snugfit.import_statistics, set(), set()),
    "inspect": (snugfit.inspect, {"as_json"}, set()),
    "doctor": (snugfit.doctor, {"github", "as_json"}, set()),
    "repair": (snugfit.repair, {"dry_run", "as_json"}, set()),
    "fit": (snugfit.fit, {"as_json"}, set()),
    "eval": (snugfit.evaluate, {"output_dir", "server_model", "top_logprobs", "server_log", "as_json"}, set()),
    "tasks": (snugfit.run_tasks, {"output_dir", "as_json"}, set()),
    "dataset show": (snugfit.describe_dataset, {"as_json"}, set()),
    "dataset compare": (snugfit.compare_datasets, {"as_json"}, set()),
    "report": (snugfit.make_report, {"as_json"}, set()),
    "push": (snugfit.push, {"as_json"}, set()),
    "compare": (snugfit.compare, {"output_dir", "as_json"}, set()),
}


def test_importing_is_light() -> None:
    """`import snugfit` and `dir` import nothing heavy; the first use of a name imports its module."""
    script = (
        "import sys, snugfit; dir(snugfit); snugfit.UserError; snugfit.TerminalProgress\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'pydantic', 'typer', 'rich'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("name", snugfit.__all__)
def test_every_public_name_is_there(name: str) -> None:
    """Each name of `__all__` can be had, is listed by `dir`, and functions and classes have a docstring."""
    value = getattr(snugfit, name)
    assert name in dir(snugfit)
    assert isinstance(value, str) or value.__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    """As in any module."""
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = snugfit.quantise


def test_types_and_imports_name_the_same_modules() -> None:
    """What a type checker sees is what a name is imported from when it is used."""
    tree = ast.parse((ROOT / "src/snugfit/__init__.py").read_text(encoding="utf-8"))
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in guarded.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.name: f"{node.module}" for node in imports for alias in node.names}
    assert seen == {name: f"snugfit.{module}" for name, module in snugfit._HOME.items()}
    assert {*seen, "__version__"} == set(snugfit.__all__)


def test_every_function_of_the_verbs_is_public() -> None:
    """What messages call a function can be called so."""
    assert set(VERBS) - {"merge_statistics"} <= set(snugfit.__all__)


@pytest.mark.parametrize("verb", VERBS_OF)
def test_one_vocabulary(verb: str) -> None:
    """Options are parameters: the same names, the same defaults; everything after the second is keyword-only."""
    function, only_options, only_parameters = VERBS_OF[verb]
    command: Any = typer.main.get_command(app)
    for word in verb.split():
        command = command.commands[word]
    options = {parameter.name: parameter for parameter in command.params}
    parameters = inspect.signature(function).parameters
    assert set(options) - only_options == set(parameters) - only_parameters - {"progress"}
    for name in set(options) & set(parameters):
        option, default = options[name], parameters[name].default
        if default is inspect.Parameter.empty or default == () or name in ("max_shard_size", "contexts"):
            continue
        assert option.default == default, name
    assert all(p.kind is p.KEYWORD_ONLY for p in list(parameters.values())[2:])
    assert all(p.kind is not p.KEYWORD_ONLY for p in list(parameters.values())[:1])


def test_the_module_runs_as_the_command() -> None:
    """`python -m snugfit` is the command line under its own name."""
    command = [sys.executable, "-m", "snugfit"]
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert version.stdout == f"snugfit {snugfit.__version__}\n"
    shown = subprocess.run([*command, "recipes", "--help"], capture_output=True, text=True, check=True)
    assert shown.stdout.startswith("Usage: snugfit recipes ")


def test_types_are_shipped() -> None:
    """py.typed stands beside the package: a type checker of a user's code reads our annotations."""
    assert (ROOT / "src/snugfit/py.typed").is_file()


def test_the_example_of_the_docs_runs(make_tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/python.md: its block runs as it stands, on a tiny model and rows of ids under the names it uses."""
    (tmp_path / "org").mkdir()
    make_tiny("llama", num_hidden_layers=1).rename(tmp_path / "org" / "model")
    write_rows(tmp_path / "calibration.jsonl", random_rows([64] * 4, seed=0))
    write_rows(tmp_path / "held-out.jsonl", random_rows([256] * 4, seed=1))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 1
    exec(compile(blocks[0], "docs/python.md", "exec"), {})  # noqa: S102
    assert {"OUT", "RESULT"} <= {path.name for path in tmp_path.iterdir()}
    assert not (tmp_path / "OTHER").exists()
