"""Codes chosen by what comes into a layer, from end to end on tiny models, in every format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snugfit.quantization.quantize
from conftest import MakeTiny
from helpers.sweeps import thinned
from helpers.tiny_families import all_tensors, random_rows, write_rows
from helpers.tiny_mixtures import make_mixture
from snugfit.formats.quantized_weight import dequantize
from snugfit.methods.calibrated import Calibrated
from snugfit.methods.method import Choice, Method, ObservedLayer, Purpose, WeightGroup
from snugfit.methods.round_to_nearest import ROUND_TO_NEAREST
from snugfit.model import forward_pass
from snugfit.model.emulate import read_module
from snugfit.model.layout import read_layout
from snugfit.progress import SILENT
from snugfit.quantization.layer.read_ahead import ReadAhead
from snugfit.quantization.loop import run_layers
from snugfit.quantization.options import Calibration
from snugfit.quantization.plan import lay_out
from snugfit.quantization.prepare import prepare
from snugfit.quantization.quantize import quantize
from snugfit.quantization.resume import FinishedUnits
from snugfit.quantization.run import Run
from snugfit.recipes.recipe import LoadedRecipe, load_recipe, parse_recipe
from snugfit.records.statistics_file import ExpertCalibration
from snugfit.storage.open import open_checkpoint
from snugfit.storage.staging import resumable

ASYMMETRIC = "name: a\nrules:\n- {role: linear, format: int4, group_size: 32, symmetric: false}\n"
RECIPES: dict[str, LoadedRecipe] = {
    **{name: load_recipe(name) for name in ("nvfp4", "nvfp4a16", "mxfp4", "int4-w4a16", "nvfp4-fp8-hybrid")},
    "int4-asymmetric": parse_recipe(ASYMMETRIC, where="a.yaml"),
}
PROFILE = "vllm-blackwell"
METHODS = {
    "weighted": Calibrated(PROFILE),
    "weighted+gptq": Calibrated(PROFILE, gptq=True),
    "weighted+gptq+folds": Calibrated(PROFILE, gptq=True, folds=True),
    "weighted+gptq+descent+folds": Calibrated(PROFILE, gptq=True, folds=True, sweeps=1),
}
OPTIONS: dict[str, Any] = {"device": "cpu", "tokens_per_batch": 256}


@pytest.fixture(scope="module")
def model(make_tiny: MakeTiny) -> Path:
    """A tiny llama whose sides every 4-bit format divides."""
    return make_tiny("llama", hidden_size=128, intermediate_size=256, num_hidden_layers=2)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of several lengths, so that some are padded."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", random_rows((100, 70, 64, 30, 3, 90), stop=64))


@dataclass
class Watched:
    """A method that keeps its choices of weights."""

    method: Method
    choices: dict[str, Choice] = field(default_factory=dict)

    @property
    def observe(self) -> Any:
        """The method's own."""
        return self.method.observe

    @property
    def correlates(self) -> bool:
        """The method's own."""
        return self.method.correlates

    def input_roundings(self, observed: Any) -> Any:
        """The method's own."""
        return self.method.input_roundings(observed)

    def choose(self, groups: Iterable[WeightGroup], purpose: Purpose) -> Iterator[Choice]:
        """The method's own, noted."""
        for choice in self.method.choose(groups, purpose):
            if choice.codes is not None:
                held = purpose.buffers.get(choice.name)
                assert held is None or choice.weight_16bit is None
                self.choices[choice.name] = choice
            yield choice


def run_method(
    model: Path, recipe: LoadedRecipe, out: Path, rows: Path, method: Method, **options: Any
) -> tuple[dict[str, Tensor], Run]:
    """The tensors that a run with this method writes, and the run."""
    experts = ExpertCalibration(min_tokens_per_expert=0)
    settings: dict[str, Any] = OPTIONS | options
    calibration = Calibration(dataset=[rows], num_samples=32, max_seq_length=1024, experts=experts, **settings)
    prepared = prepare(lay_out(read_layout(model), recipe), calibration, method)
    with resumable(out) as (directory, work):
        finished = FinishedUnits(work, prepared.identity())
        run = Run(prepared=prepared, directory=directory, work=work, finished=finished, progress=SILENT)
        run_layers(run)
        snugfit.quantization.quantize._write_config(prepared.plan, directory)
    return all_tensors(out), run


