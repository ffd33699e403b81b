"""What scoring a model costs in time, memory and disk, before it begins: from shapes, and from one layer that is timed.

Times are those of a layer in the middle of the model on one batch of real samples: forwards, backwards, the rounding of
its weights to each format, and forwards with rounded inputs; and of the output head. Sizes come from shapes. Of several
processes each runs its part of the batches and rounds its part of the weights; all read every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from snugfit import distributed, machine
from snugfit.evaluation.evaluated_model import embedding_weights, open_head, open_model, outer_weights
from snugfit.evaluation.times import backward, forward
from snugfit.machine import pick_device
from snugfit.model import forward_pass
from snugfit.model.experts import ExpertNames
from snugfit.model.forward_pass import Batch
from snugfit.model.layout import ModelLayout
from snugfit.model.skeleton import Skeleton
from snugfit.planning.drawn import loss_gradient
from snugfit.planning.gradients import LOGITS, OWN_TOKEN
from snugfit.planning.groups import EXPERTS, Group, find_groups
from snugfit.planning.measured_plans import disk_budget, divide_plans, most_files
from snugfit.planning.samples import Samples, ScoredRow
from snugfit.planning.sensitivity import ScoreSettings, plans_to_measure, rounded_formats
from snugfit.planning.shared_cost import crowding, largest_share, seconds_of_states
from snugfit.planning.shared_pass import LOGITS as COMPARED_LOGITS
from snugfit.planning.shared_pass import ORIGINAL, Assigned, branches_of, compare
from snugfit.planning.variants import LayerVariants, Subject, scored_formats
from snugfit.quantization.estimate import CUDA_HOST_BYTES
from snugfit.quantization.options import TOKENS_PER_BATCH
from snugfit.records.scores import KEEP, KV_CACHE, Cost
from snugfit.records.squares import encode_squares
from snugfit.records.statistics import ExpertStatistics, InputStatistics, LayerStatistics
from snugfit.records.statistics_file import Statistics
from snugfit.storage.transfer import buffer_bytes

OVERHEAD_BYTES = 1 << 30  # libraries, and what they hold on a GPU
INSIDE = 24  # hidden states' worth of values that a layer keeps of a token for its backward pass, about
TIMED_TOKENS = 4096
TIMED_RUNS, TIMED_SECONDS, TIMED_PLANS = 5, 1.0, 4


@dataclass(frozen=True, kw_only=True)
class ScoringEstimate:
    """What scoring will take: `tokens` in all rows, passes of all of them (`forwards`, a backward pass counts as one).

    `memory_bytes` are of main memory, `gpu_bytes` of a GPU's (0 without), of each process; `disk_bytes` of the work
    folder's disk. `seconds` are None if nothing was timed; a proof takes its own, and `first_seconds` is what a process
    takes more when it does things for the first time.
    """

    tokens: int
    forwards: float
    memory_bytes: int
    gpu_bytes: int
    disk_bytes: int
    seconds: float | None
    proof_disk_bytes: int = 0
    proof_passes: int = 0
    proof_seconds: float | None = None
    first_seconds: float | None = None


def estimate_scoring(
    layout: ModelLayout,
    samples: Samples,
    settings: ScoreSettings,
    *,
    device: str | None = None,
    tokens_per_batch: int | None = None,
    timed: bool = True,
    proof: tuple[int, int] = (0, 0),
    folder: Path | None = None,
) -> ScoringEstimate:
    """Estimate `score_samples`; with `timed` a layer is read and run, which takes about as long as one of scoring's.

    `proof` are plans that are measured on so many tokens afterwards. What is free on the disk of `folder`, by default
    the current one, decides in how many passes plans are measured.
    """
    where = pick_device(device)
    per_batch = tokens_per_batch or TOKENS_PER_BATCH[where.type]
    groups = find_groups(layout)
    subject = _subject(layout, groups, settings)
    skeleton = subject.model.skeleton
    budget = disk_budget(folder or Path())
    plans = _plans(subject, settings)
    spread, own = _variant_forwards(layout, groups, settings, skeleton)
    held = _held_bytes(layout, settings, skeleton, per_batch)
    width, layers = skeleton.hidden_size * skeleton.dtype.itemsize, len(skeleton.ran)
    named = [[g.name for g in groups if g.layer == index] for index in skeleton.ran]
    work = _work_of(plans, named, budget // max(1, samples.measured_total * width), own=skeleton.carries_state)
    mixes = [Assigned(name=f"{number}", choice=dict.fromkeys(named[0], f"{number}")) for number in range(proof[0])]
    proven = _work_of(mixes, named, budget // max(1, proof[1] * width), own=True)
    disk = (layers + 1) * samples.total * width + 2 * samples.total * skeleton.hidden_size * 4
    on_gpu = where.type == "cuda"
    seconds, proof_seconds, first_seconds = None, None, None
    if timed:
        rates = _Rates(subject, samples, settings, where, per_batch, folder or Path())
        first_seconds = rates.first
        seconds = rates.seconds(layers, samples, work, spread=spread, own=own)
        proof_seconds = rates.of_plans(layers, proof[1], proven) if mixes else 0.0
    return ScoringEstimate(
        tokens=samples.total,
        forwards=3 + spread + own + work.forwards * samples.measured_total / samples.total,
        memory_bytes=OVERHEAD_BYTES + (CUDA_HOST_BYTES + buffer_bytes(where) if on_gpu else held),
        gpu_bytes=OVERHEAD_BYTES + held if on_gpu else 0,
        disk_bytes=max(disk, work.files * samples.measured_total * width),
        seconds=seconds,
        proof_disk_bytes=proven.files * proof[1] * width if mixes else 0,
        proof_passes=proven.passes if mixes else 0,
        proof_seconds=proof_seconds,
        first_seconds=first_seconds,
    )


@dataclass(frozen=True)
class _PlanWork:
    """What measuring plans takes: passes over the layers, forward passes of all tokens, files of states at once."""

    plans: int
    passes: int
    forwards: float
    files: int


def _work_of(plans: Sequence[Assigned], layers: Sequence[Sequence[str]], held: int, *, own: bool) -> _PlanWork:
    """Measuring plans of a model with these groups in its layers, beside the original, in `held` files at most."""
    passes = divide_plans(plans, layers, held, own=own) if plans else []
    steps = [branches_of(part, layers, own=own) for part in passes]
    ran = sum(len({branch.number for branch in step.values()}) for part in steps for step in part[1:])
    files = max((most_files(part) for part in steps), default=0)
    return _PlanWork(len(plans), len(passes), ran / max(1, len(layers)), files)


def _subject(layout: ModelLayout, groups: tuple[Group, ...], settings: ScoreSettings) -> Subject:
    """The model under statistics of the layer that is timed, in which every input is 1."""
    model = open_model(layout.checkpoint.path, activations="none")
    return Subject(
        model=model,
        layout=layout,
        groups={group.name: group for group in groups},
        statistics=_ones(layout, model.skeleton, groups, _timed_layer(model.skeleton)),
        rounding=settings.rounding,
        target=settings.target,
    )


def _timed_layer(skeleton: Skeleton) -> int:
    """A layer in the middle; where later layers use what earlier ones pass on, only the first runs alone."""
    return skeleton.ran[0 if skeleton.carries_state else len(skeleton.ran) // 2]


def _plans(subject: Subject, settings: ScoreSettings) -> list[Assigned]:
    """The plans that scoring will measure; an FP8 cache among them wherever one is asked for."""
    formats, groups = (*settings.formats, KEEP), subject.groups.values()
    scored = {g.name: scored_formats(subject.layout, g, formats) for g in groups if g.layer is not None}
    nothing = Cost((), ())
    found = plans_to_measure(subject, {name: dict.fromkeys(some, nothing) for name, some in scored.items()}, settings)
    return [*found, Assigned(name=KV_CACHE, choice={KV_CACHE: "fp8"})] if settings.kv_cache else found


def _variant_forwards(
    layout: ModelLayout, groups: tuple[Group, ...], settings: ScoreSettings, skeleton: Skeleton
) -> tuple[float, float]:
    """Forward passes that variants of groups cost: of whole layers, and of their groups alone."""
    elements = sum(group.elements for group in groups if group.layer is not None)
    spread, own = float(settings.kv_cache), 0.0
    for group in groups:
        if group.layer is None:
            continue
        count = len(scored_formats(layout, group, settings.formats))
        if group.role in OWN_TOKEN:
            own += count * group.elements / max(1, elements)
        else:
            spread += count / len(skeleton.ran)
    return spread, own


def _held_bytes(layout: ModelLayout, settings: ScoreSettings, skeleton: Skeleton, per_batch: int) -> int:
    """Weights of the largest layer, exact and in all formats, and the values of a batch inside of it; or the head."""
    sizes: dict[int | None, int] = {}
    for name, parsed in layout.names.items():
        if parsed.layer is None or parsed.layer < layout.num_layers:
            info = layout.weights.tensors.get(name)
            sizes[parsed.layer] = sizes.get(parsed.layer, 0) + (0 if info is None else info.elements * 2)
    layer = max((size for number, size in sizes.items() if number is not None), default=0)
    copies = 2 + len(settings.formats)
    inside = INSIDE * per_batch * skeleton.hidden_size * 4
    head = sizes.get(None, 0) + 4 * LOGITS["cuda"] * 4
    return max(copies * layer + inside, head)


class _Rates:
    """Seconds of one layer, its roundings and the head, measured on one batch."""

    def __init__(
        self,
        subject: Subject,
        samples: Samples,
        settings: ScoreSettings,
        device: torch.device,
        per_batch: int,
        folder: Path,
    ) -> None:
        index = _timed_layer(subject.model.skeleton)
        self._device, self.first = device, 0.0
        batch = self._batch(_rows(samples, min(per_batch, TIMED_TOKENS)), subject, per_batch)
        self._tokens, self._per_batch = sum(batch.lengths), per_batch
        self._processes = distributed.asked_for()
        variants = LayerVariants(subject, index, device)
        hidden = batch.hidden
        self._states = seconds_of_states(batch, device, folder)
        self._forward = self._time(partial(forward, variants.exact, index, batch, hidden), often=True)
        self._backward = self._time(partial(backward, variants.exact, index, batch, hidden), often=True)
        self._load = self._time(lambda: LayerVariants(subject, index, device), often=True)
        self._time_variants(subject, variants, batch, settings)
        self._loss = self._time_loss(subject, hidden)  # first, as in a run: it takes the most memory
        self._head = self._time_head(subject, hidden)

    def _time_variants(self, subject: Subject, variants: LayerVariants, batch: Batch, settings: ScoreSettings) -> None:
        """Roundings of a layer to each format, and forwards with rounded weights and inputs."""
        names = subject.by_layer.get(variants.index, ())
        choices = [
            {name: fmt for name in names if scored_formats(subject.layout, subject.groups[name], [fmt])}
            for fmt in rounded_formats(subject.layout, settings).values()
        ]
        self._rounding, self._rounded, self._copy = 0.0, 0.0, 0.0
        for choice in choices:
            first = self._time(partial(variants.layer, choice))  # kernels are compiled, or read
            variants.forget()
            second = self._time(partial(variants.layer, choice))
            self.first += max(0.0, first - second)
            self._rounding += second
            self._copy = max(self._copy, self._time(partial(variants.layer, choice)))
            rounded = partial(forward, variants.layer(choice), variants.index, batch, batch.hidden)
            self._rounded += self._time(rounded, often=True) / len(choices)

    def _batch(self, rows: list[tuple[int, ...]], subject: Subject, per_batch: int) -> Batch:
        skeleton = subject.model.skeleton
        batches = forward_pass.make_batches(rows, per_batch, self._device, pads=skeleton.is_causal)
        forward_pass.embed(skeleton, embedding_weights(subject.model), batches[:1], self._device)
        return batches[0]

    def _time(self, work: Callable[[], object], *, often: bool = False) -> float:
        """Seconds of `work`; with `often` the least of runs behind the first, up to TIMED_RUNS within TIMED_SECONDS."""
        found: list[float] = []
        while not found or (often and (len(found) < 2 or (len(found) < TIMED_RUNS and sum(found) < TIMED_SECONDS))):
            found.append(machine.timed(work, self._device).wall)
        least = min(found[1:] or found)
        self.first += max(0.0, found[0] - least)
        return least

    def _time_loss(self, subject: Subject, hidden: Tensor) -> float:
        """Seconds that the gradient of one token's loss takes."""
        outer = outer_weights(subject.model, self._device)
        head = open_head(subject.model, self._device, outer, gradients=True)
        part = hidden[0, : max(1, LOGITS[self._device.type] // subject.model.vocabulary)]
        return self._time(lambda: loss_gradient(head, part, 0, 0, 0), often=True) / len(part)

    def _time_head(self, subject: Subject, hidden: Tensor) -> float:
        """Seconds that the predictions of one token and their KL take."""
        head = open_head(subject.model, self._device, outer_weights(subject.model, self._device))
        part = hidden[0, : max(1, COMPARED_LOGITS[self._device.type] // subject.model.vocabulary)]
        states = dict.fromkeys((ORIGINAL, *map(str, range(TIMED_PLANS))), part)
        compared = states, dict.fromkeys(states, head), subject.model.vocabulary, self._device

        @torch.no_grad()
        def work() -> None:
            for _ in compare(*compared):
                pass

        return self._time(work, often=True) / len(part) / (TIMED_PLANS + 1)

    def seconds(self, layers: int, samples: Samples, work: _PlanWork, *, spread: float, own: float) -> float:
        """Of all of scoring."""
        tokens, rows = samples.total, [samples.rows[place] for place in samples.measured]
        share, of_measured = self._share(samples.rows), self._share(rows)
        mine, scored = tokens * share, sum(samples.tokens) * share
        compared = sum(row.count for row in rows) * of_measured
        # for calibration and forwards; backwards, with variants, states are read, and gradients in fp32 both ways
        run = 2 * self._run(mine, tokens, self._forward, 1)
        run += self._run(mine, tokens, self._backward + (spread + own) * self._rounded, 3)
        made = 3 * self._load + self._rounding / self._processes
        alone = layers * (run + made) + scored * self._loss
        measured = samples.measured_total
        return crowding(self._device) * (
            alone + self._measuring(layers, measured * of_measured, measured, work, compared)
        )

    def _share(self, rows: Sequence[ScoredRow]) -> float:
        """The part of some rows' batches that the process with the most of them has."""
        batches = forward_pass.make_batches([row.ids for row in rows], self._per_batch, torch.device("cpu"))
        return largest_share(len(batches), self._processes)

    def of_plans(self, layers: int, tokens: int, work: _PlanWork) -> float:
        """Of measuring plans on so many tokens, beside the original."""
        mine = tokens * largest_share(-(-tokens // self._per_batch), self._processes)
        return crowding(self._device) * self._measuring(layers, mine, tokens, work, mine)

    def _measuring(self, layers: int, mine: float, tokens: int, work: _PlanWork, compared: float) -> float:
        made = work.passes * (self._load + self._rounding / self._processes) + work.plans * self._copy
        heads = (work.plans + work.passes) * compared * self._head
        return layers * (work.forwards * self._run(mine, tokens, self._rounded, 1) + made) + heads

    def _run(self, mine: float, tokens: int, seconds: float, states: int) -> float:
        """Of a layer that takes `seconds` a batch, of which `mine` of all tokens are this process's.

        Their states are on their way meanwhile, `states` times; all processes' go to one disk.
        """
        return max(mine * seconds, tokens * states * self._states) / self._tokens


def _rows(samples: Samples, tokens: int) -> list[tuple[int, ...]]:
    """Rows of the longest length, as many as hold so many tokens, at least one."""
    longest = [row.ids for row in samples.rows if len(row.ids) == samples.edges[-1]]
    return longest[: max(1, tokens // samples.edges[-1])]


def _ones(layout: ModelLayout, skeleton: Skeleton, groups: tuple[Group, ...], index: int) -> Statistics:
    """Statistics in which every input is 1: what calibration finds does not change how long scoring takes."""
    inputs: dict[str, InputStatistics] = {}
    experts: dict[str, ExpertStatistics] = {}
    for group in groups:
        if group.layer != index:
            continue
        width = layout.weights.tensors[group.weights[0]].shape[-1]
        if group.role != EXPERTS:
            inputs[group.weights[0].removesuffix(".weight")] = _inputs(width)
    mixture = skeleton.experts.get(index)
    if mixture is not None:
        name = f"{layout.decoder}.{index}.{mixture.file_module}"
        experts[name] = _experts(layout, f"{layout.decoder}.{index}.", mixture)
    layer = LayerStatistics(inputs, experts)
    return Statistics(
        snugfit="",
        model="",
        header_digest="",
        fingerprint="",
        datasets=(),
        all_experts=False,
        max_forced_tokens=0,
        recipe=None,
        recipe_digest=None,
        layers={index: layer},
    )


def _inputs(width: int) -> InputStatistics:
    return InputStatistics(1, 1.0, {}, encode_squares(torch.ones(width)))


def _experts(layout: ModelLayout, prefix: str, mixture: ExpertNames) -> ExpertStatistics:
    count = mixture.count
    widths = {
        role: layout.weights.tensors[prefix + name].shape[-1]
        for (expert, role, parameter), name in mixture.names.items()
        if expert == 0 and parameter == "weight"
    }
    one = (1.0,) * count
    return ExpertStatistics(
        routed=(1,) * count,
        forced=(0,) * count,
        gate_up_routed=one,
        gate_up_forced=one,
        down_routed=one,
        down_forced=one,
        gate_up_squares=encode_squares(torch.ones(count, widths["up"])),
        down_squares=encode_squares(torch.ones(count, widths["down"])),
    )
