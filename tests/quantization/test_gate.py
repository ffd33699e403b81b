"""Methods at their limits, as the gate tries them: folds that hurt, inputs that say little, kills inside a layer."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import snugfit.quantization.prepare
from conftest import MakeTiny
from helpers.killed import KILLED, contents, in_child
from helpers.tiny_families import all_tensors, random_rows, write_rows
from helpers.tiny_mixtures import rewrite
from snugfit.methods.calibrated import Calibrated
from snugfit.methods.folds import Fold
from snugfit.quantization.quantize import plan_quantization, quantize
from snugfit.quantization.ways import DESCENT_SWEEPS, PLAIN, Way
from snugfit.records.quantize import QuantizeRecord

PROFILE = "vllm-blackwell"
GRID = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
OPTIONS: dict[str, Any] = {"device": "cpu", "tokens_per_batch": 512, "effort": "good"}
GPTQ = Way("gptq", Calibrated(PROFILE, gptq=True))
FOLDS = Way("gptq+folds", Calibrated(PROFILE, gptq=True, folds=True))
Change = Callable[[dict[str, Tensor]], None]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of several segments, enough to hold one of them out."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", random_rows((260,) * 8, stop=60))


@pytest.fixture(scope="module")
def model(make_tiny: MakeTiny) -> Path:
    """A tiny llama whose sides every 4-bit format divides."""
    return make_tiny("llama", num_hidden_layers=2)


def changed(model: Path, folder: Path, change: Change) -> Path:
    """A copy of a model with other tensors."""
    shutil.copytree(model, folder)
    tensors = all_tensors(folder)
    change(tensors)
    rewrite(folder, tensors)
    return folder


def try_ways(monkeypatch: pytest.MonkeyPatch, *ways: Way) -> None:
    """Let runs of effort good try these ways."""
    monkeypatch.setattr(snugfit.quantization.prepare, "ways_of", lambda *_args, **_options: ways)


def run(model: Path, out: Path, rows: Path, recipe: str = "nvfp4", **options: Any) -> QuantizeRecord:
    """A run of effort good."""
    return quantize(model, recipe, output_dir=out, dataset=[rows], **OPTIONS | options)


# --- folds that hurt


def on_the_grid(tensors: dict[str, Tensor]) -> None:
    """Give every linear values of E2M1 under one power of two, with a 6 in each block of 16: formats hold them."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            codes = torch.randint(0, 8, tensor.shape, generator=generator)
            codes[:, ::16] = 7
            signs = torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1
            tensors[name] = (GRID[codes] * signs / 32).to(tensor.dtype)