# the method with everything in every format, those that it consists of in the mix of two; `make slow` has all
@pytest.mark.parametrize(
    ("recipe", "rule"),
    thinned(
        lambda recipe, rule: recipe == "nvfp4-fp8-hybrid" or rule == "weighted+gptq+descent+folds",
        RECIPES,
        [rule for rule in METHODS if rule != "weighted+gptq+folds"],  # descent has folds, too
    ),
)
def test_codes_decode_to_what_the_layer_ran_with(
    recipe: str, rule: str, model: Path, rows: Path, tmp_path: Path
) -> None:
    """In every format: what is written decodes to the values that were run, and records name the rule."""
    method = Watched(METHODS[rule])
    _, run = run_method(model, RECIPES[recipe], tmp_path / "out", rows, method)
    assert len(method.choices) == 14
    checkpoint, plan = open_checkpoint(tmp_path / "out"), run.prepared.plan
    dialect = read_layout(tmp_path / "out").dialect
    for name, choice in method.choices.items():
        assert choice.codes is not None
        assert choice.weight_16bit is not None
        values = dequantize(choice.codes)
        assert torch.equal(values.to(torch.bfloat16), choice.weight_16bit)
        fmt = plan.assignments[name].format
        assert fmt is not None
        read, _ = read_module(checkpoint, dialect, name.removesuffix(".weight"), fmt, tuple(values.shape))
        assert torch.equal(read, values)
    records = [tensor for entry in run.finished.entries for tensor in entry["tensors"]]
    assert {record["scale_rule"] for record in records if record["name"] in method.choices} == {rule}
    errors = {record["name"]: record["relative_error"] for record in records if record["name"] in method.choices}
    assert all(0 < error < 0.2 for error in errors.values())


@dataclass
class Measuring(Watched):
    """Also keeps X^T X of the inputs of each layer's q projection."""

    grams: list[Tensor] = field(default_factory=list)

    @property
    def observe(self) -> Any:
        """Measure, then what the method does."""

        def measure(layer: ObservedLayer) -> Any:
            inputs: list[Tensor] = []
            linear = layer.module.get_submodule("self_attn.q_proj")
            handle = linear.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1).double()))
            layer.run(lambda _: None)
            handle.remove()
            self.grams.append(torch.cat(inputs).t() @ torch.cat(inputs))
            return None if self.method.observe is None else self.method.observe(layer)

        return measure


@pytest.mark.parametrize("recipe", RECIPES)
def test_output_errors_shrink(recipe: str, model: Path, rows: Path, tmp_path: Path) -> None:
    """On the inputs of the first layer's q, k and v: weighted scales lose less than plain ones, GPTQ less."""
    losses = []
    methods: tuple[Method, ...] = (ROUND_TO_NEAREST, METHODS["weighted"], METHODS["weighted+gptq"])
    for number, method in enumerate(methods):
        watched = Measuring(method)
        run_method(model, RECIPES[recipe], tmp_path / str(number), rows, watched)
        total = 0.0
        for leaf in ("q_proj", "k_proj", "v_proj"):
            name = f"model.layers.0.self_attn.{leaf}.weight"
            codes = watched.choices[name].codes
            assert codes is not None
            error = dequantize(codes).double() - all_tensors(model)[name].double()
            total += float(((error @ watched.grams[0]) * error).sum())
        losses.append(total)
    plain, weighted, gptq = losses
    if recipe != "mxfp4":  # powers of two leave little to choose
        assert weighted < plain
    assert gptq < 0.8 * min(weighted, plain)


