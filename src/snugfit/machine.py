"""The machine of a run: its devices, the time and memory that the run takes, and the versions of its libraries."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snugfit import distributed
from snugfit.errors import UserError

if TYPE_CHECKING:
    import torch


def pick_device(wanted: str | None) -> torch.device:
    """The torch device of that name, by default cuda where torch can use a GPU; UserError if it does not exist."""
    import torch

    name = wanted or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and distributed.asked_for() > 1:
        name = f"cuda:{distributed.local_rank()}"
    if not re.fullmatch(r"cpu|cuda(:\d{1,4})?", name):
        remedy = "Set `device` to cpu, cuda or cuda:N."
        raise UserError(f"unknown device {name!r}.", code="option-invalid", where="device", remedy=remedy)
    if distributed.asked_for() > 1 and wanted not in (None, "cpu", "cuda"):
        what, remedy = f"{name} is one GPU, and each process takes one of its own.", "Set `device` to cuda or cpu."
        raise UserError(what, code="option-conflict", where="device", remedy=remedy)
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        what, remedy = "this machine has no CUDA device that torch can use.", "Set `device` to cpu."
        raise UserError(what, code="device-unavailable", where="device", remedy=remedy)
    device, count = torch.device(name), torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        what, remedy = f"{name} does not exist: torch sees {count} devices.", "Set `device` to cuda:0."
        raise UserError(what, code="device-unavailable", where="device", remedy=remedy)
    return device


DTYPES = ("bfloat16", "float16", "float32")


def pick_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of this name, None for None; UserError for a name that is not in DTYPES."""
    import torch

    if name is None:
        return None
    if name not in DTYPES:
        remedy = f"Known: {', '.join(DTYPES)}."
        raise UserError(f"unknown dtype {name!r}.", code="option-invalid", where="dtype", remedy=remedy)
    found: torch.dtype = getattr(torch, name)
    return found


@cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU multiplies matrices of bfloat16 faster than those of fp32."""
    import torch

    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.13 has it
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def fix_cublas_workspace() -> None:
    """Have cuBLAS add in one order under torch's strict determinism; it asks for that before its first product."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def deterministic(device: torch.device, *, strictly: bool = False) -> Iterator[None]:
    """On a GPU, backward passes that add in one order: attention's does so only if torch is to be strict about it.

    A RuntimeError is raised then for what can add in no fixed order.
    """
    import torch

    if device.type == "cpu":
        yield
        return
    before, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic  # a module that is an object
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(mode=True, warn_only=not strictly)
    settings.fill_uninitialized_memory = False
    try:
        with warnings.catch_warnings():  # cuBLAS wants a setting that it needs with several streams alone
            warnings.filterwarnings("ignore", message=".*determinis")
            yield
    finally:
        torch.use_deterministic_algorithms(mode=before, warn_only=warned)
        settings.fill_uninitialized_memory = filled


