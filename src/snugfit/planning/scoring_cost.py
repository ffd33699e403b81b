"""What scoring a model costs in time, memory and disk, before it begins: from shapes, and from one layer that is timed.

Times are those of a layer in the middle of the model (planning/scoring_rates.py), sizes come from shapes. Of several
processes each runs its part of the batches and rounds its part of the weights; all read every layer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from snugfit import distributed
from snugfit.evaluation.evaluated_model import open_model
from snugfit.machine import deterministic, pick_device
from snugfit.model.experts import ExpertNames
from snugfit.model.layout import ModelLayout
from snugfit.model.skeleton import Skeleton
from snugfit.planning.gradients import LOGITS, OWN_TOKEN
from snugfit.planning.groups import EXPERTS, Group, find_groups
from snugfit.planning.measured_plans import disk_budget, divide_plans, most_files
from snugfit.planning.samples import Samples
from snugfit.planning.scoring_rates import PlanWork, Rates
from snugfit.planning.sensitivity import ScoreSettings, plans_to_measure, rounded_formats
from snugfit.planning.shared_pass import Assigned, branches_of
from snugfit.planning.variants import PLAIN, Subject, scored_formats
from snugfit.quantization.estimate import CUDA_HOST_BYTES
from snugfit.quantization.options import TOKENS_PER_BATCH
from snugfit.quantization.plan import measure_only
from snugfit.records.scores import KEEP, Cost
from snugfit.records.squares import encode_squares
from snugfit.records.statistics import ExpertStatistics, InputStatistics, LayerStatistics
from snugfit.records.statistics_file import Statistics
from snugfit.storage.transfer import buffer_bytes

OVERHEAD_BYTES = 1 << 30  # libraries, and what they hold on a GPU
INSIDE = 24  # hidden states' worth of values that a layer keeps of a token for its backward pass, about


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
    proof: tuple[int, Sequence[int]] = (0, ()),
    scored: bool = False,
    calibrated: bool = False,
    folder: Path | None = None,
) -> ScoringEstimate:
    """Estimate `score_samples`; with `timed` a layer is read and run, which takes about as long as one of scoring's.

    `proof` are plans that are measured afterwards, and the tokens of each row that they are measured on. Where
    a model is `scored` already, seconds are those of the calibration that the proof needs, none if it is `calibrated`,
    too. What is free on the disk of `folder`, by default the current one, decides in how many passes plans are
    measured.
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
    place, held_out = skeleton.ran.index(_timed_layer(skeleton)), sum(proof[1])
    room = budget // max(1, samples.measured_total * width)
    work = _work_of(plans, named, room, own=skeleton.carries_state, timed=place)
    mixes = _mixes(subject, settings, proof[0])
    proven = _work_of(mixes, named, budget // max(1, held_out * width), own=True, timed=place)
    disk = (layers + 1) * samples.total * width + 2 * samples.total * skeleton.hidden_size * 4
    on_gpu = where.type == "cuda"
    seconds, proof_seconds, first_seconds = None, 0.0 if timed and not mixes else None, None
    if timed:
        with distributed.alone(), deterministic(where):  # as the run
            rates = Rates(subject, skeleton.ran[place], settings, where, per_batch, folder or Path())
            if not scored:
                seconds = rates.of_scoring(samples, work)
            else:
                seconds = 0.0 if calibrated else rates.of_calibration(samples)
            if mixes:
                folds = settings.rounding != PLAIN
                proof_seconds = rates.of_proof(proof[1], samples.rows[0].ids, proven, folds=folds)
            first_seconds = rates.first
    return ScoringEstimate(
        tokens=samples.total,
        forwards=3 + spread + own + work.forwards * samples.measured_total / samples.total,
        memory_bytes=OVERHEAD_BYTES + (CUDA_HOST_BYTES + buffer_bytes(where) if on_gpu else held),
        gpu_bytes=OVERHEAD_BYTES + held if on_gpu else 0,
        disk_bytes=max(disk, work.files * samples.measured_total * width),
        seconds=seconds,
        proof_disk_bytes=proven.files * held_out * width if mixes else 0,
        proof_passes=proven.passes if mixes else 0,
        proof_seconds=proof_seconds,
        first_seconds=first_seconds,
    )


def _work_of(
    plans: Sequence[Assigned], layers: Sequence[Sequence[str]], held: int, *, own: bool, timed: int
) -> PlanWork:
    """Measuring plans of a model with these groups in its layers, beside the original, in `held` files at most.

    `timed` is the place of the layer that is timed among them.
    """
    passes = divide_plans(plans, layers, held, own=own) if plans else []
    steps = [branches_of(part, layers, own=own) for part in passes]
    ran = sum(len({branch.number for branch in step.values()}) for part in steps for step in part[1:])
    files = max((most_files(part) for part in steps), default=0)
    runs = (dict.fromkeys(branch for branch in part[timed + 1].values()) for part in steps)
    return PlanWork(
        plans=len(plans),
        passes=len(passes),
        forwards=ran / max(1, len(layers)),
        files=files,
        runs=tuple(tuple((one.choice, one.cached) for one in some) for some in runs),
    )


def _subject(layout: ModelLayout, groups: tuple[Group, ...], settings: ScoreSettings) -> Subject:
    """The model under statistics of the layer that is timed, in which every input is 1."""
    model = open_model(layout.checkpoint.path, activations="none")
    timed = _timed_layer(model.skeleton)
    cache = settings.kv_cache and timed in measure_only(layout).observed_caches  # as calibration has it
    return Subject(
        model=model,
        layout=layout,
        groups={group.name: group for group in groups},
        statistics=_ones(layout, model.skeleton, groups, timed, cache=cache),
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
    rounded = rounded_formats(subject.layout, settings)
    return [replace(plan, choice={name: rounded.get(fmt, fmt) for name, fmt in plan.choice.items()}) for plan in found]


def _mixes(subject: Subject, settings: ScoreSettings, count: int) -> list[Assigned]:
    """Plans of random formats, as they are rounded, that stand for those of the proof, which scores decide."""
    generator = random.Random(0)  # noqa: S311  # not for secrets
    can = {name: scored_formats(subject.layout, group, settings.formats) for name, group in subject.groups.items()}
    found = []
    for number in range(count):
        choice = {name: generator.choice(some) for name, some in can.items() if some}
        found.append(Assigned(name=f"{number}", choice=subject.as_written(choice)))
    return found


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


def _ones(layout: ModelLayout, skeleton: Skeleton, groups: tuple[Group, ...], index: int, *, cache: bool) -> Statistics:
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
    layer = LayerStatistics(inputs, experts, (1.0, 1.0) if cache else None)
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
