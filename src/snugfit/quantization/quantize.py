"""The main path: a checkpoint and a recipe in, a quantized checkpoint out, one decoder layer in memory at a time."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from snugfit import distributed
from snugfit.arguments import as_sequence
from snugfit.data.dataset import Dataset, with_defaults
from snugfit.engines.profiles import DEFAULT_PROFILE
from snugfit.errors import UserError
from snugfit.formats import inputs
from snugfit.inspection.doctor import check_files
from snugfit.machine import Clock, Seconds, hardware, peak_gpu_bytes, peak_rss_bytes, reset_peak_gpu_bytes, versions
from snugfit.methods import kernels
from snugfit.model.layout import read_layout
from snugfit.progress import SILENT, Progress
from snugfit.quantization.loop import run_layers
from snugfit.quantization.options import Calibration, check_options, headroom_of
from snugfit.quantization.other_recipe import adopt_recipe
from snugfit.quantization.plan import Plan, lay_out
from snugfit.quantization.prepare import prepare
from snugfit.quantization.prepared_run import PreparedRun
from snugfit.quantization.resume import open_finished
from snugfit.quantization.run import Run, norm_folds_of, statistics_of
from snugfit.quantization.run_time import RunTime, estimate_run_time, rough_seconds
from snugfit.quantization.trials import Tried, run_trials
from snugfit.recipes.recipe import LoadedRecipe, load_recipe
from snugfit.records.base import as_json
from snugfit.records.quantize import RECIPE_FILE, RECORD_FILE, QuantizeRecord, TensorRecord
from snugfit.records.statistics_file import (
    MAX_FORCED_TOKENS,
    MIN_TOKENS_PER_EXPERT,
    STATISTICS_FILE,
    ExpertCalibration,
)
from snugfit.storage.background import Background
from snugfit.storage.checkpoint import INDEX_NAME, header_digest
from snugfit.storage.files import check_inside
from snugfit.storage.other_files import is_copied, not_copied
from snugfit.storage.shards import file_digests, index_text
from snugfit.storage.staging import LOCK_NAME, WORK_NAME, check_stageable, occupied_bytes, resumable
from snugfit.version import __version__

WORTH_AN_ESTIMATE = 60.0  # seconds that a run takes, roughly, below which they are not estimated before it
# how the source was quantized by another tool; engines may read them in place of config.json
OTHER_QUANTIZATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")


@distributed.together
def quantize(
    model: str | Path,
    recipe: str | Path | LoadedRecipe,
    *,
    output_dir: str | Path,
    dataset: str | Path | Sequence[str | Path] = (),
    num_samples: int | None = None,
    max_seq_length: int | None = None,
    shuffle_seed: int | None = None,
    device: str | None = None,
    tokens_per_batch: int | None = None,
    dtype: str | None = None,
    max_shard_size: int | None = None,
    moe_calibrate_all_experts: bool = True,
    max_forced_tokens: int = MAX_FORCED_TOKENS,
    min_tokens_per_expert: int = MIN_TOKENS_PER_EXPERT,
    statistics: str | Path | None = None,
    effort: str | None = None,
    target: str = DEFAULT_PROFILE,
    input_headroom: float | str | None = None,
    experts_per_group: int | None = None,
    allow_unverified: bool = False,
    restart: bool = False,
    force_resume: bool = False,
    progress: Progress = SILENT,
) -> QuantizeRecord:
    """Quantize `model` (a directory or a Hugging Face id) by `recipe` into the new directory `output_dir`.

    `recipe` is a built-in name, a YAML file, or a loaded recipe. `dataset` names files to calibrate on, text,
    JSONL or Parquet (default: Python's documentation): at most `num_samples` samples (32) of `max_seq_length` tokens
    (1024), from the beginning of each file, or drawn from all of it with `shuffle_seed`; or a set, a YAML file or a
    name, which says all of this itself. A recipe without activation scales reads none. `device`: "cpu" or "cuda"
    (default: cuda if there is one). The samples run in `dtype` ("bfloat16", "float16", "float32"; default: the
    config's). `max_shard_size` is in bytes. Of a mixture, every expert sees every token up to `max_forced_tokens`, or
    with `moe_calibrate_all_experts` False only what the router sends it; fewer than `min_tokens_per_expert` is an
    error. `statistics`, measured earlier on this model, take the place of samples.
    `effort`, "fast", "good" or "best", decides for weights whose rule names no scale rule (default: "good", with
    `statistics` "fast"): the better two try several ways and keep the one that has the least KL to the original on
    held-out samples, with inputs rounded as under the engine profile `target`. The range of NVFP4's input scales goes
    to `input_headroom` times the largest calibrated input ("amax": once), where no rule says otherwise.
    Of a mixture, `experts_per_group` routed experts of a layer are in memory at once (default: all, or as many as there
    is memory for); the result is the same.
    `allow_unverified` writes formats that no tested engine loads.

    `output_dir` appears whole or not at all. A run that was stopped resumes after its last whole layer with the same
    call and ends in the same bytes; on another machine, library version or batch only with `force_resume`; `restart`
    starts again. Raises UserError for bad input.
    """
    clock, destination = Clock(), Path(output_dir)
    progress = progress if distributed.is_main() else SILENT

    def prepare_here() -> PreparedRun:
        if distributed.is_main():
            check_stageable(destination)
        prepared = plan_quantization(
            model,
            recipe,
            dataset=dataset,
            num_samples=num_samples,
            max_seq_length=max_seq_length,
            shuffle_seed=shuffle_seed,
            device=device,
            tokens_per_batch=tokens_per_batch,
            dtype=dtype,
            max_shard_size=max_shard_size,
            moe_calibrate_all_experts=moe_calibrate_all_experts,
            max_forced_tokens=max_forced_tokens,
            min_tokens_per_expert=min_tokens_per_expert,
            statistics=statistics,
            effort=effort,
            target=target,
            input_headroom=input_headroom,
            experts_per_group=experts_per_group,
            allow_unverified=allow_unverified,
        )
        place = destination if distributed.is_main() else None
        prepared.check_resources(place, restart=restart, force_resume=force_resume)
        return prepared

    with clock("prepare"):
        prepared = distributed.in_all(prepare_here).agreed()
    prepared.report(progress)
    kernels.warm_up(prepared.device)
    expected = _expected(prepared, destination, clock, progress)
    reset_peak_gpu_bytes(prepared.device)
    with resumable(destination, restart=restart) as (directory, work), Background() as background:
        if distributed.is_main() and adopt_recipe(directory, work, prepared.identity(), prepared.plan.shards):
            progress.message("the finished layers stay: this recipe differs in later ones alone")
        finished = open_finished(work, prepared.identity(), force=force_resume)
        run = Run(prepared=prepared, directory=directory, work=work, finished=finished, clock=clock, progress=progress)
        left_out: list[str] = []
        if len(prepared.ways) > 1:
            tried = run_trials(run, lambda folder: _write_config(prepared.plan, folder), background)
            run = tried.run
            with clock("finish"):
                left_out += _write_beside(prepared, run, directory)
        else:
            outcome = run_layers(run, lambda: left_out.extend(_write_beside(prepared, run, directory)))
            tried = Tried(run=run, outcome=outcome, trials=(), saturation=())
        for problem in (*kernels.kernel_problems(), *inputs.kernel_problems()):
            progress.message(f"a slower way took the place of a kernel, with the same bits ({problem})")
        limits = with_defaults(as_sequence(dataset), num_samples, max_seq_length)
        arguments = {
            "num_samples": limits[0],
            "max_seq_length": limits[1],
            "shuffle_seed": shuffle_seed,
            "device": str(prepared.device),
            "tokens_per_batch": prepared.tokens_per_batch,
            "dtype": dtype,
            "moe_calibrate_all_experts": moe_calibrate_all_experts,
            "max_forced_tokens": max_forced_tokens,
            "min_tokens_per_expert": min_tokens_per_expert,
            "statistics": prepared.statistics_digest(),
            "effort": prepared.effort,
            "target": prepared.target,
            "input_headroom": prepared.plan.input_headroom,
            "experts_per_group": prepared.experts_per_group,
            "processes": distributed.world_size(),
        }
        record = _record(
            tried, destination, tuple(left_out), arguments, expected, occupied_bytes(directory, without=WORK_NAME)
        )
        if distributed.is_main():
            record = replace(record, other_files=_other_files(directory, tried.outcome.files))
            (directory / RECORD_FILE).write_text(record.to_json(), encoding="utf-8")
            for finding in check_files(directory, small_files=False):
                if finding.severity != "note":
                    progress.message(f"doctor: {finding.fault}: {finding.where}: {finding.what}")
        return distributed.from_main(record)


def plan_quantization(
    model: str | Path,
    recipe: str | Path | LoadedRecipe,
    *,
    dataset: str | Path | Sequence[str | Path] = (),
    num_samples: int | None = None,
    max_seq_length: int | None = None,
    shuffle_seed: int | None = None,
    device: str | None = None,
    tokens_per_batch: int | None = None,
    dtype: str | None = None,
    max_shard_size: int | None = None,
    moe_calibrate_all_experts: bool = True,
    max_forced_tokens: int = MAX_FORCED_TOKENS,
    min_tokens_per_expert: int = MIN_TOKENS_PER_EXPERT,
    statistics: str | Path | None = None,
    effort: str | None = None,
    target: str = DEFAULT_PROFILE,
    input_headroom: float | str | None = None,
    experts_per_group: int | None = None,
    allow_unverified: bool = False,
) -> PreparedRun:
    """Decide and check everything that `quantize` would do with these arguments, and write nothing: a dry run.

    The result has a record of each tensor, an estimate of memory and disk, and `check_resources`. Reads headers,
    config, tokenizer and samples, no weights. Raises the UserError that `quantize` would raise.
    """
    if max_shard_size is not None and max_shard_size < 1:
        what = f"must be >= 1 byte, got {max_shard_size}."
        raise UserError(what, code="option-invalid", where="max_shard_size", remedy="Give a larger size.")
    calibration = Calibration(
        dataset=as_sequence(dataset),
        num_samples=num_samples,
        max_seq_length=max_seq_length,
        shuffle_seed=shuffle_seed,
        device=device,
        tokens_per_batch=tokens_per_batch,
        dtype=dtype,
        experts=ExpertCalibration(moe_calibrate_all_experts, max_forced_tokens, min_tokens_per_expert),
        statistics=statistics,
        effort=effort,
        target=target,
        input_headroom=input_headroom,
        experts_per_group=experts_per_group,
    )
    check_options(calibration)
    loaded = recipe if isinstance(recipe, LoadedRecipe) else load_recipe(recipe)
    headroom = headroom_of(input_headroom)
    plan = lay_out(read_layout(model), loaded, max_shard_size=max_shard_size, input_headroom=headroom)
    for error in plan.unverified:
        if not allow_unverified:
            raise error
    _check_file_names(plan)
    return prepare(plan, calibration)


def _check_file_names(plan: Plan) -> None:
    """UserError for a folder of the source that has the name of a file to be written."""
    written = {*(shard.name for shard in plan.shards), INDEX_NAME, RECIPE_FILE, RECORD_FILE, STATISTICS_FILE, LOCK_NAME}
    for name in plan.checkpoint.other_files:
        first, inside, _ = name.partition("/")
        if (inside and first in written) or first == WORK_NAME:
            raise UserError(
                "this folder has the name of a file that the result needs.",
                code="file-unreadable",
                where=str(plan.checkpoint.path / first),
                remedy="Move it out of the model.",
            )


def _expected(prepared: PreparedRun, destination: Path, clock: Clock, progress: Progress) -> RunTime | None:
    """What the whole run will take, its preparation included; None for what is left of one, and for a short one."""
    found = None
    unfinished = destination.with_name(f"{destination.name}.partial").exists()
    if distributed.is_main() and rough_seconds(prepared) > WORTH_AN_ESTIMATE and not unfinished:
        with clock("estimate"):
            found = estimate_run_time(prepared, destination)
    found = distributed.from_main(found)
    if found is None:
        return None
    progress.message(found.line())
    return replace(found, seconds=found.seconds + Seconds(clock.seconds["total"], clock.cpu_seconds))


def _write_beside(prepared: PreparedRun, run: Run, directory: Path) -> Sequence[str]:
    """Write all but weights and the record, `run` is what measured; names of files of the source that stay there."""
    if not distributed.is_main():
        return ()
    left_out = _write_other_files(prepared.plan, directory)
    found = prepared.known if prepared.dataset is None else statistics_of(run)
    if found is not None and prepared.plan.needs_activations:
        (directory / STATISTICS_FILE).write_text(found.to_json(), encoding="utf-8")
    return left_out


def _write_other_files(plan: Plan, directory: Path) -> tuple[str, ...]:
    """Write config, index, recipe and every file of the source without weights; names of those not copied."""
    assert plan.recipe is not None
    source = [name for name in plan.checkpoint.other_files if name not in (RECORD_FILE, STATISTICS_FILE)]  # its own
    known = frozenset(source)
    for name in source:
        if not is_copied(name, known) or name in OTHER_QUANTIZATION_FILES:
            continue
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        check_inside(plan.checkpoint.path, name)
        shutil.copyfile(plan.checkpoint.path / name, directory / name)
    _write_config(plan, directory)
    (directory / RECIPE_FILE).write_text(plan.recipe.text, encoding="utf-8")
    return tuple(sorted({*not_copied(source), *(known & set(OTHER_QUANTIZATION_FILES))}))


def _other_files(directory: Path, weight_files: Mapping[str, str]) -> dict[str, str]:
    """SHA-256 of every finished file beside the weights and the record, which is written last."""
    apart = {*weight_files, LOCK_NAME, RECORD_FILE}
    names = sorted(str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file())
    return file_digests(directory, [n for n in names if n not in apart and not n.startswith(f"{WORK_NAME}/")])


def _write_config(plan: Plan, directory: Path) -> None:
    """Write config and index."""
    (directory / "config.json").write_text(as_json(plan.config), encoding="utf-8")
    if len(plan.shards) > 1:
        text = index_text((shard.name, tensor) for shard in plan.shards for tensor in shard.tensors)
        (directory / INDEX_NAME).write_text(text, encoding="utf-8")


def _record(
    tried: Tried,
    output_dir: Path,
    left_out: tuple[str, ...],
    arguments: Mapping[str, Any],
    expected: RunTime | None,
    disk_bytes: int,
) -> QuantizeRecord:
    run, outcome = tried.run, tried.outcome
    prepared, plan = run.prepared, run.prepared.plan
    assert plan.recipe is not None
    place = {name: number for number, name in enumerate(plan.outputs)}
    entries = [tensor for entry in run.finished.entries for tensor in entry["tensors"]]
    measured = [TensorRecord(**tensor | {"shape": tuple(tensor["shape"])}) for tensor in entries]
    seconds, peak, peak_gpu = run.clock.seconds, peak_rss_bytes(), peak_gpu_bytes(prepared.device)
    actual = {
        "peak_rss_bytes": peak,
        "peak_gpu_bytes": peak_gpu,
        "disk_bytes": disk_bytes,
        "seconds": seconds["total"],
        "cpu_seconds": run.clock.cpu_seconds,
        "seconds_by_second_layer": seconds["total"],
    }
    foreseen = {} if expected is None else {"seconds": expected.seconds.wall, "cpu_seconds": expected.seconds.cpu}
    estimated = {"seconds": None, "cpu_seconds": None} | foreseen
    estimated |= prepared.estimate.as_record() | {"seconds_by_second_layer": outcome.expected_seconds}
    resumed = {"units": outcome.resumed, "differences": run.finished.differences} if outcome.resumed else None
    data = prepared.dataset
    dataset = None if data is None else _described(data)
    return QuantizeRecord(
        snugfit=__version__,
        arguments=arguments,
        recipe=plan.recipe.recipe.name,
        recipe_digest=plan.recipe.digest,
        source=plan.checkpoint.name,
        source_header_digest=header_digest(plan.checkpoint),
        target=output_dir.resolve().name,
        dataset=dataset,
        held_out=None if prepared.held_out is None else _described(replace(prepared.held_out, uses=())),
        trials=tried.trials,
        input_saturation=tried.saturation,
        tensors=tuple(sorted(measured, key=lambda tensor: place[tensor.name])),
        source_bytes=sum(t.bytes for t in plan.checkpoint.tensors.values()),
        bytes=plan.bytes,
        files=outcome.files,
        left_out=left_out,
        seconds=seconds,
        peak_rss_bytes=peak,
        peak_gpu_bytes=peak_gpu,
        hardware=hardware(prepared.device),
        versions=versions(),
        estimates={key: {"estimated": value, "actual": actual[key]} for key, value in estimated.items()},
        resumed=resumed,
        norm_folds=norm_folds_of(run),
    )


def _described(dataset: Dataset) -> dict[str, Any]:
    found: dict[str, Any] = {
        "source": dataset.source,
        "samples": len(dataset.samples),
        "tokens": dataset.tokens,
        "digest": dataset.digest,
    }
    if dataset.uses:
        found |= {"set_digest": dataset.set_digest, "sources": [vars(use) for use in dataset.uses]}
    return found
