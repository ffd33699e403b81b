"""`snugfit eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from snugfit.cli import options
from snugfit.cli.errors import VerbProgress, keeping, reporting
from snugfit.distributed import is_main_to_be
from snugfit.errors import UserError, plain
from snugfit.token_counts import parse_token_list

if TYPE_CHECKING:
    from snugfit.evaluation.served import ServerOptions


def evaluate(
    ctx: typer.Context,
    models: Annotated[
        list[Path] | None, typer.Argument(metavar="MODELS", help="Model directories to evaluate.")
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="The original: a model directory, or a stored reference (.safetensors)."),
    ] = None,
    dataset: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH",
            help="Text, JSONL, Parquet or a folder of them, repeatable; or a set. Default: Python's documentation.",
        ),
    ] = None,
    contexts: Annotated[
        str, typer.Option("--context", metavar="TOKENS,...", help="Context lengths, such as 4096,8192 or 4k,8k.")
    ] = "2048",
    max_chunks: Annotated[
        int | None, typer.Option(min=1, metavar="NUMBER", help="Chunks of each context length at most.")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            parser=options.tokens(), metavar="TOKENS", help="Use the same first tokens of the texts at every length."
        ),
    ] = None,
    activations: options.Activations = "vllm-blackwell",
    noise_floor: Annotated[
        Literal["reference", "all", "none"], typer.Option(help="Models whose noise floor is measured.")
    ] = "reference",
    reference_cache: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Folder that stores the reference's predictions for later runs.")
    ] = None,
    continuations: Annotated[
        int,
        typer.Option(min=0, metavar="NUMBER", help="Positions in chat logs from which both models continue greedily."),
    ] = 5,
    answers: Annotated[
        int,
        typer.Option(min=0, metavar="NUMBER", help="Questions that all models answer greedily: length, repetition."),
    ] = 0,
    questions: Annotated[
        Path | None, typer.Option(metavar="PATH", help="With --answers: your questions, one a line.")
    ] = None,
    answer_tokens: Annotated[
        int,
        typer.Option(parser=options.tokens(8), metavar="TOKENS", help="With --answers: tokens of an answer at most."),
    ] = 192,
    server: Annotated[str | None, typer.Option(metavar="URL", help="URL of a vLLM server to evaluate.")] = None,
    server_model: Annotated[str | None, typer.Option(metavar="NAME", help="Which of the server's models.")] = None,
    top_logprobs: Annotated[
        str | None,
        typer.Option(metavar="NUMBER", help="Tokens that the server scores at every position: a number (256), or all."),
    ] = None,
    server_log: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Log of the server, from which the names of its kernels are read."),
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", "-o", metavar="PATH", help="New directory for tables and plots.")
    ] = None,
    device: options.Device = None,
    tokens_per_batch: options.TokensPerBatch = None,
    dtype: options.Dtype = None,
    experts_per_group: options.ExpertsPerGroup = None,
    allow_long_context: Annotated[
        bool, typer.Option("--allow-long-context", help="Allow contexts beyond the positions of the model.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Measure what MODELS lost against a reference.

    Perplexity and KL by context length, with standard errors and a noise floor.
    """
    lengths = parse_token_list(contexts, where="contexts")
    served = _server_options(server, server_model, top_logprobs, server_log, output_dir)
    journal = None if served is None else served.journal
    with keeping(lambda: f"{journal} keeps the server's answers" if journal and journal.exists() else ""):
        from snugfit.evaluation.evaluate import evaluate as run
        from snugfit.evaluation.evaluate import write_results
        from snugfit.storage.staging import check_stageable

        if output_dir is not None:
            check_stageable(output_dir, models=[*(models or []), reference])
        record = run(
            models or [],
            reference=reference,
            dataset=dataset or (),
            contexts=lengths,
            max_chunks=max_chunks,
            max_tokens=max_tokens,
            activations=activations,
            noise_floor=noise_floor,
            reference_cache=reference_cache,
            continuations=continuations,
            answers=answers,
            questions=questions,
            answer_tokens=answer_tokens,
            server=served,
            device=device,
            tokens_per_batch=tokens_per_batch,
            dtype=dtype,
            experts_per_group=experts_per_group,
            allow_long_context=allow_long_context,
            progress=VerbProgress(ctx),
        )
        if not is_main_to_be():
            return
        plots = [] if output_dir is None else write_results(record, output_dir)
    with reporting(output_dir):
        from snugfit.report.tables import evaluation_sheets
        from snugfit.report.terminal import print_sheet

        if journal is not None:
            journal.unlink(missing_ok=True)  # the result holds its answers
        if as_json:
            typer.echo(record.to_json(), nl=False)
        else:
            for sheet in evaluation_sheets(record):
                print_sheet(sheet)
        if output_dir is not None:
            count = len({Path(name).stem for name in plots})  # each as PNG and SVG
            counted = "1 plot" if count == 1 else f"{count} plots"
            typer.echo(f"{plain(str(output_dir))}: eval.md, eval.json, eval.csv, {counted}", err=True)


def _server_options(
    url: str | None, model: str | None, top_logprobs: str | None, log: Path | None, output_dir: Path | None
) -> ServerOptions | None:
    if url is None:
        for name, value in (("server_model", model), ("top_logprobs", top_logprobs), ("server_log", log)):
            if value is not None:
                raise UserError("has no effect without `server`.", code="option-conflict", where=name)
        return None
    if output_dir is None:
        what = "the answers of a server are kept beside the output directory, and none is given."
        raise UserError(what, code="option-missing", where="output_dir", remedy="Name a new directory.")
    number = None if top_logprobs in (None, "all") else top_logprobs
    if number is not None and not (number.isascii() and number.isdecimal() and int(number) > 0):
        raise UserError(f"must be a number >= 1 or all, got {number!r}.", code="option-invalid", where="top_logprobs")
    from snugfit.evaluation.served import DEFAULT_TOP_LOGPROBS, ServerOptions
    from snugfit.serving.answers import FULL

    default = FULL if top_logprobs == "all" else DEFAULT_TOP_LOGPROBS
    top = default if number is None else int(number)
    journal = output_dir.with_name(output_dir.name + ".journal")
    return ServerOptions(url=url, journal=journal, model=model, top_logprobs=top, log=log)
