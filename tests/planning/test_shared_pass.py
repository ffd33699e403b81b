"""Plans that share one pass over a model's layers: each is measured as the checkpoint that it would become."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import MakeTiny
from helpers.tiny_mixtures import make_mixture
from snugfit.data.dataset import Dataset, make_dataset
from snugfit.evaluation.held_out import HeldOut
from snugfit.model.layout import read_layout
from snugfit.planning import measured_plans
from snugfit.planning.calibration import calibrate
from snugfit.planning.groups import find_groups
from snugfit.planning.measured_plans import divide_plans, measure_plans, most_files, open_comparison
from snugfit.planning.shared_pass import Array, Assigned, SharedPass, branches_of
from snugfit.planning.variants import open_subject
from snugfit.quantization.quantize import quantize
from snugfit.quantization.resume import FinishedUnits
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


def test_another_machine_takes_what_is_measured_only_if_forced(tmp_path: Path) -> None:
    """What another version finished of the same comparison is measured again, unless the caller forces it."""
    first = {"plans": ["a"], "versions": {"torch": "1"}}
    open_comparison(tmp_path, first).commit({"states": {}})
    second = {**first, "versions": {"torch": "2"}}
    assert open_comparison(tmp_path, second, force=True).done == 1
    assert open_comparison(tmp_path, second | {"plans": ["b"]}, force=True).done == 0
    open_comparison(tmp_path, second | {"plans": ["b"]}).commit({"states": {}})
    assert open_comparison(tmp_path, first | {"plans": ["b"]}).done == 0


def test_plans_are_divided_by_what_the_disk_holds() -> None:
    """Passes hold at most so many files of states, or one plan; plans that agree longest are together."""
    layers = [[f"{layer}"] for layer in range(4)]
    plans = [
        Assigned(name=f"{fmt}{last}", choice={**dict.fromkeys("012", fmt), "3": last})
        for last in "xy"
        for fmt in ("a", "b", "c")
    ]
    whole = divide_plans(plans, layers, 100)
    assert [len(part) for part in whole] == [6]
    assert most_files(branches_of(whole[0], layers)) == 4 + 7
    parts = divide_plans(plans, layers, 2 + 3)
    assert [[plan.name for plan in part] for part in parts] == [["ax", "ay"], ["bx", "by"], ["cx", "cy"]]
    assert [len(part) for part in divide_plans(plans, layers, 0)] == [1] * 6
    assert [len(part) for part in divide_plans(plans, layers, 6, own=True)] == [2] * 3


@pytest.mark.parametrize("stop", [None, 1, 3])
def test_a_small_disk_takes_more_passes_to_the_same_figures(
    stop: int | None, make_tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes of few plans measure what one pass does, bit for bit, hold no more files, and resume anywhere."""
    model = make_tiny("llama", num_hidden_layers=2)
    layout = read_layout(model)
    names = [group.name for group in find_groups(layout) if group.layer is not None]
    plans = [Assigned(name=fmt, choice=dict.fromkeys(names, fmt)) for fmt in ("int4", "fp8-dynamic", "nvfp4", "mxfp4")]
    subject = open_subject(layout, calibrate(layout, rows(), tmp_path, device="cpu"), rounding="plain", target="none")
    (tmp_path / "one").mkdir()
    one = SharedPass(subject, rows().samples, plans, CPU, tokens_per_batch=128, folder=tmp_path / "one").divergences()
    state = 8 * 40 * subject.model.skeleton.hidden_size * subject.model.skeleton.dtype.itemsize
    monkeypatch.setattr(measured_plans, "disk_budget", lambda _: 6 * state)  # the original's and two plans', twice
    commit, held, ran = FinishedUnits.commit, [0], [0]

    def watched(self: FinishedUnits, entry: Mapping[str, Any]) -> None:
        commit(self, entry)
        held[0] = max(held[0], len(list((tmp_path / "work").glob("plan-states-*"))))
        ran[0] += 1
        if ran[0] == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(FinishedUnits, "commit", watched)

    def measure() -> dict[str, list[Array]]:
        finished = open_comparison(tmp_path / "work", {})
        options: Any = {"tokens_per_batch": 128, "folder": tmp_path / "work", "finished": finished}
        return measure_plans(subject, rows().samples, plans, CPU, **options)

    if stop is not None:
        with pytest.raises(KeyboardInterrupt):
            measure()
    found = measure()
    assert ran == [4]  # two passes of two layers, none of which ran twice
    assert held[0] <= 6
    assert not list((tmp_path / "work").glob("plan-states-*"))
    assert found.keys() == one.keys()
    for name, parts in one.items():
        assert all(np.array_equal(a, b) for a, b in zip(found[name], parts, strict=True))
    (tmp_path / "work" / "divergences-0").write_bytes(b"damaged")
    again = measure()
    assert ran == [6]
    assert np.array_equal(again["int4"][0], one["int4"][0])
