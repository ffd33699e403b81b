"""Options that several verbs share. Every option is the parameter of the Python function, with dashes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from snugfit.byte_counts import parse_bytes
from snugfit.errors import UserError
from snugfit.token_counts import parse_tokens

Profile = Literal["vllm-blackwell", "marlin", "vllm-cpu", "none"]


def tokens(minimum: int = 1) -> Callable[[str | int], int]:
    """A parser of a number of tokens: 4096, 32k (32,768), 1m (1,048,576). typer passes defaults through it as well."""

    def token_count(given: str | int) -> int:
        text = str(given)
        if minimum == 0 and text == "0":
            return 0
        try:
            found = parse_tokens(text)
        except UserError as error:
            raise typer.BadParameter(f"{error.what} {error.remedy}") from None
        if found < minimum:
            raise typer.BadParameter(f"{text} is not in the range x>={minimum}.")
        return found

    return token_count


def size(given: str | int) -> int:
    """A parser of a number of bytes: 9.74GB, 9GiB; typer passes defaults through it as well."""
    try:
        return parse_bytes(str(given), where="")
    except UserError as error:
        raise typer.BadParameter(f"{error.what} {error.remedy}") from None


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A directory with config.json and safetensors weights, or a Hugging Face id (org/name)."
    ),
]
OptionalOutputDir = Annotated[
    Path | None, typer.Option("--output-dir", "-o", metavar="PATH", help="New directory for the result.")
]
Dataset = Annotated[
    list[Path] | None,
    typer.Option(
        "--dataset",
        metavar="PATH",
        help="Text, JSONL or Parquet, repeatable; or a set: YAML, or a name (`snugfit dataset`). "
        "Default: Python's documentation.",
    ),
]
NumSamples = Annotated[
    int | None,
    typer.Option(
        "--num-samples", min=1, metavar="NUMBER", help="Number of samples at most. Default: 32, or the set's."
    ),
]
MaxSeqLength = Annotated[
    int | None,
    typer.Option(
        "--max-seq-length",
        parser=tokens(),
        metavar="TOKENS",
        help="Tokens of a sample at most. Default: 1024, or the set's.",
    ),
]
ShuffleSeed = Annotated[
    int | None,
    typer.Option(
        "--shuffle-seed",
        metavar="NUMBER",
        help="Draw the samples at random from all of each file. Default: from its beginning, or as the set says.",
    ),
]
Engine = Literal["vllm", "vllm-0.24", "vllm-0.19", "aphrodite", "sglang"]
TensorParallelSize = Annotated[
    int, typer.Option("--tensor-parallel-size", "--tp", min=1, metavar="NUMBER", help="Number of such GPUs.")
]
GpuMemoryUtilization = Annotated[
    float | None,
    typer.Option("--gpu-memory-utilization", metavar="SHARE", help="The engine's share of a GPU. Default: its own."),
]
MaxNumSeqs = Annotated[
    int,
    typer.Option("--max-num-seqs", min=1, metavar="NUMBER", help="Number of sequences of that length at once."),
]
Device = Annotated[
    str | None, typer.Option("--device", metavar="NAME", help="cpu, cuda or cuda:N. Default: cuda if available.")
]
TokensPerBatch = Annotated[
    int | None,
    typer.Option("--tokens-per-batch", parser=tokens(), metavar="TOKENS", help="Tokens of one forward pass."),
]
Dtype = Annotated[
    Literal["bfloat16", "float16", "float32"] | None,
    typer.Option("--dtype", help="The dtype in which the model is run. Default: the config's."),
]
CalibrateAllExperts = Annotated[
    bool,
    typer.Option(
        "--moe-calibrate-all-experts/--no-moe-calibrate-all-experts",
        help="Calibrate every expert on all tokens, or only on those that the router sends to it.",
    ),
]
MaxForcedTokens = Annotated[
    int,
    typer.Option(
        "--max-forced-tokens",
        parser=tokens(0),
        metavar="TOKENS",
        help="Tokens at most that an expert sees in a layer in addition to those routed to it.",
    ),
]
ExpertsPerGroup = Annotated[
    int | None,
    typer.Option(
        "--experts-per-group",
        min=1,
        metavar="NUMBER",
        help="Routed experts of a layer that are in memory at once. Default: all, or as many as there is memory for.",
    ),
]
Restart = Annotated[bool, typer.Option("--restart", help="Discard an unfinished run and start again.")]
ForceResume = Annotated[
    bool, typer.Option("--force-resume", help="Resume on another machine, library version or batch.")
]
Activations = Annotated[
    Profile, typer.Option("--activations", help="What the engine does to the inputs of linear layers.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the record as one JSON document.")]


def required(output_dir: Path | None) -> Path:
    """The output directory; UserError without one."""
    if output_dir is None:
        remedy = "Name a new directory, or add `dry_run`."
        raise UserError("an output directory is required.", code="option-missing", where="output_dir", remedy=remedy)
    return output_dir
