"""The main path: a checkpoint and a recipe in, a quantized checkpoint out, one decoder layer in memory at a time."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from snugfit import __version__
from snugfit.calibration.dataset import DEFAULT_LENGTH, DEFAULT_ROWS, Rows, load_rows
from snugfit.dialects import compressed_tensors as dialect
from snugfit.errors import UserError
from snugfit.formats.nvfp4 import input_global_scale
from snugfit.machine import Clock, hardware, peak_gpu_bytes, peak_rss_bytes, pick_device, progress_bar, versions
from snugfit.model import layers, walk
from snugfit.model.checkpoint import INDEX_NAME, header_digest
from snugfit.model.shards import ShardWriter, check_stageable, index_of, occupied_bytes, resumable
from snugfit.model.states import StateFile
from snugfit.model.transfer import Transfer
from snugfit.quantize_plan import MAX_SHARD_BYTES, Plan, check_linears, plan_quantization, text_config
from snugfit.quantize_preflight import Estimate, check_estimate, estimate_run
from snugfit.quantize_progress import Progress, stamps
from snugfit.quantize_units import Measured, ReadAhead, UnitTensor, calibrate, groups_of, quantize_unit
from snugfit.recipe import LoadedRecipe
from snugfit.records import QuantizeRecord, TensorRecord

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
    max_shard_bytes: int = MAX_SHARD_BYTES,
    restart: bool = False,
    resume_anyway: bool = False,
    progress: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> QuantizeRecord:
    """Quantize the model `source` (a directory or a Hugging Face id) by `recipe` into the new directory `target`.

    `text` names text or JSONL files to calibrate on (default: Python's documentation topics), `rows` x `length` tokens
    at most; a recipe without activation scales reads none. `device`: "cpu" or "cuda" (default: cuda if there is one).
    `target` appears whole or not at all and holds the record too. A run that was stopped goes on after its last whole
    layer, from TARGET.partial, and ends in the same bytes; under another machine, library version or batch only with
    `resume_anyway`; `restart` begins anew. `tell` gets what the run will need, and how far an earlier one came. Raises
    UserError for bad input.
    """
    clock = Clock()
    destination = Path(target)
    if tokens_per_batch is not None and tokens_per_batch < 1:
        raise UserError(f"{tokens_per_batch} tokens a batch are none.", remedy="Give --tokens-per-batch 1 at least.")
    with clock("prepare"):
        plan = plan_quantization(source, recipe, max_shard_bytes=max_shard_bytes)
        check_stageable(destination)
        for obstacle in plan.obstacles:
            raise obstacle
        place = pick_device(device)
        plan = _with_other_files(plan)
        data = _load_rows(plan, text, rows, length) if plan.calibrated else None
        skeleton = _skeleton(plan)
        batch = tokens_per_batch or TOKENS_PER_BATCH[place.type]
        estimate = estimate_run(plan, data, place, batch)
        check_estimate(estimate, destination, place)
    tell(estimate.line())
    arguments = {"rows": rows, "length": length, "device": str(place), "tokens_per_batch": batch}
    with resumable(destination, restart=restart) as (directory, work):
        identity = _identity(plan, data, place, batch)
        done = Progress(work, identity, anyway=resume_anyway)
        run = _Run(plan, skeleton, place, data, directory, work, done, clock, tell)
        bar = progress_bar(progress, len(plan.units), "quantizing layers")
        with bar as step:
            outcome = _run_units(run, batch, step)
        with clock("finish"):
            left_out = _write_other_files(plan, directory)
        record = _record(run, destination, outcome, left_out, arguments, estimate)
        (directory / RECORD_FILE).write_text(record.to_json(), encoding="utf-8")
    return record


@dataclass(frozen=True)
class _Run:
    """What all steps of a run share."""

    plan: Plan
    skeleton: layers.Skeleton
    device: torch.device
    data: Rows | None
    directory: Path
    work: Path
    progress: Progress
    clock: Clock
    tell: Callable[[str], None]


@dataclass(frozen=True)
class _Outcome:
    """SHA-256 of each weight file; units that an earlier run had done; seconds expected after the first layer."""

    files: Mapping[str, str]
    resumed: int
    expected_seconds: float | None


def _run_units(run: _Run, tokens_per_batch: int, step: Callable[[], None]) -> _Outcome:
    """Quantize and write unit after unit, from the first that is not done."""
    plan, clock = run.plan, run.clock
    expected = None
    try:
        with ExitStack() as stack:
            transfer = stack.enter_context(Transfer(run.device))
            writer = stack.enter_context(ShardWriter(run.directory, plan.shards, transfer))
            batches = [] if run.data is None else walk.make_batches(run.data.rows, tokens_per_batch, run.device)
            states = _state_files(run, batches)
            for file in states:
                stack.enter_context(file)
            with clock("check"):
                _check_done(run, writer, states)
            for _ in range(run.progress.done):
                step()
            with clock("embed"):
                _embed(run, transfer, batches, states)
            commits = _Commits(run, stack)
            walked = run.data is not None
            groups = [groups_of(plan, unit, walked and number > 0) for number, unit in enumerate(plan.units)]
            first = run.progress.done
            ahead = ReadAhead(transfer, plan.checkpoint, [group for unit in groups[first:] for group in unit])
            for number in range(first, len(plan.units)):
                begun = time.perf_counter()
                with clock("weights"):
                    tensors = quantize_unit(plan, groups[number], ahead, walked and number > 0)
                commits.wait()  # the file that this layer's states go to holds those of the layer before the last
                measured = Measured({}, None)
                if walked and number > 0:
                    pair = states[(number - 1) % 2], states[number % 2]
                    with clock("forward"):
                        measured = calibrate(plan, run.skeleton, number - 1, tensors, batches, pair, run.device)
                with clock("write"):
                    records = [_write(plan, name, tensors.get(name), measured, writer) for name in plan.units[number]]
                    records += _write_cache_scales(plan, number - 1, measured, writer)
                tensors.clear()  # before the next layer is read: one is in memory at a time
                commits.begin(records, writer, states[number % 2] if walked else None)
                step()
                if number == max(1, first):
                    expected = _expect(run, number, begun)
            with clock("finish"):
                commits.wait()
                for file in states:
                    file.path.unlink()
                return _Outcome(writer.finish(), first, expected)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of GPU memory ({str(error).splitlines()[0]}).",
            where=str(run.device),
            remedy="Lower --tokens-per-batch, or use --device cpu.",
        ) from None


def _expect(run: _Run, number: int, begun: float) -> float:
    """Seconds that the whole run will take, by its first layer; told where it is worth telling."""
    left = (time.perf_counter() - begun) * (len(run.plan.units) - 1 - number)
    if left > 10:
        run.tell(f"about {left / 60:.0f} min to go" if left > 90 else f"about {left:.0f} s to go")
    return run.clock.seconds["total"] + left


def _state_files(run: _Run, batches: Sequence[walk.Batch]) -> list[StateFile]:
    """The two files between which hidden states go to and fro."""
    if run.data is None:
        return []
    width = int(run.skeleton.model.get_input_embeddings().weight.shape[1])  # type: ignore[operator]
    dtype = run.skeleton.model.dtype
    assert isinstance(dtype, torch.dtype)
    return [StateFile(run.work / f"states-{n}", batches, width, dtype) for n in range(2)]


def _check_done(run: _Run, writer: ShardWriter, states: Sequence[StateFile]) -> None:
    """Read again what an earlier run wrote, and forget what the disk does not hold."""
    progress = run.progress
    if not progress.done:
        return
    good = 0
    while good < progress.done and writer.holds(progress.entries[good]["written"]):
        good += 1
    while states and 0 < good < len(run.plan.units) and not states[(good - 1) % 2].holds(progress.entries[good - 1]["states"]):
        good -= 1
    progress.go_back(good)
    for entry in progress.entries:
        writer.accept(entry["written"])
    run.tell(f"going on after {max(0, good - 1)} of {run.plan.layers} layers, from {run.directory}")


def _embed(run: _Run, transfer: Transfer, batches: Sequence[walk.Batch], states: Sequence[StateFile]) -> None:
    """What every layer is called with; and the first layer's hidden states, unless an earlier run went past them."""
    if run.data is None:
        return
    fresh = run.progress.done == 0

    def keep(batch: walk.Batch, hidden: torch.Tensor) -> None:
        if fresh:
            states[0].write(batch, hidden)

    def read(name: str) -> torch.Tensor:
        return transfer.read(run.plan.checkpoint, name).result()

    weights = layers.outer_weights(run.skeleton, run.plan.checkpoint, head=False, read=read)
    walk.embed(run.skeleton, weights, batches, run.device, keep)


class _Commits:
    """Notes each unit as done once it is in the files, while the next is worked on."""

    def __init__(self, run: _Run, stack: ExitStack) -> None:
        self._progress = run.progress
        self._pool = stack.enter_context(ThreadPoolExecutor(1))
        self._last: Future[None] | None = None

    def begin(self, records: Sequence[TensorRecord], writer: ShardWriter, states: StateFile | None) -> None:
        """Note a unit as soon as what was begun to write of it is written."""
        settle, tensors = writer.begun(), [asdict(record) for record in records]

        def commit() -> None:
            written = settle()
            pieces = [] if states is None else states.settle()
            self._progress.commit({"tensors": tensors, "written": written, "states": pieces})

        self._last = self._pool.submit(commit)

    def wait(self) -> None:
        """Until the last unit is noted; raises what went wrong."""
        if self._last is not None:
            self._last.result()


def _write(plan: Plan, name: str, tensor: UnitTensor | None, measured: Measured, writer: ShardWriter) -> TensorRecord:
    """Begin to write what stands for a source tensor; its record."""
    planned = plan.record(name)
    if tensor is None or tensor.stored is None:
        if tensor is None or tensor.walked is None:
            writer.copy(plan.checkpoint, name)
        else:
            writer.write(name, tensor.walked)
        return planned
    amax = measured.inputs.get(name)
    scale = input_global_scale(amax) if amax is not None else None
    for suffix, part in dialect.encode(tensor.stored, scale).items():
        writer.write(f"{name.removesuffix('.weight')}.{suffix}", part)
    assert tensor.error is not None
    return replace(planned, relative_error=float(tensor.error), input_amax=amax)


def _write_cache_scales(plan: Plan, layer: int, measured: Measured, writer: ShardWriter) -> list[TensorRecord]:
    """Begin to write the scales of a layer's FP8 KV cache, if it has one; their records."""
    if measured.keys_values is None:
        return []
    dtype = plan.outputs[f"{plan.attention[layer]}.k_scale"][0].dtype
    scales = dialect.kv_encode(plan.attention[layer], measured.keys_values, dtype)
    records = []
    for (name, scale), amax in zip(scales.items(), measured.keys_values, strict=True):
        writer.write(name, scale)
        records.append(replace(plan.record(name), input_amax=amax))
    return records


def _with_other_files(plan: Plan) -> Plan:
    """The plan, the files without weights on this disk: of a model on the Hub only config files are so far."""
    if plan.checkpoint.remote is None:
        return plan
    from snugfit.model.hub import fetch_other_files

    return replace(plan, checkpoint=fetch_other_files(plan.checkpoint))


def _skeleton(plan: Plan) -> layers.Skeleton:
    """transformers' model, which must agree with what the plan took from the headers."""
    _check_architecture(plan)
    skeleton = layers.build_skeleton(plan.checkpoint)
    check_linears(plan.assignments, sorted(layers.linear_names(skeleton)), plan.recipe.where)
    layers.check_shapes(skeleton, plan.checkpoint, {})
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


def _identity(plan: Plan, data: Rows | None, device: torch.device, tokens_per_batch: int) -> dict[str, Any]:
    """All that decides the bytes of the weight files."""
    shards = {shard.name: shard.bytes for shard in plan.shards}
    return {
        "source": header_digest(plan.checkpoint),
        "source_files": stamps(plan.checkpoint),
        "recipe": plan.recipe.digest,
        "rows": None if data is None else data.digest,
        "weight_files": shards,
        "device": device.type,
        "tokens_per_batch": tokens_per_batch,
        "hardware": hardware(device),
        "versions": versions() | {"snugfit": __version__},
    }


def _load_rows(plan: Plan, text: Sequence[str | Path], rows: int, length: int) -> Rows:
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


def _write_other_files(plan: Plan, directory: Path) -> tuple[str, ...]:
    """Config, index, recipe and every file of the source that holds no weights; names of those left out."""
    left_out = []
    for name in plan.checkpoint.other_files:
        if name.endswith(_OTHER_WEIGHTS) or name.endswith(".index.json"):
            left_out.append(name)
            continue
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(plan.checkpoint.path / name, directory / name)
    (directory / "config.json").write_text(json.dumps(plan.config, indent=2, ensure_ascii=False) + "\n", "utf-8")
    if len(plan.shards) > 1:
        text = json.dumps(index_of(plan.shards), indent=2) + "\n"
        (directory / INDEX_NAME).write_text(text, encoding="utf-8")
    (directory / RECIPE_FILE).write_text(plan.recipe.text, encoding="utf-8")
    return tuple(left_out)


def _record(
    run: _Run,
    target: Path,
    outcome: _Outcome,
    left_out: tuple[str, ...],
    arguments: Mapping[str, Any],
    estimate: Estimate,
) -> QuantizeRecord:
    plan, data = run.plan, run.data
    place = {name: number for number, name in enumerate(plan.outputs)}
    entries = [tensor for entry in run.progress.entries for tensor in entry["tensors"]]
    measured = [TensorRecord(**tensor | {"shape": tuple(tensor["shape"])}) for tensor in entries]
    seconds = run.clock.seconds
    actual = {
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_gpu_bytes": peak_gpu_bytes(run.device),
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
        source=plan.checkpoint.path.resolve().name if plan.checkpoint.remote is None else plan.checkpoint.remote.name,
        source_header_digest=header_digest(plan.checkpoint),
        target=target.resolve().name,
        dataset=dataset,
        tensors=tuple(sorted(measured, key=lambda tensor: place[tensor.name])),
        source_bytes=sum(t.bytes for t in plan.checkpoint.tensors.values()),
        bytes=plan.bytes,
        files=outcome.files,
        left_out=left_out,
        seconds=seconds,
        peak_rss_bytes=actual["peak_rss_bytes"],
        peak_gpu_bytes=actual["peak_gpu_bytes"],
        hardware=hardware(run.device),
        versions=versions(),
        estimates={key: {"estimated": value, "actual": actual[key]} for key, value in foreseen.items()},
        resumed=resumed,
    )
