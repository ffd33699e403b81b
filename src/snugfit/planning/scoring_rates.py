"""How long scoring and a proof take on this machine: their own steps on one layer and on real samples, timed.

The steps of scoring are those of the run itself (planning/gradients.py), with files of hidden states in memory. Of
plans that are compared some run, and the weights of all are rounded. Samples of each length have a batch that stands
for theirs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from snugfit import distributed, machine
from snugfit.evaluation.evaluated_model import (
    bounded_attention,
    embedding_weights,
    open_head,
    open_model,
    outer_weights,
)
from snugfit.evaluation.times import forward
from snugfit.model import forward_pass
from snugfit.model.forward_pass import Batch
from snugfit.model.hidden_states import StateFile
from snugfit.planning.calibration import prepare_calibration
from snugfit.planning.drawn import loss_gradient
from snugfit.planning.gradients import LOGITS
from snugfit.planning.samples import Samples, ScoredRow
from snugfit.planning.sensitivity import ScoreSettings, open_gradients
from snugfit.planning.shared_cost import crowding, largest_share, seconds_of_states
from snugfit.planning.shared_pass import LOGITS as COMPARED_LOGITS
from snugfit.planning.shared_pass import ORIGINAL, compare
from snugfit.planning.variants import LayerVariants, Subject
from snugfit.quantization.prepared_run import PreparedRun
from snugfit.quantization.resume import FinishedUnits
from snugfit.quantization.run_time import estimate_run_time
from snugfit.storage.files import nearest_folder
from snugfit.storage.tensor_reader import TensorReader

TIMED_TOKENS = 4096  # of a batch on a CPU, at least one sample
TIMED_LENGTHS = 3  # of samples that have a batch each
TIMED_RUNS, TIMED_SECONDS, TIMED_PLANS = 3, 1.0, 4
_PARTS = 1 << 10  # numbers of a unit's entry that is written to see how long it takes

Choice = tuple[tuple[str, str], ...]  # groups of a layer and their formats


@dataclass(frozen=True, kw_only=True)
class PlanWork:
    """What measuring plans takes: passes over the layers, forward passes of all tokens, files of states at once.

    `runs` are those of the layer that is timed, in each pass: the formats of its groups, and whether an FP8 cache is
    used.
    """

    plans: int
    passes: int
    forwards: float
    files: int
    runs: tuple[tuple[tuple[Choice, bool], ...], ...]


@dataclass(frozen=True)
class _Share:
    """A batch that stands for the batches of all samples about as long, which have so many `tokens` with their pads."""

    batch: Batch
    tokens: int

    @property
    def times(self) -> float:
        """For how many such batches it stands."""
        return self.tokens / self.batch.tokens.numel()


class Rates:
    """Times the steps of one layer; `index` is its number among the model's, of which all take as long."""

    def __init__(
        self, subject: Subject, index: int, settings: ScoreSettings, device: torch.device, per_batch: int, folder: Path
    ) -> None:
        """States will be in `folder`. `first` grows by what steps take more when they are done for the first time."""
        self._subject, self._index, self._settings = subject, index, settings
        self._device, self._per_batch, self._folder = device, per_batch, folder
        self._layers = len(subject.model.skeleton.ran)
        self._processes = distributed.asked_for()
        self.first = 0.0
        self._opened = self._once(lambda: open_model(subject.layout.checkpoint.path, activations="none"))
        self._commit = _seconds_of_commit(folder)
        self._loaded = self._once(self._load)
        self._outer = self._once(lambda: outer_weights(subject.model, device))

    def of_calibration(self, samples: Samples) -> float:
        """Seconds of calibration, by the loop of `quantize` itself, which measures and writes nothing."""
        layout, per_batch = self._subject.layout, self._per_batch
        found: list[PreparedRun] = []

        def prepare() -> None:
            device = self._device.type if self._processes > 1 else str(self._device)  # torchrun gives each its GPU
            found.append(prepare_calibration(layout, samples.dataset, device=device, tokens_per_batch=per_batch))

        opened = self._once(prepare, again=False)
        run = estimate_run_time(found[0])
        loop = 0.0 if run is None else run.seconds.wall
        return opened + loop + self._layers * self._commit

    def of_scoring(self, samples: Samples, work: PlanWork) -> float:
        """Seconds of all of scoring, with calibration."""
        shares = self._shares([row.ids for row in samples.rows])
        states = self._states(shares)
        measured = [samples.rows[place] for place in samples.measured]
        mine, scored = self._part(samples.rows), sum(samples.tokens)
        embedding = self._embed(shares)
        forwards = self._forwards(shares)
        fixed, backwards = self._backwards(samples, shares)
        moved = samples.total * states  # once forwards; backwards states are read, and gradients in fp32 both ways
        layer = self._loaded + max(mine * forwards, moved) + fixed + max(mine * backwards, 3 * moved)
        gradients = embedding + self._layers * (layer + 2 * self._commit)
        gradients += self._outer + mine * scored * self._loss(shares)
        compared = self._part(measured) * sum(row.count for row in measured)
        of_plans = self._of_plans([row.ids for row in measured], work, self._subject, compared)
        alone = self.of_calibration(samples) + self._opened + gradients
        return crowding(self._device) * (alone + of_plans)

    def of_proof(self, lengths: Sequence[int], ids: tuple[int, ...], work: PlanWork, *, folds: bool) -> float:
        """Seconds of measuring mixes on rows of these lengths, for which any token ids do."""
        rows = [tuple((ids * (length // len(ids) + 1))[:length]) for length in lengths]
        batches = forward_pass.make_batches(rows, self._per_batch, torch.device("cpu"))
        compared = largest_share(len(batches), self._processes) * sum(lengths)
        subject = replace(self._subject, folds=folds)
        return crowding(self._device) * (self._opened + self._of_plans(rows, work, subject, compared))

    def _of_plans(self, rows: Sequence[Sequence[int]], work: PlanWork, subject: Subject, compared: float) -> float:
        """Seconds of measuring plans on some rows, of which this process compares so many tokens."""
        if not work.plans:
            return 0.0
        shares = self._shares(rows)
        embedding, states = self._embed(shares), self._states(shares)
        part = largest_share(forward_pass.number_of_batches([*map(len, rows)], self._per_batch), self._processes)
        made, copied, runs = 0.0, 0.0, 0.0
        for one in work.runs:
            seconds = self._of_runs(subject, one, shares)
            made, copied, runs = made + seconds[0], max(copied, seconds[1]), max(runs, seconds[2])
        moved = sum(map(len, rows)) * states
        layers = work.passes * (self._loaded + self._commit) + made / self._processes
        layers += work.forwards * (copied + max(part * runs, moved))
        heads = work.passes * self._outer + (work.plans + work.passes) * compared * self._head(shares)
        return work.passes * embedding + self._layers * layers + heads

    def _of_runs(
        self, subject: Subject, runs: Sequence[tuple[Choice, bool]], shares: Sequence[_Share]
    ) -> tuple[float, float, float]:
        """Seconds in which the variants of all runs are made, one run's layer is put together, and all samples pass."""
        variants = LayerVariants(subject, self._index, self._device)
        wanted = dict.fromkeys(key for choice, _ in runs for key in variants.keys(dict(choice)).values())
        if wanted:
            self._once(
                lambda: LayerVariants(subject, self._index, self._device).make([next(iter(wanted))]), again=False
            )
        made = self._once(lambda: variants.make(wanted), again=False)
        some = [runs[(2 * n + 1) * len(runs) // (2 * TIMED_PLANS)] for n in range(TIMED_PLANS)]
        some = list(dict.fromkeys(runs if len(runs) <= TIMED_PLANS else some))
        copied, passed = 0.0, 0.0
        for choice, cached in some:
            copied += self._once(partial(variants.layer, dict(choice)), again=False) / len(some)
            layer = variants.layer(dict(choice))
            cache = variants.kv_cache() if cached else None
            for share in shares:
                work = partial(forward_pass.call_layer, layer, self._index, share.batch, share.batch.hidden, cache)
                passed += share.times * self._once(torch.no_grad()(work)) / len(some)
        return made, copied, passed

    def _load(self) -> None:
        with TensorReader(self._subject.model.checkpoint, self._device) as read:
            LayerVariants(self._subject, self._index, self._device, read)

    def _once(self, work: Callable[[], object], *, again: bool = True) -> float:
        """Seconds of `work`; with `again` the least of runs behind the first, as long as they are short."""
        found = [machine.timed(work, self._device).wall]
        while again and len(found) <= TIMED_RUNS and (len(found) < 2 or sum(found) < TIMED_SECONDS):
            found.append(machine.timed(work, self._device).wall)
        least = min(found[1:] or found)
        self.first += max(0.0, found[0] - least)
        return least

    def _shares(self, rows: Sequence[Sequence[int]]) -> list[_Share]:
        """Batches of the rows that stand for all, the longest first, with what layers are called with."""
        skeleton = self._subject.model.skeleton
        batches = forward_pass.make_batches(rows, self._per_batch, torch.device("cpu"), pads=skeleton.is_causal)
        widths = list(dict.fromkeys(batch.tokens.shape[1] for batch in batches))
        count = min(TIMED_LENGTHS, len(widths))
        chosen = [widths[(2 * n + 1) * len(widths) // (2 * count)] for n in range(count)]
        found = []
        for width in chosen:
            first = next(batch for batch in batches if batch.tokens.shape[1] == width)
            of_it = first.rows[: max(1, TIMED_TOKENS // width)] if self._device.type == "cpu" else first.rows
            mine = [one for one in batches if _nearest(chosen, one.tokens.shape[1]) == width]
            (batch,) = forward_pass.make_batches(
                [rows[row] for row in of_it], self._per_batch, self._device, pads=skeleton.is_causal
            )
            batch.rows = of_it
            found.append(_Share(batch, sum(one.tokens.numel() for one in mine)))
        self._embedded([share.batch for share in found])
        return found

    def _embedded(self, batches: Sequence[Batch]) -> None:
        model = self._subject.model
        forward_pass.embed(model.skeleton, embedding_weights(model), batches, self._device)

    def _embed(self, shares: Sequence[_Share]) -> float:
        """Seconds in which all samples get their first states."""
        return self._once(lambda: self._embedded([share.batch for share in shares]), again=False)

    def _states(self, shares: Sequence[_Share]) -> float:
        """Seconds that the states of one token take to be written or read."""
        batch = max((share.batch for share in shares), key=lambda one: one.tokens.numel())
        return seconds_of_states(batch, self._device, self._folder) / batch.tokens.numel()

    def _forwards(self, shares: Sequence[_Share]) -> float:
        """Seconds in which all samples pass the layer as it is."""
        layer = LayerVariants(self._subject, self._index, self._device).exact
        taken = (
            share.times * self._once(partial(forward, layer, self._index, share.batch, share.batch.hidden))
            for share in shares
        )
        return sum(taken)

    def _backwards(self, samples: Samples, shares: Sequence[_Share]) -> tuple[float, float]:
        """Seconds of the pass backwards through the layer: what it takes once, and of all samples."""
        rows = [samples.rows[row] for share in shares for row in share.batch.rows]
        warm = rows if self._device.type == "cuda" else [min(rows, key=lambda row: len(row.ids))]
        first = self._rehearse(samples, warm)
        found = self._rehearse(samples, rows)
        if warm is rows:
            self.first += max(0.0, first.seconds - found.seconds)
        else:
            self.first += max(0.0, first.fixed - found.fixed)
        times = {share.batch.tokens.shape[1]: share.times for share in shares}
        return found.fixed, sum(times[width] * taken for width, taken in found.batches.items())

    def _rehearse(self, samples: Samples, rows: Sequence[ScoredRow]) -> _Rehearsed:
        """The pass backwards on some rows, through one layer."""
        device, model = self._device, self._subject.model
        states, before, after = (_Held(device) for _ in range(3))
        one = open_gradients(
            self._subject,
            replace(samples, rows=tuple(rows)),
            self._settings,
            device,
            self._folder,
            tokens_per_batch=self._per_batch,
        )
        with TensorReader(model.checkpoint, device) as read, bounded_attention(model.arithmetic, device):
            one.embed(read, states)
            generator = torch.Generator().manual_seed(0)
            before.held = {
                rows: torch.randn(hidden.shape, generator=generator).to(device) for rows, hidden in states.held.items()
            }
            started = machine.now(device).wall
            one.backward(model.skeleton.ran.index(self._index), states, (before, after), read)
            ended = machine.now(device).wall
        ends = [*(moment for _, moment in states.reads[1:]), ended]
        batches: dict[int, float] = {}  # a layer whose formats do not fit in memory together reads each batch again
        for (width, moment), end in zip(states.reads, ends, strict=True):
            batches[width] = batches.get(width, 0.0) + end - moment
        return _Rehearsed(states.reads[0][1] - started, batches)

    def _last_states(self, shares: Sequence[_Share], most: int) -> Tensor:
        """Random states of tokens of one sample, of which so many logits are made at once at most.

        What embeddings would predict, a token itself, is so sure that the others' probabilities are denormal numbers,
        with which a CPU takes longer.
        """
        skeleton, count = self._subject.model.skeleton, max(1, most // self._subject.model.vocabulary)
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(min(count, shares[0].batch.lengths[0]), skeleton.hidden_size, generator=generator)
        return states.to(self._device, skeleton.dtype)

    def _loss(self, shares: Sequence[_Share]) -> float:
        """Seconds that the gradient of one token's loss takes."""
        model = self._subject.model
        head = open_head(model, self._device, outer_weights(model, self._device), gradients=True)
        part = self._last_states(shares, LOGITS[self._device.type])
        return self._once(lambda: loss_gradient(head, part, 0, 0, 0)) / len(part)

    def _head(self, shares: Sequence[_Share]) -> float:
        """Seconds that the predictions of one token and their KL take."""
        model = self._subject.model
        head = open_head(model, self._device, outer_weights(model, self._device))
        part = self._last_states(shares, COMPARED_LOGITS[self._device.type])
        states = dict.fromkeys((ORIGINAL, *map(str, range(TIMED_PLANS))), part)
        compared = states, dict.fromkeys(states, head), model.vocabulary, self._device

        @torch.no_grad()
        def work() -> None:
            for _, _, kl in compare(*compared):
                kl.float().cpu()

        return self._once(work) / len(part) / (TIMED_PLANS + 1)

    def _part(self, rows: Sequence[ScoredRow]) -> float:
        """The part of some rows' batches that the process with the most of them has."""
        lengths = [len(row.ids) for row in rows]
        return largest_share(forward_pass.number_of_batches(lengths, self._per_batch), self._processes)


@dataclass(frozen=True)
class _Rehearsed:
    """Seconds of a layer: `fixed` are taken once, `batches` of each batch by the length of its samples."""

    fixed: float
    batches: Mapping[int, float]

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.fixed + sum(self.batches.values())


class _Held(StateFile):
    """States in memory in place of a file; says of which length a batch was that was read, and when."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.held: dict[tuple[int, ...], Tensor] = {}
        self.reads: list[tuple[int, float]] = []

    def write(self, batch: Batch, hidden: Tensor) -> None:
        """Keep a batch's states."""
        self.held[batch.rows] = hidden.detach()

    def read(self, batch: Batch) -> Tensor:
        """A copy of them."""
        self.reads.append((batch.tokens.shape[1], machine.now(self._device).wall))
        return self.held[batch.rows].clone()


def _nearest(numbers: Sequence[int], wanted: int) -> int:
    return min(numbers, key=lambda number: abs(number - wanted))


def _seconds_of_commit(folder: Path) -> float:
    """Seconds in which a finished unit is written down; 0 where that cannot be."""
    with suppress(OSError), tempfile.TemporaryDirectory(dir=nearest_folder(folder), prefix=".snugfit-") as place:
        units = FinishedUnits(Path(place), {})
        entry = {"sums": [1 / (number + 3) for number in range(_PARTS)]}
        return machine.timed(lambda: units.commit(entry), torch.device("cpu"), twice=True).wall
    return 0.0
