"""The command line: one verb a function, its module imported when called. stdout is the result, stderr progress."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from snugfit.cli import statistics as cli_statistics
from snugfit.cli.errors import calibration_of, kept_layers, plain_errors, reporting
from snugfit.data.rows import DEFAULT_LENGTH, DEFAULT_ROWS
from snugfit.errors import UserError, plain
from snugfit.records.statistics_file import FORCED_TOKENS, LEAST_TOKENS

if TYPE_CHECKING:
    from snugfit.evaluation.served import ServerOptions

app = typer.Typer(
    help="Make a language model fit the GPU you have, in formats that vLLM, SGLang and transformers run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


app.add_typer(cli_statistics.app, name="statistics")

# options of `eval` that mean nothing to the others
_NOT_WITH_TASKS = (
    *("reference", "text", "context", "max_chunks", "max_tokens", "floors", "reference_cache", "continuations"),
    *("server_top", "server_log", "tokens_per_batch", "force"),
)
_OF_SERVERS = ("server_model", "server_top", "server_log")


def _kept_answers(journal: Path | None) -> Callable[[], str]:
    return lambda: f"{journal} keeps what the server answered" if journal and journal.exists() else ""


@app.command()
def quantize(
    model: Annotated[Path, typer.Argument(help="Directory with config.json and safetensors weights.")],
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="A built-in name (`snugfit recipes`) or a YAML file.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="New directory for the result.")] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="Text or JSONL to calibrate on. Default: Python's documentation.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Rows of calibration tokens at most.")] = DEFAULT_ROWS,
    length: Annotated[int, typer.Option(help="Tokens a row at most.")] = DEFAULT_LENGTH,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda where there is one.")] = None,
    tokens_per_batch: Annotated[int | None, typer.Option(help="Tokens in one forward pass.")] = None,
    max_shard_size: Annotated[
        float | None, typer.Option(help="Largest weight file in GB (10^9). Default: 0.5 to 5, by size.")
    ] = None,
    experts: Annotated[
        str, typer.Option(help="What experts of a mixture are calibrated on: all tokens, or those routed to them.")
    ] = "all",
    forced_tokens: Annotated[
        int, typer.Option(help="Tokens at most that an expert gets beside those routed to it, a layer.")
    ] = FORCED_TOKENS,
    least_tokens: Annotated[
        int, typer.Option(help="An expert that saw fewer is an error; 0: it takes its layer's scales.")
    ] = LEAST_TOKENS,
    statistics: Annotated[
        Path | None, typer.Option(help="What an earlier run measured on this model (file or directory).")
    ] = None,
    no_engine: Annotated[bool, typer.Option("--no-engine", help="Write even what no engine was seen to load.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew where a run was stopped.")] = False,
    resume_anyway: Annotated[
        bool, typer.Option("--resume-anyway", help="Go on under another machine, library version or batch.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print tensor, format and bytes.")] = False,
    gpu: Annotated[str | None, typer.Option(help="With --dry-run: what fits a GPU of this size or name.")] = None,
    context: Annotated[str | None, typer.Option(help="With --gpu: whether so many tokens do, such as 32k.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as one JSON document.")] = False,
) -> None:
    """Quantize MODEL by a recipe into a new directory that stock engines load."""
    with plain_errors(kept_layers(output)):
        from snugfit.planning.fit import fit_line
        from snugfit.quantization.plan import plan_quantization
        from snugfit.quantization.quantize import quantize_checkpoint
        from snugfit.report.terminal import print_plan, print_totals

        if max_shard_size is not None and not 0 < max_shard_size < float("inf"):
            raise UserError(f"a shard of {max_shard_size} GB is none.", remedy="Give a positive --max-shard-size.")
        shard_bytes = None if max_shard_size is None else int(max_shard_size * 1e9)
        if dry_run:
            plan = plan_quantization(model, recipe, max_shard_bytes=shard_bytes)
            fits = fit_line(plan, gpu, context=None if context is None else _lengths(context)[0]) if gpu else None
            print_plan(plan.records(), as_json)
            if fits is not None:
                typer.echo(fits, err=as_json)
            for obstacle in plan.obstacles:
                typer.echo(f"a run would be refused: {obstacle}", err=True)
            return
        if output is None:
            raise UserError("no output directory.", remedy="Name one with -o, or add --dry-run.")
        if gpu is not None or context is not None:
            raise UserError("--gpu and --context tell what fits, without a run.", remedy="Add --dry-run, or use `fit`.")
        record = quantize_checkpoint(
            model,
            output,
            recipe,
            text=text or (),
            rows=rows,
            length=length,
            device=device,
            tokens_per_batch=tokens_per_batch,
            max_shard_bytes=shard_bytes,
            calibration=calibration_of(experts, forced_tokens, least_tokens),
            statistics=statistics,
            no_engine=no_engine,
            restart=restart,
            resume_anyway=resume_anyway,
            progress=True,
            tell=lambda words: typer.echo(words, err=True),
        )
    with reporting(output):
        if as_json:
            typer.echo(record.to_json(), nl=False)
            return
        print_totals(record.tensors)
        if record.left_out:
            left_out = ", ".join(record.left_out)
            typer.echo(plain(f"weights in other containers, not copied: {left_out}"), err=True)
        place = plain(str(output))
        typer.echo(f"{place}: {record.seconds['total']:.1f} s, peak memory {record.peak_rss_bytes / 1e9:.2f} GB")


@app.command(name="eval")
def eval_(
    ctx: typer.Context,
    checkpoints: Annotated[list[Path] | None, typer.Argument(help="Model directories to evaluate.")] = None,
    reference: Annotated[
        Path | None, typer.Option(help="The original: a model directory, or a stored reference (.safetensors).")
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Text, JSONL (`messages`, `text`), or a folder of them. Default: Python's documentation."),
    ] = None,
    context: Annotated[str, typer.Option(help="Context lengths in tokens, such as 4096,8192,16384.")] = "2048",
    max_chunks: Annotated[int | None, typer.Option(help="Chunks of each context length at most.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="The same first tokens of the texts at every length.")] = None,
    activations: Annotated[
        str, typer.Option(help="What an engine does to activations: vllm-blackwell, marlin, vllm-cpu, none.")
    ] = "vllm-blackwell",
    floors: Annotated[str, typer.Option(help="Noise floor of: reference, all, none.")] = "reference",
    reference_cache: Annotated[
        Path | None, typer.Option(help="Folder to keep the reference's predictions in, and to take them from.")
    ] = None,
    continuations: Annotated[int, typer.Option(help="Places in chat logs where both models go on greedily.")] = 5,
    server: Annotated[str | None, typer.Option(help="URL of a vLLM server to evaluate.")] = None,
    server_model: Annotated[str | None, typer.Option(help="Which of the server's models.")] = None,
    server_top: Annotated[str, typer.Option(help="Tokens it is asked for at every place: a number, or all.")] = "256",
    server_log: Annotated[Path | None, typer.Option(help="Its log, which tells the kernels it chose.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Run lm_eval tasks instead: snugfit_piqa,hellaswag.")] = None,
    limit: Annotated[int | None, typer.Option(help="Items of each task at most.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="New directory for tables and plots.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda where there is one.")] = None,
    tokens_per_batch: Annotated[int | None, typer.Option(help="Tokens in one forward pass.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Let contexts exceed the model's positions.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as one JSON document.")] = False,
) -> None:
    """Measure what CHECKPOINTS lost against a reference: perplexity and KL by context length, with errors."""
    if tasks is not None:
        with plain_errors():
            _check_eval_options(ctx, output)
        settings = {"activations": activations, "limit": limit, "device": device}
        _run_tasks(checkpoints or [], tasks, settings, (server, server_model), output, as_json)
        return
    journal = None if server is None or output is None else _journal_of(output)
    with plain_errors(_kept_answers(journal)):
        _check_eval_options(ctx, output)
        from snugfit.evaluation.evaluate import evaluate, write_results
        from snugfit.report.tables import evaluation_sheets
        from snugfit.report.terminal import print_sheet

        asked = _server_options(server, server_model, server_top, server_log, output)
        record = evaluate(
            checkpoints or [],
            reference_model=reference,
            text=text or (),
            contexts=_lengths(context),
            max_chunks=max_chunks,
            max_tokens=max_tokens,
            activations=activations,
            floors=floors,
            reference_cache=reference_cache,
            continuations=continuations,
            server=asked,
            device=device,
            tokens_per_batch=tokens_per_batch,
            force=force,
            progress=True,
            tell=lambda words: typer.echo(words, err=True),
        )
        plots = [] if output is None else write_results(record, output)
    with reporting(output):
        if journal is not None:
            journal.unlink(missing_ok=True)  # what it held is in the result
        if as_json:
            typer.echo(record.to_json(), nl=False)
        else:
            for sheet in evaluation_sheets(record):
                print_sheet(sheet)
        if output is not None:
            count = len({Path(name).stem for name in plots})  # each as PNG and SVG
            counted = "1 plot" if count == 1 else f"{count} plots"
            typer.echo(f"{output}: eval.md, eval.json, eval.csv, {counted}", err=True)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="A result of `snugfit eval`: its directory, eval.json or tasks.json.")],
    b: Annotated[Path, typer.Argument(help="Another, on the same texts or tasks.")],
    model_a: Annotated[str | None, typer.Option(help="Which model of A, where it holds several.")] = None,
    model_b: Annotated[str | None, typer.Option(help="Which model of B, where it holds several.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="New directory for compare.json, .csv and .md.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as one JSON document.")] = False,
) -> None:
    """Say whether A and B differ, item by item and chunk by chunk, with p values that know how many were tried."""
    with plain_errors():
        from snugfit.evaluation.compare import compare_results, write_comparison
        from snugfit.report.comparison import comparison_markdown
        from snugfit.storage.staging import check_stageable

        if output is not None:
            check_stageable(output)
        record = compare_results(a, b, model_a=model_a, model_b=model_b)
        if output is not None:
            write_comparison(record, output)
    with reporting(output):
        typer.echo(record.to_json() if as_json else comparison_markdown(record), nl=False)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Directory with config.json and safetensors weights, or a Hub id.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as one JSON document.")] = False,
) -> None:
    """Tell what is in MODEL, from headers alone: parts, sizes, formats, and what each weight could become."""
    with plain_errors():
        from snugfit.inspection.inspect import inspect_model

        found = inspect_model(model)
        if as_json:
            typer.echo(found.to_json(), nl=False)
            return
        from snugfit.report.inspection import print_inspection

        print_inspection(found)


@app.command()
def fit(
    model: Annotated[
        str, typer.Argument(help="Directory with safetensors weights, or a Hub id; only headers are read.")
    ],
    gpu: Annotated[str, typer.Option(help="A size that CUDA reports (16GiB), or a card: 'RTX 5060 Ti 16GB', H100.")],
    context: Annotated[
        str | None, typer.Option(help="Tokens that must fit, such as 32k. Default: the longest.")
    ] = None,
    tp: Annotated[int, typer.Option("--tp", "--gpus", help="GPUs of that kind, in tensor parallelism.")] = 1,
    engine: Annotated[str, typer.Option(help="vllm, vllm-0.24, vllm-0.19, aphrodite (single user), sglang.")] = "vllm",
    utilization: Annotated[
        float | None, typer.Option("--gpu-memory-utilization", help="The engine's share of a GPU. Default: its own.")
    ] = None,
    sequences: Annotated[int, typer.Option(help="Sequences of that length at once.")] = 1,
    recipe: Annotated[
        list[str] | None, typer.Option("--recipe", "-r", help="Only these: built-in names or YAML files.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as one JSON document.")] = False,
) -> None:
    """Say which recipes make MODEL fit a GPU, with how long a context, and which kernels run it."""
    with plain_errors():
        from snugfit.planning.fit import fit_model
        from snugfit.report.terminal import print_fit
        from snugfit.vram.request import parse_tokens

        record = fit_model(
            model,
            gpu,
            context=None if context is None else parse_tokens(context),
            tp=tp,
            engine=engine,
            utilization=utilization,
            sequences=sequences,
            recipes=recipe or (),
        )
        if as_json:
            typer.echo(record.to_json(), nl=False)
        else:
            print_fit(record)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this built-in recipe's YAML.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """List the built-in recipes, or print one."""
    import json

    from snugfit.recipes.recipe import builtin_names, load_recipe
    from snugfit.report.terminal import print_recipes

    with plain_errors():
        if name is not None and name not in builtin_names():
            load_recipe(name)  # names the nearest, unless it is a file
            raise UserError(f"{name} is a file, not a built-in recipe.", remedy="`snugfit recipes` lists them.")
        loaded = [load_recipe(known) for known in ([name] if name else builtin_names())]
        if as_json:
            typer.echo(
                json.dumps([entry.recipe.model_dump(mode="json", exclude_none=True) for entry in loaded], indent=2)
            )
        elif name:
            typer.echo(loaded[0].text, nl=False)
        else:
            print_recipes([(entry.recipe.name, entry.recipe.description) for entry in loaded])


def _lengths(text: str) -> list[int]:
    """4096,8k -> [4096, 8192]."""
    lengths = []
    for part in text.replace(" ", "").split(","):
        number, thousands = (part[:-1], 1024) if part[-1:].lower() == "k" else (part, 1)
        if not number.isdecimal():
            raise UserError(f"{part!r} is no length.", where="--context", remedy="Write 4096,8192 or 4k,8k.")
        lengths.append(int(number) * thousands)
    return lengths


def _check_eval_options(ctx: typer.Context, output: Path | None) -> None:
    """UserError for an output that could not be written, and for options that would go unheard."""
    from snugfit.storage.staging import check_stageable

    if output is not None:
        check_stageable(output)
    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
    given = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    if ctx.params["floors"] == "none":
        given.discard("floors")  # there are none anyway
    tasks, served = ctx.params["tasks"] is not None, ctx.params["server"] is not None
    for names, applies, missing in (
        (_NOT_WITH_TASKS, not tasks, "no part in --tasks"),
        (("limit",), tasks, "no meaning without --tasks"),
        (_OF_SERVERS, served, "no meaning without --server"),
    ):
        unheard = [f"--{name.replace('_', '-')}" for name in names if name in given]
        if unheard and not applies:
            have = "has" if len(unheard) == 1 else "have"
            remedy = f"Leave {'it' if len(unheard) == 1 else 'them'} out."
            raise UserError(f"{', '.join(unheard)} {have} {missing}.", remedy=remedy)


def _journal_of(output: Path) -> Path:
    """Where a server's answers are kept until the output is whole."""
    return output.with_name(output.name + ".journal")


