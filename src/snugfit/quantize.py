"""The main path: a checkpoint and a recipe in, a quantized checkpoint out, one decoder layer in memory at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snugfit import __version__
from snugfit.calibration.dataset import DEFAULT_LENGTH, DEFAULT_ROWS, Rows, load_rows
from snugfit.calibration.statistics import InputAmax
from snugfit.dialects import compressed_tensors as dialect
from snugfit.engines.fused import group_modules
from snugfit.errors import UserError
from snugfit.formats.nvfp4 import input_global_scale
from snugfit.formats.stored import Stored, dequantize
from snugfit.machine import Clock, hardware, peak_gpu_bytes, peak_rss_bytes, pick_device, progress_bar, versions
from snugfit.methods.rounding import round_group
from snugfit.model import emulate, layers, walk
from snugfit.model.checkpoint import INDEX_NAME, Checkpoint, header_digest, read_tensor
from snugfit.model.shards import ShardWriter, check_room, check_target, file_digests, index_of, staged
from snugfit.quantize_plan import MAX_SHARD_BYTES, Plan, plan_quantization, text_config
from snugfit.recipe import LoadedRecipe
from snugfit.records import QuantizeRecord, TensorRecord

RECIPE_FILE = "snugfit-recipe.yaml"
RECORD_FILE = "snugfit-record.json"
TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 16384}
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
    progress: bool = False,
) -> QuantizeRecord:
    """Quantize the model directory `source` by `recipe` into the new directory `target`; it holds the record too.

    `text` names text or JSONL files to calibrate on (default: Python's documentation topics), `rows` x `length` tokens
    at most; a recipe without activation scales reads none. `device`: "cpu" or "cuda" (default: cuda if there is one).
    `target` appears whole or not at all. Raises UserError for bad input.
    """
    clock = Clock()
    destination = Path(target)
    if tokens_per_batch is not None and tokens_per_batch < 1:
        raise UserError(f"{tokens_per_batch} tokens a batch are none.", remedy="Give --tokens-per-batch 1 at least.")
    with clock("prepare"):
        plan = plan_quantization(source, recipe, max_shard_bytes=max_shard_bytes)
        check_target(destination)
        place = pick_device(device)
        data = _load_rows(plan, text, rows, length) if plan.calibrated else None
        check_room(destination, plan.shards)
    batch = tokens_per_batch or TOKENS_PER_BATCH[place.type]
    arguments = {
        "rows": rows,
        "length": length,
        "device": str(place),
        "tokens_per_batch": batch,
    }
    bar = progress_bar(progress, len(plan.units), "quantizing layers")
    with staged(destination) as directory, bar as step:
        with ShardWriter(directory, plan.shards) as writer:
            measured = _run(plan, writer, data, place, batch, clock, step)
            with clock("finish"):
                writer.finish()
        with clock("finish"):
            left_out = _write_other_files(plan, directory)
            files = file_digests(directory, [shard.name for shard in plan.shards])
        record = _record(plan, destination, data, measured, files, left_out, clock, arguments, place)
        (directory / RECORD_FILE).write_text(record.to_json(), encoding="utf-8")
    return record


def _run(
    plan: Plan,
    writer: ShardWriter,
    data: Rows | None,
    device: torch.device,
    tokens_per_batch: int,
    clock: Clock,
    step: Callable[[], None],
) -> dict[str, TensorRecord]:
    """Quantize and write unit after unit; returns every source tensor's record."""
    measured: dict[str, TensorRecord] = {}
    planned = {record.name: record for record in plan.records()}
    try:
        with clock("embed"):
            batches = [] if data is None else _embed(plan, data, tokens_per_batch, device)
        for number, unit in enumerate(plan.units):
            walked = data is not None and number > 0
            with clock("weights"):
                tensors = _quantize_unit(plan, unit, device, walked)
            with clock("forward"):
                scales = _calibrate(plan, number - 1, tensors, batches, device) if walked else {}
            with clock("write"):
                for name in unit:
                    measured[name] = _write(plan, name, tensors.get(name), scales.get(name), writer, planned[name])
            tensors.clear()  # before the next layer is read: one is in memory at a time
            step()
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of GPU memory ({str(error).splitlines()[0]}).",
            where=str(device),
            remedy="Lower --tokens-per-batch, or use --device cpu.",
        ) from None
    return measured


def _embed(plan: Plan, data: Rows, tokens_per_batch: int, device: torch.device) -> list[walk.Batch]:
    batches = walk.make_batches(data.rows, tokens_per_batch, device)
    walk.embed(plan.skeleton, layers.outer_weights(plan.skeleton, plan.checkpoint, head=False), batches, device)
    return batches


@dataclass(frozen=True)
class _Tensor:
    """A source tensor in memory. `stored`: quantized, None where kept; `walked`: 16-bit values for the walk, if any."""

    stored: Stored | None
    walked: Tensor | None
    error: float | None


