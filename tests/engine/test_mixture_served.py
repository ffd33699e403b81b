"""A stock vLLM (CPU build) serves the trained tiny mixture as snugfit quantizes it, and agrees with our emulation."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from helpers.run_model import figures_of
from snugfit.data.dataset import Dataset, load_dataset
from snugfit.quantization.quantize import quantize

pytestmark = pytest.mark.engine

MIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-mixture"
SERVE = Path(__file__).parents[2] / "benchmarks" / "serve_vllm.py"
# recipe -> what must run its experts, the profile that says the same, relative bound on perplexity
RECIPES = {
    "nvfp4-moe-four-over-six": ("Nvfp4QuantizationEmulationTritonExperts", "vllm-blackwell", 0.01),
    "fp8-int4-moe-absmax": ("Int4EmulationTritonExperts", "marlin", 0.005),
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Four rows of 256 bytes of each kind of text that the mixture was not trained on."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    texts = [path.read_bytes() for path in sorted((MIXTURE / "held-out").glob("*.txt"))]
    ids = [list(text[start : start + 256]) for text in texts for start in range(8192, 8192 + 4 * 256, 256)]
    file.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids), encoding="utf-8")
    return load_dataset(MIXTURE, [file], num_samples=len(ids), max_seq_length=256)


@pytest.fixture(scope="module")
def served(rows: Dataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every recipe's checkpoint, quantized here and served once; the mixture as it is under `bf16`."""
    python = os.environ.get("SNUGFIT_VLLM_PYTHON")
    if not python:
        pytest.fail("SNUGFIT_VLLM_PYTHON must name the Python of a vLLM environment: run `make engine`")
    work = tmp_path_factory.mktemp("engine")
    (work / "rows.json").write_text(json.dumps({"rows": rows.samples}), encoding="utf-8")
    texts = sorted((MIXTURE / "held-out").glob("*.txt"))
    paths = {"bf16": MIXTURE}
    for recipe in RECIPES:
        paths[recipe] = work / recipe
        quantize(MIXTURE, recipe, output_dir=work / recipe, dataset=texts, num_samples=16, max_seq_length=256)
    entries: dict[str, Any] = {}
    for names, options in ((["bf16"], []), (list(RECIPES), ["--moe-backend", "emulation"])):
        command = [python, str(SERVE), str(work / "rows.json"), str(work / "out.json")]
        command += [*(str(paths[name]) for name in names), "--greedy-tokens", "8", *options]
        subprocess.run(command, check=False)
        entries |= {entry["path"]: entry for entry in json.loads((work / "out.json").read_text())["checkpoints"]}
    return {name: entries[str(path)] for name, path in paths.items()}


@pytest.mark.parametrize("recipe", RECIPES)
def test_engine_runs_experts_as_we_emulate_them(recipe: str, served: dict[str, Any], rows: Dataset) -> None:
    """vLLM runs attention in FP8 and experts under the recipe's scheme, and its perplexity is our emulation's."""
    entry, (experts, profile, bound) = served[recipe], RECIPES[recipe]
    assert "error" not in entry, entry.get("error")
    assert {experts, "ChannelWiseTorchFP8ScaledMMLinearKernel"} <= set(entry["kernels"])
    ours = figures_of(entry["path"], rows, activations=profile).perplexity
    assert entry["perplexity"] == pytest.approx(ours, rel=bound)
    assert entry["perplexity"] > served["bf16"]["perplexity"]


def test_bf16_baseline(served: dict[str, Any], rows: Dataset) -> None:
    """The engine and our walk agree on the mixture as it is within 0.5 %."""
    assert served["bf16"]["perplexity"] == pytest.approx(
        figures_of(MIXTURE, rows, activations="none").perplexity, rel=0.005
    )
