"""The command line: what it offers, what it prints where, and that a dry run foretells the real one to the byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from helpers.errors import failed_with
from helpers.memory import leave_free
from helpers.tiny_tokenizer import add_tokenizer
from snugfit.cli.app import app
from snugfit.engines.memory import ENGINE_NAMES
from snugfit.engines.profiles import PROFILES
from snugfit.quantization.quantize import plan_quantization
from snugfit.recipes.recipe import builtin_names, load_recipe
from snugfit.records.quantize import RECIPE_FILE, RECORD_FILE
from snugfit.version import __version__

MakeTiny = Callable[..., Path]
ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "U8": 1, "I32": 4, "I64": 8, "F8_E4M3": 1}

# every option and argument of every verb; a new one is announced here, in docs/reference.md and in the changelog
OFFERED: dict[str, set[str]] = {
    "doctor": {
        "checkpoint",
        "--base",
        "--engine",
        "--github",
        "--gpu",
        "--json",
        "--tensor-parallel-size",
        "--tp",
        "--values",
    },
    "repair": {"checkpoint", "--dialect", "--dry-run", "--json", "--output-dir", "-o"},
    "serve": {
        "model",
        "extra",
        "--engine",
        "--python",
        "--command",
        "--gpu",
        "--gpu-index",
        "--context",
        "--tensor-parallel-size",
        "--tp",
        "--gpu-memory-utilization",
        "--max-num-seqs",
        "--port",
        "--start-seconds",
        "--language",
        "--keep",
        "--bench",
        "--prefill",
        "--depths",
        "--concurrency",
        "--prompt-tokens",
        "--output-tokens",
        "--repeats",
        "--reference",
        "--dataset",
        "--eval-context",
        "--max-chunks",
        "--tasks",
        "--output-dir",
        "-o",
        "--json",
    },
    "bench": {
        "server",
        "--against",
        "--prefill",
        "--depths",
        "--concurrency",
        "--prompt-tokens",
        "--output-tokens",
        "--repeats",
        "--server-model",
        "--against-model",
        "--server-log",
        "--gpu-index",
        "--seed",
        "--timeout",
        "--max-seconds",
        "--import",
        "--output-dir",
        "-o",
        "--json",
    },
    "inspect": {"model", "--json"},
    "plan": {
        *("model", "--output-dir", "-o", "--gpu", "--context", "--tensor-parallel-size", "--tp", "--engine"),
        *("--gpu-memory-utilization", "--max-num-seqs", "--bytes", "--bits-per-weight", "--disk", "--max-kl", "--menu"),
        *("--constraints", "--scores", "--dataset", "--max-seq-length", "--num-tokens", "--rounding", "--target"),
        *("--held-out", "--held-out-contexts", "--max-tokens", "--alternatives", "--prove", "--no-prove", "--device"),
        *("--tokens-per-batch", "--seed", "--restart", "--force-resume", "--from", "--diff", "--dry-run", "--json"),
    },
    "fit": {
        "model",
        "--gpu",
        "--context",
        "--tensor-parallel-size",
        "--tp",
        "--engine",
        "--gpu-memory-utilization",
        "--max-num-seqs",
        "--recipe",
        "-r",
        "--json",
    },
    "quantize": {
        "model",
        "--recipe",
        "-r",
        "--output-dir",
        "-o",
        "--dataset",
        "--num-samples",
        "--max-seq-length",
        "--shuffle-seed",
        "--dtype",
        "--device",
        "--tokens-per-batch",
        "--max-shard-size",
        "--moe-calibrate-all-experts",
        "--no-moe-calibrate-all-experts",
        "--max-forced-tokens",
        "--min-tokens-per-expert",
        "--statistics",
        "--effort",
        "--target",
        "--input-headroom",
        "--experts-per-group",
        "--allow-unverified",
        "--restart",
        "--force-resume",
        "--dry-run",
        "--json",
    },
    "eval": {
        "models",
        "--reference",
        "--dataset",
        "--context",
        "--max-chunks",
        "--max-tokens",
        "--activations",
        "--noise-floor",
        "--reference-cache",
        "--continuations",
        "--answers",
        "--questions",
        "--answer-tokens",
        "--server",
        "--server-model",
        "--top-logprobs",
        "--server-log",
        "--output-dir",
        "-o",
        "--device",
        "--dtype",
        "--tokens-per-batch",
        "--experts-per-group",
        "--allow-long-context",
        "--json",
    },
    "tasks": {
        "model",
        "--tasks",
        "--task-folder",
        "--limit",
        "--activations",
        "--server",
        "--server-model",
        "--output-dir",
        "-o",
        "--device",
        "--dtype",
        "--json",
    },
    "report": {
        *("runs", "--output-dir", "-o", "--base-model", "--license", "--quantized-by", "--repo", "--json"),
    },
    "push": {"directory", "repo", "--report", "--private", "--public", "--dry-run", "--json"},
    "compare": {"a", "b", "--model-a", "--model-b", "--output-dir", "-o", "--json"},
    "statistics collect": {
        "model",
        "--output-dir",
        "-o",
        "--dataset",
        "--num-samples",
        "--max-seq-length",
        "--shuffle-seed",
        "--device",
        "--dtype",
        "--tokens-per-batch",
        "--moe-calibrate-all-experts",
        "--no-moe-calibrate-all-experts",
        "--max-forced-tokens",
        "--experts-per-group",
        "--restart",
        "--force-resume",
        "--json",
    },
    "statistics show": {"file", "--output-dir", "-o", "--json"},
    "statistics merge": {"files", "--output", "-o"},
    "statistics import": {"file", "--model", "--output", "-o"},
    "recipes": {"recipe", "--json"},
    "dataset show": {
        *("dataset", "--model", "-m", "--num-samples", "--max-seq-length", "--shuffle-seed", "--held-out"),
        *("--output-dir", "-o", "--json"),
    },
    "dataset compare": {
        *("a", "b", "--model", "-m", "--num-samples", "--max-seq-length", "--shuffle-seed", "--format", "--device"),
        *("--tokens-per-batch", "--dtype", "--json"),
    },
}

MIXED = """\
name: mixed
rules:
  - {role: lm_head, format: keep}
  - {role: down, layers: 0, format: keep}
  - {role: down, format: int4, scale_rule: absmax, symmetric: false, group_size: 32}
  - {role: mlp, format: nvfp4a16, scale_rule: sweep}
  - {role: attention, layers: -1, format: nvfp4, scale_rule: four-over-six}
  - {role: linear, format: fp8-dynamic}