def processors() -> int:
    """Number of processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_bytes(device: torch.device) -> int:
    """Free memory of the device, in bytes, within the limits that this process was given; never below 0.

    Of a GPU what the driver calls free, and what torch's share of a process leaves
    (`torch.cuda.set_per_process_memory_fraction`). Of the CPU what Linux calls available (on other systems half of
    all), what the limits of its cgroups leave, and what RLIMIT_DATA and RLIMIT_AS do. Of several processes on this
    machine each has its part of the CPU's.
    """
    import torch

    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        index = torch.cuda.current_device() if device.index is None else device.index
        allowed = int(torch.cuda.get_per_process_memory_fraction(index) * total)
        return max(0, min(free, allowed - torch.cuda.memory_reserved(device)))
    shared = min([_available_bytes(), *_left_by_cgroups()]) // distributed.local_size()
    return max(0, min([shared, *_left_by_own_limits()]))


def _available_bytes() -> int:
    """Memory of this machine that Linux calls available; half of all on other systems."""
    table = Path("/proc/meminfo")
    if table.exists():
        available = re.search(r"MemAvailable:\s+(\d+) kB", table.read_text(encoding="ascii"))
        if available:
            return int(available.group(1)) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _left_by_own_limits() -> list[int]:
    """What the limits of this process alone leave, on Linux: its private writable memory, its address space."""
    kinds = ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize"))
    softs = ((resource.getrlimit(kind)[0], key) for kind, key in kinds)
    return [soft - _status_bytes(key) for soft, key in softs if soft != resource.RLIM_INFINITY]


@dataclass(frozen=True)
class _CgroupFiles:
    """How a version of Linux's cgroups names a group's limit, its use, and the part that is pages of files."""

    limit: str
    used: str
    pages: tuple[str, ...]


_CGROUP_1 = _CgroupFiles("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file"))
_CGROUP_2 = _CgroupFiles("memory.max", "memory.current", ("active_file", "inactive_file"))


def _left_by_cgroups(groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """What the memory limits of this process's cgroups and of those around them leave; pages of files can go.

    A container may see its own group as the root of `mount`, under another path than `groups` has.
    """
    left = []
    with suppress(OSError):
        for line in groups.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            root, files = (mount, _CGROUP_2) if not controllers else (mount / "memory", _CGROUP_1)
            if controllers and "memory" not in controllers.split(","):
                continue
            inside = Path(path.lstrip("/"))
            left += [found for part in (inside, *inside.parents) if (found := _left_by(root / part, files)) is not None]
    return left


def _left_by(group: Path, files: _CgroupFiles) -> int | None:
    """What one cgroup leaves; None if it has no limit, or none that can be read."""
    with suppress(OSError, ValueError):
        limit, used = (int((group / name).read_text(encoding="ascii")) for name in (files.limit, files.used))
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
        table = dict(line.split(maxsplit=1) for line in lines)
        return limit - used + sum(int(table.get(name, 0)) for name in files.pages)
    return None


def reset_peak_gpu_bytes(device: torch.device) -> None:
    """Start a new measurement of `peak_gpu_bytes`; does nothing for the CPU."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_gpu_bytes(device: torch.device) -> int | None:
    """Peak of the GPU memory that torch held since `reset_peak_gpu_bytes`; None for the CPU."""
    import torch

    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def hardware(device: torch.device) -> dict[str, Any]:
    """Processor, threads and GPU, for the record."""
    import torch

    return {
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that compute and write, for the record."""
    names = ("torch", "transformers", "safetensors")
    return {name: importlib.metadata.version(name) for name in names} | {"python": platform.python_version()}


def rss_bytes() -> int:
    """Resident memory of this process now; its peak on systems that do not report the current value."""
    return _status_bytes("VmRSS") or peak_rss_bytes()


def _status_bytes(key: str) -> int:
    """Bytes of a line of Linux's /proc/self/status; 0 on other systems."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    lines = status.read_text(encoding="ascii", errors="replace").splitlines()
    found = next((line.split()[1] for line in lines if line.startswith(f"{key}:")), "0")
    return int(found) * 1024


def peak_rss_bytes() -> int:
    """Peak resident memory of this process. Linux's VmHWM starts again at exec, where ru_maxrss keeps a parent's."""
    peak = _status_bytes("VmHWM")
    if peak:
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def give_back_memory() -> None:
    """Return freed memory to the system where the C library would keep it (glibc keeps pieces of up to 32 MB)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@dataclass(frozen=True)
class Seconds:
    """What work takes: seconds that pass, and seconds of all processors together that this process has."""

    wall: float = 0.0
    cpu: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.wall + other.wall, self.cpu + other.cpu)

    def __sub__(self, other: Seconds) -> Seconds:
        return Seconds(self.wall - other.wall, self.cpu - other.cpu)

    def __mul__(self, factor: float) -> Seconds:
        return Seconds(self.wall * factor, self.cpu * factor)


NO_TIME = Seconds()


def now(device: torch.device | None = None) -> Seconds:
    """The clocks of this process, for differences; behind all work of a GPU `device`."""
    if device is not None and device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return Seconds(time.perf_counter(), time.process_time())


def timed(work: Callable[[], object], device: torch.device, *, twice: bool = False) -> Seconds:
    """What `work` on `device` takes; with `twice` its second run, behind the compilation of kernels."""
    for _ in range(1 + twice):
        started = now(device)
        work()
        taken = now(device) - started
    return taken


class Clock:
    """Adds up wall seconds by stage."""

    def __init__(self) -> None:
        self.start, self.start_cpu = time.perf_counter(), time.process_time()
        self.stages: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time a stage."""
        start = time.perf_counter()
        yield
        self.stages[stage] = self.stages.get(stage, 0.0) + time.perf_counter() - start

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each stage, and `total` since the clock was made."""
        return self.stages | {"total": time.perf_counter() - self.start}

    @property
    def cpu_seconds(self) -> float:
        """Seconds of all processors together that this process has had since the clock was made."""
        return time.process_time() - self.start_cpu
