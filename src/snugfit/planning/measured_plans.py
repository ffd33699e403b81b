"""Plans measured in as many passes over the layers as the disk needs, and what is measured kept for a run that resumes.

Hidden states of a pass are on the disk, before a layer and behind it, once for plans that agree so far. A pass takes as
many plans as fit in its part of the free disk, those that agree longest together. What a plan measures does not depend
on the others of its pass.
"""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from snugfit import distributed
from snugfit.errors import Unfinished
from snugfit.planning.shared_pass import Array, Assigned, Branch, SharedPass, branches_of
from snugfit.planning.variants import Subject
from snugfit.progress import SILENT, Progress
from snugfit.quantization.resume import IDENTITY, FinishedUnits, open_finished, read_json, replace_json
from snugfit.storage.files import nearest_folder
from snugfit.storage.staging import unit_name

DISK_SHARE = 2  # hidden states take at most one part in so many of the free disk
_INDEX = unit_name("measured")  # CRC-32s of what was measured, by plan


def measure_plans(
    subject: Subject,
    rows: Sequence[Sequence[int]],
    plans: Sequence[Assigned],
    device: torch.device,
    *,
    tokens_per_batch: int,
    folder: Path,
    finished: FinishedUnits,
    first: Sequence[int] | None = None,
    title: str = "comparing plans",
    progress: Progress = SILENT,
) -> dict[str, list[Array]]:
    """KL(original || plan) in nats of each token [T - 1] of each row, by plan; NaN where not finite or compared.

    `first` are the positions of the first tokens of rows that are compared, by default 1: all that is predicted.
    `finished` records each layer of a pass, `folder` keeps what is measured: a run that was stopped resumes behind its
    last layer, to the same figures. `title` is what progress shows.
    """
    lengths = [len(row) - 1 for row in rows]
    numbers = {plan.name: number for number, plan in enumerate(plans)}
    found = distributed.by_main(lambda: _measured(folder, numbers, sum(lengths)))
    while left := [plan for plan in plans if plan.name not in found]:
        parts = _next_passes(subject, rows, left, folder, finished)
        if len(parts) > 1:
            what = f"{len(left)} plans are compared in {len(parts)} passes over the layers"
            progress.message(f"{what}: their hidden states take at most 1/{DISK_SHARE} of the free disk")
        one = SharedPass(
            subject,
            rows,
            parts[0],
            device,
            tokens_per_batch=tokens_per_batch,
            folder=folder,
            first=first,
            title=title,
            progress=progress,
        ).divergences(finished)
        found |= {name: np.concatenate(of_rows) for name, of_rows in one.items()}
        _keep(folder, numbers, found, one)
        finished.go_back(0)
    return {plan.name: np.split(found[plan.name], np.cumsum(lengths)[:-1]) for plan in plans}


def divide_plans(
    plans: Sequence[Assigned], layers: Sequence[Sequence[str]], most: int, *, own: bool = False
) -> list[list[Assigned]]:
    """The plans in as few passes as hold at most `most` files of hidden states at once, at least one plan each.

    `layers` are the names of each layer's groups; `own`: plans share no states.
    """
    steps = branches_of(plans, layers, own=own)
    alike = sorted(plans, key=lambda plan: [step[plan.name].number for step in steps])
    parts: list[list[Assigned]] = []
    for plan in alike:
        if parts and most_files(branches_of([*parts[-1], plan], layers, own=own)) <= most:
            parts[-1].append(plan)
        else:
            parts.append([plan])
    return parts


def most_files(steps: Sequence[Mapping[str, Branch]]) -> int:
    """Files of hidden states that a pass has at once: those before a layer, and those behind it."""
    counts = [len({branch.number for branch in step.values()}) for step in steps]
    return max((before + after for before, after in pairwise(counts)), default=counts[0])


def disk_budget(folder: Path) -> int:
    """Bytes that hidden states may take on the disk of a folder, which need not exist."""
    return shutil.disk_usage(nearest_folder(folder)).free // DISK_SHARE


def open_comparison(folder: Path, identity: Mapping[str, Any], *, force: bool = False) -> FinishedUnits:
    """The finished units of this comparison in its folder; what another one left there is removed.

    `force` takes what another machine, library version or batch finished of it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return open_finished(folder, identity, force=force)
    except (Unfinished, distributed.OtherRankError):
        if distributed.is_main():
            for pattern in (IDENTITY, unit_name("*"), "plan-states-*", "divergences-*"):
                for file in folder.glob(pattern):
                    file.unlink()
        distributed.barrier()
        return open_finished(folder, identity)


def _next_passes(
    subject: Subject, rows: Sequence[Sequence[int]], left: Sequence[Assigned], folder: Path, finished: FinishedUnits
) -> list[list[Assigned]]:
    """The passes that are left; the first one is the one that was stopped, if one was."""
    skeleton = subject.model.skeleton
    layers = [subject.places(index) for index in skeleton.ran]
    started = finished.entries[-1].get("plans", []) if finished.done else []
    by_name = {plan.name: plan for plan in left}
    mine = [by_name[name] for name in started if name in by_name]
    if finished.done and len(mine) + 1 != len(started):  # the original is among them
        finished.go_back(0)
        mine = []
    state = max(1, sum(map(len, rows)) * skeleton.hidden_size * skeleton.dtype.itemsize)
    most = distributed.from_main(disk_budget(folder)) // state
    others = [plan for plan in left if plan not in mine]
    parts = divide_plans(others, layers, most, own=skeleton.carries_state) if others else []
    return [mine, *parts] if mine else parts


def _measured(folder: Path, numbers: Mapping[str, int], tokens: int) -> dict[str, Array]:
    """What files hold of an earlier run, by plan; nothing of those that are damaged."""
    index = read_json(folder / _INDEX)
    found: dict[str, Array] = {}
    for name, number in numbers.items():
        file = _file(folder, number)
        if not isinstance(index, dict) or name not in index or not file.is_file():
            continue
        data = file.read_bytes()
        if zlib.crc32(data) == index[name] and len(data) == tokens * 4:
            found[name] = np.frombuffer(data, np.float32)
    return found


def _keep(folder: Path, numbers: Mapping[str, int], found: Mapping[str, Array], new: Mapping[str, Any]) -> None:
    """Write down what a pass measured."""
    if distributed.is_main():
        known = read_json(folder / _INDEX)
        index = dict(known) if isinstance(known, dict) else {}
        for name in new:
            data = found[name].astype(np.float32).tobytes()
            _file(folder, numbers[name]).write_bytes(data)
            index[name] = zlib.crc32(data)
        replace_json(folder / _INDEX, index)
    distributed.barrier()


def _file(folder: Path, number: int) -> Path:
    return folder / f"divergences-{number}"
