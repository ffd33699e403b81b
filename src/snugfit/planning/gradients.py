"""Gradients at the outputs of a model's groups, one decoder layer in memory at a time, and what rounding does to these.

Samples pass the layers forwards, and the hidden states before each layer stay in files. Then the layers run once more,
from the last to the first, each forwards and backwards; the gradient of the loss at a layer's hidden states is in a
file meanwhile. At the output Y of each group (fused linears, or the routed experts of a layer as one) this gives the
gradient g of each token, and rounding the group's weights and inputs gives dY: the pass sums g . dY, and half of its
square, over the tokens of each sample. A few tokens of some models (the first one, on which others lean) have squares
that no KL could reach; so each token's counts as c (1 - exp(-square / c)), with a c of one nat and one for each 500
scored tokens of its sample. Experts are one function of their inputs, so nothing has to pass them but autograd.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snugfit import distributed
from snugfit.evaluation.evaluated_model import bounded_attention, embedding_weights, open_head, outer_weights
from snugfit.machine import deterministic, fix_cublas_workspace, free_bytes
from snugfit.model import forward_pass
from snugfit.model.emulate import FP8Cache
from snugfit.model.forward_pass import Batch
from snugfit.model.hidden_states import StateFile
from snugfit.planning.carried import Carried, Visit
from snugfit.planning.drawn import loss_gradient
from snugfit.planning.groups import EXPERTS, SHARED, Group
from snugfit.planning.samples import ScoredRow
from snugfit.planning.variants import VARIANTS_SHARE, LayerVariants, Subject, scored_formats
from snugfit.progress import SILENT, Progress
from snugfit.quantization.resume import FinishedUnits
from snugfit.records.scores import cache_of_layer
from snugfit.storage.tensor_reader import TensorReader
from snugfit.storage.transfer import Transfer

TOKENS_PER_NAT = 500
LOGITS = {"cpu": 1 << 22, "cuda": 1 << 25}  # of which a gradient is made at once
# roles of groups whose outputs stay with their token in a layer; those of others reach the tokens that attend to it
OWN_TOKEN = frozenset({"o", "gate_up", "gate", "up", "down", "mlp", EXPERTS, SHARED})


@dataclass(frozen=True)
class Sums:
    """Of a group in a format: sums of g . dY, and of costs, over the tokens of each sample, in the samples' order."""

    signed: tuple[float, ...]
    costs: tuple[float, ...]


