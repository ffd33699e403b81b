"""The machine that a run is on: its devices, what it cost in time and memory, which versions ran."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snugfit.errors import UserError

if TYPE_CHECKING:
    import torch


def pick_device(wanted: str | None) -> torch.device:
    """The torch device of that name, by default cuda where there is one; UserError where there is none such."""
    import torch

    name = wanted or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"unknown device {name!r}.", remedy="Use --device cpu or --device cuda.")
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("this machine has no CUDA device that torch can use.", remedy="Use --device cpu.")
    device = torch.device(name)
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise UserError(f"there is no {name}: torch sees {torch.cuda.device_count()} devices.", remedy="Use cuda:0.")
    torch.cuda.reset_peak_memory_stats(device)
    return device


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device; of the main memory what Linux calls available, elsewhere half of all."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    table = Path("/proc/meminfo")
    if table.exists():
        available = re.search(r"MemAvailable:\s+(\d+) kB", table.read_text(encoding="ascii"))
        if available:
            return int(available.group(1)) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def peak_gpu_bytes(device: torch.device) -> int | None:
    """Most memory that torch had of a GPU since it was picked; None for the CPU."""
    import torch

    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def hardware(device: torch.device) -> dict[str, Any]:
    """Processor, threads and GPU, for the record."""
    import torch

    return {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def versions() -> dict[str, str]:
    """Versions of what computes and writes, for the record."""
    names = ("torch", "transformers", "safetensors")
    return {name: importlib.metadata.version(name) for name in names} | {"python": platform.python_version()}


def rss_bytes() -> int:
    """Resident memory of this process now; its peak where the system does not tell."""
    return _status_bytes("VmRSS") or peak_rss_bytes()


def _status_bytes(key: str) -> int:
    """A line of Linux's /proc/self/status, 0 elsewhere."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    lines = status.read_text(encoding="ascii", errors="replace").splitlines()
    found = next((line.split()[1] for line in lines if line.startswith(f"{key}:")), "0")
    return int(found) * 1024


def peak_rss_bytes() -> int:
    """Peak resident memory of this process. Linux's VmHWM starts afresh at exec, where ru_maxrss keeps a parent's."""
    peak = _status_bytes("VmHWM")
    if peak:
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def give_back_memory() -> None:
    """Return freed memory to the system where the C library would keep it (glibc: pieces of up to 32 MB)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class Clock:
    """Adds up wall seconds by stage."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.stages: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time a stage."""
        begin = time.perf_counter()
        yield
        self.stages[stage] = self.stages.get(stage, 0.0) + time.perf_counter() - begin

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each stage, and `total` since the clock was made."""
        return self.stages | {"total": time.perf_counter() - self.start}


@contextmanager
def progress_bar(show: bool, total: int, what: str) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr; yields the function that moves it by one."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(file=sys.stderr)
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not show) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)