def test_fast_reads_weights_once_and_runs_layers_twice(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Effort fast: each tensor is loaded once, and each layer passes all samples once to be observed, once chosen."""
    taken: list[str] = []
    passes: list[int] = []
    take = ReadAhead.take

    def counted_take(self: ReadAhead, names: tuple[str, ...]) -> Any:
        taken.extend(names)
        return take(self, names)

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def run(layer: nn.Module, index: int, *args: Any, **options: Any) -> Any:
            passes.append(index)
            return real(layer, index, *args, **options)

        return run

    monkeypatch.setattr(ReadAhead, "take", counted_take)
    for name in ("run_layer", "show_layer"):
        monkeypatch.setattr(forward_pass, name, counted(getattr(forward_pass, name)))
    record = quantize(model, "nvfp4", output_dir=tmp_path / "out", dataset=[rows], effort="fast", **OPTIONS)
    assert len(taken) == len(set(taken))
    assert passes == [0, 0, 1, 1]
    assert {tensor.scale_rule for tensor in record.tensors if tensor.format == "nvfp4"} == {"weighted"}
    assert record.trials == ()
    assert record.held_out is None


def test_fast_without_samples_rounds_to_the_nearest(model: Path, rows: Path, tmp_path: Path) -> None:
    """A recipe that needs no samples gets plain scales, and reads none."""
    record = quantize(model, "nvfp4a16", output_dir=tmp_path / "out", dataset=[rows], effort="fast", **OPTIONS)
    assert {tensor.scale_rule for tensor in record.tensors if tensor.format == "nvfp4a16"} == {"sweep"}
    assert record.dataset is None


@pytest.mark.parametrize(("explicit", "plain"), [("nvfp4-four-over-six", "four-over-six"), ("mxfp4-absmax", "absmax")])
def test_rules_that_name_their_scale_rule_get_exactly_that(
    explicit: str, plain: str, model: Path, rows: Path, tmp_path: Path
) -> None:
    """Calibrated methods leave such weights to round-to-nearest: the same bytes, and no fold touches a norm."""
    recipe = load_recipe(explicit)
    expected, _ = run_method(model, recipe, tmp_path / "plain", rows, ROUND_TO_NEAREST)
    method = Watched(METHODS["weighted+gptq+folds"])
    found, _ = run_method(model, recipe, tmp_path / "out", rows, method)
    assert {choice.scale_rule for choice in method.choices.values()} == {plain}
    assert set(found) == set(expected)
    assert all(torch.equal(found[name].view(torch.uint8), expected[name].view(torch.uint8)) for name in expected)


def test_explicit_rules_beside_others(model: Path, rows: Path, tmp_path: Path) -> None:
    """Beside weights that follow the effort, those with a rule of their own keep it; folds stay off both."""
    text = "name: a\nrules:\n- {role: down, format: nvfp4, scale_rule: absmax}\n- {role: linear, format: nvfp4}\n"
    method = Watched(METHODS["weighted+gptq+folds"])
    run_method(model, parse_recipe(text, where="a.yaml"), tmp_path / "out", rows, method)
    rules = {name.split(".")[-2]: choice.scale_rule for name, choice in method.choices.items()}
    assert rules.pop("down_proj") == "absmax"
    assert set(rules.values()) == {"weighted+gptq+folds"}


def test_the_order_of_tensors_in_the_file_does_not_matter(make_tiny: MakeTiny, rows: Path, tmp_path: Path) -> None:
    """Members of a fused group find their moments whichever of them the file has first."""
    from safetensors.torch import load_file, save_file

    model = make_tiny("llama", num_hidden_layers=1)
    (file,) = model.glob("*.safetensors")
    tensors = load_file(file)
    written = []
    for number, order in enumerate((sorted(tensors), sorted(tensors, reverse=True))):
        folder = tmp_path / f"model-{number}"
        folder.mkdir()
        (folder / "config.json").write_bytes((model / "config.json").read_bytes())
        save_file({name: tensors[name] for name in order}, folder / "model.safetensors", metadata={"format": "pt"})
        method = Watched(METHODS["weighted+gptq+folds"])
        found, _ = run_method(folder, RECIPES["nvfp4"], tmp_path / f"out-{number}", rows, method)
        assert {choice.scale_rule for choice in method.choices.values()} == {"weighted+gptq+folds"}
        written.append(found)
    assert all(torch.equal(written[0][n].view(torch.uint8), written[1][n].view(torch.uint8)) for n in written[0])


def test_experts_get_weighted_scales_alone(rows: Path, tmp_path: Path) -> None:
    """Routed experts' scales are weighted by what they see; they have neither GPTQ nor folds."""
    model = make_mixture("qwen2_moe", tmp_path / "model")
    recipe = parse_recipe("name: a\nrules:\n- {role: [mlp, experts, attention], format: nvfp4}\n", where="a.yaml")
    found = {}
    for name, method in (("plain", ROUND_TO_NEAREST), ("gptq", METHODS["weighted+gptq+folds"])):
        watched = Watched(method)
        found[name], _ = run_method(model, recipe, tmp_path / name, rows, watched)
        assert any(".experts." in one for one in watched.choices)
    experts = [one for one in found["plain"] if ".experts." in one and one.endswith("weight_scale")]
    differing = [one for one in experts if not torch.equal(*(f[one].view(torch.uint8) for f in found.values()))]
    assert len(differing) > len(experts) / 2
    globals_ = [one for one in found["plain"] if ".experts." in one and one.endswith("weight_global_scale")]
    assert all(torch.equal(found["plain"][one], found["gptq"][one]) for one in globals_)


def test_inputs_that_are_all_zero(make_tiny: MakeTiny, rows: Path, tmp_path: Path) -> None:
    """A layer whose norms are zero, so that nothing but zeros comes into its linears, is rounded to the nearest."""
    from safetensors.torch import load_file, save_file

    model = make_tiny("llama", num_hidden_layers=2)
    (file,) = model.glob("*.safetensors")
    tensors = load_file(file)
    for name in tensors:
        if name.startswith("model.layers.0.") and "norm" in name:
            tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})
    for rule in ("weighted", "weighted+gptq+folds"):
        method = Watched(METHODS[rule])
        found, _ = run_method(model, RECIPES["nvfp4a16"], tmp_path / rule, rows, method)
        assert len(method.choices) == 14
        assert all(torch.isfinite(t.float()).all() for n, t in found.items() if n.startswith("model.layers.0."))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes(dtype: torch.dtype, make_tiny: MakeTiny, rows: Path, tmp_path: Path) -> None:
    """Models in fp32 and fp16 run and are written in their own dtype."""
    model = make_tiny("llama", num_hidden_layers=1, dtype=dtype, hidden_size=128)
    for recipe in ("nvfp4", "int4-asymmetric"):
        method = Watched(METHODS["weighted+gptq+folds"])
        found, _ = run_method(model, RECIPES[recipe], tmp_path / recipe, rows, method)
        assert found["model.layers.0.input_layernorm.weight"].dtype == dtype
        for choice in method.choices.values():
            assert choice.codes is not None
            assert choice.weight_16bit is not None
            assert torch.equal(dequantize(choice.codes).to(dtype), choice.weight_16bit)


