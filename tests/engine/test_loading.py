"""A stock vLLM (CPU build) loads what snugfit writes for families whose names and fusions differ."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from conftest import MakeTiny
from helpers.tiny_families import FAMILIES, make_vision_language, random_rows, write_rows
from snugfit.engines.fused import group_modules
from snugfit.quantization.quantize import quantize

pytestmark = pytest.mark.engine

# left out: what this vLLM refuses unquantized (qwen3_next without experts), and what it needs torchvision for (qwen3_5,
# most vision-language models; with torchvision beside it, all of tiny_families' load, seen with vLLM 0.32)
TEXT = ("phi3", "glm4", "smollm3", "granitemoehybrid", "falcon_h1", "gemma4_text", "gpt_neox")
PICTURES = ("smolvlm",)
RECIPES = ("fp8-dynamic", "nvfp4-four-over-six")
CASES = [f"{family}-{recipe}" for family in (*TEXT, *PICTURES) for recipe in RECIPES]


@pytest.fixture(scope="module")
def loaded(make_tiny: MakeTiny, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """By case: modules that were quantized, and what vLLM made of the file."""
    python = os.environ.get("SNUGFIT_VLLM_PYTHON")
    if not python:
        pytest.fail("SNUGFIT_VLLM_PYTHON must name the Python of a vLLM environment: run `make engine`")
    work = tmp_path_factory.mktemp("loading")
    text = write_rows(work / "rows.jsonl", random_rows([32] * 2))
    quantized: dict[str, list[str]] = {}
    for family in (*TEXT, *PICTURES):
        pictures = family in PICTURES
        source = make_vision_language(work / family, family) if pictures else make_tiny(family, **FAMILIES[family])
        for recipe in RECIPES:
            case = f"{family}-{recipe}"
            record = quantize(source, recipe, output_dir=work / case, dataset=[text])
            tensors = [tensor.name for tensor in record.tensors if tensor.format != "as it was"]
            quantized[case] = [name.removesuffix(".weight") for name in tensors]
    script = Path(__file__).with_name("load_in_vllm.py")
    command = [python, str(script), str(work / "out.json"), *(str(work / case) for case in CASES)]
    subprocess.run(command, check=False)
    found = json.loads((work / "out.json").read_text(encoding="utf-8"))
    return {case: {"quantized": quantized[case]} | found[str(work / case)] for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_vllm_loads_it(case: str, loaded: Mapping[str, Any]) -> None:
    """Every weight finds its place, and as many linears run a scheme as our groups of fused ones say."""
    entry = loaded[case]
    assert "error" not in entry, entry.get("error")
    schemes = [scheme for scheme in entry["linears"].values() if scheme is not None]
    assert len(schemes) == len(group_modules(entry["quantized"]))
    assert set(schemes) == {
        "CompressedTensorsW4A4Fp4" if case.endswith("nvfp4-four-over-six") else "CompressedTensorsW8A8Fp8"
    }
