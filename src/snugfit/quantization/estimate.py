"""The memory, GPU memory and disk that a run will need, from shapes: reported before the long work, or refused."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from snugfit import distributed
from snugfit.calibration.moments import SAMPLED_OF_EXPERT
from snugfit.data.dataset import Dataset
from snugfit.engines.fused import group_modules
from snugfit.errors import UserError
from snugfit.machine import free_bytes, rss_bytes
from snugfit.methods import gptq
from snugfit.methods.rounding import SLICE
from snugfit.model.experts import DOWN
from snugfit.model.forward_pass import number_of_batches
from snugfit.model.hidden_states import IN_FLIGHT
from snugfit.model.skeleton import Skeleton
from snugfit.quantization.layer.division import Division, divide, groups_of_units, read_ahead_bytes
from snugfit.quantization.plan import Plan
from snugfit.storage.files import nearest_folder
from snugfit.storage.staging import occupied_bytes
from snugfit.storage.transfer import REMOTE_AHEAD_BYTES, buffer_bytes

# copies in fp32 of a slice of weights while it is rounded
_COPIES = 6
# what a layer holds of a batch at once, in hidden states and in MLP widths
_STATES, _WIDTHS = 6, 3
# of a choice by inputs: copies in fp32 of the largest fused group of weights
_CHOSEN = 4
# of GPTQ: copies of the largest E[x x^T] while it is factored, copies in fp32 of the largest fused group of weights,
# and of the part of a weight that is rounded at once
_SQUARES, _GROUPS, _SLICES = 4, 5, 4
_SUMS = 3  # of what is added up of experts' inputs: the sums, and what means are made of
# of learned scales: tokens of a step, logits at once; what the insides of a layer hold of a token in its backward pass
LEARNED_TOKENS = 4096
LEARNED_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 24}
_LEARNED_STATES, _LEARNED_WIDTHS, _LEARNED_COPIES = 16, 10, 6
_SUM_BYTES = 4  # of a value that experts add up
_ROOM = 0.7  # of free GPU memory: what the peak with hidden states may take
_PADS = 1.25  # of tokens in batches of several lengths
_HEAP = 340_000_000  # at most what the C library keeps of experts' many small tensors meanwhile (measured)
CUDA_HOST_BYTES = 750_000_000  # what the GPU's libraries take of main memory once they work (torch 2.11, CUDA 13)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Peaks in bytes. `gpu` is None on the CPU; `disk` is what is written, hidden states included."""

    ram: int
    gpu: int | None
    disk: int

    def beside(self, other: Estimate | None) -> Estimate:
        """The peaks of both, one after the other."""
        if other is None:
            return self
        gpu = None if self.gpu is None else max(self.gpu, other.gpu or 0)
        return Estimate(ram=max(self.ram, other.ram), gpu=gpu, disk=max(self.disk, other.disk))

    def with_states(self, skeleton: Skeleton, dataset: Dataset | None, device: torch.device) -> Estimate | None:
        """The peaks of a run that holds its samples' hidden states on a GPU; None where these want a roomier one."""
        if self.gpu is None or dataset is None:
            return None
        gpu = self.gpu + dataset.tokens * skeleton.hidden_size * skeleton.dtype.itemsize
        return replace(self, gpu=gpu) if gpu <= _ROOM * free_bytes(device) else None

    def fits(self, device: torch.device) -> bool:
        """Whether there is enough memory and GPU memory now."""
        return self.ram - rss_bytes() <= free_bytes(torch.device("cpu")) and (
            self.gpu is None or self.gpu <= free_bytes(device)
        )

    def line(self) -> str:
        """One line for people."""
        gpu = "" if self.gpu is None else f", {self.gpu / 1e9:.1f} GB of GPU memory"
        return f"this run will need about {self.ram / 1e9:.1f} GB of memory{gpu}, {self.disk / 1e9:.1f} GB of disk"

    def as_record(self) -> dict[str, Any]:
        """For the record."""
        return {"peak_rss_bytes": self.ram, "peak_gpu_bytes": self.gpu, "disk_bytes": self.disk}


