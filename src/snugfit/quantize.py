"""The main path: a checkpoint and a recipe in, a quantized checkpoint out, one decoder layer in memory at a time."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import re
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snugfit import __version__
from snugfit.dialects import compressed_tensors as dialect
from snugfit.engines.fused import group_modules
from snugfit.errors import UserError
from snugfit.model.checkpoint import Checkpoint, TensorInfo, open_checkpoint, read_tensor
from snugfit.model.names import parse_name
from snugfit.model.shards import (
    Shard,
    ShardWriter,
    check_target,
    file_digests,
    index_of,
    plan_shards,
    staged,
)
from snugfit.recipe import Assignment, LoadedRecipe, load_recipe, resolve
from snugfit.records import QuantizeRecord, TensorRecord

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from snugfit.calibration.dataset import Rows
    from snugfit.formats.stored import Stored
    from snugfit.model.layers import Skeleton
    from snugfit.model.walk import Batch

RECIPE_FILE = "snugfit-recipe.yaml"
RECORD_FILE = "snugfit-record.json"
MAX_SHARD_BYTES = 5_000_000_000
TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 16384}
KEPT = "as it was"
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOWERS = ("vision_config", "audio_config", "speech_config")
# weights in other containers: engines would load them beside ours
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")


@dataclass(frozen=True)
class Plan:
    """Everything that headers and recipe decide: what each source tensor becomes, and where its bytes go.

    `units` are names of source tensors that are in memory together: first all outside the decoder layers, then a layer
    each; tensors of layers that transformers does not run (multi-token prediction) count as outside.
    """

    checkpoint: Checkpoint
    recipe: LoadedRecipe
    assignments: Mapping[str, Assignment]
    outputs: Mapping[str, tuple[TensorInfo, ...]]
    units: tuple[tuple[str, ...], ...]
    shards: tuple[Shard, ...]
    config: Mapping[str, Any]

    @property
    def calibrated(self) -> bool:
        """Whether any format needs activations."""
        return any(a.format is not None and a.format.spec.calibrated for a in self.assignments.values())

    @property
    def bytes(self) -> int:
        """Bytes of all tensors to be written, without headers."""
        return sum(info.bytes for infos in self.outputs.values() for info in infos)

    def records(self) -> tuple[TensorRecord, ...]:
        """A record of each source tensor, without what only the run can know."""
        return tuple(self._record(name, infos) for name, infos in self.outputs.items())

    def _record(self, name: str, infos: tuple[TensorInfo, ...]) -> TensorRecord:
        source = self.checkpoint.tensors[name]
        assignment = self.assignments.get(name)
        fmt = assignment.format if assignment else None
        label, scale = (fmt.label(), assignment.scale) if fmt and assignment else (KEPT, "")
        return TensorRecord(name, source.shape, label, scale, source.bytes, sum(info.bytes for info in infos))


def plan_quantization(
    source: str | Path, recipe: str | LoadedRecipe, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> Plan:
    """Decide on headers alone what `recipe` (a built-in name, a YAML file, or a loaded one) does to a model directory.

    Reads no weights. Raises UserError for a broken or already quantized checkpoint, and for
    whatever is wrong with the recipe for this model.
    """
    if max_shard_bytes < 1:
        raise UserError(f"no weight file fits into {max_shard_bytes} bytes.", remedy="Raise --max-shard-size.")
    checkpoint = open_checkpoint(source)
    _check_source(checkpoint)
    _check_scope(checkpoint)
    loaded = load_recipe(recipe) if isinstance(recipe, str) else recipe
    layers = _layer_count(checkpoint)
    names = {t.name: parse_name(t.name, t.shape) for t in checkpoint.tensors.values()}
    frozen = {
        name: "transformers does not run this layer"
        for name, parsed in names.items()
        if parsed.layer is not None and parsed.layer >= layers
    }
    if any(config.get("tie_word_embeddings") for config in (checkpoint.config, _text_config(checkpoint.config))):
        frozen |= {name: "tied to the embeddings" for name, parsed in names.items() if parsed.role == "lm_head"}
    assignments = resolve(loaded, list(checkpoint.tensors.values()), layers=layers, frozen=frozen)
    _check_outside(loaded, assignments, [name for name in assignments if names[name].layer is None])
    formats = {names[name].module: a.format for name, a in assignments.items() if a.format is not None}
    if not formats:
        raise UserError("this recipe quantizes nothing.", where=loaded.where, remedy="Give one rule another format.")
    ignore = [
        parsed.module
        for name, parsed in names.items()
        if parsed.parameter == "weight"
        and parsed.module not in formats
        and parsed.role not in ("embed", "norm")
        and len(checkpoint.tensors[name].shape) == 2
    ]
    if "lm_head" not in ignore and "lm_head" not in formats:
        ignore.append("lm_head")  # tied: a linear in the model, no tensor in the file
    outside = tuple(name for name in names if names[name].layer is None or name in frozen)
    inside = [tuple(n for n in names if names[n].layer == k and n not in frozen) for k in range(layers)]
    units = (outside, *inside)
    outputs = {name: _outputs(checkpoint.tensors[name], assignments.get(name)) for unit in units for name in unit}
    shards = plan_shards([info for infos in outputs.values() for info in infos], max_shard_bytes)
    config = dict(checkpoint.config) | {"quantization_config": dialect.quantization_config(formats, ignore)}
    return Plan(checkpoint, loaded, assignments, outputs, units, tuple(shards), config)


def quantize_checkpoint(
    source: str | Path,
    target: str | Path,
    recipe: str | LoadedRecipe,
    *,
    text: Sequence[str | Path] = (),
    rows: int = 32,
    length: int = 1024,
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
    clock = _Clock()
    destination = Path(target)
    if tokens_per_batch is not None and tokens_per_batch < 1:
        raise UserError(f"{tokens_per_batch} tokens a batch are none.", remedy="Give --tokens-per-batch 1 at least.")
    with clock("prepare"):
        plan = plan_quantization(source, recipe, max_shard_bytes=max_shard_bytes)
        check_target(destination)
        place = _pick_device(device)
        data = _load_rows(plan, text, rows, length) if plan.calibrated else None
    with staged(destination) as directory, _bar(progress, len(plan.units)) as step:
        writer = ShardWriter(directory, plan.shards)
        try:
            batch = tokens_per_batch or TOKENS_PER_BATCH[place.type]
            measured = _run(plan, writer, data, place, batch, clock, step)
            with clock("finish"):
                writer.finish()
        finally:
            writer.close()
        with clock("finish"):
            left_out = _write_other_files(plan, directory)
            files = file_digests(directory, [shard.name for shard in plan.shards])
        arguments = {"rows": rows, "length": length, "device": str(place), "tokens_per_batch": batch}
        record = _record(plan, destination, data, measured, files, left_out, clock, arguments, place)
        (directory / RECORD_FILE).write_text(record.to_json(), encoding="utf-8")
    return record


def _run(
    plan: Plan,
    writer: ShardWriter,
    data: Rows | None,
    device: torch.device,
    tokens_per_batch: int,
    clock: _Clock,
    step: Any,
) -> dict[str, TensorRecord]:
    """Quantize and write all units; returns the records of the tensors that were quantized."""
    from snugfit.model import layers, walk

    measured: dict[str, TensorRecord] = {}
    batches: list[Batch] = []
    skeleton: Skeleton | None = None
    if data is not None:
        with clock("embed"):
            skeleton = layers.build_skeleton(plan.checkpoint)
            _check_linears(plan, skeleton)
            batches = walk.make_batches(data.rows, tokens_per_batch, device)
            walk.embed(skeleton, layers.outer_weights(skeleton, plan.checkpoint, head=False), batches, device)
    planned = {record.name: record for record in plan.records()}
    for number, unit in enumerate(plan.units):
        with clock("weights"):
            quantized = _quantize_unit(plan, unit, device, skeleton is not None and number > 0)
        scales: dict[str, float] = {}
        if skeleton is not None and number > 0:
            with clock("forward"):
                scales = _calibrate(skeleton, number - 1, plan, quantized, batches, device)
        with clock("write"):
            for name in unit:
                measured[name] = _write(plan, name, quantized.get(name), scales.get(name), writer, planned[name])
        step()
    return measured


@dataclass(frozen=True)
class _Tensor:
    """A source tensor in memory: as it was, or quantized; `seen` is what the walk uses in its place."""

    stored: Stored | None
    seen: Tensor | None
    error: float | None


def _quantize_unit(plan: Plan, unit: Sequence[str], device: torch.device, keep: bool) -> dict[str, _Tensor]:
    """Quantize the assigned tensors of a unit, fused groups together; `keep`: hold all tensors for the walk."""
    from snugfit.formats.stored import dequantize
    from snugfit.methods.rounding import round_group

    assigned = [name for name in unit if (a := plan.assignments.get(name)) and a.format is not None]
    done: dict[str, _Tensor] = {}
    for group in group_modules(name.removesuffix(".weight") for name in assigned):
        names = [f"{module}.weight" for module in group]
        assignment = plan.assignments[names[0]]
        assert assignment.format is not None
        weights = {name: _read_finite(plan.checkpoint, name).to(device) for name in names}
        for name, stored in round_group(weights, assignment.format, assignment.scale, assignment.objective).items():
            seen = dequantize(stored)
            exact = weights[name].float()
            square = float(exact.square().sum())
            error = float(exact.sub_(seen).square_().sum()) / square if square else 0.0
            done[name] = _Tensor(stored, seen.to(weights[name].dtype) if keep else None, error)
    if keep:
        rest = [name for name in unit if name not in done]
        done |= {name: _Tensor(None, _read_finite(plan.checkpoint, name), None) for name in rest}
    return done


def _calibrate(
    skeleton: Skeleton,
    index: int,
    plan: Plan,
    quantized: Mapping[str, _Tensor],
    batches: Sequence[Batch],
    device: torch.device,
) -> dict[str, float]:
    """Run decoder layer `index` with quantized weights over all rows; input amax of each NVFP4 weight, by tensor name.

    FP8 inputs are quantized meanwhile, NVFP4 inputs not: their scale is what this pass measures.
    """
    from snugfit.calibration.statistics import InputAmax
    from snugfit.model import emulate, layers, walk

    prefix = f"{skeleton.layers_name}.{index}."
    weights = {name.removeprefix(prefix): tensor.seen for name, tensor in quantized.items() if tensor.seen is not None}
    layer = layers.resident_layer(skeleton, index, weights, device)
    formats = {
        name.removeprefix(prefix).removesuffix(".weight"): plan.assignments[name].format
        for name, tensor in quantized.items()
        if tensor.stored is not None
    }
    quantizers = {m: emulate.input_quantizer(f, "marlin", None) for m, f in formats.items() if f is not None}
    emulate.quantize_inputs(layer, {module: q for module, q in quantizers.items() if q is not None})
    groups = group_modules(m for m, f in formats.items() if f is not None and f.spec.calibrated)
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
    from snugfit.formats.nvfp4 import input_global_scale

    if tensor is None or tensor.stored is None:
        seen = tensor.seen if tensor is not None else None
        writer.write(name, seen if seen is not None else _read_finite(plan.checkpoint, name))
        return planned
    scale = input_global_scale(amax) if amax is not None else None
    for suffix, part in dialect.encode(tensor.stored, scale).items():
        writer.write(f"{name.removesuffix('.weight')}.{suffix}", part)
    return TensorRecord(**{**asdict(planned), "relative_error": tensor.error, "input_amax": amax})


def _read_finite(checkpoint: Checkpoint, name: str) -> Tensor:
    import torch

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


def _outputs(source: TensorInfo, assignment: Assignment | None) -> tuple[TensorInfo, ...]:
    if assignment is None or assignment.format is None:
        return (TensorInfo(source.name, source.dtype, source.shape),)
    module = source.name.removesuffix(".weight")
    parts = dialect.layout(assignment.format, source.shape, source.dtype)
    return tuple(TensorInfo(f"{module}.{suffix}", dtype, shape) for suffix, (dtype, shape) in parts.items())


def _check_source(checkpoint: Checkpoint) -> None:
    config = checkpoint.config.get("quantization_config") or _text_config(checkpoint.config).get("quantization_config")
    packed = next((t.name for t in checkpoint.tensors.values() if _is_quantized(t)), None)
    if config or packed:
        method = config.get("quant_method", "unknown") if isinstance(config, dict) else "unknown"
        evidence = f"quant_method {method!r} in config.json" if config else f"tensor {packed}"
        raise UserError(
            f"already quantized ({evidence}).",
            where=str(checkpoint.path),
            remedy="Start from the original BF16, FP16 or FP32 checkpoint.",
        )


def _check_scope(checkpoint: Checkpoint) -> None:
    """Refuse what would be damaged quietly: experts need calibration of their own, towers are no decoder layers."""
    configs = (checkpoint.config, _text_config(checkpoint.config))
    counts = [config.get(key) for config in configs for key in EXPERT_COUNTS]
    towers = [key for key in TOWERS if checkpoint.config.get(key)]
    if any(isinstance(count, int) and count > 1 for count in counts):
        what = "a mixture of experts, which is not handled yet."
    elif towers:
        what = f"a model with a tower of its own ({towers[0]}), which is not handled yet."
    else:
        return
    raise UserError(what, where=str(checkpoint.path / "config.json"), remedy="Use a dense text model.")


def _is_quantized(tensor: TensorInfo) -> bool:
    wide = tensor.dtype in ("BF16", "F16", "F32", "F64")
    return tensor.name.endswith((".weight_packed", ".qweight")) or (tensor.name.endswith(".weight") and not wide)


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def _layer_count(checkpoint: Checkpoint) -> int:
    where = str(checkpoint.path / "config.json")
    kind = checkpoint.config.get("model_type")
    if not _known_to_transformers(kind):
        raise UserError(
            f"unknown architecture {kind!r}: transformers has no model_type of that name.",
            where=where,
            remedy="Check the config, or update transformers.",
        )
    count = _text_config(checkpoint.config).get("num_hidden_layers")
    if not isinstance(count, int) or count < 1:
        raise UserError(f"num_hidden_layers is {count!r}.", where=where, remedy="Mend the config.")
    present = {parse_name(t.name, t.shape).layer for t in checkpoint.tensors.values()}
    absent = next((k for k in range(count) if k not in present), None)
    if absent is not None and present != {None}:
        raise UserError(
            f"no tensor of layers.{absent}, though the config has {count} layers.",
            where=str(checkpoint.path),
            remedy="Config and weights do not belong together.",
        )
    return count


def _known_to_transformers(kind: object) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return isinstance(kind, str) and kind in CONFIG_MAPPING_NAMES


def _check_outside(recipe: LoadedRecipe, assignments: Mapping[str, Assignment], outside: Sequence[str]) -> None:
    for name in outside:
        fmt = assignments[name].format
        if fmt is not None and fmt.spec.calibrated:
            raise UserError(
                f"{name.removesuffix('.weight')} stands outside the decoder layers, where no inputs are measured.",
                where=f"{recipe.where}: rules[{assignments[name].rule}]",
                remedy="Give it `format: fp8-dynamic` or `format: nvfp4a16`.",
            )


def _check_linears(plan: Plan, skeleton: Skeleton) -> None:
    from snugfit.model.layers import linear_names

    linears = linear_names(skeleton)
    for name, assignment in plan.assignments.items():
        if assignment.format is None:
            continue
        module = name.removesuffix(".weight")
        if module not in linears:
            raise UserError(f"{module} is not a linear in transformers.", where=plan.recipe.where, remedy="Keep it.")


def _load_rows(plan: Plan, text: Sequence[str | Path], rows: int, length: int) -> Rows:
    from snugfit.calibration.dataset import load_rows

    vocabulary = _text_config(plan.checkpoint.config).get("vocab_size")
    if not isinstance(vocabulary, int | None):
        where = str(plan.checkpoint.path / "config.json")
        raise UserError(f"vocab_size is {vocabulary!r}.", where=where, remedy="Mend the config.")
    files = [Path(file) for file in text]
    return load_rows(plan.checkpoint.path, files, count=rows, length=length, vocabulary=int(vocabulary or 0))


def _pick_device(wanted: str | None) -> torch.device:
    import torch

    name = wanted or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"(cpu|cuda)(:\d+)?", name):
        raise UserError(f"unknown device {name!r}.", remedy="Use --device cpu or --device cuda.")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("this machine has no CUDA device that torch can use.", remedy="Use --device cpu.")
    return torch.device(name)


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
        (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    (directory / RECIPE_FILE).write_text(plan.recipe.text, encoding="utf-8")
    return tuple(left_out)


def _record(
    plan: Plan,
    target: Path,
    data: Rows | None,
    measured: Mapping[str, TensorRecord],
    files: Mapping[str, str],
    left_out: tuple[str, ...],
    clock: _Clock,
    arguments: Mapping[str, Any],
    device: torch.device,
) -> QuantizeRecord:
    import torch

    cuda = device.type == "cuda"
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
        source=str(plan.checkpoint.path),
        source_header_digest=_header_digest(plan.checkpoint),
        target=str(target),
        dataset=dataset,
        tensors=tuple(measured[name] for name in plan.outputs),
        source_bytes=sum(t.bytes for t in plan.checkpoint.tensors.values()),
        bytes=plan.bytes,
        files=files,
        left_out=left_out,
        seconds=clock.seconds | {"total": time.perf_counter() - clock.start},
        peak_rss_bytes=peak_rss_bytes(),
        peak_gpu_bytes=torch.cuda.max_memory_allocated(device) if cuda else None,
        hardware={
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name(device) if cuda else None,
        },
        versions={name: importlib.metadata.version(name) for name in ("torch", "transformers", "safetensors")}
        | {"python": platform.python_version()},
    )


def _header_digest(checkpoint: Checkpoint) -> str:
    """SHA-256 over config and tensor headers, in order; it does not read the weights."""
    parts = [json.dumps(checkpoint.config, sort_keys=True)]
    parts += [f"{t.name} {t.dtype} {t.shape} {t.file} {t.offset}" for t in checkpoint.tensors.values()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def peak_rss_bytes() -> int:
    """Peak resident memory of this process. Linux's VmHWM starts afresh at exec, where ru_maxrss keeps a parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text(encoding="ascii", errors="replace").splitlines()
        peak = next((line.split()[1] for line in lines if line.startswith("VmHWM:")), None)
        if peak:
            return int(peak) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class _Clock:
    """Adds up wall seconds by stage."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begin


@contextmanager
def _bar(show: bool, total: int) -> Iterator[Any]:
    """A progress bar over layers on stderr; yields the function that moves it."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(file=sys.stderr)
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not show) as bar:
        task = bar.add_task("quantizing layers", total=total)
        yield lambda: bar.advance(task)
