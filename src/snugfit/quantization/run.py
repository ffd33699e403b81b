"""The long work of a quantize run: unit after unit, each in the files before the next is noted as done."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from snugfit.data.rows import Rows
from snugfit.dialects import compressed_tensors as dialect
from snugfit.errors import Unfinished
from snugfit.formats.nvfp4 import input_global_scale
from snugfit.machine import Clock
from snugfit.model import forward_pass, layers
from snugfit.model.hidden_states import StateFile
from snugfit.quantization.estimate import read_ahead_bytes
from snugfit.quantization.layer import Measured, ReadAhead, UnitTensor, calibrate, quantize_unit
from snugfit.quantization.plan import Plan, groups_of
from snugfit.quantization.resume import Progress
from snugfit.records.quantize import TensorRecord
from snugfit.records.statistics import layer_to_json
from snugfit.records.statistics_file import Calibration
from snugfit.storage.shards import ShardWriter
from snugfit.storage.transfer import Transfer


@dataclass(frozen=True)
class Run:
    """What all steps of a run share. `known`: what an earlier run measured of each layer; rows are not walked then."""

    plan: Plan
    skeleton: layers.Skeleton
    device: torch.device
    data: Rows | None
    directory: Path
    work: Path
    progress: Progress
    clock: Clock
    tell: Callable[[str], None]
    settings: Calibration
    known: Sequence[Measured] | None = None


@dataclass(frozen=True)
class Outcome:
    """SHA-256 of each weight file; units that an earlier run had done; seconds expected after the second layer."""

    files: Mapping[str, str]
    resumed: int
    expected_seconds: float | None


def run_units(run: Run, tokens_per_batch: int, step: Callable[[], None]) -> Outcome:
    """Quantize and write unit after unit, from the first that is not done."""
    plan, clock = run.plan, run.clock
    expected = None
    try:
        with ExitStack() as stack:
            transfer = stack.enter_context(Transfer(run.device))
            writer = stack.enter_context(ShardWriter(run.directory, plan.shards, transfer))
            batches = [] if run.data is None else forward_pass.make_batches(run.data.rows, tokens_per_batch, run.device)
            states = _state_files(run, batches, transfer)
            for file in states:
                stack.enter_context(file)
            with clock("check"):
                _check_done(run, writer, states)
            for _ in range(run.progress.done):
                step()
            commits = _Commits(run, stack)
            walked = run.data is not None
            groups = [groups_of(plan, unit, walked and number > 0) for number, unit in enumerate(plan.units)]
            first = run.progress.done
            with clock("embed"):
                _embed(run, transfer, batches, states)
            coming = [group for unit in groups[first:] for group in unit]
            budget = read_ahead_bytes(plan, run.device)
            ahead = ReadAhead(transfer, plan.checkpoint, plan.weights, coming, budget)
            for number in range(first, len(plan.units)):
                begun = time.perf_counter()
                if walked and number > 0:
                    states[(number - 1) % 2].prefetch()
                room = layers.expert_storage(run.skeleton, number - 1, run.device) if walked and number else None
                with clock("weights"):
                    tensors = quantize_unit(plan, groups[number], ahead, room)
                if number > 1:
                    commits.wait()  # the file that this layer's states go to holds those of the layer before the last
                with clock("forward"):
                    measured = _measure(run, number, tensors, room, batches, states)
                with clock("write"):
                    names = [name for name in plan.units[number] if name in plan.outputs]
                    records = [_write(plan, name, tensors.get(name), measured, writer) for name in names]
                    records += _write_cache_scales(plan, number - 1, measured, writer)
                tensors.clear()  # before the next layer is read: one is in memory at a time
                del room
                statistics = None if measured.statistics is None else layer_to_json(measured.statistics)
                commits.begin(records, statistics, writer, states[number % 2] if walked else None)
                step()
                if number == max(1, first) + 1:  # the first one warms up
                    expected = _expect(run, number, begun)
            with clock("finish"):
                commits.wait()
                for file in states:
                    file.path.unlink()
                return Outcome(writer.finish(), first, expected)
    except torch.OutOfMemoryError as error:
        raise Unfinished(
            f"out of GPU memory ({str(error).splitlines()[0]}).",
            where=str(run.device),
            remedy="Run the same command where more is free, or lower --tokens-per-batch and add --resume-anyway.",
        ) from None


def _measure(
    run: Run,
    number: int,
    tensors: dict[str, UnitTensor],
    room: layers.ExpertStorage | None,
    batches: Sequence[forward_pass.Batch],
    states: Sequence[StateFile],
) -> Measured:
    """What rows find in a unit's layer, or what an earlier run found; nothing where no format needs it."""
    if number and run.known is not None:
        return run.known[number - 1]
    if room is None or run.data is None:
        return Measured({}, None)
    pair = states[(number - 1) % 2], states[number % 2]
    pair[1].begin_again()
    return calibrate(run.plan, run.skeleton, number - 1, tensors, room, batches, pair, run.device, run.settings)


def _expect(run: Run, number: int, begun: float) -> float:
    """Seconds that the whole run will take, by its second layer; told where it is worth telling."""
    left = (time.perf_counter() - begun) * (len(run.plan.units) - 1 - number)
    if left > 10:
        run.tell(f"about {left / 60:.0f} min to go" if left > 90 else f"about {left:.0f} s to go")
    return run.clock.seconds["total"] + left


