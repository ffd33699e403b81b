"""The main path: a checkpoint and a recipe in, a quantized checkpoint out, one decoder layer in memory at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from snugfit import __version__
from snugfit.data.rows import DEFAULT_LENGTH, DEFAULT_ROWS, Rows, load_rows
from snugfit.errors import UserError
from snugfit.machine import Clock, hardware, peak_gpu_bytes, peak_rss_bytes, pick_device, progress_bar, versions
from snugfit.model import layers
from snugfit.model.sources import text_config
from snugfit.model.support import NoEngine
from snugfit.quantization.estimate import Estimate, check_estimate, estimate_run
from snugfit.quantization.layer import recall
from snugfit.quantization.plan import Plan, check_linears, plan_quantization
from snugfit.quantization.resume import Progress, stamps
from snugfit.quantization.run import Outcome, Run, run_units
from snugfit.recipes.recipe import LoadedRecipe
from snugfit.records.base import as_json
from snugfit.records.quantize import QuantizeRecord, TensorRecord
from snugfit.records.statistics import layer_from_json
from snugfit.records.statistics_file import (
    DEFAULT_CALIBRATION,
    STATISTICS_FILE,
    Calibration,
    RowsUsed,
    Statistics,
    load_statistics,
    text_digest,
)
from snugfit.storage.checkpoint import INDEX_NAME, Checkpoint, fingerprint, header_digest
from snugfit.storage.files import check_inside
from snugfit.storage.shards import index_of
from snugfit.storage.staging import LOCK_NAME, WORK_NAME, check_stageable, occupied_bytes, resumable

RECIPE_FILE = "snugfit-recipe.yaml"
RECORD_FILE = "snugfit-record.json"
TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 8192}
# weights in other containers: engines would load them beside ours
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")


def quantize_checkpoint(
    source: str | Path,
    target: str | Path,
    recipe: str | LoadedRecipe,
    *,
    text: Sequence[str | Path] = (),
    rows: int = DEFAULT_ROWS,
    length: int = DEFAULT_LENGTH,
    device: str | None = None,
    tokens_per_batch: int | None = None,
    max_shard_bytes: int | None = None,
    restart: bool = False,
    resume_anyway: bool = False,
    calibration: Calibration = DEFAULT_CALIBRATION,
    statistics: str | Path | None = None,
    no_engine: bool = False,
    progress: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> QuantizeRecord:
    """Quantize the model `source` (a directory or a Hugging Face id) by `recipe` into the new directory `target`.

    `text` names text or JSONL files to calibrate on (default: Python's documentation topics), `rows` x `length` tokens
    at most; a recipe without activation scales reads none. `device`: "cpu" or "cuda" (default: cuda if there is one).
    `target` appears whole or not at all and holds the record too. A run that was stopped goes on after its last whole
    layer, from TARGET.partial, and ends in the same bytes; under another machine, library version or batch only with
    `resume_anyway`; `restart` begins anew. `calibration` says what experts of a mixture see; with `statistics`, which
    an earlier run measured on this model, no rows are walked; `no_engine` writes even what no engine was seen to load.
    `tell` gets what the run will need, and how far an earlier one came. Raises UserError for bad input.
    """
    clock = Clock()
    destination = Path(target)
    if tokens_per_batch is not None and tokens_per_batch < 1:
        raise UserError(f"{tokens_per_batch} tokens a batch are none.", remedy="Give --tokens-per-batch 1 at least.")
    with clock("prepare"):
        plan = plan_quantization(source, recipe, max_shard_bytes=max_shard_bytes)
        check_stageable(destination)
        for obstacle in plan.obstacles:
            if not (no_engine and isinstance(obstacle, NoEngine)):
                raise obstacle
        place = pick_device(device)
        _check_names(plan)
        plan = with_other_files(plan)
        known = None if statistics is None else load_statistics(Path(statistics))
        asked = known is None and plan.calibrated
        data = load_rows_for(plan, text, rows, length) if asked or (known is not None and text) else None
        if known is not None:
            check_belongs(known, plan.checkpoint, data, calibration, where=str(statistics))
            data = None
        skeleton = skeleton_of(plan)
        recalled = None
        if known is not None:
            recalled = [recall(plan, skeleton, index, known, calibration) for index in range(plan.layers)]
        batch = tokens_per_batch or TOKENS_PER_BATCH[place.type]
        estimate = estimate_run(plan, data, place, batch)
        check_estimate(estimate, destination, place)
    tell(estimate.line())
    if known is not None and known.recipe_digest not in (None, plan.recipe.digest):
        tell(f"the statistics' rows walked through weights of recipe {known.recipe}, not of this one")
    arguments = {"rows": rows, "length": length, "device": str(place), "tokens_per_batch": batch} | asdict(calibration)
    arguments["statistics"] = None if known is None else text_digest(known.to_json())
    with resumable(destination, restart=restart) as (directory, work):
        identity = identity_of(plan, data, place, batch, calibration)
        identity["statistics"] = arguments["statistics"]
        done = Progress(work, identity, anyway=resume_anyway)
        run = Run(plan, skeleton, place, data, directory, work, done, clock, tell, calibration, recalled)
        bar = progress_bar(progress, len(plan.units), "quantizing layers")
        with bar as step:
            outcome = run_units(run, batch, step)
        with clock("finish"):
            left_out = _write_other_files(plan, directory)
        used = known if plan.calibrated else None
        found = used if data is None else statistics_of(run, calibration, recipe=plan.recipe)
        if found is not None:
            (directory / STATISTICS_FILE).write_text(found.to_json(), encoding="utf-8")
        record = _record(run, destination, outcome, left_out, arguments, estimate)
        (directory / RECORD_FILE).write_text(record.to_json(), encoding="utf-8")
    return record


def statistics_of(run: Run, calibration: Calibration, *, recipe: LoadedRecipe | None) -> Statistics:
    """What a run measured, for its file; `recipe` is whose weights the rows walked through."""
    assert run.data is not None
    layers_found = [entry["statistics"] for entry in run.progress.entries[1:]]
    checkpoint = run.plan.checkpoint
    return Statistics(
        snugfit=__version__,
        model=checkpoint.name,
        header_digest=header_digest(checkpoint),
        fingerprint=fingerprint(checkpoint),
        rows=(RowsUsed(run.data.source, len(run.data.rows), run.data.tokens, run.data.digest),),
        experts=calibration.experts,
        forced_tokens=calibration.forced_tokens,
        recipe=None if recipe is None else recipe.recipe.name,
        recipe_digest=None if recipe is None else recipe.digest,
        layers={number: layer_from_json(found) for number, found in enumerate(layers_found)},
    )


def check_belongs(
    known: Statistics, checkpoint: Checkpoint, asked: Rows | None, calibration: Calibration, *, where: str
) -> None:
    """UserError where statistics are of another model, of other rows than `asked`, or of experts fed otherwise."""
    again = "Measure them with `snugfit statistics collect`, or leave --statistics out."
    if known.header_digest != header_digest(checkpoint) or known.fingerprint != fingerprint(checkpoint):
        raise UserError(f"statistics of another model ({known.model}).", where=where, remedy=again)
    if asked is not None and [asked.digest] != [one.digest for one in known.rows]:
        told = ", ".join(f"{one.source}: {one.rows} rows, {one.digest[:12]}" for one in known.rows)
        what = f"statistics of other rows ({told}) than asked for ({len(asked.rows)}, {asked.digest[:12]})."
        raise UserError(what, where=where, remedy="Leave --text out to take theirs, or measure these.")
    if not any(layer.experts for layer in known.layers.values()):
        return
    if known.experts != calibration.experts:
        what = f"statistics of --experts {known.experts}, asked for is {calibration.experts}."
        raise UserError(what, where=where, remedy=f"Add --experts {known.experts} to take them. {again}")
    if known.experts == "all" and known.forced_tokens != calibration.forced_tokens:
        what = f"statistics of --forced-tokens {known.forced_tokens}, asked for are {calibration.forced_tokens}."
        raise UserError(what, where=where, remedy=again)


def with_other_files(plan: Plan) -> Plan:
    """The plan, the files without weights on this disk: of a model on the Hub only config files are so far."""
    if plan.checkpoint.remote is None:
        return plan
    from snugfit.storage.hub import fetch_other_files

    return replace(plan, checkpoint=fetch_other_files(plan.checkpoint))


def skeleton_of(plan: Plan) -> layers.Skeleton:
    """transformers' model, which must agree with what the plan took from the headers."""
    _check_architecture(plan)
    skeleton = layers.build_skeleton(plan.checkpoint)
    if skeleton.stored_layers_name != plan.decoder:
        raise UserError(
            f"its decoder layers seem to be {plan.decoder}, transformers takes {skeleton.stored_layers_name}.",
            where=str(plan.checkpoint.path),
            remedy="Config and weights do not belong together, or this family needs a reader of its own.",
        )
    check_linears(plan.assignments, sorted(layers.linear_names(skeleton)), plan.recipe.where)
    codes = {name: (next(iter(s.parts.values())), 1) for name, s in plan.weights.sources.items() if s.slot is None}
    layers.check_shapes(skeleton, plan.checkpoint, codes)
    return skeleton


def _check_architecture(plan: Plan) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    kind = plan.checkpoint.config.get("model_type")
    if not (isinstance(kind, str) and kind in CONFIG_MAPPING_NAMES):
        raise UserError(
            f"unknown architecture {kind!r}: transformers has no model_type of that name.",
            where=str(plan.checkpoint.path / "config.json"),
            remedy="Check the config, or update transformers.",
        )


def identity_of(
    plan: Plan, data: Rows | None, device: torch.device, tokens_per_batch: int, calibration: Calibration
) -> dict[str, Any]:
    """All that decides the bytes of the weight files."""
    shards = {shard.name: shard.bytes for shard in plan.shards}
    return {
        "source": header_digest(plan.checkpoint),
        "source_files": stamps(plan.checkpoint),
        "recipe": plan.recipe.digest,
        "rows": None if data is None else data.digest,
        "weight_files": shards,
        "experts": [calibration.experts, calibration.forced_tokens],
        "device": device.type,
        "tokens_per_batch": tokens_per_batch,
        "hardware": hardware(device),
        "versions": versions() | {"snugfit": __version__},
    }


def load_rows_for(plan: Plan, text: Sequence[str | Path], rows: int, length: int) -> Rows:
    """Rows for a plan's model; UserError where its config does not allow them."""
    config, where = text_config(plan.checkpoint.config), str(plan.checkpoint.path / "config.json")
    sizes = {key: config.get(key) for key in ("vocab_size", "max_position_embeddings")}
    for key, value in sizes.items():
        if not isinstance(value, int | None):
            raise UserError(f"{key} is {value!r}.", where=where, remedy="Mend the config.")
    files = [Path(file) for file in text]
    data = load_rows(plan.checkpoint.path, files, count=rows, length=length, vocabulary=sizes["vocab_size"] or 0)
    longest, positions = max(map(len, data.rows)), sizes["max_position_embeddings"]
    if positions and longest > positions:
        raise UserError(
            f"rows of {longest} tokens are beyond the model's {positions} positions.",
            where=where,
            remedy=f"Use --length {positions} or less.",
        )
    return data


def _check_names(plan: Plan) -> None:
    """UserError for a folder of the source that has the name of a file to be written."""
    ours = {*(shard.name for shard in plan.shards), INDEX_NAME, RECIPE_FILE, RECORD_FILE, STATISTICS_FILE, LOCK_NAME}
    for name in plan.checkpoint.other_files:
        first, inside, _ = name.partition("/")
        if (inside and first in ours) or first == WORK_NAME:
            raise UserError(
                "a file of this name is to be written.",
                where=str(plan.checkpoint.path / first),
                remedy="Move it out of the model.",
            )


def _write_other_files(plan: Plan, directory: Path) -> tuple[str, ...]:
    """Config, index, recipe and every file of the source that holds no weights; names of those left out."""
    left_out = []
    for name in plan.checkpoint.other_files:
        if name in (RECORD_FILE, STATISTICS_FILE):  # the source's own
            continue
        if name.endswith(_OTHER_WEIGHTS) or name.endswith(".index.json"):
            left_out.append(name)
            continue
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        check_inside(plan.checkpoint.path, name)
        shutil.copyfile(plan.checkpoint.path / name, directory / name)
    (directory / "config.json").write_text(as_json(plan.config), encoding="utf-8")
    if len(plan.shards) > 1:
        text = json.dumps(index_of(plan.shards), indent=2) + "\n"
        (directory / INDEX_NAME).write_text(text, encoding="utf-8")
    (directory / RECIPE_FILE).write_text(plan.recipe.text, encoding="utf-8")
    return tuple(left_out)


def _record(
    run: Run,
    target: Path,
    outcome: Outcome,
    left_out: tuple[str, ...],
    arguments: Mapping[str, Any],
    estimate: Estimate,
) -> QuantizeRecord:
    plan, data = run.plan, run.data
    place = {name: number for number, name in enumerate(plan.outputs)}
    entries = [tensor for entry in run.progress.entries for tensor in entry["tensors"]]
    measured = [TensorRecord(**tensor | {"shape": tuple(tensor["shape"])}) for tensor in entries]
    seconds, peak, peak_gpu = run.clock.seconds, peak_rss_bytes(), peak_gpu_bytes(run.device)
    actual = {
        "peak_rss_bytes": peak,
        "peak_gpu_bytes": peak_gpu,
        "disk_bytes": occupied_bytes(run.directory),
        "seconds": seconds["total"],
    }
    foreseen = estimate.as_record() | {"seconds": outcome.expected_seconds}
    resumed = {"units": outcome.resumed, "differences": run.progress.differences} if outcome.resumed else None
    dataset = (
        None
        if data is None
        else {"source": data.source, "rows": len(data.rows), "tokens": data.tokens, "digest": data.digest}
    )
    return QuantizeRecord(
        snugfit=__version__,
        arguments=arguments,
        recipe=plan.recipe.recipe.name,
        recipe_digest=plan.recipe.digest,
        source=plan.checkpoint.name,
        source_header_digest=header_digest(plan.checkpoint),
        target=target.resolve().name,
        dataset=dataset,
        tensors=tuple(sorted(measured, key=lambda tensor: place[tensor.name])),
        source_bytes=sum(t.bytes for t in plan.checkpoint.tensors.values()),
        bytes=plan.bytes,
        files=outcome.files,
        left_out=left_out,
        seconds=seconds,
        peak_rss_bytes=peak,
        peak_gpu_bytes=peak_gpu,
        hardware=hardware(run.device),
        versions=versions(),
        estimates={key: {"estimated": value, "actual": actual[key]} for key, value in foreseen.items()},
        resumed=resumed,
    )
