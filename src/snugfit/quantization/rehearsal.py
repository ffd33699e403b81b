"""What one way to choose codes takes of one decoder layer: the loop's own work on it, timed, on a few tokens.

The layer's weights are read (of a model on the Hub the first bytes of them, the others are random), all that the loop
does with a unit is done, and nothing is written. Hidden states are random, since the layers before it do not run. Of
routed experts that are many, some are worked on, the time of which stands for that of all. Of weights that are large,
some outputs and inputs are rounded: rounding grows with the values, GPTQ with K^2 (N + 2 K).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from snugfit import distributed
from snugfit.evaluation.times import backward_time
from snugfit.formats.quantized_weight import QuantizedWeight, dequantize
from snugfit.machine import Seconds, now
from snugfit.methods.method import ObservedLayer
from snugfit.methods.round_to_nearest import RoundToNearest
from snugfit.model import forward_pass, layers
from snugfit.model.forward_pass import Batch
from snugfit.progress import SILENT
from snugfit.quantization.layer.division import Division, Piece, divide, groups_of_units
from snugfit.quantization.layer.exchange import owners_of
from snugfit.quantization.plan import Plan
from snugfit.quantization.prepared_run import PreparedRun
from snugfit.quantization.resume import FinishedUnits
from snugfit.quantization.run import Run
from snugfit.quantization.samples import batches_of, some_of
from snugfit.quantization.stand_ins import Groups, NoFiles, Scratch, States, Timed, Watch
from snugfit.quantization.states import RunStates
from snugfit.quantization.unit_work import Work
from snugfit.quantization.ways import Way
from snugfit.records.statistics_file import ExpertCalibration
from snugfit.storage.safetensors_header import dtype_of
from snugfit.storage.shards import ShardWriter
from snugfit.storage.transfer import Transfer

OPERATIONS = {"cpu": 75 * 10**8, "cuda": 10**14}  # of a forward pass of the timed tokens, about
FEWEST_TOKENS = 128
EXPERT_BYTES = {"cpu": 1 << 25, "cuda": 1 << 31}  # of experts that are worked on, about
# CPU seconds below which the work is done a second time, behind what is compiled and allocated once; a pass of the run
# may have a hundred times the tokens, and on a GPU what its libraries load first takes longer than all of the work
QUICK = {"cpu": 3.0, "cuda": 30.0}


@dataclass(frozen=True, kw_only=True)
class LayerTime:
    """What one way takes of a layer, in a process that has all samples.

    `weights`: to read them, to search and to choose. `passes`: of all tokens, also those that only observe. `forward`
    is that of one pass of all tokens, `decode` of the layer's codes to 16 bits.
    """

    weights: Seconds
    passes: Seconds
    forward: Seconds
    decode: Seconds


class _Observes(RoundToNearest):
    """Rounds to nearest what it has looked at."""

    def __init__(self, observe: Callable[[ObservedLayer], None]) -> None:
        self.observe = observe  # type: ignore[assignment]


class Rehearsal:
    """Does the work on one decoder layer, which stands for others; `number` is its unit."""

    def __init__(self, prepared: PreparedRun, transfer: Transfer, processes: int) -> None:
        """For a run that so many processes share."""
        self._prepared, self._transfer = prepared, transfer
        self.device = prepared.device
        self.number = typical_unit(prepared)
        self._all = self._some = batches_of(prepared, torch.device("cpu"))
        blocks = [distributed.block(len(self._all), number, processes) for number in range(processes)]
        self.run_tokens = max(
            sum(batch.tokens.numel() for batch in self._all[some.start : some.stop]) for some in blocks
        )
        self._division, self._of_run = self._divisions()
        self.batches = self._few_batches()
        self.tokens = sum(batch.tokens.numel() for batch in self.batches)

    @property
    def names(self) -> list[str]:
        """The tensors that are read."""
        return [name for group in self._division.coming for name in group]

    def _divisions(self) -> tuple[Division, Division]:
        """What is worked on of the layer, and what the run has in memory of it together."""
        prepared, number = self._prepared, self.number
        groups = groups_of_units(prepared.plan, runs=prepared.dataset is not None)[number]
        of_run = divide(prepared.plan, prepared.skeleton, number, groups, prepared.experts_per_group)
        mixture = prepared.skeleton.experts.get(number - 1)
        if mixture is None:
            return of_run, of_run
        tensors, prefix = prepared.plan.weights.tensors, f"{prepared.plan.decoder}.{number - 1}."
        names = (prefix + name for name in mixture.names.values())
        size = sum(2 * tensors[name].elements for name in names if name in tensors) // mixture.count
        count = max(1, EXPERT_BYTES[self.device.type] // max(1, size))
        if prepared.experts_per_group is not None:
            count = min(count, prepared.experts_per_group)
        found = divide(prepared.plan, prepared.skeleton, number, groups, count)
        if found.pieces:  # the others, of which nothing is worked on
            total = found.pieces[-1].experts.stop
            found = replace(found, pieces=(found.pieces[0], Piece(range(total, total), (), ())))
        return found, of_run

    def _few_batches(self) -> list[Batch]:
        """Some of the samples, ready to pass the layer."""
        prepared = self._prepared
        if prepared.dataset is None:
            return []
        size = 2 * sum(prepared.plan.weights.tensors[name].elements for name in self.names)
        most = max(FEWEST_TOKENS, OPERATIONS[self.device.type] // max(1, size))
        most = min(most, prepared.tokens_per_batch, prepared.dataset.tokens)
        rows: list[Sequence[int]] = []
        for sample in prepared.dataset.samples:
            rows.append(sample[: most - sum(map(len, rows))])
            if sum(map(len, rows)) >= most:
                break
        batches = forward_pass.make_batches(rows, most, self.device, pads=prepared.skeleton.is_causal)
        weights = layers.outer_weights(prepared.skeleton, prepared.plan.checkpoint, head=False, read=self._outer)
        forward_pass.embed(prepared.skeleton, weights, batches, self.device)
        return batches

    def _outer(self, name: str) -> Tensor:
        """A tensor outside the layers: a small one, or zeros that take no memory; layers get random hidden states."""
        info = self._prepared.plan.weights.tensors[name]
        if info.bytes <= 1 << 20 and name not in self._prepared.plan.weights.origins:
            return self._transfer.read(self._prepared.plan.checkpoint, name).result()
        return torch.zeros((), dtype=dtype_of(info), device=self.device).expand(info.shape)

    def _times_of(self, max_tokens: int | None) -> float:
        """How many tokens a pass of the run has for each of the same pass here."""
        if max_tokens is None:
            return self.run_tokens / self.tokens
        real, few = (forward_pass.some_batches(some, max_tokens) for some in (self._some, self.batches))
        return sum(b.tokens.numel() for b in real) / sum(b.tokens.numel() for b in few)

    def time(self, way: Way) -> LayerTime:
        """What a way takes of the layer."""
        self._some = some_of(self._prepared.taking(way), self._all) or self._all
        tried = len(self._division.pieces[0].experts) if self._division.pieces else None
        watch = Watch(self.device, self._times_of(None) if self.batches else 0.0, tried)
        method = Timed(copy.deepcopy(way.method), watch, self._times_of)
        prepared = replace(self._prepared, experts=self._few_forced()).taking(replace(way, method=method))
        made = self._kernels_made()
        taken = self._work(prepared, watch)
        if taken.cpu < QUICK[self.device.type] or self._kernels_made() > made:
            taken = self._work(prepared, watch)
        return self._summed(taken, watch, self._decode_time(method.codes))

    def _kernels_made(self) -> int:
        """Kernels for this CPU that the process has compiled, as it does on a machine's first run."""
        if self.device.type != "cpu":
            return 0
        try:
            from snugfit.formats.machine_code import kernels_made
        except ImportError:  # the plain definitions compile nothing
            return 0
        return kernels_made()

    def backward(self, learned: frozenset[str]) -> Seconds:
        """What a forward and a backward pass of all tokens takes, for gradients of the weights `learned`, too."""
        found: list[Seconds] = []
        hidden = self._hidden()

        def observe(layer: ObservedLayer) -> None:
            names = [module for name, module in layer.linears.items() if f"{name}.weight" in learned]
            weights = [layer.module.get_submodule(name).get_parameter("weight") for name in names]

            def before(batch: Batch) -> None:
                for weight in weights:
                    weight.requires_grad_()
                found.append(backward_time(layer.module, self.number - 1, batch, hidden[batch.rows], weights))
                for weight in weights:
                    weight.requires_grad_(False)

            layer.run(before)

        prepared = self._prepared.taking(Way("", _Observes(observe)))
        self._work(prepared, Watch(self.device, 1.0))
        return sum(found, Seconds()) * (self.run_tokens / self.tokens)

    def _few_forced(self) -> ExpertCalibration:
        """As many tokens are forced through experts, of those that pass, as in the run."""
        experts = self._prepared.experts
        share = self.tokens / max(1, sum(batch.tokens.numel() for batch in self._all))
        return ExpertCalibration(experts.all_experts, math.ceil(experts.max_forced_tokens * share), 0)

    def _work(self, prepared: PreparedRun, watch: Watch) -> Seconds:
        """Do all work of the loop on the layer."""
        plan, number, nowhere = prepared.plan, self.number, Path()
        divisions = [Division(())] * number + [self._division]
        owners = owners_of(plan, number, self._division, self.device, correlates=prepared.method.correlates)
        states = cast("RunStates", States(self._hidden(), watch)) if self.batches else None
        nothing = cast("FinishedUnits", None)
        work = Work(
            run=Run(
                prepared=prepared,
                directory=nowhere,
                work=nowhere,
                finished=nothing,
                progress=SILENT,
            ),
            batches=self.batches,
            some=(),
            states=states,
            divisions=divisions,
            owners=[owners] * (number + 1),
            transfer=self._transfer,
            ahead=Groups(self._transfer, plan, self._division.coming),
            writer=cast("ShardWriter", NoFiles()),
            scratch=Scratch(self.device, watch) if self.batches and self._division.pieces else None,
        )
        watch.begin()
        started = now(self.device)
        work.quantize(number, lambda: None)
        return now(self.device) - started

    def _hidden(self) -> dict[tuple[int, ...], Tensor]:
        generator = torch.Generator().manual_seed(0)
        shapes = {batch.rows: (*batch.tokens.shape, self._prepared.skeleton.hidden_size) for batch in self.batches}
        dtype = self._prepared.skeleton.dtype
        return {rows: torch.randn(shape, generator=generator).to(self.device, dtype) for rows, shape in shapes.items()}

    def _decode_time(self, codes: Sequence[QuantizedWeight]) -> Seconds:
        """What it takes to make 16 bits of all codes of the layer, by some of them."""
        if not codes:
            return Seconds()
        plan, values = self._prepared.plan, 0
        started = now(self.device)
        for one in codes:
            values += dequantize(one).numel()
        taken = now(self.device) - started
        names = [n for n in plan.units[self.number] if (a := plan.assignments.get(n)) and a.format]
        return taken * (sum(plan.weights.tensors[name].elements for name in names) / max(1, values))

    def _summed(self, taken: Seconds, watch: Watch, decode: Seconds) -> LayerTime:
        """What the whole layer takes, with all experts and all tokens."""
        pieces, share, in_pieces = self._division.pieces, 1.0, bool(self._of_run.pieces)
        if pieces:
            share = pieces[-1].experts.stop / len(pieces[0].experts)
        weights, passes, last = taken + watch.more + watch.of_experts * (share - 1), Seconds(), Seconds()
        for one in (*watch.observing, watch.last):
            weights -= one.whole
            rest = one.whole - one.experts - one.filling
            if pieces and not in_pieces and not one.once:  # without pieces the layer passes once
                rest *= 0.5
            last = (rest + one.experts * share) * one.times
            passes += last
            if one is watch.last or in_pieces:  # in one piece experts are not read again
                weights += one.filling * share
        return LayerTime(weights=weights, passes=passes, forward=last, decode=decode)


def typical_unit(prepared: PreparedRun) -> int:
    """The unit of a decoder layer like most of them: one in the middle, or the first where layers pass more on."""
    plan = prepared.plan
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for index in prepared.skeleton.ran:
        prefix = f"{plan.decoder}.{index}."
        found = ((name, plan.weights.tensors[name].shape) for name in plan.units[index + 1])
        assigned = ((name.removeprefix(prefix), shape, _format_of(plan, name)) for name, shape in found)
        kinds.setdefault(tuple(sorted(assigned)), []).append(index + 1)
    most = max(kinds.values(), key=len)
    return most[0] if prepared.skeleton.carries_state else most[len(most) // 2]


def _format_of(plan: Plan, name: str) -> str:
    assignment = plan.assignments.get(name)
    return "" if assignment is None or assignment.format is None else assignment.format.name
