"""Several plans of one model on the same samples, in one pass over its layers, compared with the original by KL.

Each layer's exact weights are read once; every plan's layer is made of them, and run on that plan's own hidden states.
Plans that agree in all layers so far share their hidden states. Nothing is written but hidden states, in files that
are removed at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from snugfit.evaluation.divergence import Softmax, diverge, softmax
from snugfit.evaluation.evaluated_model import Outer, bounded_attention, embedding_weights, open_head, outer_weights
from snugfit.evaluation.measure import LOGITS, SLICE
from snugfit.formats import fp8
from snugfit.formats.quantized_weight import dequantize
from snugfit.model import emulate, forward_pass
from snugfit.model.forward_pass import Batch, Head
from snugfit.model.hidden_states import StateFile
from snugfit.planning.groups import HEAD, Group, assignment_of
from snugfit.planning.variants import LayerVariants, Subject
from snugfit.progress import SILENT, Progress
from snugfit.records.scores import KV_CACHE
from snugfit.storage.tensor_reader import TensorReader
from snugfit.storage.transfer import Transfer

Array = NDArray[np.float32]
ORIGINAL = ""


@dataclass(frozen=True, kw_only=True)
class Assigned:
    """A plan by its name: the format of each group that is not kept; KV_CACHE: "fp8" asks for an FP8 cache."""

    name: str
    choice: Mapping[str, str] = field(default_factory=dict)


@dataclass(eq=False)
class _Branch:
    """Hidden states that one or several plans share, and the batches that they belong to."""

    file: StateFile
    batches: Sequence[Batch]


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
        progress: Progress = SILENT,
    ) -> None:
        self._subject, self._rows, self._device = subject, rows, device
        self._plans = {ORIGINAL: Assigned(name=ORIGINAL), **{plan.name: plan for plan in plans}}
        self._tokens_per_batch, self._folder, self._progress = tokens_per_batch, folder, progress
        self._layers_done = 0

    @torch.no_grad()
    def divergences(self) -> dict[str, list[Array]]:
        """KL(original || plan) in nats of each scored token [T - 1] of each sample, by plan; NaN where not finite."""
        skeleton = self._subject.model.skeleton
        with ExitStack() as stack:
            transfer = stack.enter_context(Transfer(self._device))
            advance = stack.enter_context(self._progress.bar(len(skeleton.layers) + 1, "comparing plans"))
            read = stack.enter_context(TensorReader(self._subject.model.checkpoint, self._device))
            branches = self._embed(stack, transfer, read)
            for index in range(len(skeleton.layers)):
                if index not in skeleton.skipped:
                    branches = self._pass_layer(index, branches, stack, transfer, read)
                advance()
            found = self._compare(branches)
            advance()
            for file in self._folder.glob("plan-states-*"):
                file.unlink()
        return found

    def _embed(self, stack: ExitStack, transfer: Transfer, read: TensorReader) -> dict[str, _Branch]:
        """The branch of each plan at the first layer: one of all, or one of each where layers pass more on."""
        skeleton = self._subject.model.skeleton
        weights = embedding_weights(self._subject.model, read)
        branches: dict[str, _Branch] = {}
        for name in self._plans:
            if branches and not skeleton.carries_state:
                branches[name] = branches[ORIGINAL]
                continue
            batches = forward_pass.make_batches(
                self._rows, self._tokens_per_batch, self._device, pads=skeleton.is_causal
            )
            file = self._file(stack, transfer, batches, len(branches), 0)
            forward_pass.embed(skeleton, weights, batches, self._device, file.write)
            branches[name] = _Branch(file, batches)
        return branches

    def _file(
        self, stack: ExitStack, transfer: Transfer, batches: Sequence[Batch], number: int, parity: int
    ) -> StateFile:
        skeleton = self._subject.model.skeleton
        path = self._folder / f"plan-states-{parity}-{number}"
        return stack.enter_context(StateFile(path, batches, skeleton.hidden_size, skeleton.dtype, transfer))

    def _pass_layer(
        self,
        index: int,
        branches: Mapping[str, _Branch],
        stack: ExitStack,
        transfer: Transfer,
        read: TensorReader,
    ) -> dict[str, _Branch]:
        """The branches behind decoder layer `index`."""
        variants = LayerVariants(self._subject, index, self._device, read)
        mine = self._subject.by_layer.get(index, ())
        self._layers_done += 1
        done: dict[tuple[object, ...], _Branch] = {}
        found: dict[str, _Branch] = {}
        before = list({id(branch): branch for branch in branches.values()}.values())
        with bounded_attention(self._subject.model.arithmetic, self._device):
            for name, plan in self._plans.items():
                choice = {group: plan.choice[group] for group in mine if group in plan.choice}
                cache = variants.kv_cache() if KV_CACHE in plan.choice else None
                key = id(branches[name]), tuple(choice.items()), cache is None
                if key not in done:
                    parent = branches[name]
                    file = self._file(stack, transfer, parent.batches, len(done), self._layers_done % 2)
                    layer = variants.layer(choice)
                    states = parent.file, file
                    forward_pass.run_layer(layer, index, parent.batches, cache=cache, states=states)
                    done[key] = _Branch(file, parent.batches)
                found[name] = done[key]
        for branch in done.values():
            branch.file.wait()
        for branch in before:
            branch.file.close()
        return found

    def _compare(self, branches: Mapping[str, _Branch]) -> dict[str, list[Array]]:
        """KL of each token, from the last hidden states."""
        heads = _heads(self._subject, self._plans, self._device)
        found = {name: [np.empty(len(row) - 1, np.float32) for row in self._rows] for name in self._plans if name}
        order = [batch.rows for batch in branches[ORIGINAL].batches]
        for place in range(len(order)):
            hidden: dict[int, Tensor] = {}
            for branch in branches.values():
                if id(branch) not in hidden:
                    hidden[id(branch)] = branch.file.read(branch.batches[place])
            for position, row in enumerate(order[place]):
                states = {name: hidden[id(branch)][position] for name, branch in branches.items()}
                self._compare_row(row, states, heads, found)
        return found

    def _compare_row(
        self, row: int, states: Mapping[str, Tensor], heads: Mapping[str, Head], found: Mapping[str, list[Array]]
    ) -> None:
        step = max(1, min(LOGITS, SLICE[self._device.type]) // self._subject.model.vocabulary)
        length = len(self._rows[row]) - 1
        for start in range(0, length, step):
            stop = min(length, start + step)

            def predict(name: str, part: slice = slice(start, stop)) -> Softmax:
                return softmax(heads[name](states[name][part].unsqueeze(0))[0])

            exact = predict(ORIGINAL)
            for name, rows in found.items():
                other = predict(name)
                kl = diverge(exact, other).kl
                finite = exact.finite & other.finite
                rows[row][start:stop] = torch.where(finite, kl, torch.nan).float().cpu().numpy()


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