class GradientPass:
    """One pass forwards and one backwards over all layers of the original.

    The loss is the negative log-likelihood of tokens that are drawn from its own predictions: the covariance of these
    gradients is the curvature of KL.
    """

    def __init__(
        self,
        subject: Subject,
        rows: Sequence[ScoredRow],
        formats: Mapping[str, str],
        device: torch.device,
        *,
        tokens_per_batch: int,
        folder: Path,
        seed: int,
        kv_cache: bool = False,
        progress: Progress = SILENT,
    ) -> None:
        """Files go to `folder`, which holds those of one pass alone. With `kv_cache` FP8 caches are scored, too.

        `formats` are those to score, each by its name with what its weights are rounded to.
        """
        self._kv_cache = kv_cache
        self._subject, self._rows, self._device = subject, rows, device
        self._formats, self._names = tuple(formats.values()), {way: name for name, way in formats.items()}
        self._folder, self._seed, self._progress = folder, seed, progress
        self._strictly = True  # until an operation cannot
        if device.type == "cuda":
            fix_cublas_workspace()
        skeleton = subject.model.skeleton
        self._carries_state, self._carried = skeleton.carries_state, Carried()
        self._batches = forward_pass.make_batches([row.ids for row in rows], tokens_per_batch, device)
        self._mine = distributed.mine(self._batches)
        self._ran = skeleton.ran

    def run(self, finished: FinishedUnits) -> dict[tuple[str, str], Sums]:
        """The sums of every group in every format, by the group's and the format's name.

        `finished` records each layer, forwards and backwards: a pass that was stopped resumes behind the last one.
        """
        steps = 2 * len(self._ran) + 1
        if finished.done == steps:  # its files are gone
            return _sums(finished, self._names)
        with ExitStack() as stack:
            stack.enter_context(bounded_attention(self._subject.model.arithmetic, self._device))
            advance = stack.enter_context(self._progress.bar(steps, "scoring"))
            transfer = stack.enter_context(Transfer(self._device))
            read = stack.enter_context(TensorReader(self._subject.model.checkpoint, self._device))
            states = [self._file(stack, transfer, f"states-{number}") for number in range(len(self._ran) + 1)]
            gradients = [self._file(stack, transfer, f"gradients-{n}", torch.float32) for n in range(2)]
            self._check(finished, states, gradients)
            for _ in range(finished.done):
                advance()
            distributed.in_all(lambda: self.embed(read, None if finished.done else states[0]))
            for number in range(finished.done, len(self._ran)):
                distributed.in_all(partial(self._forward, number, states, read))
                pieces = [file.wait() for file in (states[number + 1], states[0])]
                parts = distributed.in_order(pieces[0]), distributed.in_order(pieces[1] if not number else [])
                finished.commit({"states": parts[0], "embedded": parts[1]})
                advance()
            if finished.done == len(self._ran):
                distributed.in_all(lambda: self._begin(states[-1], gradients[0]))
                finished.commit({"states": distributed.in_order(gradients[0].wait())})
                advance()
            for place in range(finished.done - len(self._ran) - 1, len(self._ran)):
                number = len(self._ran) - 1 - place
                files = gradients[place % 2], gradients[(place + 1) % 2]
                files[1].start_again()
                found = self.backward(number, states[number], files, read)
                finished.commit({"states": distributed.in_order(files[1].wait()), "sums": found})
                advance()
        for file in (*states, *gradients) if distributed.is_main() else ():
            file.path.unlink(missing_ok=True)
        return _sums(finished, self._names)

    def _file(self, stack: ExitStack, transfer: Transfer, name: str, dtype: torch.dtype | None = None) -> StateFile:
        skeleton = self._subject.model.skeleton
        path, width = self._folder / name, skeleton.hidden_size
        return stack.enter_context(StateFile(path, self._batches, width, dtype or skeleton.dtype, transfer, self._mine))

    def _check(self, finished: FinishedUnits, states: Sequence[StateFile], gradients: Sequence[StateFile]) -> None:
        """Forget the layers whose files the disk does not hold any more."""
        finished.go_back(distributed.by_main(lambda: self._held(finished, states, gradients)))

    def _held(self, finished: FinishedUnits, states: Sequence[StateFile], gradients: Sequence[StateFile]) -> int:
        """How many of the finished steps can be continued from.

        None where layers pass on more than hidden states: that is in memory alone.
        """
        if self._carries_state:
            return 0
        layers = len(self._ran)
        good = finished.done
        for number, entry in enumerate(finished.entries[:layers]):
            lost = number == 0 and not states[0].holds(entry["embedded"])
            if lost or not states[number + 1].holds(entry["states"]):
                good = number
                break
        while good > layers and not gradients[(good - layers - 1) % 2].holds(finished.entries[good - 1]["states"]):
            good = min(good - 1, layers)  # the file of the layer before it was overwritten
        return good

    def embed(self, read: TensorReader, keep: StateFile | None) -> None:
        """Find what each layer is called with, and keep the first hidden states."""
        weights = embedding_weights(self._subject.model, read)

        def store(batch: Batch, hidden: Tensor) -> None:
            if keep is not None:
                keep.write(batch, hidden)

        forward_pass.embed(self._subject.model.skeleton, weights, self._mine, self._device, store)

    def _forward(self, number: int, states: Sequence[StateFile], read: TensorReader) -> None:
        index = self._ran[number]
        layer = LayerVariants(self._subject, index, self._device, read).exact
        forward_pass.run_layer(layer, index, self._mine, states=(states[number], states[number + 1]))

    def _begin(self, last: StateFile, gradients: StateFile) -> None:
        """The gradient of the loss at the last hidden states."""
        model = self._subject.model
        outer = outer_weights(model, self._device)
        head = open_head(model, self._device, outer, gradients=True)
        for batch in self._mine:
            hidden = last.read(batch)
            found = torch.zeros_like(hidden, dtype=torch.float32)
            for place, row in enumerate(batch.rows):
                start, length = self._rows[row].first - 1, len(self._rows[row].ids)
                step = max(1, LOGITS[self._device.type] // model.vocabulary)
                for low in range(start, length - 1, step):
                    part = slice(low, min(low + step, length - 1))
                    found[place, part] = loss_gradient(head, hidden[place, part], self._seed, row, low)
            gradients.write(batch, found)

    def backward(
        self, number: int, states: StateFile, gradients: tuple[StateFile, StateFile], read: TensorReader
    ) -> list[Any]:
        """Sums of the groups of a layer, the `number`th that runs; its gradients go from one file to the other."""
        index = self._ran[number]
        variants = distributed.in_all(lambda: LayerVariants(self._subject, index, self._device, read))
        sums: dict[tuple[str, str], _RowSums] = {}
        chunks = self._chunks(variants)
        for chunk in chunks:
            watched = _Watched(self._subject, variants)
            watched.prepare(chunk)
            spread: list[tuple[tuple[str, str], nn.Module, FP8Cache | None]] = [
                (key, layer, None) for key, layer in watched.spread().items()
            ]
            if chunk is chunks[-1] and self._kv_cache and (cache := variants.kv_cache()) is not None:
                spread.append(((cache_of_layer(index), "fp8"), variants.exact, cache))
            for batch in self._mine:
                hidden = states.read(batch).requires_grad_()
                gradient = gradients[0].read(batch)
                visit, output, found = self._differentiate(watched, index, batch, hidden, gradient)
                behind = 1 + len(visit.leaves)
                if chunk is chunks[-1]:
                    first = torch.zeros_like(hidden) if found[0] is None else found[0]
                    gradients[1].write(batch, first.float())
                    visit.keep(found[1:behind])
                watched.add(batch, found[behind:], partial(_add, sums, self._rows))
                for key, layer, cache in spread:
                    with torch.no_grad():
                        other, mapping = visit.copy()
                        change = forward_pass.call_layer(layer, index, other, hidden.detach(), cache)
                        change = change.float().sub_(output.detach())
                        product = torch.linalg.vecdot(change, gradient) + visit.change(mapping)
                        _add(sums, self._rows, key, batch, product)
            variants.forget()
        return [[*key, *parts] for key, parts in _of_all(sums).items()]

    def _differentiate(
        self, watched: _Watched, index: int, batch: Batch, hidden: Tensor, gradient: Tensor
    ) -> tuple[Visit, Tensor, tuple[Tensor | None, ...]]:
        """One run of a layer: its visit, its output, and the gradients at its input, at `leaves` and what is watched.

        On a GPU they are added in one order, so that each pass has the same bits, unless the layer has an operation
        that cannot: then the rest of the pass does without, and says so.
        """
        if self._strictly:
            try:
                return self._differentiate_once(watched, index, batch, hidden, gradient)
            except RuntimeError as error:
                if "determinis" not in str(error):
                    raise
                self._strictly = False
                self._progress.message(
                    f"scores will differ in last bits from run to run: {str(error).partition(chr(10))[0]}"
                )
        return self._differentiate_once(watched, index, batch, hidden, gradient)

    def _differentiate_once(
        self, watched: _Watched, index: int, batch: Batch, hidden: Tensor, gradient: Tensor
    ) -> tuple[Visit, Tensor, tuple[Tensor | None, ...]]:
        visit = self._carried.visit(batch, index)
        watched.forget()
        with torch.enable_grad():
            output = forward_pass.call_layer(watched.module, index, visit.batch, hidden)
            outputs, (passed, wanted) = watched.outputs(), visit.outputs()
            with deterministic(self._device, strictly=self._strictly):
                found = torch.autograd.grad(
                    [output, *passed],
                    [hidden, *visit.leaves, *outputs],
                    [gradient.to(output.dtype), *wanted],
                    allow_unused=True,
                )
        return visit, output, found

    def _chunks(self, variants: LayerVariants) -> list[tuple[str, ...]]:
        """The formats in parts whose variants fit in memory together."""
        size = sum(parameter.nbytes for parameter in variants.exact.parameters())
        fits = max(1, min(distributed.gather(free_bytes(self._device))) // VARIANTS_SHARE // max(1, size))
        formats = self._formats
        return [tuple(formats[start : start + fits]) for start in range(0, len(formats), fits)]


class _Watched:
    """A copy of a layer whose groups show their outputs, and what rounding makes of these."""

    def __init__(self, subject: Subject, variants: LayerVariants) -> None:
        self._subject, self._variants = subject, variants
        memo: dict[int, Any] = {id(parameter): parameter for parameter in variants.exact.parameters()}
        self.module = copy.deepcopy(variants.exact, memo)
        self._groups = [subject.groups[name] for name in subject.by_layer.get(variants.index, ())]
        self._modules = {group.name: self._modules_of(group) for group in self._groups}
        self._rounded: dict[tuple[str, str], list[nn.Module]] = {}
        self._spread: dict[str, tuple[str, ...]] = {}
        self._calls: dict[str, list[tuple[tuple[Any, ...], Tensor]]] = {}
        for group in self._groups:
            for module in self._modules[group.name]:
                self.module.get_submodule(module).register_forward_hook(partial(self._record, f"{group.name}/{module}"))

    def _modules_of(self, group: Group) -> tuple[str, ...]:
        if group.role == EXPERTS:
            return (self._variants.experts_module,)
        return tuple(self._variants.module_of(name) for name in group.weights)

    def prepare(self, formats: Sequence[str]) -> None:
        """Make the variants of all groups in these formats."""
        wanted = {group.name: scored_formats(self._subject.layout, group, formats) for group in self._groups}
        alone = [self._variants.keys({name: fmt}) for name, some in wanted.items() for fmt in some]
        self._variants.make(key for keys in alone for key in keys.values())
        for group in self._groups:
            if group.role not in OWN_TOKEN:
                self._spread[group.name] = wanted[group.name]
                continue
            for fmt in wanted[group.name]:
                layer = self._variants.layer({group.name: fmt})
                modules = [layer.get_submodule(module) for module in self._modules[group.name]]
                self._rounded[group.name, fmt] = modules

    def _record(self, key: str, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """A forward hook: keep inputs and outputs."""
        if output.requires_grad:
            inputs = tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)
            self._calls.setdefault(key, []).append((inputs, output))

    def spread(self) -> dict[tuple[str, str], nn.Module]:
        """Of the groups whose outputs reach other tokens in this layer: the layer with each in its formats."""
        return {
            (group.name, fmt): self._variants.layer({group.name: fmt})
            for group in self._groups
            for fmt in self._spread.get(group.name, ())
        }

    def forget(self) -> None:
        """Be without the outputs of the last run."""
        self._calls.clear()

    def outputs(self) -> list[Tensor]:
        """The outputs of all groups in the last run, whose gradients are wanted."""
        return [output for calls in self._calls.values() for _, output in calls]

    @torch.no_grad()
    def add(
        self,
        batch: Batch,
        gradients: Sequence[Tensor | None],
        keep: Callable[[tuple[str, str], Batch, Tensor], None],
    ) -> None:
        """Give `keep` the products g . dY [B, T] of each group in each format, of outputs with these gradients."""
        of_call = iter(gradients)
        by_module = {key: [(*call, next(of_call)) for call in calls] for key, calls in self._calls.items()}
        self.forget()
        for (name, fmt), modules in self._rounded.items():
            total: Tensor | None = None
            for place, module in enumerate(self._modules[name]):
                for args, exact, gradient in by_module.get(f"{name}/{module}", ()):
                    if gradient is None:
                        continue
                    change = modules[place](*args).float().sub_(exact)
                    product = torch.linalg.vecdot(change, gradient.float()).view(batch.tokens.shape)
                    total = product if total is None else total + product
            if total is not None:
                keep((name, fmt), batch, total)


_RowSums = tuple[list[float], list[float]]  # of g . dY, and of costs, of each sample


def _of_all(sums: Mapping[tuple[str, str], _RowSums]) -> dict[tuple[str, str], _RowSums]:
    """The sums of all processes, of which each has its own samples; 0 stands for those of others."""
    found: dict[tuple[str, str], _RowSums] = {}
    for key, parts in distributed.in_order(list(sums.items())):
        known = found.get(key)
        found[key] = parts if known is None else (_both(known[0], parts[0]), _both(known[1], parts[1]))
    return found


def _both(first: Sequence[float], second: Sequence[float]) -> list[float]:
    return [one + other for one, other in zip(first, second, strict=True)]


def _add(
    sums: dict[tuple[str, str], _RowSums],
    rows: Sequence[ScoredRow],
    key: tuple[str, str],
    batch: Batch,
    products: Tensor,
) -> None:
    """Add the products g . dY [B, T] of a batch to the sums of a group in a format."""
    most = torch.tensor([[1 + rows[row].count / TOKENS_PER_NAT] for row in batch.rows], device=products.device)
    costs = -most * torch.expm1(-products.square() / (2 * most))
    found = torch.stack([part.sum(-1, dtype=torch.float64) for part in (products, costs)]).cpu().tolist()
    parts = sums.setdefault(key, ([0.0] * len(rows), [0.0] * len(rows)))
    for part, values in zip(parts, found, strict=True):
        for row, value in zip(batch.rows, values, strict=True):
            part[row] += value


def _sums(finished: FinishedUnits, names: Mapping[str, str]) -> dict[tuple[str, str], Sums]:
    """What was found of each group in each format, which `names` calls by what its weights were rounded to."""
    found = {}
    for entry in finished.entries:
        for group, way, signed, costs in entry.get("sums", ()):
            found[group, names.get(way, way)] = Sums(tuple(signed), tuple(costs))
    return found