def estimate_run(
    plan: Plan,
    skeleton: Skeleton,
    dataset: Dataset | None,
    device: torch.device,
    tokens_per_batch: int,
    *,
    observes: bool = False,
    correlates: bool = False,
    copies: int = 1,
    experts_per_group: int | None = None,
    groups: Sequence[Sequence[tuple[str, ...]]] | None = None,
) -> Estimate:
    """Peaks of a run from shapes alone, on top of what this process holds now.

    With `observes` a method holds the exact weights of a layer, with `correlates` second moments of its inputs too.
    `copies` of the result are on the disk at once. `experts_per_group` routed experts of a layer are in memory at once,
    None for all. `groups` are those of each unit, if they are known already.
    """
    tensors = plan.weights.tensors
    itemsize = max((tensors[name].bytes // max(1, tensors[name].elements) for name in plan.assignments), default=2)
    itemsize = max(itemsize, skeleton.dtype.itemsize)
    hidden = skeleton.hidden_size * itemsize
    tokens = dataset.tokens if dataset else 0
    lengths = [len(sample) for sample in dataset.samples] if dataset else []
    batch = min(tokens, max(tokens_per_batch, *lengths, 0))
    batches = number_of_batches(lengths, tokens_per_batch, pads=skeleton.is_causal)
    moving = buffer_bytes(device, remote=plan.checkpoint.remote is not None)
    in_flight = 2 * IN_FLIGHT * batch * hidden  # hidden states read ahead and written behind
    runs = dataset is not None
    groups = groups_of_units(plan, runs=runs) if groups is None else groups
    divisions = [divide(plan, skeleton, n, some, experts_per_group) for n, some in enumerate(groups)]
    ahead = ahead_of(plan, divisions, device)
    work = embeddings = 0
    for number, unit in enumerate(plan.units):
        if number:
            layer = _layer_bytes(plan, skeleton, unit, divisions[number], runs=runs)
            group = 0 if ahead else layer.group  # read ahead
            rounding = layer.values + 2 * layer.codes + layer.group + group + _COPIES * 4 * SLICE[device.type]
            activations = 0
            if dataset is not None:
                width = max((max(tensors[name].shape) for name in unit if name in plan.assignments), default=0)
                activations = batch * (_STATES * hidden + (_WIDTHS * width + layer.rounded_inputs) * itemsize)
                activations += in_flight
                if divisions[number].pieces:  # what comes to experts, and what they add up
                    activations += 2 * batch * (hidden + _SUM_BYTES * skeleton.hidden_size)
            exact = _sums_of_experts(plan, skeleton, number, batches) if observes or plan.recipe is None else 0
            if observes:
                exact += layer.exact + _choice_by_inputs(plan, unit, groups[number], device, correlates=correlates)
            work = max(work, ahead + exact + max(rounding, layer.values + 2 * layer.codes + group + activations))
            continue
        quantized = [name for name in unit if (a := plan.assignments.get(name)) and a.format and not a.keeps_codes]
        head = sum(tensors[name].bytes + 2 * sum(i.bytes for i in plan.outputs[name]) for name in quantized)
        work = max(work, ahead + head + _COPIES * 4 * SLICE[device.type] if quantized else 0)
        if dataset is not None:
            embeddings = max((tensors[name].bytes for name in unit if "embed" in name), default=0)
    disk = copies * sum(shard.bytes for shard in plan.shards) + 2 * tokens * hidden
    if runs and any(one.pieces for one in divisions):
        disk += int(_PADS * tokens * (hidden + _SUM_BYTES * skeleton.hidden_size))
    routed = (sum(tensors[name].bytes for name in unit if ".experts." in name) for unit in plan.units[1:])
    heap = min(_HEAP, max(routed, default=0))
    now, peak = rss_bytes() + heap, max(embeddings, work)
    if device.type == "cpu":
        return Estimate(ram=now + peak + moving, gpu=None, disk=disk)
    return Estimate(ram=now + CUDA_HOST_BYTES + moving, gpu=peak, disk=disk)


def estimate_learning(
    plan: Plan, skeleton: Skeleton, learned: frozenset[str], dataset: Dataset, device: torch.device
) -> Estimate:
    """Peaks of learning the scales of the weights `learned` at the model's output, from shapes alone; no disk.

    On the device are all layers (codes where they learn, else 16 bits), fp32 scales with gradient and optimizer, a
    hidden state a layer and token, the insides of one layer in its backward pass, both heads, logits of a few tokens.
    """
    tensors, itemsize = plan.weights.tensors, skeleton.dtype.itemsize
    hidden = skeleton.hidden_size * itemsize
    layers = range(1, len(plan.units))
    frozen = sum(itemsize * tensors[n].elements for i in layers for n in plan.units[i] if n not in learned)
    codes = sum(info.bytes for name in learned for info in plan.outputs[name])
    scales = sum(
        _LEARNED_COPIES * 4 * math.prod(info.shape)
        for name in learned
        for info in plan.outputs[name]
        if info.name.endswith(".weight_scale")
    )
    inside = max(sum(2 * itemsize * tensors[n].elements for n in plan.units[i] if n in learned) for i in layers)
    largest = max(tensors[name].elements for name in learned)
    width = max(max(tensors[name].shape) for name in learned)
    tokens = min(dataset.tokens, max(LEARNED_TOKENS, *map(len, dataset.samples)))
    activations = tokens * (len(layers) * hidden + _LEARNED_STATES * hidden + _LEARNED_WIDTHS * width * itemsize)
    head = skeleton.model.get_output_embeddings().weight  # type: ignore[operator]
    heads = 2 * itemsize * int(head.numel()) + _LEARNED_COPIES * 4 * LEARNED_LOGITS[device.type]
    on_device = frozen + codes + scales + inside + 3 * 4 * largest + activations + heads
    kept = 2 * dataset.tokens * hidden  # the first and the original's last hidden states
    if device.type == "cpu":
        return Estimate(ram=rss_bytes() + on_device + kept, gpu=None, disk=0)
    return Estimate(ram=rss_bytes() + CUDA_HOST_BYTES + kept, gpu=on_device, disk=0)


def _choice_by_inputs(
    plan: Plan, unit: Sequence[str], groups: Sequence[tuple[str, ...]], device: torch.device, *, correlates: bool
) -> int:
    """Bytes of what is made of a fused group of a layer's weights that follow the effort, while codes are chosen.

    With `correlates` also of second moments of the inputs of all linears, and of what is made of the largest.
    """
    tensors = plan.weights.tensors
    sizes = (sum(tensors[name].elements for name in group) for group in groups if _follows(plan, group[0]))
    choice = _CHOSEN * 4 * max(sizes, default=0)
    if not correlates:
        return choice
    names = [name.removesuffix(".weight") for name in unit if _follows(plan, name) and ".experts." not in name]
    shapes = [[tensors[f"{name}.weight"].shape for name in group] for group in group_modules(names)]
    squares = [4 * group[0][-1] ** 2 for group in shapes]
    group = max((sum(4 * n * k for n, k in group) for group in shapes), default=0)
    part = 4 * min(max((n * k for group in shapes for n, k in group), default=0), gptq.SLICE[device.type])
    return sum(squares) + max(choice, _SQUARES * max(squares, default=0) + _GROUPS * group + _SLICES * part)


def _follows(plan: Plan, name: str) -> bool:
    assignment = plan.assignments.get(name)
    return assignment is not None and assignment.follows_effort


def _sums_of_experts(plan: Plan, skeleton: Skeleton, number: int, batches: int) -> int:
    """Bytes of what is added up and sampled of what comes to each routed expert of unit `number`, all at once.

    Of several processes all but the first hold the sums of each of their batches.
    """
    mixture = skeleton.experts.get(number - 1)
    if mixture is None:
        return 0
    prefix = f"{plan.decoder}.{number - 1}."
    names = {role: f"{prefix}{name}" for (_, role, what), name in mixture.names.items() if what == "weight"}
    if plan.recipe is not None and not any(_follows(plan, name) for name in names.values()):
        return 0
    found = {role: plan.weights.tensors.get(name) or skeleton.stacks.tensors[name] for role, name in names.items()}
    down = found[DOWN].shape[-1]
    inputs = max(info.shape[-1] for role, info in found.items() if role != DOWN)
    processes = distributed.asked_for()
    held = _SUMS if processes == 1 else _SUMS + -(-batches // processes)
    samples = 0 if plan.recipe is None else 2 * SAMPLED_OF_EXPERT * (1 + processes) * down * skeleton.dtype.itemsize
    return mixture.count * (4 * held * (inputs + down) + samples)


def ahead_of(plan: Plan, divisions: Sequence[Division], device: torch.device) -> int:
    """Bytes of weights that are read while others are worked on: a layer for a GPU, some of a model on the Hub, or 0.

    0 stands for one group at a time, which a disk has in time.
    """
    if device.type == "cuda":
        return read_ahead_bytes(plan, divisions)
    return 0 if plan.checkpoint.remote is None else min(REMOTE_AHEAD_BYTES, read_ahead_bytes(plan, divisions))


def largest_group(skeleton: Skeleton, fits: Callable[[int], bool]) -> int | None:
    """The largest number of routed experts in memory at once that `fits`; None without experts, or where none fits."""
    most = max((mixture.count for mixture in skeleton.experts.values()), default=0) - 1
    least = 0
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(middle) else (least, middle - 1)
    return least or None


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """Of a decoder layer: bytes of its 16-bit weights if it runs, of its codes, of its largest fused group.

    `exact` are the bytes that a method holds that observes the layer. Of experts in pieces one piece counts.
    `rounded_inputs` is the largest number of values a token that a hook holds rounded for the partners of a group.
    """

    values: int
    exact: int
    codes: int
    group: int
    rounded_inputs: int


def _layer_bytes(plan: Plan, skeleton: Skeleton, unit: tuple[str, ...], division: Division, *, runs: bool) -> _Layer:
    tensors, parts = plan.weights.tensors, skeleton.stacks.tensors
    in_pieces = {*division.whole, *(name for piece in division.pieces for name in piece.names)}
    rest = [name for name in unit if name not in in_pieces]
    sizes = [sum(tensors[n].bytes for n in p.names) + sum(parts[n].bytes for n in p.parts) for p in division.pieces]
    whole, piece = sum(tensors[name].bytes for name in rest), max(sizes, default=0)
    codes = max((_code_bytes(plan, one.names) for one in division.pieces), default=0)
    groups = [sum(tensors[name].bytes for name in group) for group in division.coming]
    modules = [name.removesuffix(".weight") for name in unit if name in plan.assignments]
    shared = [group[0] for group in group_modules(modules) if len(group) > 1]
    rounded = max((tensors[f"{module}.weight"].shape[-1] for module in shared), default=0)
    return _Layer(
        values=whole + piece if runs else 0,
        exact=whole if runs else whole + piece,
        codes=_code_bytes(plan, rest) + codes,
        group=max(groups, default=0),
        rounded_inputs=rounded,
    )


def _code_bytes(plan: Plan, names: Sequence[str]) -> int:
    return sum(info.bytes for name in names if name in plan.assignments for info in plan.outputs[name])


def check_memory(estimate: Estimate, device: torch.device, remedy: str = "") -> None:
    """UserError if main memory or GPU memory would not be enough; `remedy` is another than to lower the batch."""
    _check(
        "memory",
        "memory-insufficient",
        (estimate.ram - rss_bytes(), free_bytes(torch.device("cpu"))),
        "this machine",
        remedy or "Lower `tokens_per_batch`, or free memory.",
    )
    if estimate.gpu is not None:
        _check(
            "GPU memory",
            "gpu-memory-insufficient",
            (estimate.gpu, free_bytes(device)),
            str(device),
            remedy or 'Lower `tokens_per_batch`, or set `device` to "cpu".',
        )


def check_disk(estimate: Estimate, output_dir: Path) -> None:
    """UserError if the disk of `output_dir` would not be enough; what an unfinished run wrote there counts as free."""
    folder = nearest_folder(output_dir.absolute().parent)
    partial = output_dir.with_name(output_dir.name + ".partial")
    free = shutil.disk_usage(folder).free + occupied_bytes(partial)
    remedy = "Free some space, or choose an `output_dir` on another disk."
    _check("disk", "disk-insufficient", (estimate.disk, free), str(folder), remedy)


def _check(what: str, code: str, needed_and_free: tuple[int, int], where: str, remedy: str) -> None:
    needed, free = needed_and_free
    if needed > free:
        message = f"{needed / 1e9:.2f} GB of {what} are needed, {free / 1e9:.2f} GB are free."
        raise UserError(message, code=code, where=where, remedy=remedy)
