"""What each engine loads of the files that snugfit writes, on which GPU: seen running, read in its source, or not.

"seen": this project ran the engine on such a file and GPU (docs/engines.md). "read": its source, or its documentation,
has a reader and a kernel for it. "no": neither. vLLM and Aphrodite read compressed-tensors by the same code
(compressed_tensors.py: _get_scheme_from_parts; Aphrodite's is that of its release 0.24.1). SGLang's reader is its own,
here that of 0.5.23: 0.5.22 brought weight-only NVFP4, for NVFP4 before Blackwell too; 0.5.21 and earlier have NVFP4 on
Blackwell alone. It has no linear layer in MXFP4, and FP8 in blocks from sm89 on. Its weight-only NVFP4 refuses fused
weights whose global scales differ, which snugfit never writes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from snugfit.engines.gpus import Generation
from snugfit.engines.kernels import linear_kernel

Loading = Literal["seen", "read", "no"]
# formats of weights, in the words of engines/kernels.py
FORMATS = ("bf16", "fp8-channel", "fp8-block", "nvfp4", "nvfp4a16", "mxfp4", "int4")
# vLLM 0.24 on an H100 (docs/engines.md, docs/serving.md), by engine and generation
_SEEN = {("vllm", "hopper"): frozenset({"bf16", "fp8-channel", "fp8-block", "nvfp4", "mxfp4", "int4"})}
_WORST: tuple[Loading, ...] = ("seen", "read", "no")


def loading(engine: str, fmt: str, generation: Generation) -> Loading:
    """Whether an engine of engines/kernels.py loads this format on such a GPU, and how that is known."""
    if linear_kernel(engine, fmt, generation) is None:
        return "no"
    return "seen" if fmt in _SEEN.get((engine, generation), ()) else "read"


def worst_loading(engine: str, formats: Iterable[str], generation: Generation) -> Loading:
    """That of a file with these formats: as little as is known of any of them."""
    found = [loading(engine, fmt, generation) for fmt in formats]
    return max(found, key=_WORST.index, default="read")