@pytest.mark.parametrize("recipe", ["nvfp4a16", "mxfp4"])
def test_smoothing_that_only_hurts_is_left_out(
    recipe: str, model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that a format holds exactly lose by every fold, so no layer keeps one, and the plain way wins."""
    exact = changed(model, tmp_path / "exact", on_the_grid)
    record = run(exact, tmp_path / "out", rows, recipe, target="marlin")
    assert [(trial.name, trial.kept) for trial in record.trials] == [
        ("plain", True), ("gptq+folds", False), ("gptq", False), ("weighted", False)
    ]  # fmt: skip
    assert all(trial.kl == 0 for trial in record.trials)
    method = Calibrated("marlin", gptq=True, folds=True)
    try_ways(monkeypatch, Way("gptq+folds", method))
    run(exact, tmp_path / "folds", rows, recipe, target="marlin")
    assert method._verified  # folds were found and can be made
    assert any(method._verified.values())
    source, written = all_tensors(exact), all_tensors(tmp_path / "folds")
    norms = [name for name in source if "norm" in name]
    assert all(torch.equal(source[name], written[name]) for name in norms)
    plain = all_tensors(tmp_path / "out")
    assert all(torch.equal(plain[name].view(torch.uint8), written[name].view(torch.uint8)) for name in plain)


def test_folds_that_hurt_the_model_are_refused(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If layers keep folds that make the output worse, the gate does not keep the way that has them."""
    try_ways(monkeypatch, GPTQ)
    run(model, tmp_path / "gptq", rows)
    monkeypatch.setattr(Calibrated, "_best_factors", _strong())
    try_ways(monkeypatch, GPTQ, FOLDS)
    record = run(model, tmp_path / "out", rows)
    assert [trial.kept for trial in record.trials] == [True, False]
    last = record.trials[-1]
    assert last.gain is not None
    assert last.gain_error is not None
    assert last.gain < -2 * last.gain_error
    assert contents(tmp_path / "out") == contents(tmp_path / "gptq")


def test_gptq_alone_is_tried_where_its_folds_lost(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folds that make the output worse than plain codes do not keep a model from GPTQ."""
    rows = write_rows(tmp_path / "rows.jsonl", random_rows((260,) * 16, stop=60))
    folds = Way("gptq+folds", Calibrated("marlin", gptq=True, folds=True))
    alone = Way("gptq", Calibrated("marlin", gptq=True), unless=(folds.name,))
    monkeypatch.setattr(Calibrated, "_best_factors", _strong())
    try_ways(monkeypatch, PLAIN, folds, alone)
    record = run(model, tmp_path / "out", rows, "nvfp4a16", target="marlin")
    assert [(trial.name, trial.kept) for trial in record.trials] == [
        ("plain", True), ("gptq+folds", False), ("gptq", True)
    ]  # fmt: skip


def test_later_ways_add_to_the_one_that_was_kept(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Coordinate descent takes up GPTQ without folds where that was kept, and folds where nothing calibrated was."""
    rows = write_rows(tmp_path / "rows.jsonl", random_rows((260,) * 16, stop=60))
    method = Calibrated("marlin", gptq=True, folds=True)
    folds, alone = Way("gptq+folds", method), Way("gptq", Calibrated("marlin", gptq=True), unless=("gptq+folds",))
    adds = {"sweeps": 1}
    descent = Way("gptq+folds+descent", method.adding(adds), step="descent", adds=adds)
    assert descent.on(PLAIN) is descent
    assert descent.on(Way("weighted", Calibrated("marlin"))) is descent
    assert descent.on(folds).name == descent.name
    monkeypatch.setattr(Calibrated, "_best_factors", _strong())
    try_ways(monkeypatch, PLAIN, folds, alone, descent)
    record = run(model, tmp_path / "out", rows, "nvfp4a16", target="marlin")
    assert [trial.name for trial in record.trials] == ["plain", "gptq+folds", "gptq", "gptq+descent"]
    assert [trial.kept for trial in record.trials[:3]] == [True, False, True]
    try_ways(monkeypatch, Way("gptq", Calibrated("marlin", gptq=True, sweeps=1)))
    run(model, tmp_path / "alone", rows, "nvfp4a16", target="marlin")
    kept = record.trials[-1].kept
    assert (contents(tmp_path / "out") == contents(tmp_path / "alone")) == kept
    assert not any((tmp_path / "out").rglob("trials"))
    weights = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert record.estimates["disk_bytes"]["actual"] >= weights  # of what was kept, wherever it was made


def _strong() -> Callable[..., Tensor]:
    """What chooses factors of folds that are far from any use."""
    generator = torch.Generator().manual_seed(0)

    def strong(self: Calibrated, module: Any, fold: Fold, moments: Any, targets: Any) -> Tensor:
        del self, moments, targets
        features = len(module.get_parameter(f"{fold.producer}.weight"))
        return torch.exp(torch.randn(features, generator=generator))

    return strong


def test_a_way_that_a_kept_one_contains_is_not_tried(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weighted scales alone are tried only where GPTQ was not kept."""
    rows = write_rows(tmp_path / "rows.jsonl", random_rows((260,) * 16, stop=60))
    weighted = Way("weighted", Calibrated("marlin"), unless=("gptq+folds", "gptq"))
    for sweeps, kept in ((0, True), (-1, False)):
        monkeypatch.setattr(Calibrated, "_choose", _spoiled(Calibrated._choose))
        gptq = Way("gptq", Calibrated("marlin", gptq=True, sweeps=sweeps))
        try_ways(monkeypatch, PLAIN, gptq, weighted)
        record = run(model, tmp_path / f"out{sweeps}", rows, "nvfp4a16", target="marlin")
        assert [(trial.name, trial.kept) for trial in record.trials][:2] == [("plain", True), ("gptq", kept)]
        assert [trial.name for trial in record.trials][2:] == ([] if kept else ["weighted"])
        monkeypatch.undo()


def _spoiled(choose: Callable[..., Any]) -> Callable[..., Any]:
    """What chooses codes, of weights of the other sign where `sweeps` are -1."""

    def spoil(self: Calibrated, group: Any, *given: Any) -> Any:
        if self.sweeps == -1:
            for name in group.weights:
                group.weights[name] = -group.weights[name]
        return choose(self, group, *given)

    return spoil


# --- inputs that say little


def test_too_few_tokens_for_a_hessian(model: Path, tmp_path: Path) -> None:
    """Fewer tokens than input features: a note says so, GPTQ is damped, and nothing worse than plain is kept."""
    few = write_rows(tmp_path / "few.jsonl", random_rows((6,) * 8, stop=60))
    (note,) = (n for n in plan_quantization(model, "nvfp4", dataset=[few], **OPTIONS).notes if "GPTQ" in n)
    assert "42" in note
    assert "128" in note
    record = run(model, tmp_path / "out", few)
    assert [trial.name for trial in record.trials][:3] == ["plain", "weighted", "gptq+folds"]
    kept = [trial.kl for trial in record.trials if trial.kept]
    assert kept == sorted(kept, reverse=True)
    assert all(math.isfinite(trial.kl) for trial in record.trials)
    enough = write_rows(tmp_path / "enough.jsonl", random_rows((20,) * 8, stop=60))
    first = plan_quantization(model, "nvfp4", dataset=[enough], **OPTIONS).ways
    assert [(way.name, way.unless) for way in first][1:] == [
        ("gptq+folds", ()), ("gptq", ("gptq+folds",)), ("weighted", ("gptq+folds", "gptq"))
    ]  # fmt: skip
    for recipe, effort in (("nvfp4", "fast"), ("nvfp4", "good"), ("fp8-dynamic", "good")):
        dataset = [few] if effort == "fast" or recipe != "nvfp4" else [enough]
        options = OPTIONS | {"effort": effort}
        assert not any("GPTQ" in n for n in plan_quantization(model, recipe, dataset=dataset, **options).notes)


def dead(tensors: dict[str, Tensor]) -> None:
    """Nothing comes out of every third feature of a norm, of an up_proj and of a v_proj."""
    tensors["model.layers.0.input_layernorm.weight"][::3] = 0
    tensors["model.layers.1.post_attention_layernorm.weight"][::3] = 0
    tensors["model.layers.0.mlp.up_proj.weight"][::3] = 0
    tensors["model.layers.1.self_attn.v_proj.weight"][::3] = 0


def twins(tensors: dict[str, Tensor]) -> None:
    """Features come in pairs that are always equal, so that E[x x^T] is singular, however many tokens there are."""
    for layer in range(2):
        for leaf in ("gate_proj", "up_proj"):
            weight = tensors[f"model.layers.{layer}.mlp.{leaf}.weight"]
            weight[1::2] = weight[::2]


def silent(tensors: dict[str, Tensor]) -> None:
    """Nothing but zeros comes into the linears of a layer."""
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"model.layers.0.{name}.weight"].zero_()


@pytest.mark.parametrize(
    ("change", "recipe"),
    [(dead, "nvfp4"), (twins, "int4-w4a16"), (silent, "mxfp4")],
)
def test_inputs_that_say_little(change: Change, recipe: str, model: Path, rows: Path, tmp_path: Path) -> None:
    """Dead channels, equal ones and layers without inputs go through every way: finite, and no worse than plain."""
    record = run(changed(model, tmp_path / "model", change), tmp_path / "out", rows, recipe)
    kept = {trial.name: trial.kept for trial in record.trials}
    assert kept.keys() >= {"plain", "gptq+folds"}
    assert ("gptq" in kept) == (not kept["gptq+folds"])
    assert ("weighted" in kept) == (not (kept["gptq+folds"] or kept["gptq"]))
    assert all(math.isfinite(trial.kl) for trial in record.trials)
    plain, best = record.trials[0].kl, [trial.kl for trial in record.trials if trial.kept][-1]
    assert best <= plain
    for name, tensor in all_tensors(tmp_path / "out").items():
        assert tensor.float().isfinite().all(), name
    if change is not silent:
        assert best < 0.9 * plain


# --- kills in the middle of a layer


WAYS = [
    Way("weighted", Calibrated(PROFILE)),
    GPTQ,
    FOLDS,
    Way("descent", Calibrated(PROFILE, gptq=True, folds=True, sweeps=DESCENT_SWEEPS)),
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_kills_inside_a_method(way: Way, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed while a layer is observed, then while its codes are chosen, ends in the same bytes."""
    few = write_rows(tmp_path / "few.jsonl", random_rows((48,) * 8, stop=60))
    try_ways(monkeypatch, way)
    run(model, tmp_path / "whole", few)
    out = tmp_path / "out"

    def killed_while(place: str, arrived: Callable[[Any], bool]) -> int:
        def work() -> None:
            real = getattr(Calibrated, place)

            def watched(self: Calibrated, one: Any, *others: Any) -> Any:
                if arrived(one):
                    os._exit(KILLED)
                return real(self, one, *others)

            monkeypatch.setattr(Calibrated, place, watched)
            run(model, out, few)

        return in_child(work)

    assert killed_while("observe", lambda layer: layer.prefix == "model.layers.1.") == KILLED
    assert killed_while("_choose", lambda group: "model.layers.1.mlp.gate_proj.weight" in group.weights) == KILLED
    record = run(model, out, few)
    assert record.resumed is not None
    assert contents(out) == contents(tmp_path / "whole")