def _server_options(
    url: str | None, model: str | None, top: str, log: Path | None, output: Path | None
) -> ServerOptions | None:
    from snugfit.evaluation.served import ServerOptions
    from snugfit.serving.answers import FULL

    if url is None:
        return None
    if output is None:
        raise UserError("a server's answers need a place.", where="--server", remedy="Name a new directory with -o.")
    if top != "all" and not (top.isdecimal() and int(top) > 0):
        raise UserError(f"{top!r} is no number of tokens.", where="--server-top", remedy="Write 256, or all.")
    return ServerOptions(url, _journal_of(output), model, FULL if top == "all" else int(top), log)


def _run_tasks(
    checkpoints: list[Path],
    tasks: str,
    settings: dict[str, Any],
    server: tuple[str | None, str | None],
    output: Path | None,
    as_json: bool,
) -> None:
    with plain_errors():
        from snugfit.evaluation.tasks import run_tasks, write_tasks
        from snugfit.report.tables import task_sheet
        from snugfit.report.terminal import print_sheet

        if len(checkpoints) != 1:
            raise UserError(
                f"tasks are run on one model at a time, not on {len(checkpoints)}.",
                where="--tasks",
                remedy="Name one checkpoint (with --server: the directory of its tokenizer), then `snugfit compare`.",
            )
        names = [name for name in tasks.replace(" ", "").split(",") if name]
        run = run_tasks(checkpoints[0], names, server=server[0], server_model=server[1], progress=True, **settings)
        if output is not None:
            write_tasks(run, output)
    with reporting(output):
        if as_json:
            typer.echo(run.record.to_json(), nl=False)
        else:
            print_sheet(task_sheet(run.record))
        if output is not None:
            typer.echo(f"{output}: tasks.json, samples.jsonl, lm_eval.json", err=True)