def _state_files(run: Run, batches: Sequence[forward_pass.Batch], transfer: Transfer) -> list[StateFile]:
    """The two files between which hidden states go to and fro."""
    if run.data is None:
        return []
    width = int(run.skeleton.model.get_input_embeddings().weight.shape[1])  # type: ignore[operator]
    dtype = run.skeleton.model.dtype
    assert isinstance(dtype, torch.dtype)
    return [StateFile(run.work / f"states-{n}", batches, width, dtype, transfer) for n in range(2)]


def _check_done(run: Run, writer: ShardWriter, states: Sequence[StateFile]) -> None:
    """Read again what an earlier run wrote, and forget what the disk does not hold."""
    progress = run.progress
    if not progress.done:
        return
    good = 0
    while good < progress.done and writer.holds(progress.entries[good]["written"]):
        good += 1
    while (
        states
        and 0 < good < len(run.plan.units)
        and not states[(good - 1) % 2].holds(progress.entries[good - 1]["states"])
    ):
        good -= 1
    # layers that hand on more than hidden states (Gemma 4's shared keys and values) are run from the first
    if run.skeleton.hand_on and run.data is not None and good < len(run.plan.units):
        good = 0
    progress.go_back(good)
    for entry in progress.entries:
        writer.accept(entry["written"])
    run.tell(f"going on after {max(0, good - 1)} of {run.plan.layers} layers, from {run.directory}")


def _embed(run: Run, transfer: Transfer, batches: Sequence[forward_pass.Batch], states: Sequence[StateFile]) -> None:
    """What every layer is called with; and the first layer's hidden states, unless an earlier run went past them."""
    if run.data is None or run.progress.done == len(run.plan.units):
        return
    fresh = run.progress.done == 0

    def keep(batch: forward_pass.Batch, hidden: torch.Tensor) -> None:
        if fresh:
            states[0].write(batch, hidden)

    def read(name: str) -> torch.Tensor:
        return transfer.read(run.plan.checkpoint, name).result()

    weights = layers.outer_weights(run.skeleton, run.plan.checkpoint, head=False, read=read)
    forward_pass.embed(run.skeleton, weights, batches, run.device, keep)


class _Commits:
    """Notes each unit as done once it is in the files, while the next is worked on."""

    def __init__(self, run: Run, stack: ExitStack) -> None:
        self._progress = run.progress
        self._pool = stack.enter_context(ThreadPoolExecutor(1))
        self._last: Future[None] | None = None

    def begin(
        self,
        records: Sequence[TensorRecord],
        statistics: Mapping[str, Any] | None,
        writer: ShardWriter,
        states: StateFile | None,
    ) -> None:
        """Note a unit as soon as what was begun to write of it is written."""
        settle, tensors = writer.begun(), [asdict(record) for record in records]
        before = self._last

        def commit() -> None:
            if before is not None:
                before.result()  # done; where it failed, so does this
            written = settle()
            pieces = [] if states is None else states.settle()
            entry = {"tensors": tensors, "statistics": statistics, "written": written, "states": pieces}
            self._progress.commit(entry)

        self._last = self._pool.submit(commit)

    def wait(self) -> None:
        """Until the last unit is noted; raises what went wrong."""
        if self._last is not None:
            self._last.result()


def _write(plan: Plan, name: str, tensor: UnitTensor | None, measured: Measured, writer: ShardWriter) -> TensorRecord:
    """Begin to write what stands for a source tensor; its record."""
    planned = plan.record(name)
    if tensor is None or tensor.quantized is None:
        if tensor is None or tensor.walked is None:
            writer.copy(plan.checkpoint, name)
        else:
            writer.write(name, tensor.walked)
        return planned
    amax = measured.inputs.get(name)
    scale = input_global_scale(amax) if amax is not None else tensor.input_scale
    shapes = {info.name: info.shape for info in plan.outputs[name]}
    for suffix, part in dialect.encode(tensor.quantized, scale).items():
        full = f"{name.removesuffix('.weight')}.{suffix}"
        # scales of a source may be () or [N], or one where there is to be one a row
        shape = shapes[full]
        writer.write(full, part.reshape(shape) if part.numel() == math.prod(shape) else part.expand(shape).contiguous())
    assert tensor.error is not None
    return replace(planned, relative_error=float(tensor.error), input_amax=amax)


def _write_cache_scales(plan: Plan, layer: int, measured: Measured, writer: ShardWriter) -> list[TensorRecord]:
    """Begin to write the scales of a layer's FP8 KV cache, if it has one; their records."""
    if measured.keys_values is None or f"{plan.attention[layer]}.k_scale" not in plan.outputs:
        return []
    dtype = plan.outputs[f"{plan.attention[layer]}.k_scale"][0].dtype
    scales = dialect.kv_encode(plan.attention[layer], measured.keys_values, dtype)
    records = []
    for (name, scale), amax in zip(scales.items(), measured.keys_values, strict=True):
        writer.write(name, scale)
        records.append(replace(plan.record(name), input_amax=amax))
    return records