def _quantize_unit(plan: Plan, unit: Sequence[str], device: torch.device, walked: bool) -> dict[str, _Tensor]:
    """Quantize the assigned tensors of a unit, fused groups together; `walked`: hold all its tensors for the walk."""
    assigned = [name for name in unit if (a := plan.assignments.get(name)) and a.format is not None]
    done: dict[str, _Tensor] = {}
    for group in group_modules(name.removesuffix(".weight") for name in assigned):
        names = [f"{module}.weight" for module in group]
        assignment = plan.assignments[names[0]]
        assert assignment.format is not None
        weights = {name: _read_finite(plan.checkpoint, name).to(device) for name in names}
        for name, stored in round_group(weights, assignment.format, assignment.scale, assignment.objective).items():
            values = dequantize(stored)
            exact = weights[name].float()
            square = float(exact.square().sum())
            error = float((exact - values).square_().sum()) / square if square else 0.0
            done[name] = _Tensor(stored, values.to(weights[name].dtype) if walked else None, error)
    if walked:
        rest = [name for name in unit if name not in done]
        done |= {name: _Tensor(None, _read_finite(plan.checkpoint, name), None) for name in rest}
    return done


def _calibrate(
    plan: Plan, index: int, tensors: Mapping[str, _Tensor], batches: Sequence[walk.Batch], device: torch.device
) -> dict[str, float]:
    """Run decoder layer `index` with quantized weights over all rows; input amax of each NVFP4 weight, by tensor name.

    FP8 inputs are quantized meanwhile, NVFP4 inputs not: their scale is what this pass measures.
    """
    prefix = f"{plan.skeleton.layers_name}.{index}."
    # files may hold tensors that transformers computes itself, such as rotary_emb.inv_freq
    used = plan.skeleton.layers[index].state_dict().keys()
    weights = {n.removeprefix(prefix): t.walked for n, t in tensors.items() if t.walked is not None}
    layer = layers.resident_layer(plan.skeleton, index, {n: w for n, w in weights.items() if n in used}, device)
    formats = {
        name.removeprefix(prefix).removesuffix(".weight"): assignment.format
        for name in tensors
        if (assignment := plan.assignments.get(name)) and assignment.format is not None
    }
    quantizers = {module: emulate.input_quantizer(fmt, "marlin", None) for module, fmt in formats.items()}
    emulate.quantize_inputs(layer, {module: q for module, q in quantizers.items() if q is not None})
    groups = group_modules(module for module, fmt in formats.items() if fmt.spec.calibrated)
    observer = InputAmax(layer, [group[0] for group in groups])
    walk.run_layer(layer, index, batches, observer.before)
    found: dict[str, float] = {}
    for group in groups:
        amax = float(observer.amax[group[0]]) if group[0] in observer.amax else 0.0
        if not 0.0 < amax < float("inf"):
            raise UserError(
                f"its calibrated inputs have largest magnitude {amax}.",
                where=prefix + group[0],
                remedy="No scale can be made of that: check the source's weights, or keep this tensor in the recipe.",
            )
        found |= {f"{prefix}{module}.weight": amax for module in group}
    return found


def _write(
    plan: Plan, name: str, tensor: _Tensor | None, amax: float | None, writer: ShardWriter, planned: TensorRecord
) -> TensorRecord:
    if tensor is None or tensor.stored is None:
        kept = tensor.walked if tensor is not None else None
        writer.write(name, kept if kept is not None else _read_finite(plan.checkpoint, name))
        return planned
    scale = input_global_scale(amax) if amax is not None else None
    for suffix, part in dialect.encode(tensor.stored, scale).items():
        writer.write(f"{name.removesuffix('.weight')}.{suffix}", part)
    return replace(planned, relative_error=tensor.error, input_amax=amax)


def _read_finite(checkpoint: Checkpoint, name: str) -> Tensor:
    tensor = read_tensor(checkpoint, name)
    if not tensor.numel() or not tensor.is_floating_point() or tensor.itemsize == 1:
        return tensor
    low, high = tensor.aminmax()  # NaN carries through
    if not (torch.isfinite(low) and torch.isfinite(high)):
        nan, inf = int(tensor.isnan().sum()), int(tensor.isinf().sum())
        raise UserError(
            f"{nan} NaN and {inf} infinite values among {tensor.numel()}.",
            where=f"{checkpoint.path / checkpoint.tensors[name].file}: {name}",
            remedy="The source is damaged: download this file again.",
        )
    return tensor


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
    plan: Plan,
    target: Path,
    data: Rows | None,
    measured: Mapping[str, TensorRecord],
    files: Mapping[str, str],
    left_out: tuple[str, ...],
    clock: Clock,
    arguments: Mapping[str, Any],
    device: torch.device,
) -> QuantizeRecord:
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
        source=plan.checkpoint.path.resolve().name,
        source_header_digest=header_digest(plan.checkpoint),
        target=target.resolve().name,
        dataset=dataset,
        tensors=tuple(measured[name] for name in plan.outputs),
        source_bytes=sum(t.bytes for t in plan.checkpoint.tensors.values()),
        bytes=plan.bytes,
        files=files,
        left_out=left_out,
        seconds=clock.seconds,
        peak_rss_bytes=peak_rss_bytes(),
        peak_gpu_bytes=peak_gpu_bytes(device),
        hardware=hardware(device),
        versions=versions(),
    )
