"""Which engines this project saw load its files, in which versions and where; docs/engines.md has the measurements."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Tried:
    """An engine in a version on some hardware, and the formats (first parts of labels) that it was seen to run."""

    engine: str
    title: str
    version: str
    hardware: str
    formats: tuple[str, ...]


TRIED: tuple[Tried, ...] = (
    Tried(
        engine="vllm",
        title="vLLM",
        version="0.24.0",
        hardware="one H100",
        formats=("nvfp4", "fp8-dynamic", "fp8-block", "int4", "mxfp4"),
    ),
    Tried(
        engine="vllm",
        title="vLLM",
        version="0.32.0 (CPU build)",
        hardware="an x86 CPU, NVFP4 emulated",
        formats=("nvfp4", "fp8-dynamic", "int4"),
    ),
    Tried(
        engine="transformers",
        title="transformers",
        version="5.17 with compressed-tensors",
        hardware="a CPU",
        formats=("nvfp4", "nvfp4a16", "fp8-dynamic", "int4"),
    ),
)


def seen_with(engine: str, labels: frozenset[str]) -> list[Tried]:
    """The trials of an engine that cover every format of a file, by the labels of its formats."""

    def covers(one: Tried, label: str) -> bool:
        return any(label == name or label.startswith(f"{name}-") for name in one.formats)

    return [one for one in TRIED if one.engine == engine and all(covers(one, label) for label in labels)]
