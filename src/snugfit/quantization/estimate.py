"""What a quantize run will need, told before the long work and refused where it cannot fit."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from snugfit.data.rows import Rows
from snugfit.errors import UserError
from snugfit.machine import free_bytes, rss_bytes
from snugfit.methods.rounding import SLICE
from snugfit.model.hidden_states import IN_FLIGHT
from snugfit.model.sources import text_config
from snugfit.quantization.plan import Plan, groups_of
from snugfit.storage.files import PIECE
from snugfit.storage.staging import occupied_bytes
from snugfit.storage.transfer import COPIERS, WORKERS

# copies in fp32 of a slice of weights while it is rounded
_COPIES = 6
# what a layer holds at once of a batch, in hidden states and in MLP widths
_STATES, _WIDTHS = 6, 3
_HEAP = 340_000_000  # at most what the C library keeps of experts' many small tensors meanwhile (measured)
_CUDA_HOST = 750_000_000  # what the GPU's libraries take of main memory once they work (torch 2.11, CUDA 13)


@dataclass(frozen=True)
class Estimate:
    """Peaks in bytes. `gpu` is None on the CPU; `disk` is what is written, hidden states included."""

    ram: int
    gpu: int | None
    disk: int

    def line(self) -> str:
        """One line for people."""
        gpu = "" if self.gpu is None else f", {self.gpu / 1e9:.1f} GB of GPU memory"
        return f"this run will need about {self.ram / 1e9:.1f} GB of memory{gpu}, {self.disk / 1e9:.1f} GB of disk"

    def as_record(self) -> dict[str, Any]:
        """For the record."""
        return {"peak_rss_bytes": self.ram, "peak_gpu_bytes": self.gpu, "disk_bytes": self.disk}


def estimate_run(plan: Plan, data: Rows | None, device: torch.device, tokens_per_batch: int) -> Estimate:
    """Peaks of a run from shapes alone, beside what this process has now."""
    config = text_config(plan.checkpoint.config)
    tensors = plan.weights.tensors
    itemsize = max((tensors[name].bytes // max(1, tensors[name].elements) for name in plan.assignments), default=2)
    hidden = int(config.get("hidden_size") or 0) * itemsize
    tokens = data.tokens if data else 0
    longest = max(map(len, data.rows)) if data else 0
    batch = min(tokens, max(tokens_per_batch, longest))
    moving = (2 * WORKERS[device.type] + COPIERS[device.type]) * PIECE
    in_flight = 2 * IN_FLIGHT * batch * hidden  # hidden states read ahead and written behind
    ahead = read_ahead_bytes(plan, device)
    work = embeddings = 0
    for number, unit in enumerate(plan.units):
        if number:
            layer = _layer_bytes(plan, unit, data is not None)
            group = 0 if ahead else layer.group  # read ahead
            rounding = layer.values + 2 * layer.codes + layer.group + group + _COPIES * 4 * SLICE[device.type]
            width = max((max(tensors[name].shape) for name in unit if name in plan.assignments), default=0)
            activations = batch * (_STATES * hidden + _WIDTHS * width * itemsize) + in_flight if data else 0
            work = max(work, ahead + max(rounding, layer.values + 2 * layer.codes + group + activations))
        elif data is not None:
            embeddings = max((tensors[name].bytes for name in unit if "embed" in name), default=0)
    disk = sum(shard.bytes for shard in plan.shards) + 2 * tokens * hidden
    routed = (sum(tensors[name].bytes for name in unit if ".experts." in name) for unit in plan.units[1:])
    heap = min(_HEAP, max(routed, default=0))
    now, peak = rss_bytes() + heap, max(embeddings, work)
    if device.type == "cpu":
        return Estimate(now + peak + moving, None, disk)
    return Estimate(now + _CUDA_HOST + moving, peak, disk)


def read_ahead_bytes(plan: Plan, device: torch.device) -> int:
    """Weights that are read while others are worked on: beside a GPU a whole layer, else one group."""
    layers = (sum(plan.weights.bytes(plan.checkpoint, name) for name in unit) for unit in plan.units[1:])
    return max(layers) if device.type == "cuda" else 0


@dataclass(frozen=True)
class _Layer:
    """Bytes of a decoder layer: its 16-bit values if it is run, its codes, its largest fused group."""

    values: int
    codes: int
    group: int


def _layer_bytes(plan: Plan, unit: tuple[str, ...], walked: bool) -> _Layer:
    tensors = plan.weights.tensors
    values = sum(tensors[name].bytes for name in unit) if walked else 0
    codes = sum(info.bytes for name in unit if name in plan.assignments for info in plan.outputs[name])
    groups = [sum(tensors[name].bytes for name in group) for group in groups_of(plan, unit, walked=False)]
    return _Layer(values, codes, max(groups, default=0))


def check_estimate(estimate: Estimate, target: Path, device: torch.device) -> None:
    """UserError where memory or disk would not be enough."""
    batch = "Lower --tokens-per-batch, or give the machine more"
    _check("memory", estimate.ram - rss_bytes(), free_bytes(torch.device("cpu")), "this machine", f"{batch} memory.")
    if estimate.gpu is not None:
        _check(
            "GPU memory", estimate.gpu, free_bytes(device), str(device), "Lower --tokens-per-batch, or --device cpu."
        )
    folder = next(folder for folder in target.absolute().parents if folder.exists())
    partial = target.with_name(target.name + ".partial")
    free = shutil.disk_usage(folder).free + occupied_bytes(partial)
    _check("disk", estimate.disk, free, str(folder), "Free some room, or choose another disk with -o.")


def _check(what: str, needed: int, free: int, where: str, remedy: str) -> None:
    if needed > free:
        raise UserError(
            f"{needed / 1e9:.2f} GB of {what} are needed, {free / 1e9:.2f} GB are free.", where=where, remedy=remedy
        )
