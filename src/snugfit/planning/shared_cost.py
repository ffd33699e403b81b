"""What a run waits for beside its own arithmetic: other processes of the machine, and the disk that all share."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from snugfit import distributed
from snugfit.machine import processors
from snugfit.model.forward_pass import Batch
from snugfit.model.hidden_states import StateFile
from snugfit.storage.files import nearest_folder
from snugfit.storage.transfer import Transfer

BYTES, FEWEST, MOST = 1 << 27, 2, 8  # that are written and read, and batches of them


def largest_share(batches: int, processes: int) -> float:
    """The part of so many batches that the process with the most of them has."""
    return -(-batches // processes) / max(1, batches)


def crowding(device: torch.device) -> float:
    """How many times longer work takes where this machine's processes have more threads than it has processors."""
    if device.type == "cuda":
        return 1.0
    alone = max(1.0, torch.get_num_threads() / processors())
    return max(1.0, distributed.local_size() * torch.get_num_threads() / processors()) / alone


def seconds_of_states(batch: Batch, device: torch.device, folder: Path) -> float:
    """Seconds that a batch's hidden states [B, T, H] take to be written or read, whichever is slower.

    A file is made in `folder`, or the nearest one above it that exists, and removed; 0 where that cannot be.
    """
    hidden = batch.hidden
    count = min(MOST, max(FEWEST, BYTES // max(1, hidden.nbytes)))
    size = len(batch.rows)
    batches = [replace(batch, rows=tuple(range(n * size, (n + 1) * size))) for n in range(count)]
    found = []
    try:
        with (
            tempfile.TemporaryDirectory(dir=nearest_folder(folder), prefix=".snugfit-") as place,
            Transfer(device) as transfer,
            StateFile(Path(place) / "states", batches, hidden.shape[-1], hidden.dtype, transfer) as file,
        ):
            started = time.perf_counter()
            for one in batches:
                file.write(one, hidden)
            file.wait()
            found.append(time.perf_counter() - started)
            started = time.perf_counter()
            for one in batches:
                file.read(one)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            found.append(time.perf_counter() - started)
    except OSError:
        return 0.0
    return max(found) / count
