"""The table of formats: what each costs, what it demands of a shape, what it does to activations. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from snugfit.errors import UserError

NVFP4_BLOCK = 16
MXFP4_BLOCK = 32
FP8_BLOCK = 128
INT4_GROUPS = (128, 64, 32)
WHOLE_ROW = -1  # `group_size` of integers and fp8 with one scale an output channel; 0: one for the whole weight

# What happens to a linear's inputs. Static kinds ("tensor") need a multiplier from the file, the others make theirs at
# run time; "asym" has a zero point besides.
InputKind = Literal[
    "none",
    "nvfp4",  # E2M1 in blocks of 16: E4M3 scales made at run time under a static fp32 one
    "mxfp4",  # E2M1 in blocks of 32 under a power of two
    "fp8-token",
    "fp8-tensor",
    "fp8-tensor-dynamic",  # what files may ask for; no profile does it
    "fp8-group",  # along the columns, 128 unless the weight's blocks say otherwise
    "int8-token",
    "int8-token-asym",
    "int8-tensor",
    "int8-tensor-asym",
]


@dataclass(frozen=True)
class FormatSpec:
    """One row of the table.

    `column_multiple` must divide a weight's columns (0: the rule's group size must).
    `inputs` is what the format asks an engine to do with activations; `calibrated` says that it needs a scale measured
    on real activations.
    """

    name: str
    column_multiple: int
    inputs: InputKind
    calibrated: bool
    scale_rules: tuple[str, ...]


FORMATS: Mapping[str, FormatSpec] = {
    spec.name: spec
    for spec in (
        # 4-bit float, blocks of 16 under an E4M3 scale and one fp32 scale; activations 4-bit too (W4A4)
        FormatSpec(
            "nvfp4",
            NVFP4_BLOCK,
            "nvfp4",
            True,
            ("four-over-six", "absmax", "sweep"),
        ),
        # NVFP4 weights, 16-bit activations (W4A16)
        FormatSpec(
            "nvfp4a16",
            NVFP4_BLOCK,
            "none",
            False,
            ("four-over-six", "absmax", "sweep"),
        ),
        # 8-bit float, one scale an output channel; activations 8-bit, one scale a token (W8A8)
        FormatSpec(
            "fp8-dynamic",
            1,
            "fp8-token",
            False,
            ("absmax",),
        ),
        # 8-bit float, one scale a block of 128 x 128; activations 8-bit, one scale a token and 128 columns (W8A8)
        FormatSpec(
            "fp8-block",
            FP8_BLOCK,
            "fp8-group",
            False,
            ("absmax",),
        ),
        # 4-bit float in blocks of 32 under a power of two (OCP MX); activations 4-bit too (W4A4)
        FormatSpec(
            "mxfp4",
            MXFP4_BLOCK,
            "mxfp4",
            False,
            ("absmax", "sweep"),
        ),
        # 4-bit integer in groups along the columns, 16-bit activations (W4A16)
        FormatSpec(
            "int4",
            0,
            "none",
            False,
            ("absmax",),
        ),
    )
}

# What checkpoints of other tools hold besides: read and dequantized, never written. Their inputs differ from file to
# file, so the table says none.
READ_ONLY: Mapping[str, FormatSpec] = {
    spec.name: spec
    for spec in (
        # 8-bit float under one scale a weight, an output channel or a block
        FormatSpec("fp8", 1, "none", False, ()),
        # 8-bit integer under one scale a weight, an output channel or a group of columns
        FormatSpec("int8", 1, "none", False, ()),
    )
}

KEEP = "keep"


@dataclass(frozen=True)
class TensorFormat:
    """How one weight is stored: a format of the table with its options settled.

    `group_size` is the columns under one scale (WHOLE_ROW: an output channel, 0: the whole weight, or what the format says),
    `symmetric` False means zero points (integers), `block` is the rows and columns under one scale (fp8; fp8-block has
    128 x 128). `inputs` is what the file asks an engine to do with activations, None for what the table says.
    """

    name: str
    group_size: int = 0
    symmetric: bool = True
    block: tuple[int, int] | None = None
    inputs: InputKind | None = None

    @property
    def spec(self) -> FormatSpec:
        """This format's row of the table."""
        return FORMATS[self.name] if self.name in FORMATS else READ_ONLY[self.name]

    @property
    def input_kind(self) -> InputKind:
        """What the file asks an engine to do with this weight's inputs."""
        return self.inputs or self.spec.inputs

    @property
    def weight_block(self) -> tuple[int, int] | None:
        """Rows and columns under one scale, None where scales are not of blocks."""
        return (FP8_BLOCK, FP8_BLOCK) if self.name == "fp8-block" else self.block

    def label(self) -> str:
        """A short name for tables, with the options that matter: weights, then "+" and inputs the name leaves open."""
        scope = ""
        if self.name in ("fp8", "int8", "int4"):
            scope = {WHOLE_ROW: "-channel", 0: "-tensor"}.get(self.group_size, f"-g{self.group_size}")
        if self.block is not None:
            scope = f"-block{self.block[0]}x{self.block[1]}"
        zero_points = "" if self.symmetric else "-asym"
        inputs = {None: "", "none": "a16"}.get(self.inputs, f"+{self.inputs}")
        return self.name + scope + zero_points + inputs


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


def check_shape(fmt: TensorFormat, shape: tuple[int, ...], *, where: str) -> None:
    """Raise UserError where a weight of this shape cannot take the format."""
    if len(shape) != 2 or 0 in shape:
        raise UserError(
            f"{fmt.name} needs a 2-D weight, this one has shape {list(shape)}.",
            where=where,
            remedy=f"Give it `format: {KEEP}` in the recipe.",
        )
    multiple = fmt.group_size if fmt.name == "int4" else fmt.spec.column_multiple
    if fmt.name == "fp8-block" and shape[0] % FP8_BLOCK:
        raise UserError(
            f"fp8-block needs rows divisible by {FP8_BLOCK}, this weight is {shape[0]} x {shape[1]}.",
            where=where,
            remedy=f"Give it `format: fp8-dynamic` or `format: {KEEP}` in a rule before.",
        )
    if shape[1] % multiple:
        raise UserError(
            f"{fmt.label()} needs columns divisible by {multiple}, this weight is {shape[0]} x {shape[1]}.",
            where=where,
            remedy=f"Give it `format: fp8-dynamic` or `format: {KEEP}` in the recipe"
            + (", or a smaller `group_size`." if fmt.name == "int4" else "."),
        )
