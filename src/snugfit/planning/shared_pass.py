"""Several plans of one model on the same samples, in one pass over its layers, compared with the original by KL.

Each layer's exact weights are read once; every plan's layer is made of them, and run on that plan's own hidden states.
Plans that agree in all layers so far share their hidden states. Nothing is written but hidden states, in files that
are removed at the end. Of several processes each has a block of the samples' batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from snugfit import distributed
from snugfit.evaluation.divergence import exact_kl, softmax
from snugfit.evaluation.evaluated_model import Outer, bounded_attention, embedding_weights, open_head, outer_weights
from snugfit.evaluation.measure import SLICE
from snugfit.formats import fp8
from snugfit.formats.quantized_weight import dequantize
from snugfit.machine import free_bytes
from snugfit.model import emulate, forward_pass
from snugfit.model.forward_pass import Batch, Head
from snugfit.model.hidden_states import StateFile
from snugfit.planning.groups import HEAD, Group, assignment_of
from snugfit.planning.variants import VARIANTS_SHARE, LayerVariants, Subject
from snugfit.progress import SILENT, Progress
from snugfit.quantization.resume import FinishedUnits
from snugfit.records.scores import KV_CACHE, cache_of_layer
from snugfit.storage.tensor_reader import TensorReader
from snugfit.storage.transfer import Transfer

Array = NDArray[np.float32]
ORIGINAL = ""
LOGITS = {"cpu": 1 << 23, "cuda": 1 << 24}  # of one plan at once: a head takes many tokens faster than few


@dataclass(frozen=True, kw_only=True)
class Assigned:
    """A plan by its name: the format of each group that is not kept; KV_CACHE: "fp8" asks for an FP8 cache."""

    name: str
    choice: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Branch:
    """Hidden states behind a layer that one or several plans share: which states they come from, and how.

    `number` names the file, `parent` that of the states before the layer. `choice` are the formats of the layer's
    groups, `cached` says whether an FP8 cache rounds its keys and values.
    """

    number: int
    parent: int
    choice: tuple[tuple[str, str], ...] = ()
    cached: bool = False


def branches_of(
    plans: Sequence[Assigned], layers: Sequence[Sequence[str]], *, own: bool = False
) -> list[dict[str, Branch]]:
    """The branch of the original and of each plan at the first layer and behind each: one of all until they differ.

    `layers` are the names of each layer's groups. `own`: where layers pass more on than hidden states, each plan has
    its own.
    """
    everything = [Assigned(name=ORIGINAL), *plans]
    steps = [{plan.name: Branch(place if own else 0, 0) for place, plan in enumerate(everything)}]
    for mine in layers:
        known: dict[tuple[Any, ...], Branch] = {}
        step = {}
        for plan in everything:
            choice = tuple((group, plan.choice[group]) for group in mine if group in plan.choice)
            cached = KV_CACHE in plan.choice or any(name.startswith(cache_of_layer("")) for name, _ in choice)
            key = steps[-1][plan.name].number, choice, cached
            step[plan.name] = known.setdefault(key, Branch(len(known), *key))
        steps.append(step)
    return steps


class SharedPass:
    """Passes samples through the layers of the original and of each plan, one decoder layer in memory."""

    def __init__(
        self,
        subject: Subject,
        rows: Sequence[Sequence[int]],
        plans: Sequence[Assigned],
        device: torch.device,
        *,
        tokens_per_batch: int,
        folder: Path,
        first: Sequence[int] | None = None,
        title: str = "comparing plans",
        progress: Progress = SILENT,
    ) -> None:
        """Hidden states are in files in `folder`, which holds those of one pass alone; `title` is what progress shows.

        `first` are the positions of the first tokens of rows that are compared, by default 1: all that is predicted.
        """
        self._subject, self._rows, self._device = subject, rows, device
        self._first = [1] * len(rows) if first is None else list(first)
        self._plans = {ORIGINAL: Assigned(name=ORIGINAL), **{plan.name: plan for plan in plans}}
        self._tokens_per_batch, self._folder = tokens_per_batch, folder
        self._title, self._progress = title, progress
        self._ran = subject.model.skeleton.ran
        layers = [subject.places(index) for index in self._ran]
        self._branches = branches_of(plans, layers, own=subject.model.skeleton.carries_state)

    @torch.no_grad()
    def divergences(self, finished: FinishedUnits | None = None) -> dict[str, list[Array]]:
        """KL(original || plan) in nats of each token [T - 1] of each sample, by plan; NaN where not finite or compared.

        `finished` records each layer: a pass that was stopped resumes behind the last one.
        """
        with ExitStack() as stack:
            transfer = stack.enter_context(Transfer(self._device))
            advance = stack.enter_context(self._progress.bar(len(self._ran) + 1, self._title))
            read = stack.enter_context(TensorReader(self._subject.model.checkpoint, self._device))
            batches = self._batches()
            mine = {number: distributed.mine(some) for number, some in batches.items()}
            done = self._done(finished, transfer, batches)
            for _ in range(done):
                advance()
            before = self._files(stack, transfer, done, batches)
            distributed.in_all(lambda: self._embed(mine, None if done else before, read))
            for step, index in enumerate(self._ran[done:], done):
                after = self._files(stack, transfer, step + 1, batches)
                self._pass_layer(index, self._branches[step + 1], before, after, mine, read)
                pieces = distributed.gather({number: file.wait() for number, file in after.items()})
                if finished is not None:
                    states = {str(number): [one for some in pieces for one in some[number]] for number in after}
                    finished.commit({"plans": list(self._plans), "states": states})
                for file in before.values():
                    file.close()
                    if distributed.is_main():
                        file.path.unlink(missing_ok=True)
                distributed.barrier()  # files behind the next layer have these names
                before = after
                advance()
            names = {name: branch.number for name, branch in self._branches[-1].items()}
            found = self._compare({name: before[number] for name, number in names.items()}, mine[0])
            advance()
        for path in self._folder.glob("plan-states-*") if distributed.is_main() else ():
            path.unlink()
        distributed.barrier()  # another pass may begin there
        return found

    def _batches(self) -> dict[int, list[Batch]]:
        """The batches that each branch runs on, by its number: all the same, unless layers pass more on."""
        causal = self._subject.model.skeleton.is_causal
        found: dict[int, list[Batch]] = {}
        for branch in self._branches[0].values():
            if branch.number not in found:
                found[branch.number] = forward_pass.make_batches(
                    self._rows, self._tokens_per_batch, self._device, pads=causal
                )
        return found

    def _of(self, batches: Mapping[int, Sequence[Batch]], number: int) -> Sequence[Batch]:
        return batches[number] if self._subject.model.skeleton.carries_state else batches[0]

    def _files(
        self, stack: ExitStack, transfer: Transfer, step: int, batches: Mapping[int, Sequence[Batch]]
    ) -> dict[int, StateFile]:
        """The files of the states before layer `step`, by the branch's number."""
        skeleton = self._subject.model.skeleton
        shape = skeleton.hidden_size, skeleton.dtype
        return {
            number: stack.enter_context(
                StateFile(
                    self._folder / f"plan-states-{step % 2}-{number}",
                    self._of(batches, number),
                    *shape,
                    transfer,
                    distributed.mine(self._of(batches, number)),
                )
            )
            for number in dict.fromkeys(branch.number for branch in self._branches[step].values())
        }

    def _done(self, finished: FinishedUnits | None, transfer: Transfer, batches: Mapping[int, Sequence[Batch]]) -> int:
        """The number of layers whose states are in the files."""
        if finished is None:
            return 0
        if self._subject.model.skeleton.carries_state:  # what layers pass on besides is in memory alone
            finished.go_back(0)
        if not finished.done:
            return 0
        with ExitStack() as stack:
            files = self._files(stack, transfer, finished.done, batches)
            entry = finished.entries[-1]["states"]
            held = distributed.by_main(
                lambda: len(entry) == len(files) and all(files[int(n)].holds(some) for n, some in entry.items())
            )
        if not held:
            finished.go_back(0)
        return finished.done

    def _embed(
        self, batches: Mapping[int, Sequence[Batch]], files: Mapping[int, StateFile] | None, read: TensorReader
    ) -> None:
        """Find what layers are called with, and the first states unless `files` is None."""
        skeleton = self._subject.model.skeleton
        weights = embedding_weights(self._subject.model, read)
        for number, some in batches.items():

            def keep(batch: Batch, hidden: Tensor, file: StateFile | None = files[number] if files else None) -> None:
                if file is not None:
                    file.write(batch, hidden)

            forward_pass.embed(skeleton, weights, some, self._device, keep)

    def _pass_layer(
        self,
        index: int,
        branches: Mapping[str, Branch],
        before: Mapping[int, StateFile],
        after: Mapping[int, StateFile],
        batches: Mapping[int, Sequence[Batch]],
        read: TensorReader,
    ) -> None:
        """Run decoder layer `index` of each branch, from its parent's file to its own."""
        variants = distributed.in_all(lambda: LayerVariants(self._subject, index, self._device, read))
        most = min(distributed.gather(free_bytes(self._device))) // VARIANTS_SHARE
        choices = [dict(branch.choice) for branch in dict.fromkeys(branches.values())]
        wanted = dict.fromkeys(key for choice in choices for key in variants.keys(choice).values())
        elements = sum(self._subject.groups[name].elements for name, _, _ in wanted)
        if elements * self._subject.model.skeleton.dtype.itemsize <= most:
            variants.make(wanted)  # all at once: processes share many pieces of work better than few
        with bounded_attention(self._subject.model.arithmetic, self._device):
            for branch in dict.fromkeys(branches.values()):
                variants.forget(above=most)
                layer = variants.layer(dict(branch.choice))
                cache = variants.kv_cache() if branch.cached else None
                states = before[branch.parent], after[branch.number]
                run = partial(forward_pass.run_layer, layer, index, self._of(batches, branch.number))
                distributed.in_all(partial(run, cache=cache, states=states))

    def _compare(self, files: Mapping[str, StateFile], batches: Sequence[Batch]) -> dict[str, list[Array]]:
        """KL of each token of all samples, from the last hidden states of each plan in this process's batches."""
        heads = distributed.in_all(lambda: _heads(self._subject, self._plans, self._device))
        lengths = [len(row) - 1 for row in self._rows]
        found = {name: [np.full(n, np.nan, np.float32) for n in lengths] for name in self._plans if name}
        for batch in batches:
            hidden: dict[int, Tensor] = {}
            for file in files.values():
                if id(file) not in hidden:
                    hidden[id(file)] = file.read(batch)
            for position, row in enumerate(batch.rows):
                states = {name: hidden[id(file)][position] for name, file in files.items()}
                self._compare_row(row, states, heads, found)
        mine = [(row, {name: kl[row] for name, kl in found.items()}) for batch in batches for row in batch.rows]
        for row, measured in distributed.in_order(mine):
            for name, kl in measured.items():
                found[name][row] = kl
        return found

    def _compare_row(
        self, row: int, states: Mapping[str, Tensor], heads: Mapping[str, Head], found: Mapping[str, list[Array]]
    ) -> None:
        scored = slice(self._first[row] - 1, len(self._rows[row]) - 1)
        states = {name: some[scored] for name, some in states.items()}
        for name, part, kl in compare(states, heads, self._subject.model.vocabulary, self._device):
            found[name][row][scored][part] = kl.float().cpu().numpy()


