"""The loop over layers: every unit is in its files before the next one is recorded as finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from snugfit import distributed
from snugfit.errors import Unfinished, UserError
from snugfit.evaluation.gpu_memory import MORE_TO_RESUME, gpu_memory_errors
from snugfit.machine import Clock
from snugfit.methods.method import SOME_SAMPLES, SOME_TOKENS
from snugfit.model import forward_pass, layers
from snugfit.model.assemble import read_single
from snugfit.model.pieces import Scratch, ScratchFile
from snugfit.progress import Progress
from snugfit.quantization.commits import Commits
from snugfit.quantization.division import Division
from snugfit.quantization.exchange import is_mine, owners_of
from snugfit.quantization.layer import LayerPass, LoadedGroup, UnitTensor, choose, exchange, load, observe, propagate
from snugfit.quantization.measured import NOTHING_MEASURED, Measured
from snugfit.quantization.pieces import PiecewiseExperts
from snugfit.quantization.prepare import PreparedRun
from snugfit.quantization.read_ahead import ReadAhead
from snugfit.quantization.recalled import observe_recalled
from snugfit.quantization.resume import FinishedUnits
from snugfit.quantization.states import RunStates, open_states
from snugfit.quantization.write import begin_copies, write_unit
from snugfit.records.norm_folds import NormFold
from snugfit.records.quantize import TensorRecord
from snugfit.records.statistics import layer_from_json
from snugfit.records.statistics_file import DatasetUsed, Statistics
from snugfit.storage.background import Background
from snugfit.storage.checkpoint import fingerprint, header_digest
from snugfit.storage.shards import ShardWriter, WrittenFiles
from snugfit.storage.shared_reads import SharedReads, processes_share
from snugfit.storage.transfer import Transfer
from snugfit.version import __version__

# errors that only the work on a layer can show
LATE_ERRORS = frozenset({"activations-not-finite", "amax-invalid"})


@dataclass(frozen=True, kw_only=True)
class Run:
    """A prepared run that has a directory to write into."""

    prepared: PreparedRun
    directory: Path
    work: Path
    finished: FinishedUnits
    clock: Clock
    progress: Progress

    @property
    def runs_layers(self) -> bool:
        """Whether samples pass the layers."""
        return self.prepared.dataset is not None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """SHA-256 of each weight file; units that an earlier run had finished; seconds expected after the second layer."""

    files: Mapping[str, str]
    resumed: int
    expected_seconds: float | None


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a run has made, whose files are yet to be digested, taken by the disk, and closed; the rest as `Outcome`."""

    files: WrittenFiles
    resumed: int
    expected_seconds: float | None

    def outcome(self) -> Outcome:
        """Wait for the files, in all processes."""
        files = distributed.gather(self.files.digests())[0]
        return Outcome(files=files, resumed=self.resumed, expected_seconds=self.expected_seconds)


def run_layers(run: Run, meanwhile: Callable[[], object] = lambda: None) -> Outcome:
    """Load, observe, choose, propagate and write unit after unit, from the first that is not finished.

    `meanwhile` is called when all are recorded, while the last files are digested and the disk takes them.
    """
    with Background() as background:
        made = make_layers(run, background)
        with run.clock("finish"):
            meanwhile()
            return made.outcome()


def make_layers(run: Run, background: Background, meanwhile: Callable[[], object] = lambda: None) -> Made:
    """As `run_layers`, without waiting for the disk; `meanwhile` is called while the last units are recorded."""
    prepared, clock = run.prepared, run.clock
    plan = prepared.plan
    expected = None
    try:
        with gpu_memory_errors(prepared.device, MORE_TO_RESUME, Unfinished), ExitStack() as stack:
            step = stack.enter_context(run.progress.bar(len(plan.units), "layers"))
            remote = plan.checkpoint.remote is not None
            transfer = stack.enter_context(Transfer(prepared.device, remote=remote))
            writer = stack.enter_context(_open_writer(run, transfer))
            batches = _batches(run)
            some = some_of(prepared, batches)
            states = _open_states(run, batches, transfer, stack)
            with clock("check"):
                _check_finished(run, writer, states)
            first = run.finished.done
            for _ in range(first):
                step()
            divided = _divided(run)
            begun = {} if first else begin_copies(plan, 0, divided[0][0], writer, divided[0][1])
            with clock("embed"):
                _embed(run, transfer, batches, some, states)
            work = _open_work(run, first, divided, begun, batches, some, states, transfer, writer, stack)
            commits = Commits(run.finished, writer, stack)
            for number in range(first, len(plan.units)):
                started = time.perf_counter()
                if distributed.world_size() > 1 and prepared.method.observe is not None and not prepared.holds_states:
                    commits.wait()  # what a method observes may be other processes' hidden states
                records, measured, folds = work.quantize(number, commits.wait)
                last = number == len(plan.units) - 1
                saved = None if states is None or last else states.save(number, commits.wait)
                commits.start(records, measured, folds, saved)
                if remote and number == first:  # with a lost network something should be there to resume from
                    commits.wait()
                    work.ahead.widen(prepared.read_ahead_bytes(work.divisions))
                step()
                if number == max(1, first) + 1:  # the first one warms up
                    expected = _expect(run, number, started)
            meanwhile()
            with clock("finish"):
                commits.wait()
                if states is not None and distributed.is_main():  # all processes have read the last ones
                    background.submit(states.remove)
                return Made(files=writer.finish(background), resumed=first, expected_seconds=expected)
    except UserError as error:
        done = sum(1 for entry in run.finished.entries if "states" in entry or not run.runs_layers)
        if isinstance(error, Unfinished) or error.code not in LATE_ERRORS or done < 2:
            raise
        raise _kept(run, error) from None


