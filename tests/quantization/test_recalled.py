"""What statistics say of layers whose samples do not run: E[x^2] of inputs, and folds that leave the model as it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import MakeTiny
from helpers.errors import raises
from helpers.plans import plan_of
from helpers.tiny_families import all_tensors, random_rows, same, write_rows
from helpers.tiny_mixtures import make_mixture
from snugfit.methods.calibrated import Calibrated
from snugfit.methods.expert_folds import is_linear_in_up
from snugfit.model.skeleton import open_skeleton
from snugfit.quantization.collect import collect_statistics
from snugfit.quantization.layer.recalled import products_of, recalled_squares
from snugfit.quantization.plan_checks import check_statistics
from snugfit.quantization.quantize import plan_quantization, quantize
from snugfit.records.statistics_file import STATISTICS_FILE, ExpertCalibration, Statistics, load_statistics

RECIPE = "fp8-int4-awq"


@pytest.fixture(scope="module")
def models(make_tiny: MakeTiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Dense models and mixtures in fp32."""
    folder = tmp_path_factory.mktemp("models")
    dense = {name: make_tiny(name, num_hidden_layers=2, dtype=torch.float32) for name in ("llama", "gemma2", "qwen2")}
    mixtures = ("qwen3_moe", "mixtral", "deepseek_v3")
    return dense | {name: make_mixture(name, folder / name, dtype=torch.float32) for name in mixtures}


def statistics_of(model: Path, out: Path) -> Statistics:
    """Statistics of a model on some rows."""
    rows = write_rows(out.with_suffix(".jsonl"), random_rows((64,) * 4, stop=60))
    collect_statistics(model, output_dir=out, dataset=[rows], device="cpu")
    return load_statistics(out / STATISTICS_FILE)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2", "qwen3_moe", "mixtral", "deepseek_v3"])
def test_folds_leave_the_model_as_it_is(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    """transformers' model with all folds that statistics gave, before anything is rounded, has the same logits."""
    from transformers import AutoModelForCausalLM

    model = models[name]
    known, plan = statistics_of(model, tmp_path / "statistics"), plan_of(model, RECIPE)
    skeleton, tensors = open_skeleton(plan.layout), all_tensors(model)
    network = AutoModelForCausalLM.from_pretrained(model).eval()
    rows = torch.tensor([random_rows((40,), seed=7, stop=60)[0]])
    with torch.no_grad():
        before = network(rows).logits
    method, changed = Calibrated("vllm-blackwell", folds=True, expert_folds=True), dict(tensors)
    for index in range(plan.num_layers):
        squares = {
            key: one * torch.linspace(0.01, 9, len(one))
            for key, one in recalled_squares(plan, skeleton, index, known).items()
        }
        products = products_of(plan, skeleton, index)
        experts = len({number for number, _, _ in skeleton.experts[index].names}) if index in skeleton.experts else 0
        assert len(products) == (experts or 1)
        assert all("shared" not in one.down for one in products)  # they are FP8
        observed = method.recall(squares, products, lambda linear: tensors[f"{linear}.weight"])
        assert len(observed.scaling.inputs) == len(observed.scaling.outputs) > 0
        for linear in (*observed.scaling.inputs, *observed.scaling.outputs):
            changed[f"{linear}.weight"] = observed.scaled(f"{linear}.weight", changed[f"{linear}.weight"])
    from safetensors.torch import save_file

    folded = tmp_path / "folded"
    folded.mkdir()
    (folded / "config.json").write_bytes((model / "config.json").read_bytes())
    save_file({key: one.contiguous() for key, one in changed.items()}, folded / "model.safetensors", {"format": "pt"})
    with torch.no_grad():
        after = AutoModelForCausalLM.from_pretrained(folded).eval()(rows).logits
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)


class Mlp(nn.Module):
    """A gated MLP with some arithmetic of its own."""

    def __init__(self, kind: str, *, bias: bool = False) -> None:
        super().__init__()
        self.kind = kind
        self.gate_proj, self.up_proj = nn.Linear(8, 16), nn.Linear(8, 16, bias=bias)
        self.down_proj = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        """What the kind says."""
        gate, up = torch.nn.functional.silu(self.gate_proj(x)), self.up_proj(x)
        if self.kind == "clamp":
            up = up.clamp(-4096, 4096)
        if self.kind == "offset":
            up = up + 1
        if self.kind == "of up":
            gate = torch.sigmoid(up)
        out: Tensor = self.down_proj(gate * up)
        return out + up.sum() if self.kind == "beside" else out


@pytest.mark.parametrize("kind", ["plain", "clamp", "offset", "of up", "beside"])
def test_only_products_are_folded(kind: str) -> None:
    """An MLP that is more than a product of what up puts out is found by its arithmetic, on the meta device."""
    with torch.device("meta"):
        module = Mlp(kind)
    assert is_linear_in_up(module, "up_proj", "down_proj") == (kind == "plain")