"""


@pytest.fixture(scope="module")
def llama(make_tiny: MakeTiny) -> Path:
    """A tiny llama in one weight file."""
    return make_tiny("llama")


@pytest.fixture(scope="module")
def tied(make_tiny: MakeTiny) -> Path:
    """A tiny qwen2 with biases and tied embeddings, in several weight files."""
    return make_tiny("qwen2", tie_word_embeddings=True, max_shard_size="60KB")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A recipe file that uses every format, and keeps one tensor."""
    file = tmp_path_factory.mktemp("recipe") / "mixed.yaml"
    file.write_text(MIXED, encoding="utf-8")
    return str(file)


def run(*arguments: object) -> Any:
    """The result of a command that must succeed."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result


def listing(directory: Path) -> dict[str, tuple[int, int]]:
    """Every file below a directory with its size and time of change."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def written(directory: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every tensor of a directory's weight files as safetensors reads them: dtype name and shape."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stream:
            for name in stream.keys():  # noqa: SIM118 (no dict)
                part = stream.get_slice(name)
                found[name] = (str(part.get_dtype()), tuple(part.get_shape()))
    return found


def bytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    size = ITEM_BYTES[dtype]
    for side in shape:
        size *= side
    return size


# --- what is offered


def all_verbs() -> dict[str, Any]:
    """Every command by its name, also those below another."""
    given: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    verbs: dict[str, Any] = {}
    for name, one in given.items():
        inside = getattr(one, "commands", None)
        verbs |= {name: one} if inside is None else {f"{name} {verb}": command for verb, command in inside.items()}
    return verbs


