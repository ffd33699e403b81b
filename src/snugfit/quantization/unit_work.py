"""The work on one unit of a run, a decoder layer or all outside: load, observe, choose, propagate, write."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from snugfit import distributed
from snugfit.model import forward_pass, layers
from snugfit.model.pieces import Scratch, ScratchFile
from snugfit.quantization.layer.choose import UnitTensor, choose
from snugfit.quantization.layer.division import Division
from snugfit.quantization.layer.exchange import exchange, is_mine, owners_of
from snugfit.quantization.layer.layer_pass import LayerPass
from snugfit.quantization.layer.load import LoadedGroup, load
from snugfit.quantization.layer.measured import NOTHING_MEASURED, Measured
from snugfit.quantization.layer.observe import observe
from snugfit.quantization.layer.pieces import PiecewiseExperts
from snugfit.quantization.layer.propagate import propagate
from snugfit.quantization.layer.read_ahead import ReadAhead
from snugfit.quantization.layer.recalled import observe_recalled
from snugfit.quantization.layer.write import write_unit
from snugfit.quantization.run import Run
from snugfit.quantization.states import RunStates
from snugfit.records.norm_folds import NormFold
from snugfit.records.quantize import TensorRecord
from snugfit.storage.shards import ShardWriter
from snugfit.storage.transfer import Transfer


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


def divided_units(run: Run) -> list[tuple[Division, Mapping[str, int]]]:
    """Of each unit what is in memory together, and which process has each tensor."""
    prepared = run.prepared
    correlates, device = prepared.method.correlates, prepared.device
    divisions = enumerate(prepared.divisions())
    return [(one, owners_of(prepared.plan, n, one, device, correlates=correlates)) for n, one in divisions]


def open_work(
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
