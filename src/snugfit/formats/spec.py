"""The table of formats: which shapes each allows, how engines round its inputs, its scale rules. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from snugfit.errors import UserError

NVFP4_BLOCK = 16
MXFP4_BLOCK = 32
E8M0_NAN = 255  # of the exponents of MXFP4
FP8_BLOCK = 128
INT4_GROUPS = (128, 64, 32)
# Of a calibrated input scale: how far beyond the largest calibrated input its range goes, as a factor, where no rule
# says so. E4M3 block scales lose nothing to a small one: they have 2^-6 to 448 for what lies below.
DEFAULT_INPUT_HEADROOM = 2.0
MAX_INPUT_HEADROOM = 448.0  # the largest calibrated input then gets a block scale of 1
WHOLE_ROW = -1  # `group_size` of integers and fp8 with one scale an output channel; 0: one for the whole weight

# How an engine rounds a linear's inputs. Static kinds ("tensor") need a multiplier from the file, the others compute it
# at run time; "asym" has a zero point in addition.
InputKind = Literal[
    "none",
    "nvfp4",  # E2M1 in blocks of 16: E4M3 scales made at run time under a static fp32 one
    "mxfp4",  # E2M1 in blocks of 32 under a power of two
    "fp8-token",
    "fp8-tensor",
    "fp8-tensor-dynamic",  # files may ask for it; no engine profile has it
    "fp8-group",  # groups of input features: 128, or as many as the weight's blocks have
    "int8-token",
    "int8-token-asym",
    "int8-tensor",
    "int8-tensor-asym",
]


@dataclass(frozen=True)
class FormatSpec:
    """One row of the table.

    `in_features_multiple` must divide a weight's input features (0: the group size must). `inputs` is how the format
    asks an engine to round a linear's inputs; with `calibrated` that needs a scale measured on real activations.
    `codes` are the safetensors dtypes in which files store its codes -> the number of codes in one element.
    """

    name: str
    in_features_multiple: int
    inputs: InputKind
    calibrated: bool
    scale_rules: tuple[str, ...]
    codes: Mapping[str, int]


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
            {"U8": 2},
        ),
        # NVFP4 weights, 16-bit activations (W4A16)
        FormatSpec(
            "nvfp4a16",
            NVFP4_BLOCK,
            "none",
            False,
            ("four-over-six", "absmax", "sweep"),
            {"U8": 2},
        ),
        # 8-bit float, one scale an output channel; activations 8-bit, one scale a token (W8A8)
        FormatSpec(
            "fp8-dynamic",
            1,
            "fp8-token",
            False,
            ("absmax",),
            {"F8_E4M3": 1},
        ),
        # 8-bit float, one scale a block of 128 x 128; activations 8-bit, one scale a token and 128 features (W8A8)
        FormatSpec(
            "fp8-block",
            FP8_BLOCK,
            "fp8-group",
            False,
            ("absmax",),
            {"F8_E4M3": 1},
        ),
        # 4-bit float in blocks of 32 under a power of two (OCP MX); activations 4-bit too (W4A4)
        FormatSpec(
            "mxfp4",
            MXFP4_BLOCK,
            "mxfp4",
            False,
            ("absmax", "sweep"),
            {"U8": 2},
        ),
        # 4-bit integer in groups of input features, 16-bit activations (W4A16)
        FormatSpec(
            "int4",
            0,
            "none",
            False,
            ("absmax",),
            {"I32": 8, "I8": 1},
        ),
    )
}

# Further formats in checkpoints of other tools: read and dequantized, never written. Their inputs differ from file to
# file, so the table has none.
READ_ONLY: Mapping[str, FormatSpec] = {
    spec.name: spec
    for spec in (
        # 8-bit float under one scale a weight, an output channel or a block
        FormatSpec("fp8", 1, "none", False, (), {"F8_E4M3": 1}),
        # 8-bit integer under one scale a weight, an output channel or a group of input features
        FormatSpec("int8", 1, "none", False, (), {"I32": 4, "I8": 1}),
    )
}

KEEP = "keep"
NVFP4_FORMATS = frozenset({"nvfp4", "nvfp4a16"})  # which store the same, and differ in inputs

# The scale rule of a recipe's rule that names none, in a format of PLAIN_RULES: the effort of the run decides.
EFFORT = "effort"
# format -> the rule that chooses its scales from the weights alone, if nothing better is known
PLAIN_RULES: Mapping[str, str] = {"nvfp4": "sweep", "nvfp4a16": "sweep", "mxfp4": "absmax", "int4": "absmax"}


@dataclass(frozen=True)
class TensorFormat:
    """How one weight is stored: a format of the table, and its options.

    `group_size` is the number of input features under one scale (WHOLE_ROW: all of an output channel, 0: the whole
    weight, or the format's own block). `symmetric` False means zero points (integers). `block` is the output and input
    features under one scale (fp8; fp8-block has 128 x 128). `inputs` is how the file asks an engine to round inputs,
    None for the table's.
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
        """How the file asks an engine to round this weight's inputs."""
        return self.inputs or self.spec.inputs

    @property
    def has_input_headroom(self) -> bool:
        """Whether the scale of its inputs is calibrated and can have a range beyond what was seen: NVFP4's alone."""
        return self.input_kind == "nvfp4" and self.spec.calibrated

    @property
    def weight_block(self) -> tuple[int, int] | None:
        """Output and input features under one scale, None for a format without blocks."""
        return (FP8_BLOCK, FP8_BLOCK) if self.name == "fp8-block" else self.block

    def label(self) -> str:
        """A short name for tables: the weights' format and options, then "+" and inputs other than the table's."""
        scope = ""
        if self.name in ("fp8", "int8", "int4"):
            scope = {WHOLE_ROW: "-channel", 0: "-tensor"}.get(self.group_size, f"-g{self.group_size}")
        if self.block is not None:
            scope = f"-block{self.block[0]}x{self.block[1]}"
        zero_points = "" if self.symmetric else "-asym"
        inputs = {None: "", "none": "a16"}.get(self.inputs, f"+{self.inputs}")
        return self.name + scope + zero_points + inputs


def headroom_problem(value: object) -> str:
    """What is wrong with a number that is to be an `input_headroom`; "" if nothing is."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 1 <= value <= MAX_INPUT_HEADROOM:
        return ""
    return f"must be a number from 1 to {MAX_INPUT_HEADROOM:g}, or amax, got {value!r}."


def check_shape(fmt: TensorFormat, shape: tuple[int, ...], *, where: str) -> None:
    """UserError, at the place `where`, for a weight whose shape the format does not allow."""

    def refuse(what: str, remedy: str) -> UserError:
        return UserError(what, code="recipe-shape", where=where, remedy=remedy)

    if len(shape) != 2 or 0 in shape:
        what = f"{fmt.name} needs a 2-D weight without empty dimensions, this weight has shape {list(shape)}."
        raise refuse(what, f"Give it `format: {KEEP}` in the recipe.")
    out_features, in_features = shape
    multiple = fmt.group_size if fmt.name == "int4" else fmt.spec.in_features_multiple
    if fmt.name == "fp8-block" and out_features % FP8_BLOCK:
        what = f"fp8-block needs out_features divisible by {FP8_BLOCK}, the weight is {out_features} x {in_features}."
        raise refuse(what, f"Give it `format: fp8-dynamic` or `format: {KEEP}` in an earlier rule.")
    if in_features % multiple:
        what = f"{fmt.label()} needs in_features divisible by {multiple}, the weight is {out_features} x {in_features}."
        smaller = ", or a smaller `group_size`" if fmt.name == "int4" else ""
        raise refuse(what, f"Give it `format: fp8-dynamic` or `format: {KEEP}` in the recipe{smaller}.")