def test_every_number_of_tokens_is_written_alike() -> None:
    """Each option that counts tokens takes 1k and 2,048 in every verb."""
    counted = [(verb, one) for verb, c in all_verbs().items() for one in c.params if one.metavar == "TOKENS"]
    assert len(counted) > 20
    for verb, option in counted:
        for text, number in (("1k", 1024), ("2,048", 2048)):
            context = all_verbs()[verb].make_context(verb, [option.opts[0], text], resilient_parsing=True)
            assert context.params[option.name] == number, (verb, option.name)


@pytest.mark.parametrize(("text", "size"), [("5", 5 * 10**9), ("0.5", 5 * 10**8), ("5GB", 5 * 10**9), ("2GiB", 2**31)])
def test_sizes_of_shards_are_written_as_other_sizes(text: str, size: int) -> None:
    """A size with its unit, or a number of GB."""
    context = all_verbs()["quantize"].make_context("quantize", ["--max-shard-size", text], resilient_parsing=True)
    assert context.params["max_shard_size"] == size


def test_no_verb_or_option_appears_unannounced() -> None:
    """The verbs and their options are exactly those spelled out in this file."""
    offered = {
        verb: {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for verb, command in all_verbs().items()
    }
    assert {verb: options - {"--help"} for verb, options in offered.items()} == OFFERED


HEAVY = {"torch", "transformers", "numpy", "matplotlib", "huggingface_hub", "yaml", "rich"}


@pytest.mark.parametrize(
    "verb", [(), *(tuple(verb.split()) for verb in OFFERED)], ids=lambda verb: " ".join(verb) or "app"
)
def test_help_imports_nothing_heavy(verb: tuple[str, ...]) -> None:
    """`--help` is quick because it imports little: no heavy package, and under 500 modules (about 300 today)."""
    script = (
        "import sys\nfrom snugfit.cli.app import app\ntry:\n    app()\nfinally:\n"
        "    sys.stderr.write(' '.join(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *verb, "--help"], capture_output=True, text=True, check=True)
    modules = done.stderr.split()
    assert "Usage:" in done.stdout
    assert not HEAVY & set(modules)
    assert len(modules) < 500


def test_choices_are_those_of_the_tables() -> None:
    """Profiles and engines that options offer are those that the functions know."""
    verbs: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for verb, option, known in (
        ("eval", "activations", PROFILES),
        ("tasks", "activations", PROFILES),
        ("fit", "engine", ENGINE_NAMES),
    ):
        text = verbs[verb].get_help(verbs[verb].make_context(verb, [], resilient_parsing=True))
        assert f"--{option} <{'|'.join(known)}>" in text


def test_the_version_is_printed() -> None:
    """`--version` prints one line."""
    assert run("--version").stdout == f"snugfit {__version__}\n"


def test_completion_is_offered() -> None:
    """The shell can ask for verbs and options (`--install-completion` writes what does so)."""
    environment = {**os.environ, "_SNUGFIT_COMPLETE": "complete_bash", "COMP_WORDS": "snugfit stat", "COMP_CWORD": "1"}
    command = Path(sys.executable).with_name("snugfit")
    done = subprocess.run([command], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.split() == ["statistics"]


def test_no_arguments_print_help() -> None:
    """The bare command prints its help and names every verb."""
    result = CliRunner().invoke(app, [])
    for verb in OFFERED:
        assert verb.split()[0] in result.output


@pytest.mark.parametrize("arguments", [["quantize"], ["quantize", "x"], ["quantise"], ["inspect", "x", "--tasks"]])
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    """A missing argument, an unknown verb or option is exit code 2, with nothing on stdout."""
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage:" in result.stderr


@pytest.mark.parametrize(
    ("verb", "option", "value"),
    [
        ("quantize x -r nvfp4", "--num-samples", "many"),
        ("quantize x -r nvfp4", "--num-samples", "0"),
        ("quantize x -r nvfp4", "--max-seq-length", "0"),
        ("quantize x -r nvfp4", "--max-seq-length", "1e3"),
        ("quantize x -r nvfp4", "--tokens-per-batch", "-1"),
        ("quantize x -r nvfp4", "--max-forced-tokens", "-1"),
        ("quantize x -r nvfp4", "--min-tokens-per-expert", "few"),
        ("quantize x -r nvfp4", "--max-shard-size", "0"),
        ("quantize x -r nvfp4", "--max-shard-size", "nan"),
        ("quantize x -r nvfp4", "--max-shard-size", "inf"),
        ("eval x", "--context", "4k;8k"),
        ("eval x", "--context", ""),
        ("eval x", "--max-chunks", "0"),
        ("eval x", "--activations", "hopper"),
        ("eval x", "--noise-floor", "candidates"),
        ("eval x", "--continuations", "-1"),
        ("eval x", "--answer-tokens", "7"),
        ("bench http://x", "--output-tokens", "1"),
        ("serve x --bench", "--output-tokens", "1"),
        ("serve x --bench", "--prompt-tokens", "0"),
        ("tasks x --tasks y", "--limit", "0"),
        ("tasks x --tasks y", "--activations", "hopper"),
        ("fit x --gpu 16GiB", "--engine", "tgi"),
        ("fit x --gpu 16GiB", "--context", "0"),
        ("fit x --gpu 16GiB", "--tensor-parallel-size", "0"),
        ("fit x --gpu 16GiB", "--max-num-seqs", "0"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_its_option(verb: str, option: str, value: str) -> None:
    """Numbers out of range, words outside the choices: one line, exit code 2, before the model is opened."""
    result = CliRunner().invoke(app, [*verb.split(), option, value])
    assert failed_with(result, "option-invalid", f"{option}: ")
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


@pytest.mark.parametrize(
    "arguments", [["quantize", "--gpu", "16GiB"], ["eval", "--tasks", "piqa"], ["eval", "--limit", "3"]]
)
def test_verbs_have_no_options_of_others(arguments: list[str]) -> None:
    """What fits is `fit`, tasks are `tasks`."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "No such option" in result.stderr


@pytest.mark.parametrize("option", ["--server-model", "--top-logprobs", "--server-log"])
def test_options_of_a_server_need_one(option: str) -> None:
    """What would have no effect is refused."""
    assert failed_with(CliRunner().invoke(app, ["eval", "x", option, "5"]), "option-conflict", option, "--server")


def test_a_server_needs_an_output_directory() -> None:
    """The answers of a server are kept beside it."""
    result = CliRunner().invoke(app, ["eval", "x", "--server", "http://127.0.0.1:9"])
    assert failed_with(result, "option-missing", "--output-dir")


@pytest.mark.parametrize("value", ["0", "many", "-5", "٣"])
def test_top_logprobs_is_a_number_or_all(value: str, tmp_path: Path) -> None:
    """Anything else is refused before the server is asked."""
    result = CliRunner().invoke(
        app, ["eval", "x", "--server", "http://127.0.0.1:9", "-o", str(tmp_path / "out"), "--top-logprobs", value]
    )
    assert failed_with(result, "option-invalid", "--top-logprobs")


# --- snugfit recipes


def test_recipes_lists_names_and_descriptions() -> None:
    """`recipes` lists each built-in recipe with what it does."""
    text = " ".join(run("recipes").stdout.split())
    for name in builtin_names():
        assert f"{name} {load_recipe(name).recipe.description}" in text


@pytest.mark.parametrize("name", ["nvfp4-fp8-hybrid", "int4-w4a16"])
def test_recipes_prints_one_as_yaml(name: str) -> None:
    """`recipes NAME` prints the YAML as it is shipped, and nothing else."""
    result = run("recipes", name)
    assert result.stdout == load_recipe(name).text
    assert yaml.safe_load(result.stdout)["name"] == name
    assert result.stderr == ""


def test_recipes_as_json() -> None:
    """`recipes --json` prints one JSON list with every built-in recipe; with a name, with that one."""
    every = json.loads(run("recipes", "--json").stdout)
    assert [entry["name"] for entry in every] == builtin_names()
    assert all(entry["rules"] and entry["description"] for entry in every)
    one = json.loads(run("recipes", "nvfp4-fp8-hybrid", "--json").stdout)
    assert one == [entry for entry in every if entry["name"] == "nvfp4-fp8-hybrid"]
    assert one[0]["rules"][0] == {"role": ["mlp"], "format": "nvfp4"}
    assert {r.get("scale_rule") for e in every if "four-over-six" in e["name"] for r in e["rules"]} == {
        "four-over-six",
        None,  # FP8
    }


@pytest.mark.parametrize(("name", "says"), [("nvfp5", "nvfp4"), ("zzz", "`snugfit recipes`")])
def test_recipes_refuses_unknown_names(name: str, says: str) -> None:
    """`recipes NAME` of no built-in recipe is exit code 2; the remedy is the nearest name, or the list."""
    result = CliRunner().invoke(app, ["recipes", name])
    assert failed_with(result, "recipe-not-found", name, says)
    assert result.stdout == ""


def test_recipes_refuses_a_file(mixed: str) -> None:
    """`recipes FILE` is refused: it prints only what is built in."""
    result = CliRunner().invoke(app, ["recipes", mixed])
    assert failed_with(result, "recipe-not-found", mixed)
    assert result.stdout == ""


# --- snugfit quantize --dry-run


@pytest.mark.parametrize("model", ["llama", "tied"])
@pytest.mark.parametrize(
    "recipe", ["nvfp4-four-over-six", "nvfp4-fp8-hybrid-four-over-six", "fp8-dynamic", "fp8-int4-absmax", "mixed"]
)
def test_dry_run_foretells_the_real_run(
    model: str, recipe: str, token_rows: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """What a dry run plans, every name, dtype, shape and byte, is what safetensors reads back after the real run."""
    if (model, recipe) == ("tied", "mixed"):
        recipe = "int4-w4a16-absmax"  # a tied head takes no rule
    source = request.getfixturevalue(model)
    recipe = request.getfixturevalue("mixed") if recipe == "mixed" else recipe
    options = ["-r", recipe, "--max-shard-size", "0.00006", "--dataset", token_rows]
    dry = json.loads(run("quantize", source, *options, "--dry-run", "--json").stdout)
    plan = plan_quantization(source, recipe, max_shard_size=60_000, dataset=[token_rows]).plan
    target = tmp_path / "out"
    real = json.loads(run("quantize", source, *options, "-o", target, "--json").stdout)

    found = written(target)
    assert found == {info.name: (info.dtype, info.shape) for infos in plan.outputs.values() for info in infos}
    sizes = {name: bytes_of(*found[name]) for name in found}
    assert dry["bytes"] == plan.bytes == real["bytes"] == sum(sizes.values())
    for tensor in dry["tensors"]:
        assert tensor["bytes"] == sum(sizes[info.name] for info in plan.outputs[tensor["name"]]), tensor["name"]
    planned = ("name", "format", "scale_rule", "shape", "bytes", "source_bytes")
    assert [[t[k] for k in planned] for t in dry["tensors"]] == [[t[k] for k in planned] for t in real["tensors"]]
    assert {t["name"] for t in dry["tensors"]} == set(written(source))
    assert sorted(path.name for path in target.glob("*.safetensors")) == [shard.name for shard in plan.shards]
    for shard in plan.shards:
        assert (target / shard.name).stat().st_size == shard.bytes


def test_dry_run_prints_a_table(llama: Path, mixed: str, token_rows: Path) -> None:
    """The dry run's table names every tensor with format, shape and bytes, and their exact total."""
    result = run("quantize", llama, "-r", mixed, "--dry-run", "--dataset", token_rows)
    plan = plan_quantization(llama, mixed, dataset=[token_rows])
    lines = [line.split() for line in result.stdout.splitlines()]
    for record in plan.records():
        shape = "x".join(str(side) for side in record.shape)
        assert [record.name, *record.format.split(), shape, f"{record.bytes:,}"] in lines
    total = next(line for line in lines if line[:1] == ["all"])
    assert total[-2:] == [f"{sum(r.source_bytes for r in plan.records()):,}", f"{plan.bytes:,}"]
    assert result.stderr == ""


@pytest.mark.parametrize("options", [[], ["--json"], ["-o", "out"]], ids=" ".join)
def test_dry_run_writes_nothing(
    options: list[str], llama: Path, token_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dry run changes no file and needs no output, though the recipe is a calibrated one."""
    monkeypatch.chdir(tmp_path)
    before = listing(llama)
    run("quantize", llama, "-r", "nvfp4-four-over-six", "--dry-run", "--dataset", token_rows, *options)
    assert listing(llama) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "code", "place"),
    [
        (["--device", "tpu"], "option-invalid", "--device"),
        (["--statistics", "nowhere"], "file-missing", "nowhere"),
        (["--dataset", "missing.jsonl"], "file-missing", "missing.jsonl"),
        (["--num-samples", "-3"], "option-invalid", "--num-samples"),
        (["--max-shard-size", "1e-10"], "option-invalid", "--max-shard-size"),
    ],
)
def test_dry_run_checks_every_option(options: list[str], code: str, place: str, llama: Path, tmp_path: Path) -> None:
    """What the run would refuse, the dry run refuses in the same words, and both print nothing on stdout."""
    arguments = ["quantize", str(llama), "-r", "nvfp4-four-over-six", *options]
    dry = CliRunner().invoke(app, [*arguments, "--dry-run"])
    real = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "out")])
    assert failed_with(dry, code, place)
    assert failed_with(real, code, place)
    assert (dry.stdout, real.stdout) == ("", "")
    assert dry.stderr.splitlines()[-1] == real.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_dry_run_shows_the_plan_before_it_refuses_for_lack_of_memory(
    llama: Path, token_rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine with too little: the table, the estimate, then the refusal with exit code 2."""
    leave_free(monkeypatch, 1 << 20)
    result = CliRunner().invoke(
        app, ["quantize", str(llama), "-r", "nvfp4-four-over-six", "--dry-run", "--dataset", str(token_rows)]
    )
    assert failed_with(result, "memory-insufficient")
    assert "model.layers.0.mlp.down_proj.weight" in result.stdout
    assert "GB of memory" in result.stdout


def test_dry_run_shows_odd_names_as_they_are(make_tiny: MakeTiny) -> None:
    """A tensor's name is printed letter by letter, whatever markup it resembles."""
    source = make_tiny("llama", num_hidden_layers=1)
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {"[/].[red].x": torch.zeros(2)}, source / "model.safetensors", metadata={"format": "pt"})
    assert "[/].[red].x" in run("quantize", source, "-r", "fp8-dynamic", "--dry-run").stdout


# --- snugfit quantize


def test_json_of_a_run_is_the_stored_record(llama: Path, token_rows: Path, tmp_path: Path) -> None:
    """`--json` prints one JSON document on stdout, the very record that is stored; progress goes to stderr."""
    target = tmp_path / "out"
    result = run(
        "quantize", llama, "-r", "nvfp4-fp8-hybrid-four-over-six", "-o", target, "--dataset", token_rows, "--json"
    )
    assert result.stdout == (target / RECORD_FILE).read_text(encoding="utf-8")
    record = json.loads(result.stdout)
    assert record["recipe"] == "nvfp4-fp8-hybrid-four-over-six"
    assert record["bytes"] == sum(tensor["bytes"] for tensor in record["tensors"])
    assert record["dataset"]["samples"] == 6
    assert record["dataset"]["tokens"] == 6 * 48
    assert "layers" in result.stderr
    assert "4/4" in result.stderr


def test_a_run_prints_totals_on_stdout(llama: Path, tmp_path: Path) -> None:
    """Without `--json`, stdout has the totals by format and the target; the progress bar stays on stderr."""
    target = tmp_path / "out"
    result = run("quantize", llama, "-r", "fp8-dynamic", "-o", target)
    assert "4/4" not in result.stdout
    assert "4/4" in result.stderr
    record = json.loads((target / RECORD_FILE).read_text(encoding="utf-8"))
    lines = [line.split() for line in result.stdout.splitlines()]
    assert next(line for line in lines if line[:1] == ["all"])[-1] == f"{record['bytes']:,}"
    assert next(line for line in lines if line[:1] == ["fp8-dynamic"])[1] == "21"
    assert str(target) in result.stdout


def test_a_run_leaves_the_directory_complete(llama: Path, tmp_path: Path) -> None:
    """The output has weights, config, recipe, record and the source's other files; no lock, no partial directory."""
    target = tmp_path / "deep" / "out"
    run("quantize", llama, "-r", "fp8-dynamic", "-o", target)
    names = {path.name for path in target.iterdir()}
    assert names == {"model.safetensors", "config.json", "generation_config.json", RECIPE_FILE, RECORD_FILE}
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_weights_in_other_containers_are_left_out(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """Weights in other containers are not copied, and a message names them; other files survive."""
    source = make_tiny("llama", num_hidden_layers=1)
    (source / "pytorch_model.bin").write_bytes(b"x")
    (source / "original").mkdir()
    (source / "original" / "params.json").write_text("{}", encoding="utf-8")
    (source / ".cache").mkdir()
    (source / ".cache" / "secret").write_text("x", encoding="utf-8")
    target = tmp_path / "out"
    result = run("quantize", source, "-r", "fp8-dynamic", "-o", target)
    assert "pytorch_model.bin" in result.stderr
    assert json.loads((target / RECORD_FILE).read_text(encoding="utf-8"))["left_out"] == ["pytorch_model.bin"]
    assert not (target / "pytorch_model.bin").exists()
    assert not (target / ".cache").exists()
    assert (target / "original" / "params.json").read_text(encoding="utf-8") == "{}"


def test_adapters_and_loose_weights_of_a_source(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """An adapter below stays whole, one at the top goes with its config, prediction layers are lost; all is said."""
    source = make_tiny("llama", num_hidden_layers=1)
    (source / "vision-lora").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (source / name).write_bytes(b"x")
        (source / "vision-lora" / name).write_bytes(b"y")
    (source / "mtp.safetensors").write_bytes(b"x")
    (source / "checkpoint-5").mkdir()
    (source / "checkpoint-5" / "trainer_state.json").write_text("{}", encoding="utf-8")
    target = tmp_path / "out"
    result = run("quantize", source, "-r", "fp8-dynamic", "-o", target)
    left_out = ["adapter_config.json", "adapter_model.safetensors", "checkpoint-5/", "mtp.safetensors"]
    assert json.loads((target / RECORD_FILE).read_text(encoding="utf-8"))["left_out"] == left_out
    assert not any((target / name).exists() for name in left_out)
    assert (target / "vision-lora" / "adapter_model.safetensors").read_bytes() == b"y"
    assert (target / "vision-lora" / "adapter_config.json").read_bytes() == b"y"
    plan = run("quantize", source, "-r", "fp8-dynamic", "--dry-run")
    shown = run("inspect", source)
    for output in (result.stderr, plan.stderr, shown.stdout):
        assert "an adapter beside the weights" in output
        assert "mtp.safetensors" in output


@pytest.mark.parametrize("place", ["out", "deep/out", "../MODEL/out", "link"])
def test_an_output_inside_the_model_is_refused(place: str, make_tiny: MakeTiny, tmp_path: Path) -> None:
    """An output in the model's own directory, through a link too, is refused by each verb that reads the model."""
    source = make_tiny("llama", num_hidden_layers=1)
    (tmp_path / "link").symlink_to(source)
    target = tmp_path / "link" / "out" if place == "link" else source / place.replace("MODEL", source.name)
    before = sorted(source.rglob("*"))
    quantize = ("quantize", source, "-r", "fp8-dynamic", "-o", target)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"input_ids": [3, 4, 5]}\n', encoding="utf-8")
    for arguments in (
        (*quantize, "--dataset", rows),
        (*quantize, "--dataset", rows, "--dry-run"),
        ("statistics", "collect", source, "-o", target, "--dataset", rows),
        ("eval", source, "-o", target, "--dataset", rows),
        ("eval", tmp_path / "other", "--reference", source, "-o", target, "--dataset", rows),
        ("tasks", source, "--tasks", "piqa", "-o", target),
        ("dataset", rows, "--model", source, "-o", target),
        ("report", source, "-o", target),
        ("statistics", "merge", source, "-o", target),
        ("statistics", "import", rows, "--model", source, "-o", target),
    ):
        result = CliRunner().invoke(app, [*map(str, arguments)])
        assert failed_with(result, "output-not-writable", target)
    assert sorted(source.rglob("*")) == before


def test_figures_of_statistics_inside_a_model_are_refused(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """`statistics show` of a quantized model refuses an output in the model, and not one beside other statistics."""
    source, out = make_tiny("llama", num_hidden_layers=1), tmp_path / "out"
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"input_ids": [3, 4, 5]}\n', encoding="utf-8")
    run("quantize", source, "-r", "nvfp4", "-o", out, "--dataset", rows)
    result = CliRunner().invoke(app, ["statistics", "show", str(out), "-o", str(out / "figures")])
    assert failed_with(result, "output-not-writable", out / "figures")
    run("statistics", "collect", source, "-o", tmp_path / "found", "--dataset", rows)
    run("statistics", "show", tmp_path / "found", "-o", tmp_path / "found" / "figures")


def test_an_output_is_needed(llama: Path) -> None:
    """Without `-o` and without `--dry-run` the command is refused with both as remedies."""
    result = CliRunner().invoke(app, ["quantize", str(llama), "-r", "fp8-dynamic"])
    assert failed_with(result, "option-missing", "--output-dir", "`--dry-run`")
    assert result.stdout == ""


def test_a_run_without_a_dataset_says_what_it_uses(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """Without `--dataset` every run that needs text says aloud that Python's documentation stands in for it."""
    source = add_tokenizer(make_tiny("llama", num_hidden_layers=1))
    rows = ["--num-samples", 1, "--max-seq-length", 8]
    for arguments, expected in (
        (["quantize", source, "-r", "nvfp4-four-over-six", *rows, "--dry-run"], True),
        (["quantize", source, "-r", "nvfp4-four-over-six", *rows, "-o", tmp_path / "out"], True),
        (["statistics", "collect", source, *rows, "-o", tmp_path / "statistics"], True),
        (["eval", source, "--context", 64, "--max-chunks", 1], True),
        (["quantize", source, "-r", "fp8-dynamic", "--dry-run"], False),
    ):
        assert ("Python's documentation" in run(*arguments).stderr) == expected, arguments


def test_the_installed_command_runs() -> None:
    """The package installs a command `snugfit` that runs this command line."""
    command = Path(sys.executable).with_name("snugfit")
    done = subprocess.run([command, "recipes", "fp8-dynamic"], capture_output=True, text=True, check=True)
    assert done.stdout == load_recipe("fp8-dynamic").text