def compare(
    states: Mapping[str, Tensor], heads: Mapping[str, Head], vocabulary: int, device: torch.device
) -> Iterator[tuple[str, slice, Tensor]]:
    """KL(ORIGINAL || plan) of some tokens of each plan after another, as `exact_kl` has it: name, tokens, nats [n].

    `states` are last hidden states [T, H] by the plan's name.
    """
    for part in _parts(len(states[ORIGINAL]), LOGITS[device.type] // vocabulary):
        slices = list(_parts(part.stop - part.start, SLICE[device.type] // vocabulary))
        logits = heads[ORIGINAL](states[ORIGINAL][part].unsqueeze(0))[0]
        exact = [softmax(logits[some]) for some in slices]
        for name in states:
            if name != ORIGINAL:
                logits = heads[name](states[name][part].unsqueeze(0))[0]
                yield name, part, torch.cat([exact_kl(one, logits[n]) for one, n in zip(exact, slices, strict=True)])


def _parts(count: int, step: int) -> Iterator[slice]:
    """0..count in slices of `step`, at least 1."""
    for low in range(0, count, max(1, step)):
        yield slice(low, min(low + max(1, step), count))


def _heads(subject: Subject, plans: Mapping[str, Assigned], device: torch.device) -> dict[str, Head]:
    """The output head of each plan by name; plans that keep it share it."""
    group = next((one for one in subject.groups.values() if one.role == HEAD), None)
    exact = outer_weights(subject.model, device)
    made: dict[str, Head] = {"": open_head(subject.model, device, exact)}
    found: dict[str, Head] = {}
    for name, plan in plans.items():
        fmt = "" if group is None else plan.choice.get(group.name, "")
        if fmt not in made and group is not None:
            made[fmt] = open_head(subject.model, device, _rounded_head(subject, group, fmt, exact))
        found[name] = made[fmt]
    return found


def _rounded_head(subject: Subject, group: Group, fmt: str, exact: Outer) -> Outer:
    """The weights outside the layers with the output head in a format, and what rounds its inputs."""
    (name,) = group.weights
    assignment = assignment_of(subject.layout, group, fmt)[name]
    assert assignment.format is not None
    skeleton = subject.model.skeleton
    module = skeleton.linears()[name.removesuffix(".weight")]
    weights = dict(exact.weights)
    if not assignment.keeps_codes:
        weight = weights[f"{module}.weight"]
        weights[f"{module}.weight"] = dequantize(fp8.quantize(weight)).to(weight.dtype)
    quantizer = emulate.input_quantizer(assignment.format, subject.target, None)
    return Outer(weights, {} if quantizer is None else {module: quantizer})
