"""A stock vLLM (CPU build) loads codes that were copied out of other tools' files, and an output head in FP8."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from conftest import MakeTiny
from helpers.packed_sources import Kind, as_packed
from snugfit.quantization.quantize import quantize

pytestmark = pytest.mark.engine

FP8 = "CompressedTensorsW8A8Fp8"
# kind of source -> the scheme of copied linears. ModelOpt's FP8 with one scale a weight is left out: this build has no
# kernel for it (static_scaled_fp8_quant)
SCHEMES: dict[Kind, str] = {
    "modelopt-nvfp4": "CompressedTensorsW4A4Fp4",
    "ct-nvfp4": "CompressedTensorsW4A4Fp4",
    "ct-int4": "CompressedTensorsWNA16",
    "ct-int4-asym": "CompressedTensorsWNA16",
    "ct-int4-channel": "CompressedTensorsWNA16",
}


@pytest.fixture(scope="module")
def loaded(make_tiny: MakeTiny, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """What vLLM made of each result, by kind, and of one with a head in FP8 ("head")."""
    python = os.environ.get("SNUGFIT_VLLM_PYTHON")
    if not python:
        pytest.fail("SNUGFIT_VLLM_PYTHON must name the Python of a vLLM environment: run `make engine`")
    work = tmp_path_factory.mktemp("copied")
    sizes = {"hidden_size": 128, "head_dim": 64, "intermediate_size": 256, "tie_word_embeddings": False}
    source = make_tiny("llama", **sizes)
    recipe = work / "recipe.yaml"
    rules = "- {role: mlp, format: fp8-dynamic, requantize: true}\n- {role: linear, format: keep}\n"
    recipe.write_text(f"name: mine\nrules:\n{rules}", encoding="utf-8")
    for kind in SCHEMES:
        packed = as_packed(source, work / f"source-{kind}", kind)
        quantize(packed, recipe, output_dir=work / kind, device="cpu")
    head = work / "head.yaml"
    head.write_text(
        "name: head\nrules:\n- {role: lm_head, format: fp8-dynamic}\n- {role: linear, format: keep}\n", encoding="utf-8"
    )
    quantize(source, head, output_dir=work / "head", device="cpu")
    names = [*SCHEMES, "head"]
    script = Path(__file__).with_name("load_in_vllm.py")
    command = [python, str(script), str(work / "out.json"), *(str(work / name) for name in names)]
    subprocess.run(command, check=False)
    found = json.loads((work / "out.json").read_text(encoding="utf-8"))
    return {name: found[str(work / name)] for name in names}


@pytest.mark.parametrize("kind", SCHEMES)
def test_vllm_loads_copied_codes(kind: Kind, loaded: Mapping[str, Any]) -> None:
    """Copied linears run under the scheme of their source's format, the others in FP8."""
    assert "error" not in loaded[kind], loaded[kind].get("error")
    schemes = loaded[kind]["linears"]
    assert schemes["model.layers.0.self_attn.o_proj"] == SCHEMES[kind]
    assert schemes["model.layers.0.mlp.down_proj"] == FP8


def test_vllm_loads_a_head_in_fp8(loaded: Mapping[str, Any]) -> None:
    """The head runs under FP8's scheme, and nothing else is quantized."""
    assert "error" not in loaded["head"], loaded["head"].get("error")
    assert {name for name, scheme in loaded["head"]["linears"].items() if scheme is not None} == {"lm_head"}
    assert loaded["head"]["linears"]["lm_head"] == FP8
