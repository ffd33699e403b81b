"""`snugfit plan`: a plan for a model, and plans that checkpoints have already."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from snugfit.cli import options
from snugfit.cli.errors import VerbProgress, keeping, reporting
from snugfit.distributed import is_main_to_be
from snugfit.errors import UserError, plain
from snugfit.token_counts import parse_token_list

if TYPE_CHECKING:
    from snugfit.records.plan import PlanRecord

REFUSED = 1  # exit code of a plan that did not beat its control


def plan(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A directory with config.json and safetensors weights."),
    ] = None,
    output_dir: options.OptionalOutputDir = None,
    gpu: Annotated[
        str | None, typer.Option(metavar="NAME", help="Fit a GPU: a size (16GiB), or a card ('RTX 5060 Ti 16GB').")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(parser=options.tokens(), metavar="TOKENS", help="Context that must fit beside the weights."),
    ] = None,
    tensor_parallel_size: options.TensorParallelSize = 1,
    engine: Annotated[options.Engine, typer.Option(help="Engine, as in `fit`.")] = "vllm",
    gpu_memory_utilization: options.GpuMemoryUtilization = None,
    max_num_seqs: options.MaxNumSeqs = 1,
    bytes: Annotated[  # noqa: A002  # the option's name
        int | None,
        typer.Option(parser=options.size, metavar="SIZE", help="All weights in at most so many bytes (9.7GB)."),
    ] = None,
    bits_per_weight: Annotated[
        float | None, typer.Option(metavar="BITS", help="At most so many bits a weight, scales included.")
    ] = None,
    disk: Annotated[
        int | None,
        typer.Option(parser=options.size, metavar="SIZE", help="All files that engines read on at most so much disk."),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            metavar="NATS", help="Lose at most this KL: the smallest file, or with `gpu` alone the longest context."
        ),
    ] = None,
    menu: Annotated[
        str, typer.Option(metavar="FORMAT,...", help="Formats to choose from. Default: all that the engine runs.")
    ] = "",
    constraints: Annotated[
        Path | None, typer.Option(metavar="PATH", help="YAML with rules that the plan has to keep.")
    ] = None,
    scores: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH",
            help="Scores of an earlier plan of this model (its directory or file); repeatable: they are merged.",
        ),
    ] = None,
    dataset: options.Dataset = None,
    max_seq_length: Annotated[
        int | None,
        typer.Option(parser=options.tokens(), metavar="TOKENS", help="Longest context that is scored. Default: 2048."),
    ] = None,
    num_tokens: Annotated[
        int | None,
        typer.Option(
            parser=options.tokens(), metavar="TOKENS", help="Tokens scored in each bucket of positions. Default: 4000."
        ),
    ] = None,
    rounding: Annotated[
        Literal["plain", "weighted"] | None,
        typer.Option(
            help="How weights are rounded while they are scored and measured. Default: weighted, or as the scores."
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Option(metavar="PROFILE", help="Engine profile of inputs. Default: the GPU's.")
    ] = None,
    held_out: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH", help="Texts that the proof measures on. Default: topics that scoring leaves out."),
    ] = None,
    held_out_contexts: Annotated[
        str, typer.Option(metavar="TOKENS,...", help="Contexts of the proof. Default: the two longest scored ones.")
    ] = "",
    max_tokens: Annotated[
        int | None,
        typer.Option(parser=options.tokens(), metavar="TOKENS", help="Tokens of the proof at each context, at most."),
    ] = None,
    alternatives: Annotated[
        int, typer.Option(min=0, metavar="NUMBER", help="Further good plans to list and measure.")
    ] = 2,
    prove: Annotated[
        bool, typer.Option("--prove/--no-prove", help="Measure the plan against controls on held-out text.")
    ] = True,
    device: options.Device = None,
    tokens_per_batch: options.TokensPerBatch = None,
    seed: Annotated[int, typer.Option(metavar="NUMBER", help="Seed of what is drawn at random.")] = 0,
    restart: options.Restart = False,
    force_resume: options.ForceResume = False,
    from_checkpoint: Annotated[
        str | None,
        typer.Option("--from", metavar="CHECKPOINT", help="Read the plan of a quantized checkpoint as a recipe."),
    ] = None,
    diff: Annotated[
        str | None, typer.Option(metavar="OTHER", help="With `from`: show where another checkpoint or recipe differs.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and say what planning takes; write nothing.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Plan which weights of MODEL get which format, so that it fits and loses least.

    Measures what each weight's format costs, finds the best mix under the budget, and proves it on held-out text. The
    result is a recipe for `snugfit quantize`. With `--from` the plan of a quantized checkpoint is read instead.
    """
    if not is_main_to_be() and (dry_run or from_checkpoint is not None or diff is not None):
        return
    if from_checkpoint is not None or diff is not None:
        _check_alone(ctx, diff=diff is not None)
        _read(ctx, from_checkpoint, diff, model, output_dir, as_json=as_json)
        return
    if model is None:
        raise UserError("a model is required.", code="option-missing", where="model", remedy="Name it first.")
    settings: dict[str, Any] = {
        "gpu": gpu,
        "context": context,
        "tensor_parallel_size": tensor_parallel_size,
        "engine": engine,
        "gpu_memory_utilization": gpu_memory_utilization,
        "max_num_seqs": max_num_seqs,
        "bytes": bytes,
        "bits_per_weight": bits_per_weight,
        "disk": disk,
        "max_kl": max_kl,
        "menu": tuple(part.strip() for part in menu.split(",")) if menu else (),
        "constraints": constraints,
        "scores": scores or (),
        "dataset": dataset or (),
        "max_seq_length": max_seq_length,
        "num_tokens": num_tokens,
        "rounding": rounding,
        "target": target,
        "held_out": held_out or (),
        "held_out_contexts": parse_token_list(held_out_contexts, where="held_out_contexts")
        if held_out_contexts
        else (),
        "max_tokens": max_tokens,
        "alternatives": alternatives,
        "prove": prove,
        "device": device,
        "tokens_per_batch": tokens_per_batch,
        "seed": seed,
    }
    progress = VerbProgress(ctx)
    if dry_run:
        again = {"restart": restart, "force_resume": force_resume}
        _print_estimate(model, output_dir, settings | again, progress, as_json=as_json)
        return
    if output_dir is None:
        remedy = "Name a new directory, or add `dry_run`."
        raise UserError("an output directory is required.", code="option-missing", where="output_dir", remedy=remedy)
    partial = output_dir.with_name(output_dir.name + ".partial")
    with keeping(lambda: f"{partial} keeps what is finished" if partial.exists() else ""):
        from snugfit.planning.make_plan import plan as run

        record = run(
            model,
            output_dir=output_dir,
            restart=restart,
            force_resume=force_resume,
            progress=progress,
            **settings,
        )
    if not is_main_to_be():
        return
    with reporting(output_dir):
        if as_json:
            typer.echo(record.to_json(), nl=False)
        else:
            _print(record, output_dir, model)
    if record.verdict.accepted is False:
        raise typer.Exit(REFUSED)


