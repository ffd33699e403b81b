"""Whole groups rounded at once, and the sizes that formats should have on disk, for tests."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from snugfit.formats.quantized_weight import QuantizedWeight
from snugfit.formats.spec import FORMATS, FP8_BLOCK, MXFP4_BLOCK, NVFP4_BLOCK, TensorFormat
from snugfit.methods.rounding import round_and_compare


def round_group(
    weights: Mapping[str, Tensor], fmt: TensorFormat, scale_rule: str, objective: str
) -> dict[str, QuantizedWeight]:
    """Quantized weights of one fused group (name -> weight [N, K]), scales chosen by the named rule."""
    rounded = round_and_compare(
        {name: w.clone() for name, w in weights.items()}, fmt, scale_rule, objective, values=False
    )
    return {one.name: one.weight for one in rounded}


def bytes_for(fmt: TensorFormat, shape: tuple[int, int], scale_bytes: int) -> int:
    """Bytes on disk of a weight [N, K] in `fmt`, scales included; `scale_bytes` is the model dtype's size.

    For formats that are written. Not counted: a static activation scale (4 bytes for nvfp4), which belongs to the
    input and not to the weight.
    """
    assert fmt.name in FORMATS, fmt.name
    rows, columns = shape
    if fmt.name in ("nvfp4", "nvfp4a16"):
        return rows * columns // 2 + rows * (columns // NVFP4_BLOCK) + 4
    if fmt.name == "fp8-dynamic":
        return rows * columns + rows * scale_bytes
    if fmt.name == "fp8-block":
        return rows * columns + -(-rows // FP8_BLOCK) * -(-columns // FP8_BLOCK) * scale_bytes
    if fmt.name == "mxfp4":
        return rows * columns // 2 + rows * (columns // MXFP4_BLOCK)
    groups = columns // fmt.group_size
    zero_points = 0 if fmt.symmetric else -(-rows // 8) * 4 * groups
    return rows * (-(-columns // 8) * 4) + rows * groups * scale_bytes + zero_points + 16
