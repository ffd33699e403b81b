"""A norm folded into a mixture: what reads it makes up for it bit for bit, and no token gets other experts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.fp8_sources import as_fp8
from helpers.killed import contents
from helpers.ranks import in_ranks
from helpers.tiny_families import all_tensors, load, random_rows, write_rows
from helpers.tiny_mixtures import make_mixture
from quantization.test_calibrated import Watched, run_method
from snugfit.calibration import routes
from snugfit.calibration.moments import EvenSample, joined
from snugfit.formats.quantized_weight import dequantize
from snugfit.methods import mixture_folds
from snugfit.methods.calibrated import Calibrated
from snugfit.methods.method import ObservedLayer
from snugfit.quantization import prepare, ways
from snugfit.quantization.quantize import quantize
from snugfit.quantization.run import norm_folds_of
from snugfit.recipes.recipe import parse_recipe
from snugfit.records.norm_folds import NormFold, summary

LENGTHS = (100, 70, 64, 30, 3, 90)
RECIPE = "name: a\nrules:\n- {role: experts, format: int4, group_size: 32}\n- {role: linear, format: fp8-dynamic}\n"
HIDDEN = 64
LOUD = slice(None, None, 8)  # features that norms put out many times as large as the others


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of several lengths, so that some are padded."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", random_rows(LENGTHS, stop=64))


def rewrite_norms(model: Path, change: Callable[[Tensor], Tensor]) -> Path:
    """The model with the weights of its norms changed."""
    for file in model.glob("*.safetensors"):
        tensors = load_file(file)
        for name, weight in tensors.items():
            if "norm" in name and weight.shape == (HIDDEN,):
                tensors[name] = change(weight.clone())
        save_file(tensors, file, metadata={"format": "pt"})
    return model


def loud(weight: Tensor) -> Tensor:
    """A norm's weight with a few features that are 24 times as large."""
    weight[LOUD] *= 24
    return weight


def run(model: Path, out: Path, rows: Path, text: str = RECIPE, **method: Any) -> tuple[dict[str, Tensor], Any]:
    """The tensors that are written with the fold, and what became of it in each layer."""
    recipe = parse_recipe(text, where="a.yaml")
    found, made = run_method(model, recipe, out, rows, Calibrated("marlin", **({"norm_folds": True} | method)))
    return found, norm_folds_of(made)


