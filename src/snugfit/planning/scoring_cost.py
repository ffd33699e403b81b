"""What scoring a model costs in time, memory and disk, before it begins: from shapes, and from one layer that is timed.

Times are those of a layer in the middle of the model on one batch of real samples: forwards, backwards, the rounding of
its weights to each format, and forwards with rounded inputs; and of the output head. Sizes come from shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from snugfit.evaluation.evaluated_model import EvaluatedModel, embedding_weights, open_head, open_model, outer_weights
from snugfit.evaluation.times import backward_time, forward_time, prediction_time
from snugfit.machine import pick_device, timed
from snugfit.model import forward_pass
from snugfit.model.forward_pass import Batch
from snugfit.model.layout import ModelLayout
from snugfit.model.skeleton import Skeleton
from snugfit.planning.damage import class_of
from snugfit.planning.gradients import LOGITS, OWN_TOKEN
from snugfit.planning.groups import EXPERTS, HEAD, Group, find_groups
from snugfit.planning.samples import Samples
from snugfit.planning.sensitivity import MIXED_PLANS, ScoreSettings
from snugfit.planning.variants import LayerVariants, Subject, scored_formats
from snugfit.quantization.prepare import TOKENS_PER_BATCH
from snugfit.records.squares import encode_squares
from snugfit.records.statistics import ExpertStatistics, InputStatistics, LayerStatistics
from snugfit.records.statistics_file import Statistics

OVERHEAD_BYTES = 1 << 30  # libraries, and what they hold on a GPU
INSIDE = 24  # hidden states' worth of values that a layer keeps of a token for its backward pass, about
TIMED_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class ScoringEstimate:
    """What scoring will take: `tokens` in all rows, passes of all of them (`forwards`, a backward pass counts as one).

    `memory_bytes` are of main memory, `gpu_bytes` of a GPU's (0 without), `disk_bytes` of the work folder's disk.
    `seconds` are None if nothing was timed. A proof takes its own.
    """

    tokens: int
    forwards: float
    memory_bytes: int
    gpu_bytes: int
    disk_bytes: int
    seconds: float | None
    proof_disk_bytes: int = 0
    proof_seconds: float | None = None


def estimate_scoring(
    layout: ModelLayout,
    samples: Samples,
    settings: ScoreSettings,
    *,
    device: str | None = None,
    tokens_per_batch: int | None = None,
    timed: bool = True,
    proof: tuple[int, int] = (0, 0),
) -> ScoringEstimate:
    """Estimate `score_samples`; with `timed` a layer is read and run, which takes about as long as one of scoring's.

    `proof` are plans that are measured on so many tokens afterwards.
    """
    where = pick_device(device)
    per_batch = tokens_per_batch or TOKENS_PER_BATCH[where.type]
    groups = find_groups(layout)
    model = open_model(layout.checkpoint.path, activations="none")
    skeleton = model.skeleton
    plans = count_plans(layout, groups, settings)
    spread, own = _variant_forwards(layout, groups, settings, skeleton)
    held = _held_bytes(layout, settings, skeleton, per_batch)
    state = samples.total * skeleton.hidden_size
    layers = len(skeleton.ran)
    disk = (layers + 1) * state * skeleton.dtype.itemsize + 2 * state * 4
    disk = max(disk, 2 * (plans + 1) * state * skeleton.dtype.itemsize)
    proof_disk = 2 * (proof[0] + 1) * proof[1] * skeleton.hidden_size * skeleton.dtype.itemsize
    on_gpu = where.type == "cuda"
    seconds, proof_seconds = None, None
    if timed:
        rates = _Rates(model, layout, groups, samples, settings, where, per_batch)
        seconds = rates.seconds(layers, samples.total, plans, spread=spread, own=own)
        proof_seconds = rates.of_plans(layers, *proof) if proof[0] else 0.0
    return ScoringEstimate(
        tokens=samples.total,
        forwards=4 + spread + own + plans,
        memory_bytes=OVERHEAD_BYTES + (0 if on_gpu else held),
        gpu_bytes=OVERHEAD_BYTES + held if on_gpu else 0,
        disk_bytes=disk,
        seconds=seconds,
        proof_disk_bytes=proof_disk,
        proof_seconds=proof_seconds,
    )


def count_plans(layout: ModelLayout, groups: tuple[Group, ...], settings: ScoreSettings) -> int:
    """How many plans will be measured."""
    count = MIXED_PLANS if len(settings.formats) > 1 else 0
    for fmt in settings.formats:
        kinds = {class_of(g.role) for g in groups if g.role != HEAD and scored_formats(layout, g, [fmt])}
        count += 1 + len(kinds) if kinds else 0
    return count + int(settings.kv_cache)


def _variant_forwards(
    layout: ModelLayout, groups: tuple[Group, ...], settings: ScoreSettings, skeleton: Skeleton
) -> tuple[float, float]:
    """Forward passes that variants of groups cost: of whole layers, and of their groups alone."""
    elements = sum(group.elements for group in groups if group.layer is not None)
    spread, own = 0.0, 0.0
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
        model: EvaluatedModel,
        layout: ModelLayout,
        groups: tuple[Group, ...],
        samples: Samples,
        settings: ScoreSettings,
        device: torch.device,
        per_batch: int,
    ) -> None:
        ran = model.skeleton.ran
        index = ran[len(ran) // 2]
        subject = Subject(
            model=model,
            layout=layout,
            groups={group.name: group for group in groups},
            statistics=_ones(layout, model.skeleton, groups, index),
            rounding=settings.rounding,
            target=settings.target,
        )
        self._device = device
        batch = self._batch(_rows(samples, min(per_batch, TIMED_TOKENS)), subject, per_batch)
        self._tokens = sum(batch.lengths)
        variants = LayerVariants(subject, index, device)
        hidden = batch.hidden

        self._forward = forward_time(variants.exact, index, batch, hidden).wall
        self._backward = backward_time(variants.exact, index, batch, hidden).wall
        names = subject.by_layer.get(index, ())
        choices = [
            {name: fmt for name in names if scored_formats(layout, subject.groups[name], [fmt])}
            for fmt in settings.formats
        ]
        self._load = timed(lambda: LayerVariants(subject, index, device), device, twice=True).wall
        self._rounding, self._rounded, self._copy = 0.0, 0.0, 0.0
        for choice in choices:
            make = partial(variants.layer, choice)
            make()  # kernels are compiled, or read
            variants.forget()
            self._rounding += timed(make, device).wall
            self._copy = max(self._copy, timed(make, device).wall)
            self._rounded += forward_time(make(), index, batch, hidden).wall / len(choices)
        self._head = self._time_head(subject, hidden)

    def _batch(self, rows: list[tuple[int, ...]], subject: Subject, per_batch: int) -> Batch:
        skeleton = subject.model.skeleton
        batches = forward_pass.make_batches(rows, per_batch, self._device, pads=skeleton.is_causal)
        forward_pass.embed(skeleton, embedding_weights(subject.model), batches[:1], self._device)
        return batches[0]

    def _time_head(self, subject: Subject, hidden: Tensor) -> float:
        """Seconds that the predictions of one token and their KL take."""
        head = open_head(subject.model, self._device, outer_weights(subject.model, self._device))
        count = max(1, min(hidden.shape[1], LOGITS[self._device.type] // subject.model.vocabulary))
        return prediction_time(head, hidden[:1, :count]).wall

    def seconds(self, layers: int, tokens: int, plans: int, *, spread: float, own: float) -> float:
        """Of all of scoring."""
        passes = tokens / self._tokens * layers
        forwards = 2 * self._forward + self._backward + (plans + 1 + spread + own) * self._rounded
        # for calibration, forwards, backwards and the plans that are measured; variants for the last two
        layers_made = layers * (4 * self._load + 2 * self._rounding + plans * self._copy)
        return passes * forwards + layers_made + (plans + 3) * tokens * self._head

    def of_plans(self, layers: int, plans: int, tokens: int) -> float:
        """Of measuring plans, beside the original, whose weights are rounded in about two formats."""
        passes = tokens / self._tokens * layers
        return passes * (plans + 1) * self._rounded + layers * self._rounding + (plans + 2) * tokens * self._head


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
        experts[name] = _experts(layout, f"{layout.decoder}.{index}.", mixture.names)
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


def _experts(layout: ModelLayout, prefix: str, names: Mapping[tuple[int, str, str], str]) -> ExpertStatistics:
    count = 1 + max(expert for expert, _, _ in names)
    widths = {
        role: layout.weights.tensors[prefix + name].shape[-1]
        for (expert, role, parameter), name in names.items()
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
