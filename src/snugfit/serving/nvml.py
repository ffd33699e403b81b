"""The memory of a GPU of this machine, as its driver reports it (NVML, by the package nvidia-ml-py)."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

MISSING = "nvidia-ml-py is not installed (pip install 'snugfit[bench]'): the GPU's memory is not reported"
NO_DRIVER = "no GPU driver answers on this machine: the GPU's memory is not reported"


@dataclass(frozen=True)
class GpuMemory:
    """The name of a GPU, and its bytes: all, and those in use by every process."""

    name: str
    total_bytes: int
    used_bytes: int


def read_gpu(index: int = 0) -> GpuMemory | str:
    """The memory of the GPU number `index` of the driver, or why it cannot be read."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return MISSING
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return NO_DRIVER
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        name, memory = nvml.nvmlDeviceGetName(handle), nvml.nvmlDeviceGetMemoryInfo(handle)
    except nvml.NVMLError as error:
        return f"the driver does not report GPU {index} ({error}): its memory is not reported"
    finally:
        nvml.nvmlShutdown()
    return GpuMemory(name.decode() if isinstance(name, bytes) else str(name), int(memory.total), int(memory.used))
