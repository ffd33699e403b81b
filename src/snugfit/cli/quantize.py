"""`snugfit quantize`, and its dry run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from snugfit.cli import options
from snugfit.cli.errors import VerbProgress, keeping, kept_layers, reporting
from snugfit.distributed import is_main_to_be
from snugfit.engines.profiles import DEFAULT_PROFILE
from snugfit.errors import plain
from snugfit.formats.spec import DEFAULT_INPUT_HEADROOM, headroom_problem
from snugfit.records.statistics_file import MAX_FORCED_TOKENS, MIN_TOKENS_PER_EXPERT

GB = 10**9


def _shard_size(given: str | int) -> int:
    """The bytes of a `--max-shard-size`: a size as elsewhere, or a number of GB."""
    try:
        gigabytes = float(given)
    except ValueError:
        return options.size(given)
    if not 0 < gigabytes < math.inf:
        raise typer.BadParameter(f"must be > 0 GB, got {given}.")
    return int(gigabytes * GB)


def _headroom(given: str | float) -> float:
    """The number of an `--input-headroom`; typer passes defaults through it as well."""
    try:
        number = 1.0 if given == "amax" else float(given)
    except ValueError:
        number = math.nan
    if problem := headroom_problem(number if math.isfinite(number) else given):
        raise typer.BadParameter(problem)
    return number


def quantize(
    ctx: typer.Context,
    model: options.Model,
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", metavar="NAME", help="A built-in name (`snugfit recipes`) or a YAML file.")
    ],
    output_dir: options.OptionalOutputDir = None,
    dataset: options.Dataset = None,
    num_samples: options.NumSamples = None,
    max_seq_length: options.MaxSeqLength = None,
    shuffle_seed: options.ShuffleSeed = None,
    device: options.Device = None,
    tokens_per_batch: options.TokensPerBatch = None,
    dtype: options.Dtype = None,
    max_shard_size: Annotated[
        int | None,
        typer.Option(
            parser=_shard_size,
            metavar="SIZE",
            help="Largest weight file, such as 5GB. Default: 0.5 to 5 GB, by size.",
        ),
    ] = None,
    moe_calibrate_all_experts: options.CalibrateAllExperts = True,
    max_forced_tokens: options.MaxForcedTokens = MAX_FORCED_TOKENS,
    min_tokens_per_expert: Annotated[
        int,
        typer.Option(
            parser=options.tokens(0),
            metavar="TOKENS",
            help="Refuse a result in which an expert saw fewer tokens. 0: such experts take the scales of their layer.",
        ),
    ] = MIN_TOKENS_PER_EXPERT,
    statistics: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Statistics of this model from an earlier run (file or directory) instead of a dataset.",
        ),
    ] = None,
    effort: Annotated[
        Literal["fast", "good", "best"] | None,
        typer.Option(
            help="How much to spend on a lower loss, for rules that name no scale rule. "
            "Default: good; fast with `statistics`."
        ),
    ] = None,
    target: Annotated[
        str, typer.Option(metavar="PROFILE", help="Engine whose rounding of inputs `effort` chooses for.")
    ] = DEFAULT_PROFILE,
    input_headroom: Annotated[
        float | None,
        typer.Option(
            parser=_headroom,
            metavar="FACTOR",
            help="Range of NVFP4 input scales, of the largest calibrated input: a factor >= 1 or amax (1), for rules "
            f"that name neither this nor a scale rule. Default: {DEFAULT_INPUT_HEADROOM:g}.",
        ),
    ] = None,
    experts_per_group: options.ExpertsPerGroup = None,
    allow_unverified: Annotated[
        bool, typer.Option("--allow-unverified", help="Write formats that no tested engine loads.")
    ] = False,
    restart: options.Restart = False,
    force_resume: options.ForceResume = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check everything, print the plan and what it takes; read one layer at most, write nothing.",
        ),
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Quantize MODEL by a recipe into a new directory.

    Stock vLLM, SGLang and Aphrodite load the result, and transformers most of it. The directory appears
    complete or not at all; the same command resumes an interrupted run.
    """
    settings: dict[str, Any] = {
        "dataset": dataset or (),
        "num_samples": num_samples,
        "max_seq_length": max_seq_length,
        "shuffle_seed": shuffle_seed,
        "device": device,
        "tokens_per_batch": tokens_per_batch,
        "dtype": dtype,
        "max_shard_size": max_shard_size,
        "moe_calibrate_all_experts": moe_calibrate_all_experts,
        "max_forced_tokens": max_forced_tokens,
        "min_tokens_per_expert": min_tokens_per_expert,
        "statistics": statistics,
        "effort": effort,
        "target": target,
        "input_headroom": input_headroom,
        "experts_per_group": experts_per_group,
        "allow_unverified": allow_unverified,
    }
    progress = VerbProgress(ctx)
    if dry_run and not is_main_to_be():
        return
    if dry_run:
        again = {"restart": restart, "force_resume": force_resume}
        _print_plan(model, recipe, output_dir, settings, again, progress, as_json=as_json)
        return
    output_dir = options.required(output_dir)
    with keeping(kept_layers(output_dir)):
        from snugfit.quantization.quantize import quantize as run

        record = run(
            model,
            recipe,
            output_dir=output_dir,
            restart=restart,
            force_resume=force_resume,
            progress=progress,
            **settings,
        )
    if not is_main_to_be():
        return
    with reporting(output_dir):
        from snugfit.report.terminal import print_saturation, print_totals, print_trials

        if as_json:
            typer.echo(record.to_json(), nl=False)
            return
        print_totals(record.tensors)
        print_trials(record.trials)
        print_saturation(record.input_saturation)
        if record.left_out:
            names = plain(", ".join(record.left_out))
            typer.echo(f"not copied (other weights, other quantizations, states of a training): {names}", err=True)
        peak = record.peak_rss_bytes / GB
        typer.echo(f"{plain(str(output_dir))}: {record.seconds['total']:.1f} s, peak memory {peak:.2f} GB")


def _print_plan(
    model: str,
    recipe: str,
    output_dir: Path | None,
    settings: dict[str, Any],
    again: dict[str, bool],
    progress: VerbProgress,
    *,
    as_json: bool,
) -> None:
    """The plan and its estimate on stdout, then the refusal of a run that this machine cannot do, or its time."""
    from snugfit.quantization.quantize import plan_quantization
    from snugfit.quantization.run_time import expected_line
    from snugfit.report.terminal import print_plan
    from snugfit.storage.staging import check_stageable

    if output_dir is not None:
        check_stageable(output_dir)
    plan = plan_quantization(model, recipe, **settings)
    for note in plan.notes:
        progress.message(note)
    with reporting():
        print_plan(plan.records(), as_json)
        typer.echo(plan.estimate.line(), err=as_json)
    plan.check_resources(output_dir, **again)
    with reporting():
        typer.echo(expected_line(plan, output_dir), err=as_json)