def test_the_same_bytes_twice(model: Path, rows: Path, tmp_path: Path) -> None:
    """The same run gives the same bytes again, each with a method that knows nothing of the other run."""
    first, second = (
        run_method(
            model, RECIPES["nvfp4"], tmp_path / f"{n}", rows, Calibrated(PROFILE, gptq=True, folds=True, sweeps=1)
        )[0]
        for n in range(2)
    )
    assert all(torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8)) for name in first)


@pytest.mark.parametrize("family", ["qwen3_moe", "granitemoe"])
def test_folds_inside_experts(family: str, rows: Path, tmp_path: Path) -> None:
    """Up and down of experts are folded, and records say so; all else of the first layer stays as without folds."""
    model = make_mixture(family, tmp_path / "model")
    recipe = parse_recipe(
        "name: a\nrules:\n- {role: experts, format: int4}\n- {role: linear, format: fp8-dynamic}\n", where="a.yaml"
    )
    found, runs = {}, {}
    methods = {"weighted": METHODS["weighted"], "weighted+folds": Calibrated(PROFILE, expert_folds=True)}
    for rule, method in methods.items():
        watched = Watched(method)
        found[rule], run = run_method(model, recipe, tmp_path / rule, rows, watched)
        runs[rule] = watched.choices
        records = [tensor for entry in run.finished.entries for tensor in entry["tensors"]]
        rules = {record["scale_rule"] for record in records if ".experts." in record["name"]}
        assert rules == {rule}
    plain, folded = found["weighted"], found["weighted+folds"]
    assert set(plain) == set(folded)
    first = [name for name in plain if ".layers.0." in name]
    same = {name for name in first if torch.equal(plain[name].view(torch.uint8), folded[name].view(torch.uint8))}
    assert {name for name in first if ".experts." not in name or "gate_proj" in name} <= same
    differing = [name for name in first if "down_proj" in name and name.endswith("weight_packed") and name not in same]
    assert len(differing) > 1
    for name in differing:
        up = name.replace("down_proj", "up_proj").removesuffix("_packed")
        before, after = (dequantize(codes) for run in runs.values() if (codes := run[up].codes) is not None)
        ratio = after.norm(dim=1) / before.norm(dim=1)
        assert float(ratio.log().std()) > 0.001  # output features of up were divided by factors


def test_experts_that_cannot_be_folded_are_written_as_without_folds(rows: Path, tmp_path: Path) -> None:
    """Experts with biases get weighted scales and no folds, in the same bytes."""
    model = make_mixture("gpt_oss", tmp_path / "model")
    text = "name: a\nrules:\n- {role: experts, format: int4, group_size: 32}\n- {role: linear, format: keep}\n"
    written = [
        run_method(
            model, parse_recipe(text, where="a.yaml"), tmp_path / f"{n}", rows, Calibrated(PROFILE, expert_folds=n)
        )[0]
        for n in (False, True)
    ]
    assert all(torch.equal(written[0][n].view(torch.uint8), written[1][n].view(torch.uint8)) for n in written[0])
