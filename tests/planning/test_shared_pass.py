"""Plans that share one pass over a model's layers: each is measured as the checkpoint that it would become."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import MakeTiny
from helpers.tiny_mixtures import make_mixture
from snugfit.data.dataset import Dataset, make_dataset
from snugfit.evaluation.held_out import HeldOut
from snugfit.model.layout import read_layout
from snugfit.planning.calibration import calibrate
from snugfit.planning.groups import find_groups
from snugfit.planning.shared_pass import Assigned, SharedPass
from snugfit.planning.variants import open_subject
from snugfit.quantization.quantize import quantize
from snugfit.records.scores import KV_CACHE

CPU = torch.device("cpu")


def rows(count: int = 8, length: int = 40) -> Dataset:
    generator = torch.Generator().manual_seed(3)
    return make_dataset(torch.randint(3, 64, (count, length), generator=generator).tolist(), "rows")


def shared(model: Path, plans: list[Assigned], folder: Path, rounding: str = "plain") -> dict[str, float]:
    layout = read_layout(model)
    statistics = calibrate(layout, rows(), folder, device="cpu")
    subject = open_subject(layout, statistics, rounding=rounding, target="vllm-blackwell")
    found = SharedPass(subject, rows().samples, plans, CPU, tokens_per_batch=128, folder=folder).divergences()
    return {name: float(np.concatenate(parts).mean()) for name, parts in found.items()}


RECIPE = """
name: mixed
rules:
  - {{layers: "0", role: attention, format: fp8-dynamic}}
  - {{layers: "0", role: linear, format: {fmt}}}
  - {{role: linear, format: keep}}
"""


@pytest.mark.parametrize("fmt", ["int4", "fp8-dynamic", "nvfp4"])
def test_a_plan_is_measured_as_its_checkpoint(make_tiny: MakeTiny, tmp_path: Path, fmt: str) -> None:
    """KL of a plan in the shared pass is that of the checkpoint which quantize writes by the same formats."""
    model = make_tiny("llama", num_hidden_layers=2, hidden_size=128)
    recipe = tmp_path / "mixed.yaml"
    recipe.write_text(RECIPE.format(fmt=fmt), encoding="utf-8")
    samples = tmp_path / "rows.jsonl"
    samples.write_text("".join(f'{{"input_ids": {list(row)}}}\n' for row in rows().samples), encoding="utf-8")
    quantize(model, recipe, output_dir=tmp_path / "out", dataset=[samples], effort="fast", device="cpu")
    held_out = HeldOut(model, rows().samples, CPU, profile="vllm-blackwell", tokens_per_batch=128)
    written = float(np.mean(held_out.divergences(tmp_path / "out")))
    choice = {group.name: "fp8-dynamic" if "attn" in group.name else fmt for group in find_groups(read_layout(model))}
    plan = Assigned(name="a", choice={name: one for name, one in choice.items() if ".0." in name})
    nothing, cache = Assigned(name="b"), Assigned(name="c", choice={KV_CACHE: "fp8"})
    rounding = "weighted" if fmt == "nvfp4" else "plain"  # what effort fast does where samples run
    found = shared(model, [plan, nothing, cache], tmp_path, rounding)
    assert found["a"] == pytest.approx(written, rel=0.03)
    assert found["b"] == 0
    assert 0 < found["c"] < found["a"]


def test_experts_and_an_output_head_are_measured_too(tmp_path: Path) -> None:
    """Routed experts of a mixture, of one layer as one, and an output head of its own cost something when rounded."""
    model = make_mixture("qwen3_moe", tmp_path / "model")
    groups = find_groups(read_layout(model))
    experts = next(group for group in groups if group.role == "experts")
    head = next(group for group in groups if group.role == "lm_head")
    plans = [
        Assigned(name="experts", choice={experts.name: "nvfp4"}),
        Assigned(name="finer", choice={experts.name: "fp8-dynamic"}),
        Assigned(name="head", choice={head.name: "fp8-dynamic"}),
    ]
    found = shared(model, plans, tmp_path, "weighted")
    assert found["experts"] > found["finer"] > 0
    assert found["head"] > 0