def test_a_bias_or_another_module_is_not_folded() -> None:
    """A bias of up is not scaled with it; linears that a module lacks are none of its own."""
    assert not is_linear_in_up(Mlp("plain", bias=True), "up_proj", "down_proj")
    assert not is_linear_in_up(Mlp("plain"), "up_proj", "other")


def test_families_that_are_skipped(tmp_path: Path) -> None:
    """Experts with biases get no folds, only weighted scales."""
    model = make_mixture("gpt_oss", tmp_path / "model")
    plan = plan_of(model, RECIPE)
    assert products_of(plan, open_skeleton(plan.layout), 0) == []


def test_squares_of_another_width_are_refused_at_once(models: dict[str, Path], tmp_path: Path) -> None:
    """E[x^2] with another number of features than the weight has is refused by the dry run."""
    known = statistics_of(models["llama"], tmp_path / "statistics")
    file = tmp_path / "statistics" / STATISTICS_FILE
    inputs = dict(known.layers[1].inputs)
    other = inputs["model.layers.1.mlp.gate_proj"].squares
    assert other is not None
    inputs["model.layers.1.mlp.down_proj"] = replace(inputs["model.layers.1.mlp.down_proj"], squares=other)
    layers = {**known.layers, 1: replace(known.layers[1], inputs=inputs)}
    file.write_text(replace(known, layers=layers).to_json(), "utf-8")
    with raises("statistics-mismatch", where="model.layers.1.mlp.down_proj"):
        plan_quantization(models["llama"], RECIPE, statistics=file, device="cpu")


def test_weights_without_squares_are_named(models: dict[str, Path], tmp_path: Path) -> None:
    """Weights whose inputs the statistics do not know get plain scales, and a dry run says so; the others weighted."""
    known = statistics_of(models["llama"], tmp_path / "statistics")
    inputs = dict(known.layers[1].inputs)
    inputs["model.layers.1.mlp.down_proj"] = replace(inputs["model.layers.1.mlp.down_proj"], squares=None)
    layers = {**known.layers, 1: replace(known.layers[1], inputs=inputs)}
    file = tmp_path / "some.json"
    file.write_text(replace(known, layers=layers).to_json(), "utf-8")
    notes = plan_quantization(models["llama"], RECIPE, statistics=file, device="cpu").notes
    assert [note for note in notes if "1 weights get plain scales" in note and "layers.1.mlp.down_proj" in note]
    whole = plan_quantization(models["llama"], RECIPE, statistics=tmp_path / "statistics", device="cpu").notes
    assert not any("plain scales" in note for note in whole)
    record = quantize(models["llama"], RECIPE, output_dir=tmp_path / "out", statistics=file, device="cpu")
    rules = {tensor.name: tensor.scale_rule for tensor in record.tensors if tensor.format.startswith("int4")}
    assert rules.pop("model.layers.1.mlp.down_proj.weight") == "absmax"
    assert set(rules.values()) == {"weighted+folds"}


def test_explicit_rules_take_no_part(models: dict[str, Path], tmp_path: Path) -> None:
    """An exact recipe writes the same bytes with statistics as without."""
    statistics_of(models["llama"], tmp_path / "statistics")
    for name, given in (("with", tmp_path / "statistics"), ("without", None)):
        quantize(models["llama"], "fp8-int4-absmax", output_dir=tmp_path / name, device="cpu", statistics=given)
    first, second = (all_tensors(tmp_path / name) for name in ("with", "without"))
    assert all(torch.equal(first[key].view(torch.uint8), second[key].view(torch.uint8)) for key in first)


def test_an_importance_matrix_ignores_settings_of_experts(models: dict[str, Path], tmp_path: Path) -> None:
    """Which tokens were forced matters for ranges alone: statistics without these serve any setting."""
    known = statistics_of(models["qwen3_moe"], tmp_path / "statistics")
    plan = plan_of(models["qwen3_moe"], RECIPE)
    settings = ExpertCalibration(all_experts=False)
    with raises("statistics-mismatch"):
        check_statistics(known, plan.checkpoint, None, settings, where="")
    check_statistics(replace(known, ranges=False), plan.checkpoint, None, settings, where="")


def test_nothing_is_folded_whose_range_was_measured(models: dict[str, Path], tmp_path: Path) -> None:
    """Where statistics have the ranges of inputs, no engine's files have folds that would change those inputs."""
    statistics_of(models["llama"], tmp_path / "statistics")
    given: dict[str, Any] = {"statistics": tmp_path / "statistics", "device": "cpu"}
    found = {}
    for target in ("vllm-blackwell", "marlin", "none"):
        quantize(models["llama"], "nvfp4", output_dir=tmp_path / target, target=target, **given)
        found[target] = all_tensors(tmp_path / target)
    for name, tensor in found["vllm-blackwell"].items():
        assert all(same(tensor, other[name]) for other in found.values()), name
