"""Inputs that are hard to round, and every way in which engines round them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from snugfit.formats.spec import InputKind

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROWS = 9
# kind, static scale (and zero point), group
CASES: list[tuple[InputKind, list[float] | None, int]] = [
    ("nvfp4", [0.003], 0),
    ("nvfp4", [1.0], 0),
    ("nvfp4", [2.0**-126], 0),
    ("nvfp4", [1e30], 0),
    ("mxfp4", None, 0),
    ("fp8-token", None, 0),
    ("fp8-group", None, 128),
    ("fp8-group", None, 48),
    ("fp8-group", None, 32),
    ("fp8-tensor", [0.01], 0),
    ("fp8-tensor", [2.0**-140], 0),
    ("int8-token", None, 0),
    ("int8-token-asym", None, 0),
    ("int8-tensor", [0.05], 0),
    ("int8-tensor-asym", [0.05, 3.0], 0),
    ("int8-tensor-asym", [0.05, -7.0], 0),
]
# halfway between neighbours of the grids under scales 1, 448 and 127, and the numbers of the grids
TIES = [
    0.0,
    0.25,
    0.5,
    0.75,
    1,
    1.25,
    1.5,
    1.75,
    2,
    2.5,
    3,
    3.5,
    4,
    5,
    6,
    7,
    448,
    464,
    432,
    -0.25,
    -5,
    -127.5,
    126.5,
    17,
]


def activations(features: int, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Activations [9, features] by what is special about them."""
    generator = torch.Generator().manual_seed(features)
    usual = torch.randn(ROWS, features, generator=generator)
    exponents = torch.randint(-140, 120, (ROWS, features), generator=generator)
    special = usual.clone()
    special[0, 3] = special[7, -1] = float("nan")
    special[1, 5] = special[7, 0] = float("inf")
    special[2, 0] = float("-inf")
    special[3], special[4], special[6] = 0.0, -0.0, 3.25
    special[5, ::2] = -0.0
    ties = torch.tensor(TIES)[torch.randint(len(TIES), (ROWS, features), generator=generator)]
    found = {
        "usual": usual,
        "every size": torch.ldexp(usual, exponents),
        "a size a token": torch.ldexp(usual, torch.linspace(-130, 120, ROWS).round()[:, None]),
        "small": usual * 1e-38,
        "subnormal": usual * 1e-42,
        "not finite": special,
        "ties": ties,
        "far from zero": usual * 1e-3 + 1000,
        "huge": usual.clamp(-1, 1) * 3.4e38,
    }
    yield from ((name, values.to(dtype)) for name, values in found.items())


def same(here: Tensor, there: Tensor) -> bool:
    """Whether every number has the same bits, or is NaN in both."""
    bits = torch.int32 if here.dtype == torch.float32 else torch.int16
    return bool(((here.view(bits) == there.cpu().view(bits)) | (here.isnan() & there.cpu().isnan())).all())
