"""The seconds that a run will take, before it begins: from one layer that is worked on, and rates of this machine.

Of each way one layer is timed (quantization/rehearsal.py); other layers take as much for each of their values. Reading
and writing run beside the computation, so the largest of the three counts, at rates that are measured on some bytes.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from snugfit import distributed
from snugfit.errors import UserError
from snugfit.evaluation.times import prediction_time
from snugfit.machine import NO_TIME, Seconds, free_bytes, now, timed
from snugfit.model.assemble import Piece, pieces_of
from snugfit.model.forward_pass import make_batches
from snugfit.progress import duration
from snugfit.quantization.estimate import LEARNED_TOKENS
from snugfit.quantization.learned import steps_of
from snugfit.quantization.plan import Plan
from snugfit.quantization.prepared_run import PreparedRun
from snugfit.quantization.rehearsal import LayerTime, Rehearsal
from snugfit.quantization.ways import Way, learned_weights
from snugfit.storage.files import nearest_folder
from snugfit.storage.transfer import Transfer

TIMED_BYTES = 1 << 26  # that are read, and written, to measure rates
HEAD_VALUES, HEAD_TOKENS = 1 << 23, 64  # of an output head that stands for the model's
_LEARNED_PASSES = 4  # of both heads: predictions, their KL, and its gradient
_MADE = 3  # times that the weights of a layer are made of codes in a step of learning
SHORT = "this run will take less than a minute"
SHORT_SECONDS = 0.05  # of roughly as many seconds nothing is measured
# rough rates, to know whether a run is long enough for a better estimate: operations and bytes a second
ROUGH_OPERATIONS, ROUGH_BYTES = {"cpu": 5e10, "cuda": 2e14}, {"cpu": 1e9, "cuda": 4e9}


@dataclass(frozen=True, kw_only=True)
class RunTime:
    """What a run will take behind its preparation: in all, way by way, and what that rests on."""

    seconds: Seconds
    ways: tuple[tuple[str, Seconds], ...]
    basis: str

    def line(self) -> str:
        """One line for people."""
        each = "" if len(self.ways) < 2 else "".join(f"{name} {duration(one.wall)}, " for name, one in self.ways)
        return f"this run will take about {duration(self.seconds.wall)} ({each}{self.basis})"


@dataclass(frozen=True, kw_only=True)
class Writing:
    """Seconds of a byte: to write it to a file, and to have it digested and taken by the disk."""

    write: Seconds
    keep: Seconds


def rough_seconds(prepared: PreparedRun) -> float:
    """About what a run takes, of shapes alone; within a factor of several."""
    plan, tokens = prepared.plan, prepared.dataset.tokens if prepared.dataset else 0
    moved = _source_bytes(plan)
    operations = 2.0 * _values(plan, range(1, len(plan.units))) * tokens / ROUGH_OPERATIONS[prepared.device.type]
    return len(prepared.ways) * (operations + moved / ROUGH_BYTES[prepared.device.type]) / distributed.asked_for()


def estimate_run_time(prepared: PreparedRun, folder: Path | None = None) -> RunTime | None:
    """What the run will take on this machine as it is now; None where its layer cannot be tried.

    Reads the weights of one layer at most, and runs them on some tokens; of a model on the Hub 64 MB are read. The
    rate of writing is that of `folder`, which is left as it was. The estimate is of a whole run, not of what is left
    of an unfinished one, and knows nothing of what several processes send each other.
    """
    try:
        with distributed.alone(), Transfer(prepared.device, remote=prepared.plan.checkpoint.remote is not None) as io:
            return _Estimate(prepared, io, folder).result()
    except (UserError, OSError, RuntimeError):  # the run says what is wrong; RuntimeError: also of too little memory
        return None


def expected_line(prepared: PreparedRun, folder: Path | None = None) -> str:
    """One line for people: what a run will take."""
    if rough_seconds(prepared) < SHORT_SECONDS:
        return SHORT
    found = estimate_run_time(prepared, folder)
    return "the time that this run will take is not known" if found is None else found.line()


class _Estimate:
    """The rates of this machine, and what they make of a run."""

    def __init__(self, prepared: PreparedRun, transfer: Transfer, folder: Path | None) -> None:
        self._prepared, self._plan = prepared, prepared.plan
        self._device, self._processes = prepared.device, distributed.asked_for()
        self._source = _source_bytes(self._plan)
        self._write = _writing(transfer, folder, min(TIMED_BYTES // 2, prepared.plan.bytes))
        self._rehearsal = Rehearsal(prepared, transfer, self._processes)
        self._read_rate = self._reading(transfer)
        self._layers = _values(self._plan, range(1, len(self._plan.units))) / max(
            1, _values(self._plan, [self._rehearsal.number])
        )

    def _reading(self, transfer: Transfer) -> float:
        """Bytes a second of the layer's weights, read for the first time."""
        weights, size, found = self._plan.weights, 0, list[Piece]()
        limit = TIMED_BYTES if weights.checkpoint.remote is None else TIMED_BYTES // 2
        for name in self._rehearsal.names:
            if size + weights.file_bytes(name) <= limit:
                found += pieces_of(weights, name)
                size += weights.file_bytes(name)
        started = now(self._device)
        for pending in [transfer.read(weights.checkpoint, *piece) for piece in found]:
            pending.result()
        taken = now(self._device) - started
        return size / max(1e-9, taken.wall) if found else math.inf

    def result(self) -> RunTime:
        """What the run takes."""
        prepared, found = self._prepared, list[tuple[str, Seconds]]()
        times: dict[str, LayerTime] = {}
        for way in prepared.ways:
            if way.unless or way.learns:
                continue
            times[way.name] = self._with_samples(way, self._rehearsal.time(way))
            found.append((way.name, self._of_way(way, times[way.name], first=not found)))
        slowest = max(times.values(), key=lambda one: one.forward.wall)
        if prepared.held_out is not None:
            predictions = self._predictions()
            judged = self._judged(slowest, predictions)
            found = [(name, one + judged * (2 if number == 0 else 1)) for number, (name, one) in enumerate(found)]
            if any(way.learns for way in prepared.ways):
                found.append(("learned", self._learned(slowest, predictions) + judged))
        basis = f"by a layer on {self._rehearsal.tokens:,} tokens" if self._rehearsal.batches else "by a layer"
        if self._read_rate < math.inf:
            basis += f", reading {self._read_rate / 1e6:,.0f} MB/s"
        if self._write is not None:
            basis += f", writing {1e-6 / max(1e-12, (self._write.write + self._write.keep).wall):,.0f} MB/s"
        basis += "".join(
            f"; {way.name}, if {' or '.join(way.unless)} is not kept, takes longer"
            for way in prepared.ways
            if way.unless
        )
        return RunTime(seconds=sum((one for _, one in found), NO_TIME), ways=tuple(found), basis=basis)

    def _with_samples(self, way: Way, time: LayerTime) -> LayerTime:
        """What a way takes with the samples that it has."""
        every, few = self._prepared.dataset, self._prepared.taking(way).on_few().dataset if self._has_few(way) else None
        if few is None or every is None:
            return time
        return replace(time, passes=time.passes * (few.tokens / every.tokens))

    def _has_few(self, way: Way) -> bool:
        """Whether a way is judged with a few samples, if these are enough: of a run that tries several."""
        return len(self._prepared.ways) > 1 and self._prepared.taking(way).few_are_enough

    def _of_way(self, way: Way, time: LayerTime, *, first: bool) -> Seconds:
        """Of quantizing the model in one way; only the first one reads a source that fits into memory from the disk."""
        share = self._layers / self._processes
        work = time.weights * share + time.passes * self._layers
        read, written = self._source / self._read_rate, NO_TIME
        if not first and self._source < free_bytes(torch.device("cpu")):
            read = 0.0
        if self._write is not None and self._has_few(way):  # files to be judged by, without what is the source's
            written = self._write.write * ((self._plan.bytes - self._plan.copied_bytes) / self._processes)
        elif self._write is not None:
            written = (self._write.write + self._write.keep) * (self._plan.bytes / self._processes)
        return Seconds(max(work.wall, read, written.wall), work.cpu + written.cpu)

    def _judged(self, time: LayerTime, predictions: Seconds) -> Seconds:
        """Of one model on the held-out samples, and of its KL."""
        held_out, data = self._prepared.held_out, self._prepared.dataset
        assert held_out is not None
        assert data is not None
        share = held_out.tokens / max(1, data.tokens)
        passes = (time.forward * share + time.decode) * self._layers
        return passes + predictions * (2 * held_out.tokens / self._processes)

    def _predictions(self) -> Seconds:
        """Of one token: logits of the vocabulary, and their KL."""
        skeleton = self._prepared.skeleton
        width, count = skeleton.hidden_size, int(skeleton.config.vocab_size)
        rows = max(1, min(count, HEAD_VALUES // width))
        head = torch.randn(rows, width).to(self._device, skeleton.dtype)
        hidden = torch.randn(1, HEAD_TOKENS, width).to(self._device, skeleton.dtype)
        return prediction_time(lambda states: states @ head.t(), hidden) * (count / rows)

    def _learned(self, time: LayerTime, predictions: Seconds) -> Seconds:
        """Of learning scales at the model's output, and of the original's last hidden states."""
        data = self._prepared.dataset
        assert data is not None
        batches = make_batches(data.samples, LEARNED_TOKENS, torch.device("cpu"))
        steps = steps_of(len(batches))
        passes = steps / len(batches)  # of all tokens
        backward = self._rehearsal.backward(learned_weights(self._plan))
        layers = ((time.forward + backward) * passes + time.decode * (_MADE * steps) + time.forward) * self._layers
        return layers + predictions * (_LEARNED_PASSES * data.tokens * passes / self._processes)


def _values(plan: Plan, units: Sequence[int]) -> int:
    """What becomes of more values takes longer: those of all weights of units."""
    return sum(plan.weights.tensors[name].elements for number in units for name in plan.units[number])


def _source_bytes(plan: Plan) -> int:
    """Bytes of all weights in the source's files."""
    return sum(plan.weights.file_bytes(name) for unit in plan.units for name in unit)


def _writing(transfer: Transfer, folder: Path | None, size: int) -> Writing | None:
    """What a byte takes in a folder, by `size` of them; None where none can be written."""
    if folder is None or not os.access(place := nearest_folder(folder.absolute().parent), os.W_OK):
        return None
    data = torch.arange(-(-size // 8)).view(torch.uint8).to(transfer.device)
    with tempfile.TemporaryFile(dir=place) as file:  # without a name: a kill leaves nothing

        def write() -> None:
            transfer.write(file.fileno(), 0, data).result()

        def keep() -> None:
            os.fdatasync(file.fileno())
            file.seek(0)
            hashlib.file_digest(file, "sha256")

        share = 1 / data.numel()
        return Writing(write=timed(write, transfer.device) * share, keep=timed(keep, transfer.device) * share)
