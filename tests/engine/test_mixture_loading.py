"""A stock vLLM (CPU build) finds every expert of what snugfit writes, under the names of each family."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.tiny_families import all_tensors, random_rows, write_rows
from helpers.tiny_mixtures import make_mixture
from snugfit.quantization.quantize import quantize

pytestmark = pytest.mark.engine

FAMILIES = (
    *("mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "granitemoe", "granitemoehybrid"),
    *("glm4_moe", "minimax_m2", "deepseek_v3", "jamba", "lfm2_moe", "hunyuan_v1_moe", "gemma4_text", "granitemoe_swa"),
)
RECIPE = "fp8-int4-moe-absmax"  # experts in NVFP4 have no kernel in vLLM's CPU build
FP8_EXPERTS = ("gemma4_text", "granitemoe_swa")  # families without a kernel for INT4 experts there
# what releases say and transformers' own configs do not
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "minimax_m2": {"scoring_func": "sigmoid", "use_routing_bias": True},
    "deepseek_v3": {"topk_method": "noaux_tc"},
}
# gate and up, and down, of one expert, in the names that files use
FIRST, SECOND = (".w1.", ".w3.", ".gate_proj.", ".up_proj."), (".w2.", ".down_proj.")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """What vLLM made of each family's file, and the file."""
    python = os.environ.get("SNUGFIT_VLLM_PYTHON")
    if not python:
        pytest.fail("SNUGFIT_VLLM_PYTHON must name the Python of a vLLM environment: run `make engine`")
    work = tmp_path_factory.mktemp("mixtures")
    text = write_rows(work / "rows.jsonl", random_rows([32] * 2))
    for family in FAMILIES:
        source = make_mixture(family, work / f"{family}-source", wide=True, **SETTINGS.get(family, {}))
        quantize(source, "fp8-dynamic" if family in FP8_EXPERTS else RECIPE, output_dir=work / family, dataset=[text])
    script = Path(__file__).with_name("load_in_vllm.py")
    command = [python, str(script), str(work / "out.json"), *(str(work / family) for family in FAMILIES)]
    subprocess.run(command, check=False)
    found = json.loads((work / "out.json").read_text(encoding="utf-8"))
    return {family: {"path": work / family} | found[str(work / family)] for family in FAMILIES}


def sums_in_file(path: Path, suffix: str) -> list[int]:
    """The sum of the bytes of all experts' tensors of a kind, of gate and up, then of down, over all layers."""
    sums = [0, 0]
    for name, tensor in all_tensors(path).items():
        # multi-token prediction, which vLLM's model leaves to another
        prediction = "deepseek" in path.name and ".layers.2." in name
        if ".experts." not in name or not name.endswith(f".{suffix}") or prediction:
            continue
        total = int(tensor.contiguous().reshape(-1).view(torch.uint8).sum(dtype=torch.int64))
        sums[0 if any(leaf in name for leaf in FIRST) else 1] += total
    return sums


@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_loads_every_expert(family: str, loaded: Mapping[str, Any]) -> None:
    """Codes and scales of all experts of all layers are in vLLM's parameters, none is passed over."""
    entry = loaded[family]
    assert "error" not in entry, entry.get("error")
    assert entry["experts"]
    for suffix in ("weight",) if family in FP8_EXPERTS else ("weight_packed", "weight_scale"):
        got = [sum(m[f"{which}_{suffix}"] for m in entry["experts"].values()) for which in ("w13", "w2")]
        assert got == sums_in_file(entry["path"], suffix)
    schemes = {scheme for scheme in entry["linears"].values() if scheme is not None}
    assert schemes == {"CompressedTensorsW8A8Fp8"}