def _open_writer(run: Run, transfer: Transfer) -> ShardWriter:
    """What writes to the weight files; the main process makes them."""
    if not distributed.is_main():
        distributed.barrier()
    shards, lasts = run.prepared.plan.shards, not run.prepared.has_few
    writer = ShardWriter(run.directory, shards, transfer, digests=distributed.is_main(), lasts=lasts)
    if distributed.is_main():
        distributed.barrier()
    return writer


def _kept(run: Run, error: UserError) -> Unfinished:
    """The error of a layer behind finished ones, which stay."""
    done = run.finished.done - 1
    kept = f"{run.directory} keeps the {done} finished {'layer' if done == 1 else 'layers'}"
    how = "a recipe that differs in later layers alone resumes behind them"
    if error.code == "activations-not-finite":
        how = "another `dtype` needs `restart`, which removes them"
    return Unfinished(error.what, code=error.code, where=error.where, remedy=f"{error.remedy} {kept}; {how}.")


def _batches(run: Run) -> list[forward_pass.Batch]:
    prepared = run.prepared
    if prepared.dataset is None:
        return []
    causal = prepared.skeleton.is_causal
    return forward_pass.make_batches(prepared.dataset.samples, prepared.tokens_per_batch, prepared.device, pads=causal)


def some_of(prepared: PreparedRun, batches: Sequence[forward_pass.Batch]) -> list[forward_pass.Batch]:
    """Batches of a few samples, spread over all of those in `batches`, for a method that observes."""
    if prepared.dataset is None or prepared.method.observe is None:
        return []
    if prepared.skeleton.carries_state:  # which only batches have that pass every layer
        return forward_pass.some_batches(batches, SOME_TOKENS, SOME_SAMPLES)
    return forward_pass.spread_batches(
        prepared.dataset.samples,
        SOME_TOKENS,
        SOME_SAMPLES,
        min(prepared.tokens_per_batch, SOME_TOKENS // 2),  # one of them is enough for some questions
        prepared.device,
        pads=prepared.skeleton.is_causal,
    )


@dataclass(kw_only=True)
class Work:
    """What the work on units takes: samples, their hidden states, and what reads and writes weights."""

    run: Run
    batches: Sequence[forward_pass.Batch]
    some: Sequence[forward_pass.Batch]
    states: RunStates | None
    divisions: Sequence[Division]
    owners: Sequence[Mapping[str, int]]
    transfer: Transfer
    ahead: ReadAhead
    writer: ShardWriter
    scratch: Scratch | None
    begun: Mapping[str, UnitTensor] = field(default_factory=dict)  # of unit 0, what is being copied already

    def quantize(
        self, number: int, recorded: Callable[[], None]
    ) -> tuple[list[TensorRecord], Measured, Sequence[NormFold]]:
        """Load, observe, choose and propagate unit `number`, and begin to write it; what the method noted comes last.

        `recorded` waits until all units before are recorded.
        """
        run, prepared, plan = self.run, self.run.prepared, self.run.prepared.plan
        layer = self._layer(number)
        pieces = self._pieces(number, layer)
        if layer is not None and pieces is not None and self.scratch is not None:
            layer = replace(layer, pieces=pieces.of_layer(self.scratch))
        with run.clock("weights"):
            mine = [group for group in self.divisions[number].groups if is_mine(self.owners[number], group[0])]
            groups = load(plan, mine, self.ahead)
            loaded, observed = _observe(run, number, layer, groups)
            roundings = prepared.method.input_roundings(observed)
            tensors = choose(plan, loaded, prepared.method, None if layer is None else layer.buffers, observed)
            tensors |= {} if number else self.begun
            if layer is not None:
                exchange(layer, tensors)
            if pieces is not None:
                pieces.observed = observed
            del groups, loaded, observed  # before the next layer is observed
        if self.states is not None:
            self.states.before_writing(number, recorded)
        with run.clock("forward"):
            measured = _measure(run, number, layer, tensors, roundings)
        if pieces is not None:
            tensors |= pieces.tensors if layer is not None else pieces.without_samples()
        with run.clock("write"):
            records = write_unit(plan, number, tensors, measured, self.writer, self.owners[number])
        return records, measured, () if layer is None else layer.norm_folds

    def _layer(self, number: int) -> LayerPass | None:
        """What running the layer of unit `number` takes; None if no samples pass it."""
        prepared, pieces = self.run.prepared, self.divisions[number].pieces
        if not number or self.states is None:
            return None
        self.states.prefetch(number)
        size = len(pieces[0].experts) if pieces else None
        return LayerPass(
            plan=prepared.plan,
            skeleton=prepared.skeleton,
            index=number - 1,
            buffers=layers.expert_buffers(prepared.skeleton, number - 1, prepared.device, size),
            batches=distributed.mine(self.batches),
            some=self.some,
            all_batches=self.batches,
            names=[name for group in self.divisions[number].groups for name in group],
            owners=self.owners[number],
            states=self.states.of(number),
            device=prepared.device,
            experts=prepared.experts,
        )

    def _pieces(self, number: int, layer: LayerPass | None) -> PiecewiseExperts | None:
        """The experts of a unit in pieces; None if they are in one."""
        prepared = self.run.prepared
        if not self.divisions[number].pieces:
            return None
        recalls = prepared.known is not None and prepared.way.recall is not None
        return PiecewiseExperts(
            plan=prepared.plan,
            skeleton=prepared.skeleton,
            number=number,
            division=self.divisions[number],
            transfer=self.transfer,
            buffers=None if layer is None else layer.buffers,
            ahead=self.ahead,
            writer=self.writer,
            method=prepared.method,
            owners=self.owners[number],
            observe=partial(_observe, self.run, number, None) if recalls else None,
        )


def _divided(run: Run) -> list[tuple[Division, Mapping[str, int]]]:
    """Of each unit what is in memory together, and which process has each tensor."""
    prepared = run.prepared
    correlates, device = prepared.method.correlates, prepared.device
    divisions = enumerate(prepared.divisions())
    return [(one, owners_of(prepared.plan, n, one, device, correlates=correlates)) for n, one in divisions]


def _open_work(
    run: Run,
    first: int,
    divided: Sequence[tuple[Division, Mapping[str, int]]],
    begun: Mapping[str, UnitTensor],
    batches: Sequence[forward_pass.Batch],
    some: Sequence[forward_pass.Batch],
    states: RunStates | None,
    transfer: Transfer,
    writer: ShardWriter,
    stack: ExitStack,
) -> Work:
    """The work on units from `first` on; their weights begin to be read."""
    prepared = run.prepared
    divisions, owners = [one for one, _ in divided], [mine for _, mine in divided]
    scratch: Scratch | None = None
    if run.runs_layers and any(one.pieces for one in divisions):
        scratch = stack.enter_context(ScratchFile(run.work / f"experts-{distributed.rank()}", transfer))
    budget = prepared.read_ahead_bytes(divisions) if prepared.plan.checkpoint.remote is None else 0
    coming = [group for unit, owner in divided[first:] for group in unit.coming if is_mine(owner, group[0])]
    return Work(
        run=run,
        batches=batches,
        some=some,
        states=states,
        divisions=divisions,
        owners=owners,
        transfer=transfer,
        ahead=ReadAhead(transfer, prepared.plan.weights, coming, budget),
        writer=writer,
        scratch=scratch,
        begun=begun,
    )


def _observe(
    run: Run, number: int, layer: LayerPass | None, groups: Iterable[LoadedGroup]
) -> tuple[Iterable[LoadedGroup], Any]:
    """A unit's groups, and what the method finds out of its layer: by running it, or from statistics."""
    prepared = run.prepared
    if not number or prepared.known is None or prepared.way.recall is None:
        return observe(layer, groups, prepared.method)
    plan, skeleton, known = prepared.plan, prepared.skeleton, prepared.known
    return observe_recalled(plan, skeleton, number - 1, known, prepared.way, groups, prepared.device)


def _measure(
    run: Run,
    number: int,
    layer: LayerPass | None,
    tensors: Any,
    roundings: Mapping[str, Callable[[torch.Tensor], torch.Tensor]],
) -> Measured:
    """What the samples or an earlier run found in a unit's layer; nothing if no format needs it."""
    if number and run.prepared.recalled is not None:
        return run.prepared.recalled[number - 1]
    if layer is None:
        return NOTHING_MEASURED
    return propagate(layer, tensors, roundings)


def _expect(run: Run, number: int, started: float) -> float:
    """Seconds that the whole run will take, by its second layer; reported if it is worth it."""
    left = (time.perf_counter() - started) * (len(run.prepared.plan.units) - 1 - number)
    run.progress.time_left(left)
    return run.clock.seconds["total"] + left


def _open_states(
    run: Run, batches: Sequence[forward_pass.Batch], transfer: Transfer, stack: ExitStack
) -> RunStates | None:
    """The hidden states of a run's samples; None without samples."""
    if not run.runs_layers:
        return None
    prepared = run.prepared
    shape = prepared.skeleton.hidden_size, prepared.skeleton.dtype
    return open_states(run.work, batches, shape, prepared.device, transfer, stack, held=prepared.holds_states)


def _check_finished(run: Run, writer: ShardWriter, states: RunStates | None) -> None:
    """Read again what an earlier run wrote, and forget what the disk does not hold."""
    finished, units = run.finished, len(run.prepared.plan.units)
    if not finished.done:
        return
    good = 0
    if distributed.is_main():
        while good < finished.done and writer.holds(finished.entries[good]["written"]):
            good += 1
        if states is not None and good < units:
            good = states.resumable(finished.entries, good)
    good = distributed.from_main(good)
    # layers that pass more than hidden states on (Gemma 4's shared keys and values) run from the first one
    if run.prepared.skeleton.carries_state and run.runs_layers and good < units:
        good = 0
    finished.go_back(good)
    if states is not None and good < units:
        states.resume(finished.entries)
    for entry in finished.entries:
        writer.accept(entry["written"])
    done = f"{max(0, good - 1)} of {run.prepared.plan.num_layers} layers"
    run.progress.message(f"resuming after {done}, from {run.directory}")


def _embed(
    run: Run,
    transfer: Transfer,
    batches: Sequence[forward_pass.Batch],
    some: Sequence[forward_pass.Batch],
    states: RunStates | None,
) -> None:
    """Find what every layer is called with; and the first layer's hidden states, unless an earlier run passed it."""
    prepared = run.prepared
    if states is None or run.finished.done == len(prepared.plan.units):
        return
    kept, first = {id(batch) for batch in states.embedded(run.finished.done)}, states.first
    every = [*batches, *(batch for batch in some if all(batch is not one for one in batches))]

    def keep(batch: forward_pass.Batch, hidden: torch.Tensor) -> None:
        if id(batch) in kept:
            first.write(batch, hidden)

    def read(name: str) -> torch.Tensor:
        if name in prepared.plan.weights.origins:  # FP8
            return read_single(prepared.plan.weights, name).to(prepared.device)
        if processes_share(prepared.device) and prepared.plan.checkpoint.remote is None:
            return SharedReads(transfer, prepared.plan.checkpoint, [name]).result()[name]
        return transfer.read(prepared.plan.checkpoint, name).result()

    weights = layers.outer_weights(prepared.skeleton, prepared.plan.checkpoint, head=False, read=read)
    forward_pass.embed(prepared.skeleton, weights, every, prepared.device, keep)


def norm_folds_of(run: Run) -> tuple[NormFold, ...]:
    """What became of norms before routed experts, layer by layer; empty if no way tried to fold them."""
    found = [fold for entry in run.finished.entries for fold in entry.get("norm_folds", ())]
    return tuple(NormFold(**fold | {"readers": tuple(fold["readers"])}) for fold in found)


def statistics_of(run: Run) -> Statistics:
    """What a run measured, for its file."""
    prepared = run.prepared
    assert prepared.dataset is not None
    checkpoint, recipe = prepared.plan.checkpoint, prepared.plan.recipe
    dataset = prepared.dataset
    layers_found = [entry["statistics"] for entry in run.finished.entries[1:]]
    return Statistics(
        snugfit=__version__,
        model=checkpoint.name,
        header_digest=header_digest(checkpoint),
        fingerprint=fingerprint(checkpoint),
        datasets=(DatasetUsed(dataset.source, len(dataset.samples), dataset.tokens, dataset.digest),),
        all_experts=prepared.experts.all_experts,
        max_forced_tokens=prepared.experts.max_forced_tokens,
        recipe=None if recipe is None else recipe.recipe.name,
        recipe_digest=None if recipe is None else recipe.digest,
        layers={number: layer_from_json(found) for number, found in enumerate(layers_found)},
    )