def _check_alone(ctx: typer.Context, *, diff: bool) -> None:
    """UserError for an option that has no effect where a checkpoint's plan is read, or compared (`diff`)."""
    used = {"model", "from_checkpoint", "diff", "as_json" if diff else "output_dir"}
    for name in ctx.params:
        source = ctx.get_parameter_source(name)
        if name not in used and source is not None and source.name == "COMMANDLINE":
            what = f"has no effect with `{'diff' if diff else 'from_checkpoint'}`, which runs nothing."
            raise UserError(what, code="option-conflict", where=name, remedy="Leave it out.")


def _print_estimate(
    model: str, output_dir: Path | None, settings: dict[str, Any], progress: VerbProgress, *, as_json: bool
) -> None:
    """What planning takes, then the refusal of a run for which this machine has too little."""
    from snugfit.planning.plan_cost import check_resources, estimate_plan
    from snugfit.storage.staging import check_stageable

    if output_dir is not None:
        check_stageable(output_dir, models=[model])
    estimate = estimate_plan(model, output_dir=output_dir, **settings)
    for note in estimate.notes:
        progress.message(note)
    with reporting():
        if as_json:
            typer.echo(json.dumps(asdict(estimate), indent=2))
        typer.echo(plain(estimate.line()), err=as_json)
    check_resources(estimate, output_dir or Path("plan"), settings["device"])


def _print(record: PlanRecord, output_dir: Path, model: str) -> None:
    from snugfit.report.plan import closing_lines, group_sheet, next_commands, plan_lines, point_sheet
    from snugfit.report.terminal import print_lines, print_sheet

    print_lines(*plan_lines(record), "")
    print_sheet(group_sheet(record))
    print_sheet(point_sheet(record, narrow=True))
    print_lines(*closing_lines(record))
    print_lines(*next_commands(record, model, output_dir))


def _read(
    ctx: typer.Context,
    checkpoint: str | None,
    diff: str | None,
    model: str | None,
    output_dir: Path | None,
    *,
    as_json: bool,
) -> None:
    """`--from`: the recipe of a checkpoint on stdout or in a file, or its differences from another."""
    if checkpoint is None:
        remedy = "Name a quantized checkpoint."
        raise UserError("needs `from_checkpoint`.", code="option-missing", where="diff", remedy=remedy)
    from snugfit.planning.published import apply_recipe, diff_plans, read_plan, recipe_of

    if diff is not None:
        from snugfit.report.plan import differences_sheet
        from snugfit.report.terminal import print_sheet

        if model is not None:
            what, remedy = "compares two plans, of which neither is applied.", "Leave MODEL out."
            raise UserError(what, code="option-conflict", where="diff", remedy=remedy)
        found = diff_plans(checkpoint, diff)
        with reporting():
            if as_json:
                typer.echo(found.to_json(), nl=False)
            else:
                print_sheet(differences_sheet(found))
        return
    read = read_plan(checkpoint)
    recipe = recipe_of(read)
    if model is not None:
        for note in apply_recipe(recipe, model, made_for=read.layout):
            VerbProgress(ctx).message(note)
    if output_dir is None:
        with reporting():
            typer.echo(recipe.text, nl=False)
        return
    from snugfit.planning.published import write_recipe

    file = write_recipe(recipe, output_dir)
    with reporting(output_dir):
        typer.echo(plain(str(file)))