def expert_inputs(name: str, fold: NormFold) -> bool:
    """Whether the tensor is a gate or an up of the fold's routed experts."""
    return name.startswith(f"{fold.layer}.") and ".experts." in name and "down_proj" not in name and "w2" not in name


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "deepseek_v3", "minimax_m2", "gemma4_text"])
def test_a_folded_model_is_the_same_function_bit_for_bit(family: str, rows: Path, tmp_path: Path) -> None:
    """With the written norm and router, and the factors in experts and shared experts, transformers' logits are equal.

    Every layer with experts has the fold, its factors are powers of two, and all tokens were checked.
    """
    model = rewrite_norms(make_mixture(family, tmp_path / "model"), loud)
    written, folds = run(model, tmp_path / "out", rows)
    exact = all_tensors(model)
    numbers = {int(name.split("layers.")[1].split(".")[0]) for name in exact if ".experts." in name}
    assert {int(fold.layer.rpartition(".")[2]) for fold in folds} == {n for n in numbers if n < 2}  # 2: predictions
    folded = dict(exact)
    for fold in folds:
        assert fold.reason == ""
        assert fold.tokens == sum(LENGTHS)
        assert fold.changed_tokens == 0
        assert all(name in exact for name in (fold.norm, *fold.readers))
        factors = exact[fold.norm].float() / written[fold.norm].float()
        assert torch.equal(factors.log2(), factors.log2().round())
        assert float(factors.std()) > 0
        folded[fold.norm] = written[fold.norm]
        for name in exact:
            if name in fold.readers or expert_inputs(name, fold):
                folded[name] = (exact[name].float() * factors).to(exact[name].dtype)
        for name in fold.readers:
            if name in written and written[name].dtype == exact[name].dtype:  # it stays in 16 bits
                assert torch.equal(written[name], folded[name])
            else:
                codes, scale = written[name].float(), written[f"{name}_scale"].float()
                error = codes * scale - folded[name].float()
                assert float(error.norm()) < 0.05 * float(folded[name].float().norm())
    copy = tmp_path / "folded"
    shutil.copytree(model, copy, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(folded, copy / "model.safetensors", metadata={"format": "pt"})
    ids = torch.tensor(random_rows((64,), stop=64))
    with torch.no_grad():
        before, after = (load(path)(input_ids=ids, use_cache=False).logits for path in (model, copy))
    assert torch.equal(before, after)


def test_outputs_of_the_experts_err_less(rows: Path, tmp_path: Path) -> None:
    """Where a norm has a few large features, the fold lowers the error of INT4 gate and up on what reaches them."""
    model = rewrite_norms(make_mixture("qwen3_moe", tmp_path / "model"), loud)
    exact = all_tensors(model)
    inputs = torch.randn(300, HIDDEN, generator=torch.Generator().manual_seed(0))
    errors = []
    norm = "model.layers.0.post_attention_layernorm.weight"
    for folds in (False, True):
        method = Watched(Calibrated("marlin", norm_folds=folds))
        written, _ = run_method(model, parse_recipe(RECIPE, where="a.yaml"), tmp_path / f"{folds}", rows, method)
        total = 0.0
        for name in (name for name in exact if "layers.0.mlp.experts." in name and "down_proj" not in name):
            codes = method.choices[name].codes
            assert codes is not None
            right = (inputs * exact[norm].float()) @ exact[name].float().t()
            total += float(((inputs * written[norm].float()) @ dequantize(codes).t() - right).square().sum())
        errors.append(total)
    assert errors[1] < 0.92 * errors[0]


def test_even_inputs_have_no_fold_and_say_so(rows: Path, tmp_path: Path) -> None:
    """Without large features no strength helps: nothing but the record differs from a run without the fold."""
    model = make_mixture("qwen3_moe", tmp_path / "model")
    written, folds = run(model, tmp_path / "out", rows)
    assert [fold.reason for fold in folds] == ["no strength makes outputs of the experts better"] * 2
    same_as_without(model, written, rows, tmp_path)


def same_as_without(model: Path, written: dict[str, Tensor], rows: Path, folder: Path) -> None:
    """Assert that the bytes are those of a run without the fold."""
    plain, folds = run(model, folder / "plain", rows, norm_folds=False)
    assert folds == ()
    assert set(plain) == set(written)
    assert all(torch.equal(plain[name].view(torch.uint8), written[name].view(torch.uint8)) for name in plain)


def test_a_router_that_is_overlooked_refuses_the_fold(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a reader were not found, tokens would get other experts: they are counted, and the layer is as it was."""
    model = rewrite_norms(make_mixture("qwen3_moe", tmp_path / "model"), loud)
    find = mixture_folds.find_readers

    def without_readers(layer: ObservedLayer) -> mixture_folds.Readers:
        found = find(layer)
        assert isinstance(found, mixture_folds.Readers)
        return mixture_folds.Readers(found.norm, ())

    monkeypatch.setattr(mixture_folds, "find_readers", without_readers)
    written, folds = run(model, tmp_path / "out", rows)
    for fold in folds:
        assert 0 < fold.changed_tokens <= fold.tokens == sum(LENGTHS)
        assert str(fold.changed_tokens) in fold.reason
    monkeypatch.undo()
    same_as_without(model, written, rows, tmp_path)


def test_factors_that_are_no_powers_of_two_are_refused(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that cannot be multiplied and divided again exactly stay as they are."""
    model = rewrite_norms(make_mixture("qwen3_moe", tmp_path / "model"), loud)
    monkeypatch.setattr(mixture_folds, "exact_powers", lambda _layer, _norm, factors: factors)
    written, folds = run(model, tmp_path / "out", rows)
    assert all("exactly" in fold.reason for fold in folds)
    same_as_without(model, written, rows, tmp_path)


def test_a_shared_expert_that_keeps_its_codes_refuses_the_fold(rows: Path, tmp_path: Path) -> None:
    """Codes of the source cannot be multiplied: the layer has no fold, and the reason names the weight."""
    model = rewrite_norms(make_mixture("deepseek_v3", tmp_path / "model", wide=True, hidden_size=HIDDEN), loud)
    source = as_fp8(model, tmp_path / "fp8", "ct-channel")
    written, folds = run(source, tmp_path / "out", rows)
    assert len(folds) == 1
    assert "keeps the source's codes" in folds[0].reason
    assert "shared_experts" in folds[0].reason
    same_as_without(source, written, rows, tmp_path)


def test_norms_that_are_offsets_from_one(rows: Path, tmp_path: Path) -> None:
    """1 + w is divided where the quotient less 1 is a number of the dtype; other features keep the factor 1."""

    def offsets(weight: Tensor) -> Tensor:
        weight.uniform_(0.01, 0.1, generator=torch.Generator().manual_seed(0))
        weight[LOUD] = 23.0
        weight[LOUD.step :: 2 * LOUD.step] = 0.3  # 1.3 / 2 - 1 is no number of bf16
        return weight

    model = rewrite_norms(make_mixture("qwen3_5_moe_text", tmp_path / "model"), offsets)
    exact = all_tensors(model)
    written, folds = run(model, tmp_path / "out", rows)
    assert [fold.reason for fold in folds] == ["", ""]
    for fold in folds:
        factors = (1 + exact[fold.norm].float()) / (1 + written[fold.norm].float())
        assert set(factors.tolist()) > {1.0}
        assert torch.equal(factors.log2(), factors.log2().round())
        assert fold.changed_tokens == 0


@pytest.mark.parametrize("rule", ["absmax", None])
def test_experts_that_do_not_follow_the_effort_are_left_alone(rule: str | None, rows: Path, tmp_path: Path) -> None:
    """Neither experts whose rule names a scale rule nor those that stay in 16 bits have the fold, or a note of it."""
    model = rewrite_norms(make_mixture("qwen3_moe", tmp_path / "model"), loud)
    experts = f"format: int4, group_size: 32, scale_rule: {rule}" if rule else "format: keep"
    text = f"name: a\nrules:\n- {{role: experts, {experts}}}\n- {{role: linear, format: nvfp4a16}}\n"
    written, folds = run(model, tmp_path / "out", rows, text)
    assert folds == ()
    norm = "model.layers.0.post_attention_layernorm.weight"
    assert torch.equal(written[norm], all_tensors(model)[norm])


@pytest.mark.parametrize("alone", [True, False])
def test_the_record_says_how_the_fold_was_checked(alone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Effort good tries the fold last; if the gate keeps it (or tries nothing else), the record has its checks."""
    model = rewrite_norms(make_mixture("qwen3_moe", tmp_path / "model", num_hidden_layers=1), loud)
    samples = write_rows(tmp_path / "many.jsonl", random_rows((96,) * 16, stop=64))
    if alone:
        every = ways.ways_of
        monkeypatch.setattr(prepare, "ways_of", lambda *given, **named: every(*given, **named)[-1:])
    options: dict[str, Any] = {"device": "cpu", "min_tokens_per_expert": 0, "effort": "good", "target": "marlin"}
    record = quantize(model, "fp8-int4-awq", output_dir=tmp_path / "out", dataset=[samples], **options)
    before = [trial.name for trial in record.trials[:-1] if trial.kept]
    assert alone or record.trials[-1].name == f"{before[-1]}+norm-folds"
    assert bool(record.norm_folds) == (alone or record.trials[-1].kept)
    stored = json.loads((tmp_path / "out" / "snugfit-record.json").read_text(encoding="utf-8"))["norm_folds"]
    assert [(fold["changed_tokens"], fold["reason"]) for fold in stored] == [(0, "")] * len(record.norm_folds)


def test_the_line_for_people() -> None:
    """The layers that have the fold are counted, the tokens that were checked, and each reason is named once."""
    folds = [
        NormFold(layer="layers.0", norm="n", tokens=30),
        NormFold(layer="layers.1", reason="x"),
        NormFold(layer="layers.2", reason="x"),
    ]
    line = summary(folds)
    assert "1 of 3" in line
    assert "30 tokens" in line
    assert line.endswith("layers.1: x")


FOLDS = Calibrated("marlin", norm_folds=True, expert_folds=True)


@pytest.fixture(scope="module")
def loud_mixtures(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives a mixture of a family whose norms have a few large features, made once."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = rewrite_norms(make_mixture(family, tmp_path_factory.mktemp(family) / "model"), loud)
        return made[family]

    return make


@pytest.mark.parametrize(
    ("family", "processes", "size"),
    [
        ("qwen3_moe", 1, 3),
        ("deepseek_v3", 4, 5),
        pytest.param("qwen3_moe", 2, None, marks=pytest.mark.slow),
        pytest.param("deepseek_v3", 1, 1, marks=pytest.mark.slow),
    ],
)
def test_in_pieces_and_on_several_processes(
    family: str,
    processes: int,
    size: int | None,
    loud_mixtures: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Folds before and inside experts are those of one process with all experts in memory: the same bytes and notes."""
    samples = write_rows(tmp_path / "rows.jsonl", random_rows([100, 70, 64, 30, 3, 90] * 8, stop=64))
    recipe = tmp_path / "a.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    monkeypatch.setattr(prepare, "ways_of", lambda *_, **_options: (ways.Way("folds", FOLDS),))
    monkeypatch.setattr(routes, "SAMPLED_OF_LAYER", 128)  # of which some are left out
    options: dict[str, Any] = {"dataset": [samples], "num_samples": 64, "device": "cpu", "tokens_per_batch": 200}
    options |= {"min_tokens_per_expert": 0, "effort": "good"}
    quantize(loud_mixtures(family), recipe, output_dir=tmp_path / "one", **options)

    def work(_: int) -> None:
        quantize(loud_mixtures(family), recipe, output_dir=tmp_path / "other", experts_per_group=size, **options)

    if processes == 1:
        work(0)
    else:
        assert in_ranks(processes, work) == [0] * processes
    assert contents(tmp_path / "other") == contents(tmp_path / "one")
    records = [json.loads((tmp_path / name / "snugfit-record.json").read_text()) for name in ("one", "other")]
    assert records[0]["norm_folds"] == records[1]["norm_folds"]
    assert any(fold["norm"] and not fold["reason"] for fold in records[0]["norm_folds"])


def test_samples_of_several_processes_are_those_of_one() -> None:
    """Whatever part of the inputs a process has, all together keep what one would have kept."""
    for total, cuts in ((1000, (0, 137, 138, 611, 1000)), (40, (0, 40, 40)), (129, (0, 128, 129))):
        inputs = torch.arange(float(total))[:, None]
        whole = EvenSample(16)
        for part in inputs.split(37):
            whole.add(part)
        parts = []
        for start, stop in pairwise(cuts):
            mine = EvenSample(16, start)
            for part in inputs[start:stop].split(23):
                mine.add(part)
            parts.append(mine)
        assert torch.equal(joined([part.kept() for part in parts], 16), whole.kept().rows)
