"""What engines load: one table, the same in docs/engines.md, used by `fit`."""

from __future__ import annotations

from pathlib import Path

from snugfit.engines.gpus import GENERATIONS
from snugfit.engines.kernels import LINEAR
from snugfit.engines.loading import FORMATS, loading, worst_loading

DOCS = Path(__file__).parents[1] / "docs" / "engines.md"


def test_the_table_in_the_docs() -> None:
    """Every line of the table in docs/engines.md is what engines/loading.py says, and none is missing."""
    text = DOCS.read_text(encoding="utf-8")
    for engine in LINEAR:
        for fmt in FORMATS:
            cells = [loading(engine, fmt, generation) for generation in GENERATIONS]
            assert f"| {engine} | {fmt} | {' | '.join(cells)} |" in text


def test_a_file_is_as_known_as_its_least_known_format() -> None:
    """A mix is seen only where all of its formats are, and does not load where one does not."""
    assert worst_loading("vllm", ["nvfp4", "fp8-channel"], "hopper") == "seen"
    assert worst_loading("vllm", ["nvfp4", "nvfp4a16"], "hopper") == "read"
    assert worst_loading("sglang", ["fp8-channel", "mxfp4"], "ada") == "no"
    assert worst_loading("sglang", ["fp8-channel", "nvfp4"], "ada") == "read"
    assert worst_loading("aphrodite", ["nvfp4"], "hopper") == "read"
